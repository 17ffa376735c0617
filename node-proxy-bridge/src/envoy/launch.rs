//! Becoming the Envoy that is given to an agent, in a container or service of its own, as confined as one that the
//! agent starts itself.
//!
//! Invariant: Envoy isn't started before an agent wants it (a node whose verdicts are all the kernel's has none), and
//! then with nothing that it doesn't need (see `child`).

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::time::Duration;

use super::jail::Jail;
use super::{BOOTSTRAP, Binary, DEFAULT_HEAP, EnvoyConfig, child};

/// How often the agent's word is looked for.
const ASK: Duration = Duration::from_millis(100);

/// How it is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// A checked binary.
    pub binary: Binary,
    /// The folder that it shares with the agent.
    pub folder: PathBuf,
    /// Its user and group.
    pub user: u32,
    /// Worker threads.
    pub concurrency: u16,
}

/// Waits until an agent wants Envoy, and becomes it: the process is the same. Returns only where that can't be: why.
#[must_use]
pub fn launch(launch: Launch) -> io::Error {
    let bootstrap = launch.folder.join(BOOTSTRAP);
    loop {
        match bootstrap.try_exists() {
            Ok(true) => break,
            Ok(false) => std::thread::sleep(ASK),
            Err(error) => return error,
        }
    }
    match become_envoy(launch) {
        Err(error) => error,
    }
}

fn become_envoy(launch: Launch) -> Result<Infallible, io::Error> {
    let config = EnvoyConfig {
        binary: launch.binary,
        folder: launch.folder,
        // Both are in its bootstrap, which is the agent's.
        node: String::new(),
        heap: DEFAULT_HEAP,
        concurrency: launch.concurrency,
        user: Some((launch.user, launch.user)),
        cgroup: None,
        note: None,
    };
    child::allow_files()?;
    let binary = File::open(&config.binary.path)?;
    let jail = Jail::new(config.user)?;
    let mut command = child::command(&config, &binary).into_std();
    child::keep_admin()?;
    rustix::thread::set_no_new_privs(true)?;
    jail.enter()?;
    Err(command.exec())
}
