//! Tables of messages: what comes in, what the sink is given, what goes out.

use thyra_proto::envoy::config::core::v3::Node;
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use thyra_xds_client::delta::{Batch, Delta, Received};
use thyra_xds_client::{Kind, Rejected};

use crate::wire::{
    authorization, empty_policy, garbage, mesh, raw_policy, resource, response, service, workload,
};

const POLICY: Kind = Kind::AuthorizationPolicy;

/// One thing that happens, and everything that must follow.
enum Step {
    /// A new stream: each request's type and the versions it must name.
    Connect(Vec<(Kind, Vec<(&'static str, &'static str)>)>),
    /// A response.
    Receive(Box<Expect>),
}

struct Expect {
    response: DeltaDiscoveryResponse,
    /// Names that the sink refuses.
    refuse: Vec<&'static str>,
    /// Names given to the sink.
    fresh: Vec<&'static str>,
    removed: Vec<&'static str>,
    undecodable: Vec<&'static str>,
    initial: bool,
    /// Names in the NACK; none: an ACK.
    nack: Vec<&'static str>,
}

impl Expect {
    fn of(response: DeltaDiscoveryResponse) -> Self {
        Self {
            response,
            refuse: Vec::new(),
            fresh: Vec::new(),
            removed: Vec::new(),
            undecodable: Vec::new(),
            initial: false,
            nack: Vec::new(),
        }
    }
    fn initial(self) -> Self {
        Self {
            initial: true,
            ..self
        }
    }
    fn fresh(self, names: &[&'static str]) -> Self {
        Self {
            fresh: names.to_vec(),
            ..self
        }
    }
    fn removed(self, names: &[&'static str]) -> Self {
        Self {
            removed: names.to_vec(),
            ..self
        }
    }
    fn undecodable(self, names: &[&'static str]) -> Self {
        Self {
            undecodable: names.to_vec(),
            nack: names.to_vec(),
            ..self
        }
    }
    fn refuse(self, names: &[&'static str]) -> Self {
        Self {
            refuse: names.to_vec(),
            nack: names.to_vec(),
            ..self
        }
    }
    fn nack(self, names: &[&'static str]) -> Self {
        Self {
            nack: names.to_vec(),
            ..self
        }
    }
}

fn node() -> Node {
    Node {
        id: "ztunnel~10.0.0.1~a.b~b.svc.cluster.local".into(),
        ..Node::default()
    }
}

fn play(kinds: &[Kind], steps: Vec<Step>) {
    let mut delta = Delta::new(node(), kinds);
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            Step::Connect(wanted) => check_connect(number, &delta.connect(), &wanted),
            Step::Receive(expect) => check_response(number, &mut delta, *expect),
        }
    }
}

fn check_connect(
    number: usize,
    requests: &[DeltaDiscoveryRequest],
    wanted: &[(Kind, Vec<(&'static str, &'static str)>)],
) {
    assert_eq!(requests.len(), wanted.len(), "step {number}");
    for (index, (request, (kind, versions))) in requests.iter().zip(wanted).enumerate() {
        let expected = DeltaDiscoveryRequest {
            node: (index == 0).then(node),
            type_url: kind.type_url().into(),
            initial_resource_versions: versions.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        assert_eq!(*request, expected, "step {number}, request {index}");
    }
}

fn check_response(number: usize, delta: &mut Delta, expect: Expect) {
    let nonce = expect.response.nonce.clone();
    let batch = batch(number, delta.receive(expect.response));
    let type_url = batch.kind.type_url();
    let fresh: Vec<&str> = batch.resources.iter().map(|named| named.name.as_str()).collect();
    let undecodable: Vec<&str> = batch
        .undecodable
        .iter()
        .map(|rejected| rejected.name.as_str())
        .collect();
    assert_eq!(fresh, expect.fresh, "fresh in step {number}");
    assert_eq!(batch.removed, expect.removed, "removed in step {number}");
    assert_eq!(undecodable, expect.undecodable, "undecodable in step {number}");
    assert_eq!(batch.initial, expect.initial, "initial in step {number}");
    let refused = expect.refuse.iter().map(|name| Rejected {
        name: (*name).into(),
        error: "no".into(),
    });
    let request = delta.answer(batch, refused.collect());
    assert_eq!(request.response_nonce, nonce, "step {number}");
    assert_eq!(request.type_url, type_url, "step {number}");
    assert!(
        request.node.is_none() && request.initial_resource_versions.is_empty(),
        "step {number}"
    );
    assert!(request.resource_names_subscribe.is_empty(), "step {number}");
    assert!(request.resource_names_unsubscribe.is_empty(), "step {number}");
    let complaint = request.error_detail.map(|detail| detail.message);
    assert_eq!(
        complaint.is_some(),
        !expect.nack.is_empty(),
        "step {number}: {complaint:?}"
    );
    for name in expect.nack {
        let complaint = complaint.as_deref().unwrap_or_default();
        assert!(
            complaint.contains(&format!("`{name}`: ")),
            "step {number}: `{name}` not in {complaint}"
        );
    }
}

fn batch(number: usize, received: Received) -> Batch {
    match received {
        Received::Batch(batch) => batch,
        Received::Unasked(request) => panic!("step {number}: unasked {}", request.type_url),
    }
}

fn connect(kind: Kind, versions: &[(&'static str, &'static str)]) -> Step {
    Step::Connect(vec![(kind, versions.to_vec())])
}

fn receive(expect: Expect) -> Step {
    Step::Receive(Box::new(expect))
}

#[test]
fn the_first_request_alone_says_who_asks_and_each_asks_for_everything() {
    let kinds = [
        POLICY,
        Kind::PeerAuthentication,
        Kind::RequestAuthentication,
        Kind::MeshConfig,
    ];
    play(
        &kinds,
        vec![Step::Connect(kinds.iter().map(|kind| (*kind, vec![])).collect())],
    );
}

#[test]
fn what_was_applied_is_named_to_the_next_stream() {
    let first = vec![
        workload("a", "1"),
        workload("b", "1"),
        service("ns", "web.ns.svc"),
    ];
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(Kind::Address, "n1", first, &[]))
                    .initial()
                    .fresh(&["a", "b", "ns/web.ns.svc"]),
            ),
            receive(
                Expect::of(response(Kind::Address, "n2", vec![workload("a", "2")], &["b"]))
                    .fresh(&["a"])
                    .removed(&["b"]),
            ),
            connect(Kind::Address, &[("a", "2"), ("ns/web.ns.svc", "1")]),
        ],
    );
}

