//! Residuals in, oracle sockets out: which listener of Envoy answers for which residual.
//!
//! Invariant: an oracle answers for a residual only when Envoy has acknowledged every part of it; equal residuals
//! share one listener. A cell whose residual changes keeps its listener where nobody else holds it, so that the
//! change acts in place, on the next request of an open connection.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thyra_datapath_abi::tables::RuleRef;
use thyra_policy_compiler::residual::Residual;
use tokio::sync::watch;
use tracing::{debug, info};

use crate::ads::{AdsError, AdsServer, Kind, Name, Outcome, Resource};
use crate::listener::{self, HttpOptions, Reading};
use crate::lower::{self, Chain, KeySets, NotExpressible, Places};
use crate::{authorizer, keep};

/// Most listeners at a time; the residuals beyond are refused by name.
pub const MAX_LISTENERS: usize = 1024;

/// How the bridge works on this node.
#[derive(Clone, Debug)]
pub struct BridgeConfig {
    /// Where Envoy asks.
    pub xds_socket: PathBuf,
    /// Where the oracles' sockets are; Envoy's user must be able to write there.
    pub oracles: PathBuf,
    /// Owner of the xDS socket: Envoy's user.
    pub owner: Option<(u32, u32)>,
    /// What all HTTP oracles have in common.
    pub http: HttpOptions,
}

/// What a cell of the tables needs an oracle for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// A lasting name of the cell: the same one before and after a change of its residual.
    pub cell: Arc<str>,
    /// How its streams are read.
    pub reading: Reading,
    /// What decides.
    pub residual: Arc<Residual<RuleRef>>,
}

/// A question that an oracle answers: a residual's address under a reading.
pub type Question = (Reading, Arc<str>);

/// Why a residual has no oracle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Envoy has no form for it.
    #[error(transparent)]
    NotExpressible(#[from] NotExpressible),
    /// There are too many others.
    #[error("there are {MAX_LISTENERS} listeners already")]
    TooMany,
}

/// How it stands with a residual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody wants it.
    Unknown,
    /// It was not given to Envoy.
    Refused(Refusal),
    /// Envoy has not acknowledged it yet, or is not there.
    Awaited,
    /// Envoy refused it with these words; what was there before stays, but not for this residual.
    Rejected(Arc<str>),
    /// Ask here.
    Active(PathBuf),
}

/// A listener and what it holds now.
#[derive(Clone, Debug)]
struct Slot {
    name: Arc<str>,
    question: Question,
    resources: Vec<Name>,
    cells: BTreeSet<Arc<str>>,
}

/// A slot with what Envoy is to have for it.
type Filled = (Slot, Vec<(Name, Resource)>);

/// Feeds Envoy with residuals.
#[derive(Debug)]
pub struct Bridge {
    config: BridgeConfig,
    server: Arc<AdsServer>,
    places: Places,
    slots: Vec<Slot>,
    refused: BTreeMap<Question, Refusal>,
    /// Names are never used twice: a listener that still drains keeps its own.
    next: u64,
}

/// A question with its chain and the cells that ask it.
struct Asked {
    chain: Chain,
    cells: BTreeSet<Arc<str>>,
}

impl Bridge {
    /// Listens for Envoy.
    ///
    /// # Errors
    /// The xDS socket can't be made.
    pub fn start(config: BridgeConfig) -> Result<Self, AdsError> {
        let server = AdsServer::start(&config.xds_socket, config.owner)?;
        Ok(Self::new(Arc::new(server), config, 0))
    }

    /// Beside others that Envoy asks the same server for. No name is one of an earlier bridge's: an Envoy that was told
    /// of those may still be at work, and takes them back with the first change; nobody asks at their sockets any more.
    #[must_use]
    pub fn beside(server: Arc<AdsServer>, config: BridgeConfig) -> Self {
        for path in left(&config.oracles) {
            remove(&path);
        }
        Self::new(server, config, since_boot())
    }

    fn new(server: Arc<AdsServer>, config: BridgeConfig, next: u64) -> Self {
        Self {
            config,
            server,
            places: Places::new(),
            slots: Vec::new(),
            refused: BTreeMap::new(),
            next,
        }
    }

