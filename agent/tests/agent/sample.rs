//! Small worlds.

use std::sync::Arc;
use std::time::Instant;

use thyra_agent::change::{Change, Topic};
use thyra_agent::held::Basis;
use thyra_agent::metrics::Metrics;
use thyra_agent::monitor::Hub;
use thyra_agent::registration::Registration;
use thyra_agent::snapshot::Snapshot;
use thyra_agent::store::{Added, Command, EndpointError, Handle, Parts, PodKey, Store};
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Field, L7Verdict, PolicyAction, Rule, Source, StringMatch,
};
use thyra_policy_compiler::world::{NodeOptions, Workload, WorkloadKind};
use tokio::sync::oneshot;

use crate::plane::Remembering;

/// An agent's store on a remembering datapath; the state folder lives as long as this.
pub(crate) struct Bench {
    pub(crate) plane: Remembering,
    pub(crate) state: tempfile::TempDir,
    pub(crate) handle: Handle,
    thread: std::thread::JoinHandle<()>,
}

pub(crate) fn basis(awaited: &[Topic]) -> Basis {
    let node = NodeOptions {
        name: "n0".into(),
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    Basis {
        node,
        awaited: awaited.iter().copied().collect(),
        ..Basis::default()
    }
}

impl Bench {
    pub(crate) fn new(awaited: &[Topic]) -> Self {
        Self::on(
            Remembering::default(),
            tempfile::tempdir().expect("a folder"),
            awaited,
        )
    }

    pub(crate) fn on(plane: Remembering, state: tempfile::TempDir, awaited: &[Topic]) -> Self {
        Self::with(plane, state, basis(awaited))
    }

    pub(crate) fn with(plane: Remembering, state: tempfile::TempDir, basis: Basis) -> Self {
        let (handle, thread) = Store::start(Parts {
            plane: Arc::new(std::sync::RwLock::new(Box::new(plane.clone()))),
            state: state.path().to_owned(),
            basis,
            metrics: Arc::new(Metrics::default()),
            hub: Hub::default(),
            l7: None,
        })
        .expect("started");
        Self {
            plane,
            state,
            handle,
            thread,
        }
    }

    /// Stops the store, as a restart does; what the datapath and the folder hold stays.
    pub(crate) fn stop(self) -> (Remembering, tempfile::TempDir) {
        let Self {
            plane,
            state,
            handle,
            thread,
        } = self;
        drop(handle);
        thread.join().expect("ended well");
        (plane, state)
    }

    pub(crate) fn add(&self, registration: Registration) -> Result<Added, EndpointError> {
        let (reply, answer) = oneshot::channel();
        assert!(self.handle.send(Command::Add(Box::new(registration), reply)));
        answer.blocking_recv().expect("answered")
    }

    pub(crate) fn del(&self, key: PodKey) -> Result<u32, EndpointError> {
        let (reply, answer) = oneshot::channel();
        assert!(self.handle.send(Command::Del(key, reply)));
        answer.blocking_recv().expect("answered")
    }

    pub(crate) fn check(&self, registration: Registration) -> Result<u32, EndpointError> {
        let (reply, answer) = oneshot::channel();
        assert!(self.handle.send(Command::Check(Box::new(registration), reply)));
        answer.blocking_recv().expect("answered")
    }

    /// Tells news and waits until the store has dealt with it.
    pub(crate) fn tell(&self, changes: Vec<Change>) -> Arc<Snapshot> {
        assert!(self.handle.send(Command::News(changes, Instant::now())));
        // Commands are served in order: an answer to this one means that the news was dealt with.
        drop(self.check(pod("nobody", "veth-none", "10.255.255.1")));
        self.handle.snapshot()
    }
}

pub(crate) fn pod(name: &str, interface: &str, address: &str) -> Registration {
    Registration {
        uid: format!("uid-{name}"),
        namespace: "shop".into(),
        name: name.into(),
        netns: String::new(),
        host_interface: interface.into(),
        addresses: vec![address.parse().expect("an address")],
        mac: None,
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: std::collections::BTreeMap::new(),
        service_account: name.into(),
        containers: vec!["main".into()],
    }
}

pub(crate) fn workload(name: &str, address: &str) -> Change {
    Change::Workload(Arc::new(Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        kind: WorkloadKind::Pod,
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![address.parse().expect("an address")],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: name.into(),
        node: "n0".into(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: std::collections::BTreeMap::new(),
        authorization_policies: Vec::new(),
    }))
}

/// A policy of namespace `shop` that matches sources with these principals.
pub(crate) fn policy(
    name: &str,
    version: &str,
    action: PolicyAction,
    principals: &[&str],
) -> AuthorizationPolicy {
    let values = principals
        .iter()
        .map(|p| StringMatch::Exact((*p).to_owned()))
        .collect();
    let source = Source {
        principals: Field {
            values,
            not_values: Vec::new(),
        },
        ..Source::default()
    };
    AuthorizationPolicy {
        reference: PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        },
        version: version.into(),
        action,
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: false,
        l7_verdict: L7Verdict::Request,
        rules: vec![Rule {
            from: vec![source],
            ..Rule::default()
        }],
        unknown: Vec::new(),
    }
}
