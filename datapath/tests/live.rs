//! The datapath at work: real interfaces, real connections, real restarts. Needs root.
//!
//! Every test that says that nothing gets through also shows that it does when the guard is off.

#[path = "live/clsact.rs"]
mod clsact;
#[path = "live/direct.rs"]
mod direct;
#[path = "live/flow_log.rs"]
mod flow_log;
#[path = "live/frames.rs"]
mod frames;
#[path = "live/inside.rs"]
mod inside;
#[path = "live/node.rs"]
mod node;
#[path = "live/non_tcp.rs"]
mod non_tcp;
#[path = "live/packet.rs"]
mod packet;
#[path = "live/policy.rs"]
mod policy;
#[path = "live/prober.rs"]
mod prober;
#[path = "live/steered.rs"]
mod steered;
#[path = "live/storm.rs"]
mod storm;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use node::{
    Fate, Pod, announce, await_announcement, chain, config, echoes, eventually, hook, judges_at_host_end,
    on_a_node, open, ready, run, runtime, start_step, step,
};
use policy::{Policy, allow, deny};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use thyra_datapath::abi::tables::{SourceAddress, SourceBlock, Tables};
use thyra_datapath::abi::{Action, Event, EventKind, Mode};
use thyra_datapath::{
    AttachError, CommitError, Config, Datapath, DatapathStatus, EndpointSpec, Hook, OpenError, Order, Origin,
    Place,
};

const FRIEND: Pod = Pod(2);
const STRANGER: Pod = Pod(3);
const SERVER: Pod = Pod(4);
const PORT: u16 = 8080;

/// A friend, a stranger, and a server that only the friend may reach.
fn pods() -> [Pod; 3] {
    [FRIEND.create(), STRANGER.create(), SERVER.create().serve(PORT)]
}

fn tables(datapath: &mut Datapath, mode: Mode, turned: bool) -> Tables {
    let id = datapath.reserve(&SERVER.uid()).unwrap();
    let endpoints = [(SERVER, id)];
    Policy {
        endpoints: &endpoints,
        allowed: &[FRIEND],
        denied: &[STRANGER],
        mode,
    }
    .tables(turned)
}

/// The same with the friend under policy, too.
fn tables_of_both(datapath: &mut Datapath) -> Tables {
    let endpoints = [FRIEND, SERVER].map(|pod| (pod, datapath.reserve(&pod.uid()).unwrap()));
    Policy {
        endpoints: &endpoints,
        allowed: &[FRIEND],
        denied: &[STRANGER],
        mode: Mode::Enforce,
    }
    .tables(false)
}

/// Puts the policy in force as generation 1 and attaches the server.
fn enforce(datapath: &mut Datapath) -> u16 {
    let tables = tables(datapath, Mode::Enforce, false);
    datapath.commit(&tables, 1).unwrap();
    datapath
        .attach(&SERVER.spec())
        .unwrap_or_else(|e| panic!("{}", chain(&e)))
}

fn families(pod: Pod) -> [IpAddr; 2] {
    [pod.v4(), pod.v6()]
}

fn only_the_friend_gets_in() {
    for address in families(SERVER) {
        assert_eq!(
            FRIEND.try_connect(address, PORT),
            Fate::Answered,
            "friend to {address}"
        );
        assert_eq!(
            STRANGER.try_connect(address, PORT),
            Fate::Refused,
            "stranger to {address}"
        );
    }
}

fn everybody_gets_in() {
    for address in families(SERVER) {
        assert_eq!(
            FRIEND.try_connect(address, PORT),
            Fate::Answered,
            "friend to {address}"
        );
        assert_eq!(
            STRANGER.try_connect(address, PORT),
            Fate::Answered,
            "stranger to {address}"
        );
    }
}

fn problems(status: &DatapathStatus) -> Vec<&String> {
    status
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.problems)
        .collect()
}

