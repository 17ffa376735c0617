//! Residuals in, listeners inside pods out: on which port, in every pod that needs it, Envoy judges which residual.
//!
//! Invariant: a port is named for a residual only when Envoy has acknowledged that residual's rules on it. A cell whose
//! residual changes keeps its port where nobody else holds it, so that the change acts in place, on the next request
//! of an open connection; what is no longer wanted stays until `retire`, since the kernel's tables still name it. Which
//! port is whose is stored before Envoy hears of it: the next bridge gives an Envoy that is at work nothing else to
//! judge on a port than this one would.

mod slot;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use thyra_datapath_abi::limits::{L7_FIRST_PORT, L7_PORTS};
use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};
use thyra_policy_compiler::residual::{Answer, Residual};
use thyra_policy_compiler::tokens::Tokens;
use tokio::sync::watch;
use tracing::{debug, info, warn};

pub use self::slot::Kept;
use self::slot::{Guards, Slot};
use crate::ads::{AdsServer, Kind, Name, Outcome, Resource, hex};
use crate::listener::{self, HttpOptions, Place, Reading, Shape};
use crate::lower::{self, Chain, KeySets, NotExpressible, Places};
use crate::records::Records;
use crate::{authorizer, cluster, keep};

/// A cell of the tables that needs a listener in a pod.
#[derive(Clone, Debug)]
pub struct Cell {
    /// A lasting name: the same one before and after a change of its residual.
    pub name: Arc<str>,
    /// The pod.
    pub place: Place,
    /// Address of what decides.
    pub address: Arc<str>,
    /// What decides.
    pub residual: Arc<Residual<RuleRef>>,
}

/// The address stands for the residual.
impl PartialEq for Cell {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.place, &self.address) == (&other.name, &other.place, &other.address)
    }
}

/// Why a residual has no listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Envoy has no form for it.
    #[error(transparent)]
    NotExpressible(#[from] NotExpressible),
    /// There are too many others.
    #[error("there are {L7_PORTS} others already")]
    TooMany,
    /// Envoy refused it.
    #[error("envoy refuses it: {0}")]
    Rejected(Arc<str>),
}

/// A residual with the cells that ask it.
struct Asked {
    http: Chain,
    other: Option<Chain>,
    cells: BTreeSet<Arc<str>>,
    places: BTreeSet<Place>,
}

/// Feeds Envoy with listeners inside pods.
#[derive(Debug)]
pub struct Inline {
    server: Arc<AdsServer>,
    options: HttpOptions,
    keys: KeySets,
    places: Places,
    slots: Vec<Slot>,
    /// Wanted no more, but not retired.
    lingering: Vec<Slot>,
    refused: BTreeMap<Arc<str>, Refusal>,
    /// The clusters that are wanted, and those that were before.
    clusters: BTreeSet<Name>,
    former_clusters: BTreeSet<Name>,
    /// The port to try next: one that was freed is taken again as late as can be.
    next: u16,
    file: Option<PathBuf>,
}

impl Inline {
    /// Nothing is wanted yet.
    #[must_use]
    pub fn new(server: impl Into<Arc<AdsServer>>, options: HttpOptions) -> Self {
        Self {
            server: server.into(),
            options,
            keys: KeySets::new(),
            places: Places::new(),
            slots: Vec::new(),
            lingering: Vec::new(),
            refused: BTreeMap::new(),
            clusters: BTreeSet::new(),
            former_clusters: BTreeSet::new(),
            next: 0,
            file: None,
        }
    }

    /// From now on it is stored in `file` which port is whose; only root may write there.
    pub fn store_in(&mut self, file: PathBuf) {
        self.file = Some(file);
    }

    /// Envoy is at work with what an earlier bridge told it. Nothing is sent to it before the first `apply`.
    pub fn take_over(&mut self, kept: Kept) {
        self.server.hold();
        self.slots = kept.slots;
        self.next = kept.next;
    }

    /// What HTTP listeners have in common from the next `apply` on.
    pub fn set_options(&mut self, options: HttpOptions) {
        self.options = options;
    }

