//! `thyra dry-run`: what policy says of a connection, from files or from a running agent, without sending it.
//!
//! Invariant: offline, the answer is read from the compiled tables by the engine, as the kernel would read
//! them.

mod offline;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, GREEN, RED, Show, coloured, show};
use crate::policy;
use crate::verdict::Verdict;

/// The files hold a mistake.
const BAD_INPUT: u8 = 2;
/// A verdict is not the expected one.
const UNEXPECTED: u8 = 3;
/// Tables and oracle differ.
const DISAGREE: u8 = 4;

/// `thyra dry-run`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    thyra dry-run --manifests policies/ --from shop/front --to shop/cart --port 8080\n  \
    thyra dry-run --from outside --to service/shop/cart --port 80 --expect deny\n\n\
    Without files the running agent answers. Exit codes: 0 answered, 1 error, 2 bad files, 3 a verdict is not the \
    expected one, 4 tables and oracle differ.")]
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
    #[arg(long)]
    from: String,
    /// Whom: namespace/pod or service/namespace/name
    #[arg(long)]
    to: String,
    /// The port that is dialled: the pod's, or the Service's
    #[arg(long)]
    port: u16,
    /// Address family
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(4..=6))]
    ip: u8,
    /// Exit with 3 unless every verdict is this
    #[arg(long, value_enum)]
    expect: Option<Expected>,
    /// Also ask the oracle; exit with 4 if it differs (files only)
    #[arg(long)]
    with_oracle: bool,
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
}

#[derive(Debug, Serialize)]
struct Answers(Vec<Answer>);

impl Show for Answers {
    fn text(&self) -> String {
        let line = |a: &Answer| {
            let colour = if a.verdict.action == "allow" { GREEN } else { RED };
            format!(
                "{} -> {}:{}  {}\n",
                a.from,
                a.to,
                a.port,
                coloured(&a.verdict.sentence(), colour)
            )
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
        anyhow::bail!("`--ip 5`: there are IPv4 and IPv6; give 4 or 6");
    }
    let files: Vec<PathBuf> = args.manifests.iter().chain(&args.files).cloned().collect();
    let (answers, disagreement) = if files.is_empty() {
        (live(&args, &agent).await?, None)
    } else {
        match policy::read(&files)? {
            Ok(manifests) => offline::answer(&manifests, &args)?,
            Err(errors) => {
                for error in errors {
                    eprintln!("error: {error}");
                }
                return Ok(ExitCode::from(BAD_INPUT));
            }
        }
    };
    show(&answers, format)?;
    if let Some(difference) = disagreement {
        eprintln!("tables and oracle differ: {difference}");
        return Ok(ExitCode::from(DISAGREE));
    }
    let met = args.expect.is_none_or(|expected| answers.all(expected));
    Ok(if met {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(UNEXPECTED)
    })
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
    };
    Ok(Answers(reply.verdicts.into_iter().map(answer).collect()))
}
