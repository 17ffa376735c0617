//! IPv4 and IPv6: what differs between them, so that everything else is written once.

use thyra_datapath_abi::datagram::{DATAGRAM4_WORDS, DATAGRAM6_WORDS};
use thyra_datapath_abi::{Datagram4, Datagram6, EndpointRecord, EndpointSets, Flow4, Flow6};
use zerocopy::transmute;

use crate::datagram_table::Touch;
use crate::flows::{Datagrams, FlowTable, Flows};
use crate::held::HeldFamily;
use crate::lookup::{self, Source};
use crate::reset;
use crate::steered::SteeredFamily;
use crate::tables::Tables;

/// An address family.
pub trait Family:
    Copy + Sized + SteeredFamily<Key = Self::Flow> + HeldFamily<Connection = Self::Flow>
{
    /// 4 or 6.
    const VERSION: u8;
    /// Bytes of the IP header without options.
    const HEADER: u32;
    /// An address as a number whose big-endian bytes are on the wire.
    type Address: Copy + Default + core::fmt::Debug + Eq;
    /// Key of a connection.
    type Flow: Copy + core::fmt::Debug;
    /// Key of what is remembered of datagrams.
    type Datagram: Copy + core::fmt::Debug;
    /// An IP header without options, as on the wire.
    type Header: Copy;

    /// The header of a bare TCP segment of 20 bytes.
    fn header(source: Self::Address, destination: Self::Address) -> Self::Header;
    /// The ones' complement sum of both addresses, not folded.
    fn sum(source: Self::Address, destination: Self::Address) -> u32;

    /// A connection's key.
    fn flow(
        endpoint: u16,
        local: Self::Address,
        remote: Self::Address,
        local_port: [u8; 2],
        remote_port: [u8; 2],
    ) -> Self::Flow;
    /// The same of another protocol than TCP.
    fn with_protocol(flow: Self::Flow, protocol: u8) -> Self::Flow;
    /// The key of datagrams between the pod's port and the other end.
    fn datagram(remote: Self::Address, local_port: [u8; 2], remote_port: [u8; 2]) -> Self::Datagram;
    /// The key of a fragmented datagram, by its identification.
    fn fragments(remote: Self::Address, id: u32, protocol: u8, from_pod: bool) -> Self::Datagram;
    /// The endpoint's own address; zero when it has none of this family.
    fn own(record: &EndpointRecord) -> Self::Address;
    /// The endpoint's policy set.
    fn set(sets: EndpointSets) -> u16;
    /// Class and owner of a source address.
    fn source<T: Tables + ?Sized>(tables: &T, address: Self::Address) -> Source;
    /// Whether an address that is not the pod's own may still be its source: unspecified while it configures
    /// itself, link-local.
    fn may_send(source: Self::Address, protocol: u8, ports: [u8; 4]) -> bool;
    /// A form that never is a source on the wire.
    fn is_never_source(address: Self::Address) -> bool;
    /// As 16 bytes, IPv4 as v4-mapped IPv6.
    fn mapped(address: Self::Address) -> [u8; 16];
    /// `Flows::find4` or `find6`.
    fn find<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Self::Flow, mark: u32) -> Option<u32>;
    /// `Flows::open4` or `open6`.
    fn open<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Self::Flow, flags: u32) -> bool;
    /// `Flows::forget4` or `forget6`.
    fn forget<S: Flows + ?Sized>(flows: &S, key: &Self::Flow);
    /// `Datagrams::recall4` or `recall6`.
    fn recall<S: Datagrams + ?Sized>(
        datagrams: &S,
        endpoint: u16,
        key: Self::Datagram,
        kind: u32,
        touch: Touch,
    ) -> Option<u32>;
    /// `Datagrams::note4` or `note6`.
    fn note<S: Datagrams + ?Sized>(datagrams: &S, endpoint: u16, key: Self::Datagram, flags: u32) -> bool;
}

/// IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

/// An IPv6 address as two numbers whose big-endian bytes are on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address6 {
    /// Upper 64 bits.
    pub high: u64,
    /// Lower 64 bits.
    pub low: u64,
}

