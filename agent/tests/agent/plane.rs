//! A datapath that remembers what it was told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use thyra_agent::plane::{Committed, Counts, Events, Kernel, Plane, PlaneError, PlaneStatus, Sockets};
use thyra_agent::registration::Registration;
use thyra_datapath::{Connection, EndedSockets, Held};
use thyra_datapath_abi::tables::{Tables, Verdict};
use thyra_datapath_abi::{Action, Event};
use tokio::sync::mpsc::Receiver;

/// What it was told; outlives the agent as the kernel does.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) interfaces: BTreeMap<String, u32>,
    pub(crate) ids: BTreeMap<String, u16>,
    pub(crate) attached: BTreeMap<u16, Registration>,
    pub(crate) tables: Tables,
    pub(crate) generation: u32,
    pub(crate) commits: u32,
    /// Endpoints that may open no connection yet.
    pub(crate) held_back: BTreeSet<u16>,
    /// Endpoints under an older layout.
    pub(crate) older: usize,
    /// What the next check of coverage finds.
    pub(crate) missed: Vec<(u16, u64)>,
    /// What the pods' stacks hold.
    pub(crate) connections: BTreeMap<u16, Vec<Connection>>,
    /// Whether allowed connections are reported.
    pub(crate) reports_new: bool,
    /// What is reported for the flow log.
    pub(crate) flow_log: Option<u8>,
    /// The ring, for whoever reads it first.
    pub(crate) events: Option<Receiver<Vec<Event>>>,
    /// Events that were lost.
    pub(crate) lost: u64,
    /// The pods' sockets as they end, by namespace, for whoever watches them first.
    pub(crate) ended: BTreeMap<String, Receiver<EndedSockets>>,
    /// The next commits fail with this.
    pub(crate) full: Option<String>,
    /// The next attachments fail with this.
    pub(crate) hook: Option<PlaneError>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Remembering(pub(crate) Arc<Mutex<Told>>);

impl Remembering {
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Told) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn interface(&self, name: &str, index: u32) {
        self.with(|t| t.interfaces.insert(name.into(), index));
    }

    /// What the live tables say.
    pub(crate) fn judge(&self, endpoint: u16, source: &str, port: u16) -> Option<Verdict> {
        let source: IpAddr = source.parse().expect("an address");
        self.with(|t| t.tables.judge(endpoint, source, port).cloned())
    }
}

/// A copy of the live tables; verdict ids are index + 1.
struct Copy(Tables);

impl Kernel for Copy {
    fn judge(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<(Action, u16)> {
        let verdict = self.0.judge(endpoint, source, port)?;
        let index = self.0.verdicts.iter().position(|v| v == verdict)?;
        Some((verdict.action, u16::try_from(index).ok()? + 1))
    }
}

impl Plane for Remembering {
    fn reserve(&mut self, uid: &str) -> Result<u16, PlaneError> {
        self.with(|t| {
            if let Some(id) = t.ids.get(uid) {
                return Ok(*id);
            }
            let free = (1..=255).find(|id| !t.ids.values().any(|taken| taken == id));
            let id = free.ok_or_else(|| PlaneError::Full("no endpoint id is left".into()))?;
            t.ids.insert(uid.into(), id);
            Ok(id)
        })
    }

    fn reservations(&self) -> BTreeMap<String, u16> {
        self.with(|t| t.ids.clone())
    }

    fn release(&mut self, id: u16) {
        self.with(|t| t.held_back.remove(&id));
    }

    fn attach(&mut self, id: u16, registration: &Registration, held_back: bool) -> Result<u32, PlaneError> {
        self.with(|t| {
            if held_back {
                t.held_back.insert(id);
            }
            if let Some(error) = t.hook.take() {
                return Err(error);
            }
            let index = t.interfaces.get(&registration.host_interface).copied();
            let index = index.ok_or_else(|| PlaneError::Precondition("interface has gone".into()))?;
            t.attached.insert(id, registration.clone());
            Ok(index)
        })
    }

    fn steer(&mut self, _: u16, _: &str) -> Result<(), PlaneError> {
        Ok(())
    }

    fn register_envoy(&mut self, _: &std::path::Path) -> Result<bool, PlaneError> {
        Ok(false)
    }

