//! Child processes: every one is waited for, has its failure named, and can be given a time limit that it
//! can't outlive.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How often a silent child is looked at.
const POLL: Duration = Duration::from_millis(100);
/// What a child gets to clean up after SIGTERM before SIGKILL.
const GRACE: Duration = Duration::from_secs(20);
/// How long the output of grandchildren is still read once the child itself is gone.
const DRAIN: Duration = Duration::from_secs(1);

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It ended by itself with exit code 0.
    Success,
    /// It ended by itself with another code or by a signal.
    Failure(ExitStatus),
    /// It ran longer than it may, and was ended.
    TimedOut,
}

/// Runs a command with our own output; anything but success is an error that shows the command.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command for its standard output, trimmed; anything but success is an error with what it wrote.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}: {}", shown(command), output.status, said.trim());
    }
    let text =
        String::from_utf8(output.stdout).with_context(|| format!("`{}` wrote no UTF-8", shown(command)))?;
    Ok(text.trim().to_owned())
}

/// Whether a command starts and succeeds; its output is thrown away.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Runs a command and hands each line of its standard output to `on_line` as it comes.
pub(crate) fn stream(command: &mut Command, limit: Duration, mut on_line: impl FnMut(&str)) -> Result<End> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    let lines = lines_of(&mut child)?;
    let mut open = true;
    let mut gone: Option<(ExitStatus, Instant)> = None;
    loop {
        match lines.recv_timeout(POLL) {
            Ok(line) => on_line(&line),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) if open => open = false,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
        }
        if gone.is_none() {
            gone = child.try_wait()?.map(|status| (status, Instant::now()));
        }
        match gone {
            Some((status, when)) if !open || when.elapsed() > DRAIN => {
                return Ok(if status.success() {
                    End::Success
                } else {
                    End::Failure(status)
                });
            }
            None if started.elapsed() > limit => {
                terminate(&mut child)?;
                return Ok(End::TimedOut);
            }
            _ => {}
        }
    }
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The child's standard output by line, read on a thread so that silence can be timed.
fn lines_of(child: &mut Child) -> Result<mpsc::Receiver<String>> {
    let stdout = child.stdout.take().context("the child's output is not piped")?;
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

/// Ends a child that is ours and not yet waited for, so its pid can't have been given to another process.
fn terminate(child: &mut Child) -> Result<()> {
    kill_process(Pid::from_child(child), Signal::TERM).context("can't end the child")?;
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(POLL);
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Command, Duration, End, check, output, stream};

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn every_line_arrives_in_order() {
        let mut seen = Vec::new();
        let end = stream(
            &mut shell("echo a; echo b; exit 0"),
            Duration::from_secs(10),
            |line| {
                seen.push(line.to_owned());
            },
        );
        assert_eq!(end.expect("sh runs"), End::Success);
        assert_eq!(seen, ["a", "b"]);
    }

    #[test]
    fn a_failure_is_not_success() {
        let end = stream(&mut shell("exit 3"), Duration::from_secs(10), |_| ()).expect("sh runs");
        assert!(matches!(end, End::Failure(status) if status.code() == Some(3)));
        assert!(check(&mut shell("exit 1")).is_err());
        let said = output(&mut shell("echo why >&2; exit 1"))
            .expect_err("it failed")
            .to_string();
        assert!(said.contains("why"), "{said}");
    }

    #[test]
    fn a_child_can_not_outlive_its_limit() {
        let end = stream(&mut shell("exec sleep 60"), Duration::from_millis(300), |_| ()).expect("sh runs");
        assert_eq!(end, End::TimedOut);
    }

    #[test]
    fn output_held_open_by_a_grandchild_does_not_hang() {
        let end = stream(&mut shell("sleep 5 & exit 0"), Duration::from_secs(30), |_| ()).expect("sh runs");
        assert_eq!(end, End::Success);
    }
}
