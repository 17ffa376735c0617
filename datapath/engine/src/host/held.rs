//! The connections that are held, in memory.
//!
//! Invariant: as the kernel's maps, without their limits; what one endpoint may have is the same.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;

use thyra_datapath_abi::{Flow4, Flow6, FlowState, HeldFlow, HeldOpening, HeldVerdict, Isns};

use super::HostNode;
use crate::{Held, Steered};

/// What is known of them.
#[derive(Clone, Debug, Default)]
pub struct HostHeld {
    /// IPv4.
    pub v4: HostFamily<Flow4>,
    /// IPv6.
    pub v6: HostFamily<Flow6>,
}

/// The same of one family.
#[derive(Clone, Debug)]
pub struct HostFamily<K> {
    /// Those that began.
    pub opening: RefCell<HashMap<K, HeldOpening>>,
    /// Those whose client has answered.
    pub flows: RefCell<HashMap<K, HeldFlow>>,
    /// What the agent has said.
    pub verdicts: RefCell<HashMap<(K, Isns), HeldVerdict>>,
}

impl<K> Default for HostFamily<K> {
    fn default() -> Self {
        Self {
            opening: RefCell::default(),
            flows: RefCell::default(),
            verdicts: RefCell::default(),
        }
    }
}

impl<K: Copy + Eq + Hash> HostFamily<K> {
    fn marked(&self, key: &K, mark: u32, now_ns: u64) -> Option<HeldFlow> {
        let mut flows = self.flows.borrow_mut();
        let flow = flows.get_mut(key)?;
        if !flow.state.has(mark) {
            flow.state = flow.state.marked(mark, FlowState::tick(now_ns));
        }
        Some(*flow)
    }

    fn hold(&self, key: &K, flow: HeldFlow) -> bool {
        self.opening.borrow_mut().remove(key);
        self.flows.borrow_mut().entry(*key).or_insert(flow);
        true
    }

    fn open(&self, key: &K, isns: Isns) {
        if let Some(flow) = self.flows.borrow_mut().get_mut(key) {
            flow.opened = isns;
        }
    }
}

macro_rules! held {
    ($($key:ty, $family:ident: $opening:ident $begin:ident $held:ident $hold:ident $open:ident $let_go:ident
        $judged:ident;)*) => {
        impl Held for &HostNode {
            fn tick(&self) -> u64 {
                FlowState::tick(self.now_ns.get())
            }
            $(
                fn $opening(&self, key: &$key) -> Option<HeldOpening> {
                    self.held.$family.opening.borrow().get(key).copied()
                }
                fn $begin(&self, key: &$key, opening: HeldOpening) -> bool {
                    self.held.$family.opening.borrow_mut().insert(*key, opening);
                    true
                }
                fn $held(&self, key: &$key, mark: u32) -> Option<HeldFlow> {
                    self.held.$family.marked(key, mark, self.now_ns.get())
                }
                fn $hold(&self, key: &$key, flow: HeldFlow) -> bool {
                    self.has_room(key.endpoint) && self.held.$family.hold(key, flow)
                }
                fn $open(&self, key: &$key, isns: Isns) {
                    self.held.$family.open(key, isns);
                }
                fn $let_go(&self, key: &$key) {
                    self.held.$family.flows.borrow_mut().remove(key);
                }
                fn $judged(&self, key: &$key, isns: Isns) -> Option<HeldVerdict> {
                    self.held.$family.verdicts.borrow().get(&(*key, isns)).copied()
                }
            )*
        }
    };
}

held! {
    Flow4, v4: held_opening4 begin_held4 held4 hold4 open_held4 let_go4 judged4;
    Flow6, v6: held_opening6 begin_held6 held6 hold6 open_held6 let_go6 judged6;
}
