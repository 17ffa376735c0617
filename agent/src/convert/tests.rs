//! Messages to the model.

use std::collections::BTreeMap;

use prost::Message as _;
use thyra_policy_compiler::policy::{Condition, L7Verdict, MtlsMode, PolicyAction, StringMatch, Unknown};
use thyra_policy_compiler::tokens::Keys;
use thyra_policy_compiler::world::{AppProtocol, WorkloadKind};
use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::security as l4;
use thyra_proto::istio::security::v1beta1 as raw;
use thyra_proto::istio::r#type::v1beta1::WorkloadSelector;
use thyra_proto::istio::workload as wire;

use super::*;

fn metadata(name: &str) -> Metadata {
    Metadata {
        name: name.into(),
        version: "17".into(),
        ..Metadata::default()
    }
}

fn policy(rule: raw::Rule) -> raw::AuthorizationPolicy {
    raw::AuthorizationPolicy {
        rules: vec![rule],
        ..raw::AuthorizationPolicy::default()
    }
}

fn from(source: raw::Source) -> raw::Rule {
    raw::Rule {
        from: vec![raw::rule::From { source: Some(source) }],
        ..raw::Rule::default()
    }
}

#[test]
fn a_policy_keeps_name_version_selector_and_values() {
    let source = raw::Source {
        principals: vec!["*".into(), "cluster.local/ns/a/sa/b".into()],
        not_ip_blocks: vec!["10.1.2.3/8".into()],
        service_accounts: vec!["front".into()],
        ..raw::Source::default()
    };
    let mut spec = policy(from(source));
    spec.selector = Some(WorkloadSelector {
        match_labels: BTreeMap::new(),
    });
    spec.action = 1;
    let read = policy::authorization(metadata("shop/p"), spec, &[]).expect("good");
    assert_eq!(
        (read.reference.to_string().as_str(), read.version.as_str()),
        ("shop/p", "17")
    );
    assert_eq!(read.action, PolicyAction::Deny);
    assert_eq!(
        read.selector,
        Some(Labels::new()),
        "present and empty is not absent"
    );
    let source = &read.rules[0].from[0];
    assert_eq!(source.principals.values[0], StringMatch::Present);
    assert_eq!(source.ip_blocks.not_values[0].to_string(), "10.0.0.0/8");
    assert_eq!(source.service_accounts.values[0].namespace, "shop");
}

#[test]
fn an_unknown_field_is_an_unknown_term_where_it_stands() {
    let mut rule = from(raw::Source::default());
    rule.to.push(raw::rule::To {
        operation: Some(raw::Operation::default()),
    });
    let unknown: Vec<String> = [
        "spec field 99",
        "spec.rules[0] field 99",
        "spec.rules[0].from[0].source field 99",
        "spec.rules[0].to[0].operation field 99",
    ]
    .map(String::from)
    .to_vec();
    let read = policy::authorization(metadata("shop/p"), policy(rule), &unknown).expect("good");
    let names = |terms: &[Unknown]| terms.iter().map(|u| u.0.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&read.unknown), &unknown[..1]);
    assert_eq!(names(&read.rules[0].unknown), &unknown[1..2]);
    assert_eq!(names(&read.rules[0].from[0].unknown), &unknown[2..3]);
    assert_eq!(names(&read.rules[0].to[0].unknown), &unknown[3..]);
}

#[test]
fn a_value_that_cant_be_read_refuses_the_policy_by_its_field() {
    let cases = [
        (
            raw::Source {
                ip_blocks: vec!["10.0.0.0/40".into()],
                ..Default::default()
            },
            "source.ipBlocks[0]",
        ),
        (
            raw::Source {
                not_ip_blocks: vec!["x".into()],
                ..Default::default()
            },
            "source.notIpBlocks[0]",
        ),
        (
            raw::Source {
                principals: vec![String::new()],
                ..Default::default()
            },
            "source.principals[0]",
        ),
    ];
    for (source, names) in cases {
        let error =
            policy::authorization(metadata("shop/p"), policy(from(source)), &[]).expect_err("bad value");
        assert!(error.to_string().contains(names), "{error}");
    }
    let late = raw::AuthorizationPolicy {
        action: 9,
        ..raw::AuthorizationPolicy::default()
    };
    assert!(
        policy::authorization(metadata("shop/p"), late, &[]).is_err(),
        "an action of a later API"
    );
    assert!(
        policy::authorization(metadata("p"), raw::AuthorizationPolicy::default(), &[]).is_err(),
        "no namespace"
    );
}