#[test]
fn a_deletion_during_an_outage_arrives_with_the_first_response() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(
                    Kind::Address,
                    "n1",
                    vec![workload("a", "1"), workload("b", "1")],
                    &[],
                ))
                .initial()
                .fresh(&["a", "b"]),
            ),
            connect(Kind::Address, &[("a", "1"), ("b", "1")]),
            receive(
                Expect::of(response(Kind::Address, "n2", vec![], &["b"]))
                    .initial()
                    .removed(&["b"]),
            ),
            connect(Kind::Address, &[("a", "1")]),
        ],
    );
}

#[test]
fn an_unchanged_version_is_given_to_the_sink_once() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(Kind::Address, "n1", vec![workload("a", "1")], &[]))
                    .initial()
                    .fresh(&["a"]),
            ),
            receive(Expect::of(response(
                Kind::Address,
                "n2",
                vec![workload("a", "1")],
                &[],
            ))),
            receive(Expect::of(response(Kind::Address, "n3", vec![workload("a", "2")], &[])).fresh(&["a"])),
            // Gone and back in the same version: it is new.
            receive(Expect::of(response(Kind::Address, "n4", vec![], &["a"])).removed(&["a"])),
            receive(Expect::of(response(Kind::Address, "n5", vec![workload("a", "2")], &[])).fresh(&["a"])),
        ],
    );
}

#[test]
fn raw_policies_are_skipped_by_the_version_in_their_metadata() {
    let both = |b: &str| vec![empty_policy("ns/a", "10"), empty_policy("ns/b", b)];
    play(
        &[POLICY],
        vec![
            connect(POLICY, &[]),
            receive(
                Expect::of(response(POLICY, "n1", both("11"), &[]))
                    .initial()
                    .fresh(&["ns/a", "ns/b"]),
            ),
            receive(Expect::of(response(POLICY, "n2", both("11"), &[]))),
            receive(Expect::of(response(POLICY, "n3", both("12"), &[])).fresh(&["ns/b"])),
            // The server's own version, which it leaves empty, is what it hears again.
            connect(POLICY, &[("ns/a", ""), ("ns/b", "")]),
            receive(Expect::of(response(POLICY, "n4", both("12"), &[])).initial()),
        ],
    );
}

