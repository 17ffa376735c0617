//! From what is held to what is enforced.
//!
//! Invariant: the snapshot is published after the commit, never before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use thyra_datapath_abi::tables::Tables;
use thyra_policy_compiler::compile::CompileError;
use tracing::{debug, info, warn};

use super::{Store, lock};
use crate::chain::chain;
use crate::plane::PlaneError;
use crate::registration::Registration;
use crate::snapshot::{Attached, Snapshot};

/// Why what is held is not enforced.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettleError {
    /// The tables would not fit.
    #[error("{0}")]
    Compile(#[from] CompileError),
    /// The datapath could not take them.
    #[error("{0}")]
    Commit(#[from] PlaneError),
}

impl Store {
    /// Compiles and commits; `false` when tables of an earlier run stay live because the world isn't whole
    /// yet.
    pub(super) fn settle(&mut self) -> Result<bool, SettleError> {
        self.held.derive();
        if self.holds_back() {
            self.publish_waiting();
            return Ok(false);
        }
        let started = Instant::now();
        let tables = self.compiler.compile(&self.held.world)?;
        let compiled = started.elapsed();
        let asked = self.prepare_l7(&tables);
        let last = self.published.borrow().clone();
        let mut generation = lock::read(&self.plane).generation();
        let (tables, ids) = if self.committed && *last.tables == tables {
            (last.tables.clone(), last.verdict_ids.clone())
        } else {
            generation = generation.checked_add(1).unwrap_or(1);
            let done = lock::write(&self.plane).commit(&tables, generation)?;
            let (us, words, waited) = (started.elapsed().as_micros(), done.words, done.waited.as_micros());
            let compile_us = compiled.as_micros();
            info!(
                generation,
                words,
                compile_us,
                waited_us = waited,
                us,
                "tables committed"
            );
            self.hub.agent(format!(
                "generation {generation} is enforced ({words} words written, {us} us)"
            ));
            (Arc::new(tables), Arc::new(done.verdict_ids))
        };
        self.forget_unheld(&tables);
        if asked {
            self.retire_l7();
        }
        self.inherited = false;
        self.committed = true;
        self.publish(tables, ids, generation);
        self.free_leaving();
        Ok(true)
    }

    /// A restart never replaces good tables by those of a half-told world.
    pub(super) fn holds_back(&self) -> bool {
        self.inherited && !self.held.world.synced
    }

    fn publish(&mut self, tables: Arc<Tables>, verdict_ids: Arc<Vec<u16>>, generation: u32) {
        self.metrics.generation.set(i64::from(generation));
        self.metrics
            .endpoints
            .set(i64::try_from(self.held.registrations.len()).unwrap_or(i64::MAX));
        self.published.send_replace(Arc::new(Snapshot {
            held: Arc::new(self.held.clone()),
            tables,
            verdict_ids,
            report: Arc::clone(self.compiler.report()),
            residuals: Arc::clone(self.compiler.residuals()),
            generation,
            attached: Arc::new(self.attached.clone()),
            held_back: Arc::new(self.held_back.clone()),
            l7: Arc::new(self.l7_standing()),
            ..Snapshot::default()
        }));
    }

    fn publish_waiting(&mut self) {
        let generation = lock::read(&self.plane).generation();
        self.published.send_replace(Arc::new(Snapshot {
            held: Arc::new(self.held.clone()),
            generation,
            attached: Arc::new(self.attached.clone()),
            held_back: Arc::new(self.held_back.clone()),
            ..Snapshot::default()
        }));
    }

    /// Tells readers how the interfaces stand; nothing else has changed.
    pub(super) fn publish_attached(&mut self) {
        let (attached, held_back) = (Arc::new(self.attached.clone()), Arc::new(self.held_back.clone()));
        self.published.send_modify(|s| {
            let mut next = Snapshot::clone(s);
            next.attached = attached;
            next.held_back = held_back;
            *s = Arc::new(next);
        });
    }

    /// Takes up the endpoints of an earlier run; those whose interface has gone are forgotten.
    pub(super) fn readopt(&mut self, known: BTreeMap<u16, Registration>) {
        let before = known.len();
        // Taken by a pod that never got as far as the register.
        let orphans = lock::read(&self.plane).reservations().into_iter();
        let orphans = orphans.filter(|(uid, _)| !known.values().any(|r| r.uid == *uid));
        self.leaving.extend(orphans.map(|(_, id)| id));
        for (old, registration) in known {
            match lock::write(&self.plane).reserve(&registration.uid) {
                Ok(id) => {
                    if id != old {
                        warn!(pod = registration.pod(), old, id, "endpoint id changed");
                    }
                    self.held.registrations.insert(id, registration);
                }
                Err(error) => {
                    warn!(pod = registration.pod(), error = chain(&error), "endpoint lost")
                }
            }
        }
        if let Err(error) = self.settle() {
            self.refuse(&error.to_string());
        }
        info!(
            known = before,
            endpoints = self.held.registrations.len(),
            inherited = self.inherited,
            "endpoints read"
        );
        // With nothing to judge by, programs of an older layout know better than this build's.
        if self.committed || lock::read(&self.plane).generation() != 0 {
            self.take_up_waiting();
        }
        self.persist_quietly();
    }

    /// Takes up the endpoints of an earlier run that this one has not attached yet.
    pub(super) fn take_up_waiting(&mut self) {
        let known = self.held.registrations.keys().copied();
        let waiting: Vec<u16> = known.filter(|id| !self.attached.contains_key(id)).collect();
        if waiting.is_empty() {
            return;
        }
        for id in &waiting {
            self.take_up(*id);
        }
        self.publish_attached();
        if waiting.iter().any(|id| !self.held.registrations.contains_key(id)) {
            self.settle_news(true, &[]);
        }
    }

    fn take_up(&mut self, id: u16) {
        let Some(registration) = self.held.registrations.get(&id).cloned() else {
            return;
        };
        let held_back = self.held_back.contains_key(&id);
        let attached = lock::write(&self.plane).attach(id, &registration, held_back);
        match attached {
            Ok(ifindex) => {
                self.attached.insert(id, Attached::At(ifindex));
                self.steer(id);
            }
            Err(error)
                if lock::read(&self.plane)
                    .interface_index(&registration.host_interface)
                    .is_none() =>
            {
                debug!(
                    pod = registration.pod(),
                    error = chain(&error),
                    "its interface has gone"
                );
                self.held.registrations.remove(&id);
                self.leaving.push(id);
            }
            Err(error) => {
                warn!(
                    pod = registration.pod(),
                    error = chain(&error),
                    "endpoint not attached"
                );
                self.attached.insert(id, Attached::Failed(error.to_string()));
            }
        }
    }

    /// Endpoints whose programs could not be put in place are tried again.
    pub(super) fn retry_attach(&mut self) {
        let failed = |(id, a): (&u16, &Attached)| matches!(a, Attached::Failed(_)).then_some(*id);
        let again: Vec<u16> = self.attached.iter().filter_map(failed).collect();
        for id in &again {
            self.attached.remove(id);
            self.take_up(*id);
        }
        if !again.is_empty() {
            self.publish_attached();
        }
    }

    fn free_leaving(&mut self) {
        for id in std::mem::take(&mut self.leaving) {
            if let Err(error) = lock::write(&self.plane).detach(id) {
                warn!(id, error = chain(&error), "endpoint not detached");
            }
        }
    }

    pub(super) fn persist_quietly(&mut self) {
        if let Err(error) = self.register.store(&self.held.registrations) {
            warn!(error = chain(&error), "endpoints can't be stored");
        }
    }
}
