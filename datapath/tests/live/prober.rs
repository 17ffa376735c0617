//! Raw frames of every shape, through a bridge and live veths, at a pod that their sender may not reach.
//!
//! The same frames arrive when the programs are off: what is proved is the programs' work, not the kernel's.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::frames::{self, MAGIC, Probe};
use crate::node::{Pod, judges_at_host_end, on_a_node, open, run};
use crate::{FRIEND, SERVER, STRANGER, pods, tables_of_both};

/// Room for frames that nobody has read yet, bytes.
const BUFFER: libc::c_int = 64 << 20;
/// After the last frame was sent.
const SETTLE: Duration = Duration::from_millis(300);

/// All pods as ports of one bridge: frames reach the server as they were sent, whatever they are.
fn bridge() {
    run("ip link add br0 type bridge mcast_snooping 0
         ip link set br0 up
         for n in 2 3 4; do ip link set veth$n master br0; done
         for n in 2 3 4; do
             ip -n pod$n link set eth0 down
             ip -n pod$n link set eth0 address 02:00:00:00:00:0$n
             ip -n pod$n link set eth0 up
         done
         sleep 0.2");
}

#[test]
fn no_frame_of_a_stranger_reaches_the_pod_whatever_its_shape() {
    // A packet socket inside a pod sees what comes before it is judged there.
    if !judges_at_host_end("prober::no_frame_of_a_stranger_reaches_the_pod_whatever_its_shape") {
        return;
    }
    on_a_node(
        "prober::no_frame_of_a_stranger_reaches_the_pod_whatever_its_shape",
        || {
            pods();
            bridge();
            let probes = frames::all(STRANGER, SERVER);
            let mut datapath = open();
            let tables = tables_of_both(&mut datapath);
            datapath.commit(&tables, 1).unwrap();
            let open_gate = arrived(STRANGER, &probes);
            assert!(
                open_gate.len() * 10 > probes.len() * 9,
                "without programs nearly all arrive: {} of {}",
                open_gate.len(),
                probes.len()
            );
            for pod in [FRIEND, SERVER] {
                datapath.attach(&pod.spec()).unwrap();
            }
            let through = arrived(STRANGER, &probes);
            assert!(through.is_empty(), "{} got through: {through:?}", through.len());
            let friends = frames::all(FRIEND, SERVER);
            let welcome = arrived(FRIEND, &friends);
            assert!(
                welcome.contains("v4 flags 0x002"),
                "a friend's SYN arrives: {welcome:?}"
            );
            assert!(welcome.contains("v6 tag 0x8100"), "and behind a tag: {welcome:?}");
        },
    );
}

/// Sends the probes from a pod; the names of those that the server's interface has received.
fn arrived(from: Pod, probes: &[Probe]) -> BTreeSet<String> {
    let capture = SERVER.inside(|| packet_socket(true));
    from.inside(|| {
        let socket = packet_socket(false);
        for probe in probes {
            send(&socket, probe);
        }
    });
    std::thread::sleep(SETTLE);
    let mut found = BTreeSet::new();
    while let Some(frame) = receive(&capture) {
        if let Some(number) = frames::number(&frame)
            && !frames::is_revocation(&frame)
        {
            found.insert(probes[number].name.clone());
        }
    }
    found
}

/// A packet socket at `eth0` of this thread's namespace: for incoming frames, or for sending with an offload header.
fn packet_socket(capture: bool) -> OwnedFd {
    let protocol = if capture {
        u16::try_from(libc::ETH_P_ALL).unwrap().to_be()
    } else {
        0
    };
    // SAFETY: a new socket, owned at once; the address and options live past each call, with their sizes.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK;
        let fd = libc::socket(libc::AF_PACKET, kind, protocol.into());
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(libc::if_nametoindex(c"eth0".as_ptr())).unwrap();
        let size = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        let bound = libc::bind(fd, (&raw const address).cast(), size);
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        let option = |level, name, value: libc::c_int| {
            let size = libc::socklen_t::try_from(size_of_val(&value)).unwrap();
            let set = libc::setsockopt(fd, level, name, (&raw const value).cast(), size);
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        };
        if capture {
            option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER);
            option(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1);
        } else {
            option(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1);
        }
        socket
    }
}

fn send(socket: &OwnedFd, probe: &Probe) {
    let bytes = [&probe.offload[..], &probe.frame[..]].concat();
    // SAFETY: the buffer lives past the call and has this length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(
        usize::try_from(sent).ok(),
        Some(bytes.len()),
        "`{}`: {}",
        probe.name,
        std::io::Error::last_os_error()
    );
}

fn receive(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut frame = vec![0; 70_000];
    // SAFETY: the buffer lives past the call and has this length.
    let read = unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
    frame.truncate(usize::try_from(read).ok()?);
    Some(frame)
}

#[test]
fn a_probe_is_known_again_by_its_number() {
    let probes = frames::all(STRANGER, SERVER);
    assert!(probes.len() > 1000, "{}", probes.len());
    for (at, probe) in probes.iter().enumerate() {
        assert_eq!(frames::number(&probe.frame), Some(at), "{}", probe.name);
        assert!(probe.frame.windows(MAGIC.len()).any(|window| window == MAGIC));
    }
}
