//! The table of the pods' own connections, as programs on several CPUs and user space use it at once.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use thyra_datapath_abi::flow::{FLOW_SLOTS, FLOW4_WORDS, FlowBucket4};
use thyra_datapath_abi::limits::{FLOW_BUCKETS, MAX_ENDPOINTS, OUTBOUND_BUDGET};
use thyra_datapath_abi::{Flow4, FlowState};
use thyra_datapath_engine::flow_table::{self, Key};
use thyra_datapath_engine::flow_words::FlowWords;

const SEED: u64 = 0x1234_5678_9abc_def1;

struct Memory {
    buckets: Vec<AtomicU64>,
    counts: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Self {
        let zeros = |words| (0..words).map(|_| AtomicU64::new(0)).collect();
        Self {
            buckets: zeros(FLOW_BUCKETS * size_of::<FlowBucket4>() / size_of::<u64>()),
            counts: zeros(MAX_ENDPOINTS),
        }
    }

    fn table(&self) -> FlowWords<'_> {
        FlowWords {
            buckets: &self.buckets,
            counts: &self.counts,
            budget: u64::MAX,
            now_ns: 0,
        }
    }

    fn count(&self, endpoint: u16) -> u64 {
        self.counts[usize::from(endpoint)].load(Ordering::Relaxed)
    }
}

/// Connection `number` of an endpoint.
fn flow(endpoint: u16, number: u32) -> Flow4 {
    let [a, b, c, d] = number.to_be_bytes();
    Flow4 {
        local: [10, 244, 0, 2],
        remote: [203, 0, a, b],
        local_port: [c, d],
        remote_port: [1, 187],
        endpoint,
        protocol: 0,
    }
}

fn key(endpoint: u16, number: u32) -> Key<FLOW4_WORDS> {
    Key::v4(&flow(endpoint, number), SEED)
}

fn open(memory: &Memory, endpoint: u16, number: u32) -> bool {
    flow_table::open(&memory.table(), &key(endpoint, number), 0)
}

fn find(memory: &Memory, endpoint: u16, number: u32, mark: u32) -> Option<u32> {
    flow_table::find(&memory.table(), &key(endpoint, number), mark)
}

fn entries(memory: &Memory) -> HashSet<[u64; FLOW4_WORDS]> {
    let keys: Vec<_> = memory.table().entries().map(|entry| entry.key).collect();
    let set: HashSet<_> = keys.iter().copied().collect();
    assert_eq!(keys.len(), set.len(), "a connection is there once");
    set
}

/// Fills the table until a connection is refused. Returns how many it took.
fn fill(memory: &Memory) -> u32 {
    (0..).find(|number| !open(memory, 1, *number)).unwrap()
}

#[test]
fn what_was_opened_is_found_and_nothing_else() {
    let memory = Memory::new();
    assert!((0..20_000).all(|number| open(&memory, 1, number)));
    assert!((0..20_000).all(|number| find(&memory, 1, number, 0) == Some(0)));
    assert!((20_000..60_000).all(|number| find(&memory, 1, number, 0).is_none()));
    assert!(
        (0..20_000).all(|number| find(&memory, 2, number, 0).is_none()),
        "another endpoint's"
    );
    assert_eq!((entries(&memory).len(), memory.count(1)), (20_000, 20_000));
}

#[test]
fn a_full_bucket_sends_its_connections_on() {
    let memory = Memory::new();
    let taken = fill(&memory);
    // The first full bucket comes near 7,000.
    let slots = u32::try_from(FLOW_BUCKETS * FLOW_SLOTS).unwrap();
    assert!(taken > slots / 3 * 2, "refused after {taken} of {slots}");
    assert!((0..taken).all(|number| find(&memory, 1, number, 0).is_some()));
    assert_eq!(
        memory.count(1),
        u64::from(taken),
        "what was refused is not counted"
    );
    assert!(open(&memory, 1, 0), "one that is there may begin again");
}

#[test]
fn a_removed_connection_makes_room_for_another() {
    let memory = Memory::new();
    let taken = fill(&memory);
    let table = memory.table();
    for entry in table.entries::<FLOW4_WORDS>() {
        assert!(table.remove(&entry, 1));
    }
    assert_eq!((entries(&memory).len(), memory.count(1)), (0, 0));
    assert!((0..taken).all(|number| find(&memory, 1, number, 0).is_none()));
    assert!(open(&memory, 1, taken));
}

