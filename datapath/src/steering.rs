//! Giving connections to Envoy: the program in each pod's network namespace, the one that notes Envoy's sockets, and
//! which listener judges which residual.
//!
//! Invariant: an endpoint counts as steered only while its program is linked; a verdict has a listener only while
//! that listener has the verdict's own residual. Whatever is missing, connections that need L7 are refused. All of it
//! is in the kernel and outlives the process, as an Envoy may.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::programs::links::{FdLink, LinkError};
use aya::programs::{CgroupAttachMode, ProgramError};
use thyra_datapath_abi::held::is_held;
use thyra_datapath_abi::maps::{REGISTER, STEER};
use thyra_datapath_abi::tables::Verdict;

use crate::bpffs::{self, BpffsError, Pin};
use crate::datapath::Datapath;
use crate::envoy_group;
use crate::netns;
use crate::open::{OpenError, endpoint_numbers};
use crate::sys;

/// What Envoy is expected to hold.
#[derive(Debug, Default)]
pub(crate) struct Steering {
    /// Port of the listener of a residual, by its address.
    listeners: BTreeMap<Arc<str>, u16>,
    /// Number of a residual whose connections are held, by its address.
    pub(crate) holds: BTreeMap<Arc<str>, u16>,
    /// Where the endpoints' programs are.
    places: BTreeMap<u16, PathBuf>,
}

impl Steering {
    /// 0 where nothing judges the verdict.
    pub(crate) fn listener_of(&self, verdict: &Verdict) -> u16 {
        let residual = verdict.residual.as_ref();
        residual
            .and_then(|address| self.holds.get(address).or_else(|| self.listeners.get(address)))
            .copied()
            .unwrap_or(0)
    }
}

