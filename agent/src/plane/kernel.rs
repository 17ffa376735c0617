//! The real datapath behind the trait.
//!
//! Invariant: errors become sentences with their causes; which of them mean "full" or "not as it must be" is
//! said here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use thyra_datapath::{
    AttachError, CommitError, Connection, Datapath, EndedSockets, EndpointSpec, EndpointStatus, EventReader,
    Held, HeldConnection, Holding, InsideError, KernelView, LocalRedirect, Origin, Place, ReserveError,
    SocketWatch,
};
use thyra_datapath_abi::tables::{Tables, Verdict};
use thyra_datapath_abi::{Action, Event};
use tracing::debug;

use super::{Committed, Counts, Events, Fill, Kernel, Plane, PlaneError, PlaneStatus, Sockets};
use crate::chain::chain;
use crate::registration::Registration;

fn failed(error: &dyn std::error::Error) -> PlaneError {
    PlaneError::Failed(chain(error))
}

fn full(error: &dyn std::error::Error) -> PlaneError {
    PlaneError::Full(chain(error))
}

fn named_netns(registration: &Registration) -> Result<&Path, PlaneError> {
    if registration.netns.is_empty() {
        let why = "the registration doesn't name its network namespace";
        return Err(PlaneError::Precondition(why.into()));
    }
    Ok(registration.netns.as_ref())
}

impl From<ReserveError> for PlaneError {
    fn from(error: ReserveError) -> Self {
        full(&error)
    }
}

impl From<AttachError> for PlaneError {
    fn from(error: AttachError) -> Self {
        match &error {
            AttachError::Reserve(_) => full(&error),
            AttachError::InterfaceGone(_)
            | AttachError::SlotTaken { .. }
            | AttachError::Address { .. }
            | AttachError::NoAddress(_)
            | AttachError::Inside(InsideError::NoNamespace | InsideError::NoVeth(_)) => {
                Self::Precondition(chain(&error))
            }
            AttachError::Interface { .. }
            | AttachError::Hook(_)
            | AttachError::Inside(_)
            | AttachError::Bpffs(_)
            | AttachError::Leftover(..) => failed(&error),
        }
    }
}

impl From<CommitError> for PlaneError {
    fn from(error: CommitError) -> Self {
        match &error {
            CommitError::Overflow(_) | CommitError::VerdictsFull(_) | CommitError::State(_) => full(&error),
            CommitError::NoGeneration | CommitError::Map { .. } | CommitError::Grace(_) => failed(&error),
        }
    }
}

impl Plane for Datapath {
    fn reserve(&mut self, uid: &str) -> Result<u16, PlaneError> {
        Ok(Datapath::reserve(self, uid)?)
    }

    fn reservations(&self) -> BTreeMap<String, u16> {
        Datapath::reservations(self).clone()
    }

    fn release(&mut self, id: u16) {
        Datapath::release(self, id);
    }

    fn attach(&mut self, id: u16, registration: &Registration, held_back: bool) -> Result<u32, PlaneError> {
        let attached = Datapath::attach(
            self,
            &EndpointSpec {
                uid: registration.uid.clone(),
                host_interface: registration.host_interface.clone(),
                addresses: registration.addresses.clone(),
                mac: registration.mac,
                held_back,
                netns: (!registration.netns.is_empty()).then(|| registration.netns.clone().into()),
            },
        )?;
        if attached != id {
            return Err(PlaneError::Failed(format!(
                "endpoint {id} was attached as {attached}"
            )));
        }
        let gone =
            || PlaneError::Precondition(format!("interface `{}` has gone", registration.host_interface));
        Plane::interface_index(self, &registration.host_interface).ok_or_else(gone)
    }

    fn detach(&mut self, id: u16) -> Result<(), PlaneError> {
        Datapath::detach(self, id).map_err(|e| failed(&e))
    }

    fn commit(&mut self, tables: &Tables, generation: u32) -> Result<Committed, PlaneError> {
        let report = Datapath::commit(self, tables, generation)?;
        Ok(Committed {
            words: report.words_written,
            waited: report.waited,
            verdict_ids: report.verdict_ids,
        })
    }

    fn steer(&mut self, id: u16, netns: &str) -> Result<(), PlaneError> {
        Datapath::steer(self, id, netns.as_ref()).map_err(|e| failed(&e))
    }

    fn register_envoy(&mut self, cgroup: &Path) -> Result<bool, PlaneError> {
        self.register(cgroup).map_err(|e| failed(&e))
    }

    fn hold(&mut self) -> Result<Option<Holding>, PlaneError> {
        Datapath::hold(self).map(Some).map_err(|e| failed(&e))
    }

    fn holds(&self) -> BTreeMap<Arc<str>, u16> {
        Datapath::holds(self).clone()
    }

    fn set_holds(&mut self, holds: BTreeMap<Arc<str>, u16>) -> Result<(), PlaneError> {
        Datapath::set_holds(self, holds).map_err(|e| failed(&e))
    }

    fn keep_held(&mut self, tables: &Tables) -> Result<(), PlaneError> {
        Datapath::keep_held(self, tables).map_err(|e| failed(&e))
    }