#[test]
fn an_allowed_pod_gets_in_and_another_is_reset_at_once() {
    on_a_node("an_allowed_pod_gets_in_and_another_is_reset_at_once", || {
        pods();
        everybody_gets_in();
        let mut datapath = open();
        assert_eq!(datapath.status().origin, Origin::Loaded);
        let id = enforce(&mut datapath);
        only_the_friend_gets_in();
        let begun = Instant::now();
        assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Refused);
        let answered = begun.elapsed();
        assert!(
            answered < Duration::from_secs(1),
            "the first SYN is answered, not the next: {answered:?}"
        );

        let view = datapath.read_back().unwrap();
        let sight = |pod: Pod| view.evaluate(id, pod.v4(), PORT).unwrap();
        assert_eq!(sight(FRIEND).action, Action::Allow);
        assert_eq!(datapath.verdict(sight(FRIEND).verdict), Some(&allow("allow")));
        let denied = sight(STRANGER).verdict;
        assert_eq!(datapath.verdict(denied), Some(&deny("deny")));
        assert_eq!(datapath.counters().verdicts[&denied].connections, 3);
        let status = datapath.status();
        assert_eq!(problems(&status), Vec::<&String>::new());
        assert_eq!(status.endpoints[0].mode, Some(Mode::Enforce));

        datapath.detach(id).unwrap();
        datapath.detach(id).unwrap();
        everybody_gets_in();
    });
}

#[test]
fn what_a_pod_opened_before_it_was_attached_lives_on() {
    on_a_node("what_a_pod_opened_before_it_was_attached_lives_on", || {
        pods();
        STRANGER.serve(PORT);
        let opened = families(STRANGER).map(|address| SERVER.connect(address, PORT).unwrap());
        let accepted = families(SERVER).map(|address| STRANGER.connect(address, PORT).unwrap());
        let mut datapath = open();
        let id = enforce(&mut datapath);
        assert!(opened.iter().all(echoes), "its own connections");
        assert!(!accepted.iter().any(echoes), "those that policy refuses");
        only_the_friend_gets_in();

        datapath.detach(id).unwrap();
        let tables = tables(&mut datapath, Mode::Enforce, false);
        datapath.commit(&tables, 2).unwrap();
        if node::place() == Place::Pod {
            return;
        }
        // The control: without the pod's namespace nobody knows who opened them.
        let unknown = EndpointSpec {
            netns: None,
            ..SERVER.spec()
        };
        datapath.attach(&unknown).unwrap();
        assert!(!opened.iter().any(echoes));
    });
}

#[test]
fn a_pod_that_is_held_back_opens_nothing_until_it_is_released() {
    on_a_node(
        "a_pod_that_is_held_back_opens_nothing_until_it_is_released",
        || {
            pods();
            let mut datapath = open();
            enforce(&mut datapath);
            let tables = tables_of_both(&mut datapath);
            datapath.commit(&tables, 2).unwrap();
            let spec = EndpointSpec {
                held_back: true,
                ..FRIEND.spec()
            };
            let id = datapath.attach(&spec).unwrap();
            let fates = families(SERVER).map(|address| FRIEND.try_connect(address, PORT));
            assert_eq!(fates, [Fate::Silent; 2]);
            // The SYN that was held back comes again by itself.
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| FRIEND.try_connect(SERVER.v4(), PORT));
                std::thread::sleep(Duration::from_millis(100));
                datapath.release(id);
                assert_eq!(waiting.join().unwrap(), Fate::Answered);
            });
            only_the_friend_gets_in();
        },
    );
}

#[test]
fn an_endpoint_that_no_commit_has_placed_gets_nothing() {
    on_a_node("an_endpoint_that_no_commit_has_placed_gets_nothing", || {
        pods();
        let mut datapath = open();
        datapath.attach(&SERVER.spec()).unwrap();
        assert_ne!(FRIEND.try_connect(SERVER.v4(), PORT), Fate::Answered);
        assert_eq!(datapath.status().endpoints[0].mode, None);
        let tables = tables(&mut datapath, Mode::Enforce, false);
        datapath.commit(&tables, 1).unwrap();
        only_the_friend_gets_in();
    });
}

