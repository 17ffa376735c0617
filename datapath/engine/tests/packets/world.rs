//! The small node that every case in `testdata/packets` is about.
//!
//! ```text
//! endpoint 1  interface 2  10.244.0.2  fd00:10:244::2   enforced
//! endpoint 2  interface 3  10.244.0.3  fd00:10:244::3   audited
//! endpoint 3  interface 4  10.244.0.4  fd00:10:244::4   off
//! endpoint 4  interface 5  10.244.0.5  fd00:10:244::5   attached, never placed by a commit, never redirected to
//! endpoint 5  interface 6  10.244.0.6  fd00:10:244::6   enforced, port of the bridge 8
//! endpoint 6  interface 11 10.244.0.11 fd00:10:244::b   enforced, held back
//! uplink      interface 9
//!
//! port   friend  foe   pending  outsider
//! 8080   allow   deny  hold     deny
//! 9090   allow   allow allow    allow
//! 7070   (cells that nobody wrote)
//! other  deny    deny  hold     deny
//! ```
//!
//! Friends: 10.244.1.10, fd00:10:244:1::10, endpoint 3's addresses, 192.0.2.0/24 and 2001:db8:1::/48 but for
//! 192.0.2.128/25. Foes: 10.244.1.66, fd00:10:244:1::66. Pending: 10.244.1.70, fd00:10:244:1::70.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, LazyLock};

use thyra_datapath_abi::tables::{ClassInfo, EndpointTables, SourceAddress, SourceBlock, Tables, Verdict};
use thyra_datapath_abi::{Action, EndpointRecord, Mode, Reason};
use thyra_datapath_engine::host::HostNode;
use thyra_datapath_engine::{BankImage, Tables as _};

/// Verdict ids are the index plus one: 2 denies, 3 holds.
pub(crate) const ALLOW: u16 = 1;

/// Classes.
const FRIEND: u32 = 1;
const FOE: u32 = 2;
const PENDING: u32 = 3;

const LOCAL: [(u16, u32, Option<Mode>); 7] = [
    (1, 2, Some(Mode::Enforce)),
    (2, 3, Some(Mode::Audit)),
    (3, 4, Some(Mode::Off)),
    (4, 5, None),
    (5, 6, Some(Mode::Enforce)),
    (6, 11, Some(Mode::Enforce)),
    (9, 10, Some(Mode::Enforce)),
];

/// Index of the bridge that endpoint 5 is a port of.
pub(crate) const BRIDGE: u32 = 8;

/// The node, with these flags of `Control`.
pub(crate) fn node(flags: u64) -> HostNode {
    node_with(image(), flags)
}

/// The node with other tables.
pub(crate) fn node_with(image: BankImage, flags: u64) -> HostNode {
    let mut node = HostNode::new(image, flags);
    for (endpoint, ifindex, _) in LOCAL {
        let record = EndpointRecord {
            ifindex,
            bridge_ifindex: if endpoint == 5 { BRIDGE } else { 0 },
            address4: Ipv4Addr::new(10, 244, 0, low(ifindex)).octets(),
            flags: match endpoint {
                6 => EndpointRecord::HELD_BACK,
                4 => 0,
                _ => EndpointRecord::DIRECT,
            },
            // Not that of any namespace.
            netns: 60_000,
            address6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, u16::from(low(ifindex))).octets(),
            ..EndpointRecord::default()
        };
        node.attach(endpoint, record);
    }
    node
}

/// No pod takes part in `--local-redirect`.
pub(crate) fn set_apart(node: &mut HostNode) {
    for (endpoint, _, _) in LOCAL {
        let record = *(&*node).record(endpoint);
        let flags = record.flags & !EndpointRecord::DIRECT;
        node.attach(endpoint, EndpointRecord { flags, ..record });
    }
}

/// The endpoint at an interface.
pub(crate) fn endpoint_at(ifindex: u32) -> Option<u16> {
    let here = |(endpoint, at, _): (u16, u32, _)| (at == ifindex).then_some(endpoint);
    LOCAL.into_iter().find_map(here)
}

