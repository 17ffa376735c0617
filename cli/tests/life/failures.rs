//! Connections that need L7 are opened while Envoy and the agent are killed, over and over.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use super::node::{Node, connect, get};

/// How many connections are tried, from how many threads.
const CONNECTIONS: u64 = 10_000;
const CLIENTS: usize = 4;
/// A slow machine tries fewer.
const LIMIT: Duration = Duration::from_secs(90);
/// Between two connections of a client, so that they outlast some kills.
const BREATH: Duration = Duration::from_millis(8);
/// Between two kills: the lab starts an agent again within a second or two.
const PAUSE: Duration = Duration::from_millis(1_500);

/// What became of the connections.
#[derive(Debug, Default)]
struct Fates {
    tried: AtomicU64,
    allowed: AtomicU64,
    denied: AtomicU64,
    /// Denied requests with any other answer than a refusal.
    wrong: AtomicU64,
    broken: AtomicU64,
}

impl Fates {
    fn client(&self, server: std::net::SocketAddr, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let number = self.tried.fetch_add(1, Ordering::Relaxed);
            if number >= CONNECTIONS {
                return;
            }
            let path = if number.is_multiple_of(2) {
                "/public"
            } else {
                "/admin"
            };
            let answer = connect(server).and_then(|mut stream| get(&mut stream, path));
            let fate = match (path, answer) {
                ("/public", Ok(200)) => &self.allowed,
                ("/admin", Ok(403 | 503)) => &self.denied,
                ("/admin", Ok(_)) => &self.wrong,
                (_, Ok(_) | Err(_)) => &self.broken,
            };
            fate.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(BREATH);
        }
    }
}

/// Says something on an open connection that needs no L7, again and again; how often it was answered.
fn talk(echo: std::net::SocketAddr, stop: &AtomicBool) -> std::io::Result<u64> {
    let mut stream = connect(echo)?;
    let mut answered = 0;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(b"ping\n")?;
        stream.read_exact(&mut [0; 5])?;
        answered += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(answered)
}

#[test]
fn no_denied_request_gets_past_while_envoy_and_the_agent_are_killed_in_a_loop() {
    let Some(node) = Node::up() else { return };
    let (stop, fates) = (Arc::new(AtomicBool::new(false)), Arc::new(Fates::default()));
    let (echo, server) = (node.echo(), node.server());
    let flag = Arc::clone(&stop);
    let talker = node.begin("shop.front", move || talk(echo, &flag));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (stop, fates) = (Arc::clone(&stop), Arc::clone(&fates));
            node.begin("shop.front", move || fates.client(server, &stop))
        })
        .collect();
    let begun = Instant::now();
    let (mut kills, mut back) = ([0, 0], Vec::new());
    while clients.iter().any(|client| !client.is_finished()) && begun.elapsed() < LIMIT {
        let which = usize::from(back.len() % 2 == 1);
        let victim = if which == 0 { node.envoy() } else { node.agent() };
        // One that is just being replaced is not there; one that has gone is noted a moment longer.
        if victim.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok()) {
            kills[which] += 1;
        }
        let killed = Instant::now();
        node.wait("requests are answered again", || {
            node.ask("/public").is_ok_and(|status| status == 200)
        });
        back.push(killed.elapsed());
        std::thread::sleep(PAUSE);
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("it ends well");
    }
    let answered = talker.join().expect("it ends well");
    back.sort();
    println!(
        "{fates:?}; envoy killed {} times, the agent {}; answered again after {:?} (median), {:?} (longest); \
         {answered:?} answers on the flow without l7",
        kills[0],
        kills[1],
        back[back.len() / 2],
        back[back.len() - 1]
    );
    assert_eq!(
        node.bypasses.load(Ordering::Relaxed),
        0,
        "nothing denied reached the pod"
    );
    assert_eq!(fates.wrong.load(Ordering::Relaxed), 0, "{fates:?}");
    assert!(answered.expect("an L4 flow never breaks") > 0);
    assert!(fates.allowed.load(Ordering::Relaxed) > 0 && fates.denied.load(Ordering::Relaxed) > 0);
    assert!(kills[0] > 0, "it was killed");
    // Control: the node's own requests meet no Envoy, and the server notes them.
    let past = node.inside("n0", move || {
        connect(server).and_then(|mut stream| get(&mut stream, "/admin"))
    });
    assert_eq!(past.expect("an answer"), 200);
    assert_eq!(node.bypasses.load(Ordering::Relaxed), 1);
    node.down();
}
