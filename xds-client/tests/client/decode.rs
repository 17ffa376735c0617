//! What is refused, what is kept, and what protobuf would have dropped in silence.

use prost::Message;
use prost::encoding::{encode_key, encode_varint};
use thyra_proto::istio::security::v1beta1::authorization_policy::Action;
use thyra_proto::istio::security::v1beta1::peer_authentication::MutualTls;
use thyra_proto::istio::security::v1beta1::peer_authentication::mutual_tls::Mode;
use thyra_proto::istio::security::v1beta1::{
    AuthorizationPolicy, Condition, Operation, PeerAuthentication, Rule, Source, rule,
};
use thyra_proto::istio::workload::address::Type;
use thyra_proto::istio::workload::{Address, Workload};
use thyra_xds_client::{Body, Kind, decode, unknown};

use crate::wire::{any, authorization, empty_policy, mesh, raw, raw_policy, resource, service, workload};

/// A field 99 with the value 1, appended to a message.
fn with_field_99(mut message: Vec<u8>) -> Vec<u8> {
    encode_key(99, prost::encoding::WireType::Varint, &mut message);
    encode_varint(1, &mut message);
    message
}

/// `inner` as field `number` of a message.
fn field(number: u32, inner: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    encode_key(number, prost::encoding::WireType::LengthDelimited, &mut message);
    encode_varint(u64::try_from(inner.len()).unwrap(), &mut message);
    message.extend_from_slice(inner);
    message
}

fn unknowns(kind: Kind, spec: Vec<u8>) -> Vec<String> {
    let named = decode::named(kind, "1", &raw(kind, "ns/a", "1", spec)).unwrap();
    named.unknown
}

#[test]
fn field_99_is_found_wherever_it_hides_in_a_policy() {
    let source = Source {
        principals: vec!["td/ns/a/sa/b".into()],
        ..Source::default()
    };
    let operation = Operation {
        ports: vec!["80".into()],
        ..Operation::default()
    };
    let condition = Condition {
        key: "source.ip".into(),
        values: vec!["1.2.3.4".into()],
        not_values: vec![],
    };
    let plain_from = field(1, &field(1, &source.encode_to_vec()));
    // Each: (spec, path).
    let cases = [
        (
            with_field_99(AuthorizationPolicy::default().encode_to_vec()),
            "spec field 99",
        ),
        (
            field(2, &with_field_99(plain_from.clone())),
            "spec.rules[0] field 99",
        ),
        (
            field(2, &field(1, &with_field_99(field(1, &source.encode_to_vec())))),
            "spec.rules[0].from[0] field 99",
        ),
        (
            field(2, &field(1, &field(1, &with_field_99(source.encode_to_vec())))),
            "spec.rules[0].from[0].source field 99",
        ),
        (
            field(2, &field(2, &field(1, &with_field_99(operation.encode_to_vec())))),
            "spec.rules[0].to[0].operation field 99",
        ),
        (
            field(2, &field(3, &with_field_99(condition.encode_to_vec()))),
            "spec.rules[0].when[0] field 99",
        ),
        (field(1, &with_field_99(Vec::new())), "spec.selector field 99"),
        (field(4, &with_field_99(Vec::new())), "spec.provider field 99"),
        (
            field(6, &with_field_99(Vec::new())),
            "spec.targetRefs[0] field 99",
        ),
    ];
    for (spec, path) in cases {
        assert_eq!(unknowns(Kind::AuthorizationPolicy, spec), [path]);
    }
}

#[test]
fn the_second_source_of_the_second_rule_is_called_so() {
    let from = |source: Vec<u8>| field(1, &field(1, &source));
    let plain = from(Source::default().encode_to_vec());
    let odd = from(with_field_99(Vec::new()));
    let second = [plain.clone(), odd].concat();
    let spec = [field(2, &plain), field(2, &second)].concat();
    assert_eq!(
        unknowns(Kind::AuthorizationPolicy, spec),
        ["spec.rules[1].from[1].source field 99"]
    );
}

#[test]
fn a_policy_of_known_fields_has_nothing_unknown() {
    let spec = AuthorizationPolicy {
        rules: vec![Rule {
            from: vec![rule::From {
                source: Some(Source {
                    not_trust_domains: vec!["x".into()],
                    ..Source::default()
                }),
            }],
            to: vec![rule::To {
                operation: Some(Operation {
                    not_paths: vec!["/x".into()],
                    ..Operation::default()
                }),
            }],
            when: vec![],
        }],
        action: Action::Custom.into(),
        ..AuthorizationPolicy::default()
    };
    assert!(unknowns(Kind::AuthorizationPolicy, spec.encode_to_vec()).is_empty());
}

