//! A client and a server pod, and what else goes on while they talk.
//!
//! Invariant: pairs differ in what stands between the two pods and in nothing else.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::flood::{Flood, SynFlood};
use crate::load::{self, Kind};
use crate::netns::{self, Node};

/// The CPU that both pods and all their packets use.
pub(crate) const CPU: usize = 1;
/// How long a refused connection is waited for.
const REFUSED: Duration = Duration::from_millis(300);

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// For people.
    pub(crate) name: &'static str,
    /// Namespace of the client.
    pub(crate) client: String,
    /// Namespace of the server.
    pub(crate) server: String,
    /// Address of the server.
    pub(crate) address: Ipv4Addr,
    /// What the server is flooded with meanwhile.
    pub(crate) flood: Option<SynFlood>,
}

impl Pair {
    /// Two pods of a node.
    #[must_use]
    pub(crate) fn new(name: &'static str, node: &Node, client: usize, server: usize) -> Self {
        Self {
            name,
            client: node.pod(client),
            server: node.pod(server),
            address: Node::address(server),
            flood: None,
        }
    }

    /// The same while pod `attacker` of the node floods the server.
    #[must_use]
    pub(crate) fn flooded(&self, node: &Node, attacker: usize) -> Self {
        Self {
            flood: Some(SynFlood {
                attacker: node.pod(attacker),
                own: Node::address(attacker),
                target: self.address,
            }),
            ..self.clone()
        }
    }

    /// The rate of a load, per second, after an eighth of `span` to warm up.
    ///
    /// # Errors
    /// When a connection that should pass fails.
    pub(crate) fn rate(&self, kind: Kind, span: Duration) -> Result<f64> {
        let flood = self.flood.clone().map(Flood::start).transpose()?;
        let (client, address) = (self.client.clone(), self.address);
        let thread = std::thread::spawn(move || {
            load::pin(CPU)?;
            netns::enter(&client)?;
            // The first moments fill caches and the routes' own.
            load::run(kind, address, span / 8)?;
            load::run(kind, address, span)
        });
        let rate = thread
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        flood.map(Flood::stop).transpose()?;
        rate.with_context(|| format!("{kind:?} {}", self.name))
    }

    /// That the client gets in and a stranger doesn't: what is measured is a policy that decides.
    ///
    /// # Errors
    /// When it isn't so.
    pub(crate) fn probe(&self, stranger: &str) -> Result<()> {
        let to = SocketAddr::from((self.address, load::RR_PORT));
        let tries = [(self.client.clone(), true), (stranger.to_owned(), false)];
        for (from, allowed) in tries {
            let namespace = from.clone();
            let attempt = std::thread::spawn(move || {
                netns::enter(&namespace)?;
                anyhow::Ok(TcpStream::connect_timeout(&to, REFUSED).is_ok())
            });
            let got_in = attempt
                .join()
                .map_err(|_| anyhow::anyhow!("a probe panicked"))??;
            let outcome = |got_in| if got_in { "gets in" } else { "is refused" };
            ensure!(
                got_in == allowed,
                "{}: `{from}` {}, although it should be otherwise",
                self.name,
                outcome(got_in)
            );
        }
        Ok(())
    }
}
