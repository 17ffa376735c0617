//! A network namespace of one test, with its own loopback and nothing else; it goes with its value.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

static NEXT: AtomicU32 = AtomicU32::new(0);

pub(super) struct Namespace {
    name: String,
    pub(super) path: String,
}

impl Namespace {
    pub(super) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("thyra-evade-{}-{number}", std::process::id());
        ip(&["netns", "add", &name]);
        let made = Self {
            path: format!("/run/netns/{name}"),
            name,
        };
        ip(&["-n", &made.name, "link", "set", "lo", "up"]);
        made
    }

    /// What a thread inside makes; a socket stays in the namespace that it was made in.
    fn inside<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        let file = std::fs::File::open(&self.path).unwrap();
        std::thread::scope(|scope| {
            let made = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                make()
            });
            made.join().unwrap()
        })
    }

    pub(super) fn listen(&self) -> TcpListener {
        self.inside(|| TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub(super) fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.inside(|| TcpStream::connect(to))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Also while a test fails: what can't be removed is told by `ip` itself.
        let _removed = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("`ip` runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {said}");
}
