//! The connections that Envoy has, in memory.
//!
//! Invariant: as the kernel's maps, without their limits; what one endpoint may have is the same.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use thyra_datapath_abi::limits::L7_BUDGET;
use thyra_datapath_abi::{Flow4, Flow6, FlowState, Opening};

use super::HostNode;
use crate::Steered;

/// What is known of them.
#[derive(Clone, Debug)]
pub struct HostSteered {
    /// How many accepted ones an endpoint may have.
    pub budget: usize,
    /// Port of the listener of a verdict's residual.
    pub listeners: BTreeMap<u16, u16>,
    /// Endpoints whose new connections are steered.
    pub endpoints: BTreeSet<u16>,
    /// Those that began.
    pub opening4: RefCell<HashMap<Flow4, Opening>>,
    /// The same for IPv6.
    pub opening6: RefCell<HashMap<Flow6, Opening>>,
    /// Those whose client has answered; tagged with the listener's port.
    pub accepted4: RefCell<HashMap<Flow4, FlowState>>,
    /// The same for IPv6.
    pub accepted6: RefCell<HashMap<Flow6, FlowState>>,
}

impl Default for HostSteered {
    fn default() -> Self {
        Self {
            budget: usize::try_from(L7_BUDGET).unwrap_or(usize::MAX),
            listeners: BTreeMap::new(),
            endpoints: BTreeSet::new(),
            opening4: RefCell::default(),
            opening6: RefCell::default(),
            accepted4: RefCell::default(),
            accepted6: RefCell::default(),
        }
    }
}

impl HostSteered {
    /// Accepted connections of an endpoint.
    fn of(&self, endpoint: u16) -> usize {
        let four = self.accepted4.borrow();
        let six = self.accepted6.borrow();
        four.keys().filter(|key| key.endpoint == endpoint).count()
            + six.keys().filter(|key| key.endpoint == endpoint).count()
    }
}

fn find<K: Eq + Hash>(
    flows: &RefCell<HashMap<K, FlowState>>,
    key: &K,
    mark: u32,
    now_ns: u64,
) -> Option<u16> {
    let mut flows = flows.borrow_mut();
    let state = flows.get_mut(key)?;
    if !state.has(mark) {
        *state = state.marked(mark, FlowState::tick(now_ns));
    }
    Some(state.tag())
}

fn insert<K: Copy + Eq + Hash>(
    flows: &RefCell<HashMap<K, FlowState>>,
    key: &K,
    (port, flags): (u16, u32),
    now_ns: u64,
) -> bool {
    let state = FlowState::live(flags, u64::from(port), FlowState::tick(now_ns));
    flows.borrow_mut().insert(*key, state);
    true
}

impl Steered for &HostNode {
    fn listener(&self, verdict: u16) -> u16 {
        self.steered.listeners.get(&verdict).copied().unwrap_or(0)
    }
    fn is_steered(&self, endpoint: u16) -> bool {
        self.steered.endpoints.contains(&endpoint)
    }
    fn has_room(&self, endpoint: u16) -> bool {
        self.steered.of(endpoint) < self.steered.budget
    }
    fn opening4(&self, key: &Flow4) -> Option<Opening> {
        self.steered.opening4.borrow().get(key).copied()
    }
    fn opening6(&self, key: &Flow6) -> Option<Opening> {
        self.steered.opening6.borrow().get(key).copied()
    }
    fn begin4(&self, key: &Flow4, opening: Opening) -> bool {
        self.steered.opening4.borrow_mut().insert(*key, opening);
        true
    }
    fn begin6(&self, key: &Flow6, opening: Opening) -> bool {
        self.steered.opening6.borrow_mut().insert(*key, opening);
        true
    }
    fn accepted4(&self, key: &Flow4, mark: u32) -> Option<u16> {
        find(&self.steered.accepted4, key, mark, self.now_ns.get())
    }
    fn accepted6(&self, key: &Flow6, mark: u32) -> Option<u16> {
        find(&self.steered.accepted6, key, mark, self.now_ns.get())
    }
    fn accept4(&self, key: &Flow4, port: u16, flags: u32) -> bool {
        self.has_room(key.endpoint) && insert(&self.steered.accepted4, key, (port, flags), self.now_ns.get())
    }
    fn accept6(&self, key: &Flow6, port: u16, flags: u32) -> bool {
        self.has_room(key.endpoint) && insert(&self.steered.accepted6, key, (port, flags), self.now_ns.get())
    }
    fn leave4(&self, key: &Flow4) {
        self.steered.opening4.borrow_mut().remove(key);
        self.steered.accepted4.borrow_mut().remove(key);
    }
    fn leave6(&self, key: &Flow6) {
        self.steered.opening6.borrow_mut().remove(key);
        self.steered.accepted6.borrow_mut().remove(key);
    }
}
