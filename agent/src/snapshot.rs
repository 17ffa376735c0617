//! What is enforced right now, with everything it follows from; readers take it and keep it as long as they
//! like.
//!
//! Invariant: `tables` were compiled from `held`, and the datapath carries out `tables` as `generation`.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use thyra_datapath_abi::tables::{ClassInfo, Tables};
use thyra_policy_compiler::compile::Residuals;
use thyra_policy_compiler::report::Report;
use thyra_policy_compiler::world::Workload;

use crate::held::Held;

/// How an endpoint's interface stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The programs sit at the interface with this index.
    At(u32),
    /// They don't, and why.
    Failed(String),
}

/// How it stands with the node's Envoy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Standing {
    /// Whether there is one, started or not.
    pub available: bool,
    /// It starts, or has not answered yet.
    pub is_awaited: bool,
    /// Where it listens in a pod for what a residual judges, by residual.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// The number under which connections are held that a residual judges once, by residual.
    pub holds: BTreeMap<Arc<str>, u16>,
    /// Residuals that it can't judge, and why.
    pub refused: BTreeMap<Arc<str>, String>,
    /// Endpoints whose connections can't be given to it, and why.
    pub unsteered: BTreeMap<u16, String>,
    /// What is wrong with Envoy itself.
    pub problem: Option<String>,
    /// Key sets that can't be had.
    pub missing_keys: Vec<String>,
    /// External authorizers that can't be asked.
    pub missing_authorizers: Vec<String>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// As told.
    pub held: Arc<Held>,
    /// As enforced.
    pub tables: Arc<Tables>,
    /// Ids of the tables' verdicts, by index.
    pub verdict_ids: Arc<Vec<u16>>,
    /// The compiler's word about both.
    pub report: Arc<Report>,
    /// What the tables' verdicts leave to L7.
    pub residuals: Arc<Residuals>,
    /// 0 before the first commit.
    pub generation: u32,
    /// By endpoint id.
    pub attached: Arc<BTreeMap<u16, Attached>>,
    /// Endpoints that may open no connection yet, and whose their address was.
    pub held_back: Arc<BTreeMap<u16, String>>,
    /// How it stands with Envoy.
    pub l7: Arc<L7Standing>,
    /// Why newer news is not enforced, if so.
    pub problem: Option<String>,
    /// Namespace and name by address; filled when first asked for.
    pub(crate) owners: OnceLock<HashMap<IpAddr, (String, String)>>,
}

impl Snapshot {
    /// The class of an address; none before the first commit of this run.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Option<&ClassInfo> {
        self.tables.class(self.tables.class_of(address))
    }

    /// Namespace and name of the workload, or of the endpoint, that has an address.
    #[must_use]
    pub fn owner(&self, address: IpAddr) -> Option<&(String, String)> {
        self.owners.get_or_init(|| self.index()).get(&address)
    }

    /// Endpoints come last: on its own addresses the CNI's word wins.
    fn index(&self) -> HashMap<IpAddr, (String, String)> {
        let world = &self.held.world;
        let workloads = world.workloads.values().filter(|w| !w.host_network);
        let told = workloads.map(|w| (&w.addresses, &w.namespace, &w.name));
        let here = world
            .endpoints
            .values()
            .map(|e| (&e.addresses, &e.namespace, &e.name));
        told.chain(here)
            .flat_map(|(list, namespace, name)| list.iter().map(|a| (*a, (namespace.clone(), name.clone()))))
            .collect()
    }

    /// The endpoint with this id or `namespace/pod`.
    #[must_use]
    pub fn endpoint(&self, name: &str) -> Option<u16> {
        let known = &self.held.registrations;
        if let Ok(id) = name.parse::<u16>() {
            return known.contains_key(&id).then_some(id);
        }
        known.iter().find(|(_, r)| r.pod() == name).map(|(id, _)| *id)
    }

    /// The endpoint that has an address.
    #[must_use]
    pub fn endpoint_of(&self, address: IpAddr) -> Option<u16> {
        let mut known = self.held.registrations.iter();
        known
            .find(|(_, r)| r.addresses.contains(&address))
            .map(|(id, _)| *id)
    }

    /// Workloads with this namespace and name.
    pub fn workloads<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.held
            .world
            .workloads
            .values()
            .filter(move |w| w.namespace == namespace && w.name == name)
    }
}
