//! Events as they happen: from the kernel's ring and from the agent itself, to whoever listens.
//!
//! Invariant: a listener that is too slow misses events and is told how many; it never slows the agent.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use thyra_datapath::Datapath;
use thyra_datapath_abi::tables::Verdict;
use thyra_datapath_abi::{Action, Event, EventKind, Reason};
use thyra_node_proxy_bridge::records::{Decision, Record, What};
use thyra_proto::thyra::v1 as api;
use tokio::sync::broadcast;

use crate::admin::verdict;
use crate::denied::Second;
use crate::flows::Now;
use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};
use crate::word;

/// What a listener may fall behind; requests come by the hundred (`thyra_node_proxy_bridge::listener`).
const BACKLOG: usize = 4096;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Seen {
    /// In the kernel.
    Kernel(Arc<Vec<Event>>),
    /// At Envoy: a request or another stream, and milliseconds since the epoch when it was told.
    Request(u64, Arc<Record>),
    /// What was refused in the kernel in the last second; milliseconds since the epoch when it ended.
    Denied(u64, Arc<Second>),
    /// So many events of the kernel were lost; milliseconds since the epoch when that was found out.
    Lost(u64, u64),
    /// In the agent; milliseconds since the epoch and a sentence.
    Agent(u64, Arc<str>),
}

/// The hub.
#[derive(Clone, Debug)]
pub struct Hub(broadcast::Sender<Seen>);

impl Default for Hub {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Hub {
    /// Tells listeners what the agent did.
    pub fn agent(&self, message: String) {
        self.tell(Seen::Agent(unix_ms(), Arc::from(message)));
    }

    /// A new listener.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<Seen> {
        self.0.subscribe()
    }

    /// How many listen.
    #[must_use]
    pub fn listeners(&self) -> usize {
        self.0.receiver_count()
    }

    /// Without a listener there is nobody to tell.
    fn tell(&self, seen: Seen) {
        drop(self.0.send(seen));
    }

    /// Tells listeners what Envoy judged.
    pub fn judged(&self, record: Arc<Record>) {
        self.tell(Seen::Request(unix_ms(), record));
    }

    /// Tells listeners what happened in the kernel.
    pub fn kernel(&self, batch: Vec<Event>) {
        self.tell(Seen::Kernel(Arc::new(batch)));
    }

    /// Tells listeners what was refused in a second.
    pub fn denied(&self, second: Second) {
        self.tell(Seen::Denied(unix_ms(), Arc::new(second)));
    }

    /// Tells listeners that nobody heard of so many events.
    pub fn lost(&self, events: u64) {
        self.tell(Seen::Lost(unix_ms(), events));
    }
}

/// Names what an event holds.
pub struct Namer<'a> {
    /// Names of addresses.
    pub snapshot: &'a Snapshot,
    /// Names of verdicts.
    pub plane: &'a SharedPlane,
}

