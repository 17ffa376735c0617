//! The one owner of what is held, of the compiler and of the order of commits: a thread of its own.
//!
//! Invariant: what `Snapshot` shows is what the datapath carries out. What can't be compiled or committed
//! leaves the last good state in force and is named.

mod commit;
mod endpoint;
mod l7;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use thyra_policy_compiler::compile::Compiler;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::chain::chain;
use crate::change::Change;
use crate::held::{Basis, Held};
use crate::l7::L7;
use crate::metrics::Metrics;
use crate::monitor::Hub;
use crate::plane::Plane;
use crate::registration::{Register, Registration};
use crate::snapshot::{Attached, Snapshot};
use crate::state_file::{self, StateError};

pub use endpoint::{Added, EndpointError, PodKey};

/// How often what pods receive is compared with what the programs see.
const COVERAGE_PERIOD: Duration = Duration::from_secs(10);

/// The datapath, shared: the store writes, the admin API reads counters and names.
pub type SharedPlane = Arc<RwLock<Box<dyn Plane>>>;

/// What the store is asked to do.
pub enum Command {
    /// News, and when it arrived.
    News(Vec<Change>, Instant),
    /// A pod comes.
    Add(Box<Registration>, oneshot::Sender<Result<Added, EndpointError>>),
    /// A pod goes.
    Del(PodKey, oneshot::Sender<Result<u32, EndpointError>>),
    /// Is it enforced as registered?
    Check(Box<Registration>, oneshot::Sender<Result<u32, EndpointError>>),
    /// Envoy has taken or refused something, or other keys were fetched.
    Envoy,
    /// The agent stops: whoever still holds a handle is not waited for.
    Stop,
    /// Once a second: finished connections, endpoints that could not be attached, numbers that want to be
    /// stored.
    Tick,
}

/// The way to the store.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
}

impl Handle {
    /// Hands a command over; `false` when the store has stopped.
    pub fn send(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }

    /// Waits until the store has stopped.
    pub async fn stopped(&self) {
        self.commands.closed().await;
    }

    /// What is enforced right now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// Wakes when something else is enforced.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.clone()
    }
}

/// What the store is made of.
pub struct Parts {
    /// The datapath.
    pub plane: SharedPlane,
    /// State folder; it exists.
    pub state: PathBuf,
    /// What to start from; `identities` is filled from the state folder.
    pub basis: Basis,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Where to tell what happens.
    pub hub: Hub,
    /// The way to Envoy, where there is one.
    pub l7: Option<L7>,
}

/// See the module.
pub struct Store {
    held: Held,
    compiler: Compiler,
    plane: SharedPlane,
    register: Register,
    identities: PathBuf,
    stored_identities: usize,
    published: watch::Sender<Arc<Snapshot>>,
    metrics: Arc<Metrics>,
    hub: Hub,
    attached: BTreeMap<u16, Attached>,
    /// Endpoints that may open no connection yet, since other nodes may take their address for the pod's named here.
    held_back: BTreeMap<u16, String>,
    /// Ids of pods that left while nothing could be committed: freed after the next commit, so that no new
    /// pod takes the place of an old one in tables that still name it.
    leaving: Vec<u16>,
    /// Tables of an earlier run are live, of this layout or another: they stay until the world is whole.
    inherited: bool,
    committed: bool,
    checked_coverage: Instant,
    is_stopping: bool,
    l7: Option<L7>,
    /// Endpoints with verdicts that need L7.
    needy: BTreeSet<u16>,
    /// Endpoints whose connections can't be given to Envoy, and why.
    unsteered: BTreeMap<u16, String>,
}

