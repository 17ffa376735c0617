//! `thyra dry-run --diff`: what a change of the files would change.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use thyra_datapath_abi::tables::Tables;
use thyra_policy_compiler::diff::{self, Side};
use thyra_policy_compiler::explain;
use thyra_policy_compiler::manifest::Manifests;
use thyra_policy_compiler::matrix::ANY_PORT;
use thyra_policy_compiler::world::World;
use thyra_proto::thyra::v1;
use tonic::Code;

use super::Args;
use crate::client::{Agent, refused};
use crate::output::{Format, GREEN, RED, Show, YELLOW, coloured, show};
use crate::policy::{BAD_INPUT, compiled, read_or_tell};

/// Some verdict changes.
const CHANGED: u8 = 5;
/// Sources that are named one by one.
const NAMED: usize = 4;

/// What changes.
#[derive(Debug, clap::Args)]
pub(super) struct Change {
    /// What changes when -f is applied over --manifests; without, on the running agent (exit code 5 when anything does)
    #[arg(long, conflicts_with_all = ["from", "to", "port", "live", "expect", "connections"])]
    pub(super) diff: bool,
    /// With --diff: a file whose objects are taken away; may be repeated
    #[arg(long, value_name = "FILE", requires = "diff")]
    delete: Vec<PathBuf>,
    /// With --diff: the folder as it will be, instead of -f and --delete
    #[arg(long, value_name = "DIR", requires_all = ["diff", "manifests"], conflicts_with_all = ["files", "delete"])]
    against: Option<PathBuf>,
}

/// The difference, as programs see it.
#[derive(Debug, Serialize)]
struct Shown {
    changes: Vec<Row>,
    /// Endpoints that come and go.
    added: Vec<String>,
    removed: Vec<String>,
    /// Open connections whose fate changes; null where files were compared.
    connections: Option<Vec<Open>>,
    /// What a running agent could not look at.
    notes: Vec<String>,
}

/// An open connection whose fate changes.
#[derive(Debug, Serialize)]
struct Open {
    /// `namespace/pod`, or an address that is nobody's.
    from: String,
    to: String,
    /// `address:port`.
    source: String,
    destination: String,
    /// allow | needs-l7 | deny
    before: String,
    after: String,
    why: String,
}

#[derive(Debug, Serialize)]
struct Row {
    to: String,
    ports: String,
    /// 4 or 6 where only one family changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<u8>,
    /// allow | needs-l7 | deny
    before: String,
    after: String,
    why: String,
    from: Vec<String>,
}

impl From<diff::Diff> for Shown {
    fn from(found: diff::Diff) -> Self {
        let row = |change: diff::Change| Row {
            to: change.endpoint,
            ports: explain::ports(&change.runs, ANY_PORT),
            ip: (change.family != 0).then_some(change.family),
            before: change.before.name().to_owned(),
            after: change.after.name().to_owned(),
            why: change.why,
            from: change.sources,
        };
        Self {
            changes: found.changes.into_iter().map(row).collect(),
            added: found.added,
            removed: found.removed,
            connections: None,
            notes: Vec::new(),
        }
    }
}

impl From<v1::DiffResponse> for Shown {
    fn from(found: v1::DiffResponse) -> Self {
        let row = |change: v1::DiffChange| Row {
            to: change.endpoint,
            ports: change.ports,
            ip: u8::try_from(change.family).ok().filter(|family| *family != 0),
            before: change.before,
            after: change.after,
            why: change.why,
            from: change.sources,
        };
        let open = |connection: v1::DiffConnection| Open {
            from: connection.from,
            to: connection.to,
            source: connection.source,
            destination: connection.destination,
            before: connection.before,
            after: connection.after,
            why: connection.why,
        };
        Self {
            changes: found.changes.into_iter().map(row).collect(),
            added: Vec::new(),
            removed: Vec::new(),
            connections: Some(found.connections.into_iter().map(open).collect()),
            notes: found.notes,
        }
    }
}

impl Open {
    fn text(&self) -> String {
        let (what, colour) = match self.after.as_str() {
            "allow" => ("is let in", GREEN),
            "deny" => ("is cut", RED),
            _ => ("needs L7", YELLOW),
        };
        format!(
            "open: {} ({}) -> {} ({}) {}: {}\n",
            self.from,
            self.source,
            self.to,
            self.destination,
            coloured(what, colour),
            self.why
        )
    }
}

impl Row {
    fn text(&self) -> String {
        let (verb, colour) = match (self.before.as_str(), self.after.as_str()) {
            (_, "allow") => ("gain", GREEN),
            (_, "deny") => ("lose", RED),
            ("needs-l7", _) => ("meet other conditions on", YELLOW),
            _ => ("need L7 for", YELLOW),
        };
        let who = match self.from.len() {
            1..=NAMED => self.from.join(", "),
            more => format!("{} sources ({}, …)", more, self.from[..NAMED].join(", ")),
        };
        // The first word is the verb.
        let (first, rest) = verb
            .split_once(' ')
            .map_or((verb, String::new()), |(a, b)| (a, format!(" {b}")));
        let verb = format!("{first}{}{rest}", if self.from.len() == 1 { "s" } else { "" });
        let family = self.ip.map(|ip| format!(" over IPv{ip}")).unwrap_or_default();
        let ports = if self.ports == ANY_PORT {
            "every port"
        } else {
            &self.ports
        };
        format!(
            "{who} {} {ports} on {}{family}: {}\n",
            coloured(&verb, colour),
            self.to,
            self.why
        )
    }
}