#[test]
fn an_unknown_condition_key_is_an_unknown_term_and_no_refusal() {
    let when = vec![raw::Condition {
        key: "source.moon".into(),
        values: vec!["full".into()],
        not_values: vec![],
    }];
    let rule = raw::Rule {
        when,
        ..raw::Rule::default()
    };
    let read = policy::authorization(metadata("shop/p"), policy(rule), &[]).expect("kept");
    assert!(read.rules[0].when.is_empty());
    assert!(read.rules[0].unknown[0].0.contains("source.moon"));
}

#[test]
fn a_mode_or_port_that_cant_be_read_is_strict() {
    let mode = |mode| raw::peer_authentication::MutualTls { mode };
    let spec = raw::PeerAuthentication {
        selector: None,
        mtls: Some(mode(9)),
        port_level_mtls: BTreeMap::from([(80, mode(2)), (81, mode(7))]),
    };
    let read = peer::authentication(metadata("shop/p"), spec, &[]).expect("kept");
    assert_eq!(read.mode, MtlsMode::Strict);
    assert_eq!(
        read.ports,
        BTreeMap::from([(80, MtlsMode::Permissive), (81, MtlsMode::Strict)])
    );
    assert_eq!(read.unknown.len(), 2);
    let far = raw::PeerAuthentication {
        port_level_mtls: BTreeMap::from([(70_000, mode(1))]),
        ..raw::PeerAuthentication::default()
    };
    assert_eq!(
        peer::authentication(metadata("shop/p"), far, &[])
            .expect("kept")
            .mode,
        MtlsMode::Strict
    );
}

#[test]
fn a_workload_is_read_with_istiods_defaults() {
    let read = workload::workload(wire::Workload {
        uid: "Kubernetes//Pod/shop/front".into(),
        name: "front".into(),
        namespace: "shop".into(),
        addresses: vec![
            vec![10, 0, 0, 1],
            [&[0; 10][..], &[0xff, 0xff, 10, 0, 0, 2]].concat(),
        ],
        services: BTreeMap::from([(
            "shop/cart.shop.svc".to_owned(),
            wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 42,
                }],
            },
        )]),
        ..wire::Workload::default()
    })
    .expect("good");
    assert_eq!(read.kind, WorkloadKind::Pod);
    assert_eq!(
        (read.trust_domain.as_str(), read.service_account.as_str()),
        ("cluster.local", "default")
    );
    assert_eq!(
        read.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.1", "10.0.0.2"]
    );
    assert_eq!(
        read.services["shop/cart.shop.svc"][0].protocol,
        AppProtocol::Unknown
    );
    assert!(!read.host_network);
}

#[test]
fn what_a_workload_cant_be_is_refused_and_what_it_may_become_is_not() {
    let port = |p| wire::Port {
        service_port: p,
        target_port: 0,
        app_protocol: 0,
    };
    let services = BTreeMap::from([(
        "a/b".to_owned(),
        wire::PortList {
            ports: vec![port(65_536)],
        },
    )]);
    assert!(
        workload::workload(wire::Workload {
            services,
            ..Default::default()
        })
        .is_err()
    );
    assert!(
        workload::workload(wire::Workload {
            addresses: vec![vec![1, 2, 3]],
            ..Default::default()
        })
        .is_err()
    );
    let later = wire::Workload {
        network_mode: 5,
        tunnel_protocol: 9,
        workload_type: 77,
        status: 8,
        ..Default::default()
    };
    assert!(
        workload::workload(later).expect("kept").host_network,
        "an unknown network mode lends no identity"
    );
}

#[test]
fn only_a_pod_of_the_core_group_is_a_pod() {
    assert_eq!(workload::kind("Kubernetes//Pod/shop/front"), WorkloadKind::Pod);
    for uid in [
        "Kubernetes/networking.istio.io/WorkloadEntry/a/b",
        "Kubernetes/x.io/Pod/a/b",
        "Pod",
        "a//Pod/b",
    ] {
        assert_eq!(workload::kind(uid), WorkloadKind::Other, "{uid}");
    }
}

fn clause(matches: Vec<l4::Match>) -> l4::Clause {
    l4::Clause { matches }
}

