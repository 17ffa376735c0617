//! Putting a packet straight into another pod of the node (`thyra_datapath_engine::decide::direct`), and the steps on
//! its way there as global functions (`steps`).
//!
//! Invariant: it arrives there as if the node had sent it to the pod; one that can't is dropped.
#![expect(
    clippy::as_conversions,
    reason = "helpers take lengths and give codes as raw numbers"
)]

use aya_ebpf::bindings::{__sk_buff, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_redirect_peer, bpf_sk_release, bpf_skb_change_type, bpf_skc_lookup_tcp,
};
use thyra_datapath_abi::EndpointRecord;
use thyra_datapath_engine::program::direct::take;
use thyra_datapath_engine::program::{Leg, Way};
use thyra_datapath_engine::{Family, Packet, V4, V6};

use crate::node::ThisNode;
use crate::segment;
use crate::skb::{SHOT, Skb};
use crate::steps::needed;

/// `PACKET_HOST`: for this machine.
const FOR_US: u32 = 0;
/// `BPF_TCP_LISTEN`.
const LISTENS: u32 = 10;

/// Puts the packet into the pod behind a host interface. It needs no address of the link, since no stack looks at it
/// again, but a machine or a bridge inside the pod may.
#[inline(always)]
pub fn redirect(skb: Skb, to: &EndpointRecord) -> i32 {
    if to.mac != [0; 6] && segment::store(skb, 0, &to.mac).is_err() {
        return SHOT;
    }
    into_pod(skb, to.ifindex)
}

/// Puts the packet, which has the right addresses of the link, into the pod behind a host interface.
#[inline(always)]
pub fn into_pod(skb: Skb, ifindex: u32) -> i32 {
    // SAFETY: the program's own context.
    if unsafe { (*skb.0).pkt_type } != FOR_US {
        // On a bridge it was for the other pod's MAC and not for the node. Kernels from 6.16 on do this by themselves.
        // SAFETY: a helper on the program's own context; where it fails, the pod drops the packet.
        let _dropped = unsafe { bpf_skb_change_type(skb.0, FOR_US) };
    }
    // Since 5.10: <https://github.com/torvalds/linux/commit/9aa1206e8f48222f35a0c809f33b2f4aaa1e2661>.
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Addresses and ports, as `struct bpf_sock_tuple` has them.
#[repr(C)]
struct Tuple<const N: usize> {
    source: [u8; N],
    destination: [u8; N],
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

/// Whether the stack in a network namespace has a connection with the addresses and ports of a packet that comes to
/// it. A function of its own for the stack's sake.
#[inline(never)]
pub fn is_taken<F: Family>(skb: Skb, packet: &Packet<F>, netns: u16) -> bool {
    let (source, destination) = (F::mapped(packet.source), F::mapped(packet.destination));
    let (source_port, destination_port) = (packet.source_port, packet.destination_port);
    if F::VERSION == 6 {
        let tuple = Tuple {
            source,
            destination,
            source_port,
            destination_port,
        };
        return has_connection(skb, &tuple, netns);
    }
    let last = |[.., a, b, c, d]: [u8; 16]| [a, b, c, d];
    let tuple = Tuple {
        source: last(source),
        destination: last(destination),
        source_port,
        destination_port,
    };
    has_connection(skb, &tuple, netns)
}

#[inline(always)]
fn has_connection<const N: usize>(skb: Skb, tuple: &Tuple<N>, netns: u16) -> bool {
    let from = core::ptr::from_ref(tuple).cast::<bpf_sock_tuple>().cast_mut();
    let size = size_of::<Tuple<N>>() as u32;
    // SAFETY: the helper reads `size` bytes of the tuple; the socket is given back, whatever it is.
    unsafe {
        let socket = bpf_skc_lookup_tcp(skb.0.cast(), from, size, u64::from(netns), 0);
        if socket.is_null() {
            return false;
        }
        let state = core::ptr::read_volatile(&raw const (*socket).state);
        bpf_sk_release(socket.cast());
        state != LISTENS
    }
}

/// A function for each step of each family, known by its name; and `leg`, which calls it.
macro_rules! legs {
    ($($version:literal $family:ident $name:ident = $leg:ident;)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(skb: *mut __sk_buff, way: u32) -> u32 {
                take::<$family, _, _>(ThisNode::<false>, Skb::<false>(skb), Leg::$leg, Way(needed(way))).0
            }
        )*

        /// Takes a step; of a family that is neither, none.
        #[inline(always)]
        pub fn leg(version: u8, leg: Leg, skb: *mut __sk_buff, way: u32) -> u32 {
            match (version, leg) {
                $(($version, Leg::$leg) => $name(skb, way),)*
                _ => way,
            }
        }
    };
}

legs! {
    4 V4 direct_usual4 = Usual;
    4 V4 direct_known4 = Known;
    4 V4 direct_onward4 = Onward;
    4 V4 direct_begun4 = Begun;
    4 V4 direct_arrived4 = Arrived;
    4 V4 direct_asked4 = Asked;
    4 V4 direct_ended4 = Ended;
    6 V6 direct_usual6 = Usual;
    6 V6 direct_known6 = Known;
    6 V6 direct_onward6 = Onward;
    6 V6 direct_begun6 = Begun;
    6 V6 direct_arrived6 = Arrived;
    6 V6 direct_asked6 = Asked;
    6 V6 direct_ended6 = Ended;
}
