//! An Envoy that outlives its supervisor, and how the next one knows it again.
//!
//! Invariant: a process is taken over only if it is the one that was noted, is alone in Envoy's control group, runs the
//! same binary as the same user, and was started by this very build of Thyra with this very configuration. Everything
//! else that runs there is ended by whoever finds it.
//!
//! What is noted lies where only root writes: Envoy could forge what is in its own folder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::net::unix::pipe;
use tracing::{info, warn};

use super::process::Process;
use super::{BOOTSTRAP, EnvoyConfig};
use crate::ads::hex;
use crate::bootstrap::bootstrap;
use crate::keep;

/// Which process it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) pid: u32,
    /// Ticks since boot (proc_pid_stat(5), field 22): with the number it names one process.
    pub(super) started: u64,
    pub(super) fingerprint: String,
}

/// A process that was found to be the Envoy of an earlier supervisor.
#[derive(Debug)]
pub struct Left(pub(super) Process);

impl Left {
    /// The Envoy that an earlier supervisor with this configuration left at work, if there is one. Needs a tokio
    /// runtime.
    #[must_use]
    pub fn find(config: &EnvoyConfig) -> Option<Self> {
        match found(config) {
            Ok(process) => {
                info!(pid = process.pid(), "envoy is at work");
                Some(Self(process))
            }
            Err(why) => {
                info!(why, "no envoy is taken over");
                None
            }
        }
    }
}

fn found(config: &EnvoyConfig) -> Result<Process, String> {
    let (Some(file), Some(cgroup)) = (&config.note, &config.cgroup) else {
        return Err("it doesn't outlive its supervisor".to_owned());
    };
    let unreadable = |what: &'static str| move |error: io::Error| format!("{what} can't be read: {error}");
    let note: Note = match keep::load(file).map_err(unreadable("what was noted"))? {
        Some(note) => note,
        None => return Err("none was left".to_owned()),
    };
    if note.fingerprint != fingerprint(config).map_err(unreadable("its configuration"))? {
        return Err("it was started by another build or with another configuration".to_owned());
    }
    // From here on its number can't become another's unnoticed.
    let process = Process::of_other(note.pid).map_err(|error| format!("it has gone: {error}"))?;
    let running = fs::read_to_string(cgroup.join("cgroup.procs")).map_err(unreadable("its control group"))?;
    if running.trim() != note.pid.to_string() {
        return Err("others run in its control group, or nobody".to_owned());
    }
    let is = started(note.pid).map_err(unreadable("its start"))?;
    if is != note.started {
        return Err("its number is another's now".to_owned());
    }
    let runs = fs::metadata(format!("/proc/{}/exe", note.pid)).map_err(unreadable("its program"))?;
    let own = fs::metadata(&config.binary.path).map_err(unreadable("the binary"))?;
    if (runs.dev(), runs.ino()) != (own.dev(), own.ino()) {
        return Err("it runs another program".to_owned());
    }
    let user = user(note.pid).map_err(unreadable("its user"))?;
    if config.user.is_some_and(|(uid, _)| uid != user) {
        return Err("it is another user's".to_owned());
    }
    Ok(process)
}

/// Notes which process is to be known again.
pub(super) fn note(config: &EnvoyConfig, pid: u32) -> io::Result<()> {
    let Some(file) = &config.note else {
        return Ok(());
    };
    let note = Note {
        pid,
        started: started(pid)?,
        fingerprint: fingerprint(config)?,
    };
    keep::store(file, &note)
}

/// Ends what was started with this configuration and never came into its control group, because its supervisor ended in
/// that moment.
pub fn end_strays(config: &EnvoyConfig) {
    let (Ok(all), Some(cgroup)) = (fs::read_dir("/proc"), &config.cgroup) else {
        return;
    };
    let placed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let placed: Vec<u32> = placed.lines().filter_map(|line| line.parse().ok()).collect();
    let own = config.folder.join(BOOTSTRAP);
    for entry in all.flatten() {
        let pid: Option<u32> = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|pid| !placed.contains(pid)) else {
            continue;
        };
        let is_ours = || {
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut words = words.split(|byte| *byte == 0);
            let asks = words.any(|word| word == own.as_os_str().as_encoded_bytes());
            asks && config
                .user
                .is_none_or(|(uid, _)| user(pid).is_ok_and(|user| user == uid))
        };
        if !is_ours() {
            continue;
        }
        // Its number could be another's by now: asked again once it can't be any more.
        let Ok(process) = Process::of_other(pid) else {
            continue;
        };
        if is_ours() {
            warn!(pid, "an envoy that nobody watches is ended");
            if let Err(error) = process.signal(rustix::process::Signal::KILL) {
                warn!(pid, %error, "it can't be ended");
            }
        }
    }
}

/// Whose process it is.
pub(super) fn user(pid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let real = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    real.ok_or_else(|| io::Error::other("not as proc_pid_status(5) says"))
}

/// When a process was started.
pub(super) fn started(pid: u32) -> io::Result<u64> {
    Ok(stat(pid)?.1)
}

/// Whether the process that was started then has not ended; one that nobody has waited for has.
pub(super) fn is_alive(pid: u32, started: u64) -> bool {
    stat(pid).is_ok_and(|(state, since)| since == started && !matches!(state, 'Z' | 'X'))
}

