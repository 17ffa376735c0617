//! The same policy by nftables: connection tracking and a set of the addresses that may come in.
//!
//! Invariant: a node of its own, so that connection tracking is paid for by nobody else.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::load;
use crate::mesh;
use crate::netns::Node;
use crate::pair::Pair;
use crate::policed::SIZE;

/// The node: its pods 0 and 1 are a client that may, and a server; 2 is a stranger.
pub(crate) struct Nft {
    /// Its namespaces.
    pub(crate) node: Node,
}

impl Nft {
    /// Makes it.
    ///
    /// # Errors
    /// Without root, or when `nft` refuses.
    pub(crate) fn new() -> Result<Self> {
        let node = Node::new("nft", 3)?;
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &node.name(), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run `nft`")?;
        nft.stdin
            .take()
            .context("no pipe to `nft`")?
            .write_all(rules()?.as_bytes())?;
        let output = nft.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "`nft` refuses: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(Self { node })
    }

    /// The pods that talk.
    #[must_use]
    pub(crate) fn pair(&self) -> Pair {
        Pair::new("with nftables", &self.node, 0, 1)
    }

    /// A pod that policy refuses.
    #[must_use]
    pub(crate) fn stranger(&self) -> String {
        self.node.pod(2)
    }
}

fn rules() -> Result<String> {
    let mut text = String::from("table ip rival {\n set allowed { type ipv4_addr; elements = {");
    for i in (0..SIZE.identities).filter(|i| *i != 1) {
        write!(text, " {},", mesh::address(i, SIZE.endpoints))?;
    }
    let (server, rr, stream) = (Node::address(1), load::RR_PORT, load::STREAM_PORT);
    write!(
        text,
        " }}; }}
 chain forward {{
  type filter hook forward priority filter; policy accept;
  ct state established,related accept
  ct state invalid drop
  ip daddr {server} tcp dport {{ {rr}, {stream} }} ip saddr @allowed accept
  ip daddr {server} counter reject with tcp reset
 }}
}}
"
    )?;
    Ok(text)
}
