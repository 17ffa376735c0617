//! Putting the programs at a pod's interface, and taking them away.
//!
//! Invariant: the record is in place before the first program runs, and a program whose record is gone drops:
//! whatever instruction this process dies at, no packet passes unjudged that was judged before.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use thyra_datapath_abi::{EndpointRecord, limits};
use tracing::warn;

use crate::bpffs::{self, BpffsError, Direction, Pins};
use crate::datapath::Datapath;
use crate::direct::LocalRedirect;
use crate::endpoint_ids::ReserveError;
use crate::hook::{self, Attachment, Place};
use crate::inside::InsideError;
use crate::interface::Interface;
use crate::programs::HookError;
use crate::state_file::StateError;

/// An endpoint to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSpec {
    /// The pod's uid.
    pub uid: String,
    /// Name of the host end of the pod's veth, in this process's network namespace.
    pub host_interface: String,
    /// The pod's addresses by the CNI's word, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// The pod's MAC, if known.
    pub mac: Option<[u8; 6]>,
    /// Whether it may open no connection yet; see `Datapath::release`.
    pub held_back: bool,
    /// Its network namespace, if known: the connections that it opened before are read there.
    pub netns: Option<PathBuf>,
}

/// An endpoint can't be attached. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no id for it.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// There is no such interface, or it vanished meanwhile.
    #[error("interface `{0}` does not exist; is the pod gone?")]
    InterfaceGone(String),
    /// The interface can't be looked up.
    #[error("can't look up the interface `{name}`")]
    Interface {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Two interfaces whose indices differ by a multiple of the table's size.
    #[error(
        "interface `{name}` (index {index}) can't be told from that of endpoint {other} (index {other_index}): \
         their indices are equal modulo {}; make the interface anew",
        limits::IFINDEX_SLOTS
    )]
    SlotTaken {
        /// Its name.
        name: String,
        /// Its index.
        index: u32,
        /// Endpoint that has the slot.
        other: u16,
        /// That endpoint's interface.
        other_index: u32,
    },
    /// More than one address of a family, or one that no pod can have.
    #[error(
        "endpoint `{uid}` can't have the address `{address}`: one unicast address of each family is supported"
    )]
    Address {
        /// The pod's uid.
        uid: String,
        /// The address too many.
        address: IpAddr,
    },
    /// No address at all.
    #[error("endpoint `{0}` has no address; every packet it sends would be spoofed")]
    NoAddress(String),
    /// The programs can't be put there.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Packets to it can't be judged inside it.
    #[error(transparent)]
    Inside(#[from] InsideError),
    /// The pins can't be changed.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// What an earlier endpoint left can't be removed.
    #[error("can't remove what endpoint `{0}` left")]
    Leftover(u16, #[source] io::Error),
}

/// An endpoint can't be detached whole.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// A pin can't be removed.
    #[error("can't clear endpoint `{0}`")]
    Clear(u16, #[source] io::Error),
    /// The id stays reserved on disk.
    #[error(transparent)]
    State(#[from] StateError),
}

impl Datapath {
    /// Puts the programs at the endpoint's interface. Returns its id, which a commit should have placed
    /// before: an endpoint that the live tables don't know drops everything. Idempotent; other addresses or
    /// another interface for the same uid replace the earlier ones.
    pub fn attach(&mut self, spec: &EndpointSpec) -> Result<u16, AttachError> {
        let id = self.ids.reserve(&spec.uid)?;
        let interface = find(&spec.host_interface)?;
        let mut record = record(spec, &interface)?;
        if self.local_redirect == LocalRedirect::On {
            self.join(id, &mut record);
        }
        if self.config.place == Place::Pod {
            record.flags |= EndpointRecord::AT_POD;
        }
        let other = self.take_slot(id, &interface)?;
        let before = self.memory.record(id);
        if before.ifindex != 0 && before.ifindex != interface.index {
            self.clear(id).map_err(|e| AttachError::Leftover(id, e))?;
        }
        let fresh = self.memory.record(id).ifindex == 0;
        if fresh {
            self.counters.reset_endpoint(id);
            self.flows
                .forget(&self.memory, id)
                .map_err(|e| AttachError::Leftover(id, e))?;
            self.seed(id, spec);
        }
        if let Some(other) = other {
            self.flows
                .copy(&self.memory, other, id)
                .map_err(|e| AttachError::Leftover(other, e))?;
        }
        self.memory.set_record(id, &record);
        self.memory.set_endpoint_at(interface.index, id);
        if let Some(other) = other {
            self.adopt(other, id)
                .map_err(|e| AttachError::Leftover(other, e))?;
        }
        if let Err(refused) = self.attach_programs(id, &interface, spec.netns.as_deref()) {
            if fresh && !self.took_over(interface.index) {
                // The error that matters is the first one.
                let _ = self.clear(id);
            }
            return match Interface::by_index(interface.index) {
                Ok(None) => Err(AttachError::InterfaceGone(interface.name)),
                _ => Err(refused),
            };
        }
        if fresh {
            // What was opened before the programs saw its SYN.
            self.seed(id, spec);
        }
        self.retire_older(interface.index)?;
        Ok(id)
    }

    /// An endpoint that was held back may open connections from its next packet on.
    pub fn release(&mut self, id: u16) {
        let mut record = self.memory.record(id);
        record.flags &= !EndpointRecord::HELD_BACK;
        self.memory.set_record(id, &record);
    }

    /// Remembers the connections that the pod has opened, so that answers to them come in.
    fn seed(&self, id: u16, spec: &EndpointSpec) {
        let Some(netns) = &spec.netns else {
            return;
        };
        let (uid, netns) = (&spec.uid, netns.as_path());
        match self.connections(id, &spec.addresses, netns) {
            Ok(mut found) => {
                found.retain(|c| !c.accepted);
                if !self.flows.seed(&self.memory, id, &found) {
                    warn!(
                        uid,
                        id,
                        connections = found.len(),
                        "no room for all connections that the pod opened before"
                    );
                }
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(uid, id, netns = %netns.display(), error, "the connections that it opened before are unknown");
            }
        }
    }

    /// Takes the programs away and forgets the endpoint and its connections. An interface that is gone
    /// already, or an id that is not attached, is fine.
    pub fn detach(&mut self, id: u16) -> Result<(), DetachError> {
        let ifindex = self.memory.record(id).ifindex;
        self.clear(id).map_err(|e| DetachError::Clear(id, e))?;
        if ifindex != 0 {
            self.retire_older(ifindex)
                .map_err(|e| DetachError::Clear(id, io::Error::other(e)))?;
        }
        Ok(self.ids.release(id)?)
    }

    /// Removes links, place, record and connections of an endpoint, in this order; its id stays reserved.
    pub(crate) fn clear(&mut self, id: u16) -> io::Result<()> {
        for attachment in hook::of_endpoint(&self.pins, id).map_err(io::Error::other)? {
            attachment.remove().map_err(io::Error::other)?;
        }
        self.end_inside(id).map_err(io::Error::other)?;
        self.end_steering(id).map_err(io::Error::other)?;
        self.memory.displace(id);
        let ifindex = self.memory.record(id).ifindex;
        if self.memory.endpoint_at(ifindex) == id {
            self.memory.set_endpoint_at(ifindex, 0);
        }
        self.memory.set_record(id, &EndpointRecord::default());
        self.flows.forget(&self.memory, id)
    }

    /// Frees the interface's slot if what holds it is gone. Returns the endpoint that is at this very
    /// interface under another id, if any.
    fn take_slot(&mut self, id: u16, interface: &Interface) -> Result<Option<u16>, AttachError> {
        let other = self.memory.endpoint_at(interface.index);
        let other_index = self.memory.record(other).ifindex;
        if other == 0 || other == id || other_index == 0 {
            return Ok(None);
        }
        if other_index == interface.index {
            return Ok(Some(other));
        }
        if matches!(Interface::by_index(other_index), Ok(None)) {
            return self
                .clear(other)
                .map(|()| None)
                .map_err(|e| AttachError::Leftover(other, e));
        }
        let name = interface.name.clone();
        Err(AttachError::SlotTaken {
            name,
            index: interface.index,
            other,
            other_index,
        })
    }

    /// Moves the links that an earlier id left at this interface under the endpoint's own id; the programs
    /// never stop. Its connections were copied before, its record and place go.
    fn adopt(&mut self, other: u16, id: u16) -> io::Result<()> {
        for attachment in hook::of_endpoint(&self.pins, other).map_err(io::Error::other)? {
            std::fs::rename(&attachment.path, attachment.path_of(&self.pins, id))?;
        }
        match std::fs::rename(self.pins.inside(other), self.pins.inside(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        self.clear(other)
    }

    /// Attaches what is not attached yet, from the pod first: the pod's own connections are then known when
    /// their replies are judged.
    fn attach_programs(
        &mut self,
        id: u16,
        interface: &Interface,
        netns: Option<&Path>,
    ) -> Result<(), AttachError> {
        let (mut attached, mut others) = (Vec::new(), Vec::new());
        for attachment in hook::of_endpoint(&self.pins, id)? {
            match attachment.look() {
                Ok(found) if found.ifindex == interface.index && attachment.hook() == self.hook => {
                    attached.push((attachment, found.program));
                }
                Ok(found) if found.ifindex == interface.index => others.push(attachment),
                // Gone, or at an interface that is gone.
                _ => attachment.remove()?,
            }
        }
        for direction in [Direction::From, Direction::To] {
            if direction == Direction::To && self.config.place == Place::Pod {
                self.begin_inside(id, interface, netns)?;
            }
            let role = self.role(id, direction);
            if let Some((there, program)) = attached.iter().find(|(there, _)| there.direction == direction) {
                if *program != self.programs.id(role) {
                    self.programs.replace((there, role), interface.index)?;
                }
                continue;
            }
            let made = Attachment::new(self.hook, &self.pins, id, direction, interface.index);
            self.programs
                .attach((&made, role), interface, self.config.order)?;
            // The name may have gone to another interface meanwhile.
            if made.look().map(|found| found.ifindex).ok() != Some(interface.index) {
                made.remove()?;
                return Err(AttachError::InterfaceGone(interface.name.clone()));
            }
        }
        // Those of the other hook judged until here, and for a moment both do.
        for other in others {
            other.remove()?;
        }
        if self.config.place == Place::Host {
            self.end_inside(id)?;
        }
        Ok(())
    }

    /// Whether a filter of an older layout may have been given this build's program already: what is half attached
    /// then still judges, and is completed at the next try.
    fn took_over(&self, ifindex: u32) -> bool {
        let of_filters = |pins| hook::attachments(pins).map_or(true, |all| names_filter(&all, ifindex));
        self.older.iter().any(of_filters)
    }

    /// Removes links that an older layout has at this interface, or at interfaces that are gone. A layout that can't
    /// be cleared stays on the list.
    fn retire_older(&mut self, ifindex: u32) -> Result<(), BpffsError> {
        let mut outcome = Ok(());
        self.older.retain(|pins| match clear_layout(pins, ifindex) {
            Ok(rest) => rest != 0,
            Err(error) => {
                outcome = Err(error);
                true
            }
        });
        outcome
    }
}

fn names_filter(attachments: &[Attachment], ifindex: u32) -> bool {
    attachments.iter().any(|a| a.filter_at() == Some(ifindex))
}

/// Removes a layout's links at an interface and those of interfaces that are gone, and the layout with the last;
/// how many are left.
fn clear_layout(pins: &Pins, ifindex: u32) -> Result<usize, BpffsError> {
    let mut rest = 0;
    for attachment in hook::attachments(pins)? {
        match attachment.look() {
            Ok(found) if found.ifindex != ifindex && found.ifindex != 0 => rest += 1,
            _ => {
                attachment.remove()?;
                bpffs::unlink(&pins.inside(attachment.endpoint))?;
            }
        }
    }
    if rest == 0 {
        pins.remove()?;
    }
    Ok(rest)
}

fn find(name: &str) -> Result<Interface, AttachError> {
    match Interface::by_name(name) {
        Ok(Some(interface)) => Ok(interface),
        Ok(None) => Err(AttachError::InterfaceGone(name.to_owned())),
        Err(source) => Err(AttachError::Interface {
            name: name.to_owned(),
            source,
        }),
    }
}

fn record(spec: &EndpointSpec, interface: &Interface) -> Result<EndpointRecord, AttachError> {
    let mut record = EndpointRecord {
        ifindex: interface.index,
        bridge_ifindex: interface.master,
        mac: spec.mac.unwrap_or_default(),
        flags: if spec.held_back {
            EndpointRecord::HELD_BACK
        } else {
            0
        },
        ..EndpointRecord::default()
    };
    for address in &spec.addresses {
        let unusable = address.is_unspecified() || address.is_multicast() || address.is_loopback();
        let taken = match address.to_canonical() {
            IpAddr::V4(v4) => std::mem::replace(&mut record.address4, v4.octets()) != [0; 4],
            IpAddr::V6(v6) => std::mem::replace(&mut record.address6, v6.octets()) != [0; 16],
        };
        if taken || unusable {
            return Err(AttachError::Address {
                uid: spec.uid.clone(),
                address: *address,
            });
        }
    }
    if spec.addresses.is_empty() {
        return Err(AttachError::NoAddress(spec.uid.clone()));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(addresses: &[&str]) -> Result<EndpointRecord, AttachError> {
        let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let spec = EndpointSpec {
            uid: "u".into(),
            addresses,
            ..EndpointSpec::default()
        };
        record(
            &spec,
            &Interface {
                index: 7,
                name: "v".into(),
                master: 3,
            },
        )
    }

    #[test]
    fn one_address_of_each_family_makes_a_record() {
        let record = spec(&["10.0.0.2", "fd00::2"]).unwrap();
        assert_eq!((record.ifindex, record.bridge_ifindex), (7, 3));
        assert_eq!(record.address4, [10, 0, 0, 2]);
        assert_eq!(record.address6[15], 2);
    }

    #[test]
    fn addresses_that_no_pod_has_are_refused_by_name() {
        for bad in [
            &["10.0.0.2", "10.0.0.3"][..],
            &["0.0.0.0"],
            &["224.0.0.1"],
            &["::1"],
        ] {
            let refused = spec(bad).unwrap_err().to_string();
            assert!(refused.contains(bad[bad.len() - 1]), "{refused}");
        }
        assert!(matches!(spec(&[]), Err(AttachError::NoAddress(_))));
    }
}
