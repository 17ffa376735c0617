//! Addresses of nodes, pods and Services.
//!
//! Invariant: node N has 10.200.0.N+1 and fd00:200::N+1 on the uplink, pods 10.244.N.0/24 and
//! fd00:10:244:N::/64; an address is
//! handed out once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::ModelError;
use crate::lab::object::{Object, text};

/// The world outside.
pub(crate) const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// The world outside.
pub(crate) const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
/// The first address of a range that goes to a pod; 1 is the gateway.
const FIRST_POD: u8 = 2;
/// ClusterIPs handed out by number start here; a manifest that asks for one mostly asks for a lower one.
const FIRST_VIP: u8 = 100;

/// What a node is called by.
pub(crate) struct NodeAddresses {
    /// On the uplink.
    pub(crate) own: [IpAddr; 2],
    /// What pods have as their gateway.
    pub(crate) gateways: [IpAddr; 2],
    /// Ranges of its pods, with prefix length.
    pub(crate) ranges: [(IpAddr, u8); 2],
}

/// Who has which address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses {
    owners: BTreeMap<IpAddr, String>,
}

impl NodeAddresses {
    pub(crate) fn of(node: usize) -> Self {
        // The scenario reader lets at most 16 nodes through.
        let node = u8::try_from(node).unwrap_or(u8::MAX);
        let host = node.saturating_add(1);
        Self {
            own: [
                Ipv4Addr::new(10, 200, 0, host).into(),
                Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, host.into()).into(),
            ],
            gateways: [pod_v4(node, 1), pod_v6(node, 1)],
            ranges: [(pod_v4(node, 0), 24), (pod_v6(node, 0), 64)],
        }
    }
}

impl Addresses {
    /// What `status.podIPs` asks for, else the node's next free pair; a single given family gets no other
    /// one.
    pub(super) fn pod(
        &mut self,
        what: &str,
        node: usize,
        object: &Object,
    ) -> Result<Vec<IpAddr>, ModelError> {
        let mut addresses = Vec::new();
        for asked in asked_for(object) {
            let address = asked.parse().map_err(|_| ModelError::Address {
                pod: object.key(),
                address: asked.to_owned(),
            })?;
            if !addresses.contains(&address) {
                self.claim(what, address)?;
                addresses.push(address);
            }
        }
        if !addresses.is_empty() {
            return Ok(addresses);
        }
        let node = u8::try_from(node).unwrap_or(u8::MAX);
        for host in FIRST_POD..=254 {
            let pair = [pod_v4(node, host), pod_v6(node, host)];
            if pair.iter().all(|address| !self.owners.contains_key(address)) {
                for address in pair {
                    self.claim(what, address)?;
                }
                return Ok(pair.to_vec());
            }
        }
        Err(ModelError::Full {
            what: what.to_owned(),
            range: format!("10.244.{node}.0/24"),
        })
    }

    /// The ClusterIPs: as asked, else the next free pair; none for headless Services and ExternalName.
    pub(super) fn service(&mut self, what: &str, object: &Object) -> Result<Vec<IpAddr>, ModelError> {
        let asked: Vec<&str> = asked_for(object).collect();
        if asked.contains(&"None") || text(&object.json, "/spec/type") == "ExternalName" {
            return Ok(Vec::new());
        }
        let mut vips: Vec<IpAddr> = Vec::new();
        for text in asked {
            let address = text.parse().map_err(|_| ModelError::Address {
                pod: object.key(),
                address: text.to_owned(),
            })?;
            if !vips.contains(&address) {
                self.claim(what, address)?;
                vips.push(address);
            }
        }
        let families = families(object, &vips);
        if families
            .iter()
            .all(|v4| vips.iter().any(|vip| vip.is_ipv4() == *v4))
        {
            return Ok(vips);
        }
        for host in FIRST_VIP..=254 {
            let pair: [IpAddr; 2] = [
                Ipv4Addr::new(10, 96, 0, host).into(),
                Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host.into()).into(),
            ];
            if pair.iter().any(|address| self.owners.contains_key(address)) {
                continue;
            }
            for address in pair {
                let asked = families.contains(&address.is_ipv4());
                if asked && vips.iter().all(|vip| vip.is_ipv4() != address.is_ipv4()) {
                    self.claim(what, address)?;
                    vips.push(address);
                }
            }
            return Ok(vips);
        }
        Err(ModelError::Full {
            what: what.to_owned(),
            range: "10.96.0.0/24".to_owned(),
        })
    }

    fn claim(&mut self, what: &str, address: IpAddr) -> Result<(), ModelError> {
        match self.owners.insert(address, what.to_owned()) {
            // Two live pods on one address are a case of their own: the manifests ask for it by name.
            Some(owner) if owner != what && !(owner.starts_with("pod ") && what.starts_with("pod ")) => {
                Err(ModelError::Taken {
                    what: what.to_owned(),
                    address,
                    owner,
                })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn release(&mut self, what: &str) {
        self.owners.retain(|_, owner| owner != what);
    }
}

/// Families (is it IPv4?) of a Service's addresses: both, unless it asks for one.
fn families(object: &Object, vips: &[IpAddr]) -> Vec<bool> {
    let listed = object
        .json
        .pointer("/spec/ipFamilies")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let mut families: Vec<bool> = listed
        .filter_map(Value::as_str)
        .map(|family| family == "IPv4")
        .collect();
    let policy = text(&object.json, "/spec/ipFamilyPolicy");
    let single = policy == "SingleStack" || (policy.is_empty() && families.len() == 1);
    if single {
        families.extend(vips.iter().map(IpAddr::is_ipv4));
        return vec![families.first().copied().unwrap_or(true)];
    }
    vec![true, false]
}

/// Addresses that an object names itself: `status.podIPs` of a pod, ClusterIPs of a Service (`None`
/// included).
pub(super) fn asked_for(object: &Object) -> impl Iterator<Item = &str> {
    let (list, single) = match object.kind.as_str() {
        "Pod" if object.json.pointer("/spec/hostNetwork") != Some(&Value::Bool(true)) => {
            ("/status/podIPs", "/status/podIP")
        }
        "Service" => ("/spec/clusterIPs", "/spec/clusterIP"),
        _ => ("/none", "/none"),
    };
    let listed = object
        .json
        .pointer(list)
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let listed = listed.filter_map(|item| item.as_str().or_else(|| item.get("ip")?.as_str()));
    let single = object.json.pointer(single).and_then(Value::as_str);
    single.into_iter().chain(listed).filter(|text| !text.is_empty())
}

fn pod_v4(node: u8, host: u8) -> IpAddr {
    Ipv4Addr::new(10, 244, node, host).into()
}

fn pod_v6(node: u8, host: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host.into()).into()
}