    /// The keys that were fetched, from the next `apply` on; whether they are others than before.
    pub fn set_keys(&mut self, keys: KeySets) -> bool {
        let changed = self.keys != keys;
        self.keys = keys;
        changed
    }

    /// Where authorizers are, from the next `apply` on; whether they are elsewhere than before.
    pub fn set_places(&mut self, places: Places) -> bool {
        let changed = self.places != places;
        self.places = places;
        changed
    }

    /// What is wanted from now on. What Envoy can't express is refused by name and sent nowhere.
    pub fn apply(&mut self, wanted: &[Cell]) {
        self.server.hold();
        let asked = self.lowered(wanted);
        self.put_clusters(&asked);
        let before = std::mem::take(&mut self.slots);
        let (mut same, mut free): (Vec<Slot>, Vec<Slot>) = before
            .into_iter()
            .partition(|slot| asked.contains_key(&slot.residual));
        let mut changed = Vec::new();
        for (residual, asked) in asked {
            let found = same.iter().position(|slot| slot.residual == residual);
            let guards = Guards::of(&asked);
            let fits = |slot: &Slot| slot.guards.fit(&guards) && !slot.cells.is_disjoint(&asked.cells);
            let heir = || free.iter().position(fits);
            let slot = match found.map(|at| same.swap_remove(at)) {
                Some(slot) => Some(slot),
                None => heir().map(|at| free.swap_remove(at)).or_else(|| {
                    let port = self.free_port(&[&same, &free, &changed])?;
                    Some(Slot::new(port, guards.clone()))
                }),
            };
            match slot {
                Some(slot) => changed.push(self.filled(slot, residual, asked)),
                None => drop(self.refused.insert(residual, Refusal::TooMany)),
            }
        }
        self.lingering.append(&mut free);
        self.slots = changed;
        self.store();
        self.server.release();
        info!(
            ports = self.slots.len(),
            refused = self.refused.len(),
            "residuals for envoy"
        );
    }

    /// What was wanted before the last `apply` goes: no table names it any more.
    pub fn retire(&mut self) {
        for slot in &mut self.slots {
            slot.former = None;
        }
        let gone = std::mem::take(&mut self.lingering);
        let mut clusters = std::mem::take(&mut self.former_clusters);
        clusters.retain(|name| !self.clusters.contains(name));
        self.server.with(|catalog| {
            let listeners = gone
                .iter()
                .flat_map(|slot| slot.rules.iter().chain(&slot.listeners));
            for name in listeners.chain(&clusters) {
                catalog.remove(name);
            }
        });
    }

    /// Before Envoy hears of it.
    fn store(&self) {
        let Some(file) = &self.file else {
            return;
        };
        let slots = self.lingering.iter().chain(&self.slots).cloned().collect();
        let next = self.next;
        let Err(error) = keep::store(file, &Kept { slots, next }) else {
            return;
        };
        warn!(%error, "the next agent will have to start another envoy");
        // What is there is no longer so.
        if let Err(error) = keep::remove(file) {
            warn!(%error, file = %file.display(), "remove this file before the agent is started again");
        }
    }

    /// What all listeners lead to, before the listeners: authorizers, and the pods.
    fn put_clusters(&mut self, asked: &BTreeMap<Arc<str>, Asked>) {
        let chains = asked.values().flat_map(Asked::chains);
        let mut clusters = authorizer::clusters(chains, &self.places);
        let places: BTreeSet<&Place> = asked.values().flat_map(|asked| &asked.places).collect();
        clusters.extend(places.into_iter().map(|place| {
            let name = (Kind::Cluster, cluster::name(place).into());
            let cluster = cluster::cluster(place, self.options.requests_at_once);
            (name, Resource::cluster(cluster))
        }));
        let names = clusters.keys().cloned().collect();
        let mut before = std::mem::replace(&mut self.clusters, names);
        self.former_clusters.append(&mut before);
        self.server.with(|catalog| {
            for (name, resource) in clusters {
                catalog.put(name, resource);
            }
        });
    }

