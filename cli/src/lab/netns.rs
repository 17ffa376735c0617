//! Network namespaces: made by name, entered by a thread of their own.
//!
//! Invariant: no thread that does anything else ever changes its namespace; what is made inside (a socket, a
//! child) stays there.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};

/// Where iproute2 keeps the names.
const RUN_NETNS: &str = "/run/netns";

/// A named network namespace, held open.
#[derive(Clone, Debug)]
pub(crate) struct Netns {
    name: Arc<str>,
    file: Arc<File>,
}

/// A command of iproute2 or nftables that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error("can't run `{tool}`; install {package}")]
    Missing {
        tool: String,
        package: &'static str,
        source: io::Error,
    },
    #[error("`{tool}` failed: {text}")]
    Failed { tool: String, text: String },
    #[error("can't enter network namespace `{name}`")]
    Enter { name: String, source: io::Error },
}

impl Netns {
    /// Opens a namespace that exists.
    pub(crate) fn open(name: &str) -> Result<Self, ToolError> {
        let file = File::open(path_of(name)).map_err(|source| ToolError::Enter {
            name: name.to_owned(),
            source,
        })?;
        Ok(Self {
            name: name.into(),
            file: Arc::new(file),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// Runs `work` on a thread inside the namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread in a namespace panicked")))
        })
    }

    /// Moves the calling thread for good; for a process that is about to become another program.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(
            self.file.as_fd(),
            Some(LinkNameSpaceType::Network),
        )?)
    }

    /// An unconnected TCP socket.
    pub(crate) fn tcp(&self, v4: bool) -> io::Result<TcpSocket> {
        self.inside(|| {
            if v4 {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }
        })
    }

    /// A UDP socket on any port.
    pub(crate) fn udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.inside(|| std::net::UdpSocket::bind(address))?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    /// A listening TCP socket; `::` takes both families.
    pub(crate) fn listen(&self, address: IpAddr, port: u16) -> io::Result<TcpListener> {
        let listener = self.inside(|| std::net::TcpListener::bind((address, port)))?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    }

    /// Starts a command inside.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<std::process::Child> {
        self.inside(|| command.spawn())
    }

    /// Writes sysctls below `net/`.
    pub(crate) fn sysctls(&self, settings: &[(&str, &str)]) -> Result<(), ToolError> {
        for (key, value) in settings {
            self.inside(|| std::fs::write(Path::new("/proc/sys/net").join(key), value))
                .map_err(|error| ToolError::Failed {
                    tool: format!("sysctl net/{key}={value} in {}", self.name),
                    text: error.to_string(),
                })?;
        }
        Ok(())
    }

    /// Runs a batch of `ip` commands inside.
    pub(crate) fn ip(&self, batch: &str) -> Result<(), ToolError> {
        run_tool("ip", "iproute2", &["-n", &self.name, "-batch", "-"], batch)
    }

    /// Loads an nftables ruleset inside, as one transaction.
    pub(crate) fn nft(&self, rules: &str) -> Result<(), ToolError> {
        run_tool(
            "ip",
            "iproute2 and nftables",
            &["netns", "exec", &self.name, "nft", "-f", "-"],
            rules,
        )
    }
}

/// Any address of both families.
pub(crate) const ANY: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Where a namespace of that name is.
pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(RUN_NETNS).join(name)
}

/// Makes namespaces.
pub(crate) fn add(names: &[String]) -> Result<(), ToolError> {
    let batch: String = names.iter().map(|name| format!("netns add {name}\n")).collect();
    run_tool("ip", "iproute2", &["-batch", "-"], &batch)
}

/// Removes a namespace; one that isn't there is no error.
pub(crate) fn delete(name: &str) -> Result<(), ToolError> {
    if !path_of(name).exists() {
        return Ok(());
    }
    run_tool("ip", "iproute2", &["netns", "del", name], "")
}

/// Names of all namespaces that begin with `prefix`.
pub(crate) fn with_prefix(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(RUN_NETNS) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Processes whose network namespace is `name`.
pub(crate) fn processes_in(name: &str) -> io::Result<Vec<i32>> {
    use std::os::unix::fs::MetadataExt;
    let wanted = std::fs::metadata(path_of(name))?.ino();
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // A process that ends meanwhile is no longer in it.
        let Ok(link) = std::fs::metadata(entry.path().join("ns/net")) else {
            continue;
        };
        if link.ino() == wanted {
            pids.push(pid);
        }
    }
    Ok(pids)
}

fn run_tool(tool: &str, package: &'static str, arguments: &[&str], input: &str) -> Result<(), ToolError> {
    use std::io::Write;
    let shown = || format!("{tool} {}", arguments.join(" "));
    let missing = |source| ToolError::Missing {
        tool: tool.to_owned(),
        package,
        source,
    };
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends early says why on stderr; that its input broke off says nothing more.
        if let Err(error) = stdin.write_all(input.as_bytes()) {
            tracing::debug!(tool = shown(), %error, "input not taken");
        }
    }
    let output = child.wait_with_output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    Err(ToolError::Failed {
        tool: shown(),
        text: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
