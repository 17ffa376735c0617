//! Prints what an istiod sends on both streams, one line a change, until it is interrupted.
//!
//! Invariant: asks exactly as the agent does, so what is seen here is what the agent would see.
//!
//! ```sh
//! cargo run -p thyra-xds-client --example watch -- \
//!     https://127.0.0.1:15012 istio-system/thyra-abc istiod.istio-system.svc root-cert.pem token
//! cargo run -p thyra-xds-client --example watch -- http://127.0.0.1:15010 istio-system/thyra-abc
//! ```

use std::error::Error;
use std::path::PathBuf;

use thyra_xds_client::backoff::Pace;
use thyra_xds_client::{
    ClientConfig, NodeIdentity, Push, Rejected, Server, Sink, StreamKind, StreamState, run,
};
use tokio_util::sync::CancellationToken;

const USAGE: &str = "watch ADDRESS NAMESPACE/POD [SERVER-NAME ROOT-FILE [TOKEN-FILE]]";

struct Printer;

impl Sink for Printer {
    fn apply(&mut self, push: Push) -> Vec<Rejected> {
        let Push {
            stream,
            type_url,
            resources,
            removed,
            undecodable,
            initial,
            received: _,
        } = push;
        println!("{stream}: {type_url}{}", if initial { ", in sync" } else { "" });
        for named in resources {
            println!("  + {} @{} {:?}", named.name, named.version, named.body);
            for path in named.unknown {
                println!("    unknown: {path}");
            }
        }
        for name in removed {
            println!("  - {name}");
        }
        for Rejected { name, error } in undecodable {
            println!("  ! {name}: {error}");
        }
        Vec::new()
    }

    fn state(&mut self, stream: StreamKind, state: StreamState) {
        println!("{stream}: {state:?}");
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or(USAGE)?;
    let pod = arguments.next().ok_or(USAGE)?;
    let (namespace, pod) = pod.split_once('/').ok_or(USAGE)?;
    let name = arguments.next();
    let mut file = || arguments.next().map(PathBuf::from);
    let server = Server::new(&address, name, file(), file())?;
    let node = NodeIdentity {
        address: "127.0.0.1".parse()?,
        pod: pod.to_owned(),
        namespace: namespace.to_owned(),
        node: "watch".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        domain: "cluster.local".to_owned(),
    };
    let stop = CancellationToken::new();
    let streams = [StreamKind::Workloads, StreamKind::Config].map(|stream| {
        let lossy = true;
        let config = ClientConfig {
            stream,
            server: server.clone(),
            node: node.clone(),
            lossy,
            pace: Pace::default(),
        };
        tokio::spawn(run(config, Printer, stop.clone()))
    });
    tokio::signal::ctrl_c().await?;
    stop.cancel();
    for stream in streams {
        stream.await?;
    }
    Ok(())
}
