//! The compiler's output: exact tables in plain collections, numbered only within themselves.
//!
//! Invariant: every index is in range (`Tables::check`). Numbers of classes, columns, rows and sets mean
//! nothing outside one `Tables`; what outlives it is the content of a `Verdict` and the endpoint id.

use std::net::IpAddr;
use std::sync::Arc;

use crate::chunked::Chunked;
use crate::{Action, Mode, Reason};

/// The namespaced name of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyRef {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl core::fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A rule of a policy: `ns/name#index`; `index` is the position in `spec.rules`, none where the policy as a
/// whole decides.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyRef,
    /// Index in `spec.rules`, from 0.
    pub rule: Option<u32>,
}

impl core::fmt::Display for RuleRef {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.rule {
            Some(rule) => write!(f, "{}#{rule}", self.policy),
            None => write!(f, "{}", self.policy),
        }
    }
}

/// What would have been decided if dry-run policies counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Would {
    /// The other outcome.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The dry-run rule, none when a dry-run ALLOW policy's default deny would act.
    pub rule: Option<RuleRef>,
}

/// A verdict with its cause; the unit of counting and of explanation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    /// What happens.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The rule that decided; of several that match: root namespace first, then name, then index. None where
    /// none did.
    pub rule: Option<RuleRef>,
    /// All rules that make the verdict depend on L7 (reason `NeedsL7`, `NeedsCustom`), with the field that
    /// does; else empty.
    pub because: Vec<(RuleRef, Arc<str>)>,
    /// Address of what is left to ask of L7 (same reasons); none where nothing is.
    pub residual: Option<Arc<str>>,
    /// Set only where dry-run policies would change the verdict.
    pub would: Option<Would>,
}

impl Verdict {
    /// What its cell says: an Envoy is asked where the programs know one that judges the residual, else it is as
    /// `action` says.
    pub fn cell_action(&self) -> Action {
        let needs = matches!(self.reason, Reason::NeedsL7 | Reason::NeedsCustom);
        if needs && self.residual.is_some() && self.action == Action::Deny {
            Action::Proxy
        } else {
            self.action
        }
    }
}

/// An exact source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceAddress {
    /// The address; never v4-mapped.
    pub address: IpAddr,
    /// Index into `Tables::classes`.
    pub class: u32,
    /// Endpoint id of the local pod that owns it, or 0.
    pub local: u16,
}

/// A CIDR block and the class of the sources in it that no longer block and no exact address holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceBlock {
    /// Masked network address; never v4-mapped.
    pub network: IpAddr,
    /// Prefix length in bits.
    pub prefix: u8,
    /// Index into `Tables::classes`.
    pub class: u32,
}

/// What a source class stands for; shown to people, never read by the kernel. The default is an outsider.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassInfo {
    /// `<trust domain>/ns/<ns>/sa/<sa>`; none for unknown sources.
    pub principal: Option<Arc<str>>,
    /// Interned identity number (stable while the agent's state lives); 0 for unknown.
    pub identity: u32,
    /// In a pod range whose identity has not arrived.
    pub pending: bool,
    /// The policies' CIDR blocks that hold it, in order.
    pub blocks: Vec<Arc<str>>,
}

/// The policy side of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointTables {
    /// Endpoint id, 1 to 255.
    pub endpoint: u16,
    /// Index into `Tables::sets` for IPv4.
    pub set4: u16,
    /// The same for IPv6.
    pub set6: u16,
    /// How verdicts are carried out.
    pub mode: Mode,
}

/// A whole table state. A copy shares its parts; one that changes is copied then (`Arc::make_mut`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Class 0 is the outsider that no block holds.
    pub classes: Chunked<ClassInfo>,
    /// Column of each class.
    pub class_column: Arc<Vec<u16>>,
    /// Number of columns.
    pub columns: u16,
    /// Exact addresses, sorted, distinct.
    pub addresses: Arc<Vec<SourceAddress>>,
    /// CIDR blocks, sorted, distinct.
    pub blocks: Arc<Vec<SourceBlock>>,
    /// First port of each run of equal port class, ascending, the first is 0: `(first port, port class)`.
    pub port_runs: Arc<Vec<(u16, u16)>>,
    /// Number of port classes; class 0 holds the ports that no policy names.
    pub port_classes: u16,
    /// Policy sets: row index of each port class (`port_classes` long).
    pub sets: Arc<Vec<Vec<u16>>>,
    /// Rows: verdict index (into `verdicts`) of each column (`columns` long).
    pub rows: Arc<Vec<Vec<u16>>>,
    /// The distinct verdicts.
    pub verdicts: Arc<Vec<Verdict>>,
    /// Endpoints, by id.
    pub endpoints: Arc<Vec<EndpointTables>>,
}

impl Tables {
    /// Class of a source address: exact first, then the longest block, then class 0.
    #[must_use]
    pub fn class_of(&self, source: IpAddr) -> u32 {
        let source = source.to_canonical();
        if let Ok(i) = self.addresses.binary_search_by(|a| a.address.cmp(&source)) {
            return self.addresses[i].class;
        }
        self.blocks
            .iter()
            .filter(|b| covers(b.network, b.prefix, source))
            .max_by_key(|b| b.prefix)
            .map_or(0, |b| b.class)
    }

    /// The policy side of an endpoint; none when the tables don't know it.
    #[must_use]
    pub fn endpoint(&self, id: u16) -> Option<&EndpointTables> {
        let at = self.endpoints.binary_search_by_key(&id, |e| e.endpoint);
        at.ok().and_then(|at| self.endpoints.get(at))
    }

    /// What a class stands for.
    #[must_use]
    pub fn class(&self, class: u32) -> Option<&ClassInfo> {
        self.classes.get(at(class))
    }

    /// Column of a class.
    #[must_use]
    pub fn column(&self, class: u32) -> Option<u16> {
        self.class_column.get(at(class)).copied()
    }

    /// Whether a class waits for its identity.
    #[must_use]
    pub fn is_pending(&self, class: u32) -> bool {
        self.class(class).is_some_and(|class| class.pending)
    }

    /// Port class of a destination port.
    #[must_use]
    pub fn port_class(&self, port: u16) -> u16 {
        let after = self.port_runs.partition_point(|(first, _)| *first <= port);
        after.checked_sub(1).map_or(0, |i| self.port_runs[i].1)
    }

    /// The verdict for a source and a port of an endpoint; none when the tables don't know the endpoint.
    #[must_use]
    pub fn judge(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<&Verdict> {
        let placed = self.endpoint(endpoint)?;
        let set = if source.is_ipv4() {
            placed.set4
        } else {
            placed.set6
        };
        self.verdict(set, port, self.class_of(source))
    }

    /// The verdict of one cell; none when an index leads nowhere.
    #[must_use]
    pub fn verdict(&self, set: u16, port: u16, class: u32) -> Option<&Verdict> {
        let row = *self
            .sets
            .get(usize::from(set))?
            .get(usize::from(self.port_class(port)))?;
        let column = self.column(class)?;
        let verdict = *self.rows.get(usize::from(row))?.get(usize::from(column))?;
        self.verdicts.get(usize::from(verdict))
    }
}

/// A class as an index; one that no index reaches is out of range anyway.
fn at(class: u32) -> usize {
    usize::try_from(class).unwrap_or(usize::MAX)
}

fn covers(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            u32::from(n) & mask == u32::from(a) & mask
        }
        (IpAddr::V6(n), IpAddr::V6(a)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            u128::from(n) & mask == u128::from(a) & mask
        }
        _ => false,
    }
}
