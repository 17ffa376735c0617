//! Verdicts from files: manifests to a world, to tables and residuals, to the engine.
//!
//! Invariant: the tables are looked up as the kernel does; what they leave open the residuals answer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use thyra_datapath_abi::tables::{EndpointTables, RuleRef, Tables, Verdict};
use thyra_datapath_abi::{Action, Mode};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::host::HostNode;
use thyra_datapath_engine::{BankImage, lookup};
use thyra_policy_compiler::authorizer::{self, Authorizer, CHECK_TIMEOUT, Check, Provider, STATUS_ON_ERROR};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::compile::protocol::{Declared, Protocols};
use thyra_policy_compiler::manifest::{self, Manifests};
use thyra_policy_compiler::oracle::Connection;
use thyra_policy_compiler::residual::{self, Context, Ending};
use thyra_policy_compiler::traffic::Traffic;
use thyra_policy_compiler::world::{
    AppProtocol, Endpoint, Mesh, NodeOptions, ServicePort, Workload, WorkloadKind, World,
};

const OUTSIDE: [&str; 2] = ["203.0.113.7", "2001:db8::7"];
/// Where a service account without a pod of its own connects from: the end of the plan's pod ranges.
const STAND_IN: [&str; 2] = ["10.244.255.254", "fd00:10:244:ff::fffe"];
const STAND_IN_NAME: &str = "thyra-dry-run";

/// A mesh from files, compiled.
pub(super) struct Offline {
    pub(super) world: World,
    kernel: Kernel,
    /// The tables that name causes; none where they don't fit.
    naming: Option<Kernel>,
    /// With the dry-run policies in force; none where there are none.
    tried: Option<Kernel>,
    /// By endpoint id.
    protocols: Arc<BTreeMap<u16, Protocols>>,
    /// By `namespace/name`.
    endpoints: HashMap<String, Arc<Endpoint>>,
    workloads: HashMap<String, Arc<Workload>>,
    class_pending: Vec<bool>,
}

/// A pod that a connection reaches, and the port of it.
pub(super) type Target = (Arc<Endpoint>, u16);

/// Files without a MeshConfig don't say whom CUSTOM policies ask: it is taken for somebody.
fn provide(world: &mut World) {
    if world.mesh != Mesh::default() {
        return;
    }
    let asked = world
        .authorization
        .values()
        .filter_map(|policy| policy.provider.clone());
    for name in asked.collect::<BTreeSet<String>>() {
        let authorizer = authorizer::target("mesh.invalid", 1).map(|target| Authorizer {
            target,
            check: Check::Grpc,
            timeout: CHECK_TIMEOUT,
            fail_open: false,
            status_on_error: STATUS_ON_ERROR,
            body: None,
        });
        authorizer::insert(
            &mut world.mesh.extension_providers,
            Provider::new(&name, authorizer),
        );
    }
}

impl Offline {
    /// Compiles the files. `accounts` are `namespace/sa/NAME` words that need a stand-in pod; with `as_given` no
    /// port declares a protocol.
    pub(super) fn new(manifests: &Manifests, accounts: &[&str], as_given: bool) -> Result<Self> {
        let options = NodeOptions {
            default_mode: Mode::Enforce,
            ..NodeOptions::default()
        };
        let mut world = manifest::world(manifests, options)?;
        provide(&mut world);
        for account in accounts {
            stand_in(&mut world, account)?;
        }
        if as_given {
            undeclare(&mut world);
        }
        let mut compiler = Compiler::new();
        let kernel = Kernel::new(&mut compiler, &world)?;
        let named = |w: &Arc<Workload>| (format!("{}/{}", w.namespace, w.name), Arc::clone(w));
        Ok(Self {
            naming: Kernel::new(&mut Compiler::naming(), &world).ok(),
            tried: tried(&world)
                .map(|world| Kernel::new(&mut Compiler::new(), &world))
                .transpose()?,
            protocols: Arc::clone(compiler.protocols()),
            endpoints: world
                .endpoints
                .values()
                .map(|e| (format!("{}/{}", e.namespace, e.name), Arc::clone(e)))
                .collect(),
            workloads: world.workloads.values().map(named).collect(),
            class_pending: kernel.tables.classes.iter().map(|class| class.pending).collect(),
            kernel,
            world,
        })
    }

    /// The kernel's verdict.
    pub(super) fn cell(&self, connection: &Connection) -> Result<&Verdict> {
        self.kernel.verdict(connection)
    }

