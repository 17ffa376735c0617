//! What the flow log is made of, from live connections: events of their beginning and answer, and the sockets that end.

use std::io::Read as _;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use thyra_datapath::abi::{Control, Event, EventKind};
use thyra_datapath::{Config, Datapath, EventReader, SocketWatch, Traffic};

use crate::node::{Fate, chain, config, echoes, on_a_node, runtime};
use crate::{FRIEND, PORT, SERVER, STRANGER, families, pods, tables_of_both};

/// An emulated CPU is some twenty times slower than a real one.
const PATIENCE: Duration = Duration::from_secs(60);

fn logging() -> Datapath {
    let config = Config {
        report_new: false,
        flow_log: Some(0),
        ..config()
    };
    let mut datapath = Datapath::open(config).unwrap_or_else(|e| panic!("{}", chain(&e)));
    let tables = tables_of_both(&mut datapath);
    datapath.commit(&tables, 1).unwrap();
    for pod in [FRIEND, SERVER] {
        datapath
            .attach(&pod.spec())
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
    }
    datapath
}

/// Events up to the refusal of the stranger, who knocks last: none comes behind it that was to come before.
async fn heard(reader: &mut EventReader) -> Vec<Event> {
    assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Refused);
    let mut events = Vec::new();
    loop {
        let batch = tokio::time::timeout(PATIENCE, reader.next_batch()).await;
        events.extend(batch.expect("events come").unwrap());
        if let Some(last) = events.iter().position(|event: &Event| event.kind == 2) {
            events.truncate(last);
            return events;
        }
    }
}

/// Sends and gets back four bytes; both ends are closed afterwards.
fn converse(to: IpAddr) -> TcpStream {
    let mut stream = FRIEND.connect(to, PORT).unwrap();
    assert!(echoes(&stream));
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the server closes, too");
    stream
}

/// What went over the socket on the server's `PORT` that ends next.
async fn ended(watch: &mut SocketWatch, peer: IpAddr) -> Traffic {
    loop {
        let batch = tokio::time::timeout(PATIENCE, watch.next_batch()).await;
        let batch = batch.expect("it ends").unwrap();
        let ours = |held: &&thyra_datapath::Held| {
            held.connection.local.port() == PORT && held.connection.remote.ip() == peer
        };
        if let Some(held) = batch.sockets.iter().find(ours) {
            return held.traffic.expect("the kernel counts");
        }
    }
}

#[test]
fn a_connection_is_heard_of_at_both_ends_and_its_data_at_none() {
    on_a_node(
        "flow_log::a_connection_is_heard_of_at_both_ends_and_its_data_at_none",
        || {
            pods();
            let datapath = logging();
            runtime().block_on(async {
                let mut reader = datapath.events().unwrap();
                let mut watch = SocketWatch::open(Path::new("/run/netns/pod4")).unwrap();
                for (to, peer) in families(SERVER).into_iter().zip(families(FRIEND)) {
                    let before = Datapath::now_ns();
                    converse(to);
                    let events = heard(&mut reader).await;
                    let kinds: Vec<_> = events
                        .iter()
                        .map(|e| (EventKind::from_number(e.kind).unwrap(), e.flags & Event::FROM_POD))
                        .collect();
                    let wanted = [
                        (EventKind::Outbound, Event::FROM_POD),
                        (EventKind::New, 0),
                        (EventKind::Answered, Event::FROM_POD),
                        (EventKind::Answered, 0),
                    ];
                    assert_eq!(kinds, wanted, "{to}");
                    assert!(events.iter().all(|e| e.sequence == events[0].sequence));
                    let times: Vec<u64> = events.iter().map(|e| e.time_ns).collect();
                    assert!(times.is_sorted() && times[0] > before, "{before}: {times:?}");
                    let traffic = ended(&mut watch, peer).await;
                    // And the FIN.
                    assert_eq!((traffic.bytes_sent, traffic.bytes_received), (4, 5));
                    assert!(
                        traffic.packets_sent >= 3 && traffic.packets_received >= 4,
                        "{traffic:?}"
                    );
                    assert!(traffic.min_rtt.is_some(), "{traffic:?}");
                }
            });
        },
    );
}

#[test]
fn what_the_log_does_not_take_is_not_reported() {
    on_a_node("flow_log::what_the_log_does_not_take_is_not_reported", || {
        pods();
        let mut datapath = logging();
        runtime().block_on(async {
            let mut reader = datapath.events().unwrap();
            datapath.set_flow_log(Some(1));
            let taken = Control(Control::flow_log(1));
            let (mut begun, mut turns) = (0, 0);
            // Half of them on average: numbers that nobody can foretell come both ways at last.
            while begun == 0 || begun == turns {
                converse(SERVER.v4());
                let events = heard(&mut reader).await;
                assert!(
                    events.iter().all(|event| taken.logs(event.sequence)),
                    "{events:?}"
                );
                assert!(
                    events.is_empty() || events.len() == 4,
                    "all of one or none: {events:?}"
                );
                turns += 1;
                begun += i32::from(!events.is_empty());
            }
            datapath.set_flow_log(None);
            converse(SERVER.v4());
            assert_eq!(heard(&mut reader).await, []);
        });
    });
}
