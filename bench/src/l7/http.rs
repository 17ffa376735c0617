//! HTTP/1.1 as far as the measurements speak it: a server that answers every request alike, and one client for both
//! kinds of load, on one thread.
//!
//! Invariant: a latency counts from the moment at which its request was due, whether or not a connection was free then:
//! a slow answer makes those behind it slow, and is not left out (no coordinated omission).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::set_current_timer_slack;

use crate::load;
use crate::netns;

/// Connections of a load, as the goals have it.
const CONNECTIONS: usize = 16;
/// A connection that doesn't come up, or an answer that doesn't come, in this time is a failure.
const LIMIT: Duration = Duration::from_secs(5);
/// The least that the kernel takes; it lets a sleep last 50 µs longer otherwise.
const SLACK: Option<NonZeroU64> = NonZeroU64::new(1);
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
const END_OF_HEADERS: &[u8] = b"\r\n\r\n";
/// More than any head, ClientHello or answer here has.
const BUFFER: usize = 4096;
/// How a record of TLS begins that holds a handshake, and how long what says its length is (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;
const RECORD_HEADER: usize = 5;

/// Whom a load goes to, and from where.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// For people.
    pub(crate) name: &'static str,
    /// Namespace of the client.
    pub(crate) client: String,
    /// Where it connects to.
    pub(crate) to: SocketAddr,
    /// The CPU that it runs on.
    pub(crate) cpu: usize,
    /// Said before the first request, and answered as one; empty where nothing is.
    pub(crate) hello: Vec<u8>,
}

/// Answers every request on a port of a pod until the process ends; each connection has a thread.
///
/// # Errors
/// When the namespace can't be entered or the port is taken.
pub(crate) fn serve(pod: &str, port: u16, cpu: usize) -> Result<()> {
    let (pod, (ready, wait)) = (pod.to_owned(), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        let listen = || -> Result<TcpListener> {
            load::pin(cpu)?;
            netns::enter(&pod)?;
            Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?)
        };
        let listener = match listen() {
            Ok(listener) => listener,
            Err(error) => return ready.send(Err(error)).ok(),
        };
        ready.send(Ok(())).ok()?;
        for connection in listener.incoming().flatten() {
            // It inherits the CPU; a client that goes away ends its own connection.
            std::thread::spawn(move || answer(connection));
        }
        Some(())
    });
    wait.recv().context("the server did not start")?
}

fn answer(mut connection: TcpStream) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let (mut buffer, mut filled) = ([0; BUFFER], 0);
    loop {
        let read = connection.read(&mut buffer[filled..])?;
        filled += read;
        if read == 0 || filled == BUFFER {
            return Ok(());
        }
        // Requests have no body and are never pipelined.
        if buffer[..filled].ends_with(END_OF_HEADERS) || is_record(&buffer[..filled]) {
            connection.write_all(ANSWER)?;
            filled = 0;
        }
    }
}

/// Whether this is a whole record of a handshake: a server reads no more of it here.
fn is_record(bytes: &[u8]) -> bool {
    let Some((&[HANDSHAKE, _, _, high, low], rest)) = bytes.split_first_chunk::<RECORD_HEADER>() else {
        return false;
    };
    rest.len() >= usize::from(u16::from_be_bytes([high, low]))
}

impl Way {
    /// Requests a second over connections that always have one under way.
    ///
    /// # Errors
    /// When a request isn't answered with 200.
    pub(crate) fn rate(&self, span: Duration) -> Result<f64> {
        self.load(move |connections| {
            connections.closed(span / 8)?;
            connections.closed(span)
        })
    }

    /// Latencies of `per_second` requests a second, due at equal distances, in seconds.
    ///
    /// # Errors
    /// When a request isn't answered with 200.
    pub(crate) fn latencies(&self, per_second: u32, span: Duration) -> Result<Vec<f64>> {
        self.load(move |connections| {
            connections.open(per_second, span / 8)?;
            connections.open(per_second, span)
        })
    }

    /// How long the first bytes of so many connections wait for their answer, one after the other, in seconds.
    ///
    /// # Errors
    /// When they aren't answered with 200.
    pub(crate) fn firsts(&self, count: usize) -> Result<Vec<f64>> {
        let way = self.clone();
        let asked = std::thread::spawn(move || {
            load::pin(way.cpu)?;
            netns::enter(&way.client)?;
            (0..count)
                .map(|_| way.first().map(|took| took.as_secs_f64()))
                .collect()
        });
        let asked: Result<Vec<f64>> = asked.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        asked.with_context(|| format!("the first bytes {}", self.name))
    }

