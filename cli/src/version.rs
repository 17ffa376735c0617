//! `thyra version`: of the command and, where one answers, of the agent.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, show};

#[derive(Debug, Serialize)]
struct Version {
    client: &'static str,
    /// Null when no agent answers.
    agent: Option<String>,
}

impl Show for Version {
    fn text(&self) -> String {
        let agent = self.agent.as_deref().unwrap_or("no agent answers");
        format!("client: {}\nagent:  {agent}\n", self.client)
    }
}

/// Runs the command; an agent that can't be reached is no error here.
pub(crate) async fn run(agent: Agent, format: Format) -> Result<ExitCode> {
    let agent = match agent.connect().await {
        Ok(mut client) => {
            let reply = client
                .admin
                .get_status(v1::GetStatusRequest {})
                .await
                .map_err(refused)?;
            Some(reply.into_inner().version)
        }
        Err(_) => None,
    };
    show(
        &Version {
            client: env!("CARGO_PKG_VERSION"),
            agent,
        },
        format,
    )?;
    Ok(ExitCode::SUCCESS)
}
