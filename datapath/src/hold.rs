//! Holding connections back: the interface by which the agent gets their first bytes, what it says of them, and which
//! residuals are judged so.
//!
//! Invariant: what was held goes back only through `from_agent`, which lets nothing but allowed connections through; a
//! residual whose number changes or goes takes its connections with it. Numbers outlive this process, as the
//! connections do.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use aya::maps::{HashMap, Map, MapData, MapError};
use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use thyra_datapath_abi::held::is_held;
use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{
    Action, Flow4, Flow6, FlowState, HeldFlow, HeldKey4, HeldKey6, HeldVerdict, Isns, Mode, maps,
};

use crate::clsact;
use crate::datapath::Datapath;
use crate::flow_maps::{KEY4, KEY6};
use crate::hook::Hook;
use crate::interface::Interface;
use crate::mapping::Mapping;
use crate::memory;
use crate::open::endpoint_numbers;
use crate::steering::SteerError;
use crate::tap::Tap;

const FLOW: usize = size_of::<HeldFlow>();
const JUDGED4: usize = size_of::<HeldKey4>();
const JUDGED6: usize = size_of::<HeldKey6>();
const VERDICT: usize = size_of::<HeldVerdict>();

/// Nothing can be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// What is held is given back behind the place where it is judged, which here is inside the pod.
    #[error("with `--hook=pod` nothing can be held; `--l7-hold` needs `--hook=host`")]
    Inside,
    /// There can be no interface.
    #[error("can't make an interface for what is held; is there `/dev/net/tun`?")]
    Interface(#[source] io::Error),
    /// The kernel refuses the program there.
    #[error("can't attach `from_agent` to `{interface}`")]
    Attach {
        /// The interface.
        interface: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A map can't be opened.
    #[error("can't open the map `{0}`")]
    Map(&'static str, #[source] MapError),
}

/// A connection that is held, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldConnection {
    /// The pod's end.
    pub local: SocketAddr,
    /// The client's.
    pub remote: SocketAddr,
    /// Endpoint id.
    pub endpoint: u16,
    /// Number of the residual that judges it.
    pub residual: u16,
    /// How it began.
    pub isns: Isns,
    /// Whether everything passes.
    pub is_open: bool,
    /// What was said of it.
    pub verdict: Option<HeldVerdict>,
    /// Its flags and its age.
    pub state: FlowState,
}

/// What the agent has in its hands while it holds connections; it ends with this.
pub struct Holding {
    tap: Arc<Tap>,
    maps: HeldMaps,
    state: Mapping,
    /// Keeps the program of a tcx link where it is; a filter goes with its interface.
    _program: SchedClassifier,
}

impl std::fmt::Debug for Holding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Holding")
            .field("tap", &self.tap)
            .finish_non_exhaustive()
    }
}

/// The maps.
struct HeldMaps {
    flows4: HashMap<MapData, [u8; KEY4], [u8; FLOW]>,
    flows6: HashMap<MapData, [u8; KEY6], [u8; FLOW]>,
    verdicts4: HashMap<MapData, [u8; JUDGED4], [u8; VERDICT]>,
    verdicts6: HashMap<MapData, [u8; JUDGED6], [u8; VERDICT]>,
}

impl HeldMaps {
    fn open(datapath: &Datapath) -> Result<Self, HoldError> {
        let failed = |name: &'static str| move |source| HoldError::Map(name, source);
        let open = |name: &'static str| MapData::from_pin(datapath.pins.map(name)).map_err(failed(name));
        Ok(Self {
            flows4: HashMap::try_from(Map::HashMap(open(maps::HELD_FLOWS4)?))
                .map_err(failed(maps::HELD_FLOWS4))?,
            flows6: HashMap::try_from(Map::HashMap(open(maps::HELD_FLOWS6)?))
                .map_err(failed(maps::HELD_FLOWS6))?,
            verdicts4: HashMap::try_from(Map::LruHashMap(open(maps::HELD_VERDICTS4)?))
                .map_err(failed(maps::HELD_VERDICTS4))?,
            verdicts6: HashMap::try_from(Map::LruHashMap(open(maps::HELD_VERDICTS6)?))
                .map_err(failed(maps::HELD_VERDICTS6))?,
        })
    }

    fn verdict(&self, key: &Key, isns: Isns) -> io::Result<Option<HeldVerdict>> {
        let bytes = match *key {
            Key::V4(flow) => found(
                self.verdicts4
                    .get(&zerocopy::transmute!(HeldKey4 { flow, isns }), 0),
            )?,
            Key::V6(flow) => found(
                self.verdicts6
                    .get(&zerocopy::transmute!(HeldKey6 { flow, isns }), 0),
            )?,
        };
        Ok(bytes.map(|bytes| zerocopy::transmute!(bytes)))
    }
}

