//! Pods that come, go and are checked.
//!
//! Invariant: an `add` that fails leaves nothing behind, in memory, on disk or at the interface.

use super::commit::SettleError;
use super::{Store, lock};
use crate::chain::chain;
use crate::plane::PlaneError;
use crate::registration::Registration;
use crate::snapshot::Attached;

/// What an `add` gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Endpoint id.
    pub id: u16,
    /// Generation that enforces it; when that is not the endpoint's own yet, it denies everything.
    pub generation: u32,
}

/// Which pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodKey {
    /// By uid.
    Uid(String),
    /// By namespace and name.
    Name(String, String),
}

/// Why an endpoint could not be added, removed or is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// No room for it.
    #[error("{0}")]
    Full(String),
    /// Something outside is not as it must be.
    #[error("{0}")]
    Precondition(String),
    /// It is not known.
    #[error("pod `{0}` is not an endpoint of this node")]
    Unknown(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl From<PlaneError> for EndpointError {
    fn from(error: PlaneError) -> Self {
        match error {
            PlaneError::Full(text) => Self::Full(text),
            PlaneError::Precondition(text) => Self::Precondition(text),
            PlaneError::Failed(text) => Self::Failed(text),
        }
    }
}

impl From<SettleError> for EndpointError {
    fn from(error: SettleError) -> Self {
        match error {
            SettleError::Compile(error) => Self::Full(error.to_string()),
            SettleError::Commit(error) => error.into(),
        }
    }
}

impl Store {
    pub(super) fn add(&mut self, registration: Registration) -> Result<Added, EndpointError> {
        if let Some(id) = self.same_place(&registration) {
            return self.update(id, registration);
        }
        if lock::read(&self.plane)
            .interface_index(&registration.host_interface)
            .is_none()
        {
            let text = format!("interface `{}` does not exist here", registration.host_interface);
            return Err(EndpointError::Precondition(text));
        }
        self.make_room(&registration)?;
        let id = lock::write(&self.plane).reserve(&registration.uid)?;
        self.leaving.retain(|gone| *gone != id);
        let pod = registration.pod();
        self.held.registrations.insert(id, registration.clone());
        let placed = self
            .settle()
            .map_err(EndpointError::from)
            .and_then(|_| self.place(id, &registration));
        if let Err(error) = placed {
            self.undo(id);
            return Err(error);
        }
        tracing::info!(id, pod, interface = registration.host_interface, "endpoint added");
        self.hub.agent(format!("endpoint {id} added: {pod}"));
        Ok(Added {
            id,
            generation: lock::read(&self.plane).generation(),
        })
    }

    fn place(&mut self, id: u16, registration: &Registration) -> Result<(), EndpointError> {
        let earlier = self.held.earlier_owner(registration);
        let ifindex = lock::write(&self.plane).attach(id, registration, earlier.is_some())?;
        if let Some(owner) = earlier {
            let pod = registration.pod();
            tracing::info!(
                id,
                pod,
                owner,
                "held back: other nodes may take its address for the owner's still"
            );
            self.held_back.insert(id, owner);
        }
        self.attached.insert(id, Attached::At(ifindex));
        self.steer(id);
        self.publish_attached();
        self.register
            .store(&self.held.registrations)
            .map_err(|e| EndpointError::Full(chain(&e)))
    }

    /// Lets those open connections whose address is nobody else's any more.
    pub(super) fn release_held_back(&mut self) {
        let before = self.held_back.len();
        let (held, plane) = (&self.held, &self.plane);
        self.held_back.retain(|id, owner| {
            let registration = held.registrations.get(id);
            match registration.and_then(|registration| held.earlier_owner(registration)) {
                Some(now) => *owner = now,
                None => {
                    lock::write(plane).release(*id);
                    tracing::info!(id, owner, "no longer held back");
                    return false;
                }
            }
            true
        });
        if self.held_back.len() != before {
            self.publish_attached();
        }
    }

    /// The known endpoint that is attached just where the registration says.
    fn same_place(&self, new: &Registration) -> Option<u16> {
        let (id, old) = self.held.registrations.iter().find(|(_, r)| r.uid == new.uid)?;
        let Some(Attached::At(ifindex)) = self.attached.get(id) else {
            return None;
        };
        let here = lock::read(&self.plane).interface_index(&new.host_interface) == Some(*ifindex);
        let same =
            old.host_interface == new.host_interface && old.addresses == new.addresses && old.mac == new.mac;
        (here && same).then_some(*id)
    }

    fn update(&mut self, id: u16, registration: Registration) -> Result<Added, EndpointError> {
        let added = |s: &Self| Added {
            id,
            generation: lock::read(&s.plane).generation(),
        };
        let Some(old) = self.held.registrations.insert(id, registration.clone()) else {
            return Ok(added(self));
        };
        if old == registration {
            return Ok(added(self));
        }
        let settled = self.settle().map_err(EndpointError::from);
        let stored = settled.and_then(|_| {
            self.register
                .store(&self.held.registrations)
                .map_err(|e| EndpointError::Full(chain(&e)))
        });
        if let Err(error) = stored {
            self.held.registrations.insert(id, old);
            self.settle_news(true, &[]);
            return Err(error);
        }
        Ok(added(self))
    }

    /// Forgets endpoints that the new one replaces: its own uid elsewhere, and those whose interface has
    /// gone. An address or an interface that a living endpoint has is refused.
    fn make_room(&mut self, new: &Registration) -> Result<(), EndpointError> {
        let mut stale = Vec::new();
        for (id, old) in &self.held.registrations {
            let shared = old.addresses.iter().find(|a| new.addresses.contains(a));
            let same_interface = old.host_interface == new.host_interface;
            if old.uid == new.uid {
                stale.push(*id);
            } else if same_interface || shared.is_some() {
                let now = lock::read(&self.plane)
                    .interface_index(&old.host_interface)
                    .map(Attached::At);
                if now.is_some() && now.as_ref() == self.attached.get(id) {
                    let what = shared.map_or_else(|| old.host_interface.clone(), ToString::to_string);
                    let text = format!(
                        "`{what}` belongs to endpoint {id} (pod `{}`), which still lives",
                        old.pod()
                    );
                    return Err(EndpointError::Precondition(text));
                }
                stale.push(*id);
            }
        }
        for id in stale {
            self.remove(id)?;
        }
        Ok(())
    }

    pub(super) fn del(&mut self, key: &PodKey) -> Result<u32, EndpointError> {
        let matches = |r: &Registration| match key {
            PodKey::Uid(uid) => r.uid == *uid,
            PodKey::Name(namespace, name) => r.namespace == *namespace && r.name == *name,
        };
        let ids: Vec<u16> = self
            .held
            .registrations
            .iter()
            .filter(|(_, r)| matches(r))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.remove(id)?;
            tracing::info!(id, "endpoint removed");
            self.hub.agent(format!("endpoint {id} removed"));
        }
        Ok(lock::read(&self.plane).generation())
    }

    fn remove(&mut self, id: u16) -> Result<(), EndpointError> {
        self.held.registrations.remove(&id);
        self.attached.remove(&id);
        self.held_back.remove(&id);
        self.leaving.push(id);
        // Fewer endpoints always fit; should it fail all the same, the endpoint's place stays until a commit
        // succeeds.
        if let Err(error) = self.settle() {
            self.refuse(&error.to_string());
        }
        self.register
            .store(&self.held.registrations)
            .map_err(|e| EndpointError::Failed(chain(&e)))
    }

    fn undo(&mut self, id: u16) {
        self.held.registrations.remove(&id);
        self.attached.remove(&id);
        self.held_back.remove(&id);
        self.leaving.push(id);
        self.settle_news(true, &[]);
        self.persist_quietly();
    }

    pub(super) fn check(&self, registration: &Registration) -> Result<u32, EndpointError> {
        let known = self
            .held
            .registrations
            .iter()
            .find(|(_, r)| r.uid == registration.uid);
        let Some((id, known)) = known else {
            return Err(EndpointError::Unknown(registration.pod()));
        };
        if known.addresses != registration.addresses || known.host_interface != registration.host_interface {
            let text = format!("endpoint {id} is registered with other addresses or another interface");
            return Err(EndpointError::Precondition(text));
        }
        let now = lock::read(&self.plane)
            .interface_index(&known.host_interface)
            .map(Attached::At);
        match self.attached.get(id) {
            Some(Attached::Failed(why)) => Err(EndpointError::Precondition(why.clone())),
            Some(at) if Some(at) == now.as_ref() => Ok(lock::read(&self.plane).generation()),
            None => {
                let text =
                    format!("endpoint {id} is under an older build's programs until the first full sync");
                Err(EndpointError::Precondition(text))
            }
            _ => {
                let text = format!(
                    "interface `{}` of endpoint {id} has gone or was replaced",
                    known.host_interface
                );
                Err(EndpointError::Precondition(text))
            }
        }
    }
}
