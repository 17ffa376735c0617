//! A case of `testdata/packets`: one packet at one program, and everything that it changes.
//!
//! Invariant: the whole ledger and the whole memory of connections are compared, so that what a case doesn't
//! name must not have happened.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::Deserialize;
use thyra_datapath_abi::count::{ReasonCounter, VerdictCounter};
use thyra_datapath_abi::datagram;
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_abi::{Control, Datagram4, Datagram6, EventKind, Flow4, Flow6, FlowState, Reason};
use thyra_datapath_engine::Flows as _;
use thyra_datapath_engine::datagram_words::DatagramWords;
use thyra_datapath_engine::decide::Arrival;
use thyra_datapath_engine::flows::{Datagrams as _, FlowTable};
use thyra_datapath_engine::host::{End, HostNode, HostPacket, Ledger};
use thyra_datapath_engine::program::{FromPod, ToPod};

use crate::frame::frame;
use crate::world;

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    case: Vec<Case>,
}

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Program {
    ToPod,
    FromPod,
    ToPodDirect,
    FromPodDirect,
}

impl Program {
    fn is_to_pod(self) -> bool {
        matches!(self, Self::ToPod | Self::ToPodDirect)
    }
}

/// One case.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Case {
    /// A claim.
    pub(crate) name: String,
    /// `to_pod` or `from_pod`, or the one in its place with `--local-redirect`.
    pub(crate) program: Program,
    /// Interface of the program.
    #[serde(default = "two")]
    pub(crate) at: u32,
    /// Interface that the packet came in by; the uplink (9), or the pod's own for `from_pod`, when not said.
    pub(crate) ingress: Option<u32>,
    /// Whether it belongs to a socket of the node. BPF test-run can't have a packet without one.
    #[serde(default)]
    pub(crate) socket: bool,
    /// Carries the mark of Thyra's own packets.
    #[serde(default)]
    pub(crate) own: bool,
    /// The stack of the pod that it is for has a connection like it. BPF test-run can't have one.
    #[serde(default)]
    pub(crate) taken: bool,
    /// No pod takes part in `--local-redirect`.
    #[serde(skip)]
    pub(crate) apart: bool,
    /// `deny-drop`, `enforce-host`, `enforce-non-tcp`, `report-new`.
    #[serde(default)]
    pub(crate) control: Vec<String>,
    /// See `frame`.
    pub(crate) packet: String,
    /// Connections that are remembered before: `outbound|host pod:port remote:port [flags]`, and datagrams:
    /// `udp|udp-lite|sctp|dccp|echo|fragment pod:port remote:port [inbound|needed]`.
    #[serde(default)]
    pub(crate) before: Vec<String>,
    /// The same after; as before when not said.
    pub(crate) after: Option<Vec<String>>,
    /// How many connections of its own a pod may have open.
    pub(crate) outbound_budget: Option<u64>,
    /// `pass`, `pass-own`, `drop`, `refuse`, `revoke`; straight to another pod `redirect`, `revoke-into`.
    pub(crate) end: String,
    /// Interface of the other pod that judged it too.
    pub(crate) to: Option<u32>,
    /// The other pod's verdict made it end.
    #[serde(default)]
    pub(crate) refused_there: bool,
    /// Verdict that is counted.
    #[serde(default)]
    pub(crate) verdict: u16,
    /// Reason (its number) that is counted.
    #[serde(default)]
    pub(crate) reason: u8,
    /// The same of the other pod.
    #[serde(default)]
    pub(crate) reason_there: u8,
    /// Events that are reported.
    pub(crate) event: Option<String>,
}

fn two() -> u32 {
    2
}

/// What a packet changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) end: End,
    pub(crate) ledger: Ledger,
    pub(crate) flows: Vec<String>,
}

/// All cases below `testdata/packets`, with their file.
pub(crate) fn all() -> Vec<(String, Case)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|folder| folder.join("testdata/packets"))
        .find(|folder| folder.is_dir())
        .expect("testdata/packets above this crate");
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(&path).unwrap();
            let file: File = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            cases.extend(file.case.into_iter().map(|case| (name.clone(), case)));
        }
    }
    assert!(cases.len() > 50, "only {} cases were found", cases.len());
    cases
}

