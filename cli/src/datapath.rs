//! `thyra preflight` and `thyra datapath`: what this machine can do, and how enforcement ends, both without an agent.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::Serialize;
use thyra_datapath::{Check, Datapath, Hook};

use crate::client::Agent;
use crate::output::{Format, GREEN, RED, Show, coloured, show, table};

/// Where the agent keeps its pins unless told otherwise.
const BPFFS: &str = "/sys/fs/bpf/thyra";

/// `thyra preflight`
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code 1 when something is missing. Run it as the agent will run: as root.")]
pub(crate) struct Preflight {
    /// Folder on a bpffs that the agent will use
    #[arg(long, value_name = "DIR", default_value = BPFFS)]
    bpffs: PathBuf,
}

/// `thyra datapath …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Takes all programs off and removes every pin: enforcement ends. An agent at work is an error
    #[command(after_help = "Example: thyra datapath detach --yes")]
    Detach {
        /// Folder on a bpffs that the agent used
        #[arg(long, value_name = "DIR", default_value = BPFFS)]
        bpffs: PathBuf,
        /// Every pod of this node is open to everybody afterwards
        #[arg(long, required = true)]
        yes: bool,
    },
}

/// What was found.
#[derive(Debug, Serialize)]
struct Found {
    ready: bool,
    /// `--attach` of the agent: tcx | clsact
    attach: &'static str,
    checks: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    ok: bool,
    /// What is there, or what is missing and how to mend it.
    said: String,
}

impl Show for Found {
    fn text(&self) -> String {
        let row = |row: &Row| {
            let word = if row.ok {
                coloured("ok", GREEN)
            } else {
                coloured("MISSING", RED)
            };
            vec![row.name.to_owned(), word, row.said.clone()]
        };
        let rows: Vec<Vec<String>> = self.checks.iter().map(row).collect();
        let mut text = table(&["CHECK", "", "FOUND"], &rows);
        text += &if self.ready {
            format!("\nready: thyra-agent --attach={}\n", self.attach)
        } else {
            "\nnot ready\n".to_owned()
        };
        text
    }
}

/// Runs `thyra preflight`.
pub(crate) async fn preflight(args: Preflight, _: Agent, format: Format) -> Result<ExitCode> {
    let mut checks: Vec<Row> = thyra_datapath::preflight(&args.bpffs)
        .into_iter()
        .map(|Check { name, outcome }| Row {
            name,
            ok: outcome.is_ok(),
            said: outcome.unwrap_or_else(|error| error.to_string()),
        })
        .collect();
    checks.push(namespaces());
    let found = Found {
        ready: checks.iter().all(|check| check.ok),
        attach: match Hook::newest() {
            Hook::Tcx => "tcx",
            Hook::Clsact => "clsact",
        },
        checks,
    };
    show(&found, format)?;
    Ok(if found.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Where pods' open connections are read.
fn namespaces() -> Row {
    let own = Path::new("/proc/self/ns/net");
    Row {
        name: "namespaces",
        ok: own.exists(),
        said: if own.exists() {
            "network namespaces can be entered by path".to_owned()
        } else {
            "this kernel has no network namespaces (`CONFIG_NET_NS`), or /proc is not mounted".to_owned()
        },
    }
}

/// Runs `thyra datapath`.
pub(crate) async fn run(command: Command, _: Agent, _: Format) -> Result<ExitCode> {
    let Command::Detach { bpffs, yes: _ } = command;
    Datapath::cleanup(&bpffs).context("not everything could be removed")?;
    println!("nothing of Thyra is left below `{}`", bpffs.display());
    Ok(ExitCode::SUCCESS)
}