#[test]
fn a_resource_without_version_is_skipped_by_its_bytes() {
    let kind = Kind::Authorization;
    play(
        &[kind],
        vec![
            connect(kind, &[]),
            receive(
                Expect::of(response(kind, "n1", vec![authorization("ns", "a", false)], &[]))
                    .initial()
                    .fresh(&["ns/a"]),
            ),
            receive(Expect::of(response(
                kind,
                "n2",
                vec![authorization("ns", "a", false)],
                &[],
            ))),
            receive(
                Expect::of(response(kind, "n3", vec![authorization("ns", "a", true)], &[])).fresh(&["ns/a"]),
            ),
        ],
    );
}

#[test]
fn mesh_config_has_no_name_to_be_named_by() {
    let kind = Kind::MeshConfig;
    play(
        &[kind],
        vec![
            connect(kind, &[]),
            receive(
                Expect::of(response(kind, "n1", vec![mesh("td")], &[]))
                    .initial()
                    .fresh(&[""]),
            ),
            receive(Expect::of(response(kind, "n2", vec![mesh("td")], &[]))),
            receive(Expect::of(response(kind, "n3", vec![mesh("td2")], &[])).fresh(&[""])),
            connect(kind, &[]),
        ],
    );
}

#[test]
fn a_nack_names_every_bad_resource_while_the_good_ones_and_removals_apply() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(Kind::Address, "n1", vec![workload("old", "1")], &[]))
                    .initial()
                    .fresh(&["old"]),
            ),
            receive(
                Expect::of(response(
                    Kind::Address,
                    "n2",
                    vec![
                        workload("good", "1"),
                        garbage(Kind::Address, "bad-1"),
                        garbage(Kind::Address, "bad-2"),
                        resource("bodyless", "1", None),
                    ],
                    &["old"],
                ))
                .fresh(&["good"])
                .removed(&["old"])
                .undecodable(&["bad-1", "bad-2", "bodyless"]),
            ),
            connect(Kind::Address, &[("good", "1")]),
        ],
    );
}

#[test]
fn what_the_sink_refuses_is_in_the_nack_and_not_held() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(
                    Kind::Address,
                    "n1",
                    vec![workload("a", "1"), workload("b", "1")],
                    &[],
                ))
                .initial()
                .fresh(&["a", "b"])
                .refuse(&["b"]),
            ),
            connect(Kind::Address, &[("a", "1")]),
        ],
    );
}

#[test]
fn both_refusals_stand_in_one_nack() {
    let all = vec![
        workload("a", "1"),
        workload("b", "1"),
        garbage(Kind::Address, "c"),
    ];
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(Kind::Address, "n1", all, &[]))
                    .initial()
                    .fresh(&["a", "b"])
                    .refuse(&["b"])
                    .undecodable(&["c"])
                    .nack(&["b", "c"]),
            ),
        ],
    );
}

#[test]
fn a_refused_resource_is_tried_again_in_the_same_version() {
    let list = || vec![empty_policy("ns/a", "1"), empty_policy("ns/b", "1")];
    play(
        &[POLICY],
        vec![
            connect(POLICY, &[]),
            receive(
                Expect::of(response(POLICY, "n1", list(), &[]))
                    .initial()
                    .fresh(&["ns/a", "ns/b"])
                    .refuse(&["ns/b"]),
            ),
            receive(
                Expect::of(response(POLICY, "n2", list(), &[]))
                    .fresh(&["ns/b"])
                    .refuse(&["ns/b"]),
            ),
            receive(Expect::of(response(POLICY, "n3", list(), &[])).fresh(&["ns/b"])),
            receive(Expect::of(response(POLICY, "n4", list(), &[]))),
        ],
    );
}

#[test]
fn a_bad_update_ends_the_hold_on_the_good_version_before_it() {
    let bad = || raw_policy("ns/a", "2", vec![0xff]);
    play(
        &[POLICY],
        vec![
            connect(POLICY, &[]),
            receive(
                Expect::of(response(POLICY, "n1", vec![empty_policy("ns/a", "1")], &[]))
                    .initial()
                    .fresh(&["ns/a"]),
            ),
            receive(Expect::of(response(POLICY, "n2", vec![bad()], &[])).undecodable(&["ns/a"])),
            connect(POLICY, &[]),
            receive(
                Expect::of(response(POLICY, "n3", vec![bad()], &[]))
                    .initial()
                    .undecodable(&["ns/a"]),
            ),
            // Back to the version that was good: it must reach the sink again.
            receive(
                Expect::of(response(POLICY, "n4", vec![empty_policy("ns/a", "1")], &[])).fresh(&["ns/a"]),
            ),
        ],
    );
}