fn lossy(action: l4::Action, clauses: Vec<l4::Clause>) -> l4::Authorization {
    l4::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: 2,
        action: action.into(),
        rules: vec![l4::Rule { clauses }],
        ..l4::Authorization::default()
    }
}

fn exact(value: &str) -> l4::StringMatch {
    l4::StringMatch {
        match_type: Some(l4::string_match::MatchType::Exact(value.into())),
    }
}

#[test]
fn clauses_of_an_l4_policy_are_all_kept() {
    let source = |p: &str| l4::Match {
        principals: vec![exact(p)],
        ..l4::Match::default()
    };
    let port = l4::Match {
        destination_ports: vec![80, 81],
        ..l4::Match::default()
    };
    let clauses = vec![
        clause(vec![source("a"), source("b")]),
        clause(vec![port]),
        clause(vec![]),
    ];
    let read =
        authorization::authorization(lossy(l4::Action::Allow, clauses), "istio-system", "3".into(), &[]);
    let read = read.expect("good");
    let rule = &read.rules[0];
    assert_eq!(rule.from.len(), 2);
    assert!(matches!(&rule.when[..], [Condition::DestinationPort(f)] if f.values == [80, 81]));
    assert!(rule.unknown.is_empty());
    assert_eq!(
        read.selector.expect("listed").keys().next().map(String::as_str),
        Some("thyra.io/authorization/shop/p")
    );
}

#[test]
fn the_trace_of_an_l7_field_is_matched_in_deny_and_false_in_allow() {
    let empty = || vec![clause(vec![l4::Match::default()])];
    let deny = authorization::authorization(lossy(l4::Action::Deny, empty()), "r", String::new(), &[])
        .expect("good");
    assert_eq!(deny.rules[0], Default::default(), "a rule without constraint");
    let allow = authorization::authorization(lossy(l4::Action::Allow, empty()), "r", String::new(), &[])
        .expect("good");
    assert_eq!(allow.rules[0].unknown.len(), 1, "never matched in ALLOW");
}

#[test]
fn a_mesh_wide_l4_policy_must_be_of_the_root_namespace() {
    let mut message = lossy(l4::Action::Deny, Vec::new());
    message.scope = 0;
    assert!(authorization::authorization(message.clone(), "istio-system", String::new(), &[]).is_err());
    assert!(authorization::authorization(message, "shop", String::new(), &[]).is_ok());
}

#[test]
fn a_mapped_block_is_the_ipv4_block() {
    let block = |address: Vec<u8>, length| {
        let matches = vec![l4::Match {
            source_ips: vec![l4::Address { address, length }],
            ..l4::Match::default()
        }];
        authorization::authorization(
            lossy(l4::Action::Deny, vec![clause(matches)]),
            "r",
            String::new(),
            &[],
        )
    };
    let mapped = [&[0; 10][..], &[0xff, 0xff, 10, 1, 2, 3]].concat();
    let read = block(mapped.clone(), 104).expect("good");
    assert!(
        matches!(&read.rules[0].when[..], [Condition::SourceIp(f)] if f.values[0].to_string() == "10.0.0.0/8")
    );
    assert!(block(mapped, 64).is_err());
    assert!(block(vec![10, 0, 0, 0], 33).is_err());
}

/// A generator of numbers that are the same in every run (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}

/// Bytes changed, put in, taken out, repeated or cut off: a few at a time, so that much still decodes.
fn mutated(random: &mut Random, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] = random.byte(),
            1 => bytes.insert(at, random.byte()),
            2 if at < bytes.len() => {
                bytes.remove(at);
            }
            3 => bytes.truncate(at),
            _ => {
                let tail = bytes[at..].to_vec();
                bytes.extend(tail);
            }
        }
    }
    bytes
}

/// Decodes and converts; whether it came that far, and was taken.
fn taken<M: prost::Message + Default, T>(
    bytes: &[u8],
    convert: impl Fn(M) -> Result<T, ConvertError>,
) -> Option<bool> {
    M::decode(bytes).ok().map(|message| convert(message).is_ok())
}

