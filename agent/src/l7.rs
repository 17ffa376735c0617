//! The way to the node's Envoy: which pods need which residuals there, and on which ports it has taken them.
//!
//! Invariant: the kernel is told of a port only once Envoy judges that residual on it; an Envoy that is missing, starts
//! or is gone refuses what needs it and nothing else. It isn't started before something needs it, and outlives the
//! agent: the next one takes it over with all its connections, or ends it before it starts another.

mod authorizers;
mod cells;
mod found;
mod holds;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thyra_datapath::{EnvoyGroup, EnvoyGroupError};
use thyra_node_proxy_bridge::ads::{AdsError, AdsServer};
use thyra_node_proxy_bridge::als::Records;
use thyra_node_proxy_bridge::envoy::{
    Binary, BinaryError, DEFAULT_HEAP, EnvoyConfig, EnvoyError, EnvoyState, Supervisor,
};
use thyra_node_proxy_bridge::hold::Oracles;
use thyra_node_proxy_bridge::inline::{Cell, Inline, Refusal};
use thyra_node_proxy_bridge::listener::HttpOptions;
use thyra_node_proxy_bridge::listener::budget::REQUESTS_AT_ONCE;
use thyra_policy_compiler::world::World;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{info, warn};

pub use self::cells::cells;
use self::found::Found;
use self::holds::Holds;
use crate::chain::chain;
use crate::keys::{Client, Keyring};
use crate::reach::Reach;

/// A running Envoy takes a change within milliseconds; a commit waits no longer than this for it.
const PATIENCE: Duration = Duration::from_millis(500);
/// And for one of an earlier agent no longer than this, to come back to this one; an emulated CPU is slow.
const REUNION: Duration = Duration::from_secs(5);
/// Its worker threads.
const CONCURRENCY: u16 = 2;

/// Which Envoy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EnvoyChoice {
    /// The one in $PATH, if there is one.
    #[default]
    Auto,
    /// None: what needs L7 is refused.
    Off,
    /// This one.
    At(PathBuf),
}

/// What Envoy may be made to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes that it may allocate.
    pub heap: u64,
    /// Requests of one pod under way at a time.
    pub requests_at_once: NonZeroU32,
    /// Requests in a second of one pod and set of rules; none: any number.
    pub requests_per_second: Option<NonZeroU32>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            heap: DEFAULT_HEAP,
            requests_at_once: REQUESTS_AT_ONCE,
            requests_per_second: None,
        }
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which.
    pub envoy: EnvoyChoice,
    /// Its user and group.
    pub user: u32,
    /// What it may be made to do.
    pub budget: Budget,
    /// Its folder.
    pub folder: PathBuf,
    /// The agent's state folder; it exists.
    pub state: PathBuf,
    /// Name of this node.
    pub node: String,
}

