//! A port with what it judges, and which port is whose from one bridge to the next.
//!
//! Invariant: what is stored names each port once, and none that isn't for listeners.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thyra_datapath_abi::limits::{L7_FIRST_PORT, L7_PORTS};

use super::Asked;
use crate::ads::Name;
use crate::keep;
use crate::lower::{self, Chain};

/// A residual with its port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) residual: Arc<str>,
    /// What it judged before, until that is retired.
    #[serde(skip)]
    pub(super) former: Option<Arc<str>>,
    pub(super) port: u16,
    pub(super) guards: Guards,
    pub(super) rules: Vec<Name>,
    /// Authorizers, which other slots may ask too.
    pub(super) clusters: Vec<Name>,
    pub(super) listeners: Vec<Name>,
    pub(super) cells: BTreeSet<Arc<str>>,
}

/// The filters of a listener: where they change the port does too, so that no connection of before goes on without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Guards {
    http: lower::Guards,
    other: Option<lower::Guards>,
}

impl Guards {
    pub(super) fn of(asked: &Asked) -> Self {
        Self {
            http: asked.http.guards(),
            other: asked.other.as_ref().map(Chain::guards),
        }
    }

    /// A reading that there wasn't before has no connections.
    pub(super) fn fit(&self, later: &Self) -> bool {
        let other = match (&self.other, &later.other) {
            (Some(before), Some(after)) => before == after,
            _ => true,
        };
        self.http == later.http && other
    }
}

/// Which port is whose, for the next bridge.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    pub(super) slots: Vec<Slot>,
    pub(super) next: u16,
}

impl Kept {
    /// What an earlier bridge stored in `file`; none when it stored nothing.
    ///
    /// # Errors
    /// The file can't be read, or nobody's bridge wrote it so.
    pub fn load(file: &Path) -> io::Result<Option<Self>> {
        let kept: Option<Self> = keep::load(file)?;
        let fine = |kept: &Self| {
            let ports: BTreeSet<u16> = kept.slots.iter().map(|slot| slot.port).collect();
            let ours = L7_FIRST_PORT..L7_FIRST_PORT + L7_PORTS;
            ports.len() == kept.slots.len()
                && ports.iter().all(|port| ours.contains(port))
                && kept.next < L7_PORTS
        };
        match kept {
            Some(kept) if !fine(&kept) => Err(io::Error::other("ports that can't be")),
            kept => Ok(kept),
        }
    }
}

impl Slot {
    /// All that its listeners can't do without.
    pub(super) fn needs(&self) -> impl Iterator<Item = &Name> {
        self.rules.iter().chain(&self.clusters)
    }

    pub(super) fn new(port: u16, guards: Guards) -> Self {
        Self {
            residual: "".into(),
            former: None,
            port,
            guards,
            rules: Vec::new(),
            clusters: Vec::new(),
            listeners: Vec::new(),
            cells: BTreeSet::new(),
        }
    }
}