    /// Whether Envoy has said its word on everything.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let mut questions = self.slots.iter().map(|slot| &slot.question);
        !questions.any(|question| self.standing(question) == Standing::Awaited)
    }

    /// Whether nothing is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Where authorizers are, from the next `apply` on.
    pub fn set_places(&mut self, places: Places) {
        self.places = places;
    }

    /// What all HTTP oracles have in common, from now on: those that there are go, and `apply` makes others.
    pub fn set_http(&mut self, http: HttpOptions) {
        if self.config.http != http {
            self.apply(&[]);
            self.config.http = http;
        }
    }

    /// What is wanted from now on. What Envoy can't express is refused by name and sent nowhere; all else goes out
    /// in one change.
    pub fn apply(&mut self, wanted: &[Wanted]) {
        let mut asked = self.lowered(wanted);
        let before = std::mem::take(&mut self.slots);
        let (mut kept, mut free): (Vec<Slot>, Vec<Slot>) = before
            .into_iter()
            .partition(|slot| asked.contains_key(&slot.question));
        for slot in &mut kept {
            if let Some(Asked { cells, .. }) = asked.remove(&slot.question) {
                slot.cells = cells;
            }
        }
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for (question, asked) in asked {
            let heir = free
                .iter()
                .position(|slot| slot.question.0 == question.0 && !slot.cells.is_disjoint(&asked.cells));
            if heir.is_none() && kept.len() + changed.len() >= MAX_LISTENERS {
                self.refused.insert(question, Refusal::TooMany);
                continue;
            }
            let (name, held) = match heir {
                Some(at) => {
                    let slot = free.swap_remove(at);
                    (slot.name, slot.resources)
                }
                None => (self.fresh_name(question.0), Vec::new()),
            };
            let (slot, resources) = self.slot(name, question, asked);
            let fewer = held.into_iter().filter(|name| !slot.resources.contains(name));
            gone.extend(fewer);
            changed.push((slot, resources));
        }
        gone.extend(free.iter().flat_map(|slot| slot.resources.iter().cloned()));
        self.send(&gone, &changed);
        for slot in &free {
            debug!(listener = &*slot.name, "listener goes");
            // Envoy leaves the file; who connects meanwhile is refused either way.
            remove(&self.socket(&slot.name));
        }
        kept.extend(changed.into_iter().map(|(slot, _)| slot));
        info!(
            listeners = kept.len(),
            refused = self.refused.len(),
            "residuals for envoy"
        );
        self.slots = kept;
    }

    /// How it stands with a residual.
    #[must_use]
    pub fn standing(&self, question: &Question) -> Standing {
        if let Some(refusal) = self.refused.get(question) {
            return Standing::Refused(refusal.clone());
        }
        let Some(slot) = self.slots.iter().find(|slot| slot.question == *question) else {
            return Standing::Unknown;
        };
        let outcomes: Vec<Option<Outcome>> = self.server.read(|catalog| {
            let outcomes = slot.resources.iter().map(|name| catalog.outcome(name).cloned());
            outcomes.collect()
        });
        for outcome in &outcomes {
            if let Some(Outcome::Refused(words)) = outcome {
                return Standing::Rejected(Arc::clone(words));
            }
        }
        if outcomes.iter().all(|outcome| *outcome == Some(Outcome::Accepted)) {
            Standing::Active(self.socket(&slot.name))
        } else {
            Standing::Awaited
        }
    }

    /// Waits until Envoy has said its word on a residual, or the time is out.
    pub async fn settled(&self, question: &Question, limit: Duration) -> Standing {
        let is_settled = || self.standing(question) != Standing::Awaited;
        let _late = self.server.until(limit, is_settled).await;
        self.standing(question)
    }

    /// A counter of changes: whenever it moves, standings may have changed.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.server.changes()
    }

    /// Every question once, with those who ask it; what can't be lowered is noted as refused.
    fn lowered(&mut self, wanted: &[Wanted]) -> BTreeMap<Question, Asked> {
        self.refused.clear();
        let mut asked: BTreeMap<Question, Asked> = BTreeMap::new();
        for Wanted {
            cell,
            reading,
            residual,
        } in wanted
        {
            let question = (*reading, residual.address());
            if let Some(asked) = asked.get_mut(&question) {
                asked.cells.insert(Arc::clone(cell));
                continue;
            }
            let chain = match reading {
                Reading::Http => lower::http(residual),
                Reading::Stream => lower::stream(residual),
            };
            match chain {
                Ok(chain) => {
                    let cells = BTreeSet::from([Arc::clone(cell)]);
                    asked.insert(question, Asked { chain, cells });
                }
                Err(why) => {
                    self.refused.insert(question, why.into());
                }
            }
        }
        asked
    }

    fn fresh_name(&mut self, reading: Reading) -> Arc<str> {
        let letter = match reading {
            Reading::Http => 'h',
            Reading::Stream => 's',
        };
        let name = format!("{letter}{}", self.next);
        self.next += 1;
        name.into()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.config.oracles.join(format!("{name}.sock"))
    }

    fn slot(&self, name: Arc<str>, question: Question, asked: Asked) -> Filled {
        let Asked { chain, cells } = asked;
        let (reading, address) = &question;
        let shape = chain.shape();
        let socket = self.socket(&name);
        let listener = match reading {
            Reading::Http => listener::http(&name, &socket, &shape, &self.config.http),
            Reading::Stream => listener::tls(&name, &socket, &shape, self.config.http.redact),
        };
        let rules = listener::rules(&name, *reading, &chain).into_iter();
        let mut resources: Vec<_> = rules.map(|rules| Resource::rules(rules, address)).collect();
        resources.extend(chain.tokens.as_ref().map(|tokens| {
            // Nobody asks an oracle with keys that have to be fetched.
            let fetched = KeySets::new();
            Resource::rules(listener::tokens(&name, tokens, &fetched), address)
        }));
        for (filter, known) in listener::authorizers(&name, *reading, &chain, &self.places) {
            resources.push(Resource::rules(filter, &format!("{address}-{known}").into()));
        }
        // Names of listeners are never used twice, those of clusters may be: oracles keep theirs.
        let clusters = authorizer::clusters([&chain].into_iter(), &self.places);
        self.server.with(|catalog| {
            for (name, resource) in clusters {
                catalog.put(name, resource);
            }
        });
        let mut needs: Vec<Name> = resources.iter().map(|(name, _)| name.clone()).collect();
        needs.extend(authorizer::names([&chain].into_iter()));
        resources.push((
            (Kind::Listener, Arc::clone(&name)),
            Resource::listener(listener, needs),
        ));
        let slot = Slot {
            name,
            question,
            resources: resources.iter().map(|(name, _)| name.clone()).collect(),
            cells,
        };
        (slot, resources)
    }

    fn send(&self, gone: &[Name], changed: &[Filled]) {
        self.server.with(|catalog| {
            for name in gone {
                catalog.remove(name);
            }
            for (slot, resources) in changed {
                debug!(listener = &*slot.name, residual = &*slot.question.1, "listener");
                for (name, resource) in resources {
                    catalog.put(name.clone(), resource.clone());
                }
            }
        });
    }
}

