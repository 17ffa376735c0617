//! The way to the node's Envoy: which pods need which residuals there, and on which ports it has taken them.
//!
//! Invariant: the kernel is told of a port only once Envoy judges that residual on it; an Envoy that is missing, starts
//! or is gone refuses what needs it and nothing else. It isn't started before something needs it, and outlives the
//! agent: the next one takes it over with all its connections, or ends it before it starts another.

mod authorizers;
mod cells;
mod found;
mod holds;
mod keeper;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thyra_datapath::{EnvoyGroup, EnvoyGroupError, GivenGroup};
use thyra_node_proxy_bridge::ads::{AdsError, AdsServer};
use thyra_node_proxy_bridge::envoy::{
    Binary, BinaryError, DEFAULT_HEAP, EnvoyConfig, EnvoyError, Given, GivenConfig,
};
use thyra_node_proxy_bridge::hold::Oracles;
use thyra_node_proxy_bridge::inline::{Cell, Inline, Refusal};
use thyra_node_proxy_bridge::listener::budget::REQUESTS_AT_ONCE;
use thyra_node_proxy_bridge::listener::{HttpOptions, Redact};
use thyra_node_proxy_bridge::records::Records;
use thyra_policy_compiler::world::World;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{info, warn};

pub use self::cells::cells;
use self::found::Found;
use self::holds::Holds;
use self::keeper::Keeper;
use crate::chain::chain;
use crate::keys::{Client, Keyring};
use crate::reach::Reach;

/// A running Envoy takes a change within milliseconds; a commit waits no longer than this for it.
const PATIENCE: Duration = Duration::from_millis(500);
/// And for one of an earlier agent no longer than this, to come back to this one; an emulated CPU is slow.
const REUNION: Duration = Duration::from_secs(5);
/// Its worker threads.
pub const CONCURRENCY: u16 = 2;

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
    /// The one that somebody else runs, which asks at this socket.
    Given(PathBuf),
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
    /// What its records leave out.
    pub redact: Redact,
    /// Its folder, for one that this agent starts; what is noted of Envoy lies beside it.
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

/// Makes the sockets of a control group known to the kernel, and says whether they have been all the time, or why not.
pub type Register = Box<dyn Fn(&Path) -> Result<bool, String> + Send + Sync>;

/// See the module.
pub struct L7 {
    inline: Inline,
    /// Connections that are judged once.
    holds: Holds,
    keeper: Keeper,
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
    /// the sockets of a control group known to the kernel, and says whether they have been all the time, or why not.
    ///
    /// # Errors
    /// The one that was named can't be used, or there is no place for it.
    pub async fn open(options: &Options, register: Register) -> Result<Option<Self>, L7Error> {
        let named = match &options.envoy {
            EnvoyChoice::Off => {
                found::end(&options.folder);
                return Ok(None);
            }
            EnvoyChoice::Given(socket) => return Self::for_given(options, socket, register).map(Some),
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
        let known = register(group.path()).unwrap_or_else(|why| {
            warn!(why, "envoy's sockets can't be known; what needs L7 is refused");
            false
        });
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
        let found = Found::look(&config, &group, known)?;
        let server = Arc::new(AdsServer::start(&config.xds_socket(), user)?);
        let keeper = Keeper::Own {
            config: Box::new(config),
            group,
            supervisor: None,
        };
        let mut l7 = Self::new(options, keeper, server, &options.folder);
        if let Some(Found { envoy, kept }) = found {
            l7.inline.take_over(kept);
            l7.inherited = true;
            l7.keeper.take_over(envoy, &l7.states)?;
        }
        Ok(Some(l7))
    }

    /// Listens for an Envoy that somebody else runs, and goes on with the one that an earlier agent told what to do.
    fn for_given(options: &Options, socket: &Path, register: Register) -> Result<Self, L7Error> {
        let config = GivenConfig {
            socket: socket.to_owned(),
            node: options.node.clone(),
            heap: options.budget.heap,
            user: options.user,
            note: found::note(&options.folder),
        };
        let folder = config.folder().to_owned();
        make_folder(&folder, options.user)?;
        let enroll = move |pid| {
            let group = GivenGroup::of(pid).map_err(|error| chain(&error))?;
            register(group.path())
        };
        let given = Given::new(config, Box::new(enroll));
        let kept = found::resumed(&given, &options.folder);
        if kept.is_none() {
            given.unwant()?;
        }
        let server = Arc::new(AdsServer::start_for(Arc::clone(&given))?);
        let state = given.state();
        let mut l7 = Self::new(options, Keeper::Given(given), server, &folder);
        keeper::count(state, &l7.states, &l7.runtime);
        if let Some(kept) = kept {
            l7.inline.take_over(kept);
            l7.inherited = true;
        }
        Ok(l7)
    }

    fn new(options: &Options, keeper: Keeper, server: Arc<AdsServer>, folder: &Path) -> Self {
        let client = Client::new(Reach::Others);
        let keys = Keyring::new(client, Handle::current(), Some(&options.state));
        let http = HttpOptions {
            requests_at_once: options.budget.requests_at_once,
            requests_per_second: options.budget.requests_per_second,
            redact: options.redact,
            ..HttpOptions::default()
        };
        let mut l7 = Self {
            holds: Holds::new(Arc::clone(&server), folder, options.redact),
            inline: Inline::new(server, http.clone()),
            http,
            keeper,
            inherited: false,
            runtime: Handle::current(),
            cells: Vec::new(),
            keys,
            missing_authorizers: Vec::new(),
            states: watch::Sender::new(0),
        };
        l7.inline.store_in(found::ports(&options.folder));
        l7
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
            self.runtime.block_on(self.inline.settled(REUNION, || true));
            // Its oracles are new ones.
            self.settle();
        } else if self.keeper.is_ready() {
            self.settle();
        } else if !self.inline.is_empty() || !self.holds.is_empty() {
            self.keeper.start(&self.states, &self.runtime);
        }
        true
    }

    /// Gives Envoy the keys that were fetched since.
    pub fn take_keys(&mut self) {
        if !self.inherited && self.inline.set_keys(self.keys.sets()) {
            self.apply_inline();
            if self.keeper.is_ready() {
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
        // What isn't then is refused until it is.
        let settled = self.inline.settled(PATIENCE, || self.holds.is_settled());
        self.runtime.block_on(settled);
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
        // It acknowledges what it is to listen for before it does.
        let unsettled = !(self.inline.is_settled() && self.holds.is_settled());
        self.keeper.is_starting() || (self.keeper.is_ready() && unsettled)
    }

    /// What Envoy says of each request.
    #[must_use]
    pub fn records(&self) -> Records {
        self.inline.records()
    }

    /// What is wrong with Envoy; none while it isn't needed or is ready.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.keeper.problem()
    }

    /// Leaves Envoy at work, for the next agent.
    pub fn leave(self) {
        self.keeper.leave(&self.runtime);
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
    // A volume is everybody's at first. Once it is Envoy's only Envoy may change this, and it is right already.
    let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o777 != 0o700 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    chown(path, Some(user), Some(user)).map_err(failed)
}
