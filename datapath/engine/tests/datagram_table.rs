//! What is remembered of datagrams: for how long, and who gives way to whom.

use std::sync::atomic::AtomicU64;

use thyra_datapath_abi::datagram::{
    DATAGRAM_SLOTS, DatagramBucket4, DatagramBucket6, INBOUND, KIND, NEEDED, SCTP, UDP,
};
use thyra_datapath_abi::limits::{DATAGRAM_BUCKETS, MAX_ENDPOINTS};
use thyra_datapath_abi::{Datagram4, Datagram6};
use thyra_datapath_engine::datagram_table::{Key, Touch, note, recall};
use thyra_datapath_engine::datagram_words::DatagramWords;

const SECOND: u64 = 1_000_000_000;
const SENT: Touch = Touch::Sent { needed: true };

struct Table(Vec<AtomicU64>);

impl Table {
    fn new() -> Self {
        let words = MAX_ENDPOINTS * DATAGRAM_BUCKETS * size_of::<DatagramBucket4>() / size_of::<u64>();
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn at(&self, second: u64) -> DatagramWords<'_> {
        DatagramWords {
            buckets: &self.0,
            now_ns: second * SECOND,
        }
    }
}

/// The keys of an endpoint that share a bucket.
fn together(endpoint: u16, count: usize) -> Vec<Key<1>> {
    let table = Table::new();
    let all = (0_u16..).map(|port| {
        let key = Datagram4 {
            remote: [203, 0, 113, 7],
            local_port: port.to_be_bytes(),
            remote_port: [0, 53],
        };
        Key::new(zerocopy::transmute!(key), endpoint, 0)
    });
    // Eight that are needed leave no room for one that is not, wherever they are together.
    let mut found: Vec<Key<1>> = Vec::new();
    let mut all = all.peekable();
    let first = *all.peek().unwrap();
    for _ in 0..DATAGRAM_SLOTS {
        assert!(note(&table.at(1), &first, UDP | NEEDED));
    }
    while found.len() < count {
        let key = all.next().unwrap();
        if !note(&table.at(1), &key, UDP | INBOUND) {
            found.push(key);
        }
    }
    found
}

fn known(table: &Table, second: u64, key: &Key<1>) -> bool {
    recall(&table.at(second), key, UDP, Touch::Nothing).is_some()
}

#[test]
fn an_entry_is_fresh_for_two_minutes_after_the_pod_has_sent() {
    let (table, key) = (Table::new(), together(1, 1)[0]);
    assert!(note(&table.at(1), &key, UDP | NEEDED));
    assert!(known(&table, 120, &key));
    assert!(!known(&table, 122, &key));
    assert!(recall(&table.at(100), &key, UDP, SENT).is_some());
    assert!(known(&table, 219, &key));
    // What others send keeps nothing that the pod began.
    assert!(recall(&table.at(219), &key, UDP, Touch::Received).is_some());
    assert!(!known(&table, 222, &key));
}

#[test]
fn what_the_other_side_began_is_kept_by_both() {
    let (table, key) = (Table::new(), together(1, 1)[0]);
    assert!(note(&table.at(1), &key, UDP | INBOUND));
    let flags = recall(&table.at(100), &key, UDP, Touch::Received);
    assert_eq!(flags, Some(UDP | INBOUND));
    assert!(known(&table, 200, &key));
    // It never becomes what the pod began.
    assert_eq!(recall(&table.at(200), &key, UDP, SENT), Some(UDP | INBOUND));
    assert_eq!(recall(&table.at(300), &key, UDP, SENT), Some(UDP | INBOUND));
}

#[test]
fn another_protocol_is_another_talk() {
    let (table, key) = (Table::new(), together(1, 1)[0]);
    assert!(note(&table.at(1), &key, UDP | NEEDED));
    assert_eq!(recall(&table.at(1), &key, SCTP, SENT), None);
    assert_eq!(
        recall(&table.at(1), &key, UDP, SENT).map(|flags| flags & KIND),
        Some(UDP)
    );
}