    /// What would become of it with the dry-run policies in force; none where there are none.
    pub(super) fn would(&self, connection: &Connection, traffic: &Traffic) -> Result<Option<Action>> {
        let Some(tried) = &self.tried else {
            return Ok(None);
        };
        let http = self.declared(connection).is_some_and(|declared| declared.http);
        let ending = tried.end(&self.world, connection, http, &self.context(connection, traffic))?;
        Ok(Some(ending.action))
    }

    fn declared(&self, connection: &Connection) -> Option<&Declared> {
        let ports = self.protocols.get(&connection.destination_endpoint)?;
        ports.get(&connection.port)
    }

    fn context<'t>(&self, connection: &Connection, traffic: &'t Traffic) -> Context<'t> {
        Context {
            traffic,
            source: connection.source,
            paths: self.world.mesh.path_normalization,
        }
    }

    /// The last word on a connection and its first bytes.
    pub(super) fn end(&self, connection: &Connection, traffic: &Traffic) -> Result<Ending<RuleRef>> {
        let context = self.context(connection, traffic);
        let declared = self.declared(connection);
        let http = declared.is_some_and(|declared| declared.http);
        let ending = self.kernel.end(&self.world, connection, http, &context)?;
        let twice = declared.is_some_and(|declared| declared.disagree());
        if twice || self.class_pending[usize::from(self.kernel.class(connection.source))] {
            return Ok(ending);
        }
        let by = self
            .naming
            .as_ref()
            .and_then(|naming| naming.end(&self.world, connection, http, &context).ok());
        Ok(residual::named(ending, by))
    }

    /// The address that `from` connects from.
    pub(super) fn source(&self, from: &str, v6: bool) -> Result<IpAddr> {
        let constant = |both: [&str; 2]| both[usize::from(v6)].parse().context("a constant address");
        if from == "outside" {
            return constant(OUTSIDE);
        }
        if let Ok(address) = from.parse::<IpAddr>() {
            return Ok(address.to_canonical());
        }
        let mut parts = from.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some("sa"), Some(account), None) => {
                // One that `new` was not told of would be taken for whoever has the address.
                let stand_in = self.workloads.get(&format!("{namespace}/{STAND_IN_NAME}"));
                if stand_in.is_none_or(|w| w.service_account != account) {
                    bail!("`from` `{from}`: a service account is for `--from`; name a pod of it");
                }
                constant(STAND_IN)
            }
            (Some(_), Some(_), None, None) => {
                let workload = self
                    .workloads
                    .get(from)
                    .with_context(|| format!("`from` `{from}`: there is no such pod in the files"))?;
                address(&workload.addresses, v6)
                    .with_context(|| format!("`from` `{from}`: the pod has no address of this family"))
            }
            _ => bail!("`from` `{from}`: give namespace/pod, namespace/sa/NAME, an address, or outside"),
        }
    }

    /// The pods behind `to`, each with the port that a connection reaches it on.
    pub(super) fn targets(&self, to: &str, port: u16) -> Result<Vec<Target>> {
        let pod = |name: &str| self.endpoints.get(name).cloned();
        match to.split('/').collect::<Vec<_>>()[..] {
            ["service", namespace, name] => {
                let service = self
                    .world
                    .services
                    .iter()
                    .find(|(_, s)| s.namespace == namespace && s.name == name);
                let (key, _) =
                    service.with_context(|| format!("`to` `{to}`: there is no such Service in the files"))?;
                let reached = self.world.workloads.values().filter_map(|w| {
                    let ports = w.services.get(key)?;
                    let target = ports.iter().find(|p| p.port == port)?.target_port;
                    // A pod without a port of the target's name is not behind it.
                    let target = (target != 0).then_some(target)?;
                    Some((pod(&format!("{}/{}", w.namespace, w.name))?, target))
                });
                let reached: Vec<_> = reached.collect();
                if reached.is_empty() {
                    bail!("`to` `{to}`: no pod is behind port {port} of the Service");
                }
                Ok(reached)
            }
            [_, _] => {
                let endpoint = pod(to).with_context(|| {
                    format!("`to` `{to}`: there is no such pod in the files, or it uses the host network")
                })?;
                Ok(vec![(endpoint, port)])
            }
            _ => bail!("`to` `{to}`: give namespace/pod or service/namespace/name"),
        }
    }
}

