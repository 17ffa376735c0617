//! Starting the process: with nothing that it doesn't need.
//!
//! Invariant: it gains no privilege (`no_new_privs`), makes no system call that `jail` does not name, has none of the
//! descriptors that this program opened (the standard library and tokio open all of them close-on-exec). Where it has a
//! user of its own, it has no capability but the one to enter the network namespace of a pod, if it listens there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, capabilities, configure_capability_in_ambient_set,
    set_capabilities, set_capabilities_secure_bits,
};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tracing::{debug, error, info, warn};

use super::jail::Jail;
use super::process::Process;
use super::{BOOTSTRAP, EnvoyConfig, left};
use crate::bootstrap::MAX_CONNECTIONS;
use crate::keep;

/// Descriptors of as many connections as Envoy holds at most (`bootstrap`), and some.
const FILES: u32 = 2 * MAX_CONNECTIONS + 1024;
/// For so many seconds Envoy keeps what it has of a listener that went: its connections, which the kernel has cut, and
/// of one that changed those that it opened before. By default it is ten minutes: thousands of pods come and go.
const DRAIN: &str = "15";
/// How a program begins that needs no interpreter.
const ELF: &[u8; 4] = b"\x7fELF";

/// Starts it; with `lines` it writes there and outlives this process.
pub(super) fn spawn(config: &EnvoyConfig, lines: Option<&File>) -> io::Result<Process> {
    // A killed Envoy leaves its socket, which would answer nobody.
    keep::remove(&config.admin_socket())?;
    allow_files()?;
    let binary = File::open(&config.binary.path)?;
    let jail = Jail::new(config.user)?;
    let mut command = command(config, &binary);
    match lines {
        Some(lines) => command.stderr(lines.try_clone()?).kill_on_drop(false),
        None => command.stderr(Stdio::piped()).kill_on_drop(true),
    };
    let mut child = confined(command, jail, config.cgroup.is_some())?;
    if let Some(output) = child.stderr.take() {
        tokio::spawn(log(output));
    }
    let process = Process::of_child(child)?;
    if let Err(error) = placed(config, process.pid()) {
        process.signal(Signal::KILL)?;
        return Err(error);
    }
    Ok(process)
}

/// Into its control group, long before it listens anywhere: it has to ask the bridge first. A socket that was made
/// before isn't known, and gets no connection. Then it is noted.
fn placed(config: &EnvoyConfig, pid: u32) -> io::Result<()> {
    if let Some(cgroup) = &config.cgroup {
        std::fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
    }
    left::note(config, pid)
}

/// Each connection takes two descriptors, more than a shell or container allows by default. A limit is the process's
/// and its children inherit it (getrlimit(2)): this program's own goes as high as it may.
pub(super) fn allow_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if let Some(most) = limit.maximum.filter(|most| *most < FILES.into()) {
        warn!(
            most,
            wanted = FILES,
            "envoy may open few files; raise the agent's hard limit"
        );
    }
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    Ok(())
}

/// The binary by its descriptor, which the child has until it runs it: its user need not reach the folder. A script is
/// opened by its interpreter, when the descriptor is closed, and so goes by its path.
pub(super) fn command(config: &EnvoyConfig, binary: &File) -> Command {
    let mut magic = [0; ELF.len()];
    let is_elf = binary.read_exact_at(&mut magic, 0).is_ok() && &magic == ELF;
    let mut command = if is_elf {
        Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()))
    } else {
        Command::new(&config.binary.path)
    };
    command
        .arg0(&config.binary.path)
        .arg("--config-path")
        .arg(config.folder.join(BOOTSTRAP))
        .arg("--concurrency")
        .arg(config.concurrency.to_string())
        // No shared memory and no second socket: a new Envoy takes its listeners from the bridge.
        .args(["--disable-hot-restart", "--log-level", "warning"])
        .args(["--drain-time-s", DRAIN])
        // That it can't reach the bridge it would say each second, for as long as there is none.
        .args([
            "--component-log-level",
            "config:error",
            "--log-format",
            "%l %n %v",
        ])
        .current_dir(&config.folder)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some((uid, gid)) = config.user {
        // The standard library drops supplementary groups too when root changes the uid.
        command.uid(uid).gid(gid);
    }
    command
}

/// `no_new_privs` and the filter of system calls are a thread's (prctl(2), seccomp(2), since Linux 3.5) and its
/// children inherit them, so a thread of its own starts the process: this one keeps what it may.
fn confined(mut command: Command, jail: Jail, enters_pods: bool) -> io::Result<Child> {
    let runtime = tokio::runtime::Handle::current();
    let starter = std::thread::Builder::new().name("envoy-start".to_owned());
    let started = starter.spawn(move || {
        if enters_pods {
            keep_admin()?;
        }
        rustix::thread::set_no_new_privs(true)?;
        jail.enter()?;
        let _entered = runtime.enter();
        command.spawn()
    })?;
    let panicked = |_| io::Error::other("the thread that starts it panicked");
    started.join().map_err(panicked)?
}

/// What this thread starts has CAP_SYS_ADMIN and nothing else, whichever user it becomes (capabilities(7): ambient).
pub(super) fn keep_admin() -> io::Result<()> {
    let admin = CapabilitySet::SYS_ADMIN;
    let mut own = capabilities(None)?;
    own.inheritable |= admin;
    set_capabilities(None, own)?;
    configure_capability_in_ambient_set(admin, true)?;
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    Ok(())
}

/// Envoy's own lines, by their level.
pub(super) async fn log(output: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let (level, text) = line.split_once(' ').unwrap_or(("info", &line));
        match level {
            // A line for each frame, without symbols.
            "critical" if text.starts_with("backtrace ") => debug!(target: "envoy", "{text}"),
            "critical" | "error" => error!(target: "envoy", "{text}"),
            "warning" => warn!(target: "envoy", "{text}"),
            "info" => info!(target: "envoy", "{text}"),
            _ => debug!(target: "envoy", "{line}"),
        }
    }
}