#[test]
fn a_killed_process_leaves_enforcement_on_and_the_next_picks_it_up() {
    const NAME: &str = "a_killed_process_leaves_enforcement_on_and_the_next_picks_it_up";
    on_a_node(NAME, || {
        if step().is_some() {
            let mut datapath = open();
            enforce(&mut datapath);
            ready();
        }
        pods();
        let mut holder = start_step(NAME, "hold");
        let refused = Datapath::open(config()).unwrap_err();
        assert!(
            refused.to_string().contains("in use by another agent"),
            "{refused}"
        );
        let connection = FRIEND.connect(SERVER.v4(), PORT).unwrap();
        assert!(echoes(&connection));
        holder.kill().unwrap();
        holder.wait().unwrap();

        only_the_friend_gets_in();
        let datapath = open();
        let status = datapath.status();
        assert_eq!(
            (status.origin, status.generation, status.replaced),
            (Origin::PickedUp, 1, 0)
        );
        assert_eq!(problems(&status), Vec::<&String>::new());
        assert_eq!(status.endpoints[0].uid.as_deref(), Some("uid-4"));
        only_the_friend_gets_in();
        assert!(echoes(&connection));
        let view = datapath.read_back().unwrap();
        let verdict = view
            .evaluate(status.endpoints[0].id, STRANGER.v6(), PORT)
            .unwrap()
            .verdict;
        assert_eq!(datapath.verdict(verdict), Some(&deny("deny")));
    });
}

#[test]
fn killed_at_any_moment_of_a_commit_it_leaves_one_state_or_the_other() {
    const NAME: &str = "killed_at_any_moment_of_a_commit_it_leaves_one_state_or_the_other";
    on_a_node(NAME, || {
        if step().is_some() {
            let mut datapath = open();
            let start = datapath.generation();
            let states = [true, false].map(|turned| tables(&mut datapath, Mode::Enforce, turned));
            datapath.attach(&SERVER.spec()).unwrap();
            announce();
            for (generation, tables) in (start + 1..).zip(states.iter().cycle()) {
                let mut tables = tables.clone();
                let denied = usize::from(tables.verdicts[0].action == Action::Allow);
                Arc::make_mut(&mut tables.verdicts)[denied] = deny(&format!("deny {generation}"));
                datapath.commit(&tables, generation).unwrap();
                announce();
            }
        }
        pods();
        enforce(&mut open());
        let mut reached = 1;
        let mut commit = Duration::from_millis(3);
        for death in 0..12 {
            let mut committer = start_step(NAME, "commit");
            let whole = death % 3;
            let begun = Instant::now();
            for _ in 0..whole {
                await_announcement(&mut committer);
            }
            commit = begun.elapsed().checked_div(whole).unwrap_or(commit);
            std::thread::sleep(commit * (death / 3) / 4);
            committer.kill().unwrap();
            committer.wait().unwrap();
            only_the_friend_gets_in();
            let datapath = open();
            let generation = datapath.generation();
            assert!(generation >= reached, "{generation} after {reached}");
            reached = generation;
            let id = datapath.reservations()["uid-4"];
            let refused = datapath
                .read_back()
                .unwrap()
                .evaluate(id, STRANGER.v4(), PORT)
                .unwrap();
            assert!(
                datapath.verdict(refused.verdict).is_some(),
                "its name was written before"
            );
        }
        assert!(reached > 12, "four times one and two whole commits: {reached}");
    });
}

#[test]
fn killed_at_any_moment_of_an_attachment_it_leaves_nothing_half() {
    const NAME: &str = "killed_at_any_moment_of_an_attachment_it_leaves_nothing_half";
    on_a_node(NAME, || {
        if step().is_some() {
            let mut datapath = open();
            announce();
            loop {
                let id = enforce(&mut datapath);
                datapath.detach(id).unwrap();
            }
        }
        pods();
        for pause in 0..12 {
            let mut attacher = start_step(NAME, "attach");
            std::thread::sleep(Duration::from_millis(3 + 5 * pause));
            attacher.kill().unwrap();
            attacher.wait().unwrap();
            let mut datapath = open();
            enforce(&mut datapath);
            assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
            assert_eq!((datapath.status().endpoints.len(), links()), (1, 2));
            only_the_friend_gets_in();
        }
    });
}

#[test]
fn programs_are_replaced_under_traffic_without_a_gap() {
    on_a_node("programs_are_replaced_under_traffic_without_a_gap", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        drop(datapath);
        let connection = FRIEND.connect(SERVER.v6(), PORT).unwrap();
        let tries = flood(|| {
            for _ in 0..5 {
                // As if another build had pinned them.
                run("rm /run/bpf/thyra/*/program-*");
                assert_eq!(open().status().replaced, 2);
            }
        });
        assert!(tries > 10, "{tries}");
        assert!(echoes(&connection));
    });
}