    fn set_listeners(&mut self, _: BTreeMap<std::sync::Arc<str>, u16>) -> Result<(), PlaneError> {
        Ok(())
    }

    fn detach(&mut self, id: u16) -> Result<(), PlaneError> {
        self.with(|t| {
            t.attached.remove(&id);
            t.ids.retain(|_, taken| *taken != id);
        });
        Ok(())
    }

    fn commit(&mut self, tables: &Tables, generation: u32) -> Result<Committed, PlaneError> {
        self.with(|t| {
            if let Some(why) = &t.full {
                return Err(PlaneError::Full(why.clone()));
            }
            t.tables = tables.clone();
            t.generation = generation;
            t.commits += 1;
            let ids = (1..=tables.verdicts.len()).map(|i| u16::try_from(i).expect("few verdicts"));
            Ok(Committed {
                verdict_ids: ids.collect(),
                ..Committed::default()
            })
        })
    }

    fn report_new(&mut self, on: bool) {
        self.with(|t| t.reports_new = on);
    }

    fn flow_log(&mut self, sampling: Option<u8>) {
        self.with(|t| t.flow_log = sampling);
    }

    fn interface_index(&self, name: &str) -> Option<u32> {
        self.with(|t| t.interfaces.get(name).copied())
    }

    fn generation(&self) -> u32 {
        self.with(|t| t.generation)
    }

    fn older_endpoints(&self) -> usize {
        self.with(|t| t.older)
    }

    fn verdict(&self, id: u16) -> Option<Verdict> {
        self.with(|t| t.tables.verdicts.get(usize::from(id).checked_sub(1)?).cloned())
    }

    fn counts(&self) -> Result<Counts, PlaneError> {
        Ok(Counts {
            lost: self.lost(),
            ..Counts::default()
        })
    }

    fn lost(&self) -> u64 {
        self.with(|t| t.lost)
    }

    fn sockets(&self, registration: &Registration) -> Result<Box<dyn Sockets>, PlaneError> {
        let ended = self.with(|t| t.ended.remove(&registration.netns));
        let ended = ended.ok_or_else(|| PlaneError::Precondition("no such namespace".into()))?;
        Ok(Box::new(Ending(ended)))
    }

    fn read_back(&self) -> Result<Box<dyn Kernel>, PlaneError> {
        Ok(Box::new(Copy(self.with(|t| t.tables.clone()))))
    }

    fn connections(&self, id: u16, _: &Registration) -> Result<Vec<Connection>, PlaneError> {
        self.with(|t| t.connections.get(&id).cloned())
            .ok_or_else(|| PlaneError::Precondition("no such namespace".into()))
    }

    fn hook_of(&self, _: u16) -> &'static str {
        "host"
    }

    fn local_redirect(&self, _: u16) -> String {
        "off".into()
    }

    fn check_coverage(&mut self) -> Vec<(u16, u64)> {
        self.with(|t| std::mem::take(&mut t.missed))
    }

    fn collect(&mut self) {}

    fn status(&self) -> PlaneStatus {
        PlaneStatus {
            datapath: "remembering".into(),
            ..PlaneStatus::default()
        }
    }

    fn events(&self) -> Result<Option<Box<dyn Events>>, PlaneError> {
        let events = self.with(|t| t.events.take());
        Ok(events.map(|events| -> Box<dyn Events> { Box::new(Ring(events)) }))
    }
}

/// Batches of events.
struct Ring(Receiver<Vec<Event>>);

#[async_trait::async_trait]
impl Events for Ring {
    async fn next_batch(&mut self) -> std::io::Result<Vec<Event>> {
        match self.0.recv().await {
            Some(batch) => Ok(batch),
            None => std::future::pending().await,
        }
    }
}

/// Sockets that end.
struct Ending(Receiver<EndedSockets>);

#[async_trait::async_trait]
impl Sockets for Ending {
    async fn next_batch(&mut self) -> std::io::Result<EndedSockets> {
        match self.0.recv().await {
            Some(batch) => Ok(batch),
            None => std::future::pending().await,
        }
    }

    fn held(&self) -> std::io::Result<Vec<Held>> {
        Ok(Vec::new())
    }
}
