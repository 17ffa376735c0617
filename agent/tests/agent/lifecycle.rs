//! Endpoints and news through the store.

use std::sync::Arc;
use std::time::Duration;

use thyra_agent::change::{Change, Namespace, Topic};
use thyra_agent::plane::PlaneError;
use thyra_agent::snapshot::Attached;
use thyra_agent::store::{Command, EndpointError, PodKey};
use thyra_datapath_abi::{Action, Reason};
use thyra_policy_compiler::policy::PolicyAction;
use thyra_policy_compiler::report::PolicyKind;

use crate::plane::Remembering;
use crate::sample::{Bench, basis, pod, policy, workload};

const FRONT: &str = "cluster.local/ns/shop/sa/front";

fn bench_with_cart() -> Bench {
    let bench = Bench::new(&[]);
    bench.plane.interface("veth-cart", 7);
    bench.add(pod("cart", "veth-cart", "10.0.0.2")).expect("added");
    bench
}

#[test]
fn an_added_pod_is_placed_attached_and_remembered() {
    let bench = bench_with_cart();
    assert_eq!(
        bench.plane.judge(1, "203.0.113.7", 80).map(|v| v.action),
        Some(Action::Allow)
    );
    assert!(bench.plane.with(|t| t.attached.contains_key(&1)));
    assert!(bench.state.path().join("endpoints.json").exists());
    assert_eq!(bench.handle.snapshot().attached.get(&1), Some(&Attached::At(7)));
    assert!(bench.check(pod("cart", "veth-cart", "10.0.0.2")).is_ok());
    let again = bench
        .add(pod("cart", "veth-cart", "10.0.0.2"))
        .expect("idempotent");
    assert_eq!(again.id, 1);
}

#[test]
fn a_pod_without_its_interface_is_refused_and_leaves_nothing() {
    let bench = Bench::new(&[]);
    let refused = bench.add(pod("cart", "veth-cart", "10.0.0.2"));
    assert!(
        matches!(refused, Err(EndpointError::Precondition(ref t)) if t.contains("`veth-cart`")),
        "{refused:?}"
    );
    assert!(bench.plane.with(|t| t.ids.is_empty() && t.attached.is_empty()));
    assert!(bench.handle.snapshot().held.registrations.is_empty());
}

#[test]
fn a_pod_whose_programs_cant_be_put_in_place_leaves_nothing() {
    let bench = Bench::new(&[]);
    bench.plane.interface("veth-cart", 7);
    bench
        .plane
        .with(|t| t.hook = Some(PlaneError::Precondition("interface has gone".into())));
    assert!(matches!(
        bench.add(pod("cart", "veth-cart", "10.0.0.2")),
        Err(EndpointError::Precondition(_))
    ));
    assert!(
        bench
            .plane
            .with(|t| t.ids.is_empty() && t.attached.is_empty() && t.tables.endpoints.is_empty())
    );
}

#[test]
fn a_pod_that_doesnt_fit_is_refused_and_the_others_stay() {
    let bench = bench_with_cart();
    bench.plane.interface("veth-front", 8);
    bench.plane.with(|t| t.full = Some("no room".into()));
    let refused = bench.add(pod("front", "veth-front", "10.0.0.3"));
    assert_eq!(refused, Err(EndpointError::Full("no room".into())));
    bench.plane.with(|t| t.full = None);
    assert!(bench.add(pod("front", "veth-front", "10.0.0.3")).is_ok());
    assert_eq!(bench.plane.with(|t| t.tables.endpoints.len()), 2);
}

#[test]
fn an_address_of_a_living_pod_is_refused_and_of_a_vanished_one_taken_over() {
    let bench = bench_with_cart();
    bench.plane.interface("veth-new", 9);
    let thief = pod("thief", "veth-new", "10.0.0.2");
    assert!(matches!(
        bench.add(thief.clone()),
        Err(EndpointError::Precondition(_))
    ));
    bench.plane.with(|t| t.interfaces.remove("veth-cart"));
    let added = bench.add(thief).expect("the old one is gone");
    assert_eq!(bench.handle.snapshot().held.registrations.len(), 1);
    assert!(bench.plane.with(|t| t.attached.contains_key(&added.id)));
}

#[test]
fn deleting_is_idempotent_and_frees_the_id() {
    let bench = bench_with_cart();
    assert!(bench.del(PodKey::Uid("uid-cart".into())).is_ok());
    assert!(bench.del(PodKey::Name("shop".into(), "cart".into())).is_ok());
    assert!(
        bench
            .plane
            .with(|t| t.ids.is_empty() && t.attached.is_empty() && t.tables.endpoints.is_empty())
    );
}