/// The connection of one source to one target.
pub(super) fn connection(source: IpAddr, (endpoint, port): &Target) -> Result<Connection> {
    let destination = address(&endpoint.addresses, source.is_ipv6()).with_context(|| {
        format!(
            "pod `{}/{}` has no IPv{} address",
            endpoint.namespace,
            endpoint.name,
            if source.is_ipv6() { 6 } else { 4 }
        )
    })?;
    Ok(Connection {
        source,
        destination_endpoint: endpoint.id,
        destination,
        port: *port,
    })
}

/// Tables as the kernel would hold them, with what they leave to L7.
struct Kernel {
    tables: Tables,
    residuals: Arc<thyra_policy_compiler::compile::Residuals>,
    node: HostNode,
}

impl Kernel {
    fn new(compiler: &mut Compiler, world: &World) -> Result<Self> {
        let tables = compiler.compile(world)?;
        // Verdict ids are the tables' own indices plus one: 0 is no verdict.
        let image = BankImage::build(&tables, &|index| u16::try_from(index + 1).unwrap_or(0))?;
        Ok(Self {
            tables,
            residuals: Arc::clone(compiler.residuals()),
            node: HostNode::new(image, 0),
        })
    }

    fn class(&self, source: IpAddr) -> u16 {
        let node = &self.node;
        match source {
            IpAddr::V4(address) => lookup::source4(&node, address.to_bits()).class,
            IpAddr::V6(address) => lookup::source6(&node, Address6::from_bytes(address.octets())).class,
        }
    }

    fn verdict(&self, connection: &Connection) -> Result<&Verdict> {
        let placed = self.tables.endpoint(connection.destination_endpoint);
        let EndpointTables { set4, set6, .. } = *placed.context("the compiler left out an endpoint")?;
        let set = if connection.source.is_ipv4() { set4 } else { set6 };
        let class = self.class(connection.source);
        let cell = lookup::cell(&&self.node, set, class, connection.port.to_be_bytes());
        let index = usize::from(cell.verdict()).checked_sub(1);
        index
            .and_then(|i| self.tables.verdicts.get(i))
            .context("a cell of the tables is empty")
    }

    fn end(
        &self,
        world: &World,
        connection: &Connection,
        declares_http: bool,
        context: &Context<'_>,
    ) -> Result<Ending<RuleRef>> {
        let verdict = self.verdict(connection)?;
        residual::end(world, verdict, &self.residuals, declares_http, context)
            .context("a verdict names a residual that is not there")
    }
}

fn address(addresses: &[IpAddr], v6: bool) -> Option<IpAddr> {
    addresses.iter().copied().find(|a| a.is_ipv6() == v6)
}

/// The world with its dry-run policies in force; none where there are none.
fn tried(world: &World) -> Option<World> {
    let mut tried = world.clone();
    for policy in tried.authorization.values_mut().filter(|policy| policy.dry_run) {
        Arc::make_mut(policy).dry_run = false;
    }
    (tried.authorization != world.authorization).then_some(tried)
}

/// No port declares anything any more.
fn undeclare(world: &mut World) {
    let forget = |ports: &mut Vec<ServicePort>| {
        for port in ports {
            port.protocol = AppProtocol::Unknown;
        }
    };
    let workloads: Vec<Arc<Workload>> = world.workloads.values().cloned().collect();
    for mut workload in workloads {
        Arc::make_mut(&mut workload)
            .services
            .values_mut()
            .for_each(forget);
        world.workloads.insert(workload.uid.clone(), workload);
    }
    for service in world.services.values_mut() {
        forget(&mut Arc::make_mut(service).ports);
    }
}

/// A workload that is nothing but a service account at an address, for `namespace/sa/NAME`; other words need none.
fn stand_in(world: &mut World, from: &str) -> Result<()> {
    let parts: Vec<&str> = from.split('/').collect();
    let [namespace, "sa", account] = parts[..] else {
        return Ok(());
    };
    let addresses = STAND_IN.iter().map(|address| address.parse());
    let workload = Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{STAND_IN_NAME}").into(),
        kind: WorkloadKind::Pod,
        name: STAND_IN_NAME.into(),
        namespace: namespace.into(),
        addresses: addresses
            .collect::<Result<_, _>>()
            .context("constant addresses")?,
        network: world.node.network.clone(),
        trust_domain: world.mesh.trust_domain.clone(),
        service_account: account.into(),
        node: String::new(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: std::collections::BTreeMap::new(),
        authorization_policies: Vec::new(),
    };
    world.workloads.insert(workload.uid.clone(), Arc::new(workload));
    Ok(())
}