    /// The port of each residual that Envoy has taken, in at least one pod.
    #[must_use]
    pub fn ports(&self) -> BTreeMap<Arc<str>, u16> {
        let mut ports = BTreeMap::new();
        self.server.read(|catalog| {
            let taken = |name: &Name| catalog.outcome(name) == Some(&Outcome::Accepted);
            let slots = self.lingering.iter().chain(&self.slots);
            let judging: Vec<&Slot> = slots
                .filter(|slot| slot.needs().all(taken) && slot.listeners.iter().any(taken))
                .collect();
            let former = judging
                .iter()
                .filter_map(|slot| Some((slot.former.as_ref()?, slot.port)));
            // What a listener judged before may be judged by another one now.
            let now = judging.iter().map(|slot| (&slot.residual, slot.port));
            ports.extend(former.chain(now).map(|(name, port)| (Arc::clone(name), port)));
        });
        ports
    }

    /// The residuals that have no port and never will, with the reason.
    #[must_use]
    pub fn refused(&self) -> BTreeMap<Arc<str>, Refusal> {
        let mut refused = self.refused.clone();
        self.server.read(|catalog| {
            for slot in &self.slots {
                let words = |name: &Name| match catalog.outcome(name) {
                    Some(Outcome::Refused(words)) => Some(Arc::clone(words)),
                    _ => None,
                };
                if let Some(words) = slot.needs().chain(&slot.listeners).find_map(words) {
                    refused.insert(Arc::clone(&slot.residual), Refusal::Rejected(words));
                }
            }
        });
        refused
    }

    /// Whether Envoy has said its word on everything.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.server.read(|catalog| {
            let awaited = |name: &Name| catalog.outcome(name) == Some(&Outcome::Awaited);
            let mut names = self
                .slots
                .iter()
                .flat_map(|slot| slot.needs().chain(&slot.listeners));
            !names.any(awaited)
        })
    }

    /// Whether nothing is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Waits until Envoy has said its word, and something else is so that its word changes, or the time is out; whether
    /// it is.
    pub async fn settled(&self, limit: Duration, and: impl Fn() -> bool) -> bool {
        self.server.until(limit, || self.is_settled() && and()).await
    }

    /// What Envoy says of each request.
    #[must_use]
    pub fn records(&self) -> Records {
        self.server.records().clone()
    }

    /// A counter of changes: whenever it moves, ports may have changed.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.server.changes()
    }

    /// Every residual once, with those who ask it; what can't be lowered is noted as refused.
    fn lowered(&mut self, wanted: &[Cell]) -> BTreeMap<Arc<str>, Asked> {
        self.refused.clear();
        let mut asked: BTreeMap<Arc<str>, Asked> = BTreeMap::new();
        for cell in wanted {
            let address = &cell.address;
            if !asked.contains_key(address) {
                match chains(&cell.residual) {
                    Ok((http, other)) => {
                        let (cells, places) = (BTreeSet::new(), BTreeSet::new());
                        asked.insert(
                            Arc::clone(address),
                            Asked {
                                http,
                                other,
                                cells,
                                places,
                            },
                        );
                    }
                    Err(why) => {
                        self.refused.insert(Arc::clone(address), why);
                        continue;
                    }
                }
            }
            if let Some(asked) = asked.get_mut(address) {
                asked.cells.insert(Arc::clone(&cell.name));
                asked.places.insert(cell.place.clone());
            }
        }
        asked
    }

    fn free_port(&mut self, taken: &[&[Slot]]) -> Option<u16> {
        let taken: BTreeSet<u16> = taken
            .iter()
            .copied()
            .chain([self.lingering.as_slice()])
            .flat_map(|slots| slots.iter().map(|slot| slot.port))
            .collect();
        for _ in 0..L7_PORTS {
            let port = L7_FIRST_PORT + self.next;
            self.next = (self.next + 1) % L7_PORTS;
            if !taken.contains(&port) {
                return Some(port);
            }
        }
        None
    }

    /// Sends what the slot is to have, and takes away what it had besides.
    fn filled(&mut self, slot: Slot, residual: Arc<str>, asked: Asked) -> Slot {
        let shape = Shape {
            name: format!("p{}", slot.port),
            port: slot.port,
            http: asked.http.shape(),
            other: asked.other.as_ref().map(Chain::shape),
        };
        let rules = rules(&shape, &asked, &residual, &self.keys, &self.places);
        let own: Vec<Name> = rules.iter().map(|(name, _)| name.clone()).collect();
        let clusters = authorizer::names(asked.chains());
        let needs: Vec<Name> = own.iter().chain(&clusters).cloned().collect();
        let listeners: Vec<(Name, Resource)> = asked
            .places
            .iter()
            .map(|place| {
                let listener = listener::inline(place, &shape, &self.options);
                let name = (Kind::Listener, listener.name.as_str().into());
                let way: Name = (Kind::Cluster, cluster::name(place).into());
                let needs = needs.iter().cloned().chain([way]).collect();
                (name, Resource::listener(listener, needs))
            })
            .collect();
        let names = listeners.iter().map(|(name, _)| name.clone()).collect();
        let had = slot.rules.iter().chain(&slot.listeners);
        let gone: Vec<&Name> = had
            .filter(|name| !own.contains(name) && !listeners.iter().any(|(kept, _)| kept == *name))
            .collect();
        debug!(port = slot.port, residual = &*residual, "listener");
        self.server.with(|catalog| {
            for name in gone {
                catalog.remove(name);
            }
            for (name, resource) in rules.into_iter().chain(listeners) {
                catalog.put(name, resource);
            }
        });
        let former = (slot.residual != residual && !slot.residual.is_empty()).then_some(slot.residual);
        Slot {
            former: former.or(slot.former),
            residual,
            port: slot.port,
            guards: Guards::of(&asked),
            rules: own,
            clusters,
            listeners: names,
            cells: asked.cells,
        }
    }
}

