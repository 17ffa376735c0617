//! `thyra dry-run`: what policy says of a connection, from files or from a running agent, without sending it.
//!
//! Invariant: offline, the answer is read from the compiled tables by the engine, as the kernel would read
//! them.

mod batch;
mod diff;
mod offline;
mod question;

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use thyra_policy_compiler::manifest::Manifests;
use thyra_proto::thyra::v1;

use self::offline::Offline;
use self::question::First;
use crate::client::{Agent, refused};
use crate::output::{Format, GREEN, RED, Show, coloured, show};
use crate::policy::{self, BAD_INPUT};
use crate::verdict::Verdict;

/// A verdict is not the expected one.
const UNEXPECTED: u8 = 3;
/// Tables and oracle differ.
const DISAGREE: u8 = 4;

/// `thyra dry-run`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    thyra dry-run --manifests policies/ --from shop/front --to shop/cart --port 8080\n  \
    thyra dry-run --manifests policies/ --from shop/front --to shop/cart --port 8080 --path /admin --explain\n  \
    thyra dry-run --manifests policies/ --connections connections.jsonl > verdicts.jsonl\n  \
    thyra dry-run --diff --manifests policies/ -f change.yaml --delete old-policy.yaml\n  \
    thyra dry-run --diff -f change.yaml      (on this node, with the open connections that would be cut)\n  \
    thyra dry-run --from outside --to service/shop/cart --port 80 --expect deny\n\n\
    Without files the running agent answers. Exit codes: 0 answered, 1 error, 2 bad files or lines, 3 a verdict is \
    not the expected one, 4 tables and oracle differ, 5 the change changes verdicts.")]
