//! The kernel's maps as the engine's `Steered`, and the two programs that give connections to Envoy.
//!
//! Invariant: a field of the kernel's contexts is read once, whole; the compiler would join neighbours, which the
//! verifier refuses.
#![expect(
    clippy::as_conversions,
    reason = "indices are widened to the width of an address, after they were masked"
)]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_sk_lookup};
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::macros::{sk_lookup, sock_ops};
use aya_ebpf::maps::{HashMap, LruHashMap};
use aya_ebpf::programs::{SkLookupContext, SockOpsContext};
use core::ptr::read_volatile;
use thyra_datapath_abi::limits::{L7_FIRST_PORT, L7_PORTS, MAX_ENDPOINTS, MAX_VERDICTS};
use thyra_datapath_abi::{Flow4, Flow6, FlowState, ListenerKey, Opening, Reason};
use thyra_datapath_engine::account::Counters as _;
use thyra_datapath_engine::decide::steer::{Seeking, Steer, steer as decide};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::program::Maps as _;
use thyra_datapath_engine::{Steered, V4, V6};

use crate::flows::{count, mark, tick};
use crate::maps;
use crate::node::{Node, ThisNode};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
/// `bpf_map_update_elem`: only where there is none.
pub(crate) const BPF_NOEXIST: u64 = 1;
pub(crate) const EEXIST: i32 = -17;
/// Like the kernel's own where a map is full.
pub(crate) const FULL: i32 = -7;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

#[inline(always)]
fn accepted<K>(map: &HashMap<K, FlowState>, key: &K, flags: u32) -> Option<u16> {
    let before = mark(map.get_ptr_mut(key)?, flags);
    Some(before.tag())
}

#[inline(always)]
fn leave<K>(opening: &LruHashMap<K, Opening>, accepted: &HashMap<K, FlowState>, key: &K) -> bool {
    // What isn't there has left.
    let _absent = opening.remove(key);
    accepted.remove(key).is_ok()
}

impl<const SHORT: bool> Node<SHORT> {
    /// Adds to the number of an endpoint's accepted connections (`u64::MAX`: takes one off); what it was.
    #[inline(always)]
    pub(crate) fn count(&self, endpoint: u16, change: u64) -> u64 {
        // SAFETY: a field of the element that the kernel gave out.
        count(unsafe { &raw mut (*self.state).l7 }, endpoint, change)
    }

    /// Counted before it is there, so that no two take the last place.
    #[inline(always)]
    fn accept<K>(
        &self,
        map: &HashMap<K, FlowState>,
        (key, endpoint): (&K, u16),
        port: u16,
        flags: u32,
    ) -> bool {
        let state = FlowState::live(flags, u64::from(port), tick());
        let has_room = self.count(endpoint, 1) < self.l7_budget();
        let inserted = if has_room {
            map.insert(key, &state, BPF_NOEXIST)
        } else {
            Err(FULL)
        };
        if inserted.is_err() {
            let _before = self.count(endpoint, u64::MAX);
        }
        // Another packet of the same connection was first.
        inserted.is_ok() || inserted == Err(EEXIST)
    }

    #[inline(always)]
    pub(crate) fn l7_budget(&self) -> u64 {
        // SAFETY: a word of the element that the kernel gave out.
        unsafe { read_volatile(&raw const (*self.state).l7_budget) }
    }

    /// Cookie of the endpoint's network namespace; 0 where nothing is steered.
    #[inline(always)]
    fn netns(&self, endpoint: u16) -> u64 {
        // SAFETY: a field of the element that the kernel gave out.
        word(unsafe { &raw const (*self.state).netns }, endpoint)
    }
}

/// The endpoint's word of a field of the state that the kernel gave out.
#[inline(always)]
fn word(field: *const [u64; MAX_ENDPOINTS], endpoint: u16) -> u64 {
    // SAFETY: masked to the table.
    unsafe { read_volatile(field.cast::<u64>().add(endpoint as usize & (MAX_ENDPOINTS - 1))) }
}

