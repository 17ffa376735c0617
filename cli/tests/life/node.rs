//! A lab with a server that notes what reaches it.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// For what comes by itself: an emulated CPU is slow.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
/// Where the test's server listens.
const PORT: u16 = 8082;
/// Where the lab's echo does, which needs no L7.
const ECHO: u16 = 9000;

/// One lab at a time: they share two CPUs and this process's patience.
static ONE: Mutex<()> = Mutex::new(());

pub(crate) struct Node {
    id: String,
    server: SocketAddr,
    echo: SocketAddr,
    /// Bytes of denied requests that reached the server, as requests.
    pub(crate) bypasses: Arc<AtomicU64>,
    _one: MutexGuard<'static, ()>,
}

/// A whole answer, or how far it came.
pub(crate) type Answer = io::Result<u16>;

impl Node {
    /// None, loudly, where it can't be had.
    pub(crate) fn up() -> Option<Self> {
        let node = Self::bare(&folder())?;
        node.serve();
        node.wait("requests are answered", || {
            node.ask("/public").is_ok_and(|s| s == 200)
        });
        Some(node)
    }

    /// The lab of this folder, without the server.
    pub(crate) fn bare(folder: &Path) -> Option<Self> {
        Self::with(folder, &[])
    }

    /// One whose agent starts no Envoy.
    pub(crate) fn without_envoy() -> Option<Self> {
        let node = Self::with(&folder(), &[("THYRA_ENVOY", "given")])?;
        node.serve();
        Some(node)
    }

    fn with(folder: &Path, environment: &[(&str, &str)]) -> Option<Self> {
        if let Some(missing) = missing() {
            let on_ci = std::env::var("CI").is_ok_and(|v| !v.is_empty() && v != "false" && v != "0");
            assert!(!on_ci, "{missing}");
            println!("SKIPPED: {missing}");
            return None;
        }
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let output = Command::new(env!("CARGO_BIN_EXE_thyra"))
            .args(["lab", "up", &folder.display().to_string()])
            .envs(environment.iter().copied())
            .output()
            .expect("the command runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let between = |a: &str, b: &str| {
            let rest = text.split_once(a).map(|(_, rest)| rest)?;
            Some(rest.split(b).next()?.trim().to_owned())
        };
        let id = between("lab `", "`").expect("an id");
        let address = between("shop/cart  ", " ").expect("an address");
        Some(Self {
            id,
            server: format!("{address}:{PORT}").parse().expect("an address"),
            echo: format!("{address}:{ECHO}").parse().expect("an address"),
            bypasses: Arc::default(),
            _one: one,
        })
    }

    /// The server in the pod: an answer for each request, and a note of each that should not have come.
    fn serve(&self) {
        let (bypasses, server) = (Arc::clone(&self.bypasses), self.server);
        self.inside("shop.cart", move || {
            let listener = TcpListener::bind(server).expect("a port");
            serve_each(listener, move |stream| answer(stream, &bypasses));
        });
    }

