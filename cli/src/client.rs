//! The connection to an agent's Unix socket.
//!
//! Invariant: an agent that can't be reached gives an error that says where it was looked for and what to do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use thyra_proto::thyra::v1::admin_service_client::AdminServiceClient;
use thyra_proto::thyra::v1::endpoint_service_client::EndpointServiceClient;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::lab;

/// Where an agent listens unless it is told otherwise.
const DEFAULT_SOCKET: &str = "/run/thyra/agent.sock";

/// Which agent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Agent {
    /// The agent's socket; else $THYRA_SOCKET, else that of the only running lab, else /run/thyra/agent.sock
    #[arg(long, env = "THYRA_SOCKET", global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Clients of both services on one channel.
pub(crate) struct Client {
    /// Questions.
    pub(crate) admin: AdminServiceClient<Channel>,
    /// Endpoints.
    pub(crate) endpoints: EndpointServiceClient<Channel>,
}

/// What answers of a whole node may weigh, bytes.
const MESSAGE_LIMIT: usize = 256 << 20;

impl Agent {
    /// The socket that is asked.
    pub(crate) fn socket(&self) -> PathBuf {
        let lab = || match lab::registry::agent_sockets().as_slice() {
            [only] => Some(only.clone()),
            _ => None,
        };
        self.socket
            .clone()
            .or_else(lab)
            .unwrap_or_else(|| DEFAULT_SOCKET.into())
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Client> {
        let socket = self.socket();
        let channel = channel(&socket).await.with_context(|| {
            format!(
                "no agent answers at `{}`; start thyra-agent, name its socket with --socket or $THYRA_SOCKET, \
                 or start a lab: thyra lab up DIR",
                socket.display()
            )
        })?;
        Ok(Client {
            admin: AdminServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            endpoints: EndpointServiceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT),
        })
    }
}

/// A channel over the Unix socket at `path`.
pub(crate) async fn channel(path: &Path) -> Result<Channel> {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move {
            tokio::net::UnixStream::connect(path)
                .await
                .map(hyper_util::rt::TokioIo::new)
        }
    });
    // The host name is never looked up; tonic wants one.
    Ok(Endpoint::from_static("http://agent")
        .connect_with_connector(connector)
        .await?)
}

/// The agent's refusal as an error for people.
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}