/// Why there can be no Envoy.
#[derive(Debug, thiserror::Error)]
pub enum L7Error {
    /// It can't be used.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// Nobody can listen for it.
    #[error(transparent)]
    Ads(#[from] AdsError),
    /// Its folder can't be made.
    #[error("can't make `{}` for envoy", path.display())]
    Folder {
        /// Path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It can have no control group, by which its sockets are known.
    #[error(transparent)]
    Group(#[from] EnvoyGroupError),
    /// One that was left can't be taken over.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
}

/// See the module.
pub struct L7 {
    inline: Inline,
    /// Connections that are judged once.
    holds: Holds,
    config: EnvoyConfig,
    supervisor: Option<Supervisor>,
    group: EnvoyGroup,
    /// An Envoy of an earlier agent is at work with what that one told it.
    inherited: bool,
    runtime: Handle,
    /// What is wanted of Envoy.
    cells: Vec<Cell>,
    keys: Keyring,
    missing_authorizers: Vec<String>,
    /// Counts Envoy's states.
    states: watch::Sender<u64>,
    /// What its listeners have in common.
    http: HttpOptions,
}

impl L7 {
    /// Finds Envoy and listens for it; none where none is wanted, or none is there and none was named. `register` makes
    /// the sockets of a control group known to the kernel, and says whether they have been all the time.
    ///
    /// # Errors
    /// The one that was named can't be used, or there is no place for it.
    pub async fn open(
        options: &Options,
        register: impl FnOnce(&Path) -> bool,
    ) -> Result<Option<Self>, L7Error> {
        let named = match &options.envoy {
            EnvoyChoice::Off => {
                found::end(&options.folder);
                return Ok(None);
            }
            EnvoyChoice::Auto => None,
            EnvoyChoice::At(path) => Some(path.as_path()),
        };
        let binary = match Binary::find(named, None).await {
            Ok(binary) => binary,
            Err(error @ BinaryError::Absent { .. }) => {
                info!(why = %error, "verdicts that need L7 are refused");
                found::end(&options.folder);
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let user = Some((options.user, options.user));
        make_folder(&options.folder, options.user)?;
        let group = EnvoyGroup::make(&options.folder)?;
        let known = register(group.path());
        let config = EnvoyConfig {
            binary,
            folder: options.folder.clone(),
            node: options.node.clone(),
            concurrency: CONCURRENCY,
            heap: options.budget.heap,
            user,
            cgroup: Some(group.path().to_owned()),
            note: Some(found::note(&options.folder)),
        };
        let client = Client::new(Reach::Others);
        let keys = Keyring::new(client, Handle::current(), Some(&options.state));
        let http = HttpOptions {
            requests_at_once: options.budget.requests_at_once,
            requests_per_second: options.budget.requests_per_second,
            ..HttpOptions::default()
        };
        let found = Found::look(&config, &group, known)?;
        let server = Arc::new(AdsServer::start(&config.xds_socket(), user)?);
        let mut l7 = Self {
            holds: Holds::new(Arc::clone(&server), &options.folder),
            inline: Inline::new(server, http.clone()),
            http,
            config,
            supervisor: None,
            group,
            inherited: false,
            runtime: Handle::current(),
            cells: Vec::new(),
            keys,
            missing_authorizers: Vec::new(),
            states: watch::Sender::new(0),
        };
        l7.inline.store_in(found::ports(&options.folder));
        if let Some(Found { envoy, kept }) = found {
            l7.inline.take_over(kept);
            l7.inherited = true;
            let supervisor = Supervisor::take_over(l7.config.clone(), envoy)?;
            l7.watch(supervisor);
        }
        Ok(Some(l7))
    }

    /// Whether Envoy goes on with what an earlier agent told it, until the first `prepare`: the kernel is to know its
    /// listeners as before.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Tells Envoy what is wanted from now on, beside what the live tables name, and gives it a moment to take it.
    /// Whether something else is wanted than before.
    pub fn prepare(&mut self, cells: &[Cell], world: &World) -> bool {
        let paths = world.mesh.path_normalization;
        let residuals = cells.iter().map(|cell| &*cell.residual);
        let (places, missing) = authorizers::places(world, residuals);
        self.missing_authorizers = missing;
        let moved = self.inline.set_places(places);
        let inherited = std::mem::take(&mut self.inherited);
        if self.cells == cells && paths == self.http.paths && !moved && !inherited {
            return false;
        }
        self.http.paths = paths;
        self.inline.set_options(self.http.clone());
        let tokens = cells.iter().filter_map(|cell| cell.residual.http.tokens());
        self.keys.want(tokens.map(|tokens| &**tokens));
        self.inline.set_keys(self.keys.sets());
        self.holds.apply(cells, paths);
        self.cells = cells.to_vec();
        self.apply_inline();
        if inherited {
            // It asks within a second of this agent's start, and has most of it: what it says in time goes on unbroken.
            self.runtime.block_on(self.inline.settled(REUNION));
            // Its oracles are new ones.
            self.settle();
        } else if self.is_ready() {
            self.settle();
        } else if !self.inline.is_empty() || !self.holds.is_empty() {
            self.start();
        }
        true
    }

    /// Gives Envoy the keys that were fetched since.
    pub fn take_keys(&mut self) {
        if !self.inherited && self.inline.set_keys(self.keys.sets()) {
            self.apply_inline();
            if self.is_ready() {
                self.settle();
            }
        }
    }

    /// What is not held goes through Envoy.
    fn apply_inline(&mut self) {
        let (holds, cells) = (&self.holds, self.cells.iter());
        let inline: Vec<Cell> = cells.filter(|cell| !holds.has(&cell.address)).cloned().collect();
        self.inline.apply(&inline);
    }

    /// Gives a running Envoy a moment to take what it was told.
    fn settle(&self) {
        let mut changes = self.inline.changes();
        let settled = async {
            while !(self.inline.is_settled() && self.holds.is_settled()) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // What isn't then is refused until it is.
        let _late = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, settled).await });
    }

    /// From now on what can be judged once is held, HTTP only `with_http`, as `known` was by an earlier process; where
    /// its oracles are.
    pub fn hold(&mut self, with_http: bool, known: BTreeMap<Arc<str>, u16>) -> watch::Receiver<Arc<Oracles>> {
        self.holds.start(with_http, known)
    }

    /// The number of each residual whose connections are held.
    #[must_use]
    pub fn holds(&self) -> BTreeMap<Arc<str>, u16> {
        self.holds.numbers()
    }

    /// Tells who holds connections where the oracles are by now.
    pub fn tell_oracles(&self) {
        self.holds.tell();
    }

    /// Key sets that can't be had, in words.
    #[must_use]
    pub fn missing_keys(&self) -> Vec<String> {
        self.keys.failures()
    }

    /// Authorizers that can't be asked, in words.
    #[must_use]
    pub fn missing_authorizers(&self) -> &[String] {
        &self.missing_authorizers
    }

    /// The live tables name what is wanted and nothing else.
    pub fn retire(&mut self) {
        self.inline.retire();
        self.holds.retire();
    }

    /// The port of each residual that Envoy judges.
    #[must_use]
    pub fn ports(&self) -> BTreeMap<Arc<str>, u16> {
        self.inline.ports()
    }

    /// Residuals that are refused, with the reason.
    #[must_use]
    pub fn refused(&self) -> BTreeMap<Arc<str>, Refusal> {
        let mut refused = self.inline.refused();
        refused.extend(self.holds.refused());
        refused
    }

    /// Counters of which one moves whenever ports may have changed, other keys are there, or Envoy has come or gone.
    #[must_use]
    pub fn changes(&self) -> [watch::Receiver<u64>; 3] {
        [
            self.inline.changes(),
            self.keys.changes(),
            self.states.subscribe(),
        ]
    }

    /// Whether Envoy starts, or has not yet said its word on something; not when it failed and is to be started again.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        let state = self.supervisor.as_ref().map(Supervisor::state);
        let state = state.map(|state| state.borrow().clone());
        match state {
            // It acknowledges what it is to listen for before it does.
            Some(EnvoyState::Starting) => true,
            Some(EnvoyState::Ready { .. }) => !(self.inline.is_settled() && self.holds.is_settled()),
            Some(EnvoyState::Waiting { .. } | EnvoyState::Stopped) | None => false,
        }
    }

    /// What Envoy says of each request.
    #[must_use]
    pub fn records(&self) -> Records {
        self.inline.records()
    }

    /// What is wrong with Envoy; none while it isn't needed or is ready.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match &*self.supervisor.as_ref()?.state().borrow() {
            EnvoyState::Ready { .. } | EnvoyState::Stopped => None,
            EnvoyState::Starting => Some("envoy is starting; verdicts that need L7 are refused".to_owned()),
            EnvoyState::Waiting { why, wait } => Some(format!(
                "envoy: {why}; it is started again within {wait:?}, verdicts that need L7 are refused"
            )),
        }
    }

