//! The names and shapes of the maps.
//!
//! | map | kind | key → value |
//! | --- | --- | --- |
//! | `STATE` | mmap array | 0 → `State` |
//! | `BANKS` | mmap array | bank → `Bank` |
//! | `BLOCKS4`, `BLOCKS6` | LPM trie | `Block4`, `Block6` → class (u32) |
//! | `OUTBOUND4`, `OUTBOUND6` | mmap array | bucket → `FlowBucket4`, `FlowBucket6` |
//! | `DATAGRAMS4`, `DATAGRAMS6` | mmap array | bucket → `DatagramBucket4`, `DatagramBucket6` |
//! | `HOST_FLOWS4`, `HOST_FLOWS6` | LRU hash | `Flow4`, `Flow6` → `FlowState` |
//! | `L7_FLOWS4`, `L7_FLOWS6` | hash | `Flow4`, `Flow6` → `FlowState`, tagged with the listener's port |
//! | `L7_OPENING4`, `L7_OPENING6` | LRU hash | `Flow4`, `Flow6` → `Opening` |
//! | `L7_LISTENERS` | socket hash | `ListenerKey` → a listening socket of Envoy |
//! | `HELD_OPENING4`, `HELD_OPENING6` | LRU hash | `Flow4`, `Flow6` → `HeldOpening` |
//! | `HELD_FLOWS4`, `HELD_FLOWS6` | hash | `Flow4`, `Flow6` → `HeldFlow` |
//! | `HELD_VERDICTS4`, `HELD_VERDICTS6` | LRU hash | `HeldKey4`, `HeldKey6` → `HeldVerdict` |
//! | `INSIDE` | program array | 0 → `TO_POD_INSIDE` |
//! | `COUNTERS` | mmap array | CPU → `CpuCounters` |
//! | `EVENTS` | ring buffer | `Event` |

macro_rules! names {
    ($($name:ident)*) => {
        $(#[doc = concat!("Name of the map `", stringify!($name), "`.")] pub const $name: &str = stringify!($name);)*
        /// All maps.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

names! {
    STATE BANKS BLOCKS4 BLOCKS6 OUTBOUND4 OUTBOUND6 DATAGRAMS4 DATAGRAMS6 HOST_FLOWS4 HOST_FLOWS6
    L7_FLOWS4 L7_FLOWS6 L7_OPENING4 L7_OPENING6 L7_LISTENERS HELD_OPENING4 HELD_OPENING6 HELD_FLOWS4
    HELD_FLOWS6 HELD_VERDICTS4 HELD_VERDICTS6 INSIDE COUNTERS EVENTS
}

/// Program at the host veth's egress.
pub const TO_POD: &str = "to_pod";
/// Program at the host veth's ingress.
pub const FROM_POD: &str = "from_pod";
/// In the place of `TO_POD` with `--local-redirect`. The kernel keeps 15 bytes of a program's name.
pub const TO_POD_DIRECT: &str = "to_pod_direct";
/// In the place of `FROM_POD` with `--local-redirect`.
pub const FROM_POD_DIRECT: &str = "from_pod_direct";

/// In the place of `TO_POD` with `--hook=pod`: `TO_POD` is inside the pod.
pub const ORIGIN: &str = "origin";
/// At the ingress of the pod's own end of the veth, an instance for each pod; goes on to `TO_POD_INSIDE`.
pub const TO_POD_ENTRY: &str = "to_pod_entry";
/// `TO_POD` there, which all pods share.
pub const TO_POD_INSIDE: &str = "to_pod_inside";
/// Number that each instance of `TO_POD_ENTRY` is given at load: index of the host end of its veth.
pub const HOST_IFINDEX: &str = "HOST_IFINDEX";

/// Program in a pod's network namespace: finds the socket of a new connection.
pub const STEER: &str = "steer";
/// Program at Envoy's control group: notes its listening sockets.
pub const REGISTER: &str = "register";

/// Program at the interface through which the agent gives back what it held.
pub const FROM_AGENT: &str = "from_agent";

/// Flag of a map that user space may mmap (`BPF_F_MMAPABLE`).
pub const MMAPABLE: u32 = 1 << 10;

/// Mark of a packet that the programs made themselves ("THYR"). The kernel keeps a mark across a redirect and
/// zeroes it on whatever leaves a pod's namespace, so a pod can't set it.
pub const OWN_MARK: u32 = 0x5448_5952;