#[test]
fn a_policy_is_enforced_and_its_removal_restores_what_was() {
    let bench = bench_with_cart();
    let allow = policy("front-only", "1", PolicyAction::Allow, &[FRONT]);
    let reference = allow.reference.clone();
    bench.tell(vec![
        workload("front", "10.0.0.9"),
        Change::Authorization(Arc::new(allow)),
    ]);
    assert_eq!(
        bench.plane.judge(1, "10.0.0.9", 80).map(|v| v.action),
        Some(Action::Allow)
    );
    let stranger = bench.plane.judge(1, "203.0.113.7", 80).expect("placed");
    assert_eq!((stranger.action, stranger.reason), (Action::Deny, Reason::Policy));
    bench.tell(vec![Change::PolicyGone(PolicyKind::Authorization, reference)]);
    assert_eq!(
        bench.plane.judge(1, "203.0.113.7", 80).map(|v| v.action),
        Some(Action::Allow)
    );
}

#[test]
fn an_unreadable_policy_denies_in_its_namespace_until_it_is_good_or_gone() {
    let bench = bench_with_cart();
    let good = policy("p", "1", PolicyAction::Allow, &[FRONT]);
    let reference = good.reference.clone();
    bench.tell(vec![
        workload("front", "10.0.0.9"),
        Change::Authorization(Arc::new(good.clone())),
    ]);
    bench.tell(vec![Change::Unreadable(
        PolicyKind::Authorization,
        reference.clone(),
        "bad".into(),
    )]);
    let denied = bench.plane.judge(1, "10.0.0.9", 80).expect("placed");
    assert_eq!(
        (denied.action, denied.reason),
        (Action::Deny, Reason::NotExpressible)
    );
    bench.tell(vec![Change::Authorization(Arc::new(good))]);
    assert_eq!(
        bench.plane.judge(1, "10.0.0.9", 80).map(|v| v.action),
        Some(Action::Allow)
    );
}

#[test]
fn a_state_that_doesnt_fit_leaves_the_last_one_and_is_named() {
    let bench = bench_with_cart();
    let before = bench.handle.snapshot().generation;
    bench.plane.with(|t| t.full = Some("rows: 5000 of 4096".into()));
    let after = bench.tell(vec![
        workload("front", "10.0.0.9"),
        Change::Authorization(Arc::new(policy("p", "1", PolicyAction::Deny, &[FRONT]))),
    ]);
    assert_eq!(after.generation, before);
    assert_eq!(after.problem.as_deref(), Some("rows: 5000 of 4096"));
    assert_eq!(
        bench.plane.judge(1, "10.0.0.9", 80).map(|v| v.action),
        Some(Action::Allow)
    );
    bench.plane.with(|t| t.full = None);
    let healed = bench.tell(vec![workload("other", "10.0.0.10")]);
    assert_eq!(healed.problem, None);
    assert_eq!(
        bench.plane.judge(1, "10.0.0.9", 80).map(|v| v.action),
        Some(Action::Deny)
    );
}

#[test]
fn before_everything_was_told_an_enrolled_pod_denies() {
    let bench = Bench::new(&[Topic::Workloads, Topic::Authorization]);
    bench.plane.interface("veth-cart", 7);
    bench.add(pod("cart", "veth-cart", "10.0.0.2")).expect("added");
    let early = bench.plane.judge(1, "203.0.113.7", 80).expect("placed");
    assert_eq!((early.action, early.reason), (Action::Deny, Reason::Bootstrap));
    bench.tell(vec![Change::Ready(Topic::Workloads)]);
    assert_eq!(
        bench.plane.judge(1, "203.0.113.7", 80).map(|v| v.action),
        Some(Action::Deny)
    );
    let synced = bench.tell(vec![Change::Ready(Topic::Authorization)]);
    assert!(synced.held.world.synced);
    assert_eq!(
        bench.plane.judge(1, "203.0.113.7", 80).map(|v| v.action),
        Some(Action::Allow)
    );
}

