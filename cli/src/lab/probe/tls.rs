//! A TLS handshake and a line echoed inside it.
//!
//! Invariant: `allow` needs the handshake done and the echo back.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::{Dial, Outcome, of_error};
use crate::lab::scenario::TlsHello;
use crate::lab::server::accept_any;

pub(super) async fn run(dial: &Dial<'_>, stream: TcpStream, hello: &TlsHello, deadline: Instant) -> Outcome {
    match timeout_at(deadline, talk(dial, stream, hello)).await {
        Err(_) => Outcome::Drop,
        Ok(Ok(())) => Outcome::Allow,
        Ok(Err(error)) => of_error(&error),
    }
}

async fn talk(dial: &Dial<'_>, stream: TcpStream, hello: &TlsHello) -> std::io::Result<()> {
    let mut config = accept_any(&hello.alpn).map_err(std::io::Error::other)?;
    // Without a name there is no SNI; rustls wants some name all the same.
    config.enable_sni = hello.sni.is_some();
    let name = hello.sni.clone().unwrap_or_else(|| "lab.thyra".to_owned());
    let name = ServerName::try_from(name).map_err(std::io::Error::other)?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream.write_all(format!("{}\n", dial.token).as_bytes()).await?;
    stream.flush().await?;
    let mut buffer = [0; 256];
    match stream.read(&mut buffer).await? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}
