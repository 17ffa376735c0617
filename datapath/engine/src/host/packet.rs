//! A packet on the host, at a hook of a node in memory.
//!
//! Invariant: it is read where it lies, and its end is told, not carried out.

use thyra_datapath_abi::EndpointRecord;
use thyra_datapath_abi::maps::OWN_MARK;

use super::{End, HostNode};
use crate::account::Direction;
use crate::decide::hold::Back;
use crate::decide::{Act, Arrival};
use crate::load::chunk;
use crate::program::{self, FromPod, Hook, Program};
use crate::{Family, Load, Packet};

/// A packet at a hook of the node.
#[derive(Clone, Copy, Debug)]
pub struct HostPacket<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// What the kernel would say about it.
    pub arrival: Arrival,
    /// Its mark.
    pub mark: u32,
    /// Whether the stack of the pod that it is for has a connection with its addresses and ports.
    pub taken: bool,
}

impl HostNode {
    /// Runs a program on a packet.
    pub fn run<P: Program>(&self, packet: HostPacket<'_>) -> End {
        program::run::<P, &Self, HostPacket<'_>>(self, packet)
    }

    /// Runs `maps::FROM_AGENT` on a packet.
    pub fn run_from_agent(&self, packet: HostPacket<'_>) -> End {
        program::from_agent::<&Self, HostPacket<'_>>(self, packet)
    }

    /// Runs `maps::ORIGIN` on a packet.
    pub fn run_origin(&self, packet: HostPacket<'_>) -> End {
        program::origin::<&Self, HostPacket<'_>>(self, packet)
    }

    /// Runs `maps::TO_POD_DIRECT` on a packet.
    pub fn run_to_pod_direct(&self, packet: HostPacket<'_>) -> End {
        program::to_pod_direct::<&Self, HostPacket<'_>>(self, packet)
    }

    /// Runs `maps::FROM_POD_DIRECT` on a packet.
    pub fn run_from_pod_direct(&self, packet: HostPacket<'_>) -> End {
        program::from_pod_direct::<&Self, HostPacket<'_>>(self, packet)
    }
}

impl Load for HostPacket<'_> {
    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }
    fn is_merged(&self) -> bool {
        false
    }
    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        self.bytes.first_chunk()
    }
    fn near16<const AT: usize, const N: usize>(head: &[u8; N]) -> u16 {
        u16::from_be_bytes(*within::<AT, _>(head))
    }
    fn near32<const AT: usize, const N: usize>(head: &[u8; N]) -> u32 {
        u32::from_be_bytes(*within::<AT, _>(head))
    }
    fn near64<const AT: usize, const N: usize>(head: &[u8; N]) -> u64 {
        u64::from_be_bytes(*within::<AT, _>(head))
    }
    fn far8(&self, offset: u32) -> u8 {
        u8::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far16(&self, offset: u32) -> u16 {
        u16::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far32(&self, offset: u32) -> u32 {
        u32::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far64(&self, offset: u32) -> u64 {
        u64::from_be_bytes(chunk(self.bytes, offset))
    }
}

/// Bytes of a head at a constant place, which the parser keeps inside it.
fn within<const AT: usize, const LENGTH: usize>(head: &[u8]) -> &[u8; LENGTH] {
    head[AT..]
        .first_chunk()
        .expect("a constant place inside the head")
}

impl Hook for HostPacket<'_> {
    type End = End;

    fn arrival(&self) -> Arrival {
        self.arrival
    }
    fn is_own(&self) -> bool {
        self.mark == OWN_MARK
    }
    fn pass(&self) -> End {
        End::Pass
    }
    fn pass_own(&self) -> End {
        End::PassOwn
    }
    fn drop(&self) -> End {
        End::Drop
    }
    fn refuse<F: Family>(&self, _: &Packet<F>, _: Direction) -> End {
        End::Refuse
    }
    fn revoke<F: Family>(&self, _: &Packet<F>, _: Direction) -> End {
        End::Revoke
    }
    fn divert(&self) -> End {
        End::Divert
    }
    fn give_back(&self, back: Back) -> End {
        End::GivenBack(back)
    }
    fn redirect(&self, to: &EndpointRecord) -> End {
        End::Redirect(to.ifindex)
    }
    fn revoke_into(&self, to: &EndpointRecord) -> End {
        match self.answer::<FromPod>(Act::Revoke) {
            End::Revoke => End::RevokeInto(to.ifindex),
            end => end,
        }
    }
    fn is_taken<F: Family>(&self, _: &Packet<F>, _: u16) -> bool {
        self.taken
    }
}