/// Nanoseconds: more than any bridge on this boot has given names.
fn since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// The sockets of an earlier bridge's oracles.
fn left(oracles: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(oracles) else {
        return Vec::new();
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_oracle = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let stem = name.and_then(|name| name.strip_suffix(".sock"));
        let number = stem.and_then(|stem| stem.strip_prefix(['h', 's']));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
    };
    paths.filter(is_oracle).collect()
}

fn remove(path: &Path) {
    if let Err(error) = keep::remove(path) {
        debug!(path = %path.display(), %error, "can't remove the socket of a listener that went");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_bridge_gives_an_oracle_a_name_that_an_earlier_one_gave() {
        let folder = tempfile::tempdir().unwrap();
        let server = Arc::new(AdsServer::start(&folder.path().join("xds.sock"), None).unwrap());
        let config = BridgeConfig {
            xds_socket: folder.path().to_owned(),
            oracles: folder.path().to_owned(),
            owner: None,
            http: HttpOptions::default(),
        };
        let mut first = Bridge::beside(Arc::clone(&server), config.clone());
        let names: Vec<Arc<str>> = (0..1024).map(|_| first.fresh_name(Reading::Stream)).collect();
        let left = first.socket(&names[0]);
        std::fs::write(&left, "").unwrap();
        let mut second = Bridge::beside(server, config);
        let later = second.fresh_name(Reading::Stream);
        assert!(!names.contains(&later), "{later}");
        assert!(!left.exists());
        assert!(folder.path().join("xds.sock").exists());
    }
}