/// The state of a process, and when it was started.
fn stat(pid: u32) -> io::Result<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; the third field is the first one behind it.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let read = fields.and_then(|mut fields| {
        let state = fields.next()?.chars().next()?;
        Some((state, fields.nth(18)?.parse().ok()?))
    });
    read.ok_or_else(|| io::Error::other("not as proc_pid_stat(5) says"))
}

/// What tells a file from every other one, and from itself after a change.
pub(super) fn file(path: &Path) -> io::Result<String> {
    let m = fs::metadata(path)?;
    Ok(format!(
        "{}:{}:{}:{}.{}",
        m.dev(),
        m.ino(),
        m.size(),
        m.mtime(),
        m.mtime_nsec()
    ))
}

/// All that a running Envoy can't be told anew: its program, its flags, its bootstrap, and which build of Thyra says
/// what its resources are (the versions of equal resources of two builds may be equal).
fn fingerprint(config: &EnvoyConfig) -> io::Result<String> {
    let text = bootstrap(
        &config.node,
        &config.xds_socket(),
        &config.admin_socket(),
        config.heap,
    );
    let all = [
        file(&config.binary.path)?,
        file(Path::new("/proc/self/exe"))?,
        config.binary.version.to_string(),
        config.folder.display().to_string(),
        config.concurrency.to_string(),
        format!("{:?}", config.user),
        text.to_string(),
    ];
    let digest = all.iter().fold(Sha256::new(), |digest, part| {
        digest.chain_update(part.len().to_be_bytes()).chain_update(part)
    });
    Ok(hex(&digest.finalize()))
}

/// Where Envoy writes its lines, and where they are read: a named pipe that outlives both. Envoy's own end is one for
/// reading too and doesn't block, so that it neither gets a signal nor stands still while nobody reads.
pub(super) fn lines(note: &Path) -> io::Result<(pipe::Receiver, File)> {
    let path = note.with_extension("log");
    let mode = Mode::RUSR | Mode::WUSR;
    match mknodat(CWD, &path, FileType::Fifo, mode, makedev(0, 0)) {
        Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
        _ => {}
    }
    let receiver = pipe::OpenOptions::new().read_write(true).open_receiver(&path)?;
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let end = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&path)?;
    Ok((receiver, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envoy::{Binary, DEFAULT_HEAP, OLDEST};

    /// `sleep` plays the Envoy, in a control group that is a folder with a file.
    fn config(folder: &Path) -> EnvoyConfig {
        EnvoyConfig {
            binary: Binary {
                path: fs::canonicalize("/bin/sleep").unwrap(),
                version: OLDEST,
            },
            folder: folder.to_owned(),
            node: "test".to_owned(),
            concurrency: 1,
            heap: DEFAULT_HEAP,
            user: None,
            cgroup: Some(folder.to_owned()),
            note: Some(folder.join("envoy.json")),
        }
    }

    #[tokio::test]
    async fn only_the_very_process_that_was_noted_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let procs = folder.path().join("cgroup.procs");
        let mut sleeping = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let mut other = std::process::Command::new("/bin/cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(&procs, format!("{}\n", sleeping.id())).unwrap();
        let why = |config: &EnvoyConfig| found(config).map(|process| process.pid());
        assert_eq!(why(&config), Err("none was left".to_owned()));
        note(&config, sleeping.id()).unwrap();
        assert_eq!(why(&config), Ok(sleeping.id()));

        let more = EnvoyConfig {
            heap: 1,
            ..config.clone()
        };
        assert!(why(&more).unwrap_err().contains("another configuration"));
        let mut binary = config.clone();
        binary.binary.path = fs::canonicalize("/bin/cat").unwrap();
        assert!(why(&binary).unwrap_err().contains("another configuration"));

        fs::write(&procs, format!("{}\n{}\n", sleeping.id(), other.id())).unwrap();
        assert!(why(&config).unwrap_err().contains("others run"));
        fs::write(&procs, "").unwrap();
        assert!(why(&config).unwrap_err().contains("others run"));

        note(&config, other.id()).unwrap();
        fs::write(&procs, format!("{}\n", other.id())).unwrap();
        assert!(why(&config).unwrap_err().contains("another program"));

        note(&config, sleeping.id()).unwrap();
        fs::write(&procs, format!("{}\n", sleeping.id())).unwrap();
        let file = config.note.as_ref().unwrap();
        let mut forged: Note = keep::load(file).unwrap().unwrap();
        forged.started += 1;
        keep::store(file, &forged).unwrap();
        assert!(why(&config).unwrap_err().contains("another's now"));
        fs::write(file, "{").unwrap();
        assert!(why(&config).unwrap_err().contains("can't be read"));

        for child in [&mut sleeping, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        note(&config, std::process::id()).unwrap();
        let mut gone: Note = keep::load(file).unwrap().unwrap();
        gone.pid = sleeping.id();
        keep::store(file, &gone).unwrap();
        assert!(why(&config).unwrap_err().contains("it has gone"));
    }

    #[tokio::test]
    async fn lines_are_read_by_whoever_comes_next_and_nobody_stands_still_without() {
        use std::io::Write as _;
        use tokio::io::AsyncReadExt as _;

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("envoy.json");
        let (reader, mut end) = lines(&file).unwrap();
        drop(reader);
        end.write_all(b"nobody reads\n").unwrap();
        let full = loop {
            if let Err(error) = end.write_all(&[b'.'; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let (mut reader, _end) = lines(&file).unwrap();
        let mut text = [0; 12];
        reader.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"nobody reads");
    }
}