pub(crate) struct Args {
    /// Folder of manifests
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// File of manifests, or - for stdin; may be repeated
    #[arg(short, long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Ask the running agent (the default without files)
    #[arg(long, conflicts_with_all = ["manifests", "files"])]
    live: bool,
    /// Who connects: namespace/pod, namespace/sa/NAME, an address, or outside (203.0.113.7, 2001:db8::7)
    #[arg(
        long,
        required_unless_present_any = ["connections", "diff"],
        default_value = "",
        hide_default_value = true
    )]
    from: String,
    /// Whom: namespace/pod or service/namespace/name
    #[arg(
        long,
        required_unless_present_any = ["connections", "diff"],
        default_value = "",
        hide_default_value = true
    )]
    to: String,
    /// The port that is dialled: the pod's, or the Service's
    #[arg(
        long,
        required_unless_present_any = ["connections", "diff"],
        default_value_t = 0,
        hide_default_value = true
    )]
    port: u16,
    /// Address family
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(4..=6))]
    ip: u8,
    #[command(flatten)]
    first: First,
    /// Every policy that was looked at, and the clause that made it match or not (files only)
    #[arg(long)]
    explain: bool,
    /// One JSON connection a line, from a file or - for stdin; one JSON verdict a line (files only)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "port", "live", "expect", "explain", "first"])]
    connections: Option<PathBuf>,
    #[command(flatten)]
    change: diff::Change,
    /// Which reading a stream has: by what the port declares, or as the line or the options say
    #[arg(long, value_enum, default_value_t = Protocol::Declared)]
    protocol: Protocol,
    /// Exit with 3 unless every verdict is this
    #[arg(long, value_enum)]
    expect: Option<Expected>,
    /// Also ask the oracle; exit with 4 if it differs (files only)
    #[arg(long)]
    with_oracle: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Protocol {
    Declared,
    AsGiven,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Expected {
    Allow,
    Deny,
}

/// The verdict for one pod behind `--to`.
#[derive(Debug, Serialize)]
struct Answer {
    from: String,
    to: String,
    port: u32,
    verdict: Verdict,
    /// What was looked at, in words; empty unless it was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    trace: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Answers(Vec<Answer>);

impl Show for Answers {
    fn text(&self) -> String {
        let line = |a: &Answer| {
            let colour = if a.verdict.action == "allow" { GREEN } else { RED };
            let verdict = coloured(&a.verdict.sentence(), colour);
            let mut text = format!("{} -> {}:{}  {verdict}\n", a.from, a.to, a.port);
            for looked in &a.trace {
                text += &format!("  {looked}\n");
            }
            text
        };
        self.0.iter().map(line).collect()
    }
}

impl Answers {
    fn all(&self, expected: Expected) -> bool {
        self.0
            .iter()
            .all(|a| (a.verdict.action == "allow") == (expected == Expected::Allow))
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args, agent: Agent, format: Format) -> Result<ExitCode> {
    if args.ip == 5 {
        bail!("`--ip 5`: there are IPv4 and IPv6; give 4 or 6");
    }
    if args.change.diff {
        return diff::run(&args, &agent, format).await;
    }
    let files: Vec<PathBuf> = args.manifests.iter().chain(&args.files).cloned().collect();
    if files.is_empty() {
        if args.connections.is_some() || args.explain || args.with_oracle || !args.first.is_empty() {
            bail!(
                "requests, `--connections`, `--explain` and `--with-oracle` are for files; \
                 give `--manifests DIR` or `-f FILE`"
            );
        }
        let answers = live(&args, &agent).await?;
        show(&answers, format)?;
        return Ok(exit_code(&args, &answers));
    }
    let Some(manifests) = policy::read_or_tell(&files)? else {
        return Ok(ExitCode::from(BAD_INPUT));
    };
    if let Some(connections) = &args.connections {
        return many(&manifests, &args, connections);
    }
    let (answers, differences) = question::answer(&manifests, &args)?;
    show(&answers, format)?;
    if let Some(difference) = differences.first() {
        eprintln!("tables and oracle differ: {difference}");
        return Ok(ExitCode::from(DISAGREE));
    }
    Ok(exit_code(&args, &answers))
}

fn exit_code(args: &Args, answers: &Answers) -> ExitCode {
    if args.expect.is_none_or(|expected| answers.all(expected)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(UNEXPECTED)
    }
}

/// `--connections`: lines in, lines out.
fn many(manifests: &Manifests, args: &Args, connections: &PathBuf) -> Result<ExitCode> {
    let offline = Offline::new(manifests, &[], args.protocol == Protocol::AsGiven)?;
    let mut output = BufWriter::new(std::io::stdout().lock());
    let totals = if connections.as_os_str() == "-" {
        batch::run(&offline, args.with_oracle, std::io::stdin().lock(), &mut output)?
    } else {
        let file = File::open(connections).with_context(|| format!("open `{}`", connections.display()))?;
        batch::run(&offline, args.with_oracle, BufReader::new(file), &mut output)?
    };
    if totals.differences > 0 {
        eprintln!("tables and oracle differ on {} connections", totals.differences);
        return Ok(ExitCode::from(DISAGREE));
    }
    if totals.errors > 0 {
        eprintln!(
            "{} lines could not be judged; their answer says why",
            totals.errors
        );
        return Ok(ExitCode::from(BAD_INPUT));
    }
    Ok(ExitCode::SUCCESS)
}

async fn live(args: &Args, agent: &Agent) -> Result<Answers> {
    let mut client = agent.connect().await?;
    let request = v1::DryRunRequest {
        from: args.from.clone(),
        to: args.to.clone(),
        port: args.port.into(),
        family: args.ip.into(),
    };
    let reply = client.admin.dry_run(request).await.map_err(refused)?.into_inner();
    let answer = |v: v1::DryRunVerdict| Answer {
        from: args.from.clone(),
        to: v.to,
        port: v.port,
        verdict: v
            .verdict
            .as_ref()
            .map(Verdict::from)
            .unwrap_or_else(|| Verdict::from(&v1::Verdict::default())),
        trace: Vec::new(),
    };
    Ok(Answers(reply.verdicts.into_iter().map(answer).collect()))
}
