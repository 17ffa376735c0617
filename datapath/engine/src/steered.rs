//! The memory of connections that were steered to a listener of the node's Envoy, and where those listeners are.
//!
//! Invariant: only `decide::steer` begins a connection (the pod's answer is noted in what began), and `accept` is
//! called only for what began.

use thyra_datapath_abi::{Flow4, Flow6, Opening};

/// Whoever holds it.
pub trait Steered {
    /// Port of the listener that judges a verdict's residual; 0 for none.
    fn listener(&self, verdict: u16) -> u16;
    /// Whether new connections of the endpoint meet `decide::steer`.
    fn is_steered(&self, endpoint: u16) -> bool;

    /// Whether the endpoint may have one more accepted connection.
    fn has_room(&self, endpoint: u16) -> bool;

    /// A connection that began.
    fn opening4(&self, key: &Flow4) -> Option<Opening>;
    /// The same for IPv6.
    fn opening6(&self, key: &Flow6) -> Option<Opening>;
    /// Writes one, over an old one of the same key; false when there is no room.
    fn begin4(&self, key: &Flow4, opening: Opening) -> bool;
    /// The same for IPv6.
    fn begin6(&self, key: &Flow6, opening: Opening) -> bool;
    /// Port of the listener that has an accepted connection; `mark` (bits of `FlowState`) is added to its flags.
    fn accepted4(&self, key: &Flow4, mark: u32) -> Option<u16>;
    /// The same for IPv6.
    fn accepted6(&self, key: &Flow6, mark: u32) -> Option<u16>;
    /// Makes one that began an accepted one; false when there is no room, in the table or for the endpoint.
    fn accept4(&self, key: &Flow4, port: u16, flags: u32) -> bool;
    /// The same for IPv6.
    fn accept6(&self, key: &Flow6, port: u16, flags: u32) -> bool;
    /// Forgets a connection, in whichever state.
    fn leave4(&self, key: &Flow4);
    /// The same for IPv6.
    fn leave6(&self, key: &Flow6);
}

/// The same by family.
pub trait SteeredFamily {
    /// Key of a connection.
    type Key;

    /// `Steered::opening4` or `opening6`.
    fn opening<S: Steered + ?Sized>(steered: &S, key: &Self::Key) -> Option<Opening>;
    /// `Steered::begin4` or `begin6`.
    fn begin<S: Steered + ?Sized>(steered: &S, key: &Self::Key, opening: Opening) -> bool;
    /// `Steered::accepted4` or `accepted6`.
    fn accepted<S: Steered + ?Sized>(steered: &S, key: &Self::Key, mark: u32) -> Option<u16>;
    /// `Steered::accept4` or `accept6`.
    fn accept<S: Steered + ?Sized>(steered: &S, key: &Self::Key, port: u16, flags: u32) -> bool;
    /// `Steered::leave4` or `leave6`.
    fn leave<S: Steered + ?Sized>(steered: &S, key: &Self::Key);
}

macro_rules! family {
    ($family:ty, $key:ty, $opening:ident, $begin:ident, $accepted:ident, $accept:ident, $leave:ident) => {
        impl SteeredFamily for $family {
            type Key = $key;

            #[inline(always)]
            fn opening<S: Steered + ?Sized>(steered: &S, key: &$key) -> Option<Opening> {
                steered.$opening(key)
            }
            #[inline(always)]
            fn begin<S: Steered + ?Sized>(steered: &S, key: &$key, opening: Opening) -> bool {
                steered.$begin(key, opening)
            }
            #[inline(always)]
            fn accepted<S: Steered + ?Sized>(steered: &S, key: &$key, mark: u32) -> Option<u16> {
                steered.$accepted(key, mark)
            }
            #[inline(always)]
            fn accept<S: Steered + ?Sized>(steered: &S, key: &$key, port: u16, flags: u32) -> bool {
                steered.$accept(key, port, flags)
            }
            #[inline(always)]
            fn leave<S: Steered + ?Sized>(steered: &S, key: &$key) {
                steered.$leave(key);
            }
        }
    };
}

family!(crate::V4, Flow4, opening4, begin4, accepted4, accept4, leave4);
family!(crate::V6, Flow6, opening6, begin6, accepted6, accept6, leave6);
