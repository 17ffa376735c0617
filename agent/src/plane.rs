//! What the agent needs of a datapath; the real one is behind it, and one that only remembers for the tests.
//!
//! Invariant: `commit` is all or nothing, and `attach` leaves nothing behind when it fails.

mod kernel;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thyra_datapath::{Connection, EndedSockets, Held, HeldConnection, Holding};
use thyra_datapath_abi::count::{EndpointCounter, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::tables::{Tables, Verdict};
use thyra_datapath_abi::{Action, Event, Reason};

use crate::registration::Registration;

/// Why the datapath could not do it; the text is for the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaneError {
    /// No room: endpoint ids, table space, disk.
    #[error("{0}")]
    Full(String),
    /// Something outside is not as it must be: the interface doesn't exist, say.
    #[error("{0}")]
    Precondition(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// What a commit did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// 64-bit words that differed and were written.
    pub words: usize,
    /// How long it had to wait for programs that were still reading.
    pub waited: Duration,
    /// Ids of the tables' verdicts, by index.
    pub verdict_ids: Vec<u16>,
}

/// Fill of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Map or table.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Entries possible.
    pub capacity: u64,
}

/// What the programs are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaneStatus {
    /// `loaded`, `picked up`.
    pub datapath: String,
    /// Where the programs sit.
    pub hook: String,
    /// Whether connections between pods of this node go straight: `on`, `off`, or `off: ` and why.
    pub local_redirect: String,
    /// Endpoints that take part in that.
    pub redirected: usize,
    /// What is wrong with it, endpoint by endpoint.
    pub problems: Vec<String>,
    /// Fill of the maps.
    pub maps: Vec<Fill>,
}

/// All counters, summed over CPUs; only what isn't zero.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// By verdict id.
    pub verdicts: Vec<(u16, VerdictCounter)>,
    /// By reason.
    pub reasons: Vec<(Reason, ReasonCounter)>,
    /// By endpoint id.
    pub endpoints: Vec<(u16, EndpointCounter)>,
    /// Events that were not written: the ring was full, or the budget of refusals spent.
    pub lost: u64,
}

/// The kernel's tables as read back.
pub trait Kernel: Send {
    /// What the live bank says for a source and a port of an endpoint: the action and the verdict id.
    fn judge(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<(Action, u16)>;
}

/// A stream of events.
#[async_trait::async_trait]
pub trait Events: Send {
    /// The next events, at least one.
    async fn next_batch(&mut self) -> std::io::Result<Vec<Event>>;
}

/// A pod's TCP sockets.
#[async_trait::async_trait]
pub trait Sockets: Send {
    /// Those that end next.
    async fn next_batch(&mut self) -> std::io::Result<EndedSockets>;
    /// The connections that the pod holds now.
    ///
    /// # Errors
    /// The kernel doesn't answer.
    fn held(&self) -> std::io::Result<Vec<Held>>;
}

/// A datapath.
pub trait Plane: Send + Sync + 'static {
    /// The endpoint id of a uid; the same as long as it is known.
    ///
    /// # Errors
    /// No id is left.
    fn reserve(&mut self, uid: &str) -> Result<u16, PlaneError>;
    /// All ids that are taken, by uid.
    fn reservations(&self) -> BTreeMap<String, u16>;
    /// Puts the programs at an endpoint's interface; the interface index. One that is held back opens no connection
    /// until it is released.
    ///
    /// # Errors
    /// Nothing is left behind then.
    fn attach(&mut self, id: u16, registration: &Registration, held_back: bool) -> Result<u32, PlaneError>;
    /// Lets an endpoint that was held back open connections.
    fn release(&mut self, id: u16);
    /// Takes an endpoint's programs away and frees its id; idempotent.
    ///
    /// # Errors
    /// A pin can't be removed.
    fn detach(&mut self, id: u16) -> Result<(), PlaneError>;
    /// Makes `tables` the live ones.
    ///
    /// # Errors
    /// The live ones stay.
    fn commit(&mut self, tables: &Tables, generation: u32) -> Result<Committed, PlaneError>;
    /// Whether the endpoint's connections with other pods of this node go straight: `on`, `off`, or `off: ` and why.
    fn local_redirect(&self, id: u16) -> String;

