//! The flow log: by itself, and over the socket.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use thyra_agent::board::Board;
use thyra_agent::config::FlowLogChoice;
use thyra_agent::denied::Denied;
use thyra_agent::flows::{Flows, Now};
use thyra_agent::metrics::{Metrics, registry};
use thyra_agent::monitor::Namer;
use thyra_agent::registration::Registration;
use thyra_agent::requests::Requests;
use thyra_agent::snapshot::Snapshot;
use thyra_agent::store::SharedPlane;
use thyra_datapath::{Connection, EndedSockets, Held, Phase, Traffic};
use thyra_datapath_abi::{Event, EventKind, Reason};
use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::admin_service_client::AdminServiceClient;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::api::{Agent, MESH, allow, version};
use crate::plane::Remembering;
use crate::sample::pod;

const CLIENT: [u8; 4] = [10, 0, 1, 2];
const CART: [u8; 4] = [10, 0, 0, 2];
const NOW: Now = Now {
    unix_ms: u64::MAX,
    boot_ns: 0,
};
const PATIENCE: Duration = Duration::from_secs(60);

fn mapped(address: [u8; 4]) -> [u8; 16] {
    Ipv4Addr::from(address).to_ipv6_mapped().octets()
}

/// Something about the client's connection from `port` to the cart's port 8080, at the cart.
fn event(kind: EventKind, port: u16, sequence: u32, time_ns: u64) -> Event {
    let (client, cart) = ((CLIENT, port.to_be_bytes()), (CART, 8080_u16.to_be_bytes()));
    let is_answer = kind == EventKind::Answered;
    let (source, destination) = if is_answer { (cart, client) } else { (client, cart) };
    Event {
        time_ns,
        kind: (1..=8)
            .find(|number| EventKind::from_number(*number) == Some(kind))
            .expect("a kind"),
        endpoint: 1,
        source: mapped(source.0),
        source_port: source.1,
        destination: mapped(destination.0),
        destination_port: destination.1,
        sequence,
        protocol: 6,
        flags: if is_answer { Event::FROM_POD } else { 0 },
        reason: 245,
        ..Event::default()
    }
}

/// What the cart's stack has of it.
fn held(port: u16, traffic: Option<Traffic>) -> Held {
    Held {
        connection: Connection {
            local: SocketAddr::from((CART, 8080)),
            remote: SocketAddr::from((CLIENT, port)),
            accepted: true,
            phase: Phase::Closed,
        },
        traffic,
    }
}

fn some_traffic() -> Traffic {
    Traffic {
        bytes_sent: 2_000,
        bytes_received: 101,
        packets_sent: 4,
        packets_received: 5,
        retransmits: 1,
        min_rtt: Some(Duration::from_micros(70)),
        rtt: Some(Duration::from_micros(90)),
    }
}