#[test]
fn the_other_hook_takes_over_without_a_gap() {
    if Hook::newest() != Hook::Tcx {
        eprintln!("SKIPPED `the_other_hook_takes_over_without_a_gap`: this kernel has one hook");
        return;
    }
    on_a_node("the_other_hook_takes_over_without_a_gap", || {
        pods();
        let with = |hook| {
            let config = Config {
                hook: Some(hook),
                place: Place::Host,
                ..config()
            };
            Datapath::open(config).unwrap_or_else(|e| panic!("{}", chain(&e)))
        };
        enforce(&mut with(Hook::Tcx));
        let connection = FRIEND.connect(SERVER.v4(), PORT).unwrap();
        let tries = flood(|| {
            for hook in [Hook::Clsact, Hook::Tcx, Hook::Clsact] {
                let mut datapath = with(hook);
                datapath.attach(&SERVER.spec()).unwrap();
                assert_eq!((problems(&datapath.status()).len(), links()), (0, 2));
            }
        });
        assert!(tries > 10, "{tries}");
        assert!(echoes(&connection));
    });
}

/// Friend and stranger connect without pause, each as it should be judged, while `body` runs; returns the
/// number of attempts.
fn flood(body: impl FnOnce()) -> u32 {
    let (over, tries) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for (pod, fate) in [(FRIEND, Fate::Answered), (STRANGER, Fate::Refused)] {
            let (over, tries) = (&over, &tries);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    for address in families(SERVER) {
                        assert_eq!(pod.try_connect(address, PORT), fate, "{pod:?} to {address}");
                        tries.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        over.store(true, Ordering::Relaxed);
        body.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    tries.into_inner()
}

#[test]
fn no_packet_sees_a_mix_of_two_commits() {
    on_a_node("no_packet_sees_a_mix_of_two_commits", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        let straight = tables(&mut datapath, Mode::Enforce, false);
        let turned = tables(&mut datapath, Mode::Enforce, true);
        let tries = flood(|| {
            for generation in 2..120 {
                let tables = if generation % 2 == 0 { &turned } else { &straight };
                datapath.commit(tables, generation).unwrap();
                assert_eq!(datapath.generation(), generation);
            }
        });
        assert!(tries > 10, "{tries}");
        // The control: a mix of the two does change verdicts.
        let mixed = Tables {
            class_column: straight.class_column,
            rows: turned.rows.clone(),
            ..straight
        };
        datapath.commit(&mixed, 200).unwrap();
        assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Answered);
    });
}

#[test]
fn the_same_tables_again_cost_no_write_and_no_wait() {
    on_a_node("the_same_tables_again_cost_no_write_and_no_wait", || {
        let mut datapath = open();
        let tables = tables(&mut datapath, Mode::Enforce, false);
        let first = datapath.commit(&tables, 1).unwrap();
        let second = datapath.commit(&tables, 2).unwrap();
        assert_eq!((second.words_written, second.waited), (0, Duration::ZERO));
        assert_eq!(
            (datapath.generation(), &second.verdict_ids),
            (2, &first.verdict_ids)
        );
        assert!(matches!(
            datapath.commit(&tables, 0),
            Err(CommitError::NoGeneration)
        ));
    });
}

#[test]
fn a_commit_that_fails_changes_no_verdict() {
    on_a_node("a_commit_that_fails_changes_no_verdict", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        let good = tables(&mut datapath, Mode::Enforce, false);
        let mut wide = good.clone();
        wide.rows = vec![vec![0; 3]; 5_000].into();
        let refused = datapath.commit(&wide, 2).unwrap_err();
        assert!(refused.to_string().contains("ROWS"), "{refused}");
        let mut renamed = good.clone();
        Arc::make_mut(&mut renamed.verdicts)[0] = deny("another");
        run("ln -s /dev/full /run/state/verdicts.new");
        let refused = datapath.commit(&renamed, 2).unwrap_err();
        assert!(chain(&refused).contains("verdicts.json"), "{}", chain(&refused));
        assert_eq!(datapath.generation(), 1);
        only_the_friend_gets_in();
        datapath.commit(&renamed, 2).unwrap();
        assert_eq!(datapath.generation(), 2);
    });
}