impl Namer<'_> {
    /// The event as the admin API tells it.
    #[must_use]
    pub fn name(&self, event: &Event) -> api::MonitorEvent {
        let kind = EventKind::from_number(event.kind);
        let (source, destination) = (address(event.source), address(event.destination));
        let from_pod = event.flags & Event::FROM_POD != 0;
        let flag = |bit: u8| event.flags & bit != 0;
        let (source_identity, source_principal) = self.identity(source);
        api::MonitorEvent {
            time_unix_ms: unix_ms_of(event.time_ns),
            kind: kind.map_or("malformed", word::event).to_owned(),
            endpoint: u32::from(event.endpoint),
            source: source.to_string(),
            source_port: u32::from(u16::from_be_bytes(event.source_port)),
            destination: destination.to_string(),
            destination_port: u32::from(u16::from_be_bytes(event.destination_port)),
            source_identity,
            source_principal,
            source_workload: self.workload(source),
            destination_workload: self.workload(destination),
            destination_identity: self.identity(destination).0,
            verdict: self.verdict(event, kind),
            tcp_flags: tcp_flags(event.tcp_flags),
            length: event.length,
            generation: u64::from(event.generation),
            protocol: protocol(event.protocol),
            direction: if from_pod { "from_pod" } else { "to_pod" }.to_owned(),
            message: String::new(),
            host: flag(Event::HOST),
            own_service: flag(Event::SELF),
            reset_sent: flag(Event::RESET_SENT),
            count: 1,
        }
    }

    /// A request, or another stream at Envoy, as the admin API tells it.
    #[must_use]
    pub fn request(&self, time_unix_ms: u64, record: &Record) -> api::MonitorEvent {
        let (source, destination) = (record.client.ip(), record.pod.ip());
        let (source_identity, source_principal) = self.identity(source);
        let endpoint = self.snapshot.endpoint_of(destination).unwrap_or(0);
        let (action, reason, rule) = match &record.decision {
            Decision::Allowed(Some(rule)) => (Action::Allow, Reason::PolicyAllow, Some(rule)),
            // A stream that no rule asks anything of isn't told.
            Decision::Allowed(None) if !matches!(record.what, What::Request { .. }) => {
                (Action::Allow, Reason::PolicyAllow, None)
            }
            Decision::Allowed(None) => (Action::Allow, Reason::NoPolicy, None),
            Decision::Denied(Some(rule)) => (Action::Deny, Reason::PolicyDeny, Some(rule)),
            Decision::Denied(None) => (Action::Deny, Reason::Policy, None),
            Decision::BadToken(_) => (Action::Deny, Reason::PolicyDeny, None),
            Decision::Unauthorized(rule) | Decision::Unchecked(rule) => {
                (Action::Deny, Reason::Unauthorized, rule.as_ref())
            }
            // By the rules, or it was no plain request: Envoy doesn't say which.
            Decision::Refused if matches!(record.what, What::Held { .. }) => {
                (Action::Deny, Reason::PolicyDeny, None)
            }
            Decision::Refused => (Action::Deny, Reason::NotHttp, None),
            Decision::Unjudged(_) => (Action::Deny, Reason::NeedsL7, None),
        };
        let (kind, protocol, message) = told(record);
        let verdict = Verdict {
            action,
            reason,
            rule: rule.cloned(),
            because: Vec::new(),
            residual: None,
            would: None,
        };
        api::MonitorEvent {
            time_unix_ms,
            kind: kind.to_owned(),
            endpoint: u32::from(endpoint),
            source: source.to_string(),
            source_port: u32::from(record.client.port()),
            destination: destination.to_string(),
            destination_port: u32::from(record.pod.port()),
            source_identity,
            source_principal,
            source_workload: self.workload(source),
            destination_workload: self.workload(destination),
            destination_identity: self.identity(destination).0,
            verdict: Some(api::Verdict {
                enforced_by: verdict::WITH_ENVOY.to_owned(),
                ..verdict::to_api(&verdict)
            }),
            generation: u64::from(self.snapshot.generation),
            protocol: protocol.to_owned(),
            direction: "to_pod".to_owned(),
            message,
            count: 1,
            ..api::MonitorEvent::default()
        }
    }

    /// The verdict with its rule, or the bare reason where no policy was asked.
    fn verdict(&self, event: &Event, kind: Option<EventKind>) -> Option<api::Verdict> {
        let known = if event.verdict == 0 {
            None
        } else {
            lock::read(self.plane).verdict(event.verdict)
        };
        if let Some(known) = known {
            return Some(verdict::to_api(&known));
        }
        let reason = Reason::from_number(event.reason)?;
        let passed = matches!(kind, Some(EventKind::New | EventKind::Outbound));
        let action = if passed { Action::Allow } else { Action::Deny };
        Some(verdict::to_api(&Verdict {
            action,
            reason,
            rule: None,
            because: Vec::new(),
            residual: None,
            would: None,
        }))
    }

    /// Number and principal of an address; 0 and empty where it has none.
    #[must_use]
    pub fn identity(&self, address: IpAddr) -> (u32, String) {
        let class = self.snapshot.class(address);
        class.map_or((0, String::new()), |c| {
            (c.identity, c.principal.as_deref().unwrap_or_default().to_owned())
        })
    }

    /// "ns/pod" of an address, or empty.
    #[must_use]
    pub fn workload(&self, address: IpAddr) -> String {
        self.snapshot
            .owner(address)
            .map_or_else(String::new, |(namespace, name)| format!("{namespace}/{name}"))
    }
}