    /// Leaves Envoy at work, for the next agent.
    pub fn leave(self) {
        if let Some(supervisor) = self.supervisor {
            self.runtime.block_on(supervisor.leave());
        }
        if self.group.is_empty()
            && let Err(error) = self.group.remove()
        {
            warn!(error = chain(&error), "envoy's control group stays");
        }
    }

    fn is_ready(&self) -> bool {
        let state = self.supervisor.as_ref().map(Supervisor::state);
        state.is_some_and(|state| matches!(&*state.borrow(), EnvoyState::Ready { .. }))
    }

    fn start(&mut self) {
        if self.supervisor.is_some() {
            return;
        }
        let _inside = self.runtime.enter();
        match Supervisor::start(self.config.clone()) {
            Ok(supervisor) => self.watch(supervisor),
            Err(error) => warn!(error = chain(&error), "envoy can't be started"),
        }
    }

    fn watch(&mut self, supervisor: Supervisor) {
        let (mut state, states) = (supervisor.state(), self.states.clone());
        self.runtime.spawn(async move {
            while state.changed().await.is_ok() {
                states.send_modify(|count| *count += 1);
            }
        });
        self.supervisor = Some(supervisor);
    }
}

/// A folder that Envoy's user may write to, and nobody else.
fn make_folder(path: &Path, user: u32) -> Result<(), L7Error> {
    let failed = |source| L7Error::Folder {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    chown(path, Some(user), Some(user)).map_err(failed)
}
