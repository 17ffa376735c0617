//! The memory of connections whose first bytes are held back until they are judged, and of what was judged.
//!
//! Invariant: a verdict is found only by the sequence numbers with which its connection began.

use thyra_datapath_abi::{Flow4, Flow6, FlowState, HeldFlow, HeldOpening, HeldVerdict, Isns};

/// Whoever holds it.
pub trait Held {
    /// The programs' clock, in ticks of `FlowState`.
    fn tick(&self) -> u64;
    /// A connection that began.
    fn held_opening4(&self, key: &Flow4) -> Option<HeldOpening>;
    /// The same for IPv6.
    fn held_opening6(&self, key: &Flow6) -> Option<HeldOpening>;
    /// Writes one, over an old one of the same key; false when there is no room.
    fn begin_held4(&self, key: &Flow4, opening: HeldOpening) -> bool;
    /// The same for IPv6.
    fn begin_held6(&self, key: &Flow6, opening: HeldOpening) -> bool;
    /// A connection that is held or was; `mark` (bits of `FlowState`) is added to its flags.
    fn held4(&self, key: &Flow4, mark: u32) -> Option<HeldFlow>;
    /// The same for IPv6.
    fn held6(&self, key: &Flow6, mark: u32) -> Option<HeldFlow>;
    /// Writes one that is new and forgets its opening; false when there is no room, in the table or for the endpoint.
    fn hold4(&self, key: &Flow4, flow: HeldFlow) -> bool;
    /// The same for IPv6.
    fn hold6(&self, key: &Flow6, flow: HeldFlow) -> bool;
    /// Everything passes from now on of the connection that began so.
    fn open_held4(&self, key: &Flow4, isns: Isns);
    /// The same for IPv6.
    fn open_held6(&self, key: &Flow6, isns: Isns);
    /// Forgets a connection.
    fn let_go4(&self, key: &Flow4);
    /// The same for IPv6.
    fn let_go6(&self, key: &Flow6);
    /// What was judged of the connection that began so.
    fn judged4(&self, key: &Flow4, isns: Isns) -> Option<HeldVerdict>;
    /// The same for IPv6.
    fn judged6(&self, key: &Flow6, isns: Isns) -> Option<HeldVerdict>;
}

/// A new entry of a connection that awaits its verdict.
#[inline(always)]
pub fn awaiting<H: Held + ?Sized>(held: &H, opening: HeldOpening, flags: u32) -> HeldFlow {
    let state = FlowState::live(
        flags | FlowState::ANSWERED,
        u64::from(opening.residual),
        held.tick(),
    );
    HeldFlow::awaiting(state, opening.isns)
}

/// The same by family.
pub trait HeldFamily {
    /// Key of a connection.
    type Connection;

    /// `Held::held_opening4` or `held_opening6`.
    fn held_opening<H: Held + ?Sized>(held: &H, key: &Self::Connection) -> Option<HeldOpening>;
    /// `Held::begin_held4` or `begin_held6`.
    fn begin_held<H: Held + ?Sized>(held: &H, key: &Self::Connection, opening: HeldOpening) -> bool;
    /// `Held::held4` or `held6`.
    fn held<H: Held + ?Sized>(held: &H, key: &Self::Connection, mark: u32) -> Option<HeldFlow>;
    /// `Held::hold4` or `hold6`.
    fn hold<H: Held + ?Sized>(held: &H, key: &Self::Connection, flow: HeldFlow) -> bool;
    /// `Held::open_held4` or `open_held6`.
    fn open_held<H: Held + ?Sized>(held: &H, key: &Self::Connection, isns: Isns);
    /// `Held::let_go4` or `let_go6`.
    fn let_go<H: Held + ?Sized>(held: &H, key: &Self::Connection);
    /// `Held::judged4` or `judged6`.
    fn judged<H: Held + ?Sized>(held: &H, key: &Self::Connection, isns: Isns) -> Option<HeldVerdict>;
}

macro_rules! family {
    (
        $family:ty, $key:ty,
        $opening:ident $begin:ident $held:ident $hold:ident $open:ident $let_go:ident $judged:ident
    ) => {
        impl HeldFamily for $family {
            type Connection = $key;

            #[inline(always)]
            fn held_opening<H: Held + ?Sized>(held: &H, key: &$key) -> Option<HeldOpening> {
                held.$opening(key)
            }
            #[inline(always)]
            fn begin_held<H: Held + ?Sized>(held: &H, key: &$key, opening: HeldOpening) -> bool {
                held.$begin(key, opening)
            }
            #[inline(always)]
            fn held<H: Held + ?Sized>(held: &H, key: &$key, mark: u32) -> Option<HeldFlow> {
                held.$held(key, mark)
            }
            #[inline(always)]
            fn hold<H: Held + ?Sized>(held: &H, key: &$key, flow: HeldFlow) -> bool {
                held.$hold(key, flow)
            }
            #[inline(always)]
            fn open_held<H: Held + ?Sized>(held: &H, key: &$key, isns: Isns) {
                held.$open(key, isns);
            }
            #[inline(always)]
            fn let_go<H: Held + ?Sized>(held: &H, key: &$key) {
                held.$let_go(key);
            }
            #[inline(always)]
            fn judged<H: Held + ?Sized>(held: &H, key: &$key, isns: Isns) -> Option<HeldVerdict> {
                held.$judged(key, isns)
            }
        }
    };
}

family!(crate::V4, Flow4, held_opening4 begin_held4 held4 hold4 open_held4 let_go4 judged4);
family!(crate::V6, Flow6, held_opening6 begin_held6 held6 hold6 open_held6 let_go6 judged6);