    /// At which end of the endpoint's veth what comes to it is judged: `host` or `pod`.
    fn hook_of(&self, id: u16) -> &'static str;
    /// Steers the endpoint's new connections to Envoy's listeners in the pod's network namespace, where a verdict needs
    /// it.
    ///
    /// # Errors
    /// They are refused as before.
    fn steer(&mut self, id: u16, netns: &str) -> Result<(), PlaneError>;
    /// Whatever runs in this control group is Envoy; whether it has been all the time, before this process too.
    ///
    /// # Errors
    /// Its sockets get no connection.
    fn register_envoy(&mut self, cgroup: &Path) -> Result<bool, PlaneError>;
    /// On which port Envoy judges a residual, by its address.
    ///
    /// # Errors
    /// Connections of listeners that went may still be remembered.
    fn set_listeners(&mut self, listeners: BTreeMap<Arc<str>, u16>) -> Result<(), PlaneError>;
    /// Where connections come that are to be held; none where nothing can be.
    ///
    /// # Errors
    /// They are dropped as before.
    fn hold(&mut self) -> Result<Option<Holding>, PlaneError> {
        Ok(None)
    }
    /// The residuals whose connections are held, with their numbers, as an earlier process left them.
    fn holds(&self) -> BTreeMap<Arc<str>, u16> {
        BTreeMap::new()
    }
    /// Whose connections are held, and under which number.
    ///
    /// # Errors
    /// Connections of numbers that went may still be remembered.
    fn set_holds(&mut self, holds: BTreeMap<Arc<str>, u16>) -> Result<(), PlaneError> {
        drop(holds);
        Ok(())
    }
    /// Forgets what was judged of connections that these tables, which are live, judge otherwise.
    ///
    /// # Errors
    /// Some are still remembered.
    fn keep_held(&mut self, tables: &Tables) -> Result<(), PlaneError> {
        let _none = tables;
        Ok(())
    }
    /// The connections that are held, or were.
    ///
    /// # Errors
    /// The maps can't be read.
    fn held_connections(&self) -> Result<Vec<HeldConnection>, PlaneError> {
        Ok(Vec::new())
    }
    /// Whether allowed new connections are reported as events.
    fn report_new(&mut self, on: bool);
    /// Which connections are reported for the flow log: one of two to this number.
    fn flow_log(&mut self, sampling: Option<u8>);
    /// Index of an interface; none when it doesn't exist.
    fn interface_index(&self, name: &str) -> Option<u32>;
    /// Generation of the live tables; 0 when nothing was ever committed.
    fn generation(&self) -> u32;
    /// Endpoints that programs of another table layout still judge; attaching takes one over.
    fn older_endpoints(&self) -> usize;
    /// The verdict with this id.
    fn verdict(&self, id: u16) -> Option<Verdict>;
    /// Counters.
    ///
    /// # Errors
    /// The maps can't be read.
    fn counts(&self) -> Result<Counts, PlaneError>;
    /// `Counts::lost` alone; 0 where that can't be read.
    fn lost(&self) -> u64;
    /// Reads the live tables back.
    ///
    /// # Errors
    /// The maps can't be read.
    fn read_back(&self) -> Result<Box<dyn Kernel>, PlaneError>;
    /// The TCP connections of an endpoint that policy judges, as the pod's own stack holds them.
    ///
    /// # Errors
    /// Its network namespace is not known or can't be entered.
    fn connections(&self, id: u16, registration: &Registration) -> Result<Vec<Connection>, PlaneError>;
    /// The sockets of an endpoint's pod, watched from now on. Needs a tokio runtime.
    ///
    /// # Errors
    /// Its network namespace is not known or can't be entered.
    fn sockets(&self, registration: &Registration) -> Result<Box<dyn Sockets>, PlaneError>;
    /// Endpoints that packets reach past the programs, and how many did since the last call, when that is news.
    fn check_coverage(&mut self) -> Vec<(u16, u64)>;
    /// Removes what finished connections left.
    fn collect(&mut self);
    /// For `status`.
    fn status(&self) -> PlaneStatus;
    /// Events from now on; none where there are none.
    ///
    /// # Errors
    /// The ring can't be opened.
    fn events(&self) -> Result<Option<Box<dyn Events>>, PlaneError>;
}