/// Connections can't be given to Envoy; those that need L7 are refused.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The pod's network namespace can't be entered.
    #[error("can't enter the network namespace `{netns}`")]
    Namespace {
        /// Its file.
        netns: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses the program there.
    #[error("can't attach `{program}` to `{place}`")]
    Attach {
        /// Which.
        program: &'static str,
        /// Where.
        place: PathBuf,
        /// Why not.
        #[source]
        source: ProgramError,
    },
    /// It is attached as in kernels before Linux 5.7.
    #[error("the kernel makes no link at Envoy's control group")]
    NoLink(#[source] LinkError),
    /// The link can't be pinned.
    #[error("can't pin the link `{pin}`")]
    Pin {
        /// Path.
        pin: PathBuf,
        /// Why not.
        #[source]
        source: aya::pin::PinError,
    },
    /// The pins can't be changed.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// Envoy's control group can't be opened.
    #[error("can't open the control group `{cgroup}`")]
    Cgroup {
        /// Its folder.
        cgroup: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Connections of listeners that went could not be forgotten.
    #[error("can't forget the connections of listeners that went")]
    Forget(#[source] io::Error),
}

impl Datapath {
    /// Steers the endpoint's new connections, in the network namespace at `netns`, from now on. Idempotent.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn steer(&mut self, endpoint: u16, netns: &Path) -> Result<(), SteerError> {
        let is_there = self
            .steering
            .places
            .get(&endpoint)
            .is_some_and(|place| place == netns);
        if is_there && self.is_steered(endpoint) {
            return Ok(());
        }
        let unusable = |source| SteerError::Namespace {
            netns: netns.to_owned(),
            source,
        };
        let file = File::open(netns).map_err(unusable)?;
        let cookie = cookie(&file).map_err(unusable)?;
        if self.memory.netns(endpoint) == cookie {
            self.steering.places.insert(endpoint, netns.to_owned());
            return Ok(());
        }
        self.end_steering(endpoint)?;
        // What an earlier namespace had is not in this one.
        self.flows
            .forget_l7(&self.memory, endpoint)
            .map_err(SteerError::Forget)?;
        let refused = |source| SteerError::Attach {
            program: STEER,
            place: netns.to_owned(),
            source,
        };
        let program = &mut self.programs.steer;
        let id = program.attach(&file).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        let link = FdLink::from(link);
        let pin = self.pins.steer(endpoint);
        link.pin(&pin).map_err(|source| SteerError::Pin { pin, source })?;
        self.memory.set_netns(endpoint, cookie);
        self.steering.places.insert(endpoint, netns.to_owned());
        Ok(())
    }

    /// Whether the endpoint's new connections are steered.
    #[must_use]
    pub fn is_steered(&self, endpoint: u16) -> bool {
        self.memory.netns(endpoint) != 0
    }

    /// What needs L7 is refused again. An endpoint that isn't steered is fine.
    pub(crate) fn end_steering(&mut self, endpoint: u16) -> Result<(), BpffsError> {
        self.steering.places.remove(&endpoint);
        self.memory.set_netns(endpoint, 0);
        bpffs::unlink(&self.pins.steer(endpoint))
    }

    /// Notes the sockets of whatever runs in this control group, from now on. Whether an earlier process had them noted
    /// all the time, so that those of an Envoy that is at work are known.
    ///
    /// # Errors
    /// They are not noted, and get no connection.
    pub fn register(&mut self, cgroup: &Path) -> Result<bool, SteerError> {
        let unusable = |source| SteerError::Cgroup {
            cgroup: cgroup.to_owned(),
            source,
        };
        let folder = File::open(cgroup).map_err(unusable)?;
        let number = envoy_group::number(&folder).map_err(unusable)?;
        let refused = |source| SteerError::Attach {
            program: REGISTER,
            place: cgroup.to_owned(),
            source,
        };
        let pin = self.pins.envoy();
        let program = &mut self.programs.register;
        let own = program.fd().map_err(refused)?.as_fd();
        // One that can't be asked or changed is none.
        let was_noted = sys::link_cgroup(&pin).is_ok_and(|at| at == number)
            && sys::link_update(&pin, own).is_ok_and(|runs| runs);
        if was_noted {
            return Ok(true);
        }
        bpffs::unlink(&pin)?;
        let id = program
            // A link always leaves room for others.
            .attach(&folder, CgroupAttachMode::Single)
            .map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        let link = FdLink::try_from(link).map_err(SteerError::NoLink)?;
        link.pin(&pin).map_err(|source| SteerError::Pin { pin, source })?;
        Ok(false)
    }

    /// Says on which port, in every pod that needs it, Envoy judges a residual. Others are refused, and the
    /// connections of listeners that went are over.
    ///
    /// # Errors
    /// Connections of listeners that went could not be forgotten; no other port may be given out for them.
    pub fn set_listeners(&mut self, listeners: BTreeMap<Arc<str>, u16>) -> Result<(), SteerError> {
        if self.steering.listeners == listeners {
            return Ok(());
        }
        let ports: BTreeSet<u16> = listeners.values().copied().collect();
        let went = self.steering.listeners.values().any(|port| !ports.contains(port));
        self.steering.listeners = listeners;
        self.tell_listeners();
        if went {
            self.flows
                .keep_listeners(&self.memory, &ports)
                .map_err(SteerError::Forget)?;
        }
        Ok(())
    }

    /// Tells the programs who judges the verdicts.
    pub(crate) fn tell_listeners(&self) {
        for id in self.names.known() {
            let port = self
                .names
                .get(id)
                .map_or(0, |verdict| self.steering.listener_of(verdict));
            self.memory.set_listener(id, port);
        }
    }

    /// After a start: listeners of an Envoy that may be at work stay until the first call of `set_listeners`, numbers
    /// of what is held until that of `set_holds`, and links run this build's program.
    pub(crate) fn pick_up_steering(&mut self) -> Result<(), OpenError> {
        self.pick_up_holds();
        let in_use = self.names.in_use().filter_map(|(id, verdict)| {
            let port = Some(self.memory.listener(id)).filter(|port| *port != 0 && !is_held(*port))?;
            Some((Arc::clone(verdict.residual.as_ref()?), port))
        });
        self.steering.listeners = in_use.collect();
        self.tell_listeners();
        let mut linked = BTreeSet::new();
        let program = self
            .programs
            .steer
            .fd()
            .map_err(|source| OpenError::Program { name: STEER, source })?;
        for (pin, path) in self.pins.list()? {
            let Pin::Steer(endpoint) = pin else {
                continue;
            };
            let is_known = self.memory.netns(endpoint) != 0;
            let runs = sys::link_update(&path, program.as_fd()).map_err(|source| OpenError::Link {
                pin: path.clone(),
                source,
            })?;
            if is_known && runs {
                linked.insert(endpoint);
            } else {
                bpffs::unlink(&path)?;
            }
        }
        for endpoint in endpoint_numbers().filter(|id| !linked.contains(id)) {
            self.memory.set_netns(endpoint, 0);
        }
        Ok(())
    }
}

/// The namespace's cookie.
fn cookie(netns: &File) -> io::Result<u64> {
    netns::inside(netns.try_clone()?, || {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )?;
        sys::netns_cookie(socket.as_fd())
    })
}