#[test]
fn what_others_send_pushes_out_nothing_that_the_pod_waits_for() {
    let (table, keys) = (Table::new(), together(1, 3 * DATAGRAM_SLOTS));
    let (own, others) = keys.split_at(DATAGRAM_SLOTS - 1);
    for key in own {
        assert!(note(&table.at(1), key, UDP | NEEDED));
    }
    for (second, key) in (2..).zip(others) {
        assert!(
            note(&table.at(second), key, UDP | INBOUND),
            "in the one place that is left"
        );
    }
    assert!(own.iter().all(|key| known(&table, 60, key)));
    assert!(known(&table, 60, others.last().unwrap()));
    assert!(!known(&table, 60, &others[0]));
    // The control: not waited for, they give way.
    let table = Table::new();
    for key in own {
        assert!(note(&table.at(1), key, UDP));
    }
    for (second, key) in (2..).zip(others) {
        assert!(note(&table.at(second), key, UDP | INBOUND));
    }
    assert!(!own.iter().any(|key| known(&table, 60, key)));
}

#[test]
fn of_what_the_pod_waits_for_the_longest_unused_gives_way() {
    let (table, keys) = (Table::new(), together(1, DATAGRAM_SLOTS + 1));
    for (second, key) in (1..).zip(&keys[..DATAGRAM_SLOTS]) {
        assert!(note(&table.at(second), key, UDP | NEEDED));
    }
    assert!(recall(&table.at(20), &keys[0], UDP, SENT).is_some());
    assert!(note(&table.at(21), &keys[DATAGRAM_SLOTS], UDP | NEEDED));
    assert!(!known(&table, 21, &keys[1]), "the second was the oldest by then");
    for at in [0, 2, 3, 4, 5, 6, 7, 8] {
        assert!(known(&table, 21, &keys[at]), "{at}");
    }
}

#[test]
fn what_is_no_longer_fresh_gives_way_to_anything() {
    let (table, keys) = (Table::new(), together(1, DATAGRAM_SLOTS + 1));
    for key in &keys[..DATAGRAM_SLOTS] {
        assert!(note(&table.at(1), key, UDP | NEEDED));
    }
    assert!(!note(&table.at(100), &keys[DATAGRAM_SLOTS], UDP | INBOUND));
    assert!(note(&table.at(200), &keys[DATAGRAM_SLOTS], UDP | INBOUND));
}

#[test]
fn no_endpoint_pushes_out_what_another_has() {
    let table = Table::new();
    let key = together(2, 1)[0];
    assert!(note(&table.at(1), &key, UDP));
    for flood in together(1, 500) {
        let _ = note(&table.at(2), &flood, UDP | NEEDED);
    }
    assert!(known(&table, 2, &key));
    assert_eq!(table.at(2).entries::<1>(2).count(), 1);
    table.at(2).copy(2, 3);
    table.at(2).clear(2);
    assert_eq!(table.at(2).entries::<1>(2).count(), 0);
    assert_eq!(
        table.at(2).entries::<1>(3).count(),
        1,
        "what was given to another id"
    );
}

/// A key all of whose words say the same.
fn uniform(number: u16) -> Datagram6 {
    let [a, b] = number.to_be_bytes();
    Datagram6 {
        remote: [a, b, a, b, a, b, a, b, a, b, a, b, a, b, a, b],
        local_port: [a, b],
        remote_port: [a, b],
        detail: [a, b, a, b],
    }
}

#[test]
fn racing_writers_leave_no_tuple_that_nobody_wrote() {
    let words = MAX_ENDPOINTS * DATAGRAM_BUCKETS * size_of::<DatagramBucket6>() / size_of::<u64>();
    let table = Table((0..words).map(|_| AtomicU64::new(0)).collect());
    std::thread::scope(|scope| {
        for part in 0..4_u16 {
            let table = &table;
            scope.spawn(move || {
                for number in (0..40_000).filter(|number| number % 4 == part) {
                    let key = Key::<3>::new(zerocopy::transmute!(uniform(number)), 1, 0);
                    let _ = note(&table.at(1), &key, UDP | NEEDED);
                }
            });
        }
    });
    let mut found = 0;
    for (key, _) in table.at(1).entries::<3>(1) {
        let [first, second, third] = key;
        assert!(first == second && second == third, "{key:x?}");
        found += 1;
    }
    assert_eq!(found, DATAGRAM_BUCKETS * DATAGRAM_SLOTS);
}