impl Case {
    /// Interface that the packet came in by.
    pub(crate) fn ingress(&self) -> u32 {
        self.ingress
            .unwrap_or(if self.program.is_to_pod() { 9 } else { self.at })
    }

    /// The node before the packet.
    pub(crate) fn node(&self) -> HostNode {
        let mut node = world::node(self.flags());
        if self.apart {
            world::set_apart(&mut node);
        }
        if let Some(limit) = self.outbound_budget {
            node.outbound_budget = limit;
        }
        for line in &self.before {
            remember(&node, line);
        }
        node
    }

    fn flags(&self) -> u64 {
        self.control.iter().fold(0, |flags, name| {
            flags
                | match name.as_str() {
                    "deny-drop" => Control::DENY_DROP,
                    "enforce-non-tcp" => Control::ENFORCE_NON_TCP,
                    "enforce-host" => Control::ENFORCE_HOST,
                    "report-new" => Control::REPORT_NEW,
                    "flow-log" => Control::flow_log(0),
                    "flow-log-sampled" => Control::flow_log(Control::MAX_SAMPLING),
                    other => panic!("{}: no control flag is called `{other}`", self.name),
                }
        })
    }

    /// The same of the program with `--local-redirect`, at a node none of whose pods takes part; none where it is about
    /// that program already.
    pub(crate) fn apart(mut self) -> Option<Self> {
        self.program = match self.program {
            Program::ToPod => Program::ToPodDirect,
            Program::FromPod => Program::FromPodDirect,
            Program::ToPodDirect | Program::FromPodDirect => return None,
        };
        self.apart = true;
        Some(self)
    }

    /// Runs a packet, its own or another, on the host.
    pub(crate) fn run(&self, bytes: &[u8]) -> Change {
        let node = self.node();
        let end = self.end_on(&node, bytes);
        Change {
            end,
            ledger: node.ledger.borrow().clone(),
            flows: flows(&node),
        }
    }

    /// Runs a packet in the place of the case's own.
    pub(crate) fn end_on(&self, node: &HostNode, bytes: &[u8]) -> End {
        let arrival = Arrival {
            ifindex: self.at,
            ingress_ifindex: self.ingress(),
            has_socket: self.socket,
            at_pod: false,
        };
        let packet = HostPacket {
            bytes,
            arrival,
            mark: if self.own { OWN_MARK } else { 0 },
            taken: self.taken,
        };
        match self.program {
            Program::ToPod => node.run::<ToPod>(packet),
            Program::FromPod => node.run::<FromPod>(packet),
            Program::ToPodDirect => node.run_to_pod_direct(packet),
            Program::FromPodDirect => node.run_from_pod_direct(packet),
        }
    }

    /// Fails unless the change is what the case says, all of it.
    pub(crate) fn check(&self, change: &Change) {
        let end = match self.end.as_str() {
            "pass" => End::Pass,
            "pass-own" => End::PassOwn,
            "drop" => End::Drop,
            "refuse" => End::Refuse,
            "revoke" => End::Revoke,
            "redirect" => End::Redirect(self.to.expect("to whom")),
            "revoke-into" => End::RevokeInto(self.to.expect("to whom")),
            other => panic!("{}: no end is called `{other}`", self.name),
        };
        let mut after = self.after.clone().unwrap_or_else(|| self.before.clone());
        after.sort();
        assert_eq!(
            (end, &after),
            (change.end, &change.flows),
            "{}: end, connections",
            self.name
        );
        let seen: Vec<_> = change
            .ledger
            .events
            .iter()
            .map(|event| EventKind::from_number(event.kind))
            .collect();
        let events = self.event.as_deref().unwrap_or_default().split_whitespace();
        assert_eq!(
            events.map(|name| Some(event_kind(name))).collect::<Vec<_>>(),
            seen,
            "{}: events",
            self.name
        );
        // The rest of the ledger follows from the case but for the events' content, which `events` checks.
        let events = change.ledger.events.clone();
        let wanted = Ledger {
            events,
            ..self.counters(end, change)
        };
        assert_eq!(wanted, change.ledger, "{}: counters", self.name);
    }

