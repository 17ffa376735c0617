//! The lab's commands that begin and end in the foreground.
//!
//! Invariant: `run` leaves nothing behind: not on success, not on failure, not on Ctrl-C, not when it is
//! killed.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

use super::netns::Netns;
use super::registry::{self, Record, RunDir};
use super::report::Report;
use super::running::{Choice, Lab};
use super::scenario::Scenario;
use super::{BadInput, Choices, DownArgs, ExecArgs, progress};

/// Removes the lab when this process is gone.
pub(super) struct Janitor {
    child: Child,
    /// Closed when this process ends, however it ends.
    line: Option<ChildStdin>,
}

impl Janitor {
    /// # Errors
    /// The process can't be started.
    pub(super) fn start(dir: &RunDir) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("can't find this program's own file")?;
        let mut child = Command::new(own)
            .args(["lab", "janitor", &dir.id])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C must not end the one who cleans up.
            .process_group(0)
            .spawn()
            .context("can't start the lab's janitor")?;
        let line = child.stdin.take();
        Ok(Self { child, line })
    }

    /// The lab is removed already: the janitor finds nothing to do.
    pub(super) fn dismiss(mut self) {
        self.line.take();
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "janitor's end not seen");
        }
    }
}

pub(super) fn janitor(id: &str) -> anyhow::Result<ExitCode> {
    // Nothing is ever sent; the read ends when the other end is closed.
    std::io::stdin()
        .read_to_end(&mut Vec::new())
        .context("can't watch the lab's process")?;
    registry::remove(&RunDir::parse(id).context("not an id of a lab")?)?;
    Ok(ExitCode::SUCCESS)
}

/// What this lab needs, asked before anything is made.
pub(super) fn check_needs(choices: &Choices) -> anyhow::Result<()> {
    check_rights()?;
    if !choices.no_agent {
        super::agent::program()?;
    }
    if choices.istiod {
        super::cluster::binaries()?;
    }
    Ok(())
}

/// Making namespaces and entering them is root's alone.
fn check_rights() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "a lab needs root (CAP_NET_ADMIN, CAP_BPF, CAP_SYS_ADMIN): it makes network namespaces and loads \
             programs into the kernel; run it with sudo"
        );
    }
    Ok(())
}

pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")
}

/// Reads the scenario, and says what in it is not looked at.
pub(super) fn read_scenario(choices: &Choices) -> anyhow::Result<Scenario> {
    let scenario = Scenario::read(&choices.folder)?;
    for ignored in &scenario.manifests.ignored {
        progress(&format!(
            "{}: {} `{}` changes no verdict; ignored",
            ignored.at, ignored.kind, ignored.name
        ));
    }
    for warning in &scenario.manifests.warnings {
        progress(&format!("warning: {warning}"));
    }
    Ok(scenario)
}

pub(super) fn record(dir: &RunDir, scenario: &Scenario, choices: &Choices, ready: bool) -> Record {
    let pid = registry::own_pid();
    Record {
        id: dir.id.clone(),
        scenario: scenario.name(),
        folder: std::path::absolute(&choices.folder).unwrap_or_else(|_| choices.folder.clone()),
        control_plane: if choices.istiod { "istiod" } else { "embedded" }.to_owned(),
        pid,
        started: registry::start_time(pid).unwrap_or(0),
        ready,
    }
}

pub(super) fn choice(choices: &Choices) -> Choice {
    Choice {
        istiod: choices.istiod,
        no_agent: choices.no_agent,
    }
}

