//! A node made of network namespaces: pods behind veths, a BPF file system of its own.
//!
//! Invariant: each test runs in a child process with its own network and mount namespaces; whatever it makes
//! (interfaces, pins, mounts) vanishes with that process, however it ends.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thyra_datapath::abi::limits::L7_BUDGET;
use thyra_datapath::{Config, Datapath, Deny, EndpointSpec, Hook, HostTraffic, NonTcp, Order, Place};

/// Says to a process that it is the child, inside the namespaces.
const INSIDE: &str = "THYRA_LIVE_INSIDE";
/// Says to a process which step of a test it is, see `step`.
const STEP: &str = "THYRA_LIVE_STEP";
const PATIENCE: Duration = Duration::from_secs(2);
/// For what comes by itself: an emulated CPU is slow.
const LONG: Duration = Duration::from_secs(20);

/// A pod by its number: 10.244.0.N and fd00:10:244::N.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pod(pub(crate) u8);

/// What became of a connection attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// An answer came.
    Answered,
    /// A reset came.
    Refused,
    /// Nothing came.
    Silent,
}

/// Runs `body` in a child process with its own namespaces; without root it says loudly that it didn't.
pub(crate) fn on_a_node(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED `{test}`: needs root");
        return;
    }
    let setup = "mount -t tmpfs tmpfs /run && mkdir /run/bpf && mount -t bpf bpf /run/bpf && \
                 ip link set lo up && exec \"$@\"";
    // Captured, so that its own summary is not counted as another test's.
    let output = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            setup,
            "sh",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "`{test}` failed inside its namespaces: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Which step this process was started for.
pub(crate) fn step() -> Option<String> {
    std::env::var(STEP).ok()
}

/// Starts this test once more as another process of the same node, which does `step` until it is killed;
/// returns when it has called `ready` or `announce`.
pub(crate) fn start_step(test: &str, step: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(STEP, step)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    await_announcement(&mut child);
    child
}

/// Returns when a process of `start_step` has called `announce` once more.
pub(crate) fn await_announcement(child: &mut Child) {
    let mut seen = Vec::new();
    let mut byte = [0];
    let out = child.stdout.as_mut().unwrap();
    while !seen.ends_with(b"READY\n") {
        assert_eq!(
            out.read(&mut byte).unwrap(),
            1,
            "it ended: {}",
            String::from_utf8_lossy(&seen)
        );
        seen.push(byte[0]);
    }
}

/// Tells `start_step`, or `await_announcement`, to go on.
pub(crate) fn announce() {
    println!("READY");
    std::io::stdout().flush().unwrap();
}

/// Tells `start_step` to go on, then sleeps until this process is killed.
pub(crate) fn ready() -> ! {
    announce();
    loop {
        std::thread::park();
    }
}

