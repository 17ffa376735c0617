//! Why a packet was refused, dropped or exempted: stable numbers, never reused.
//!
//! Numbers below 220 have Cilium's meaning (`DropReason` of its flow API), so that Hubble's tools name them.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// A reason; see the module.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name = $number,)* }

        impl Reason {
            /// All of them, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The reason with this number.
            #[must_use]
            pub const fn from_number(n: u8) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// Its stable number.
            #[must_use]
            pub const fn number(self) -> u8 {
                match self { $(Self::$name => $number,)* }
            }

            /// What a person reads.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// The source address is not the sender's own.
    InvalidSourceIp = 132, "invalid source ip";
    /// ALLOW policies apply and none matched.
    Policy = 133, "no allow rule matched";
    /// Truncated or lying headers.
    InvalidPacket = 134, "invalid packet";
    /// An L4 protocol that is not handled on an interface where it would be judged.
    UnknownL4 = 142, "unknown l4 protocol";
    /// A fragment, which carries no ports to judge.
    Fragment = 157, "fragmented packet";
    /// A DENY rule matched.
    PolicyDeny = 181, "policy denied";
    /// STRICT PeerAuthentication and a source without identity.
    StrictMtls = 220, "strict peer authentication needs a known identity";
    /// The verdict depends on L7 attributes and no L7 proxy is there.
    NeedsL7 = 221, "needs L7";
    /// A CUSTOM rule may match: the verdict depends on its authorizer, which an L7 proxy asks.
    NeedsCustom = 222, "needs an external authorizer";
    /// A policy holds a term that can't be expressed; it counts as matched in DENY, as not matched in ALLOW.
    NotExpressible = 223, "policy not expressible";
    /// The source is in a pod range and its identity has not arrived.
    IdentityPending = 224, "identity not known yet";
    /// Nothing was ever synced from the policy source (`--bootstrap=deny`).
    Bootstrap = 225, "deny until synced";
    /// The endpoint has no place in the live tables.
    EndpointUnknown = 226, "endpoint has no tables";
    /// A table lookup led to memory that nobody wrote.
    TableMissing = 227, "table incomplete";
    /// No room to remember a connection that the pod opens.
    OutboundFull = 228, "outbound table full";
    /// A listed policy has not arrived (source `authorization`).
    PolicyPending = 229, "listed policy has not arrived";
    /// A shape of packet that is not handled yet (IPv6 extension header chain too long, nested VLAN tags …).
    UnsupportedShape = 230, "unsupported packet shape";
    /// The tables don't fit: a new endpoint denies everything, the others keep their last state.
    Overflow = 232, "tables full";
    /// Bytes that are not HTTP on a port that declares HTTP (a proxy answers 400).
    NotHttp = 233, "not HTTP on a port that declares it";
    /// An ICMP error about nothing that the pod has to do with (`--non-tcp=enforce`).
    IcmpUnrelated = 234, "icmp error about no known flow";
    /// No room to remember a connection that Envoy is to judge.
    L7Full = 235, "L7 connection table full";
    /// Envoy has no socket in the pod for a verdict that needs L7.
    NoListener = 236, "no L7 listener in the pod";
    /// A CUSTOM rule matches and its authorizer can't be asked.
    NoAuthorizer = 237, "no authorizer can be asked";
    /// The authorizer of a CUSTOM rule said no, or could not be asked just then.
    Unauthorized = 238, "refused by an external authorizer";
    /// A connection that goes straight from pod to pod has this one's addresses and ports (`--local-redirect`).
    TupleClash = 239, "tuple clash";
    /// Allowed: no ALLOW policy applies.
    NoPolicy = 240, "no policy applies";
    /// Allowed: an ALLOW rule matched.
    PolicyAllow = 241, "policy allowed";
    /// Allowed: made by the node itself.
    HostTraffic = 242, "made by the node";
    /// Allowed: the pod talks to itself.
    SelfTraffic = 243, "own service";
    /// Allowed: reply to a connection that the pod opened.
    OwnReply = 244, "reply to own connection";
    /// Allowed: the endpoint is not enforced.
    NotEnforced = 245, "not enforced";
    /// Allowed: not TCP, and `--non-tcp=pass`.
    NonTcp = 246, "not tcp";
    /// Allowed: a port that Istio exempts on pods with a sidecar and on gateways.
    ExemptPort = 247, "exempt sidecar port";
    /// Allowed: nothing was ever synced (`--bootstrap=allow`).
    BootstrapAllow = 248, "allowed until synced";
    /// Passed: a packet that Thyra made itself.
    OwnPacket = 249, "own packet";
    /// Passed: a packet of a connection that the pod opened, on its way out.
    OwnConnection = 250, "own connection";
    /// Passed: neither IPv4 nor IPv6 (ARP and the like).
    NotIp = 251, "not ip";
    /// Passed: what a link needs: neighbour discovery, multicast listeners, DHCP (`--non-tcp=enforce`).
    LinkControl = 252, "link control";
}