/// The bank that the node's tables make.
pub(crate) fn image() -> BankImage {
    static IMAGE: LazyLock<BankImage> =
        LazyLock::new(|| BankImage::build(&tables(), &|index| u16::try_from(index).unwrap() + 1).unwrap());
    IMAGE.clone()
}

fn low(ifindex: u32) -> u8 {
    u8::try_from(ifindex).unwrap()
}

/// Friend, foe and pending sources elsewhere, and the pods of this node.
fn addresses() -> Vec<SourceAddress> {
    let mut addresses = Vec::new();
    let both = |last: u8, class: u32| {
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, hexadecimal(last));
        [
            source(IpAddr::V4(Ipv4Addr::new(10, 244, 1, last)), class, 0),
            source(IpAddr::V6(v6), class, 0),
        ]
    };
    addresses.extend(both(10, FRIEND));
    addresses.extend(both(66, FOE));
    addresses.extend(both(70, PENDING));
    for (endpoint, ifindex, _) in LOCAL {
        let class = if endpoint == 3 { FRIEND } else { FOE };
        let last = low(ifindex);
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, u16::from(last));
        addresses.push(source(
            IpAddr::V4(Ipv4Addr::new(10, 244, 0, last)),
            class,
            endpoint,
        ));
        addresses.push(source(IpAddr::V6(v6), class, endpoint));
    }
    addresses.sort();
    addresses
}

/// What policy says at every endpoint of the node.
pub(crate) fn tables() -> Tables {
    let class = ClassInfo {
        principal: None,
        identity: 0,
        pending: false,
        blocks: Vec::new(),
    };
    let endpoint = |(endpoint, _, mode): (u16, u32, Option<Mode>)| {
        mode.map(|mode| EndpointTables {
            endpoint,
            set4: u16::from(endpoint == 9),
            set6: u16::from(endpoint == 9),
            mode,
        })
    };
    Tables {
        classes: vec![class; 4].into(),
        class_column: vec![0, 1, 2, 3].into(),
        columns: 4,
        addresses: addresses().into(),
        blocks: vec![
            block("192.0.2.0", 24, FRIEND),
            block("192.0.2.128", 25, 0),
            block("2001:db8:1::", 48, FRIEND),
        ]
        .into(),
        port_runs: vec![
            (0, 0),
            (7070, 3),
            (7071, 0),
            (8080, 1),
            (8081, 0),
            (9090, 2),
            (9091, 0),
        ]
        .into(),
        port_classes: 4,
        sets: vec![vec![0, 1, 2, 3], vec![1, 1, 2, 3]].into(),
        rows: vec![vec![1, 1, 1, 2], vec![1, 0, 1, 2], vec![0; 4], vec![3; 4]].into(),
        verdicts: vec![
            verdict(Action::Allow, Reason::PolicyAllow),
            verdict(Action::Deny, Reason::Policy),
            verdict(Action::Hold, Reason::IdentityPending),
            // A cell whose action is `Missing` is what memory that nobody wrote looks like.
            verdict(Action::Missing, Reason::TableMissing),
        ]
        .into(),
        endpoints: Arc::new(LOCAL.into_iter().filter_map(endpoint).collect()),
    }
}

/// `70` becomes `0x70`, so that the last groups of both families read alike.
fn hexadecimal(decimal: u8) -> u16 {
    u16::from(decimal / 10) * 16 + u16::from(decimal % 10)
}

fn source(address: IpAddr, class: u32, local: u16) -> SourceAddress {
    SourceAddress {
        address,
        class,
        local,
    }
}

fn block(network: &str, prefix: u8, class: u32) -> SourceBlock {
    SourceBlock {
        network: network.parse().unwrap(),
        prefix,
        class,
    }
}

fn verdict(action: Action, reason: Reason) -> Verdict {
    Verdict {
        action,
        reason,
        rule: None,
        because: Vec::<(_, Arc<str>)>::new(),
        residual: None,
        would: None,
    }
}
