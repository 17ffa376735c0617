//! Addresses that come, go and change hands without pause, while connections are made from them.
//!
//! Invariant: an attempt counts only where no commit began, ran or ended meanwhile; what it must come to then follows
//! from the number of the last commit alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use thyra_datapath::abi::Mode;
use thyra_datapath::abi::tables::{SourceAddress, Tables};

use crate::node::{Pod, connect, echoes, eventually, on_a_node, open};
use crate::policy::Policy;
use crate::{FRIEND, PORT, SERVER, STRANGER, families, pods};

/// Pods whose addresses change hands.
const MOVERS: [Pod; 2] = [Pod(5), Pod(6)];
/// Addresses of both families that do so beside them, with nobody behind.
const OTHERS: u16 = 4_000;
const ROUNDS: u64 = 60;
/// Packets of an open connection for each new one.
const ECHOES: u32 = 50;

/// Whose an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// It is in no table.
    Nobody,
    /// An identity that may connect.
    Allowed,
    /// One that may not.
    Denied,
}

/// Whose address number `number` is after commit `round`: as good as drawn, but the same for all who ask.
fn owner(round: u64, number: u16) -> Owner {
    let mixed = (round * 1_000 + u64::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    match (mixed >> 33) % 3 {
        0 => Owner::Nobody,
        1 => Owner::Allowed,
        _ => Owner::Denied,
    }
}

fn others() -> impl Iterator<Item = (u16, IpAddr)> {
    (0..OTHERS).map(|number| {
        let [high, low] = number.to_be_bytes();
        let address = if number % 2 == 0 {
            IpAddr::V4(Ipv4Addr::new(10, 9, high, low))
        } else {
            IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, number))
        };
        (1_000 + number, address)
    })
}

/// The tables of a round; classes, rows and verdicts are numbered the other way round every other time.
fn tables(server: u16, round: u64) -> Tables {
    // Not as two commits before, whose bank is written next: a packet that reads both gets what nobody may have.
    let turned = round / 2 % 2 == 1;
    let endpoints = [(SERVER, server)];
    let policy = Policy {
        endpoints: &endpoints,
        allowed: &[FRIEND],
        denied: &[STRANGER],
        mode: Mode::Enforce,
    };
    let mut tables = policy.tables(turned);
    let movers = MOVERS
        .iter()
        .flat_map(|pod| families(*pod).map(|address| (u16::from(pod.0), address)));
    let moved = movers.chain(others()).filter_map(|(number, address)| {
        let class = match (owner(round, number), turned) {
            (Owner::Nobody, _) => return None,
            (Owner::Allowed, false) | (Owner::Denied, true) => 1,
            (Owner::Allowed, true) | (Owner::Denied, false) => 2,
        };
        Some(SourceAddress {
            address,
            class,
            local: 0,
        })
    });
    let mut addresses: Vec<_> = tables.addresses.iter().cloned().chain(moved).collect();
    addresses.sort();
    tables.addresses = addresses.into();
    tables
}

/// What those who connect and the one who commits know of each other.
#[derive(Default)]
struct Storm {
    /// Twice the number of the last commit; one less while it runs.
    stage: AtomicU64,
    over: AtomicBool,
    wrong: Mutex<Vec<String>>,
}

impl Storm {
    fn stage(&self) -> u64 {
        self.stage.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
        self.over.store(true, Ordering::SeqCst);
    }

    /// Connects from an address that changes hands; `judged` is the last stage at which it was seen what becomes of it.
    fn move_about(&self, pod: Pod, to: IpAddr, judged: &AtomicU64) {
        let mut held: Option<TcpStream> = None;
        while !self.is_over() {
            let before = self.stage();
            if before % 2 == 1 || before == judged.load(Ordering::SeqCst) {
                std::thread::yield_now();
                continue;
            }
            let owner = owner(before / 2, u16::from(pod.0));
            let lives_on = held
                .take_if(|_| owner != Owner::Allowed)
                .is_some_and(|held| echoes(&held));
            let stream = connect(to, PORT).ok().filter(echoes);
            if self.stage() != before {
                continue;
            }
            let answered = stream.is_some();
            if answered != (owner == Owner::Allowed) || lives_on {
                self.wrong(format!(
                    "{pod:?} to {to} after commit {}: {owner:?}, answered: {answered}, an older connection lives on: \
                     {lives_on}",
                    before / 2
                ));
            }
            held = stream.or(held);
            judged.store(before, Ordering::SeqCst);
        }
    }

    /// Connects from an address that stays whose it is, at any time; a connection of old lives on through all of it.
    fn stay(&self, pod: Pod, to: IpAddr, allowed: bool) {
        let held = connect(to, PORT);
        while !self.is_over() {
            let stage = self.stage();
            let lives_on = || held.as_ref().is_ok_and(|held| (0..ECHOES).all(|_| echoes(held)));
            if connect(to, PORT).is_ok() != allowed || lives_on() != allowed {
                self.wrong(format!(
                    "{pod:?} to {to} at stage {stage}, always allowed: {allowed}"
                ));
            }
        }
    }
}

/// Ends the storm with its block, also when that panics: those who connect would go on otherwise.
struct End<'a>(&'a Storm);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

#[test]
fn an_address_that_moves_in_a_storm_never_keeps_the_identity_that_left() {
    const NAME: &str = "storm::an_address_that_moves_in_a_storm_never_keeps_the_identity_that_left";
    on_a_node(NAME, || {
        pods();
        for pod in MOVERS {
            pod.create();
        }
        let mut datapath = open();
        let server = datapath.reserve(&SERVER.uid()).unwrap();
        datapath.commit(&tables(server, 0), 1).unwrap();
        datapath.attach(&SERVER.spec()).unwrap();
        let storm = Storm::default();
        let judged: [AtomicU64; 4] = std::array::from_fn(|_| AtomicU64::new(1));
        std::thread::scope(|scope| {
            let storm = &storm;
            let _end = End(storm);
            let ways = MOVERS
                .iter()
                .flat_map(|pod| families(SERVER).map(|to| (*pod, to)));
            for ((pod, to), judged) in ways.zip(&judged) {
                scope.spawn(move || pod.inside(|| storm.move_about(pod, to, judged)));
            }
            for (pod, allowed) in [(FRIEND, true), (STRANGER, false)] {
                for to in families(SERVER) {
                    scope.spawn(move || pod.inside(|| storm.stay(pod, to, allowed)));
                }
            }
            for round in 1..=ROUNDS {
                let next = tables(server, round);
                storm.stage.store(2 * round - 1, Ordering::SeqCst);
                datapath.commit(&next, u32::try_from(round).unwrap() + 1).unwrap();
                storm.stage.store(2 * round, Ordering::SeqCst);
                eventually("every address was tried after the commit", || {
                    let all = judged
                        .iter()
                        .all(|judged| judged.load(Ordering::SeqCst) == 2 * round);
                    (all || storm.is_over()).then_some(())
                });
            }
        });
        assert_eq!(*storm.wrong.lock().unwrap(), Vec::<String>::new());
        let moves = (1..=ROUNDS).filter(|round| {
            let number = u16::from(MOVERS[0].0);
            owner(round - 1, number) == Owner::Allowed && owner(*round, number) != Owner::Allowed
        });
        assert!(moves.count() > 3, "an allowed identity left often enough");
    });
}
