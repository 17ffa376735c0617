//! What `thyra policy validate` finds: for each code a file that has it, with the place; and files that have none.

use std::collections::BTreeSet;
use std::path::Path;

use thyra_policy_compiler::finding::{Code, Finding, Severity};
use thyra_policy_compiler::manifest::{self, Manifests, PlanError};
use thyra_policy_compiler::validate::{Report, validate};

/// Two namespaces, a pod behind a Service that maps 80 to 8080 and declares 3306 as tcp, a MeshConfig.
const WORLD: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: ops}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: front, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {serviceAccountName: cart, containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: mysql, port: 3306}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: example.org
    trustDomainAliases: [old.example.org]
    extensionProviders: [{name: opa, envoyExtAuthzGrpc: {service: opa.ops.svc.cluster.local, port: 9000}}]
";

/// A policy `shop/p` with this spec, which begins in line 6.
fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: shop\n{\
        spec}\n"
    )
}

/// All findings in `text`, a file called `p.yaml`, beside the world.
fn findings(text: &str) -> Vec<Finding> {
    match manifest::read_str("p.yaml", text) {
        Ok(policies) => {
            let mut all = manifest::read_str("world.yaml", WORLD).unwrap();
            all.apply(policies);
            validate(&all).findings
        }
        Err(errors) => errors.into_iter().map(Finding::from).collect(),
    }
}

