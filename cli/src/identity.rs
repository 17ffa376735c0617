//! `thyra identity`: who is known, and at which addresses.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, show, table};

/// `thyra identity …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All identities
    List,
    /// One identity
    #[command(after_help = "Example: thyra identity get 256")]
    Get {
        /// Its number, or its principal
        identity: String,
    },
}

#[derive(Debug, Serialize)]
struct Identity {
    id: u32,
    principal: String,
    namespace: String,
    service_account: String,
    trust_domain: String,
    addresses: Vec<String>,
    workloads: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Identities(Vec<Identity>);

impl Show for Identities {
    fn text(&self) -> String {
        let row = |i: &Identity| {
            vec![
                i.id.to_string(),
                i.principal.clone(),
                i.workloads.len().to_string(),
            ]
        };
        table(
            &["ID", "PRINCIPAL", "WORKLOADS"],
            &self.0.iter().map(row).collect::<Vec<_>>(),
        )
    }
}

impl Show for Identity {
    fn text(&self) -> String {
        format!(
            "ID          {}\nPRINCIPAL   {}\nWORKLOADS   {}\nADDRESSES   {}\n",
            self.id,
            self.principal,
            self.workloads.join(", "),
            self.addresses.join(", ")
        )
    }
}

impl From<v1::Identity> for Identity {
    fn from(message: v1::Identity) -> Self {
        let v1::Identity {
            id,
            principal,
            namespace,
            service_account,
            trust_domain,
            addresses,
            workloads,
        } = message;
        Self {
            id,
            principal,
            namespace,
            service_account,
            trust_domain,
            addresses,
            workloads,
        }
    }
}

/// Runs the command.
pub(crate) async fn run(command: Command, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    let reply = client
        .admin
        .list_identities(v1::ListIdentitiesRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let mut all = reply.identities.into_iter().map(Identity::from);
    match command {
        Command::List => show(&Identities(all.collect()), format)?,
        Command::Get { identity } => {
            match all.find(|i| i.id.to_string() == identity || i.principal == identity) {
                Some(found) => show(&found, format)?,
                None => bail!("no identity `{identity}`; `thyra identity list` shows all"),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