/// Asks until there is an answer.
pub(crate) fn eventually<T>(claim: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begun.elapsed() < LONG, "not within {LONG:?}: {claim}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What drives a reader of events.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Runs a command and expects it to succeed.
pub(crate) fn run(line: &str) {
    output(line);
}

/// What a command prints that must succeed.
pub(crate) fn output(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(
        output.status.success(),
        "`{line}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn config() -> Config {
    Config {
        bpffs: PathBuf::from("/run/bpf/thyra"),
        state_dir: PathBuf::from("/run/state"),
        deny: Deny::Reset,
        host_traffic: HostTraffic::Allow,
        non_tcp: NonTcp::Pass,
        l7_connections: L7_BUDGET,
        report_new: true,
        flow_log: None,
        hook: Some(hook()),
        place: place(),
        order: Order::First,
        local_redirect: false,
    }
}

/// `THYRA_LIVE_HOOK=clsact` tries on a newer kernel what an older one must do.
pub(crate) fn hook() -> Hook {
    match std::env::var("THYRA_LIVE_HOOK").as_deref() {
        Ok("clsact") => Hook::Clsact,
        Ok("pod") | Err(_) => Hook::newest(),
        Ok(other) => panic!("`THYRA_LIVE_HOOK={other}`: the other hooks are `clsact` and `pod`"),
    }
}

/// Whether `test`, which is about the host end, is to run.
pub(crate) fn judges_at_host_end(test: &str) -> bool {
    let here = place() == Place::Host;
    if !here {
        eprintln!("SKIPPED `{test}`: it is about the host end");
    }
    here
}

/// `THYRA_LIVE_HOOK=pod` judges what comes to pods inside them.
pub(crate) fn place() -> Place {
    match std::env::var("THYRA_LIVE_HOOK").as_deref() {
        Ok("pod") => Place::Pod,
        _ => Place::Host,
    }
}

pub(crate) fn open() -> Datapath {
    Datapath::open(config()).unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl Pod {
    pub(crate) fn v4(self) -> IpAddr {
        IpAddr::from([10, 244, 0, self.0])
    }

    pub(crate) fn v6(self) -> IpAddr {
        format!("fd00:10:244::{:x}", self.0).parse().unwrap()
    }

    pub(crate) fn interface(self) -> String {
        format!("veth{}", self.0)
    }

    pub(crate) fn uid(self) -> String {
        format!("uid-{}", self.0)
    }

    pub(crate) fn spec(self) -> EndpointSpec {
        EndpointSpec {
            uid: self.uid(),
            host_interface: self.interface(),
            addresses: vec![self.v4(), self.v6()],
            mac: None,
            held_back: false,
            netns: Some(format!("/run/netns/pod{}", self.0).into()),
        }
    }

    /// Makes the pod's namespace and veth, as the ptp CNI plugin does. Without duplicate address detection,
    /// which keeps the first seconds silent.
    pub(crate) fn create(self) -> Self {
        let Self(n) = self;
        let v6 = self.v6();
        run(&format!(
            "ip netns add pod{n}
             echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
             ip netns exec pod{n} sh -c 'echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad'
             ip link add veth{n} type veth peer name eth0 netns pod{n}
             echo 1 > /proc/sys/net/ipv4/ip_forward
             echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
             ip addr add 10.244.0.1/32 dev veth{n}
             ip addr add fd00:10:244::1/128 dev veth{n} nodad
             ip link set veth{n} up
             ip -n pod{n} link set lo up
             ip -n pod{n} addr add 10.244.0.{n}/32 dev eth0
             ip -n pod{n} addr add {v6}/128 dev eth0 nodad
             ip -n pod{n} link set eth0 up
             ip -n pod{n} route add 10.244.0.1 dev eth0 scope link
             ip -n pod{n} route add default via 10.244.0.1
             ip -n pod{n} -6 route add fd00:10:244::1 dev eth0
             ip -n pod{n} -6 route add default via fd00:10:244::1
             ip route add 10.244.0.{n} dev veth{n}
             ip -6 route add {v6} dev veth{n}"
        ));
        self
    }

    /// Runs `body` on a thread inside the pod's network namespace.
    pub(crate) fn inside<T: Send>(self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let namespace = File::open(format!("/run/netns/pod{}", self.0)).unwrap();
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                body()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Serves echo on a port, both families, until the process ends.
    pub(crate) fn serve(self, port: u16) -> Self {
        let listener = self.inside(|| TcpListener::bind(("::", port)).unwrap());
        serve_each(listener, echo);
        self
    }

    /// Opens a connection from this pod.
    pub(crate) fn connect(self, to: IpAddr, port: u16) -> std::io::Result<TcpStream> {
        self.inside(|| connect(to, port))
    }

    /// Opens a connection from this pod and asks for an echo.
    pub(crate) fn try_connect(self, to: IpAddr, port: u16) -> Fate {
        let stream = match self.connect(to, port) {
            Ok(stream) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => return Fate::Refused,
            Err(_) => return Fate::Silent,
        };
        if echoes(&stream) {
            Fate::Answered
        } else {
            Fate::Silent
        }
    }
}

/// Opens a connection from the network namespace that the calling thread is in.
pub(crate) fn connect(to: IpAddr, port: u16) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::new(to, port), PATIENCE)
}

/// Sends frames out of an interface of the node: through the hooks, or past them as `PACKET_QDISC_BYPASS` does
/// (packet(7)).
pub(crate) fn send_frames(interface: &str, count: usize, past_the_hooks: bool) {
    let name = std::ffi::CString::new(interface).unwrap();
    // UDP from a documentation address; whom it is for makes no difference.
    let mut frame: Vec<u8> = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    frame.extend([
        0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 203, 0, 113, 7, 10, 244, 0, 4,
    ]);
    frame.extend([0, 53, 0, 53, 0, 8, 0, 0]);
    let bypass = libc::c_int::from(past_the_hooks);
    // SAFETY: a socket of this function's own, options and addresses that live past each call, with their sizes.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        let size = libc::socklen_t::try_from(size_of_val(&bypass)).unwrap();
        let value = (&raw const bypass).cast();
        let set = libc::setsockopt(socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, value, size);
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        let mut to: libc::sockaddr_ll = std::mem::zeroed();
        to.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).unwrap();
        to.sll_ifindex = libc::c_int::try_from(libc::if_nametoindex(name.as_ptr())).unwrap();
        let size = libc::socklen_t::try_from(size_of_val(&to)).unwrap();
        for _ in 0..count {
            let sent = libc::sendto(
                socket,
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size,
            );
            assert_eq!(
                usize::try_from(sent).ok(),
                Some(frame.len()),
                "{}",
                std::io::Error::last_os_error()
            );
        }
        libc::close(socket);
    }
}

/// Whether what is sent comes back.
pub(crate) fn echoes(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok() && &answer == b"ping"
}

/// Has each connection served on a thread of its own, until the process ends.
pub(crate) fn serve_each(listener: TcpListener, serve: fn(TcpStream)) {
    std::thread::spawn(move || {
        // Joined, never let go: a glibc that frees a thread twice when it is let go at its very end (`pthread_detach`)
        // gives its place to another one, and whoever joins the first of them waits for that.
        let mut serving: Vec<JoinHandle<()>> = Vec::new();
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            for over in serving.extract_if(.., |thread| thread.is_finished()) {
                over.join().unwrap();
            }
            serving.push(std::thread::spawn(move || serve(stream)));
        }
    });
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || stream.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
}