impl<const SHORT: bool> Steered for Node<SHORT> {
    #[inline(always)]
    fn listener(&self, verdict: u16) -> u16 {
        // SAFETY: masked to the table of the element that the kernel gave out.
        unsafe {
            let ports: *const u16 = (&raw const (*self.state).listeners).cast();
            read_volatile(ports.add(verdict as usize & (MAX_VERDICTS - 1)))
        }
    }
    #[inline(always)]
    fn is_steered(&self, endpoint: u16) -> bool {
        self.netns(endpoint) != 0
    }
    #[inline(always)]
    fn has_room(&self, endpoint: u16) -> bool {
        // SAFETY: as above.
        let count = word(unsafe { &raw const (*self.state).l7 }, endpoint);
        count < self.l7_budget()
    }
    #[inline(always)]
    fn opening4(&self, key: &Flow4) -> Option<Opening> {
        // SAFETY: a copy of eight bytes; who writes one replaces the element.
        unsafe { maps::L7_OPENING4.get(key) }.copied()
    }
    #[inline(always)]
    fn opening6(&self, key: &Flow6) -> Option<Opening> {
        // SAFETY: as above.
        unsafe { maps::L7_OPENING6.get(key) }.copied()
    }
    #[inline(always)]
    fn begin4(&self, key: &Flow4, opening: Opening) -> bool {
        maps::L7_OPENING4.insert(key, &opening, 0).is_ok()
    }
    #[inline(always)]
    fn begin6(&self, key: &Flow6, opening: Opening) -> bool {
        maps::L7_OPENING6.insert(key, &opening, 0).is_ok()
    }
    #[inline(always)]
    fn accepted4(&self, key: &Flow4, flags: u32) -> Option<u16> {
        accepted(&maps::L7_FLOWS4, key, flags)
    }
    #[inline(always)]
    fn accepted6(&self, key: &Flow6, flags: u32) -> Option<u16> {
        accepted(&maps::L7_FLOWS6, key, flags)
    }
    #[inline(always)]
    fn accept4(&self, key: &Flow4, port: u16, flags: u32) -> bool {
        self.accept(&maps::L7_FLOWS4, (key, key.endpoint), port, flags)
    }
    #[inline(always)]
    fn accept6(&self, key: &Flow6, port: u16, flags: u32) -> bool {
        self.accept(&maps::L7_FLOWS6, (key, key.endpoint), port, flags)
    }
    #[inline(always)]
    fn leave4(&self, key: &Flow4) {
        if leave(&maps::L7_OPENING4, &maps::L7_FLOWS4, key) {
            let _before = self.count(key.endpoint, u64::MAX);
        }
    }
    #[inline(always)]
    fn leave6(&self, key: &Flow6) {
        if leave(&maps::L7_OPENING6, &maps::L7_FLOWS6, key) {
            let _before = self.count(key.endpoint, u64::MAX);
        }
    }
}

/// A field of the context.
macro_rules! field {
    ($lookup:expr, $($path:tt)+) => {
        // SAFETY: the kernel's own context, whose field it lets this program read.
        unsafe { read_volatile(&raw const (*$lookup).$($path)+) }
    };
}

/// In a pod's network namespace: the socket of a connection that has none yet.
#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    if field!(lookup, protocol) != IPPROTO_TCP {
        return SK_PASS;
    }
    let family = field!(lookup, family);
    if family == AF_INET {
        found(&ctx, AF_INET, steer4(lookup))
    } else {
        found(&ctx, AF_INET6, steer6(lookup))
    }
}

/// Endpoint in the upper half, port in the lower one; `OWN` and `NOTHING` are no endpoints.
const OWN: u32 = 1;
const NOTHING: u32 = 0;