impl Store {
    /// Reads the state folder, takes the known endpoints up again and starts the thread. The thread ends when
    /// all handles are gone.
    ///
    /// # Errors
    /// The state folder can't be read, or the thread can't be started.
    pub fn start(parts: Parts) -> Result<(Handle, std::thread::JoinHandle<()>), StateError> {
        let Parts {
            plane,
            state,
            mut basis,
            metrics,
            hub,
            l7,
        } = parts;
        let identities = identities_file(&state);
        basis.identities = state_file::load(&identities)?.unwrap_or_default();
        let register = Register::new(&state);
        let known = register.load()?;
        let (published, snapshot) = watch::channel(Arc::default());
        let inherited = {
            let plane = lock::read(&plane);
            plane.generation() != 0 || plane.older_endpoints() != 0
        };
        let mut store = Self {
            stored_identities: basis.identities.len(),
            held: Held::new(basis),
            compiler: Compiler::new(),
            plane,
            register,
            identities,
            published,
            metrics,
            hub,
            attached: BTreeMap::new(),
            held_back: BTreeMap::new(),
            leaving: Vec::new(),
            inherited,
            committed: false,
            checked_coverage: Instant::now(),
            is_stopping: false,
            needy: BTreeSet::new(),
            l7,
            unsteered: BTreeMap::new(),
        };
        store.forget_listeners();
        let (commands, receiver) = mpsc::unbounded_channel();
        store.readopt(known);
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || store.run(receiver))
            .map_err(|source| StateError::Read {
                file: "thread `store`".into(),
                source,
            })?;
        Ok((Handle { commands, snapshot }, thread))
    }

    fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        while let Some(first) = commands.blocking_recv() {
            let mut next = Some(first);
            let mut changed = false;
            let mut received: Vec<Instant> = Vec::new();
            while let Some(command) = next.take() {
                match command {
                    Command::News(changes, at) => {
                        if self.take_news(changes) {
                            changed = true;
                            received.push(at);
                        }
                    }
                    other => {
                        self.settle_news(changed, &received);
                        changed = false;
                        received.clear();
                        self.serve(other);
                    }
                }
                next = commands.try_recv().ok();
            }
            self.settle_news(changed, &received);
            if self.is_stopping {
                break;
            }
        }
        self.store_identities();
        if let Some(l7) = self.l7.take() {
            l7.leave();
        }
    }

    fn take_news(&mut self, changes: Vec<Change>) -> bool {
        let mut changed = false;
        for change in changes {
            changed |= self.held.apply(change);
        }
        changed
    }

    fn settle_news(&mut self, changed: bool, received: &[Instant]) {
        if !changed {
            return;
        }
        // The first sync is no change: what arrives in it was true long before.
        let was_whole = self.committed && self.published.borrow().held.world.synced;
        match self.settle() {
            Ok(true) => {
                for at in received.iter().filter(|_| was_whole) {
                    self.metrics.propagation.observe(at.elapsed().as_secs_f64());
                }
                self.take_up_waiting();
            }
            // Held back until the world is whole.
            Ok(false) => {}
            Err(error) => self.refuse(&error.to_string()),
        }
    }

    fn serve(&mut self, command: Command) {
        // A caller that has gone away needs no answer.
        match command {
            Command::Add(registration, reply) => drop(reply.send(self.add(*registration))),
            Command::Del(key, reply) => drop(reply.send(self.del(&key))),
            Command::Check(registration, reply) => drop(reply.send(self.check(&registration))),
            Command::Envoy => self.envoy_has_news(),
            Command::Tick => self.tick(),
            Command::News(changes, _) => drop(self.take_news(changes)),
            // After what came before it.
            Command::Stop => self.is_stopping = true,
        }
    }

    fn tick(&mut self) {
        lock::write(&self.plane).collect();
        if self.checked_coverage.elapsed() >= COVERAGE_PERIOD {
            self.checked_coverage = Instant::now();
            self.check_coverage();
        }
        self.retry_attach();
        self.retry_settle();
        self.release_held_back();
        self.held.forget_moved();
        self.store_identities();
    }

    /// What was refused for a cause that may pass, such as a full disk, is tried again; a cause that stays
    /// has been told already.
    fn retry_settle(&mut self) {
        let Some(told) = self.published.borrow().problem.clone() else {
            return;
        };
        match self.settle() {
            Ok(_) => {
                info!("what was refused is enforced now");
                self.take_up_waiting();
            }
            Err(error) if error.to_string() == told => {}
            Err(error) => self.refuse(&error.to_string()),
        }
    }

    /// A pod that packets reach past the programs is not enforced, whatever the tables say.
    fn check_coverage(&mut self) {
        for (id, missed) in lock::write(&self.plane).check_coverage() {
            let pod = self
                .held
                .registrations
                .get(&id)
                .map_or_else(String::new, Registration::pod);
            warn!(
                id,
                pod, missed, "NOT ENFORCED: packets reach the pod past the programs"
            );
            self.hub.agent(format!(
                "NOT ENFORCED: {missed} packets reached `{pod}` past the programs (`thyra preflight`)"
            ));
        }
    }

    fn store_identities(&mut self) {
        let numbers = &self.held.world.identities;
        let now = numbers.len();
        if now == self.stored_identities {
            return;
        }
        let numbers: BTreeMap<&str, u32> = numbers.iter().map(|(name, number)| (&**name, *number)).collect();
        match state_file::store(&self.identities, &numbers) {
            Ok(()) => self.stored_identities = now,
            Err(error) => warn!(error = chain(&error), "identity numbers can't be stored"),
        }
    }

    fn refuse(&mut self, why: &str) {
        warn!(why, "the last good tables stay");
        self.metrics.refused.inc();
        self.hub
            .agent(format!("not enforced, the last good tables stay: {why}"));
        self.published.send_modify(|s| {
            let mut next = Snapshot::clone(s);
            next.problem = Some(why.to_owned());
            *s = Arc::new(next);
        });
    }
}

fn identities_file(state: &Path) -> PathBuf {
    state.join("identities.json")
}

/// The shared datapath's lock. A panic while it was held can't leave it half-changed in a way that matters
/// more than going on: the datapath's own commit is atomic.
pub mod lock {
    use std::sync::{PoisonError, RwLockReadGuard, RwLockWriteGuard};

    use super::SharedPlane;
    use crate::plane::Plane;

    /// For counters and names.
    pub fn read(plane: &SharedPlane) -> RwLockReadGuard<'_, Box<dyn Plane>> {
        plane.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For changes.
    pub fn write(plane: &SharedPlane) -> RwLockWriteGuard<'_, Box<dyn Plane>> {
        plane.write().unwrap_or_else(PoisonError::into_inner)
    }
}