#[test]
fn a_refused_resource_that_is_gone_after_an_outage_is_removed() {
    play(
        &[POLICY],
        vec![
            connect(POLICY, &[]),
            receive(
                Expect::of(response(
                    POLICY,
                    "n1",
                    vec![raw_policy("ns/bad", "1", vec![0xff])],
                    &[],
                ))
                .initial()
                .undecodable(&["ns/bad"]),
            ),
            connect(POLICY, &[]),
            receive(
                Expect::of(response(POLICY, "n2", vec![], &[]))
                    .initial()
                    .removed(&["ns/bad"]),
            ),
            // It was said once.
            connect(POLICY, &[]),
            receive(Expect::of(response(POLICY, "n3", vec![], &[])).initial()),
        ],
    );
}

#[test]
fn within_a_stream_absence_removes_nothing() {
    play(
        &[POLICY],
        vec![
            connect(POLICY, &[]),
            receive(
                Expect::of(response(
                    POLICY,
                    "n1",
                    vec![raw_policy("ns/bad", "1", vec![0xff])],
                    &[],
                ))
                .initial()
                .undecodable(&["ns/bad"]),
            ),
            receive(Expect::of(response(POLICY, "n2", vec![], &[]))),
            receive(Expect::of(response(POLICY, "n3", vec![], &["ns/bad"])).removed(&["ns/bad"])),
        ],
    );
}

#[test]
fn a_name_both_sent_and_removed_is_there() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(
                    Kind::Address,
                    "n1",
                    vec![workload("a", "1")],
                    &["a", "b"],
                ))
                .initial()
                .fresh(&["a"])
                .removed(&["b"]),
            ),
            connect(Kind::Address, &[("a", "1")]),
        ],
    );
}

#[test]
fn of_a_name_that_comes_twice_the_last_counts() {
    play(
        &[Kind::Address],
        vec![
            connect(Kind::Address, &[]),
            receive(
                Expect::of(response(
                    Kind::Address,
                    "n1",
                    vec![workload("a", "1"), workload("a", "2")],
                    &[],
                ))
                .initial()
                .fresh(&["a"]),
            ),
            connect(Kind::Address, &[("a", "2")]),
        ],
    );
}

#[test]
fn an_outage_before_an_answer_changes_nothing_of_what_is_held() {
    let mut delta = Delta::new(node(), &[Kind::Address]);
    let _ = delta.connect();
    let first = batch(
        0,
        delta.receive(response(Kind::Address, "n1", vec![workload("a", "1")], &[])),
    );
    let _ = delta.answer(first, Vec::new());
    // Received but never answered: the connection went away first.
    let lost = batch(
        1,
        delta.receive(response(Kind::Address, "n2", vec![workload("b", "1")], &["a"])),
    );
    drop(lost);
    check_connect(2, &delta.connect(), &[(Kind::Address, vec![("a", "1")])]);
}

#[test]
fn a_type_is_ready_once_its_first_response_is_answered_and_unready_on_the_next_stream() {
    let kinds = [Kind::Address, Kind::Authorization];
    let mut delta = Delta::new(node(), &kinds);
    let _ = delta.connect();
    assert!(!delta.is_synced());
    let addresses = batch(0, delta.receive(response(Kind::Address, "n1", vec![], &[])));
    assert!(!delta.ready()[&Kind::Address], "received is not handled");
    let _ = delta.answer(addresses, Vec::new());
    assert!(delta.ready()[&Kind::Address] && !delta.ready()[&Kind::Authorization]);
    let policies = batch(1, delta.receive(response(Kind::Authorization, "n2", vec![], &[])));
    let _ = delta.answer(policies, Vec::new());
    assert!(delta.is_synced());
    let _ = delta.connect();
    assert!(!delta.is_synced());
}

#[test]
fn a_type_that_was_not_asked_for_is_refused_by_name() {
    let delta = Delta::new(node(), &[Kind::Address]);
    let unknown = DeltaDiscoveryResponse {
        type_url: "networking.istio.io/v1/ServiceEntry".into(),
        nonce: "n1".into(),
        ..DeltaDiscoveryResponse::default()
    };
    for response in [unknown, response(Kind::Authorization, "n1", vec![], &[])] {
        let type_url = response.type_url.clone();
        let Received::Unasked(request) = delta.receive(response) else {
            panic!("`{type_url}` was taken")
        };
        assert_eq!(
            (request.type_url.as_str(), request.response_nonce.as_str()),
            (type_url.as_str(), "n1")
        );
        assert!(
            request
                .error_detail
                .is_some_and(|detail| detail.message.contains(&type_url))
        );
    }
}
