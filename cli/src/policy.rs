//! `thyra policy`: the policies that the agent holds, and the check of files before they are applied.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use thyra_policy_compiler::manifest::{self, Manifests};
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, dash, show, table};

/// The files hold a mistake.
const BAD_INPUT: u8 = 2;

/// `thyra policy …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All policies that the agent holds
    List,
    /// One policy
    #[command(after_help = "Example: thyra policy get shop/allow-front -o yaml")]
    Get {
        /// namespace/name
        policy: String,
    },
    /// Check files: unknown fields, bad values, with file, line and the mend; exit code 2 when there are
    /// mistakes
    #[command(after_help = "Example: thyra policy validate -f policies/ -f more.yaml")]
    Validate {
        /// A file, a folder, or - for stdin; may be repeated
        #[arg(short, long = "file", required = true, value_name = "PATH")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Serialize)]
struct Policy {
    kind: String,
    namespace: String,
    name: String,
    version: String,
    action: String,
    scope: String,
    dry_run: bool,
    rules: u32,
    status: String,
    endpoints: Vec<u32>,
    generation: u64,
    /// The whole policy as the agent holds it.
    policy: serde_json::Value,
}

impl From<v1::Policy> for Policy {
    fn from(message: v1::Policy) -> Self {
        Self {
            policy: serde_json::from_str(&message.json).unwrap_or(serde_json::Value::Null),
            kind: message.kind,
            namespace: message.namespace,
            name: message.name,
            version: message.version,
            action: message.action,
            scope: message.scope,
            dry_run: message.dry_run,
            rules: message.rules,
            status: message.status,
            endpoints: message.endpoints,
            generation: message.generation,
        }
    }
}

impl Policy {
    fn row(&self) -> Vec<String> {
        vec![
            self.kind.clone(),
            format!("{}/{}", self.namespace, self.name),
            dash(&self.action) + if self.dry_run { " (dry-run)" } else { "" },
            self.scope.clone(),
            self.rules.to_string(),
            self.endpoints.len().to_string(),
            dash(&self.version),
            self.status.clone(),
        ]
    }
}

const COLUMNS: [&str; 8] = [
    "KIND",
    "POLICY",
    "ACTION",
    "SCOPE",
    "RULES",
    "ENDPOINTS",
    "VERSION",
    "STATUS",
];

#[derive(Debug, Serialize)]
struct Policies(Vec<Policy>);

impl Show for Policies {
    fn text(&self) -> String {
        table(&COLUMNS, &self.0.iter().map(Policy::row).collect::<Vec<_>>())
    }
}

impl Show for Policy {
    fn text(&self) -> String {
        let held = serde_saphyr::to_string(&self.policy).unwrap_or_else(|error| format!("{error}\n"));
        format!("{}\n{held}", table(&COLUMNS, &[self.row()]))
    }
}

/// What `policy validate` found.
#[derive(Debug, Serialize)]
struct Findings {
    errors: Vec<String>,
    warnings: Vec<String>,
    /// `kind file:line` of objects that can't change a verdict.
    ignored: Vec<String>,
    objects: usize,
}

impl Show for Findings {
    fn text(&self) -> String {
        let mut text = String::new();
        for error in &self.errors {
            text += &format!("error: {error}\n");
        }
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        for ignored in &self.ignored {
            text += &format!("ignored: {ignored}\n");
        }
        text + &format!(
            "{} objects read, {} errors, {} warnings\n",
            self.objects,
            self.errors.len(),
            self.warnings.len()
        )
    }
}

/// Runs the command.
pub(crate) async fn run(command: Command, agent: Agent, format: Format) -> Result<ExitCode> {
    if let Command::Validate { files } = &command {
        return validate(files, format);
    }
    let mut client = agent.connect().await?;
    let reply = client
        .admin
        .list_policies(v1::ListPoliciesRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let mut all = reply.policies.into_iter().map(Policy::from);
    match command {
        Command::List => show(&Policies(all.collect()), format)?,
        Command::Get { policy } => match all.find(|p| format!("{}/{}", p.namespace, p.name) == policy) {
            Some(found) => show(&found, format)?,
            None => bail!("no policy `{policy}`; `thyra policy list` shows all"),
        },
        Command::Validate { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn validate(files: &[PathBuf], format: Format) -> Result<ExitCode> {
    let findings = match read(files)? {
        Ok(manifests) => Findings {
            errors: Vec::new(),
            warnings: manifests.warnings.iter().map(ToString::to_string).collect(),
            ignored: manifests
                .ignored
                .iter()
                .map(|i| format!("{} ({})", i.kind, i.at))
                .collect(),
            objects: manifests.objects.len(),
        },
        Err(errors) => Findings {
            errors,
            warnings: Vec::new(),
            ignored: Vec::new(),
            objects: 0,
        },
    };
    show(&findings, format)?;
    Ok(if findings.errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(BAD_INPUT)
    })
}

/// The objects of all files, or all their mistakes.
pub(crate) fn read(files: &[PathBuf]) -> Result<Result<Manifests, Vec<String>>> {
    let (mut all, mut errors) = (Manifests::default(), Vec::new());
    for file in files {
        let found = if file.as_os_str() == "-" {
            let text = std::io::read_to_string(std::io::stdin()).context("read stdin")?;
            manifest::read_str("stdin", &text)
        } else {
            if !file.exists() {
                bail!("`{}` does not exist", file.display());
            }
            manifest::read_dir(file)
        };
        match found {
            Ok(manifests) => all.apply(manifests),
            Err(found) => errors.extend(found.iter().map(ToString::to_string)),
        }
    }
    Ok(if errors.is_empty() { Ok(all) } else { Err(errors) })
}