#[test]
fn a_restart_changes_nothing_before_everything_was_told_again() {
    let bench = Bench::new(&[Topic::Authorization]);
    bench.plane.interface("veth-cart", 7);
    bench.add(pod("cart", "veth-cart", "10.0.0.2")).expect("added");
    bench.tell(vec![
        workload("front", "10.0.0.9"),
        Change::Ready(Topic::Authorization),
    ]);
    assert_eq!(
        bench.plane.judge(1, "10.0.0.9", 80).map(|v| v.action),
        Some(Action::Allow)
    );
    let (plane, state) = bench.stop();
    let commits = plane.with(|t| t.commits);
    let bench = Bench::on(plane, state, &[Topic::Authorization]);
    assert_eq!(
        bench.plane.with(|t| t.commits),
        commits,
        "no half-told world over a good one"
    );
    assert_eq!(
        bench.handle.snapshot().attached.get(&1),
        Some(&Attached::At(7)),
        "taken up again"
    );
    // A pod that leaves now keeps its id until tables without it are live, so that no new pod inherits its
    // place.
    bench.del(PodKey::Uid("uid-cart".into())).expect("deleted");
    bench.plane.interface("veth-new", 8);
    let new = bench.add(pod("new", "veth-new", "10.0.0.3")).expect("added");
    assert_ne!(new.id, 1);
    bench.tell(vec![Change::Ready(Topic::Authorization)]);
    assert_eq!(bench.plane.with(|t| t.commits), commits + 1);
    assert!(bench.plane.with(|t| !t.ids.contains_key("uid-cart")));
    assert_eq!(
        bench.plane.judge(new.id, "203.0.113.7", 80).map(|v| v.action),
        Some(Action::Allow)
    );
}

#[test]
fn programs_of_another_layout_judge_until_everything_was_told() {
    let (plane, state) = bench_with_cart().stop();
    // This build's maps are another layout's: empty.
    plane.with(|t| {
        t.attached.clear();
        (t.generation, t.older) = (0, 1);
        t.tables = thyra_datapath_abi::tables::Tables::default();
    });
    let commits = plane.with(|t| t.commits);
    let bench = Bench::on(plane, state, &[Topic::Authorization]);
    bench.tell(vec![workload("front", "10.0.0.9")]);
    let untouched = bench
        .plane
        .with(|t| t.attached.is_empty() && t.commits == commits);
    assert!(untouched, "the older programs know better than a half-told world");
    assert!(matches!(
        bench.check(pod("cart", "veth-cart", "10.0.0.2")),
        Err(EndpointError::Precondition(ref why)) if why.contains("older build")
    ));
    // A new pod waits for the first tables: it is attached, and what nobody placed gets nothing.
    bench.plane.interface("veth-new", 8);
    bench.add(pod("new", "veth-new", "10.0.0.3")).expect("added");
    assert_eq!(bench.plane.with(|t| t.attached.len()), 1);
    let whole = bench.tell(vec![Change::Ready(Topic::Authorization)]);
    assert_eq!(whole.attached.get(&1), Some(&Attached::At(7)));
    assert_eq!(bench.plane.with(|t| t.attached.len()), 2);
    assert!(bench.check(pod("cart", "veth-cart", "10.0.0.2")).is_ok());
}

#[test]
fn a_pod_of_another_layout_that_left_meanwhile_is_forgotten() {
    let (plane, state) = bench_with_cart().stop();
    plane.with(|t| {
        t.attached.clear();
        (t.generation, t.older) = (0, 1);
    });
    let bench = Bench::on(plane, state, &[Topic::Authorization]);
    bench.plane.with(|t| t.interfaces.clear());
    let whole = bench.tell(vec![Change::Ready(Topic::Authorization)]);
    assert!(whole.held.registrations.is_empty() && whole.attached.is_empty());
    assert!(bench.plane.with(|t| t.ids.is_empty()));
}

#[test]
fn a_pod_of_a_namespace_that_nobody_has_told_of_yet_is_not_left_open() {
    let mut basis = basis(&[Topic::Namespaces, Topic::Authorization]);
    basis.node.default_mode = thyra_datapath_abi::Mode::Off;
    let bench = Bench::with(
        Remembering::default(),
        tempfile::tempdir().expect("a folder"),
        basis,
    );
    bench.plane.interface("veth-cart", 7);
    bench.add(pod("cart", "veth-cart", "10.0.0.2")).expect("added");
    let judged = || {
        bench
            .plane
            .judge(1, "203.0.113.7", 80)
            .map(|v| (v.action, v.reason))
    };
    assert_eq!(judged(), Some((Action::Deny, Reason::Bootstrap)));
    bench.tell(vec![Change::Namespace("shop".into(), Namespace::default())]);
    assert_eq!(judged(), Some((Action::Allow, Reason::NotEnforced)));
}

