//! Echoes: whatever comes goes back.
//!
//! Invariant: no byte is held back or changed.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UdpSocket;

/// Largest UDP payload.
const MAX_DATAGRAM: usize = 65_535;

pub(super) async fn stream(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..length]).await?;
        stream.flush().await?;
    }
}

pub(super) async fn datagrams(socket: UdpSocket) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // An ICMP error about an earlier answer surfaces here; the next datagram is served all the same.
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        if let Err(error) = socket.send_to(&buffer[..length], peer).await {
            tracing::debug!(%peer, %error, "datagram not answered");
        }
    }
}