#[test]
fn an_allowed_packet_goes_on_to_foreign_programs() {
    if !judges_at_host_end("an_allowed_packet_goes_on_to_foreign_programs") {
        return;
    }
    on_a_node("an_allowed_packet_goes_on_to_foreign_programs", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        only_the_friend_gets_in();
        run("tc qdisc add dev veth4 clsact 2> /dev/null || true
             tc filter add dev veth4 egress pref 100 protocol all bpf da bytecode '1,6 0 0 2'");
        assert_eq!(
            FRIEND.try_connect(SERVER.v4(), PORT),
            Fate::Silent,
            "the foreign filter drops"
        );
        assert_eq!(
            STRANGER.try_connect(SERVER.v4(), PORT),
            Fate::Refused,
            "ours is asked first"
        );
        run("tc filter del dev veth4 egress pref 100");
        only_the_friend_gets_in();
        assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
    });
}

#[test]
fn packets_that_reach_a_pod_past_the_programs_are_noticed() {
    if !judges_at_host_end("packets_that_reach_a_pod_past_the_programs_are_noticed") {
        return;
    }
    on_a_node("packets_that_reach_a_pod_past_the_programs_are_noticed", || {
        pods();
        let mut datapath = open();
        let id = enforce(&mut datapath);
        assert_eq!(datapath.check_coverage(), [], "the first look");
        only_the_friend_gets_in();
        node::send_frames(&SERVER.interface(), 50, false);
        assert_eq!(datapath.check_coverage(), [], "all of that met the programs");
        node::send_frames(&SERVER.interface(), 50, true);
        assert_eq!(datapath.check_coverage(), [(id, 50)]);
        let status = datapath.status();
        let said = problems(&status);
        assert!(said[0].contains("NOT ENFORCED: 50 packets"), "{said:?}");
        only_the_friend_gets_in();
        assert_eq!(datapath.check_coverage(), []);
        assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
    });
}

/// Another program at the server's interface that comes before ours, until it is dropped.
enum Foreign {
    Link { _until_dropped: Box<aya::Ebpf> },
    Filter,
}

impl Foreign {
    fn before_ours() -> Self {
        if hook() == Hook::Clsact {
            // A later filter of the same priority comes first.
            run(
                "tc filter add dev veth4 egress pref 1 handle 0x1 protocol all bpf da bytecode '1,6 0 0 4294967295'",
            );
            return Self::Filter;
        }
        let mut foreign = aya::Ebpf::load(thyra_datapath::object()).unwrap();
        let program = foreign.program_mut("to_pod").unwrap();
        let program = <&mut SchedClassifier>::try_from(program).unwrap();
        program.load().unwrap();
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        program
            .attach_with_options("veth4", TcAttachType::Egress, first)
            .unwrap();
        Self::Link {
            _until_dropped: Box::new(foreign),
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // A link goes with its program.
        if let Self::Filter = self {
            run("tc filter del dev veth4 egress pref 1 handle 0x1 bpf");
        }
    }
}

#[test]
fn a_program_before_ours_is_noticed() {
    on_a_node("a_program_before_ours_is_noticed", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        let foreign = Foreign::before_ours();
        let status = datapath.status();
        assert_eq!(problems(&status).len(), 1);
        assert!(
            problems(&status)[0].contains(match node::place() {
                Place::Host => "before `to_pod`",
                Place::Pod => "before `origin`",
            }),
            "{:?}",
            problems(&status)
        );
        drop(foreign);
        assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
    });
}

#[test]
fn last_in_order_it_judges_what_others_let_through() {
    if hook() != Hook::Tcx {
        eprintln!("SKIPPED `last_in_order_it_judges_what_others_let_through`: filters come first always");
        return;
    }
    on_a_node("last_in_order_it_judges_what_others_let_through", || {
        pods();
        let mut foreign = aya::Ebpf::load(thyra_datapath::object()).unwrap();
        let program = foreign.program_mut("empty").unwrap();
        let program = <&mut SchedClassifier>::try_from(program).unwrap();
        program.load().unwrap();
        program.attach("veth4", TcAttachType::Egress).unwrap();
        let id = program.info().unwrap().id();
        let last = Config {
            order: Order::Last,
            place: Place::Host,
            ..config()
        };
        let mut datapath = Datapath::open(last).unwrap_or_else(|e| panic!("{}", chain(&e)));
        enforce(&mut datapath);
        let (_, order) = SchedClassifier::query_tcx("veth4", TcAttachType::Egress).unwrap();
        assert_eq!((order.len(), order[0].id()), (2, id));
        assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
        only_the_friend_gets_in();
    });
}