    /// Whether the program's own pod let it go on: what another pod refused did.
    fn passed_here(&self, end: End) -> bool {
        match end {
            End::Pass | End::PassOwn | End::Redirect(_) => true,
            End::Drop | End::Refuse | End::Revoke | End::RevokeInto(_) => self.refused_there,
            End::Divert | End::GivenBack(_) => false,
        }
    }

    fn counters(&self, end: End, change: &Change) -> Ledger {
        let bytes = u64::try_from(frame(&self.packet).len()).unwrap();
        let mut ledger = Ledger::default();
        if self.verdict != 0 {
            let connections = u64::from(self.packet.split_whitespace().nth(3).is_some_and(|f| f == "S"));
            let counter = VerdictCounter {
                packets: 1,
                bytes,
                connections,
            };
            ledger.verdicts.insert(self.verdict, counter);
        }
        let reasons = [self.reason, self.reason_there];
        for reason in reasons.into_iter().filter_map(Reason::from_number) {
            ledger.reasons.insert(reason, ReasonCounter { packets: 1, bytes });
        }
        // One at an interface that is no endpoint's belongs to none; what is not IP isn't counted there.
        if !change.ledger.endpoints.is_empty() {
            let endpoint = world::endpoint_at(self.at).unwrap_or(0);
            let passed = self.passed_here(end);
            let counter = ledger.endpoints.entry(endpoint).or_default();
            *match (self.program.is_to_pod(), passed) {
                (true, true) => &mut counter.to_pod_packets,
                (true, false) => &mut counter.to_pod_dropped,
                (false, true) => &mut counter.from_pod_packets,
                (false, false) => &mut counter.from_pod_dropped,
            } = 1;
        }
        if let Some(to) = self.to {
            let endpoint = world::endpoint_at(to).expect("an endpoint");
            let counter = ledger.endpoints.entry(endpoint).or_default();
            // What takes the place of a packet that is revoked here arrives there.
            let arrives = matches!(end, End::Redirect(_)) || !self.passed_here(end);
            *if arrives {
                &mut counter.to_pod_packets
            } else {
                &mut counter.to_pod_dropped
            } = 1;
        }
        ledger
    }
}

fn event_kind(name: &str) -> EventKind {
    match name {
        "new" => EventKind::New,
        "deny" => EventKind::Deny,
        "revoke" => EventKind::Revoke,
        "spoof" => EventKind::Spoof,
        "malformed" => EventKind::Malformed,
        "audit" => EventKind::Audit,
        "outbound" => EventKind::Outbound,
        "answered" => EventKind::Answered,
        other => panic!("no event is called `{other}`"),
    }
}

/// Protocols of the node's connections; none is TCP.
const PROTOCOLS: [(&str, u16); 4] = [("of-udp", 17), ("of-icmp", 1), ("of-icmp6", 58), ("of-sctp", 132)];

const FLAGS: [(&str, u32); 6] = [
    ("answered", FlowState::ANSWERED),
    ("local-fin", FlowState::LOCAL_FIN),
    ("remote-fin", FlowState::REMOTE_FIN),
    ("reset", FlowState::RESET),
    ("self", FlowState::SELF),
    ("direct", FlowState::DIRECT),
];

/// A remembered connection, parsed.
pub(crate) struct Remembered {
    pub(crate) table: FlowTable,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) flags: u32,
    /// 0 for TCP.
    pub(crate) protocol: u16,
}

