//! One question to an oracle: whether a stream that begins so may pass.
//!
//! Invariant: only a byte of Envoy's allows. A connection that ends says no only while Envoy still listens; else nobody
//! has said anything.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedReceiver;

/// What was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It may.
    Yes,
    /// It may not.
    No,
    /// Nothing: Envoy isn't there.
    Nothing,
}

/// Asks: `bytes` come as the client says them, and end when nobody wants to know any more.
pub async fn ask(
    oracle: &Path,
    (remote, local): (SocketAddr, SocketAddr),
    bytes: UnboundedReceiver<Vec<u8>>,
) -> Said {
    match exchange(oracle, (remote, local), bytes).await {
        Ok(said) => said,
        Err(_gone) => match UnixStream::connect(oracle).await {
            Ok(_) => Said::No,
            Err(_) => Said::Nothing,
        },
    }
}

/// An error, an end included, is no, or the end of Envoy.
async fn exchange(
    oracle: &Path,
    (remote, local): (SocketAddr, SocketAddr),
    mut bytes: UnboundedReceiver<Vec<u8>>,
) -> io::Result<Said> {
    let Ok(mut stream) = UnixStream::connect(oracle).await else {
        return Ok(Said::Nothing);
    };
    let mut first = proxy(remote, local).into_bytes();
    match bytes.recv().await {
        Some(bytes) => first.extend(bytes),
        None => return Ok(Said::Nothing),
    }
    // At once: Envoy need not wait for the rest.
    stream.write_all(&first).await?;
    let mut answer = [0; 1];
    loop {
        tokio::select! {
            more = bytes.recv() => match more {
                Some(more) => stream.write_all(&more).await?,
                None => return Ok(Said::Nothing),
            },
            read = stream.read(&mut answer) => {
                return if read? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(Said::Yes) };
            }
        }
    }
}

/// The PROXY header, version 1.
fn proxy(remote: SocketAddr, local: SocketAddr) -> String {
    let family = if remote.is_ipv4() { "TCP4" } else { "TCP6" };
    format!(
        "PROXY {family} {} {} {} {}\r\n",
        remote.ip(),
        local.ip(),
        remote.port(),
        local.port()
    )
}
