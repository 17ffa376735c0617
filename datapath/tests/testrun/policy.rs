//! The meshes of `testdata/policy` in the kernel: a SYN from every source to every port where something changes.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{Action, Control, EndpointRecord, Mode, maps};
use thyra_datapath_engine::BankImage;
use thyra_datapath_engine::host::HostNode;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest;
use thyra_policy_compiler::world::{NodeOptions, World};

use crate::NEXT;
use crate::frame;
use crate::kernel::Kernel;

/// The first endpoint's interface.
const FIRST: u32 = 2;
/// An interface that is no endpoint's.
const UPLINK: u32 = 77;
/// Sources beside the mesh's own.
const OTHERS: [&str; 6] = [
    "203.0.113.7",
    "203.0.113.130",
    "198.51.100.1",
    "2001:db8::7",
    "2001:db9::1",
    "10.244.0.200",
];

/// A case's mesh and its tables.
pub(crate) struct Mesh {
    name: String,
    world: World,
    tables: Tables,
}

/// All cases' meshes.
pub(crate) fn meshes() -> Vec<Mesh> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/policy");
    let entries = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let cases = entries.filter(|path| path.join("policy.yaml").exists());
    cases
        .map(|case| {
            let mut manifests = manifest::read_dir(&folder.join("world.yaml")).unwrap();
            manifests.apply(manifest::read_dir(&case.join("policy.yaml")).unwrap());
            let options = NodeOptions {
                default_mode: Mode::Enforce,
                ..NodeOptions::default()
            };
            let world = manifest::world(&manifests, options).unwrap();
            let tables = Compiler::new().compile(&world).unwrap();
            let name = case.file_name().unwrap().to_string_lossy().into_owned();
            Mesh { name, world, tables }
        })
        .collect()
}

fn interface(endpoint: u16) -> u32 {
    FIRST + u32::from(endpoint) - 1
}

impl Mesh {
    /// Fills the kernel and asks it. Returns how many packets were sent, and how many passed.
    pub(crate) fn check(&self, kernel: &mut Kernel) -> (u32, u32) {
        let image = BankImage::build(&self.tables, &|index| u16::try_from(index + 1).unwrap()).unwrap();
        let mut node = HostNode::new(image.clone(), 0);
        for endpoint in self.world.endpoints.values() {
            let mut record = EndpointRecord {
                ifindex: interface(endpoint.id),
                ..EndpointRecord::default()
            };
            for address in &endpoint.addresses {
                match address {
                    IpAddr::V4(v4) => record.address4 = v4.octets(),
                    IpAddr::V6(v6) => record.address6 = v6.octets(),
                }
            }
            node.attach(endpoint.id, record);
        }
        kernel.fill(&image, 0, Control::new(1, 0, image.flags()));
        kernel.attach(&node);
        kernel.remember(&[]);
        let (mut asked, mut passed) = (0, 0);
        for source in self.sources() {
            for placed in self.tables.endpoints.iter() {
                let endpoint = &self.world.endpoints[&placed.endpoint];
                let mut addresses = endpoint.addresses.iter();
                let Some(to) = addresses.find(|a| a.is_ipv4() == source.is_ipv4()) else {
                    continue;
                };
                if *to == source {
                    continue;
                }
                let set = if source.is_ipv4() {
                    placed.set4
                } else {
                    placed.set6
                };
                for (port, _) in self.tables.port_runs.iter() {
                    let class = self.tables.class_of(source);
                    let verdict = self.tables.verdict(set, *port, class).unwrap();
                    let (from, to) = (SocketAddr::new(source, 40_000), SocketAddr::new(*to, *port));
                    let at = (interface(placed.endpoint), self.ingress(source));
                    let run = kernel.run_at(maps::TO_POD, at, &frame::frame(&format!("{from} > {to} S")), 0);
                    let told = format!("{}: {from} > {to}: {verdict:?}", self.name);
                    assert_eq!(run.code == NEXT, verdict.action == Action::Allow, "{told}");
                    asked += 1;
                    passed += u32::from(run.code == NEXT);
                }
            }
        }
        (asked, passed)
    }

    fn sources(&self) -> Vec<IpAddr> {
        let workloads = self.world.workloads.values();
        let mut sources: Vec<IpAddr> = workloads.flat_map(|w| w.addresses.iter().copied()).collect();
        sources.extend(OTHERS.map(|text| text.parse::<IpAddr>().unwrap()));
        sources.extend(self.tables.blocks.iter().map(|block| block.network));
        sources
    }

    /// A pod's packets come in by its own interface.
    fn ingress(&self, source: IpAddr) -> u32 {
        let mut endpoints = self.world.endpoints.values();
        endpoints
            .find(|endpoint| endpoint.addresses.contains(&source))
            .map_or(UPLINK, |endpoint| interface(endpoint.id))
    }
}