impl Remembered {
    /// Reads `outbound 10.0.0.1:1 10.0.0.2:2 answered`.
    pub(crate) fn parse(line: &str) -> Self {
        let words: Vec<_> = line.split_whitespace().collect();
        let table = match words[0] {
            "outbound" => FlowTable::Outbound,
            "host" => FlowTable::Host,
            other => panic!("`{line}`: no table is called `{other}`"),
        };
        let flag = |word: &&str| {
            FLAGS
                .iter()
                .find(|(name, _)| name == word)
                .expect("a known flag")
                .1
        };
        let of = |word: &&str| PROTOCOLS.iter().find(|(name, _)| name == word);
        let protocol = words[3..].iter().find_map(of).map_or(0, |(_, number)| *number);
        let flags = words[3..]
            .iter()
            .filter(|word| of(word).is_none())
            .map(flag)
            .sum();
        Self {
            protocol,
            table,
            local: words[1].parse().unwrap(),
            remote: words[2].parse().unwrap(),
            flags,
        }
    }

    /// The id of the world's endpoint that owns the local address.
    pub(crate) fn endpoint(&self) -> u16 {
        let last = match self.local.ip() {
            IpAddr::V4(a) => a.octets()[3],
            IpAddr::V6(a) => a.octets()[15],
        };
        u16::from(last) - 1
    }
}

fn remember(node: &HostNode, line: &str) {
    if let Some(datagram) = Datagram::parse(line) {
        let (endpoint, flags) = (datagram.endpoint, datagram.flags);
        let noted = match datagram.key {
            DatagramKey::V4(key) => (&node).note4(endpoint, zerocopy::transmute!(key), flags),
            DatagramKey::V6(key) => (&node).note6(endpoint, zerocopy::transmute!(key), flags),
        };
        return assert!(noted, "`{line}` does not fit");
    }
    let flow = Remembered::parse(line);
    let fits = match key(&flow) {
        Key::V4(key) => (&node).open4(flow.table, &key, flow.flags),
        Key::V6(key) => (&node).open6(flow.table, &key, flow.flags),
    };
    assert!(fits, "`{line}` does not fit");
}

/// A key of either family.
pub(crate) enum Key {
    V4(Flow4),
    V6(Flow6),
}

/// The map key of a connection.
pub(crate) fn key(flow: &Remembered) -> Key {
    let endpoint = flow.endpoint();
    match (flow.local, flow.remote) {
        (SocketAddr::V4(local), SocketAddr::V4(remote)) => Key::V4(Flow4 {
            protocol: flow.protocol,
            ..Flow4::between(local, remote, endpoint)
        }),
        (SocketAddr::V6(local), SocketAddr::V6(remote)) => Key::V6(Flow6 {
            protocol: flow.protocol,
            ..Flow6::between(local, remote, endpoint)
        }),
        _ => panic!("two families"),
    }
}

fn flows(node: &HostNode) -> Vec<String> {
    let mut lines = if node.knows_datagrams() {
        datagrams(&node.datagrams4(), &node.datagrams6())
    } else {
        Vec::new()
    };
    for table in [FlowTable::Outbound, FlowTable::Host] {
        lines.extend(
            node.flows4(table)
                .iter()
                .map(|(key, state)| line4(table, key, state)),
        );
        lines.extend(
            node.flows6(table)
                .iter()
                .map(|(key, state)| line6(table, key, state)),
        );
    }
    lines.sort();
    lines
}

/// A remembered connection as cases write it.
pub(crate) fn line4(table: FlowTable, key: &Flow4, state: &FlowState) -> String {
    let (local, remote) = key.ends();
    line(table, local.into(), remote.into(), state) + of(key.protocol)
}

/// The same for IPv6.
pub(crate) fn line6(table: FlowTable, key: &Flow6, state: &FlowState) -> String {
    let (local, remote) = key.ends();
    line(table, local.into(), remote.into(), state) + of(key.protocol)
}

fn of(protocol: u16) -> &'static str {
    match protocol {
        0 => "",
        17 => " of-udp",
        1 => " of-icmp",
        58 => " of-icmp6",
        132 => " of-sctp",
        other => panic!("the protocol {other} has no name"),
    }
}