impl Show for Shown {
    fn text(&self) -> String {
        let mut text: String = self.changes.iter().map(Row::text).collect();
        for (what, names) in [("comes", &self.added), ("goes", &self.removed)] {
            for name in names {
                text += &format!("{name} {what}\n");
            }
        }
        if text.is_empty() {
            text += "no verdict changes\n";
        }
        text.extend(self.connections.iter().flatten().map(Open::text));
        text.extend(self.notes.iter().map(|note| format!("note: {note}\n")));
        text
    }
}

/// Runs the command.
pub(super) async fn run(args: &Args, agent: &Agent, format: Format) -> Result<ExitCode> {
    if args.files.is_empty() && args.change.delete.is_empty() && args.change.against.is_none() {
        bail!("`--diff` needs a change: `-f FILE`, `--delete FILE` or `--against DIR`");
    }
    let shown = match &args.manifests {
        Some(base) => offline(base, args)?,
        None => live(args, agent).await?,
    };
    let Some(shown) = shown else {
        return Ok(ExitCode::from(BAD_INPUT));
    };
    let same = shown.changes.is_empty() && shown.added.is_empty() && shown.removed.is_empty();
    show(&shown, format)?;
    Ok(if same {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(CHANGED)
    })
}

/// None when the files hold mistakes.
fn offline(base: &PathBuf, args: &Args) -> Result<Option<Shown>> {
    let Some(before) = read_or_tell(std::slice::from_ref(base))? else {
        return Ok(None);
    };
    let Some(after) = changed(&before, args)? else {
        return Ok(None);
    };
    let (before, after) = (compiled(&before)?, compiled(&after)?);
    let bar = progress_bar();
    let found = diff::diff(side(&before), side(&after), |done, total| {
        bar.set_length(u64::try_from(total).unwrap_or(u64::MAX));
        bar.set_position(u64::try_from(done).unwrap_or(u64::MAX));
    });
    bar.finish_and_clear();
    Ok(Some(Shown::from(found)))
}

/// The agent compares: it has the world, and the pods' sockets. None when the files hold mistakes.
async fn live(args: &Args, agent: &Agent) -> Result<Option<Shown>> {
    let request = v1::DiffRequest {
        apply: texts(&args.files)?,
        delete: texts(&args.change.delete)?,
    };
    let mut client = agent.connect().await?;
    let bar = progress_bar();
    bar.set_message("the agent compares");
    bar.enable_steady_tick(Duration::from_millis(100));
    let reply = client.admin.diff(request).await;
    bar.finish_and_clear();
    match reply {
        Ok(reply) => Ok(Some(Shown::from(reply.into_inner()))),
        Err(status) if status.code() == Code::InvalidArgument => {
            eprintln!("{}", status.message());
            Ok(None)
        }
        Err(status) => Err(refused(status)),
    }
}

/// All files as one of several documents; `-` is stdin.
fn texts(files: &[PathBuf]) -> Result<String> {
    let mut text = String::new();
    for file in files {
        let read = if file.as_os_str() == "-" {
            std::io::read_to_string(std::io::stdin())
        } else {
            std::fs::read_to_string(file)
        };
        text += &read.with_context(|| format!("read `{}`", file.display()))?;
        text += "\n---\n";
    }
    Ok(text)
}

/// The files after the change; none when they hold mistakes.
fn changed(before: &Manifests, args: &Args) -> Result<Option<Manifests>> {
    if let Some(folder) = &args.change.against {
        return read_or_tell(std::slice::from_ref(folder));
    }
    let mut after = before.clone();
    if !args.change.delete.is_empty() {
        let Some(gone) = read_or_tell(&args.change.delete)? else {
            return Ok(None);
        };
        if after.delete(&gone).is_empty() {
            bail!(
                "`--delete`: `{}` holds none of these objects",
                base(args).display()
            );
        }
    }
    if !args.files.is_empty() {
        let Some(more) = read_or_tell(&args.files)? else {
            return Ok(None);
        };
        after.apply(more);
    }
    Ok(Some(after))
}

fn base(args: &Args) -> &Path {
    args.manifests.as_deref().unwrap_or(Path::new(""))
}

fn side((world, tables): &(World, Tables)) -> Side<'_> {
    Side { world, tables }
}

/// On a terminal only.
fn progress_bar() -> ProgressBar {
    if std::io::stderr().is_terminal() {
        ProgressBar::new(0)
    } else {
        ProgressBar::hidden()
    }
}

#[cfg(test)]
mod tests {
    use thyra_policy_compiler::manifest;

    use super::*;

    #[test]
    fn a_lock_is_told_in_one_line_for_each_endpoint() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab/quickstart/manifests");
        let before = manifest::read_dir(&folder).unwrap();
        let lock = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                    metadata: {name: lock, namespace: shop}\n\
                    spec: {action: DENY, rules: [{to: [{operation: {ports: [\"8080\"]}}]}]}\n";
        let mut after = before.clone();
        after.apply(manifest::read_str("lock.yaml", lock).unwrap());
        let (before, after) = (compiled(&before).unwrap(), compiled(&after).unwrap());
        let shown = Shown::from(diff::diff(side(&before), side(&after), |_, _| {}));
        let wanted = "\
shop/cart, shop/catalog, shop/front lose 8080 on shop/cart: denied by shop/lock#0: policy denied
ops/monitor, shop/cart, shop/catalog, shop/front lose 8080 on shop/catalog: denied by shop/lock#0: policy denied
7 sources (ops/monitor, outside, payments/api, payments/ledger, …) lose 8080 on shop/front: denied by shop/lock#0: \
                      policy denied
";
        assert_eq!(shown.text(), wanted);
    }
}