#[inline(always)]
fn number(node: &Node<true>, steer: Steer) -> u32 {
    match steer {
        Steer::Own => OWN,
        Steer::Listener { endpoint, port } => u32::from(endpoint) << 16 | u32::from(port),
        Steer::Nothing => {
            node.reason(Reason::NoListener, 0);
            NOTHING
        }
    }
}

#[inline(never)]
fn steer4(lookup: *mut bpf_sk_lookup) -> u32 {
    let Some(node) = ThisNode::<true>.open() else {
        return NOTHING;
    };
    let seeking = Seeking::<V4> {
        local: u32::from_be(field!(lookup, local_ip4)),
        remote: u32::from_be(field!(lookup, remote_ip4)),
        local_port: local_port(lookup),
        remote_port: remote_port(lookup),
    };
    number(&node, decide(&node, &seeking))
}

#[inline(never)]
fn steer6(lookup: *mut bpf_sk_lookup) -> u32 {
    let Some(node) = ThisNode::<true>.open() else {
        return NOTHING;
    };
    let seeking = Seeking::<V6> {
        local: address6(
            field!(lookup, local_ip6[0]),
            field!(lookup, local_ip6[1]),
            field!(lookup, local_ip6[2]),
            field!(lookup, local_ip6[3]),
        ),
        remote: address6(
            field!(lookup, remote_ip6[0]),
            field!(lookup, remote_ip6[1]),
            field!(lookup, remote_ip6[2]),
            field!(lookup, remote_ip6[3]),
        ),
        local_port: local_port(lookup),
        remote_port: remote_port(lookup),
    };
    number(&node, decide(&node, &seeking))
}

/// Of four words in network byte order.
#[inline(always)]
fn address6(a: u32, b: u32, c: u32, d: u32) -> Address6 {
    let pair = |high: u32, low: u32| u64::from(u32::from_be(high)) << 32 | u64::from(u32::from_be(low));
    Address6 {
        high: pair(a, b),
        low: pair(c, d),
    }
}

/// The context has it in host byte order.
#[inline(always)]
fn local_port(lookup: *mut bpf_sk_lookup) -> [u8; 2] {
    let [low, high, ..] = field!(lookup, local_port).to_le_bytes();
    [high, low]
}

#[inline(always)]
fn remote_port(lookup: *mut bpf_sk_lookup) -> [u8; 2] {
    field!(lookup, remote_port).to_ne_bytes()
}

#[inline(always)]
fn found(ctx: &SkLookupContext, family: u32, found: u32) -> u32 {
    if found == OWN {
        return SK_PASS;
    }
    let Some(node) = ThisNode::<true>.open() else {
        return SK_DROP;
    };
    let [low, high, endpoint_low, endpoint_high] = found.to_le_bytes();
    let key = ListenerKey {
        netns: node.netns(u16::from_le_bytes([endpoint_low, endpoint_high])),
        port: u32::from(u16::from_le_bytes([low, high])),
        family,
    };
    if found == NOTHING || key.netns == 0 {
        return SK_DROP;
    }
    match maps::L7_LISTENERS.redirect_sk_lookup(ctx, &key, 0) {
        Ok(()) => SK_PASS,
        Err(_) => {
            node.reason(Reason::NoListener, 0);
            SK_DROP
        }
    }
}

/// At Envoy's control group: notes each socket that begins to listen in a pod.
#[sock_ops]
pub fn register(ctx: SockOpsContext) -> u32 {
    if ctx.op() == BPF_SOCK_OPS_TCP_LISTEN_CB {
        let port = ctx.local_port();
        let first = u32::from(L7_FIRST_PORT);
        if port >= first && port < first + u32::from(L7_PORTS) {
            let key = ListenerKey {
                // SAFETY: the context of this very program.
                netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
                port,
                family: ctx.family(),
            };
            // SAFETY: the kernel gave it out for this call. A listener that finds no room gets no connection.
            let _refused = maps::L7_LISTENERS.update(key, unsafe { &mut *ctx.ops }, 0);
        }
    }
    1
}
