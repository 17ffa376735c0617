//! The small servers behind pods' ports: echoes over TCP, UDP, TLS, HTTP and gRPC, and external
//! authorizers.
//!
//! Invariant: a server answers only what reached it, and notes which probe's bytes did.

mod authorizer;
mod echo;
mod http;
mod tls;
mod witness;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub(crate) use http::{APPLICATION_HEADER, is_http};
pub(crate) use tls::{accept_any, provider};
pub(crate) use witness::Seen;
use witness::Witness;

use super::model::ContainerPort;
use super::netns::{ANY, Netns};

/// What speaks on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http,
    Grpc,
    Authorizer,
    Tls,
    Tcp,
    Udp,
}

/// Who a server says it is.
#[derive(Clone, Debug)]
struct Identity {
    pod: Arc<str>,
    port: u16,
}

/// All servers of a lab, by pod.
pub(crate) struct Servers {
    seen: Arc<Seen>,
    tls: tokio_rustls::rustls::ServerConfig,
    running: BTreeMap<String, (Vec<ContainerPort>, JoinSet<()>)>,
}

impl Servers {
    /// # Errors
    /// No certificate could be made.
    pub(crate) fn new(seen: Arc<Seen>) -> anyhow::Result<Self> {
        Ok(Self {
            seen,
            tls: tls::server_config()?,
            running: BTreeMap::new(),
        })
    }

    /// Starts what the ports' names ask for. Without `addresses` a server listens on all of the namespace's;
    /// a pod that
    /// shares its node's namespace gives the node's.
    ///
    /// # Errors
    /// A port that is in use; nothing of this pod is left running then.
    pub(crate) fn start(
        &mut self,
        pod: &str,
        netns: &Netns,
        addresses: Option<&[IpAddr]>,
        ports: &[ContainerPort],
    ) -> io::Result<()> {
        if self.running.get(pod).is_some_and(|(running, _)| running == ports) {
            return Ok(());
        }
        self.stop(pod);
        let mut tasks = JoinSet::new();
        for port in ports {
            for address in addresses.unwrap_or(&[ANY]) {
                self.serve(&mut tasks, pod, netns, *address, port)
                    .map_err(|error| {
                        let text = format!(
                            "pod `{pod}` can't listen on {address} port {}: {error}",
                            port.number
                        );
                        io::Error::new(error.kind(), text)
                    })?;
            }
        }
        self.running.insert(pod.to_owned(), (ports.to_vec(), tasks));
        Ok(())
    }

    /// Ends a pod's servers and their connections.
    pub(crate) fn stop(&mut self, pod: &str) {
        self.running.remove(pod);
    }

    fn serve(
        &self,
        tasks: &mut JoinSet<()>,
        pod: &str,
        netns: &Netns,
        address: IpAddr,
        port: &ContainerPort,
    ) -> io::Result<()> {
        let identity = Identity {
            pod: pod.into(),
            port: port.number,
        };
        let protocol = Protocol::of(port);
        if protocol == Protocol::Udp {
            let socket = netns.udp((address, port.number).into())?;
            tasks.spawn(echo::datagrams(socket));
            return Ok(());
        }
        let listener = netns.listen(address, port.number)?;
        tasks.spawn(accept(
            listener,
            protocol,
            identity,
            self.seen.clone(),
            self.tls.clone(),
        ));
        Ok(())
    }
}

impl Protocol {
    fn of(port: &ContainerPort) -> Self {
        match port.name.as_str() {
            _ if port.udp => Self::Udp,
            name if is_http(name) => Self::Http,
            name if name.starts_with("grpc") => Self::Grpc,
            name if authorizer::is_authorizer(name) => Self::Authorizer,
            name if name.starts_with("tls") => Self::Tls,
            _ => Self::Tcp,
        }
    }
}

/// Serves each connection by itself; they end with the listener's task.
async fn accept(
    listener: TcpListener,
    protocol: Protocol,
    identity: Identity,
    seen: Arc<Seen>,
    tls: tokio_rustls::rustls::ServerConfig,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(pod = %identity.pod, %error, "connection not accepted");
                continue;
            }
        };
        let stream = Witness::new(stream, seen.clone());
        let (identity, tls) = (identity.clone(), tls.clone());
        connections.spawn(async move {
            let result = match protocol {
                Protocol::Http => http::serve(stream, identity, peer).await,
                Protocol::Grpc => http::serve_grpc(stream).await,
                Protocol::Authorizer => authorizer::serve(stream).await,
                Protocol::Tls => tls::serve(stream, tls).await,
                Protocol::Tcp | Protocol::Udp => echo::stream(stream).await,
            };
            if let Err(error) = result {
                tracing::debug!(%peer, %error, "connection ended");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{ContainerPort, Protocol};

    #[test]
    fn a_ports_name_decides_its_server() {
        let of = |name: &str, udp| {
            Protocol::of(&ContainerPort {
                name: name.into(),
                number: 1,
                udp,
            })
        };
        assert_eq!(of("http-web", false), Protocol::Http);
        assert_eq!(of("http2", false), Protocol::Http);
        assert_eq!(of("grpc", false), Protocol::Grpc);
        assert_eq!(of("ext-authz-grpc", false), Protocol::Authorizer);
        assert_eq!(of("tls-db", false), Protocol::Tls);
        assert_eq!(of("udp-dns", true), Protocol::Udp);
        assert_eq!(of("dns", true), Protocol::Udp);
        assert_eq!(of("mysql", false), Protocol::Tcp);
        assert_eq!(of("", false), Protocol::Tcp);
    }
}