/// A policy with something in every field.
fn full_policy() -> raw::AuthorizationPolicy {
    let texts = |text: &str| vec![text.to_owned(), "*".to_owned()];
    let mut rule = from(raw::Source {
        principals: texts("cluster.local/ns/a/sa/b"),
        not_namespaces: texts("a*"),
        ip_blocks: vec!["10.0.0.0/8".into(), "::1".into()],
        ..raw::Source::default()
    });
    rule.to.push(raw::rule::To {
        operation: Some(raw::Operation {
            ports: vec!["80".into()],
            paths: texts("/a/{**}"),
            hosts: texts("x"),
            ..raw::Operation::default()
        }),
    });
    rule.when.push(raw::Condition {
        key: "request.auth.claims[a][b]".into(),
        values: texts("v"),
        not_values: Vec::new(),
    });
    raw::AuthorizationPolicy {
        action: 1,
        ..policy(rule)
    }
}

#[test]
fn a_rule_with_an_unknown_field_takes_no_token_and_the_others_do() {
    let keys = r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#;
    let rule = |issuer: &str| raw::JwtRule {
        issuer: issuer.into(),
        jwks: keys.into(),
        from_headers: vec![raw::JwtHeader {
            name: "x-token".into(),
            prefix: "T ".into(),
        }],
        forward_original_token: true,
        space_delimited_claims: vec!["groups".into()],
        ..raw::JwtRule::default()
    };
    let spec = raw::RequestAuthentication {
        jwt_rules: vec![rule("i"), rule("j")],
        ..raw::RequestAuthentication::default()
    };
    let unknown = ["spec.jwtRules[0] field 99".to_owned()];
    let read = policy::request(metadata("shop/p"), spec.clone(), &unknown).expect("it can be read");
    assert!(
        matches!(&read.rules[0].keys, Keys::None(why) if why.contains("field 99")),
        "{read:?}"
    );
    assert_eq!(read.rules[1].keys, Keys::Inline(keys.into()));
    assert_eq!(read.rules[1].from_headers[0].prefix, "T ");
    assert!(read.rules[1].forward && read.rules[1].lists.contains("groups"));
    assert_eq!(read.unknown, []);
    let unknown = ["spec field 99".to_owned()];
    let read = policy::request(metadata("shop/p"), spec, &unknown).expect("it can be read");
    assert_eq!(read.unknown, [Unknown("spec field 99".into())]);
}

#[test]
fn any_bytes_are_taken_or_refused_and_never_panic() {
    let clause_of = l4::Match {
        principals: vec![exact("a")],
        destination_ports: vec![80],
        ..l4::Match::default()
    };
    let workload_of = wire::Workload {
        uid: "c//Pod/a/b".into(),
        name: "b".into(),
        namespace: "a".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        ..wire::Workload::default()
    };
    let seeds = [
        full_policy().encode_to_vec(),
        lossy(l4::Action::Deny, vec![clause(vec![clause_of])]).encode_to_vec(),
        workload_of.encode_to_vec(),
    ];
    let mut random = Random(7);
    let mut counts = BTreeMap::new();
    for round in 0..60_000 {
        let bytes = mutated(&mut random, &seeds[round % seeds.len()]);
        let ends = [
            taken(&bytes, |m| policy::authorization(metadata("shop/p"), m, &[])),
            taken(&bytes, |m| peer::authentication(metadata("shop/p"), m, &[])),
            taken(&bytes, |m| policy::request(metadata("shop/p"), m, &[])),
            taken(&bytes, |m| {
                authorization::authorization(m, "istio-system", String::new(), &[])
            }),
            taken(&bytes, workload::workload),
            taken(&bytes, workload::service),
        ];
        for end in ends {
            *counts.entry(end).or_insert(0_u32) += 1;
        }
    }
    // Each end must be common, or the bytes test nothing.
    for end in [None, Some(false), Some(true)] {
        assert!(counts[&end] > 2_000, "{counts:?}");
    }
}

#[test]
fn what_a_verdict_is_for_is_an_annotation() {
    let read = |word: Option<&str>| {
        let said = word.map(|word| ("thyra.io/l7-verdict".to_owned(), word.to_owned()));
        let metadata = Metadata {
            annotations: said.into_iter().collect(),
            ..metadata("shop/p")
        };
        let policy = policy::authorization(metadata, raw::AuthorizationPolicy::default(), &[]);
        policy.expect("good").l7_verdict
    };
    assert_eq!(read(None), L7Verdict::Request);
    assert_eq!(read(Some("connection")), L7Verdict::Connection);
    assert_eq!(read(Some("always")), L7Verdict::Unread("always".into()));
}