/// Resolves when the user or the system wants this process to end.
pub(super) async fn asked_to_end() -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("can't watch for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("can't watch for SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("can't watch for SIGHUP")?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

pub(super) fn run(choices: &Choices, json: bool) -> anyhow::Result<ExitCode> {
    let scenario = read_scenario(choices)?;
    check_needs(choices)?;
    let dir = RunDir::create()?;
    let janitor = Janitor::start(&dir);
    let done = janitor.and_then(|janitor| {
        dir.write(&record(&dir, &scenario, choices, false))?;
        let runtime = runtime()?;
        let report = runtime.block_on(async {
            tokio::select! {
                report = try_out(&dir, &scenario, choices) => report,
                ended = asked_to_end() => ended.and_then(|()| bail!("interrupted")),
            }
        });
        // Servers and streams end here, before their namespaces do.
        drop(runtime);
        Ok((report, janitor))
    });
    let removed = registry::remove(&dir);
    let (report, janitor) = done?;
    janitor.dismiss();
    let report = report?;
    removed.context("the lab could not be removed whole")?;
    print(&report, json)?;
    Ok(if report.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn try_out(dir: &RunDir, scenario: &Scenario, choices: &Choices) -> anyhow::Result<Report> {
    let started = std::time::Instant::now();
    let mut lab = Lab::up(dir, scenario, choice(choices)).await?;
    progress(&format!(
        "up in {:.1} s; {} probes",
        started.elapsed().as_secs_f64(),
        scenario.probes.len()
    ));
    let mut results = Vec::new();
    for (index, entry) in scenario.probes.iter().enumerate() {
        let result = lab.run(index, entry, scenario).await;
        if !result.ok {
            progress(&entry.problem(format!("expected {}, got {}", result.expect, result.actual)));
        }
        results.push(result);
    }
    let generation = lab.generation().await?;
    let report = Report::new(scenario.name(), lab.control_plane_name(), generation, results);
    lab.stop().await;
    Ok(report)
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let text = if json {
        serde_json::to_string_pretty(report)?
    } else {
        report.table(out.is_terminal())
    };
    writeln!(out, "{text}").context("can't write the report")
}

/// Becomes the command, inside the place.
pub(super) fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    check_rights()?;
    let dir = registry::find(args.lab.as_deref())?;
    let prefix = dir.prefix();
    let name = match args.place.as_str() {
        "host" => format!("{prefix}n0"),
        "outside" => format!("{prefix}outside"),
        place => format!("{prefix}{}", place.replace('/', ".")),
    };
    let netns = Netns::open(&name).map_err(|_| {
        let known = super::netns::with_prefix(&prefix).unwrap_or_default();
        let known: Vec<String> = known.iter().map(|name| place_of(name, &prefix)).collect();
        BadInput(format!(
            "no place `{}` in lab `{}`; there are {}",
            args.place,
            dir.id,
            known.join(", ")
        ))
    })?;
    netns.enter().context("can't enter the place")?;
    let Some((program, arguments)) = args.command.split_first() else {
        bail!("nothing to run")
    };
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("can't run `{program}`"))
}

/// How `exec` calls a namespace.
fn place_of(name: &str, prefix: &str) -> String {
    match name.strip_prefix(prefix).unwrap_or(name) {
        "n0" => "host".to_owned(),
        place => place.replacen('.', "/", 1),
    }
}

pub(super) fn down(args: &DownArgs) -> anyhow::Result<ExitCode> {
    check_rights()?;
    let labs = match &args.name {
        None if args.all || registry::all().is_empty() => registry::all(),
        // What is gone already is down; its namespaces may be left.
        Some(id) if registry::is_unknown(id) => {
            registry::sweep(id)?;
            progress(&format!("no lab `{id}` runs"));
            return Ok(ExitCode::SUCCESS);
        }
        name => vec![registry::find(name.as_deref())?],
    };
    if labs.is_empty() {
        progress("no lab runs");
    }
    for dir in labs {
        registry::stop(&dir).with_context(|| format!("lab `{}` could not be removed whole", dir.id))?;
        progress(&format!("lab `{}` is down", dir.id));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn list() -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{:<8}{:<20}{:<14}{:<8}SOCKET",
        "ID", "SCENARIO", "CONTROL PLANE", "STATE"
    )?;
    for dir in registry::all() {
        let Some(record) = dir.read() else { continue };
        let alive = registry::start_time(record.pid) == Some(record.started);
        let state = match (alive, record.ready) {
            (false, _) => "dead",
            (true, false) => "start",
            (true, true) => "up",
        };
        let socket = dir.agent_socket(0);
        writeln!(
            out,
            "{:<8}{:<20}{:<14}{state:<8}{}",
            record.id,
            record.scenario,
            record.control_plane,
            socket.display()
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