fn line(table: FlowTable, local: SocketAddr, remote: SocketAddr, state: &FlowState) -> String {
    let table = match table {
        FlowTable::Outbound => "outbound",
        FlowTable::Host => "host",
    };
    let flags: String = FLAGS
        .iter()
        .filter(|(_, bit)| state.flags() & bit != 0)
        .map(|(name, _)| format!(" {name}"))
        .collect();
    format!("{table} {local} {remote}{flags}")
}

const KINDS: [(&str, u32); 6] = [
    ("udp", datagram::UDP),
    ("udp-lite", datagram::UDP_LITE),
    ("sctp", datagram::SCTP),
    ("dccp", datagram::DCCP),
    ("echo", datagram::ECHO),
    ("fragment", datagram::FRAGMENT),
];

/// What is remembered of datagrams, parsed.
pub(crate) struct Datagram {
    pub(crate) endpoint: u16,
    pub(crate) key: DatagramKey,
    pub(crate) flags: u32,
}

/// A key of either family.
pub(crate) enum DatagramKey {
    V4(Datagram4),
    V6(Datagram6),
}

impl Datagram {
    /// Reads `udp 10.0.0.1:1 10.0.0.2:2 needed`; none for a connection.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let (_, kind) = *KINDS.iter().find(|(name, _)| *name == words[0])?;
        let flag = |word: &&str| match *word {
            "inbound" => datagram::INBOUND,
            "needed" => datagram::NEEDED,
            other => panic!("`{line}`: no flag is called `{other}`"),
        };
        let flow = Remembered {
            table: FlowTable::Outbound,
            local: words[1].parse().unwrap(),
            remote: words[2].parse().unwrap(),
            flags: 0,
            protocol: 0,
        };
        let (local_port, remote_port) = (flow.local.port().to_be_bytes(), flow.remote.port().to_be_bytes());
        Some(Self {
            endpoint: flow.endpoint(),
            key: match flow.remote.ip() {
                IpAddr::V4(remote) => DatagramKey::V4(Datagram4 {
                    remote: remote.octets(),
                    local_port,
                    remote_port,
                }),
                IpAddr::V6(remote) => DatagramKey::V6(Datagram6 {
                    remote: remote.octets(),
                    local_port,
                    remote_port,
                    detail: [0; 4],
                }),
            },
            flags: kind | words[3..].iter().map(flag).sum::<u32>(),
        })
    }
}

/// What is remembered of datagrams, as cases write it.
pub(crate) fn datagrams(four: &DatagramWords<'_>, six: &DatagramWords<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    for endpoint in 1..16_u16 {
        for (key, state) in four.entries::<{ datagram::DATAGRAM4_WORDS }>(endpoint) {
            let key: Datagram4 = zerocopy::transmute!(key);
            let remote = SocketAddr::from((key.remote, u16::from_be_bytes(key.remote_port)));
            let low = u8::try_from(endpoint).unwrap() + 1;
            let local = SocketAddr::from(([10, 244, 0, low], u16::from_be_bytes(key.local_port)));
            lines.push(datagram_line(local, remote, state));
        }
        for (key, state) in six.entries::<{ datagram::DATAGRAM6_WORDS }>(endpoint) {
            let key: Datagram6 = zerocopy::transmute!(key);
            let remote = SocketAddr::from((key.remote, u16::from_be_bytes(key.remote_port)));
            let local: IpAddr = format!("fd00:10:244::{:x}", endpoint + 1).parse().unwrap();
            let local = SocketAddr::from((local, u16::from_be_bytes(key.local_port)));
            lines.push(datagram_line(local, remote, state));
        }
    }
    lines.sort();
    lines
}

fn datagram_line(local: SocketAddr, remote: SocketAddr, state: FlowState) -> String {
    let flags = state.flags();
    let kind = KINDS.iter().find(|(_, kind)| *kind == flags & datagram::KIND);
    let mut line = format!("{} {local} {remote}", kind.expect("a known kind").0);
    for (name, bit) in [("inbound", datagram::INBOUND), ("needed", datagram::NEEDED)] {
        if flags & bit != 0 {
            line = format!("{line} {name}");
        }
    }
    line
}
