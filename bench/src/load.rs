//! The traffic: one TCP request/response loop, one connect loop, one stream, between two pods on one CPU.
//!
//! Invariant: both ends run on the same pinned CPU, so a ratio compares the work per packet and not the
//! scheduler's luck.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustix::thread::{CpuSet, Pid, sched_setaffinity};

use crate::netns;

/// Port of the request/response server; a connection is served until the client closes it.
pub(crate) const RR_PORT: u16 = 9000;
/// Port of the stream server: it reads until the end and answers with one byte.
pub(crate) const STREAM_PORT: u16 = 9001;

const STREAM_CHUNK: usize = 128 * 1024;
/// Both ends' buffers of the stream, bytes. Left alone the kernel grows them as it sees fit, and no two connections are
/// alike.
const STREAM_BUFFER: usize = 208 * 1024;
/// A connection that doesn't come up in this time means that policy refuses what it should allow.
const CONNECT: Duration = Duration::from_secs(2);

/// What a server does with a connection.
type Serve = fn(TcpStream) -> std::io::Result<()>;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Requests of one byte on one connection: transactions per second.
    RequestResponse,
    /// A connection for each request of one byte: transactions per second.
    ConnectRequestResponse,
    /// One connection full of bytes: bytes per second.
    Stream,
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    pin_thread(None, cpu)
}

/// Pins a thread by its number, or the calling one.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn pin_thread(thread: Option<Pid>, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(thread, &set).with_context(|| format!("pin to CPU {cpu}"))
}

/// Starts the servers in a pod; they end with the process.
///
/// # Errors
/// When the namespace can't be entered or a port is taken.
pub(crate) fn serve(pod: &str, cpu: usize) -> Result<Vec<JoinHandle<Result<()>>>> {
    let servers: [(u16, Serve); 2] = [(RR_PORT, echo), (STREAM_PORT, swallow)];
    servers
        .into_iter()
        .map(|(port, serve)| {
            let (pod, (ready, wait)) = (pod.to_owned(), std::sync::mpsc::channel());
            let thread = thread::spawn(move || {
                pin(cpu)?;
                netns::enter(&pod)?;
                let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
                if port == STREAM_PORT {
                    set_socket_recv_buffer_size(&listener, STREAM_BUFFER)?;
                }
                ready.send(()).ok().context("nobody waits for the server")?;
                for connection in listener.incoming() {
                    // A client that goes away ends its own connection, not the server.
                    drop(connection.and_then(serve));
                }
                Ok(())
            });
            wait.recv()
                .with_context(|| format!("server on port {port} did not start"))?;
            Ok(thread)
        })
        .collect()
}

/// Runs a load from the calling thread (pinned, in the client's namespace) and returns its rate per second.
///
/// # Errors
/// When a connection fails.
pub(crate) fn run(kind: Kind, server: Ipv4Addr, span: Duration) -> Result<f64> {
    match kind {
        Kind::RequestResponse => request_response(server, span),
        Kind::ConnectRequestResponse => connect_request_response(server, span),
        Kind::Stream => stream(server, span),
    }
}

fn request_response(server: Ipv4Addr, span: Duration) -> Result<f64> {
    let mut connection = connect(server, RR_PORT)?;
    for _ in 0..200 {
        exchange(&mut connection)?;
    }
    per_second(span, || exchange(&mut connection).map(|()| 1.0))
}

fn connect_request_response(server: Ipv4Addr, span: Duration) -> Result<f64> {
    per_second(span, || {
        let mut connection = connect(server, RR_PORT)?;
        exchange(&mut connection)?;
        Ok(1.0)
    })
}

fn stream(server: Ipv4Addr, span: Duration) -> Result<f64> {
    let mut connection = connect(server, STREAM_PORT)?;
    set_socket_send_buffer_size(&connection, STREAM_BUFFER)?;
    let chunk = vec![0_u8; STREAM_CHUNK];
    let weight = f64::from(u32::try_from(STREAM_CHUNK)?);
    let rate = per_second(span, || {
        connection
            .write_all(&chunk)
            .map(|()| weight)
            .context("write the stream")
    })?;
    connection.shutdown(Shutdown::Write)?;
    connection.read_exact(&mut [0])?;
    Ok(rate)
}

fn per_second(span: Duration, mut step: impl FnMut() -> Result<f64>) -> Result<f64> {
    let start = Instant::now();
    let mut sum = 0.0;
    while start.elapsed() < span {
        sum += step()?;
    }
    Ok(sum / start.elapsed().as_secs_f64())
}

fn connect(server: Ipv4Addr, port: u16) -> Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&SocketAddr::from((server, port)), CONNECT)
        .with_context(|| format!("connect to {server}:{port}"))?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(CONNECT))?;
    Ok(connection)
}

fn exchange(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(&[1]).context("send a request")?;
    connection.read_exact(&mut [0]).context("read the answer")
}

fn echo(mut connection: TcpStream) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    // Connections are served one by one: one that policy has cut must not hold up the next.
    connection.set_read_timeout(Some(CONNECT / 4))?;
    let mut byte = [0];
    while connection.read(&mut byte)? == 1 {
        connection.write_all(&byte)?;
    }
    Ok(())
}

fn swallow(mut connection: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; STREAM_CHUNK];
    while connection.read(&mut buffer)? > 0 {}
    connection.write_all(&[1])
}