/// A connection's name in the maps.
#[derive(Clone, Copy, Debug)]
enum Key {
    V4(Flow4),
    V6(Flow6),
}

impl Key {
    /// None where the ends are of two families.
    fn new(local: SocketAddr, remote: SocketAddr, endpoint: u16) -> Option<Self> {
        match (local, remote) {
            (SocketAddr::V4(local), SocketAddr::V4(remote)) => {
                Some(Self::V4(Flow4::between(local, remote, endpoint)))
            }
            (SocketAddr::V6(local), SocketAddr::V6(remote)) => {
                Some(Self::V6(Flow6::between(local, remote, endpoint)))
            }
            _ => None,
        }
    }
}

fn found<T>(result: Result<T, MapError>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(io::Error::other(error)),
    }
}

impl Holding {
    /// The interface.
    #[must_use]
    pub fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// What the kernel knows of a connection; none where it isn't held.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn find(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<HeldConnection>> {
        let Some(endpoint) = self.endpoint(local.ip()) else {
            return Ok(None);
        };
        let Some(key) = Key::new(local, remote, endpoint) else {
            return Ok(None);
        };
        let bytes = match &key {
            Key::V4(flow) => found(self.maps.flows4.get(&zerocopy::transmute!(*flow), 0))?,
            Key::V6(flow) => found(self.maps.flows6.get(&zerocopy::transmute!(*flow), 0))?,
        };
        let Some(bytes) = bytes else {
            return Ok(None);
        };
        let flow: HeldFlow = zerocopy::transmute!(bytes);
        Ok(Some(HeldConnection {
            verdict: self.maps.verdict(&key, flow.isns)?,
            ..connection(local, remote, endpoint, &flow)
        }))
    }

    /// The endpoint that has this address.
    fn endpoint(&self, address: IpAddr) -> Option<u16> {
        endpoint_numbers().find(|id| {
            let record = memory::record(&self.state, *id);
            let own = match address {
                IpAddr::V4(_) => IpAddr::from(record.address4),
                IpAddr::V6(_) => IpAddr::from(record.address6),
            };
            record.ifindex != 0 && own == address
        })
    }

    /// Says what becomes of a connection.
    ///
    /// # Errors
    /// The kernel has no memory.
    pub fn judge(&mut self, of: &HeldConnection, action: u32, end: u32) -> io::Result<()> {
        let isns = of.isns;
        let verdict: [u8; VERDICT] = zerocopy::transmute!(HeldVerdict { isns, action, end });
        match Key::new(of.local, of.remote, of.endpoint) {
            Some(Key::V4(flow)) => {
                let key: [u8; JUDGED4] = zerocopy::transmute!(HeldKey4 { flow, isns });
                self.maps
                    .verdicts4
                    .insert(key, verdict, 0)
                    .map_err(io::Error::other)
            }
            Some(Key::V6(flow)) => {
                let key: [u8; JUDGED6] = zerocopy::transmute!(HeldKey6 { flow, isns });
                self.maps
                    .verdicts6
                    .insert(key, verdict, 0)
                    .map_err(io::Error::other)
            }
            None => Ok(()),
        }
    }

    /// Takes a verdict back that has done its work.
    pub fn forget(&mut self, of: &HeldConnection) {
        let isns = of.isns;
        // What isn't there has made room already.
        let _absent = match Key::new(of.local, of.remote, of.endpoint) {
            Some(Key::V4(flow)) => self
                .maps
                .verdicts4
                .remove(&zerocopy::transmute!(HeldKey4 { flow, isns })),
            Some(Key::V6(flow)) => self
                .maps
                .verdicts6
                .remove(&zerocopy::transmute!(HeldKey6 { flow, isns })),
            None => Ok(()),
        };
    }
}

fn connection(local: SocketAddr, remote: SocketAddr, endpoint: u16, flow: &HeldFlow) -> HeldConnection {
    HeldConnection {
        local,
        remote,
        endpoint,
        residual: flow.state.tag(),
        isns: flow.isns,
        is_open: flow.is_open(),
        verdict: None,
        state: flow.state,
    }
}