#[test]
fn the_longest_block_decides_in_either_bank() {
    on_a_node("the_longest_block_decides_in_either_bank", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        let mut tables = tables(&mut datapath, Mode::Enforce, false);
        tables.addresses = Arc::default();
        let block = |network: &str, prefix, class| SourceBlock {
            network: network.parse().unwrap(),
            prefix,
            class,
        };
        for (generation, friend, stranger) in [(2, 1, 2), (3, 2, 1), (4, 1, 2)] {
            tables.blocks = vec![
                block("10.244.0.0", 16, stranger),
                block("10.244.0.2", 32, friend),
                block("fd00:10:244::", 64, stranger),
                block("fd00:10:244::2", 128, friend),
            ]
            .into();
            datapath.commit(&tables, generation).unwrap();
            let fate = |class| if class == 1 { Fate::Answered } else { Fate::Refused };
            for address in families(SERVER) {
                assert_eq!(
                    FRIEND.try_connect(address, PORT),
                    fate(friend),
                    "friend, {generation}"
                );
                assert_eq!(
                    STRANGER.try_connect(address, PORT),
                    fate(stranger),
                    "stranger, {generation}"
                );
            }
            let fill = datapath.status().fill;
            assert!(fill.iter().any(|fill| fill.table == "blocks4" && fill.used == 2));
        }
    });
}

#[test]
fn what_is_read_back_is_what_was_committed() {
    on_a_node("what_is_read_back_is_what_was_committed", || {
        let mut datapath = open();
        let mut tables = tables(&mut datapath, Mode::Audit, false);
        let id = tables.endpoints[0].endpoint;
        tables.addresses = (0..3_000_u32)
            .flat_map(|n| {
                [
                    IpAddr::from(0x0a00_0001_u32.wrapping_add(n * 7).to_be_bytes()),
                    wide(n),
                ]
            })
            .zip((0..3_u32).cycle())
            .map(|(address, class)| SourceAddress {
                address,
                class,
                local: 0,
            })
            .collect::<Vec<_>>()
            .into();
        Arc::make_mut(&mut tables.addresses).sort();
        for generation in 1..4 {
            Arc::make_mut(&mut tables.rows)[0].rotate_left(1);
            datapath.commit(&tables, generation).unwrap();
            let view = datapath.read_back().unwrap();
            let unknown = [IpAddr::from([9, 9, 9, 9]), wide(1_000_000)];
            for address in tables.addresses.iter().map(|a| a.address).chain(unknown) {
                let seen = view.evaluate(id, address, PORT).unwrap();
                let wanted = tables.verdict(0, PORT, tables.class_of(address));
                assert_eq!(datapath.verdict(seen.verdict), wanted, "{address}");
                assert_eq!(
                    (u32::from(seen.class), seen.mode),
                    (tables.class_of(address), Mode::Audit)
                );
            }
            assert!(view.evaluate(id + 1, FRIEND.v4(), PORT).is_none());
        }
        let used = |table: &str, status: &DatapathStatus| {
            status.fill.iter().find(|fill| fill.table == table).unwrap().used
        };
        let status = datapath.status();
        assert_eq!(used("addresses", &status), 6_000);
        let counts = ["classes", "columns", "rows", "sets", "port classes", "verdicts"];
        assert_eq!(counts.map(|table| used(table, &status)), [3, 3, 1, 1, 1, 2]);
    });
}

fn wide(n: u32) -> IpAddr {
    IpAddr::V6(((0xfd00_u128 << 112) | u128::from(n) << 32 | u128::from(n ^ 5)).into())
}

