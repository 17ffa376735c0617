//! What a commit has to do with Envoy: before it Envoy is told what the new tables need, after it what they no longer
//! do.
//!
//! Invariant: nothing here can fail a commit. What Envoy can't judge is refused in the kernel, and named.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thyra_datapath_abi::tables::Tables;
use tracing::warn;

use super::{Store, lock};
use crate::chain::chain;
use crate::l7::{self, L7};
use crate::snapshot::{L7Standing, Snapshot};

impl Store {
    /// Before anything else: listeners that no Envoy is behind any more are nobody's, and so is what nobody holds.
    pub(super) fn forget_listeners(&mut self) {
        let holds = self.l7.as_ref().map(L7::holds).unwrap_or_default();
        if let Err(error) = lock::write(&self.plane).set_holds(holds) {
            warn!(error = chain(&error), "held connections are not cut");
        }
        if self.l7.as_ref().is_some_and(L7::is_inherited) {
            return;
        }
        if let Err(error) = lock::write(&self.plane).set_listeners(BTreeMap::new()) {
            warn!(
                error = chain(&error),
                "connections of an envoy that went are not cut"
            );
        }
    }

    /// Tells Envoy what the tables need, and the kernel which connections to give it. Whether anything changed.
    pub(super) fn prepare_l7(&mut self, tables: &Tables) -> bool {
        let Some(l7) = &mut self.l7 else {
            return false;
        };
        let registrations = &self.held.registrations;
        let cells = l7::cells(tables, self.compiler.residuals(), registrations);
        let changed = l7.prepare(&cells, &self.held.world);
        let holds = l7.holds();
        let inline = cells.iter().filter(|cell| !holds.contains_key(&cell.address));
        let pods: BTreeSet<&str> = inline.map(|cell| cell.place.pod.as_str()).collect();
        let needy = registrations
            .iter()
            .filter(|(_, r)| pods.contains(r.uid.as_str()));
        self.needy = needy.map(|(id, _)| *id).collect();
        self.unsteered.clear();
        for id in self.needy.clone() {
            self.steer(id);
        }
        if changed {
            self.tell_listeners();
        }
        changed
    }

    /// The endpoint's connections go to Envoy where a verdict needs it; asked again after it was attached, which may
    /// have ended that.
    pub(super) fn steer(&mut self, id: u16) {
        let Some(registration) = self
            .held
            .registrations
            .get(&id)
            .filter(|_| self.needy.contains(&id))
        else {
            return;
        };
        if let Err(error) = lock::write(&self.plane).steer(id, &registration.netns) {
            let why = chain(&error);
            warn!(pod = registration.pod(), why, "what needs L7 is refused");
            self.unsteered.insert(id, why);
        }
    }

    /// What was judged once of connections counts only as long as these tables, which are live, ask for it.
    pub(super) fn forget_unheld(&mut self, tables: &Tables) {
        if let Err(error) = lock::write(&self.plane).keep_held(tables) {
            warn!(
                error = chain(&error),
                "what was judged of connections is not forgotten"
            );
        }
    }

    /// The tables that `prepare_l7` saw are live.
    pub(super) fn retire_l7(&mut self) {
        if let Some(l7) = &mut self.l7 {
            l7.retire();
            self.tell_listeners();
        }
    }

    /// Envoy has taken or refused something, or there are other keys.
    pub(super) fn envoy_has_news(&mut self) {
        if let Some(l7) = &mut self.l7 {
            l7.take_keys();
        }
        self.tell_listeners();
        let standing = self.l7_standing();
        if *self.published.borrow().l7 == standing {
            return;
        }
        self.published.send_modify(|s| {
            let mut next = Snapshot::clone(s);
            next.l7 = Arc::new(standing);
            *s = Arc::new(next);
        });
    }

    fn tell_listeners(&mut self) {
        // What an Envoy of an earlier agent judges is not known yet, and stays as it is.
        let Some(l7) = self.l7.as_ref().filter(|l7| !l7.is_inherited()) else {
            return;
        };
        l7.tell_oracles();
        if let Err(error) = lock::write(&self.plane).set_holds(l7.holds()) {
            warn!(
                error = chain(&error),
                "held connections of rules that went are not cut"
            );
        }
        if let Err(error) = lock::write(&self.plane).set_listeners(l7.ports()) {
            warn!(
                error = chain(&error),
                "connections of listeners that went are not cut"
            );
        }
    }

    pub(super) fn l7_standing(&self) -> L7Standing {
        let Some(l7) = &self.l7 else {
            return L7Standing::default();
        };
        let refused = l7.refused().into_iter();
        L7Standing {
            available: true,
            is_awaited: l7.is_awaited(),
            ports: l7.ports(),
            holds: l7.holds(),
            refused: refused
                .map(|(residual, why)| (residual, chain(&why)))
                .collect::<BTreeMap<_, _>>(),
            unsteered: self.unsteered.clone(),
            problem: l7.problem(),
            missing_keys: l7.missing_keys(),
            missing_authorizers: l7.missing_authorizers().to_vec(),
        }
    }
}