#[test]
fn marks_add_up_and_a_new_beginning_clears_them() {
    let memory = Memory::new();
    assert!(open(&memory, 1, 7));
    assert_eq!(find(&memory, 1, 7, FlowState::ANSWERED), Some(0));
    assert_eq!(
        find(&memory, 1, 7, FlowState::LOCAL_FIN),
        Some(FlowState::ANSWERED)
    );
    let both = FlowState::ANSWERED | FlowState::LOCAL_FIN;
    assert_eq!(find(&memory, 1, 7, 0), Some(both));
    assert!(open(&memory, 1, 7));
    assert_eq!(find(&memory, 1, 7, 0), Some(0));
    assert_eq!(memory.count(1), 1);
}

#[test]
fn a_connection_that_changed_since_it_was_read_is_not_removed() {
    let memory = Memory::new();
    assert!(open(&memory, 1, 7));
    let table = memory.table();
    let entry = table.entries::<FLOW4_WORDS>().next().unwrap();
    assert!(find(&memory, 1, 7, FlowState::ANSWERED).is_some());
    assert!(!table.remove(&entry, 1));
    assert_eq!(memory.count(1), 1);
}

#[test]
fn a_budget_is_an_endpoints_own() {
    let memory = Memory::new();
    let table = FlowWords {
        budget: 100,
        ..memory.table()
    };
    let open = |endpoint, number| flow_table::open(&table, &key(endpoint, number), 0);
    assert!((0..100).all(|number| open(1, number)));
    assert!((100..200).all(|number| !open(1, number)));
    assert!(open(1, 5), "again");
    assert!(open(2, 0), "another endpoint");
    assert_eq!((memory.count(1), memory.count(2)), (100, 1));
}

#[test]
fn one_pods_million_connections_leave_anothers_idle_one_alone() {
    let memory = Memory::new();
    let table = FlowWords {
        budget: OUTBOUND_BUDGET,
        ..memory.table()
    };
    let open = |endpoint, number| flow_table::open(&table, &key(endpoint, number), 0);
    assert!(open(2, 7));
    let opened = (0..1_000_000).filter(|number| open(1, *number)).count();
    assert_eq!(u64::try_from(opened).unwrap(), OUTBOUND_BUDGET);
    assert_eq!(flow_table::find(&table, &key(2, 7), 0), Some(0));
    assert!((8..1_000).all(|number| open(2, number)), "and it opens more");
}

/// Two threads open, mark and close connections of their own, a third removes what is finished; none of them
/// may lose a connection that is open, or leave one that is not.
#[test]
fn connections_survive_whatever_others_do_at_the_same_time() {
    const ROUNDS: u32 = 60;
    const EACH: u32 = 2_000;
    let memory = Memory::new();
    let closed = FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
    let sweep = || {
        let table = memory.table();
        for entry in table.entries::<FLOW4_WORDS>() {
            if entry.state.has(closed) {
                let flow: Flow4 = zerocopy::transmute!(entry.key);
                let _changed = table.remove(&entry, flow.endpoint);
            }
        }
    };
    std::thread::scope(|scope| {
        let pods: Vec<_> = [1, 2]
            .map(|endpoint| {
                let memory = &memory;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        // Every second round uses the tuples of the one before it again.
                        let numbers = (round / 2 * EACH)..(round / 2 * EACH + EACH);
                        assert!(numbers.clone().all(|number| open(memory, endpoint, number)));
                        for number in numbers.clone() {
                            let found = find(memory, endpoint, number, FlowState::ANSWERED);
                            assert_eq!(found, Some(0), "round {round}, {number}");
                        }
                        for number in numbers {
                            assert!(find(memory, endpoint, number, FlowState::LOCAL_FIN).is_some());
                            assert!(find(memory, endpoint, number, FlowState::REMOTE_FIN).is_some());
                        }
                    }
                })
            })
            .into();
        while !pods.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            sweep();
        }
        for pod in pods {
            pod.join().unwrap();
        }
    });
    sweep();
    assert_eq!(entries(&memory).len(), 0);
    assert_eq!((memory.count(1), memory.count(2)), (0, 0));
}
