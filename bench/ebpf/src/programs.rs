//! The programs at the host end of a pod's veth, and their maps; and one that is only ever test-run: it gives every run
//! another source address before it goes on to the program that is measured.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, ProgramArray};
use aya_ebpf::programs::TcContext;

/// `TCX_NEXT` and `TCX_DROP` (linux/bpf.h).
const NEXT: i32 = -1;
const DROP: i32 = 2;
const IPV4: u16 = 0x0800_u16.to_be();
const TCP: u8 = 6;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A rule that allows; 0 is any identity, or any port of any protocol. Ports in network byte order.
#[repr(C)]
struct Rule {
    interface: u32,
    identity: u32,
    port: u16,
    protocol: u8,
    zero: u8,
}

/// A connection that a pod has opened. Addresses and ports in network byte order.
#[repr(C)]
struct Flow {
    interface: u32,
    local: u32,
    remote: u32,
    local_port: u16,
    remote_port: u16,
}

#[map]
static IDENTITIES: LpmTrie<u32, u32> = LpmTrie::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
#[map]
static RULES: HashMap<Rule, u8> = HashMap::with_max_entries(1 << 17, 0);
#[map]
static FLOWS: LruHashMap<Flow, u8> = LruHashMap::with_max_entries(1 << 16, 0);

/// Sources that `draw` draws from, the first `COUNT`; and what it goes on to.
#[map]
static SOURCES: Array<u32> = Array::with_max_entries(1 << 17, 0);
#[map]
static COUNT: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static MEASURED: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// What of a packet is judged.
struct Packet {
    source: u32,
    destination: u32,
    ports: [u16; 2],
    flags: u8,
}

/// Ethernet, IPv4 and TCP as they lie in a packet.
#[repr(C, packed)]
struct Headers {
    macs: [u8; 12],
    kind: u16,
    version: [u8; 9],
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
    ports: [u16; 2],
    numbers: [u8; 9],
    flags: u8,
}

/// At the egress of the host veth: a packet on its way to the pod.
#[classifier]
pub fn lpm_to_pod(ctx: TcContext) -> i32 {
    let Some(packet) = parse(&ctx) else { return NEXT };
    // SAFETY: the kernel gives a classifier a valid `__sk_buff`.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    let identity = IDENTITIES.get(Key::new(32, packet.source)).copied().unwrap_or(0);
    let rule = |identity, port, protocol| Rule {
        interface,
        identity,
        port,
        protocol,
        zero: 0,
    };
    let [sport, dport] = packet.ports;
    let allowed = RULES.get_ptr(rule(identity, dport, TCP)).is_some()
        || RULES.get_ptr(rule(0, dport, TCP)).is_some()
        || RULES.get_ptr(rule(identity, 0, 0)).is_some();
    let reply = || {
        let flow = Flow {
            interface,
            local: packet.destination,
            remote: packet.source,
            local_port: dport,
            remote_port: sport,
        };
        FLOWS.get_ptr(flow).is_some()
    };
    if allowed || reply() { NEXT } else { DROP }
}

/// At the ingress of the host veth: a packet that the pod sends.
#[classifier]
pub fn lpm_from_pod(ctx: TcContext) -> i32 {
    let Some(packet) = parse(&ctx) else { return NEXT };
    if packet.flags & (SYN | ACK) == SYN {
        let [local_port, remote_port] = packet.ports;
        let flow = Flow {
            // SAFETY: the kernel gives a classifier a valid `__sk_buff`.
            interface: unsafe { (*ctx.skb.skb).ifindex },
            local: packet.source,
            remote: packet.destination,
            local_port,
            remote_port,
        };
        if FLOWS.insert(flow, 1, 0).is_err() {
            return DROP;
        }
    }
    NEXT
}

/// Draws the packet's source and goes on to the measured program.
#[classifier]
pub fn draw(ctx: TcContext) -> i32 {
    let drawn = COUNT.get(0).and_then(|count| {
        // SAFETY: the helper has no argument and no failure.
        let random = unsafe { bpf_get_prandom_u32() };
        SOURCES.get(random.checked_rem(*count)?)
    });
    let Some(source) = drawn else { return DROP };
    let start = ctx.data();
    if start + size_of::<Headers>() > ctx.data_end() {
        return DROP;
    }
    let headers = start as *mut Headers;
    // SAFETY: all of `Headers` is inside of the packet, as compared above, and nobody else has it.
    unsafe { (*headers).source = *source };
    // SAFETY: the map holds programs of this type; without one the packet is dropped.
    let _missing = unsafe { MEASURED.tail_call(&ctx, 0) };
    DROP
}

/// None: no TCP over IPv4.
#[inline(always)]
fn parse(ctx: &TcContext) -> Option<Packet> {
    let start = ctx.data();
    if start + size_of::<Headers>() > ctx.data_end() {
        return None;
    }
    let headers = start as *const Headers;
    // SAFETY: all of `Headers` is inside of the packet, as compared above, and every byte pattern is one.
    let headers = unsafe { &*headers };
    if headers.kind != IPV4 || headers.protocol != TCP {
        return None;
    }
    Some(Packet {
        source: headers.source,
        destination: headers.destination,
        ports: headers.ports,
        flags: headers.flags,
    })
}

/// Nothing here panics; the compiler asks for it, and the verifier would refuse the loop.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";
