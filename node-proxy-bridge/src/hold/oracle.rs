//! One question to an oracle: whether a stream that begins so may pass.
//!
//! Invariant: only Envoy's word allows: any byte where a stream was asked about, its mark where a request was
//! (`first`). A connection that ends says no only while Envoy still listens; else nobody has said anything.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedReceiver;

use super::first;
use crate::listener::Reading;

/// Where to ask, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Oracle {
    /// Where Envoy listens.
    pub socket: PathBuf,
    /// How it reads what it is asked.
    pub reading: Reading,
}

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
    oracle: &Oracle,
    (remote, local): (SocketAddr, SocketAddr),
    bytes: UnboundedReceiver<Vec<u8>>,
) -> Said {
    match exchange(oracle, (remote, local), bytes).await {
        Ok(said) => said,
        Err(_gone) => match UnixStream::connect(&oracle.socket).await {
            Ok(_) => Said::No,
            Err(_) => Said::Nothing,
        },
    }
}

/// An error, an end included, is no, or the end of Envoy.
async fn exchange(
    oracle: &Oracle,
    (remote, local): (SocketAddr, SocketAddr),
    mut bytes: UnboundedReceiver<Vec<u8>>,
) -> io::Result<Said> {
    let Ok(mut stream) = UnixStream::connect(&oracle.socket).await else {
        return Ok(Said::Nothing);
    };
    let Some(mut said) = bytes.recv().await else {
        return Ok(Said::Nothing);
    };
    // At once: Envoy need not wait for the rest.
    let first = [proxy(remote, local).as_bytes(), &said].concat();
    stream.write_all(&first).await?;
    let (mut heard, mut listens) = (Vec::new(), true);
    loop {
        tokio::select! {
            more = bytes.recv() => match more {
                Some(more) => {
                    said.extend_from_slice(&more);
                    // Envoy answers a request before it has heard its body, and then hears no more of it.
                    listens = listens && stream.write_all(&more).await.is_ok();
                }
                None => return Ok(Said::Nothing),
            },
            read = stream.read_buf(&mut heard) => {
                if read? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let is_allowed = match oracle.reading {
                    Reading::Stream => Some(true),
                    Reading::Http => first::allowed(&said, &heard),
                };
                match is_allowed {
                    Some(true) => return Ok(Said::Yes),
                    Some(false) => return Ok(Said::No),
                    None => {}
                }
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