#[test]
fn an_interface_that_vanishes_leaves_nothing_behind() {
    if !judges_at_host_end("an_interface_that_vanishes_leaves_nothing_behind") {
        return;
    }
    on_a_node("an_interface_that_vanishes_leaves_nothing_behind", || {
        let mut datapath = open();
        assert!(matches!(
            datapath.attach(&SERVER.spec()),
            Err(AttachError::InterfaceGone(_))
        ));
        let tables = tables(&mut datapath, Mode::Enforce, false);
        datapath.commit(&tables, 1).unwrap();
        for _ in 0..30 {
            run("ip link add veth4 type veth peer name peer4");
            std::thread::scope(|scope| {
                scope.spawn(|| run("ip link del veth4"));
                match datapath.attach(&SERVER.spec()) {
                    Ok(_) | Err(AttachError::InterfaceGone(_)) => {}
                    Err(e) => panic!("{}", chain(&e)),
                }
            });
        }
        let id = datapath.reserve(&SERVER.uid()).unwrap();
        datapath.detach(id).unwrap();
        assert_eq!(datapath.status().endpoints, []);
        assert_eq!(links(), 0);
    });
}

/// Pinned links and filters.
fn links() -> usize {
    let layouts = std::fs::read_dir("/run/bpf/thyra").unwrap();
    let pins = layouts.flat_map(|layout| std::fs::read_dir(layout.unwrap().path()).unwrap());
    pins.filter(|pin| {
        let name = pin.as_ref().unwrap().file_name();
        let name = name.to_string_lossy();
        name.starts_with("link-") || name.starts_with("filter-")
    })
    .count()
}

#[test]
fn a_restart_clears_an_endpoint_whose_interface_is_gone() {
    on_a_node("a_restart_clears_an_endpoint_whose_interface_is_gone", || {
        pods();
        let mut datapath = open();
        let id = enforce(&mut datapath);
        assert_eq!(links(), 2);
        drop(datapath);
        run("ip link del veth4");
        let mut datapath = open();
        let status = datapath.status();
        assert!(status.notes[0].contains("uid-4"), "{:?}", status.notes);
        assert_eq!((status.endpoints.len(), links()), (0, 0));
        assert_eq!(datapath.reservations()["uid-4"], id);
        datapath.detach(id).unwrap();
        assert!(datapath.reservations().is_empty());
    });
}

#[test]
fn endpoints_of_another_layout_stay_enforced_until_they_move() {
    on_a_node(
        "endpoints_of_another_layout_stay_enforced_until_they_move",
        || {
            pods();
            let mut datapath = open();
            enforce(&mut datapath);
            drop(datapath);
            // As if a build with other limits had made them.
            run("mv /run/bpf/thyra/* /run/bpf/thyra/0123456789abcdef");
            let mut datapath = open();
            let status = datapath.status();
            assert_eq!((status.origin, status.older_endpoints), (Origin::Loaded, 1));
            only_the_friend_gets_in();
            let tries = flood(|| {
                enforce(&mut datapath);
            });
            assert!(tries > 0);
            assert_eq!((datapath.status().older_endpoints, links()), (0, 2));
            only_the_friend_gets_in();
        },
    );
}

#[test]
fn with_a_damaged_state_folder_enforcement_goes_on_without_names() {
    on_a_node(
        "with_a_damaged_state_folder_enforcement_goes_on_without_names",
        || {
            pods();
            FRIEND.serve(PORT);
            let mut datapath = open();
            let id = enforce(&mut datapath);
            drop(datapath);
            run("echo broken > /run/state/ids.json; echo broken > /run/state/verdicts.json");
            let mut datapath = open();
            assert_eq!(datapath.status().notes.len(), 2);
            only_the_friend_gets_in();
            let verdict = datapath
                .read_back()
                .unwrap()
                .evaluate(id, FRIEND.v4(), PORT)
                .unwrap()
                .verdict;
            assert_eq!(datapath.verdict(verdict), None);
            let new = datapath.reserve(&SERVER.uid()).unwrap();
            assert_ne!(new, id, "the id of an endpoint without a name is taken");
            let own = SERVER.connect(FRIEND.v4(), PORT).unwrap();
            let tables = tables(&mut datapath, Mode::Enforce, false);
            let report = datapath.commit(&tables, 2).unwrap();
            assert!(
                !report.verdict_ids.contains(&verdict),
                "ids in the live bank are taken"
            );
            assert_eq!(datapath.attach(&SERVER.spec()).unwrap(), new);
            only_the_friend_gets_in();
            assert!(
                echoes(&own),
                "a connection that the pod made before is remembered"
            );
            assert_eq!(links(), 2);
        },
    );
}