/// Code, line, column and a part of the text.
type Place = (Code, u32, u32, &'static str);

/// For each case: a policy, and what is found in it.
const CASES: &[(&str, &[Place])] = &[
    ("spec: {rules: [{}]", &[(Code::Syntax, 6, 7, "")]),
    (
        "spec: {rulez: []}",
        &[(Code::UnknownField, 6, 8, "did you mean `rules`?")],
    ),
    ("spec: {action: REJECT}", &[(Code::BadValue, 6, 8, "REJECT")]),
    (
        "spec: {action: AUDIT, rules: [{}]}",
        &[(Code::Audit, 6, 16, "never decides")],
    ),
    (
        "spec: {action: DENY}",
        &[(Code::NoEffect, 6, 7, "`rules: [{}]` matches everything")],
    ),
    ("spec: {}", &[(Code::AllowsNothing, 6, 7, "`rules: [{}]`")]),
    (
        "spec:\n  targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: g}]\n  rules: [{}]",
        &[(Code::TargetRefs, 7, 3, "use `selector`")],
    ),
    (
        "spec:\n  action: CUSTOM\n  provider: {name: oppa}\n  rules: [{}]",
        &[(Code::NoProvider, 8, 13, "`oppa`")],
    ),
    (
        "spec:\n  action: CUSTOM\n  provider: {name: opa}\n  rules: [{}]",
        &[],
    ),
    (
        "spec:\n  selector: {matchLabels: {app: card}}\n  rules: [{}]",
        &[(Code::SelectsNothing, 7, 13, "app=card")],
    ),
    (
        "spec:\n  selector: {matchLabels: {app: cart}}\n  rules: [{}]",
        &[],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\"spiffe://example.org/ns/shop/sa/cart\"]}",
        &[(
            Code::BadPrincipal,
            9,
            29,
            "without `spiffe://`: `example.org/ns/shop/sa/cart`",
        )],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\"cart\"]}",
        &[(Code::OddPrincipal, 9, 15, "matches no identity")],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\"example.com/ns/shop/sa/cart\"]}",
        &[(Code::UnknownTrustDomain, 9, 29, "`example.org`")],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\"old.example.org/ns/shop/sa/cart\", \
        \"cluster.local/ns/ops/sa/default\"]}",
        &[],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\
        \"example.org/ns/shop/sa/kart\"]}\n    - source: {serviceAccounts: [front, shopp/front]}",
        &[
            (Code::UnknownServiceAccount, 9, 29, "no service account `kart`"),
            (Code::UnknownNamespace, 10, 41, "no namespace `shopp`"),
        ],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {namespaces: [ops, \"sho*\", market]}",
        &[(Code::UnknownNamespace, 9, 42, "no namespace `market`")],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"80\"]}",
        &[(
            Code::ServicePort,
            9,
            27,
            "port of Service shop/cart; policies see the pod's own, which is 8080",
        )],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"8080\", \"3306\", \"9999\"]}",
        &[],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"3306\"], methods: [GET]}",
        &[(Code::HttpOnTcp, 9, 27, "`methods` is not read there")],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"8080\"], methods: [GET]}",
        &[],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"8080\"], notPorts: [\"8080\"]}",
        &[(Code::NeverMatches, 9, 26, "`notPorts` takes away all of `ports`")],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {ipBlocks: [10.1.0.0/16], notIpBlocks: [10.0.0.0/8]}",
        &[(Code::NeverMatches, 9, 26, "`notIpBlocks`")],
    ),
    (
        "spec:\n  rules:\n  - from:\n    - source: {principals: [\"example.org/ns/shop/sa/cart\"], \
        namespaces: [ops]}",
        &[(Code::NeverMatches, 9, 15, "both must match")],
    ),
    (
        "spec:\n  rules:\n  - to:\n    - operation: {ports: [\"8080\"]}\n    when:\n    - {\
        key: destination.port, values: [\"3306\"]}",
        &[(Code::NeverMatches, 11, 7, "one of the rule's `to`")],
    ),
    (
        "spec:\n  rules:\n  - when:\n    - {key: \"experimental.envoy.filters.x[y]\", values: [a]}",
        &[
            (Code::NeverMatches, 8, 5, "never matches"),
            (Code::Inexpressible, 9, 8, "can't be expressed"),
        ],
    ),
];

#[test]
fn each_mistake_is_found_where_it_stands() {
    for (spec, expected) in CASES {
        let found = findings(&policy(spec));
        let places: Vec<_> = found
            .iter()
            .map(|f| (f.code, f.at.position.line, f.at.position.column))
            .collect();
        let wanted: Vec<_> = expected
            .iter()
            .map(|(code, line, column, _)| (*code, *line, *column))
            .collect();
        assert_eq!(places, wanted, "{spec}\n{found:#?}");
        for (finding, (.., part)) in found.iter().zip(*expected) {
            assert!(
                finding.text.contains(part),
                "{part:?} is not in {:?}",
                finding.text
            );
        }
    }
}

/// Two policies; what is found of the second.
fn shadowed(deny: &str, allow: &str) -> Vec<Finding> {
    let named = |name: &str, spec: &str| policy(spec).replace("name: p", &format!("name: {name}"));
    findings(&format!("{}---\n{}", named("lock", deny), named("let", allow)))
}

#[test]
fn a_rule_is_shadowed_only_by_what_denies_all_of_it() {
    let allow = "spec:\n  selector: {matchLabels: {app: cart}}\n  rules:\n  - from:\n    - source: {\
        namespaces: [ops]}\n    to:\n    - operation: {ports: [\"8080\"]}";
    let shadows = [
        "spec: {action: DENY, rules: [{}]}",
        "spec: {action: DENY, selector: {matchLabels: {app: cart}}, \
        rules: [{from: [{source: {namespaces: [\"o*\"]}}]}]}",
        "spec: {action: DENY, rules: [{to: [{operation: {ports: [\"1\"]}}]}, \
        {to: [{operation: {notPorts: [\"9090\"]}}]}]}",
    ];
    for deny in shadows {
        let found = shadowed(deny, allow);
        assert_eq!(found.len(), 1, "{deny}: {found:#?}");
        assert_eq!(found[0].code, Code::Shadowed);
        assert!(found[0].text.contains("shop/lock#"), "{}", found[0].text);
    }
    let harmless = [
        "spec: {action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}",
        "spec: {action: DENY, rules: [{to: [{operation: {ports: [\"8080\"], methods: [GET]}}]}]}",
        "spec: {action: DENY, rules: [{to: [{operation: {notPorts: [\"8080\"]}}]}]}",
        "spec: {action: DENY, rules: [{from: [{source: {namespaces: [ops], notIpBlocks: [10.0.0.0/8]}}]}]}",
        "spec: {action: ALLOW, rules: [{}]}",
    ];
    for deny in harmless {
        assert_eq!(shadowed(deny, allow), [], "{deny}");
    }
    // Of pods that the ALLOW policy's selector doesn't name, not all are denied.
    let narrow = "spec: {action: DENY, selector: {matchLabels: {app: cart}}, rules: [{}]}";
    assert_eq!(
        shadowed(narrow, "spec: {rules: [{from: [{source: {namespaces: [ops]}}]}]}"),
        []
    );
}

#[test]
fn what_the_files_dont_hold_is_said_to_be_unchecked() {
    let spec = "spec:\n  action: CUSTOM\n  provider: {name: opa}\n  selector: {matchLabels: {\
        app: x}}\n  rules:\n  - from:\n    - source: {principals: [\"a/ns/b/sa/c\"]}";
    let policies = manifest::read_str("p.yaml", &policy(spec)).unwrap();
    let Report { findings, unchecked } = validate(&policies);
    assert_eq!(findings, []);
    let about: Vec<_> = unchecked
        .iter()
        .filter_map(|text| text.split(':').next())
        .collect();
    let wanted = [
        "extension providers",
        "namespaces and service accounts",
        "selectors and ports",
        "trust domains",
    ];
    assert_eq!(about, wanted);
}

#[test]
fn mistakes_outside_a_policy_have_their_codes_too() {
    let codes = |text: &str| {
        let errors = manifest::read_str("f.yaml", text).unwrap_err();
        errors.into_iter().map(|error| error.code).collect::<Vec<_>>()
    };
    assert_eq!(
        codes("apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {name: p}\n"),
        [Code::UnknownKind]
    );
    let twice = policy("spec: {}") + "---\n" + &policy("spec: {rules: [{}]}");
    assert_eq!(codes(&twice), [Code::DefinedTwice]);
    let bytes = manifest::read_bytes("f.yaml", b"a: \xff").unwrap_err();
    assert_eq!(bytes[0].code, Code::NotReadable);
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart, namespace: shop}\nspec: {containers: [{name: c}]}\n";
    let set = "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: cart, namespace: shop}\nspec:\n  \
               serviceName: cart\n  selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n    \
               spec: {containers: [{name: c}]}\n";
    let pods = manifest::read_str("f.yaml", &format!("{pod}---\n{set}")).unwrap();
    match manifest::addresses(&pods, 1) {
        Err(PlanError::Manifest(error)) => assert_eq!(error.code, Code::NoPlan),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_projects_own_scenarios_are_clean() {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab");
    for scenario in ["quickstart", "bookinfo"] {
        let folder = lab.join(scenario).join("manifests");
        let manifests: Manifests = manifest::read_dir(&folder).unwrap();
        assert_eq!(validate(&manifests).findings, [], "{scenario}");
    }
}

#[test]
fn every_code_has_its_section_in_the_docs() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/validate.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let heads: BTreeSet<&str> = docs
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let names: BTreeSet<&str> = Code::ALL.iter().map(|code| code.name()).collect();
    assert_eq!(heads, names);
    let errors = docs.find("\n## Warnings").unwrap();
    for code in Code::ALL {
        let at = docs.find(&format!("\n### {code}\n")).unwrap();
        assert_eq!(at < errors, code.severity() == Severity::Error, "{code}");
    }
}