    fn held_connections(&self) -> Result<Vec<HeldConnection>, PlaneError> {
        Datapath::held_connections(self).map_err(|e| failed(&e))
    }

    fn set_listeners(&mut self, listeners: BTreeMap<Arc<str>, u16>) -> Result<(), PlaneError> {
        Datapath::set_listeners(self, listeners).map_err(|e| failed(&e))
    }

    fn report_new(&mut self, on: bool) {
        self.set_report_new(on);
    }

    fn flow_log(&mut self, sampling: Option<u8>) {
        self.set_flow_log(sampling);
    }

    fn interface_index(&self, name: &str) -> Option<u32> {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        );
        rustix::net::netdevice::name_to_index(socket.ok()?, name).ok()
    }

    fn generation(&self) -> u32 {
        Datapath::generation(self)
    }

    fn older_endpoints(&self) -> usize {
        Datapath::older_endpoints(self)
    }

    fn verdict(&self, id: u16) -> Option<Verdict> {
        Datapath::verdict(self, id).cloned()
    }

    fn counts(&self) -> Result<Counts, PlaneError> {
        let counters = self.counters();
        Ok(Counts {
            verdicts: counters.verdicts.into_iter().collect(),
            reasons: counters.reasons.into_iter().collect(),
            endpoints: counters.endpoints.into_iter().collect(),
            lost: counters.lost_events,
        })
    }

    fn lost(&self) -> u64 {
        self.lost_events()
    }

    fn read_back(&self) -> Result<Box<dyn Kernel>, PlaneError> {
        Ok(Box::new(Datapath::read_back(self).map_err(|e| failed(&e))?))
    }

    fn connections(&self, id: u16, registration: &Registration) -> Result<Vec<Connection>, PlaneError> {
        let netns = named_netns(registration)?;
        Datapath::connections(self, id, &registration.addresses, netns).map_err(|e| failed(&e))
    }

    fn sockets(&self, registration: &Registration) -> Result<Box<dyn Sockets>, PlaneError> {
        let watch = SocketWatch::open(named_netns(registration)?).map_err(|e| failed(&e))?;
        Ok(Box::new(watch))
    }

    fn local_redirect(&self, id: u16) -> String {
        self.local_redirect_of(id).to_string()
    }

    fn hook_of(&self, id: u16) -> &'static str {
        match self.place_of(id) {
            Place::Host => "host",
            Place::Pod => "pod",
        }
    }

    fn check_coverage(&mut self) -> Vec<(u16, u64)> {
        Datapath::check_coverage(self)
    }

    fn collect(&mut self) {
        if let Err(error) = Datapath::collect(self, Datapath::now_ns()) {
            debug!(error = chain(&error), "finished connections stay for now");
        }
    }

    fn status(&self) -> PlaneStatus {
        let status = Datapath::status(self);
        let origin = match status.origin {
            Origin::Loaded => "loaded",
            Origin::PickedUp => "picked up",
        };
        let replaced = match status.replaced {
            0 => String::new(),
            n => format!(", {n} links got this build's programs"),
        };
        let redirected = |e: &&EndpointStatus| self.local_redirect_of(e.id) == LocalRedirect::On;
        let redirected = status.endpoints.iter().filter(redirected).count();
        let refused = match &status.local_redirect {
            LocalRedirect::Refused(why) => Some(format!("local redirect is off: {why}")),
            LocalRedirect::Off | LocalRedirect::On => None,
        };
        let sick = status.endpoints.into_iter().flat_map(|e| {
            let id = e.id;
            e.problems.into_iter().map(move |p| format!("endpoint {id}: {p}"))
        });
        let number = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let fill = status.fill.into_iter();
        PlaneStatus {
            datapath: format!(
                "{origin}, layout {}, built by {}{replaced}",
                status.layout, status.built_by
            ),
            hook: status.hook.to_owned(),
            local_redirect: status.local_redirect.to_string(),
            redirected,
            problems: status.notes.into_iter().chain(refused).chain(sick).collect(),
            maps: fill
                .map(|f| Fill {
                    name: f.table.into(),
                    used: number(f.used),
                    capacity: number(f.limit),
                })
                .collect(),
        }
    }

    fn events(&self) -> Result<Option<Box<dyn Events>>, PlaneError> {
        let reader = Datapath::events(self).map_err(|e| failed(&e))?;
        Ok(Some(Box::new(reader)))
    }
}

impl Kernel for KernelView {
    fn judge(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<(Action, u16)> {
        self.evaluate(endpoint, source, port)
            .map(|s| (s.action, s.verdict))
    }
}

#[async_trait::async_trait]
impl Events for EventReader {
    async fn next_batch(&mut self) -> std::io::Result<Vec<Event>> {
        EventReader::next_batch(self).await
    }
}

#[async_trait::async_trait]
impl Sockets for SocketWatch {
    async fn next_batch(&mut self) -> std::io::Result<EndedSockets> {
        SocketWatch::next_batch(self).await
    }

    fn held(&self) -> std::io::Result<Vec<Held>> {
        SocketWatch::held(self)
    }
}