/// Kind, protocol and words of what Envoy judged.
fn told(record: &Record) -> (&'static str, &'static str, String) {
    let took = record.took.as_secs_f64() * 1e3;
    let why = match &record.decision {
        Decision::BadToken(why) => format!(", token refused: {why}"),
        Decision::Unauthorized(_) => ", refused by the authorizer".to_owned(),
        Decision::Unchecked(_) => ", the authorizer gave no answer".to_owned(),
        Decision::Unjudged(why) => format!(", refused: {why}"),
        Decision::Allowed(_) | Decision::Denied(_) | Decision::Refused => String::new(),
    };
    let named = |name: &str| {
        if name.is_empty() {
            "no server name".to_owned()
        } else {
            name.to_owned()
        }
    };
    match &record.what {
        What::Request { method, path, status } => {
            let message = format!("{method} {path} {status} in {took:.1} ms{why}");
            ("request", "http", message)
        }
        What::Stream {
            server_name,
            received,
            sent,
        } => {
            let name = named(server_name);
            let message = format!("{name}, {received} bytes in, {sent} out in {took:.1} ms{why}");
            ("stream", "tcp", message)
        }
        What::Held { server_name } => {
            let name = server_name.as_deref().map(named);
            let name = name.map_or_else(String::new, |name| format!("{name}, "));
            ("stream", "tcp", format!("{name}held for {took:.1} ms{why}"))
        }
    }
}

/// Addresses of events are v4-mapped where they are IPv4.
#[must_use]
pub fn address(bytes: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
}

fn tcp_flags(bits: u8) -> String {
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    let set = names
        .iter()
        .enumerate()
        .filter(|(i, _)| bits & (1 << i) != 0)
        .map(|(_, n)| *n);
    set.collect::<Vec<_>>().join(",")
}

fn protocol(number: u8) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        1 | 58 => "icmp".to_owned(),
        132 => "sctp".to_owned(),
        other => other.to_string(),
    }
}

fn unix_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// Now, on both clocks.
#[must_use]
pub fn now() -> Now {
    Now {
        unix_ms: unix_ms(),
        boot_ns: Datapath::now_ns(),
    }
}

/// An event's clock is the kernel's monotonic one.
fn unix_ms_of(time_ns: u64) -> u64 {
    let now = now();
    now.unix_ms
        .saturating_sub(now.boot_ns.saturating_sub(time_ns) / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_named_from_the_lowest_bit() {
        assert_eq!(tcp_flags(0x02), "SYN");
        assert_eq!(tcp_flags(0x12), "SYN,ACK");
        assert_eq!(tcp_flags(0), "");
    }

    #[test]
    fn a_mapped_address_is_shown_as_ipv4() {
        let mapped = "::ffff:10.0.0.1".parse::<Ipv6Addr>().expect("literal").octets();
        assert_eq!(address(mapped).to_string(), "10.0.0.1");
    }

    #[test]
    fn an_agent_event_reaches_a_listener_and_nobody_is_no_error() {
        let hub = Hub::default();
        hub.agent("unheard".into());
        let mut listener = hub.listen();
        hub.agent("heard".into());
        assert!(matches!(listener.try_recv(), Ok(Seen::Agent(_, text)) if &*text == "heard"));
    }
}
