//! A lab that stays up: the process in the background, and the commands that reach it.
//!
//! ```text
//! thyra lab up ──starts──► thyra lab supervise (owns the lab) ◄──control.sock── thyra lab apply | delete
//! ```
//!
//! Invariant: a change is one request and one answer; the answer comes when it is enforced or has failed.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

use super::command::{Janitor, asked_to_end, check_needs, choice, read_scenario, record, runtime};
use super::object::objects;
use super::registry::{self, RunDir};
use super::running::Lab;
use super::scenario::{Scenario, ScenarioError, read_manifest_text};
use super::{BadInput, ChangeArgs, Choices, progress};

/// How often `up` looks how far it is.
const POLL: Duration = Duration::from_millis(50);

/// How long a program that ended stays down.
const REVIVE_EVERY: Duration = Duration::from_secs(1);

/// What `apply` and `delete` ask.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    delete: bool,
    /// Name and text of each file.
    files: Vec<(String, String)>,
}

/// What they are told.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    error: Option<String>,
    objects: Vec<String>,
}

/// Starts the supervisor and waits until the lab is up.
pub(super) fn up(choices: &Choices) -> anyhow::Result<ExitCode> {
    // Mistakes are found here, in the foreground; the supervisor reads it again.
    Scenario::read(&choices.folder)?;
    check_needs(choices)?;
    let dir = RunDir::create()?;
    let mut child = match start(&dir, choices) {
        Ok(child) => child,
        Err(error) => {
            registry::remove(&dir)?;
            return Err(error);
        }
    };
    match wait_until_ready(&dir, &mut child) {
        Ok(()) => {
            progress(&usage(&dir));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            registry::stop(&dir)?;
            Err(error)
        }
    }
}

fn start(dir: &RunDir, choices: &Choices) -> anyhow::Result<Child> {
    let own = std::env::current_exe().context("can't find this program's own file")?;
    let log = std::fs::File::create(dir.log()).context("can't write the lab's log")?;
    let mut command = Command::new(own);
    command.args(["lab", "supervise", &dir.id]).arg(&choices.folder);
    for (flag, given) in [("--istiod", choices.istiod), ("--no-agent", choices.no_agent)] {
        if given {
            command.arg(flag);
        }
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("can't share the lab's log")?)
        .stderr(log);
    command.spawn().context("can't start the lab's supervisor")
}

/// Shows the supervisor's log as it grows, until the lab is up or its process has ended.
fn wait_until_ready(dir: &RunDir, child: &mut Child) -> anyhow::Result<()> {
    let mut log = std::fs::File::open(dir.log()).context("can't read the lab's log")?;
    loop {
        let ended = child.try_wait().context("can't ask for the supervisor's state")?;
        let ready = dir.read().is_some_and(|record| record.ready);
        let mut text = String::new();
        log.read_to_string(&mut text)
            .context("can't read the lab's log")?;
        for line in text.lines() {
            progress(line);
        }
        if ready {
            return Ok(());
        }
        if let Some(status) = ended {
            bail!("the lab did not come up ({status})");
        }
        std::thread::sleep(POLL);
    }
}

fn usage(dir: &RunDir) -> String {
    format!(
        "lab `{id}` is up; its agent's socket is {socket}\n\n  \
         thyra endpoint list\n  \
         thyra lab exec NAMESPACE/POD -- curl -s http://ADDRESS:PORT/\n  \
         thyra lab apply -f policy.yaml\n  \
         thyra lab down {id}",
        id = dir.id,
        socket = dir.agent_socket(0).display()
    )
}

/// The background process.
pub(super) fn supervise(id: &str, choices: &Choices) -> anyhow::Result<ExitCode> {
    // It lives on when the terminal is closed.
    rustix::process::setsid().context("can't leave the terminal")?;
    let dir = RunDir::parse(id).context("not an id of a lab")?;
    let scenario = read_scenario(choices)?;
    let janitor = Janitor::start(&dir)?;
    dir.write(&record(&dir, &scenario, choices, false))?;
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = stay_up(&dir, &scenario, choices) => done,
            ended = asked_to_end() => ended,
        }
    });
    drop(runtime);
    if let Err(error) = &done {
        progress(&format!("error: {error:#}"));
        // `up` shows the log before it removes the folder.
        std::thread::sleep(POLL * 4);
    }
    registry::remove(&dir)?;
    janitor.dismiss();
    done.map(|()| ExitCode::SUCCESS)
}

async fn stay_up(dir: &RunDir, scenario: &Scenario, choices: &Choices) -> anyhow::Result<()> {
    let mut lab = Lab::up(dir, scenario, choice(choices)).await?;
    let listener =
        tokio::net::UnixListener::bind(dir.control_socket()).context("can't listen for commands")?;
    progress(lab.describe().trim_end());
    dir.write(&record(dir, scenario, choices, true))?;
    let mut rounds = tokio::time::interval(REVIVE_EVERY);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.context("can't take commands")?;
                // One at a time: a change is made on the state that the last one left.
                if let Err(error) = answer(&mut lab, stream).await {
                    progress(&format!("a command went away: {error:#}"));
                }
            }
            _ = rounds.tick() => lab.revive()?.iter().for_each(|text| progress(text)),
        }
    }
}

async fn answer(lab: &mut Lab, stream: tokio::net::UnixStream) -> anyhow::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(reader).read_line(&mut line).await?;
    let request: Request = serde_json::from_str(&line)?;
    let answer = match serve(lab, &request).await {
        Ok(objects) => Answer { error: None, objects },
        Err(error) => Answer {
            error: Some(format!("{error:#}")),
            objects: Vec::new(),
        },
    };
    writer
        .write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes())
        .await?;
    Ok(())
}

async fn serve(lab: &mut Lab, request: &Request) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for (name, text) in &request.files {
        all.extend(objects(&read_manifest_text(name, text)?));
    }
    if request.delete {
        lab.delete(&all).await?;
    } else {
        lab.apply(&all).await?;
    }
    Ok(all
        .iter()
        .map(|object| format!("{} {}", object.kind, object.key()))
        .collect())
}

/// `thyra lab apply` and `delete`.
pub(super) fn change(args: &ChangeArgs, delete: bool) -> anyhow::Result<ExitCode> {
    let mut files = Vec::new();
    let mut problems = Vec::new();
    for path in &args.files {
        let (name, text) = read_file(path)?;
        if let Err(ScenarioError(found)) = read_manifest_text(&name, &text) {
            problems.extend(found);
        }
        files.push((name, text));
    }
    if !problems.is_empty() {
        return Err(ScenarioError(problems).into());
    }
    let dir = registry::find(args.lab.as_deref())?;
    let mut stream = UnixStream::connect(dir.control_socket())
        .with_context(|| format!("lab `{}` takes no commands; is it still coming up?", dir.id))?;
    let request = serde_json::to_string(&Request { delete, files })?;
    stream
        .write_all(format!("{request}\n").as_bytes())
        .context("the lab went away")?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .context("the lab went away")?;
    let answer: Answer = serde_json::from_str(&line).context("the lab went away")?;
    if let Some(error) = answer.error {
        bail!(error);
    }
    for object in answer.objects {
        progress(&format!(
            "{object} {}",
            if delete { "deleted" } else { "enforced" }
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn read_file(path: &Path) -> anyhow::Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("can't read standard input")?;
        return Ok(("standard input".to_owned(), text));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| BadInput(format!("can't read `{}`: {error}", path.display())))?;
    Ok((path.display().to_string(), text))
}
