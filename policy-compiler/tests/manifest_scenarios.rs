//! What the lab's scenarios expect, judged without a kernel: by the oracle, and by the tables.
//!
//! Only plain expectations of pods and outsiders are compared; the node's own traffic and open connections
//! are the datapath's to judge.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest::{self, Manifests, Plan, object::Pod};
use thyra_policy_compiler::oracle::{self, Connection};
use thyra_policy_compiler::world::{Endpoint, NodeOptions};

/// A scenario at some step of its probes.
struct Stage {
    folder: PathBuf,
    manifests: Manifests,
    options: NodeOptions,
    compiler: Compiler,
}

fn yaml(path: &Path) -> Json {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Manifests {
    manifest::read_dir(path).unwrap_or_else(|errors| panic!("{errors:#?}"))
}

fn name(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

impl Stage {
    /// `None` where the scenario sets what only the datapath knows.
    fn open(folder: PathBuf) -> Option<Self> {
        let settings = folder.join("scenario.yaml");
        let settings = if settings.exists() {
            yaml(&settings)
        } else {
            Json::Null
        };
        let agent = &settings["agent"];
        if agent["host-traffic"] == "enforce" {
            return None;
        }
        let mut options = NodeOptions {
            default_mode: Mode::Enforce,
            ..NodeOptions::default()
        };
        if let Some(namespaces) = agent["trust-workload-entries"].as_str() {
            options.trust_workload_entries = namespaces.split(',').map(str::to_owned).collect();
        }
        let manifests = read(&folder.join("manifests"));
        Some(Self {
            folder,
            manifests,
            options,
            compiler: Compiler::new(),
        })
    }

    /// Takes one entry of probes.yaml; the number of verdicts compared.
    fn step(&mut self, entry: &Json) -> usize {
        if let Some(file) = entry["apply"].as_str() {
            self.manifests.apply(read(&self.folder.join(file)));
        } else if let Some(file) = entry["delete"].as_str() {
            self.manifests.delete(&read(&self.folder.join(file)));
        } else if entry["from"].is_string() {
            return self.probe(entry);
        }
        0
    }

    fn probe(&mut self, probe: &Json) -> usize {
        let text = |key: &str| {
            probe[key]
                .as_str()
                .unwrap_or_else(|| panic!("no `{key}` in {probe}"))
        };
        let (from, to) = (text("from"), text("to"));
        if from == "host"
            || self
                .manifests
                .pods()
                .any(|pod| pod.host_network && name(pod) == from)
        {
            return 0;
        }
        let v6 = probe["ip"] == 6;
        let plan = manifest::addresses(&self.manifests, 1).expect("a plan");
        let source = source(&plan, from, to.starts_with("service/"), v6);
        let port = probe["port"]
            .as_u64()
            .and_then(|p| u16::try_from(p).ok())
            .expect("a port");
        let (pods, port) = self.targets(to, port);
        let targets: Vec<&String> = pods.iter().filter(|pod| *pod != from).collect();
        for pod in &targets {
            self.compare(probe, source, pod, port, v6);
        }
        targets.len()
    }

    /// The pods behind a name, and the port on them.
    fn targets(&self, to: &str, port: u16) -> (Vec<String>, u16) {
        let Some(wanted) = to.strip_prefix("service/") else {
            return (vec![to.to_owned()], port);
        };
        let mut services = self.manifests.services();
        let service = services
            .find(|s| format!("{}/{}", s.namespace, s.name) == wanted)
            .expect("a Service");
        let pods: Vec<&Pod> = self.manifests.pods().filter(|pod| service.selects(pod)).collect();
        let declared = service
            .ports
            .iter()
            .find(|p| p.port == port)
            .expect("a port of the Service");
        let target = declared
            .target
            .port_of(pods[0], declared.transport)
            .expect("a port of the pod");
        (pods.into_iter().map(name).collect(), target)
    }

    fn compare(&mut self, probe: &Json, source: IpAddr, pod: &str, port: u16, v6: bool) {
        let world = manifest::world(&self.manifests, self.options.clone()).expect("a world");
        let of_pod = |e: &&std::sync::Arc<Endpoint>| format!("{}/{}", e.namespace, e.name) == pod;
        let endpoint = world.endpoints.values().find(of_pod).expect("an endpoint");
        let destination = *endpoint
            .addresses
            .iter()
            .find(|a| a.is_ipv6() == v6)
            .expect("an address");
        let connection = Connection {
            source,
            destination_endpoint: endpoint.id,
            destination,
            port,
        };
        let judged = oracle::judge(&world, &connection).verdict;
        let tables = self.compiler.compile(&world).expect("tables");
        let placed = tables
            .endpoints
            .iter()
            .find(|e| e.endpoint == endpoint.id)
            .expect("a place");
        let set = if v6 { placed.set6 } else { placed.set4 };
        let cell = tables
            .verdict(set, port, tables.class_of(source))
            .expect("a cell");
        let allowed = probe["expect"] == "allow" || probe["expect"].is_u64();
        let place = self.folder.display();
        // Where a verdict is not carried out, the connection is let through whatever it says.
        let passes = judged.action == Action::Allow || placed.mode != Mode::Enforce;
        // Where the request decides, the lab asks an Envoy.
        if !matches!(judged.reason, Reason::NeedsL7 | Reason::NeedsCustom) {
            assert_eq!(passes, allowed, "{place}: {probe} on {pod}: {judged:?}");
        }
        assert_eq!(
            (judged.action, judged.reason),
            (cell.action, cell.reason),
            "{place}: {probe} on {pod}"
        );
    }
}

/// The address that the pod sees; a Service masquerades what comes from outside.
fn source(plan: &Plan, from: &str, by_service: bool, v6: bool) -> IpAddr {
    match (from, by_service, v6) {
        ("outside", true, _) => plan.nodes[0].addresses[usize::from(v6)],
        ("outside", false, false) => "203.0.113.7".parse().expect("an address"),
        ("outside", false, true) => "2001:db8::7".parse().expect("an address"),
        (pod, ..) => *plan.pods[pod]
            .addresses
            .iter()
            .find(|a| a.is_ipv6() == v6)
            .expect("an address"),
    }
}

#[test]
fn oracle_and_tables_say_what_the_scenarios_expect() {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab");
    let folders = std::fs::read_dir(&lab)
        .expect("testdata/lab")
        .map(|entry| entry.expect("an entry").path());
    let mut compared = 0;
    for folder in folders.filter(|path| path.is_dir()) {
        let probes = yaml(&folder.join("probes.yaml"));
        let Some(mut stage) = Stage::open(folder) else {
            continue;
        };
        compared += probes
            .as_array()
            .expect("a list")
            .iter()
            .map(|entry| stage.step(entry))
            .sum::<usize>();
    }
    assert!(compared > 200, "only {compared} verdicts were compared");
}