impl Address6 {
    /// From the bytes on the wire.
    #[must_use]
    #[inline(always)]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let [high, low]: [u64; 2] = transmute!(bytes);
        Self {
            high: u64::from_be(high),
            low: u64::from_be(low),
        }
    }

    /// The bytes on the wire. Made of two words, since the compiler keeps sixteen single bytes in sixteen
    /// places.
    #[must_use]
    #[inline(always)]
    pub fn to_bytes(self) -> [u8; 16] {
        transmute!([self.high.to_be(), self.low.to_be()])
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
/// UDP ports 68 → 67: a DHCP client that has no address yet (RFC 2131).
const DHCP: [u8; 4] = [0, 68, 0, 67];

impl Family for V4 {
    const VERSION: u8 = 4;
    const HEADER: u32 = 20;
    type Address = u32;
    type Flow = Flow4;
    type Datagram = [u64; DATAGRAM4_WORDS];
    type Header = [u8; 20];

    #[inline(always)]
    fn header(source: u32, destination: u32) -> [u8; 20] {
        reset::header4(source, destination)
    }
    #[inline(always)]
    fn sum(source: u32, destination: u32) -> u32 {
        reset::sum4(source) + reset::sum4(destination)
    }

    #[inline(always)]
    fn flow(endpoint: u16, local: u32, remote: u32, local_port: [u8; 2], remote_port: [u8; 2]) -> Flow4 {
        let (local, remote) = (local.to_be_bytes(), remote.to_be_bytes());
        Flow4 {
            local,
            remote,
            local_port,
            remote_port,
            endpoint,
            protocol: 0,
        }
    }
    #[inline(always)]
    fn with_protocol(flow: Flow4, protocol: u8) -> Flow4 {
        Flow4 {
            protocol: u16::from(protocol),
            ..flow
        }
    }
    #[inline(always)]
    fn datagram(remote: u32, local_port: [u8; 2], remote_port: [u8; 2]) -> [u64; DATAGRAM4_WORDS] {
        transmute!(Datagram4 {
            remote: remote.to_be_bytes(),
            local_port,
            remote_port,
        })
    }
    #[inline(always)]
    fn fragments(remote: u32, id: u32, protocol: u8, from_pod: bool) -> [u64; DATAGRAM4_WORDS] {
        let [_, _, a, b] = id.to_be_bytes();
        Self::datagram(remote, [a, b], [protocol, u8::from(from_pod)])
    }
    #[inline(always)]
    fn own(record: &EndpointRecord) -> u32 {
        u32::from_be_bytes(record.address4)
    }
    #[inline(always)]
    fn set(sets: EndpointSets) -> u16 {
        sets.set4()
    }
    #[inline(always)]
    fn source<T: Tables + ?Sized>(tables: &T, address: u32) -> Source {
        lookup::source4(tables, address)
    }
    #[inline(always)]
    fn may_send(source: u32, protocol: u8, ports: [u8; 4]) -> bool {
        source == 0 && protocol == UDP && ports == DHCP
    }
    #[inline(always)]
    fn is_never_source(_: u32) -> bool {
        false
    }
    #[inline(always)]
    fn mapped(address: u32) -> [u8; 16] {
        let [a, b, c, d] = address.to_be_bytes();
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }
    #[inline(always)]
    fn find<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        flows.find4(table, key, mark)
    }
    #[inline(always)]
    fn open<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        flows.open4(table, key, flags)
    }
    #[inline(always)]
    fn forget<S: Flows + ?Sized>(flows: &S, key: &Flow4) {
        flows.forget4(key);
    }
    #[inline(always)]
    fn recall<S: Datagrams + ?Sized>(
        datagrams: &S,
        endpoint: u16,
        key: [u64; DATAGRAM4_WORDS],
        kind: u32,
        touch: Touch,
    ) -> Option<u32> {
        datagrams.recall4(endpoint, key, kind, touch)
    }
    #[inline(always)]
    fn note<S: Datagrams + ?Sized>(
        datagrams: &S,
        endpoint: u16,
        key: [u64; DATAGRAM4_WORDS],
        flags: u32,
    ) -> bool {
        datagrams.note4(endpoint, key, flags)
    }
}

/// fe80::/10.
#[inline(always)]
fn is_link_local(address: Address6) -> bool {
    address.high >> 54 == 0x3fa
}

