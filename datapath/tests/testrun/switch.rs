//! Two tables that agree on nothing, switched as fast as it goes while packets are judged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use thyra_datapath_abi::tables::{ClassInfo, EndpointTables, SourceAddress, Tables, Verdict};
use thyra_datapath_abi::{Action, Control, Mode, Reason, maps};
use thyra_datapath_engine::BankImage;

use crate::kernel::{CONTROL, Kernel};
use crate::{frame, in_a_namespace, world};

const FRIEND: &str = "10.244.1.10";
const FOE: &str = "10.244.1.66";
/// What may happen to each, by verdict id: in the one bank or in the other.
const FRIENDS: [u16; 2] = [2, 3];
const FOES: [u16; 2] = [1, 4];

fn verdict(action: Action) -> Verdict {
    Verdict {
        action,
        reason: if action == Action::Allow {
            Reason::PolicyAllow
        } else {
            Reason::PolicyDeny
        },
        rule: None,
        because: Vec::new(),
        residual: None,
        would: None,
    }
}

/// The friend is let in at port 8080 alone, or the foe at every port; no number means the same in both.
fn image(turned: bool) -> BankImage {
    let (friend, foe) = if turned { (2, 1) } else { (1, 2) };
    let address = |address: &str, class| SourceAddress {
        address: address.parse().unwrap(),
        class,
        local: 0,
    };
    let (class_column, rows) = if turned {
        // Column 2 is the foe's.
        (vec![1, 2, 0], vec![vec![0, 0, 1]])
    } else {
        (vec![0, 1, 2], vec![vec![0, 0, 0], vec![0, 1, 0]])
    };
    let (port_runs, set) = if turned {
        (vec![(0, 0)], vec![0])
    } else {
        (vec![(0, 0), (8080, 1), (8081, 0)], vec![0, 1])
    };
    let tables = Tables {
        classes: vec![ClassInfo::default(); 3].into(),
        class_column: class_column.into(),
        columns: 3,
        addresses: vec![address(FRIEND, friend), address(FOE, foe)].into(),
        blocks: Arc::default(),
        port_classes: u16::try_from(set.len()).unwrap(),
        port_runs: port_runs.into(),
        sets: vec![set].into(),
        rows: rows.into(),
        verdicts: vec![verdict(Action::Deny), verdict(Action::Allow)].into(),
        endpoints: vec![EndpointTables {
            endpoint: 1,
            set4: 0,
            set6: 0,
            mode: Mode::Enforce,
        }]
        .into(),
    };
    let first = if turned { 3 } else { 1 };
    BankImage::build(&tables, &|index| first + u16::try_from(index).unwrap()).unwrap()
}

/// Judges packets of `source` for a while; verdict ids that were met.
fn judge(kernel: &mut Kernel, source: &str, until: Instant) -> Vec<u16> {
    let bytes = frame::frame(&format!("{source}:40000 > 10.244.0.2:8080 S"));
    let mut met = Vec::new();
    while Instant::now() < until {
        for _ in 0..200 {
            kernel.run_at(maps::TO_POD, (2, 9), &bytes, 0);
        }
        // So many refusals are not all reported.
        let (ledger, _lost) = kernel.take_any_ledger();
        met.extend(ledger.verdicts.into_keys());
    }
    met.sort_unstable();
    met.dedup();
    met
}

/// Ends the switching, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_packet_is_judged_by_a_mix_of_two_banks() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        kernel.fill(&image(true), 1, Control::new(1, 0, 0));
        kernel.fill(&image(false), 0, Control::new(1, 0, 0));
        kernel.attach(&world::node(0));
        let state = kernel.state_again();
        let word = &state.shared()[CONTROL];
        let (over, switches) = (AtomicBool::new(false), AtomicU32::new(0));
        let time = Duration::from_secs(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for generation in 1.. {
                    word.store(Control::new(generation, generation & 1, 0).0, Ordering::SeqCst);
                    switches.fetch_add(1, Ordering::Relaxed);
                    // Some 20,000 a second, out of step with the packets.
                    std::thread::sleep(Duration::from_micros(1 + u64::from(generation % 7)));
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let ended = Over(&over);
            let friends = judge(&mut kernel, FRIEND, Instant::now() + time);
            let foes = judge(&mut kernel, FOE, Instant::now() + time);
            drop(ended);
            assert_eq!(
                (friends, foes),
                (FRIENDS.to_vec(), FOES.to_vec()),
                "both banks, and nothing else"
            );
        });
        let (switches, seconds) = (f64::from(switches.into_inner()), time.as_secs_f64() * 2.0);
        println!("{:.0} switches a second", switches / seconds);
        assert!(switches > 100.0);
    });
}