impl Datapath {
    /// Makes the interface by which held packets come here, and says so to the programs.
    ///
    /// # Errors
    /// Nothing has changed: what would be held is dropped.
    pub fn hold(&mut self) -> Result<Holding, HoldError> {
        if self.programs.are_inside() {
            return Err(HoldError::Inside);
        }
        let tap = Tap::make().map_err(HoldError::Interface)?;
        let failed = |source| HoldError::Attach {
            interface: tap.name().to_owned(),
            source,
        };
        let path = self.pins.program(&self.programs.content, maps::FROM_AGENT);
        let mut program = SchedClassifier::from_pin(path).map_err(|e| failed(io::Error::other(e)))?;
        let options = match self.hook {
            Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            Hook::Clsact => {
                let interface = Interface {
                    index: tap.index(),
                    name: tap.name().to_owned(),
                    master: 0,
                };
                clsact::prepare(&interface).map_err(failed)?;
                TcAttachOptions::Netlink(NlOptions {
                    priority: clsact::PRIORITY,
                    handle: clsact::HANDLE,
                    classid: None,
                })
            }
        };
        program
            .attach_with_options(tap.name(), TcAttachType::Ingress, options)
            .map_err(|e| failed(io::Error::other(e)))?;
        let held = HeldMaps::open(self)?;
        let state =
            MapData::from_pin(self.pins.map(maps::STATE)).map_err(|e| HoldError::Map(maps::STATE, e))?;
        let state = Mapping::new(state.fd().as_fd(), memory::STATE_WORDS)
            .map_err(|e| HoldError::Map(maps::STATE, MapError::IoError(e)))?;
        tap.start().map_err(HoldError::Interface)?;
        self.memory.set_agent(tap.index());
        Ok(Holding {
            tap: Arc::new(tap),
            maps: held,
            state,
            _program: program,
        })
    }

    /// The residuals whose connections are held, with their numbers.
    #[must_use]
    pub fn holds(&self) -> &BTreeMap<Arc<str>, u16> {
        &self.steering.holds
    }

    /// Says whose connections are held, and under which number. The connections of numbers that went are over.
    ///
    /// # Errors
    /// Connections of numbers that went could not be forgotten; no such number may be given out again.
    pub fn set_holds(&mut self, holds: BTreeMap<Arc<str>, u16>) -> Result<(), SteerError> {
        if self.steering.holds == holds {
            return Ok(());
        }
        let numbers: BTreeSet<u16> = holds.values().copied().collect();
        let went = self
            .steering
            .holds
            .values()
            .any(|number| !numbers.contains(number));
        self.steering.holds = holds;
        self.tell_listeners();
        if went {
            self.flows
                .keep_held(&self.memory, &numbers)
                .map_err(SteerError::Forget)?;
        }
        Ok(())
    }

    /// Forgets what was judged of connections that these tables, which are live, judge otherwise: while they did,
    /// others may have taken the same ends unseen.
    ///
    /// # Errors
    /// Some are still remembered.
    pub fn keep_held(&self, tables: &Tables) -> Result<(), SteerError> {
        let is_held = |endpoint, client, port, number| {
            let enforced = tables
                .endpoint(endpoint)
                .is_some_and(|placed| placed.mode == Mode::Enforce);
            let verdict = tables.judge(endpoint, client, port).filter(|_| enforced);
            let residual = verdict.filter(|verdict| verdict.cell_action() == Action::Proxy);
            let residual = residual.and_then(|verdict| verdict.residual.as_ref());
            residual.and_then(|residual| self.steering.holds.get(residual)) == Some(&number)
        };
        self.flows
            .keep_held_if(&self.memory, is_held)
            .map_err(SteerError::Forget)
    }

    /// Numbers that an earlier process gave.
    pub(crate) fn pick_up_holds(&mut self) {
        // Whoever held packets has gone, and its interface with it.
        self.memory.set_agent(0);
        let known = self.names.known().filter_map(|id| {
            let number = Some(self.memory.listener(id)).filter(|number| is_held(*number))?;
            Some((self.names.get(id)?.residual.clone()?, number))
        });
        self.steering.holds.extend(known);
    }

    /// All connections that are held, or were.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn held_connections(&self) -> Result<Vec<HeldConnection>, HoldError> {
        let failed = |name: &'static str| move |source| HoldError::Map(name, MapError::IoError(source));
        let judged = HeldMaps::open(self)?;
        let (four, six) = self.flows.held().map_err(failed(maps::HELD_FLOWS4))?;
        let mut connections = Vec::with_capacity(four.len() + six.len());
        let mut add = |key: &Key, connection: HeldConnection| {
            let verdict = judged.verdict(key, connection.isns);
            let verdict = verdict.map_err(failed(maps::HELD_VERDICTS4))?;
            connections.push(HeldConnection {
                verdict,
                ..connection
            });
            Ok(())
        };
        for (key, value) in four {
            let (flow, value): (Flow4, HeldFlow) = (zerocopy::transmute!(key), zerocopy::transmute!(value));
            let (local, remote): (SocketAddrV4, SocketAddrV4) = flow.ends();
            let known = connection(local.into(), remote.into(), flow.endpoint, &value);
            add(&Key::V4(flow), known)?;
        }
        for (key, value) in six {
            let (flow, value): (Flow6, HeldFlow) = (zerocopy::transmute!(key), zerocopy::transmute!(value));
            let (local, remote): (SocketAddrV6, SocketAddrV6) = flow.ends();
            let known = connection(local.into(), remote.into(), flow.endpoint, &value);
            add(&Key::V6(flow), known)?;
        }
        Ok(connections)
    }
}