impl Asked {
    fn chains(&self) -> impl Iterator<Item = &Chain> {
        [&self.http].into_iter().chain(&self.other)
    }
}

/// The filters of both readings; none for other streams where they get 400.
fn chains(residual: &Residual<RuleRef>) -> Result<(Chain, Option<Chain>), Refusal> {
    let http = lower::http(residual)?;
    let refused = matches!(residual.other, Answer::Constant(Action::Deny, Reason::NotHttp, _));
    let other = if refused {
        None
    } else {
        Some(lower::stream(residual)?)
    };
    Ok((http, other))
}

fn rules(
    shape: &Shape,
    asked: &Asked,
    residual: &Arc<str>,
    keys: &KeySets,
    places: &Places,
) -> Vec<(Name, Resource)> {
    let mut all = listener::rules(&shape.http_name(), Reading::Http, &asked.http);
    let mut asking = listener::authorizers(&shape.http_name(), Reading::Http, &asked.http, places);
    if let Some(other) = &asked.other {
        all.extend(listener::rules(&shape.other_name(), Reading::Stream, other));
        let streams = listener::authorizers(&shape.other_name(), Reading::Stream, other, places);
        asking.extend(streams);
    }
    // Whether a service is known changes where the residual doesn't.
    let asking = asking
        .into_iter()
        .map(|(filter, known)| Resource::rules(filter, &format!("{residual}-{known}").into()));
    let all = all.into_iter().map(|rules| Resource::rules(rules, residual));
    let tokens = asked.http.tokens.iter().map(|tokens| {
        let filter = listener::tokens(&shape.http_name(), tokens, keys);
        Resource::rules(filter, &version(residual, tokens, keys))
    });
    all.chain(tokens).chain(asking).collect()
}

/// Keys change where the residual doesn't.
fn version(residual: &Arc<str>, tokens: &Tokens, keys: &KeySets) -> Arc<str> {
    let mut digest = Sha256::new();
    for rule in &tokens.rules {
        let text = keys.get(&rule.keys).map_or("", |text| text);
        digest.update(text.len().to_be_bytes());
        digest.update(text);
    }
    format!("{residual}-{}", hex(&digest.finalize()[..8])).into()
}

#[cfg(test)]
mod tests;