    /// Of one connection.
    fn first(&self) -> Result<Duration> {
        let mut connection = Connection::open_to(self.to)?;
        connection.stream.set_read_timeout(Some(LIMIT))?;
        connection.send(&self.hello, Instant::now())?;
        loop {
            if let Some(took) = connection.receive()? {
                return Ok(took);
            }
        }
    }

    /// The status that a request gets on a connection of its own, or what is said before it; none where it gets no
    /// answer.
    ///
    /// # Errors
    /// When the namespace can't be entered.
    pub(crate) fn status(&self, method: &str, path: &str) -> Result<Option<u16>> {
        let way = self.clone();
        let request = if way.hello.is_empty() {
            request(method, path)
        } else {
            way.hello.clone()
        };
        let asked = std::thread::spawn(move || {
            netns::enter(&way.client)?;
            let once = || -> Result<u16> {
                let mut stream = TcpStream::connect_timeout(&way.to, LIMIT)?;
                stream.set_read_timeout(Some(LIMIT))?;
                stream.write_all(&request)?;
                let mut head = [0; 12];
                stream.read_exact(&mut head)?;
                Ok(std::str::from_utf8(&head[9..])?.parse()?)
            };
            anyhow::Ok(once().ok())
        });
        asked.join().map_err(|_| anyhow::anyhow!("a request panicked"))?
    }

    fn load<T: Send + 'static>(
        &self,
        run: impl FnOnce(&mut Connections) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let way = self.clone();
        let thread = std::thread::spawn(move || {
            load::pin(way.cpu)?;
            set_current_timer_slack(SLACK)?;
            netns::enter(&way.client)?;
            run(&mut Connections::open_to(&way)?)
        });
        let done = thread
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        done.with_context(|| format!("HTTP {}", self.name))
    }
}

fn request(method: &str, path: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: bench\r\nuser-agent: thyra-bench\r\n\r\n").into_bytes()
}

/// One connection and what is under way on it.
struct Connection {
    stream: TcpStream,
    /// When the request that it carries was due.
    due: Option<Instant>,
    buffer: [u8; BUFFER],
    filled: usize,
}

struct Connections {
    all: Vec<Connection>,
    request: Vec<u8>,
}

impl Connections {
    /// Those on which something is said before the first request have its answer.
    fn open_to(way: &Way) -> Result<Self> {
        let open = |_| -> Result<Connection> {
            let mut connection = Connection::open_to(way.to)?;
            if !way.hello.is_empty() {
                connection.stream.set_read_timeout(Some(LIMIT))?;
                connection.send(&way.hello, Instant::now())?;
                while connection.receive()?.is_none() {}
            }
            connection.stream.set_nonblocking(true)?;
            Ok(connection)
        };
        Ok(Self {
            all: (0..CONNECTIONS).map(open).collect::<Result<_>>()?,
            request: request("GET", "/public/page"),
        })
    }

    /// Requests a second when the next one follows each answer.
    fn closed(&mut self, span: Duration) -> Result<f64> {
        let begun = Instant::now();
        for connection in &mut self.all {
            connection.send(&self.request, begun)?;
        }
        let mut done = 0_u32;
        while self.all.iter().any(|connection| connection.due.is_some()) {
            for at in self.ready(LIMIT)? {
                let connection = &mut self.all[at];
                if connection.receive()?.is_some() {
                    done += 1;
                    let now = Instant::now();
                    if now.duration_since(begun) < span {
                        connection.send(&self.request, now)?;
                    }
                }
            }
        }
        Ok(f64::from(done) / begun.elapsed().as_secs_f64())
    }

