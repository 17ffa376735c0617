//! `thyra policy`: the policies that the agent holds, and the check of files before they are applied.

mod matrix;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::Tables;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest::{self, ManifestError, Manifests};
use thyra_policy_compiler::world::{NodeOptions, World};
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, dash, show, table};

/// Exit code: the files, or some line of them, hold a mistake.
pub(crate) const BAD_INPUT: u8 = 2;

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
    /// Check files: what is refused, and what probably isn't meant, each with place, code and mend
    #[command(
        after_help = "Example: thyra policy validate -f policies/ -f cluster.yaml --strict\n\
                      Exit code: 0 nothing amiss or warnings only, 1 a warning with --strict, 2 an error.\n\
                      The codes: docs/validate.md"
    )]
    Validate {
        /// A file, a folder, or - for stdin; may be repeated
        #[arg(short, long = "file", required = true, value_name = "PATH")]
        files: Vec<PathBuf>,
        /// Warnings fail too
        #[arg(long)]
        strict: bool,
    },
    /// Who may talk to whom, per port, from files: a table, `-o html` a page, `-o svg` a picture
    #[command(
        after_help = "Example: thyra policy matrix --manifests testdata/lab/quickstart/manifests -o svg > who.svg"
    )]
    Matrix(matrix::Args),
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

/// Runs the command.
pub(crate) async fn run(command: Command, agent: Agent, format: Format) -> Result<ExitCode> {
    if let Command::Validate { files, strict } = &command {
        return validate::run(files, *strict, format);
    }
    if let Command::Matrix(args) = &command {
        return matrix::run(args, format);
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
        Command::Validate { .. } | Command::Matrix(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The objects of all files, or all their mistakes.
pub(crate) fn read(files: &[PathBuf]) -> Result<Result<Manifests, Vec<ManifestError>>> {
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
            Err(found) => errors.extend(found),
        }
    }
    Ok(if errors.is_empty() { Ok(all) } else { Err(errors) })
}

/// The objects of all files; none when there are mistakes, which are told on stderr.
pub(crate) fn read_or_tell(files: &[PathBuf]) -> Result<Option<Manifests>> {
    match read(files)? {
        Ok(manifests) => Ok(Some(manifests)),
        Err(errors) => {
            for error in errors {
                eprintln!("error: {error}");
            }
            Ok(None)
        }
    }
}

/// The world of some files, every pod enforced, with its tables.
pub(crate) fn compiled(manifests: &Manifests) -> Result<(World, Tables)> {
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let world = manifest::world(manifests, options)?;
    let tables = Compiler::new().compile(&world)?;
    Ok((world, tables))
}