impl Family for V6 {
    const VERSION: u8 = 6;
    const HEADER: u32 = 40;
    type Address = Address6;
    type Flow = Flow6;
    type Datagram = [u64; DATAGRAM6_WORDS];
    type Header = [u8; 40];

    #[inline(always)]
    fn header(source: Address6, destination: Address6) -> [u8; 40] {
        reset::header6(source, destination)
    }
    #[inline(always)]
    fn sum(source: Address6, destination: Address6) -> u32 {
        reset::sum6(source) + reset::sum6(destination)
    }

    #[inline(always)]
    fn flow(
        endpoint: u16,
        local: Address6,
        remote: Address6,
        local_port: [u8; 2],
        remote_port: [u8; 2],
    ) -> Flow6 {
        let (local, remote) = (local.to_bytes(), remote.to_bytes());
        Flow6 {
            local,
            remote,
            local_port,
            remote_port,
            endpoint,
            protocol: 0,
        }
    }
    #[inline(always)]
    fn with_protocol(flow: Flow6, protocol: u8) -> Flow6 {
        Flow6 {
            protocol: u16::from(protocol),
            ..flow
        }
    }
    #[inline(always)]
    fn datagram(remote: Address6, local_port: [u8; 2], remote_port: [u8; 2]) -> [u64; DATAGRAM6_WORDS] {
        transmute!(Datagram6 {
            remote: remote.to_bytes(),
            local_port,
            remote_port,
            detail: [0; 4],
        })
    }
    #[inline(always)]
    fn fragments(remote: Address6, id: u32, protocol: u8, from_pod: bool) -> [u64; DATAGRAM6_WORDS] {
        let [a, b, c, d] = id.to_be_bytes();
        transmute!(Datagram6 {
            remote: remote.to_bytes(),
            local_port: [a, b],
            remote_port: [c, d],
            detail: [protocol, u8::from(from_pod), 0, 0],
        })
    }
    #[inline(always)]
    fn own(record: &EndpointRecord) -> Address6 {
        Address6::from_bytes(record.address6)
    }
    #[inline(always)]
    fn set(sets: EndpointSets) -> u16 {
        sets.set6()
    }
    #[inline(always)]
    fn source<T: Tables + ?Sized>(tables: &T, address: Address6) -> Source {
        lookup::source6(tables, address)
    }
    #[inline(always)]
    fn may_send(source: Address6, protocol: u8, _: [u8; 4]) -> bool {
        // fe80::/10 has no identity and crosses a bridge, so it may carry what a link needs but no
        // connection.
        let link_local = is_link_local(source) && protocol != TCP;
        // Duplicate address detection and multicast listener reports (RFC 4862, RFC 3810).
        let unspecified = source.high == 0 && source.low == 0 && protocol == ICMP6;
        link_local || unspecified
    }
    #[inline(always)]
    fn is_never_source(address: Address6) -> bool {
        // v4-mapped, which Linux refuses on the wire too; and link-local, whose owner no table knows.
        (address.high == 0 && address.low >> 32 == 0xffff) || is_link_local(address)
    }
    #[inline(always)]
    fn mapped(address: Address6) -> [u8; 16] {
        address.to_bytes()
    }
    #[inline(always)]
    fn find<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        flows.find6(table, key, mark)
    }
    #[inline(always)]
    fn open<S: Flows + ?Sized>(flows: &S, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        flows.open6(table, key, flags)
    }
    #[inline(always)]
    fn forget<S: Flows + ?Sized>(flows: &S, key: &Flow6) {
        flows.forget6(key);
    }
    #[inline(always)]
    fn recall<S: Datagrams + ?Sized>(
        datagrams: &S,
        endpoint: u16,
        key: [u64; DATAGRAM6_WORDS],
        kind: u32,
        touch: Touch,
    ) -> Option<u32> {
        datagrams.recall6(endpoint, key, kind, touch)
    }
    #[inline(always)]
    fn note<S: Datagrams + ?Sized>(
        datagrams: &S,
        endpoint: u16,
        key: [u64; DATAGRAM6_WORDS],
        flags: u32,
    ) -> bool {
        datagrams.note6(endpoint, key, flags)
    }
}