#[test]
fn unknown_enum_values_of_policies_are_found() {
    let spec = AuthorizationPolicy {
        action: 7,
        ..AuthorizationPolicy::default()
    };
    assert_eq!(
        unknowns(Kind::AuthorizationPolicy, spec.encode_to_vec()),
        ["spec.action value 7"]
    );
    let ports = [
        (8080, MutualTls { mode: 9 }),
        (
            9090,
            MutualTls {
                mode: Mode::Strict.into(),
            },
        ),
    ];
    let spec = PeerAuthentication {
        port_level_mtls: ports.into(),
        ..PeerAuthentication::default()
    };
    assert_eq!(
        unknowns(Kind::PeerAuthentication, spec.encode_to_vec()),
        ["spec.portLevelMtls[8080].mode value 9"]
    );
    let spec = PeerAuthentication {
        mtls: Some(MutualTls { mode: -1 }),
        ..PeerAuthentication::default()
    };
    assert_eq!(
        unknowns(Kind::PeerAuthentication, spec.encode_to_vec()),
        ["spec.mtls.mode value -1"]
    );
}

#[test]
fn field_99_in_a_port_of_a_peer_authentication_is_found() {
    // A map entry: key 8080 as field 1, the value as field 2.
    let entry = [vec![0x08, 0x90, 0x3f], field(2, &with_field_99(Vec::new()))].concat();
    assert_eq!(
        unknowns(Kind::PeerAuthentication, field(3, &entry)),
        ["spec.portLevelMtls[8080] field 99"]
    );
}

#[test]
fn field_99_in_an_l4_authorization_is_found() {
    let clause = field(2, &with_field_99(Vec::new()));
    let body = [field(1, b"a"), field(2, b"ns"), field(5, &field(1, &clause))].concat();
    let resource = resource("ns/a", "", Some(any(Kind::Authorization.message(), body)));
    let named = decode::named(Kind::Authorization, "", &resource).unwrap();
    assert_eq!(
        named.unknown,
        ["authorization.rules[0].clauses[0].matches[0] field 99"]
    );
}

#[test]
fn every_message_of_a_policy_is_in_the_descriptors() {
    for kind in Kind::ALL {
        assert!(unknown::fields(kind.message(), "x", &[]).is_ok(), "{kind}");
    }
}

#[test]
fn an_unknown_enum_value_does_not_refuse_a_workload() {
    let odd = Workload {
        uid: "u".into(),
        workload_type: 77,
        network_mode: 9,
        ..Workload::default()
    };
    let address = Address {
        r#type: Some(Type::Workload(odd.clone())),
    };
    let body = any(Kind::Address.message(), with_field_99(address.encode_to_vec()));
    let named = decode::named(Kind::Address, "1", &resource("u", "1", Some(body))).unwrap();
    assert_eq!(
        named.body,
        Body::Address(Address {
            r#type: Some(Type::Workload(odd))
        })
    );
}

#[test]
fn each_kind_decodes_to_its_body() {
    let cases = [
        (Kind::Address, workload("u", "1")),
        (Kind::Address, service("ns", "h")),
        (Kind::Authorization, authorization("ns", "a", false)),
        (Kind::AuthorizationPolicy, empty_policy("ns/a", "1")),
        (
            Kind::PeerAuthentication,
            raw(Kind::PeerAuthentication, "ns/a", "1", vec![]),
        ),
        (
            Kind::RequestAuthentication,
            raw(Kind::RequestAuthentication, "ns/a", "1", vec![]),
        ),
        (Kind::MeshConfig, mesh("td")),
    ];
    for (kind, resource) in cases {
        let version = decode::version(kind, &resource);
        let named = decode::named(kind, &version, &resource).unwrap();
        assert_eq!((named.name, named.version), (resource.name, version));
        let found = match named.body {
            Body::Address(_) => Kind::Address,
            Body::Authorization(_) => Kind::Authorization,
            Body::AuthorizationPolicy { .. } => Kind::AuthorizationPolicy,
            Body::PeerAuthentication { .. } => Kind::PeerAuthentication,
            Body::RequestAuthentication { .. } => Kind::RequestAuthentication,
            Body::MeshConfig(_) => Kind::MeshConfig,
        };
        assert_eq!(found, kind);
    }
}

#[test]
fn what_cannot_be_read_is_refused_with_its_reason() {
    let policy = Kind::AuthorizationPolicy;
    let cases = [
        (Kind::Address, resource("a", "1", None), "no body"),
        (
            Kind::Address,
            resource("a", "1", Some(any("istio.workload.Workload", vec![]))),
            "expected `istio.workload.Address`",
        ),
        (
            Kind::Address,
            resource("a", "1", Some(any(Kind::Address.message(), vec![]))),
            "neither a workload nor a service",
        ),
        (
            Kind::Address,
            resource("other", "1", workload("u", "1").resource),
            "calls itself `u`",
        ),
        (
            policy,
            resource("ns/a", "", Some(any("istio.mcp.v1alpha1.Resource", vec![]))),
            "no metadata",
        ),
        (
            policy,
            raw_policy("ns/a", "1", vec![0xff]),
            "malformed `istio.security.v1beta1.AuthorizationPolicy`",
        ),
        (
            policy,
            raw(Kind::PeerAuthentication, "ns/a", "1", vec![]),
            "expected `istio.security.v1beta1.AuthorizationPolicy`",
        ),
        (
            policy,
            resource("ns/b", "", empty_policy("ns/a", "1").resource),
            "calls itself `ns/a`",
        ),
    ];
    for (kind, resource, reason) in cases {
        let error = decode::named(kind, "", &resource).unwrap_err().to_string();
        assert!(error.contains(reason), "`{error}` doesn't say `{reason}`");
    }
}
