//! A flow as the admin API tells it, out of events and sockets.
//!
//! Invariant: source is who opened the connection, whichever end it was seen at.

use std::net::SocketAddr;

use thyra_datapath::{Connection, Held};
use thyra_datapath_abi::Event;
use thyra_proto::thyra::v1 as api;

use super::Key;
use crate::monitor::{Namer, address};

/// `Flow.state` of a connection that is not over.
const OPEN: &str = "open";
/// Of one that is.
pub(super) const CLOSED: &str = "closed";
/// Of refusals.
const DENIED: &str = "denied";
/// `Flow.direction` of what comes to the endpoint.
pub(super) const IN: &str = "in";
/// Of what it sends.
pub(super) const OUT: &str = "out";
/// IP protocol number of TCP.
const TCP: u8 = 6;

/// The connection that an event tells of, seen from its endpoint; none of another protocol.
pub(super) fn key(event: &Event) -> Option<Key> {
    let end = |bytes, port| SocketAddr::new(address(bytes), u16::from_be_bytes(port));
    let source = end(event.source, event.source_port);
    let destination = end(event.destination, event.destination_port);
    let (local, remote) = if event.flags & Event::FROM_POD != 0 {
        (source, destination)
    } else {
        (destination, source)
    };
    (event.protocol == TCP && event.endpoint != 0).then_some(Key {
        endpoint: event.endpoint,
        local,
        remote,
    })
}

/// The connection that a SYN begins.
pub(super) fn begun(event: &Event, namer: &Namer<'_>) -> api::Flow {
    let name = namer.name(event);
    let destination_principal = namer.identity(address(event.destination)).1;
    api::Flow {
        state: OPEN.to_owned(),
        destination_principal,
        ..told(&name)
    }
}

/// Refusals of one kind.
pub(super) fn denied(event: &api::MonitorEvent, namer: &Namer<'_>) -> api::Flow {
    let destination = event.destination.parse().ok();
    let principal = destination.map(|address| namer.identity(address).1);
    api::Flow {
        state: DENIED.to_owned(),
        end_unix_ms: Some(event.time_unix_ms),
        destination_principal: principal.unwrap_or_default(),
        denied_packets: event.count,
        ..told(event)
    }
}

fn told(event: &api::MonitorEvent) -> api::Flow {
    let event = event.clone();
    let direction = if event.direction == "from_pod" { OUT } else { IN };
    api::Flow {
        direction: direction.to_owned(),
        endpoint: event.endpoint,
        source: event.source,
        source_port: event.source_port,
        source_workload: event.source_workload,
        source_identity: event.source_identity,
        source_principal: event.source_principal,
        destination: event.destination,
        destination_port: event.destination_port,
        destination_workload: event.destination_workload,
        destination_identity: event.destination_identity,
        protocol: event.protocol,
        verdict: event.verdict,
        start_unix_ms: event.time_unix_ms,
        ..api::Flow::default()
    }
}

/// A connection whose beginning nobody saw: without a start and a verdict.
pub(super) fn found(endpoint: u16, connection: &Connection, namer: &Namer<'_>) -> api::Flow {
    let (source, destination, direction) = if connection.accepted {
        (connection.remote, connection.local, IN)
    } else {
        (connection.local, connection.remote, OUT)
    };
    let (source_identity, source_principal) = namer.identity(source.ip());
    let (destination_identity, destination_principal) = namer.identity(destination.ip());
    api::Flow {
        state: OPEN.to_owned(),
        direction: direction.to_owned(),
        endpoint: endpoint.into(),
        source: source.ip().to_string(),
        source_port: source.port().into(),
        source_workload: namer.workload(source.ip()),
        source_identity,
        source_principal,
        destination: destination.ip().to_string(),
        destination_port: destination.port().into(),
        destination_workload: namer.workload(destination.ip()),
        destination_identity,
        destination_principal,
        protocol: "tcp".to_owned(),
        ..api::Flow::default()
    }
}

/// Writes down what went over a connection so far; what is not told leaves what was.
pub(super) fn traffic(flow: &mut api::Flow, held: &Held) {
    let Some(traffic) = held.traffic else {
        return;
    };
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let (sent, received) = (
        (traffic.bytes_sent, traffic.packets_sent),
        (traffic.bytes_received, traffic.packets_received),
    );
    let (there, back) = if flow.direction == OUT {
        (sent, received)
    } else {
        (received, sent)
    };
    flow.traffic = Some(api::FlowTraffic {
        bytes_to_destination: there.0,
        bytes_to_source: back.0,
        packets_to_destination: there.1,
        packets_to_source: back.1,
        retransmits: traffic.retransmits,
        min_rtt_us: traffic.min_rtt.map(micros),
        rtt_us: traffic.rtt.map(micros),
    });
}
