//! Tables of values for each parser: what istiod accepts, with istiod's meaning, and what it refuses.

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().expect("a test's own block")
}

#[test]
fn blocks_are_masked_and_mapped_ones_are_ipv4() {
    for (value, want) in [
        ("1.2.3.4", "1.2.3.4/32"),
        ("1.2.3.4/8", "1.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("2001:db8::7/32", "2001:db8::/32"),
        ("::ffff:1.2.3.4", "1.2.3.4/32"),
        ("::ffff:1.2.3.4/120", "1.2.3.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:1.2.3.4/95", "::fffe:0:0/95"),
    ] {
        assert_eq!(ip_block(value), Ok(net(want)), "{value}");
    }
}

#[test]
fn bad_blocks_are_refused() {
    for value in [
        "",
        "1.2.3",
        "1.2.3.4/33",
        "1.2.3.4/",
        "1.2.3.4/08",
        "1.2.3.4/+8",
        "01.2.3.4",
        "::1/129",
        "fe80::1%eth0",
        "a.b.c.d",
        "1.2.3.4/8/8",
        " 1.2.3.4",
    ] {
        assert!(ip_block(value).is_err(), "{value}");
    }
}

#[test]
fn ports_are_decimal_and_never_cut() {
    assert_eq!(port("8080"), Ok(8080));
    assert_eq!(port("65535"), Ok(65535));
    assert_eq!(port("0080"), Ok(80));
    for value in [
        "",
        "65536",
        "65616",
        "-1",
        "+80",
        "http",
        "80-90",
        "8 0",
        "4294967376",
        "0x50",
    ] {
        assert!(port(value).is_err(), "{value}");
    }
}

#[test]
fn wildcards_are_the_fields_own() {
    assert_eq!(principal("*"), Ok(StringMatch::Present));
    assert_eq!(
        principal("*/ns/a/sa/b"),
        Ok(StringMatch::Suffix("/ns/a/sa/b".into()))
    );
    assert_eq!(
        principal("cluster.local/ns/a/*"),
        Ok(StringMatch::Prefix("cluster.local/ns/a/".into()))
    );
    assert_eq!(
        principal("td/ns/*/sa/b"),
        Ok(StringMatch::Exact("td/ns/*/sa/b".into()))
    );
    assert_eq!(principal("*x*"), Ok(StringMatch::Suffix("x*".into())));
    assert_eq!(namespace("team-*"), Ok(StringMatch::Prefix("team-".into())));
    assert_eq!(namespace("a*b"), Ok(StringMatch::Glob("a*b".into())));
    assert_eq!(namespace("*a*"), Ok(StringMatch::Glob("*a*".into())));
    assert_eq!(namespace(""), Err(ValueError::Empty));
    assert!(trust_domain("a*b").is_err());
    assert!(trust_domain("*a*").is_err());
    assert!(trust_domain("a/b").is_err());
    let in_condition = condition("source.trustDomain", &["a/b".to_owned()], &[], "shop");
    assert!(matches!(in_condition, Ok(Condition::SourceTrustDomain(_))));
    assert_eq!(
        trust_domain("*.example"),
        Ok(StringMatch::Suffix(".example".into()))
    );
}

#[test]
fn a_service_account_without_namespace_is_in_the_policys() {
    let of = |ns: &str, name: &str| {
        Ok(ServiceAccountRef {
            namespace: ns.into(),
            name: name.into(),
        })
    };
    assert_eq!(service_account("front", "shop"), of("shop", "front"));
    assert_eq!(service_account("other/front", "shop"), of("other", "front"));
    for value in ["", "*", "a/*", "a/b/c", "/b", "a/", &"x".repeat(321)] {
        assert!(service_account(value, "shop").is_err(), "{value}");
    }
}

#[test]
fn conditions_are_typed_or_refused_by_name() {
    let one = |v: &str| vec![v.to_owned()];
    let read = |key: &str, v: &str| condition(key, &one(v), &[], "shop");
    assert_eq!(
        read("source.ip", "1.2.3.4/8"),
        Ok(Condition::SourceIp(Field {
            values: vec![net("1.0.0.0/8")],
            not_values: vec![]
        }))
    );
    assert!(matches!(
        read("request.headers[x-team]", "blue"),
        Ok(Condition::Request { .. })
    ));
    assert!(matches!(
        read("request.auth.claims[a][b]", "blue"),
        Ok(Condition::Request { .. })
    ));
    assert!(matches!(
        read("experimental.envoy.filters.network.mysql_proxy[db.t]", "[update]"),
        Err(ConditionError::Inexpressible(_))
    ));
    for key in [
        "",
        "request.headers",
        "request.headers[]",
        "destination.labels[v]",
        "destination.user",
        "source.uid",
    ] {
        assert!(
            matches!(read(key, "x"), Err(ConditionError::UnknownKey { .. })),
            "{key}"
        );
    }
    assert!(matches!(
        condition("source.ip", &[], &[], "shop"),
        Err(ConditionError::NoValues(_))
    ));
    assert!(matches!(
        condition("destination.port", &one("80"), &one("90000"), "shop"),
        Err(ConditionError::Value {
            negated: true,
            index: 0,
            error: ValueError::Port(_),
            ..
        })
    ));
}

#[test]
fn path_templates_are_istios() {
    for value in [
        "/a",
        "/a*",
        "*",
        "/a/{*}/b",
        "/a/{**}",
        "/a/{*}/{**}",
        "/a/{**}/b",
    ] {
        assert_eq!(path(value).as_deref(), Ok(value));
    }
    for value in ["", "/a/{**}/{*}", "/a/{b}", "/a{*}", "/a/{*}/b*", "/a//{*}"] {
        assert!(path(value).is_err(), "{value}");
    }
}

#[test]
fn dry_run_is_gos_bool() {
    assert_eq!(dry_run(None), Ok(false));
    assert_eq!(dry_run(Some("True")), Ok(true));
    assert_eq!(dry_run(Some("0")), Ok(false));
    assert!(dry_run(Some("yes")).is_err());
    assert!(dry_run(Some("")).is_err());
}

#[test]
fn app_protocol_wins_over_the_port_name() {
    for (app, name, port, want) in [
        (None, "http-web", 80, AppProtocol::Http),
        (None, "HTTP2", 80, AppProtocol::Http),
        (None, "grpc-web", 80, AppProtocol::Http),
        (None, "web", 80, AppProtocol::Unknown),
        (None, "", 80, AppProtocol::Unknown),
        (None, "httpx", 80, AppProtocol::Unknown),
        (None, "", 3306, AppProtocol::NotHttp),
        (None, "tcp-http", 80, AppProtocol::NotHttp),
        (Some("tcp"), "http", 80, AppProtocol::NotHttp),
        (Some("https"), "", 443, AppProtocol::Tls),
        (Some("kubernetes.io/h2c"), "tcp", 80, AppProtocol::Http),
        (Some("example.com/own"), "http", 80, AppProtocol::Unknown),
    ] {
        assert_eq!(app_protocol(app, name, port), want, "{app:?} {name} {port}");
    }
}