#[test]
fn a_pod_of_a_namespace_that_was_made_a_moment_ago_is_not_left_open() {
    let mut basis = basis(&[]);
    basis.node.default_mode = thyra_datapath_abi::Mode::Off;
    basis.node.namespaces_are_told = true;
    let bench = Bench::with(
        Remembering::default(),
        tempfile::tempdir().expect("a folder"),
        basis,
    );
    bench.plane.interface("veth-cart", 7);
    bench.add(pod("cart", "veth-cart", "10.0.0.2")).expect("added");
    let judged = || bench.plane.judge(1, "203.0.113.7", 80).map(|v| v.reason);
    assert_ne!(judged(), Some(Reason::NotEnforced));
    bench.tell(vec![Change::Namespace("shop".into(), Namespace::default())]);
    assert_eq!(judged(), Some(Reason::NotEnforced));
}

#[test]
fn a_pod_with_an_address_that_is_anothers_opens_nothing_before_the_grace_is_over() {
    let mut basis = basis(&[]);
    basis.identity_grace = Duration::from_millis(400);
    let bench = Bench::with(
        Remembering::default(),
        tempfile::tempdir().expect("a folder"),
        basis,
    );
    for (name, index) in [("veth-cart", 7), ("veth-new", 8), ("veth-free", 9)] {
        bench.plane.interface(name, index);
    }
    let held_back = || {
        bench
            .plane
            .with(|t| t.held_back.iter().copied().collect::<Vec<_>>())
    };
    let tick = || assert!(bench.handle.send(Command::Tick));
    bench.tell(vec![workload("cart", "10.0.0.2"), workload("front", "10.0.0.9")]);
    bench
        .add(pod("cart", "veth-cart", "10.0.0.2"))
        .expect("its own address");
    bench
        .add(pod("free", "veth-free", "10.0.0.7"))
        .expect("a free address");
    let new = bench.add(pod("new", "veth-new", "10.0.0.9")).expect("added").id;
    assert_eq!(held_back(), [new]);
    assert_eq!(bench.handle.snapshot().held_back[&new], "shop/front");
    tick();
    // The old owner leaves; nodes that hear of it later still know it for a while.
    bench.tell(vec![Change::AddressGone("Kubernetes//Pod/shop/front".into())]);
    tick();
    bench.tell(vec![workload("new", "10.0.0.9")]);
    assert_eq!(held_back(), [new]);
    std::thread::sleep(Duration::from_millis(500));
    tick();
    bench.tell(vec![]);
    assert_eq!(held_back(), [0_u16; 0]);
    assert!(bench.handle.snapshot().held_back.is_empty());
}

#[test]
fn a_restart_forgets_pods_whose_interface_has_gone_and_ids_that_nobody_registered() {
    let (plane, state) = bench_with_cart().stop();
    plane.with(|t| {
        t.interfaces.clear();
        t.ids.insert("uid-orphan".into(), 9);
    });
    let bench = Bench::on(plane, state, &[]);
    assert!(bench.handle.snapshot().held.registrations.is_empty());
    assert!(
        bench.plane.with(|t| t.ids.is_empty()),
        "{:?}",
        bench.plane.with(|t| t.ids.clone())
    );
}

#[test]
fn identity_numbers_survive_a_restart() {
    let bench = Bench::new(&[]);
    let before = bench.tell(vec![workload("front", "10.0.0.9"), workload("cart", "10.0.0.2")]);
    let (plane, state) = bench.stop();
    let bench = Bench::on(plane, state, &[]);
    let after = bench.tell(vec![workload("cart", "10.0.0.2"), workload("new", "10.0.0.4")]);
    let number = |s: &thyra_agent::snapshot::Snapshot| {
        s.held
            .world
            .identities
            .get("cluster.local/ns/shop/sa/cart")
            .copied()
    };
    assert!(number(&before).is_some());
    assert_eq!(number(&before), number(&after));
}

#[test]
fn news_that_changes_no_cell_makes_no_generation() {
    let bench = bench_with_cart();
    let before = bench.handle.snapshot().generation;
    let mut deny = policy("nobody", "1", PolicyAction::Deny, &[]);
    deny.rules.clear();
    bench.tell(vec![Change::Authorization(Arc::new(deny.clone()))]);
    deny.version = "2".into();
    let after = bench.tell(vec![Change::Authorization(Arc::new(deny.clone()))]);
    assert_eq!(after.generation, before);
    assert_eq!(
        after.held.world.authorization[&deny.reference].version, "2",
        "and yet it is enforced"
    );
}