/// Runs `work` with names of nothing.
fn unnamed<T>(work: impl FnOnce(&Namer<'_>) -> T) -> T {
    let plane: SharedPlane = Arc::new(RwLock::new(Box::new(Remembering::default())));
    let snapshot = Snapshot::default();
    work(&Namer {
        snapshot: &snapshot,
        plane: &plane,
    })
}

fn log(sampling: u8, events: &[Event]) -> Flows {
    let flows = Flows::new(FlowLogChoice::All, sampling);
    unnamed(|namer| flows.seen(events, namer, NOW));
    flows
}

fn all(flows: &Flows) -> Vec<api::Flow> {
    flows.list(&|_| true)
}

#[test]
fn a_connection_is_logged_with_its_answer_and_what_went_over_it() {
    let flows = log(
        0,
        &[
            event(EventKind::New, 40_000, 7, 1_000_000),
            event(EventKind::Answered, 40_000, 7, 1_250_000),
            // Sent again: the first answer counts.
            event(EventKind::Answered, 40_000, 7, 9_000_000),
        ],
    );
    let open = &all(&flows)[0];
    assert_eq!((open.state.as_str(), open.direction.as_str()), ("open", "in"));
    assert_eq!((open.source_port, open.destination_port), (40_000, 8080));
    assert_eq!(
        (open.connect_us, open.end_unix_ms, open.traffic),
        (Some(250), None, None)
    );
    assert_eq!(
        open.verdict.as_ref().expect("why").reason,
        Reason::NotEnforced.text()
    );
    let mut ended = flows.listen();
    flows.over(1, &[held(40_000, Some(some_traffic())), held(1, None)], NOW);
    let closed = ended.try_recv().expect("told");
    assert!(ended.try_recv().is_err(), "and nothing else");
    assert_eq!(all(&flows), std::slice::from_ref(&closed));
    assert_eq!(
        (closed.state.as_str(), closed.end_unix_ms),
        ("closed", Some(u64::MAX))
    );
    let traffic = closed.traffic.expect("known");
    assert_eq!(
        (traffic.bytes_to_destination, traffic.bytes_to_source),
        (101, 2_000)
    );
    assert_eq!(
        (traffic.packets_to_destination, traffic.packets_to_source),
        (5, 4)
    );
    let counted = flows.counted();
    let (ends, pair) = counted.iter().next().expect("a pair");
    assert_eq!((ends.reporter, ends.source.as_str()), ("destination", "unknown"));
    assert_eq!(
        (
            pair.opened,
            pair.closed,
            pair.connect.total(),
            pair.min_rtt.total()
        ),
        (1, 1, 1, 1)
    );
    assert_eq!(
        (pair.connect.buckets[2], pair.min_rtt.buckets[1]),
        (1, 1),
        "bounds are inclusive"
    );
}

#[test]
fn a_syn_that_is_sent_again_is_the_same_connection_and_another_number_a_new_one() {
    let flows = log(
        0,
        &[
            event(EventKind::New, 40_000, 7, 1_000_000),
            event(EventKind::New, 40_000, 7, 1_001_000_000),
            // Of an earlier connection with these ports.
            event(EventKind::Answered, 40_000, 6, 1_001_000_001),
            event(EventKind::Answered, 40_000, 7, 1_001_500_000),
        ],
    );
    assert_eq!(all(&flows).len(), 1);
    assert_eq!(all(&flows)[0].connect_us, Some(1_000_500));
    unnamed(|namer| flows.seen(&[event(EventKind::New, 40_000, 8, 2_000_000_000)], namer, NOW));
    let states: Vec<String> = all(&flows).into_iter().map(|flow| flow.state).collect();
    assert_eq!(states, ["closed", "open"]);
}

#[test]
fn a_log_takes_what_it_samples_and_nothing_when_it_is_off() {
    // A listener of events has all of them reported.
    let events: Vec<Event> = (0..64)
        .map(|n| event(EventKind::New, n, u32::from(n), 1))
        .collect();
    assert_eq!(all(&log(4, &events)).len(), 4);
    let off = Flows::new(FlowLogChoice::Denied, 0);
    unnamed(|namer| off.seen(&events, namer, NOW));
    assert_eq!((all(&off).len(), off.reports()), (0, None));
}

#[test]
fn what_its_pods_stack_does_not_hold_is_over_unless_it_has_just_begun() {
    let began = 5_000_000_000;
    let flows = log(
        0,
        &[
            event(EventKind::New, 1, 7, began),
            event(EventKind::New, 2, 7, began),
        ],
    );
    let at = |boot_ns| Now { boot_ns, ..NOW };
    let states = || -> Vec<String> { all(&flows).into_iter().map(|flow| flow.state).collect() };
    flows.held(1, &[held(2, Some(some_traffic()))], at(began + 1_000_000));
    assert_eq!(states(), ["open", "open"]);
    assert_eq!(all(&flows)[1].traffic.expect("so far").retransmits, 1);
    flows.held(2, &[], at(began + 60_000_000_000));
    assert_eq!(states(), ["open", "open"], "another endpoint's are no matter");
    flows.held(1, &[held(2, None)], at(began + 60_000_000_000));
    assert_eq!(states(), ["closed", "open"]);
    flows.gone(1, NOW);
    assert_eq!(states(), ["closed", "closed"]);
}

#[test]
fn old_flows_make_room_and_are_counted() {
    let flows = Flows::new(FlowLogChoice::All, 0);
    let batch: Vec<Event> = (0..9_000).map(|port| event(EventKind::New, port, 7, 1)).collect();
    unnamed(|namer| flows.seen(&batch, namer, NOW));
    let forgotten = flows.standing().forgotten;
    assert_eq!(
        all(&flows).len() + usize::try_from(forgotten).expect("few"),
        9_000
    );
    assert!(forgotten > 0, "or the test shows nothing");
    flows.gone(1, NOW);
    let left = all(&flows).len();
    assert_eq!(
        left + usize::try_from(flows.standing().forgotten).expect("few"),
        9_000
    );
}

#[test]
fn refusals_of_a_kind_are_one_event_a_second_with_their_number() {
    let mut denied = Denied::default();
    let second = unnamed(|namer| {
        let refused: Vec<Event> = (0..500).map(|port| event(EventKind::Deny, port, 7, 1)).collect();
        denied.add(&refused, namer);
        let elsewhere = Event {
            destination_port: 22_u16.to_be_bytes(),
            ..event(EventKind::Deny, 1, 7, 1)
        };
        denied.add(&[elsewhere, event(EventKind::New, 1, 7, 1)], namer);
        denied.take(namer)
    });
    let counts: Vec<(u32, u64)> = second
        .events
        .iter()
        .map(|e| (e.destination_port, e.count))
        .collect();
    assert_eq!((counts, second.others), (vec![(22, 1), (8080, 500)], 0));
    let rest = unnamed(|namer| {
        for port in 0..3_000_u16 {
            let scanned = Event {
                destination_port: port.to_be_bytes(),
                ..event(EventKind::Deny, 1, 7, 1)
            };
            denied.add(&[scanned], namer);
        }
        denied.take(namer)
    });
    let told: u64 = rest.events.iter().map(|event| event.count).sum();
    assert_eq!(told + rest.others, 3_000, "every refusal is in one count");
    assert!(rest.others > 0, "or the bound is not tried");
}

#[test]
fn a_scrape_has_the_latency_of_each_pair() {
    let flows = log(
        0,
        &[
            event(EventKind::New, 40_000, 7, 1_000_000),
            event(EventKind::Answered, 40_000, 7, 1_250_000),
        ],
    );
    flows.over(1, &[held(40_000, Some(some_traffic()))], NOW);
    let plane: SharedPlane = Arc::new(RwLock::new(Box::new(Remembering::default())));
    let registry = registry(
        &Metrics::default(),
        plane,
        Arc::new(Board::default()),
        Arc::new(Requests::default()),
        Arc::new(flows),
    );
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("a string takes all");
    let pair = r#"reporter="destination",source="unknown",destination="unknown""#;
    for line in [
        format!("thyra_tcp_connections_opened_total{{{pair}}} 1"),
        format!("thyra_tcp_bytes_total{{{pair},direction=\"to_source\"}} 2000"),
        format!("thyra_tcp_connect_duration_seconds_count{{{pair}}} 1"),
        format!("thyra_tcp_connect_duration_seconds_bucket{{le=\"0.00025\",{pair}}} 1"),
        format!("thyra_tcp_min_rtt_seconds_count{{{pair}}} 1"),
    ] {
        // Labels come in any order.
        let parts = |line: &str| {
            let mut parts: Vec<String> = line.split([',', '{', '}']).map(str::to_owned).collect();
            parts.sort();
            parts
        };
        assert!(
            text.lines().any(|found| parts(found) == parts(&line)),
            "{line}\n{text}"
        );
    }
}

struct Inputs {
    events: mpsc::Sender<Vec<Event>>,
    ended: mpsc::Sender<EndedSockets>,
}

/// An agent that logs all connections of the cart, whose kernel says what the test has it say.
async fn logging() -> (Agent, Inputs) {
    let (plane, netns) = (Remembering::default(), "/run/netns/cart");
    let ((events, ring), (ended, sockets)) = (mpsc::channel(8), mpsc::channel(8));
    plane.with(|told| {
        told.events = Some(ring);
        told.ended.insert(netns.into(), sockets);
        told.connections.insert(1, Vec::new());
    });
    let files = [("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))];
    let agent = Agent::on(plane, &files, |settings| {
        settings.flow_log = Some(FlowLogChoice::All);
    });
    let cart = Registration {
        netns: netns.into(),
        ..pod("cart", "veth-cart", "10.0.0.2")
    };
    assert_eq!(agent.add(cart).await.id, 1);
    // What is seen before the manifests are read has no names.
    let mut admin = AdminServiceClient::new(agent.channel().await);
    admin.wait_enforced(version("1")).await.expect("enforced");
    (agent, Inputs { events, ended })
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("in time")
}

fn to(to: &str) -> Option<api::FlowFilter> {
    Some(api::FlowFilter {
        to: to.into(),
        ..api::FlowFilter::default()
    })
}

async fn filters_are_kept_and_read(admin: &mut AdminServiceClient<Channel>) {
    let none = api::ListFlowsRequest {
        filter: to("shop/other"),
    };
    let listed = admin.list_flows(none).await.expect("listed").into_inner();
    assert!(listed.flows.is_empty());
    let wrong = api::FlowFilter {
        verdict: "maybe".into(),
        ..api::FlowFilter::default()
    };
    let refused = admin
        .list_flows(api::ListFlowsRequest { filter: Some(wrong) })
        .await;
    assert!(
        refused
            .expect_err("no such verdict")
            .message()
            .contains("allow, deny, audit")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_ends_is_told_to_whoever_follows_and_listed_with_its_names() {
    let (agent, inputs) = logging().await;
    assert_eq!(agent.plane.with(|told| told.flow_log), Some(0));
    let mut admin = AdminServiceClient::new(agent.channel().await);
    let request = api::WatchFlowsRequest {
        filter: to("shop/cart"),
    };
    let mut followed = admin.watch_flows(request).await.expect("following").into_inner();
    let begun = vec![
        event(EventKind::New, 40_000, 7, 1_000_000),
        event(EventKind::Answered, 40_000, 7, 1_250_000),
    ];
    inputs.events.send(begun).await.expect("read");
    let listed = async {
        loop {
            let request = api::ListFlowsRequest {
                filter: to("shop/cart"),
            };
            let reply = admin.list_flows(request).await.expect("listed").into_inner();
            if reply.flows.iter().any(|flow| flow.connect_us.is_some()) {
                return reply;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let listed = within(listed).await;
    assert_eq!(listed.flows[0].source_principal, "cluster.local/ns/shop/sa/front");
    assert_eq!(
        listed.flows[0].destination_principal,
        "cluster.local/ns/shop/sa/cart"
    );
    assert_eq!(listed.log.expect("told").logged, "all");
    let sockets = vec![held(40_000, Some(some_traffic()))];
    inputs
        .ended
        .send(EndedSockets {
            sockets,
            overrun: false,
        })
        .await
        .expect("read");
    let flow = within(followed.message())
        .await
        .expect("no error")
        .expect("a flow");
    assert_eq!((flow.state.as_str(), flow.connect_us), ("closed", Some(250)));
    assert_eq!(flow.traffic.expect("known").bytes_to_source, 2_000);
    let pairs = admin
        .list_flow_pairs(api::ListFlowPairsRequest {})
        .await
        .expect("listed")
        .into_inner();
    assert_eq!((pairs.pairs[0].opened, pairs.pairs[0].closed), (1, 1));
    filters_are_kept_and_read(&mut admin).await;
    let plane = agent.plane.clone();
    drop(followed);
    agent.end().await;
    assert_eq!(plane.with(|told| told.flow_log), None, "nobody reads it any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_told_one_by_one_or_together_and_what_was_lost_to_everybody() {
    let (agent, inputs) = logging().await;
    let mut admin = AdminServiceClient::new(agent.channel().await);
    let mut listen = async |aggregate| {
        let request = api::MonitorRequest {
            kinds: vec!["drop".into()],
            to: "shop/cart".into(),
            aggregate,
            ..api::MonitorRequest::default()
        };
        admin.monitor(request).await.expect("listening").into_inner()
    };
    let (mut single, mut together) = (listen(false).await, listen(true).await);
    agent.plane.with(|told| told.lost = 7);
    let refused: Vec<Event> = (0..5).map(|port| event(EventKind::Deny, port, 7, 1)).collect();
    inputs.events.send(refused).await.expect("read");
    for (events, wanted) in [(&mut single, vec![1; 5]), (&mut together, vec![5])] {
        let (mut counts, mut lost) = (Vec::new(), 0);
        while counts != wanted || lost == 0 {
            let event = within(events.message())
                .await
                .expect("no error")
                .expect("an event");
            match event.kind.as_str() {
                "drop" => counts.push(event.count),
                "lost" => lost += event.count,
                other => panic!("{other}: {event:?}"),
            }
            assert!(counts.len() <= wanted.len(), "{counts:?}");
        }
        assert_eq!(lost, 7);
    }
    let status = admin
        .get_status(api::GetStatusRequest {})
        .await
        .expect("told")
        .into_inner();
    assert_eq!(status.lost_events, 7);
    let denied = api::FlowFilter {
        verdict: "deny".into(),
        ..api::FlowFilter::default()
    };
    let request = api::ListFlowsRequest { filter: Some(denied) };
    let flows = admin
        .list_flows(request)
        .await
        .expect("listed")
        .into_inner()
        .flows;
    assert_eq!((flows.len(), flows[0].denied_packets), (1, 5));
    assert_eq!(flows[0].destination_principal, "cluster.local/ns/shop/sa/cart");
    drop((single, together));
    agent.end().await;
}