    /// Latencies of requests that come at their times, whatever becomes of those before.
    fn open(&mut self, per_second: u32, span: Duration) -> Result<Vec<f64>> {
        let gap = Duration::from_secs(1) / per_second;
        let (begun, mut latencies) = (Instant::now(), Vec::new());
        let mut next = begun;
        let mut waiting = VecDeque::new();
        loop {
            let now = Instant::now();
            while next <= now && next.duration_since(begun) < span {
                waiting.push_back(next);
                next += gap;
            }
            for connection in self.all.iter_mut().filter(|c| c.due.is_none()) {
                let Some(due) = waiting.pop_front() else { break };
                connection.send(&self.request, due)?;
            }
            let over = next.duration_since(begun) >= span;
            if over && waiting.is_empty() && self.all.iter().all(|c| c.due.is_none()) {
                return Ok(latencies);
            }
            ensure!(begun.elapsed() < span + LIMIT, "answers are missing");
            let wait = if over {
                LIMIT
            } else {
                next.saturating_duration_since(Instant::now())
            };
            for at in self.ready(wait)? {
                latencies.extend(self.all[at].receive()?.map(|took| took.as_secs_f64()));
            }
        }
    }

    /// Which of those that have a request under way can be read, after `wait` at most.
    fn ready(&self, wait: Duration) -> Result<Vec<usize>> {
        let busy: Vec<usize> = (0..self.all.len())
            .filter(|at| self.all[*at].due.is_some())
            .collect();
        let mut watched: Vec<PollFd<'_>> = busy
            .iter()
            .map(|at| PollFd::new(&self.all[*at].stream, PollFlags::IN))
            .collect();
        poll(&mut watched, Some(&Timespec::try_from(wait)?))?;
        let ready = watched.iter().zip(&busy);
        Ok(ready
            .filter_map(|(fd, at)| (!fd.revents().is_empty()).then_some(*at))
            .collect())
    }
}

impl Connection {
    fn open_to(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            due: None,
            buffer: [0; BUFFER],
            filled: 0,
        })
    }

    fn send(&mut self, request: &[u8], due: Instant) -> Result<()> {
        // A request is shorter than any socket's buffer, and the one before was taken from it.
        let sent = self.stream.write(request).context("send a request")?;
        ensure!(sent == request.len(), "a request was sent by halves");
        (self.due, self.filled) = (Some(due), 0);
        Ok(())
    }

    /// How long the request took, once its whole answer is there.
    fn receive(&mut self) -> Result<Option<Duration>> {
        match self.stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => bail!("the connection was closed under a request"),
            Ok(read) => self.filled += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error).context("read an answer"),
        }
        let answer = &self.buffer[..self.filled];
        let Some(head) = answer
            .windows(END_OF_HEADERS.len())
            .position(|w| w == END_OF_HEADERS)
        else {
            ensure!(self.filled < BUFFER, "an answer without an end");
            return Ok(None);
        };
        if self.filled < head + END_OF_HEADERS.len() + b"hello".len() {
            return Ok(None);
        }
        ensure!(
            answer.starts_with(b"HTTP/1.1 200"),
            "answered `{}`",
            String::from_utf8_lossy(&answer[..head])
        );
        Ok(self.due.take().map(|due| due.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers nobody before `PAUSE` is over, which begins with the first request.
    fn slow_at_first() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let streams: Vec<TcpStream> = (0..CONNECTIONS).map(|_| listener.accept().unwrap().0).collect();
            streams[0].peek(&mut [0]).unwrap();
            std::thread::sleep(PAUSE);
            let serve = |stream| std::thread::spawn(|| answer(stream));
            let threads: Vec<_> = streams.into_iter().map(serve).collect();
            for thread in threads {
                thread.join().unwrap().ok();
            }
        });
        address
    }

    const PAUSE: Duration = Duration::from_millis(300);

    #[test]
    fn a_record_is_answered_once_it_is_whole() {
        let record = [HANDSHAKE, 3, 1, 0, 2, 7, 7];
        assert!(is_record(&record));
        assert!((0..record.len()).all(|length| !is_record(&record[..length])));
        assert!(!is_record(b"GET / HTTP/1.1\r\n"));
    }

    #[test]
    fn what_waits_behind_a_slow_answer_counts_from_when_it_was_due() {
        let way = Way {
            name: "slow at first",
            client: String::new(),
            to: slow_at_first(),
            cpu: 0,
            hello: Vec::new(),
        };
        let mut connections = Connections::open_to(&way).unwrap();
        let latencies = connections.open(1000, Duration::from_millis(200)).unwrap();
        assert_eq!(latencies.len(), 200, "every request is in it");
        // Only 16 were under way; all were due in the first 200 ms, and nothing was answered in the first 300.
        assert!(latencies.iter().all(|took| *took > 0.09), "{latencies:?}");
    }
}