    /// Runs `work` in the network namespace of a pod, in a thread of its own.
    pub(crate) fn begin<T: Send + 'static>(
        &self,
        pod: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = fs::File::open(format!("/run/netns/thyra-{}-{pod}", self.id)).expect("a namespace");
        std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entered");
            work()
        })
    }

    pub(crate) fn inside<T: Send + 'static>(
        &self,
        pod: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.begin(pod, work).join().expect("it ends well")
    }

    /// A connection of the client's to the server.
    pub(crate) fn connect(&self) -> io::Result<TcpStream> {
        let server = self.server;
        self.inside("shop.front", move || connect(server))
    }

    /// The status of a request on a connection of its own.
    pub(crate) fn ask(&self, path: &str) -> Answer {
        get(&mut self.connect()?, path)
    }

    pub(crate) fn server(&self) -> SocketAddr {
        self.server
    }

    pub(crate) fn echo(&self) -> SocketAddr {
        self.echo
    }

    pub(crate) fn folder(&self) -> PathBuf {
        Path::new("/run/thyra-lab").join(&self.id).join("n0")
    }

    /// The agent's process, asked over its own socket.
    pub(crate) fn agent(&self) -> Option<Pid> {
        let stream = UnixStream::connect(self.folder().join("agent.sock")).ok()?;
        Some(socket_peercred(&stream).ok()?.pid)
    }

    /// The process that is noted as Envoy.
    pub(crate) fn envoy(&self) -> Option<Pid> {
        let note: serde_json::Value =
            serde_json::from_slice(&fs::read(self.folder().join("envoy.json")).ok()?).ok()?;
        Pid::from_raw(i32::try_from(note["pid"].as_i64()?).ok()?)
    }

    /// How often the agents of this node have committed.
    pub(crate) fn commits(&self) -> usize {
        self.log().matches("tables committed").count()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder().join("agent.log")).expect("a log")
    }

    /// Ends the agent and waits for the one that the lab starts in its place, until that enforces by itself.
    pub(crate) fn replace_agent(&self, signal: Signal) {
        let (before, commits) = (self.agent().expect("an agent"), self.commits());
        kill_process(before, signal).expect("it was alive");
        self.wait("another agent enforces", || {
            self.agent().is_some_and(|now| now != before) && self.commits() > commits
        });
    }

    pub(crate) fn wait(&self, claim: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(
                begun.elapsed() < LONG,
                "not within {LONG:?}: {claim}\n{}",
                self.log()
            );
            std::thread::sleep(POLL);
        }
    }

    pub(crate) fn lab(&self, verb: &str, file: &Path) -> bool {
        let file = file.display().to_string();
        thyra(&["lab", verb, "--lab", &self.id, "-f", &file])
            .status
            .success()
    }

    /// Ends the lab; fails where that leaves something.
    pub(crate) fn down(self) {
        let envoy = self.envoy();
        assert!(thyra(&["lab", "down", &self.id]).status.success());
        // One that nobody has waited for yet has no words.
        let words = |pid: Pid| fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        let alive = envoy.is_some_and(|pid| words(pid).is_ok_and(|words| !words.is_empty()));
        assert!(!alive, "envoy ends with its lab");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Down already is fine, and a test that failed has said so.
        drop(thyra(&["lab", "down", &self.id]));
    }
}

/// The Envoy of this machine.
pub(crate) fn binary() -> Option<PathBuf> {
    let cache = std::env::var_os("THYRA_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/thyra"))
    });
    let installed = cache.map(|cache| cache.join("envoy/envoy"));
    let named = std::env::var_os("THYRA_ENVOY").map(PathBuf::from);
    named.or_else(|| installed.filter(|path| path.exists()))
}

/// What these tests can't do without.
fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("a lab needs root");
    }
    if binary().is_none() {
        return Some("there is no Envoy; `make envoy` installs one");
    }
    let agent = Path::new(env!("CARGO_BIN_EXE_thyra")).with_file_name("thyra-agent");
    (!agent.exists())
        .then_some("there is no `thyra-agent` beside `thyra`; `cargo build -p thyra-agent` makes it")
}

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/requests")
}

pub(crate) fn thyra(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thyra"))
        .args(arguments)
        .output()
        .expect("the command runs")
}

pub(crate) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A request and the status of its answer.
pub(crate) fn get(stream: &mut TcpStream, path: &str) -> Answer {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: cart\r\n\r\n").as_bytes())?;
    status(stream)
}

/// The status of an answer, read to its end; 0 for none.
pub(crate) fn status(stream: &mut TcpStream) -> Answer {
    let head = head(stream)?;
    stream.read_exact(&mut vec![0; length(&head)])?;
    Ok(head
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_default())
}

/// Bytes of the body.
fn length(head: &str) -> usize {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let length = fields
        .filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .find_map(|(_, value)| value.trim().parse().ok());
    length.unwrap_or(0)
}

/// Bytes up to an empty line.
fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Has each connection served on a thread of its own, until the process ends.
pub(crate) fn serve_each(listener: TcpListener, serve: impl Fn(TcpStream) + Send + Sync + 'static) {
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        // Joined, never let go: a glibc that frees a thread twice when it is let go at its very end (`pthread_detach`)
        // gives its place to another one, and whoever joins the first of them waits for that.
        let mut serving: Vec<JoinHandle<()>> = Vec::new();
        for stream in listener.incoming() {
            let (stream, serve) = (stream.expect("a stream"), Arc::clone(&serve));
            for over in serving.extract_if(.., |thread| thread.is_finished()) {
                over.join().expect("served");
            }
            serving.push(std::thread::spawn(move || serve(stream)));
        }
    });
}

/// The server's part of a connection: bodies are read to their end.
fn answer(mut stream: TcpStream, bypasses: &AtomicU64) {
    while let Ok(head) = head(&mut stream) {
        if head.contains("/admin") {
            bypasses.fetch_add(1, Ordering::Relaxed);
        }
        let read = stream.read_exact(&mut vec![0; length(&head)]);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        if read.is_err() || stream.write_all(answer).is_err() {
            return;
        }
    }
}
