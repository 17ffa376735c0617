//! The kernel's maps as the engine's `Held`, and the ways to the agent and back.
//!
//! Invariant: a packet that comes back carries Thyra's mark, so that `to_pod` and `from_pod` let it pass unread and
//! take the mark off.
#![expect(
    clippy::as_conversions,
    reason = "helpers take flags and indices as raw numbers of their own width"
)]

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::maps::{HashMap, LruHashMap};
use core::ptr::{read_volatile, write_volatile};
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_abi::{Flow4, Flow6, HeldFlow, HeldKey4, HeldKey6, HeldOpening, HeldVerdict, Isns};
use thyra_datapath_engine::Held;
use thyra_datapath_engine::decide::hold::Back;

use crate::flows::{mark, tick};
use crate::maps;
use crate::node::Node;
use crate::skb::{SHOT, Skb};
use crate::steered::{BPF_NOEXIST, EEXIST, FULL};

/// To the agent, whole as it is.
#[inline(always)]
pub fn divert() -> i32 {
    let Some(state) = maps::STATE.get_ptr(0) else {
        return SHOT;
    };
    // SAFETY: a word of the element that the kernel gave out.
    let agent = unsafe { read_volatile(&raw const (*state).agent) } as u32;
    if agent == 0 {
        return SHOT;
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(agent, 0) as i32 }
}

/// On to where it belongs.
#[inline(always)]
pub fn give_back(skb: Skb, back: Back) -> i32 {
    skb.set_mark(OWN_MARK);
    let (ifindex, flags) = match back {
        Back::ToPod(ifindex) => (ifindex, 0),
        Back::ToClient(ifindex) => (ifindex, u64::from(BPF_F_INGRESS)),
    };
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(ifindex, flags) as i32 }
}

/// The entry, with `flags` added to its state's.
#[inline(always)]
fn held<K>(map: &HashMap<K, HeldFlow>, key: &K, flags: u32) -> Option<HeldFlow> {
    let flow = map.get_ptr_mut(key)?;
    // SAFETY: words of the element that the kernel gave out; each is read whole.
    let (isns, opened) = unsafe { (number(&raw const (*flow).isns), number(&raw const (*flow).opened)) };
    // SAFETY: as above.
    let state = mark(unsafe { &raw mut (*flow).state }, flags);
    Some(HeldFlow {
        state,
        isns: isns_of(isns),
        opened: isns_of(opened),
    })
}

#[inline(always)]
unsafe fn number(isns: *const Isns) -> u64 {
    // SAFETY: eight aligned bytes, says the caller.
    unsafe { read_volatile(isns.cast::<u64>()) }
}

#[inline(always)]
fn isns_of(number: u64) -> Isns {
    zerocopy::transmute!(number)
}

#[inline(always)]
fn open<K>(map: &HashMap<K, HeldFlow>, key: &K, isns: Isns) {
    if let Some(flow) = map.get_ptr_mut(key) {
        // SAFETY: a word of the element that the kernel gave out, written whole.
        unsafe {
            write_volatile(
                (&raw mut (*flow).opened).cast::<u64>(),
                zerocopy::transmute!(isns),
            )
        }
    }
}

#[inline(always)]
fn judged<K>(map: &LruHashMap<K, HeldVerdict>, key: &K, isns: Isns) -> Option<HeldVerdict> {
    let verdict = map.get_ptr(key)?;
    // SAFETY: words of the element that the kernel gave out; each is read whole.
    let (action, end, of) = unsafe {
        (
            read_volatile(&raw const (*verdict).action),
            read_volatile(&raw const (*verdict).end),
            number(&raw const (*verdict).isns),
        )
    };
    let isns_there = isns_of(of);
    (isns_there.client == isns.client && isns_there.pod == isns.pod).then_some(HeldVerdict {
        isns,
        action,
        end,
    })
}

impl<const SHORT: bool> Node<SHORT> {
    /// Counted before it is there, so that no two take the last place.
    #[inline(always)]
    fn hold<K>(&self, map: &HashMap<K, HeldFlow>, (key, endpoint): (&K, u16), flow: &HeldFlow) -> bool {
        let inserted = if self.count(endpoint, 1) < self.l7_budget() {
            map.insert(key, flow, BPF_NOEXIST)
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
    fn let_go<K>(&self, map: &HashMap<K, HeldFlow>, (key, endpoint): (&K, u16)) {
        if map.remove(key).is_ok() {
            let _before = self.count(endpoint, u64::MAX);
        }
    }
}

impl<const SHORT: bool> Held for Node<SHORT> {
    #[inline(always)]
    fn tick(&self) -> u64 {
        tick()
    }
    #[inline(always)]
    fn held_opening4(&self, key: &Flow4) -> Option<HeldOpening> {
        // SAFETY: a copy; who writes one replaces the element, and numbers that are torn match nothing.
        unsafe { maps::HELD_OPENING4.get(key) }.copied()
    }
    #[inline(always)]
    fn held_opening6(&self, key: &Flow6) -> Option<HeldOpening> {
        // SAFETY: as above.
        unsafe { maps::HELD_OPENING6.get(key) }.copied()
    }
    #[inline(always)]
    fn begin_held4(&self, key: &Flow4, opening: HeldOpening) -> bool {
        maps::HELD_OPENING4.insert(key, &opening, 0).is_ok()
    }
    #[inline(always)]
    fn begin_held6(&self, key: &Flow6, opening: HeldOpening) -> bool {
        maps::HELD_OPENING6.insert(key, &opening, 0).is_ok()
    }
    #[inline(always)]
    fn held4(&self, key: &Flow4, mark: u32) -> Option<HeldFlow> {
        held(&maps::HELD_FLOWS4, key, mark)
    }
    #[inline(always)]
    fn held6(&self, key: &Flow6, mark: u32) -> Option<HeldFlow> {
        held(&maps::HELD_FLOWS6, key, mark)
    }
    #[inline(always)]
    fn hold4(&self, key: &Flow4, flow: HeldFlow) -> bool {
        // What isn't there has left.
        let _absent = maps::HELD_OPENING4.remove(key);
        self.hold(&maps::HELD_FLOWS4, (key, key.endpoint), &flow)
    }
    #[inline(always)]
    fn hold6(&self, key: &Flow6, flow: HeldFlow) -> bool {
        // As above.
        let _absent = maps::HELD_OPENING6.remove(key);
        self.hold(&maps::HELD_FLOWS6, (key, key.endpoint), &flow)
    }
    #[inline(always)]
    fn open_held4(&self, key: &Flow4, isns: Isns) {
        open(&maps::HELD_FLOWS4, key, isns);
    }
    #[inline(always)]
    fn open_held6(&self, key: &Flow6, isns: Isns) {
        open(&maps::HELD_FLOWS6, key, isns);
    }
    #[inline(always)]
    fn let_go4(&self, key: &Flow4) {
        self.let_go(&maps::HELD_FLOWS4, (key, key.endpoint));
    }
    #[inline(always)]
    fn let_go6(&self, key: &Flow6) {
        self.let_go(&maps::HELD_FLOWS6, (key, key.endpoint));
    }
    #[inline(always)]
    fn judged4(&self, key: &Flow4, isns: Isns) -> Option<HeldVerdict> {
        judged(&maps::HELD_VERDICTS4, &HeldKey4 { flow: *key, isns }, isns)
    }
    #[inline(always)]
    fn judged6(&self, key: &Flow6, isns: Isns) -> Option<HeldVerdict> {
        judged(&maps::HELD_VERDICTS6, &HeldKey6 { flow: *key, isns }, isns)
    }
}