#[test]
fn a_missing_pinned_map_is_named_and_nothing_is_touched() {
    on_a_node("a_missing_pinned_map_is_named_and_nothing_is_touched", || {
        pods();
        let mut datapath = open();
        enforce(&mut datapath);
        drop(datapath);
        run("rm /run/bpf/thyra/*/BANKS");
        let refused = Datapath::open(config()).unwrap_err();
        assert!(
            matches!(&refused, OpenError::Incomplete { missing } if missing.ends_with("BANKS")),
            "{refused}"
        );
        only_the_friend_gets_in();
        Datapath::cleanup(&config().bpffs).unwrap();
        everybody_gets_in();
        assert!(!config().bpffs.exists());
        assert_eq!(open().status().origin, Origin::Loaded);
    });
}

#[test]
fn a_folder_that_is_no_bpffs_is_refused() {
    on_a_node("a_folder_that_is_no_bpffs_is_refused", || {
        let bpffs = "/run/elsewhere/thyra".into();
        let refused = Datapath::open(thyra_datapath::Config { bpffs, ..config() }).unwrap_err();
        assert!(refused.to_string().contains("mount -t bpf bpf"), "{refused}");
        assert!(!std::path::Path::new("/run/elsewhere").exists());
    });
}

#[test]
fn without_privileges_it_says_what_is_missing() {
    on_a_node("without_privileges_it_says_what_is_missing", || {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        };
        set_capabilities(None, sets).unwrap();
        let refused = Datapath::open(config()).unwrap_err();
        assert!(refused.to_string().contains("CAP_BPF"), "{refused}");
        assert!(refused.to_string().contains("run as root"), "{refused}");
        assert!(
            !config().bpffs.exists() && !config().state_dir.exists(),
            "nothing is left behind"
        );
    });
}

#[test]
fn a_refusal_is_reported_with_its_rule() {
    on_a_node("a_refusal_is_reported_with_its_rule", || {
        pods();
        let mut datapath = open();
        let id = enforce(&mut datapath);
        let events = runtime().block_on(async {
            let mut reader = datapath.events().unwrap();
            only_the_friend_gets_in();
            let mut events: Vec<Event> = Vec::new();
            while events.len() < 4 {
                let batch = tokio::time::timeout(Duration::from_secs(20), reader.next_batch()).await;
                events.extend(batch.expect("events come within the reader's period").unwrap());
            }
            assert_eq!(reader.unreadable(), 0);
            events
        });
        let kinds: Vec<_> = events
            .iter()
            .filter_map(|e| EventKind::from_number(e.kind))
            .collect();
        assert_eq!(
            kinds,
            [EventKind::New, EventKind::Deny, EventKind::New, EventKind::Deny]
        );
        assert!(
            events
                .iter()
                .all(|event| event.endpoint == id && event.generation == 1)
        );
        assert_eq!(datapath.verdict(events[1].verdict), Some(&deny("deny")));
        assert_eq!(events[1].source[12..], [10, 244, 0, 3]);
    });
}

#[test]
fn finished_connections_are_collected_and_open_ones_stay() {
    on_a_node("finished_connections_are_collected_and_open_ones_stay", || {
        FRIEND.create().serve(PORT);
        SERVER.create();
        let mut datapath = open();
        enforce(&mut datapath);
        let kept = SERVER.connect(FRIEND.v4(), PORT).unwrap();
        assert!(echoes(&kept));
        let closed = SERVER.connect(FRIEND.v4(), PORT).unwrap();
        assert!(echoes(&closed));
        drop(closed);
        assert_eq!(datapath.collect(Datapath::now_ns()).unwrap().removed, 0);
        let minute = 61_000_000_000;
        // The other end may take a moment to close its own.
        let report = eventually("the closed one is collected", || {
            let report = datapath.collect(Datapath::now_ns() + minute).unwrap();
            (report.removed > 0).then_some(report)
        });
        assert_eq!((report.looked_at, report.removed), (2, 1));
        assert!(echoes(&kept), "its entry is still there");
        let fill = datapath.status().fill;
        assert_eq!(
            fill.iter().find(|fill| fill.table == "OUTBOUND4").unwrap().used,
            1
        );
    });
}
