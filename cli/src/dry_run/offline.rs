//! Verdicts from files: manifests to a world, to tables, to the engine.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::{EndpointTables, Tables};
use thyra_datapath_engine::host::HostNode;
use thyra_datapath_engine::{BankImage, lookup};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest::{self, Manifests};
use thyra_policy_compiler::oracle::{self, Connection};
use thyra_policy_compiler::world::{Endpoint, NodeOptions, Workload, WorkloadKind, World};

use super::{Answer, Answers, Args};
use crate::verdict::Verdict;

const OUTSIDE: [&str; 2] = ["203.0.113.7", "2001:db8::7"];
/// Where a service account without a pod of its own connects from: the end of the plan's pod ranges.
const STAND_IN: [&str; 2] = ["10.244.255.254", "fd00:10:244:ff::fffe"];

/// The verdicts, and the first difference from the oracle if one was asked for.
pub(super) fn answer(manifests: &Manifests, args: &Args) -> Result<(Answers, Option<String>)> {
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let mut world = manifest::world(manifests, options)?;
    let v6 = args.ip == 6;
    let source = source(&mut world, &args.from, v6)?;
    let targets = targets(&world, &args.to, args.port)?;
    let tables = Compiler::new().compile(&world)?;
    let kernel = Kernel::new(&tables)?;
    let (mut answers, mut difference) = (Vec::new(), None);
    for (endpoint, port) in targets {
        let destination = address(&endpoint.addresses, v6).with_context(|| {
            format!(
                "pod `{}/{}` has no IPv{} address",
                endpoint.namespace, endpoint.name, args.ip
            )
        })?;
        let connection = Connection {
            source,
            destination_endpoint: endpoint.id,
            destination,
            port,
        };
        let verdict = kernel.verdict(&connection)?;
        if args.with_oracle {
            let judged = Verdict::from(&oracle::judge(&world, &connection).verdict);
            if judged != verdict && difference.is_none() {
                difference = Some(format!(
                    "`{}` against `{}`",
                    verdict.sentence(),
                    judged.sentence()
                ));
            }
        }
        let to = format!("{}/{}", endpoint.namespace, endpoint.name);
        answers.push(Answer {
            from: args.from.clone(),
            to,
            port: port.into(),
            verdict,
        });
    }
    Ok((Answers(answers), difference))
}

/// The tables as the kernel would hold them.
struct Kernel<'a> {
    tables: &'a Tables,
    node: HostNode,
}

impl<'a> Kernel<'a> {
    fn new(tables: &'a Tables) -> Result<Self> {
        // Verdict ids are the tables' own indices plus one: 0 is no verdict.
        let image = BankImage::build(tables, &|index| u16::try_from(index + 1).unwrap_or(0))?;
        Ok(Self {
            tables,
            node: HostNode::new(image, 0),
        })
    }

    fn verdict(&self, connection: &Connection) -> Result<Verdict> {
        let endpoint = connection.destination_endpoint;
        let placed = self.tables.endpoints.iter().find(|e| e.endpoint == endpoint);
        let EndpointTables { set4, set6, .. } = *placed.context("the compiler left out an endpoint")?;
        let node = &self.node;
        let (class, set) = match connection.source {
            IpAddr::V4(address) => (lookup::source4(&node, address.to_bits()).class, set4),
            IpAddr::V6(address) => {
                let address = thyra_datapath_engine::family::Address6::from_bytes(address.octets());
                (lookup::source6(&node, address).class, set6)
            }
        };
        let cell = lookup::cell(&node, set, class, connection.port.to_be_bytes());
        let index = usize::from(cell.verdict()).checked_sub(1);
        let verdict = index
            .and_then(|i| self.tables.verdicts.get(i))
            .context("a cell of the tables is empty")?;
        Ok(Verdict::from(verdict))
    }
}

fn address(addresses: &[IpAddr], v6: bool) -> Option<IpAddr> {
    addresses.iter().copied().find(|a| a.is_ipv6() == v6)
}

fn source(world: &mut World, from: &str, v6: bool) -> Result<IpAddr> {
    let of_family = |both: [&str; 2]| both[usize::from(v6)].parse().context("a constant address");
    if from == "outside" {
        return of_family(OUTSIDE);
    }
    if let Ok(address) = from.parse::<IpAddr>() {
        return Ok(address.to_canonical());
    }
    match from.split('/').collect::<Vec<_>>()[..] {
        [namespace, "sa", name] => {
            let address = of_family(STAND_IN)?;
            let workload = stand_in(world, namespace, name, address);
            world.workloads.insert(workload.uid.clone(), Arc::new(workload));
            Ok(address)
        }
        [namespace, name] => {
            let found = world
                .workloads
                .values()
                .find(|w| w.namespace == namespace && w.name == name);
            let workload =
                found.with_context(|| format!("`--from {from}`: there is no such pod in the files"))?;
            address(&workload.addresses, v6)
                .with_context(|| format!("pod `{from}` has no address of this family"))
        }
        _ => bail!("`--from {from}`: give namespace/pod, namespace/sa/NAME, an address, or outside"),
    }
}

/// A workload that is nothing but a service account at an address.
fn stand_in(world: &World, namespace: &str, account: &str, address: IpAddr) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/thyra-dry-run").into(),
        kind: WorkloadKind::Pod,
        name: "thyra-dry-run".into(),
        namespace: namespace.into(),
        addresses: vec![address],
        network: world.node.network.clone(),
        trust_domain: world.mesh.trust_domain.clone(),
        service_account: account.into(),
        node: String::new(),
        host_network: false,
        hbone: false,
        services: std::collections::BTreeMap::new(),
        authorization_policies: Vec::new(),
    }
}

/// The pods behind `--to`, each with the port that a connection reaches it on.
fn targets(world: &World, to: &str, port: u16) -> Result<Vec<(Arc<Endpoint>, u16)>> {
    let pod = |namespace: &str, name: &str| {
        world
            .endpoints
            .values()
            .find(|e| e.namespace == namespace && e.name == name)
            .cloned()
    };
    match to.split('/').collect::<Vec<_>>()[..] {
        ["service", namespace, name] => {
            let service = world
                .services
                .iter()
                .find(|(_, s)| s.namespace == namespace && s.name == name);
            let (key, _) =
                service.with_context(|| format!("`--to {to}`: there is no such Service in the files"))?;
            let reached = world.workloads.values().filter_map(|w| {
                let ports = w.services.get(key)?;
                let target = ports.iter().find(|p| p.port == port)?.target_port;
                Some((pod(&w.namespace, &w.name)?, target))
            });
            let reached: Vec<_> = reached.collect();
            if reached.is_empty() {
                bail!("`--to {to} --port {port}`: no pod is behind that port of the Service");
            }
            Ok(reached)
        }
        [namespace, name] => {
            let endpoint = pod(namespace, name).with_context(|| {
                format!("`--to {to}`: there is no such pod in the files, or it uses the host network")
            })?;
            Ok(vec![(endpoint, port)])
        }
        _ => bail!("`--to {to}`: give namespace/pod or service/namespace/name"),
    }
}
