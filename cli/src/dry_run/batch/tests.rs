//! Lines in, lines out, on one small mesh.

use serde_json::{Value, json};
use thyra_policy_compiler::manifest;

use super::*;

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop}
spec: {serviceAccountName: front, containers: [{name: a, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {containers: [{name: a, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-2, namespace: shop, labels: {app: cart, canary: "yes"}}
spec: {containers: [{name: a, image: x}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-db, port: 81, targetPort: 9090}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/front"]}}]
    to: [{operation: {methods: [GET], paths: ["/items/{*}"]}}]
  - from: [{source: {requestPrincipals: ["i/s"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: canary, namespace: shop}
spec:
  action: DENY
  selector: {matchLabels: {canary: "yes"}}
  rules: [{to: [{operation: {paths: ["/items/7"]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: tried
  namespace: shop
  annotations: {istio.io/dry-run: "true"}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: ["/items/8"]}}]}]
"#;

fn offline(as_given: bool) -> Offline {
    let manifests = manifest::read_str("mesh.yaml", MESH).unwrap();
    Offline::new(&manifests, &[], as_given).unwrap()
}

/// The answers, and how many lines were in error; the oracle must agree.
fn answers(offline: &Offline, lines: &[Value]) -> (Vec<Value>, usize) {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let mut output = Vec::new();
    let totals = run(offline, true, input.as_bytes(), &mut output).unwrap();
    assert_eq!(0, totals.differences);
    let answers = String::from_utf8(output).unwrap();
    let answers: Vec<Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), answers.len());
    (answers, totals.errors)
}

fn get(path: &str) -> Value {
    json!({"from": "shop/front", "to": "shop/cart", "port": 8080, "http": {"path": path}})
}

#[test]
fn a_request_gets_its_verdict_and_its_rule() {
    let (found, errors) = answers(
        &offline(false),
        &[
            get("/items/1?x=/admin"),
            get("/items/1/2"),
            json!({"from": "outside", "to": "shop/cart", "port": 8080, "ip": 6, "http": {},
                   "claims": {"iss": "i", "sub": "s"}}),
            json!({"from": "shop/front", "to": "shop/cart", "port": 8080}),
            json!({"from": "shop/front", "to": "shop/cart", "port": 9090, "http": {"path": "/items/1"}}),
        ],
    );
    assert_eq!(0, errors);
    let verdicts: Vec<_> = found
        .iter()
        .map(|a| (&a["verdict"], &a["policy"], &a["rule"]))
        .collect();
    let allowed = |rule: u32| (json!("allow"), json!("shop/allow"), json!(rule));
    let denied = (json!("deny"), Value::Null, Value::Null);
    let wanted = [allowed(0), denied.clone(), allowed(1), denied.clone(), denied];
    assert_eq!(
        verdicts,
        wanted.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>()
    );
    assert_eq!(found[0]["enforced_by"], "kernel+envoy");
    assert_eq!(found[3]["reason"], "not HTTP on a port that declares it");
    assert_eq!(
        found[4]["enforced_by"], "kernel",
        "a port declared tcp never meets a proxy"
    );
}

#[test]
fn the_line_alone_says_what_it_is_when_asked_so() {
    let line = json!({"from": "shop/front", "to": "shop/cart", "port": 9090, "http": {"path": "/items/1"}});
    let (found, _) = answers(&offline(true), &[line]);
    assert_eq!(found[0]["verdict"], "allow");
}

#[test]
fn dry_run_policies_say_what_they_would_do() {
    let (found, _) = answers(&offline(false), &[get("/items/8"), get("/items/1")]);
    assert_eq!(
        (&found[0]["verdict"], &found[0]["would"]),
        (&json!("allow"), &json!("deny"))
    );
    assert_eq!(found[1]["would"], Value::Null);
}

#[test]
fn a_service_names_the_backends_that_differ() {
    let to_service =
        |path| json!({"from": "shop/front", "to": "service/shop/cart", "port": 80, "http": {"path": path}});
    let (found, _) = answers(&offline(false), &[to_service("/items/1"), to_service("/items/7")]);
    assert!(found[0].get("differs").is_none());
    let verdicts = [&found[1]["verdict"], &found[1]["differs"][0]["verdict"]];
    assert!(
        verdicts.contains(&&json!("allow")) && verdicts.contains(&&json!("deny")),
        "{}",
        found[1]
    );
}

#[test]
fn a_bad_line_has_its_error_in_its_place() {
    let (found, errors) = answers(
        &offline(false),
        &[
            json!({"from": "shop/nobody", "to": "shop/cart", "port": 8080}),
            get("/items/1"),
            json!({"from": "shop/front", "to": "shop/cart", "port": 8080, "htp": {}}),
            json!({"from": "shop/front", "to": "shop/cart", "port": 8080, "ip": 5}),
            json!(7),
        ],
    );
    let verdicts: Vec<_> = found.iter().map(|a| a["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["error", "allow", "error", "error", "error"]);
    assert_eq!(4, errors);
    assert!(
        found[0]["reason"]
            .as_str()
            .unwrap()
            .contains("line 1: `from` `shop/nobody`")
    );
}

#[test]
fn a_line_that_is_too_long_has_one_error_in_its_place() {
    let long = json!({"from": "shop/front", "to": "shop/cart", "port": 8080,
                      "http": {"headers": {"x": "a".repeat(3 << 20)}}});
    let (found, errors) = answers(&offline(false), &[long, get("/items/1")]);
    assert_eq!(1, errors);
    assert_eq!(found[0]["verdict"], "error");
    assert_eq!(found[1]["verdict"], "allow");
}

#[test]
fn a_service_account_is_no_source_of_a_line() {
    let line =
        json!({"from": "shop/sa/front", "to": "shop/cart", "port": 8080, "http": {"path": "/items/1"}});
    let (found, errors) = answers(&offline(false), &[line]);
    assert_eq!((1, &json!("error")), (errors, &found[0]["verdict"]));
}

#[test]
fn a_pod_without_the_port_that_a_service_names_is_not_behind_it() {
    let mesh = "
apiVersion: v1
kind: Pod
metadata: {name: with, namespace: shop, labels: {app: cart}}
spec: {containers: [{name: a, ports: [{name: web, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: without, namespace: shop, labels: {app: cart}}
spec: {containers: [{name: a}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec: {rules: [{to: [{operation: {ports: [\"8080\"]}}]}]}
";
    let manifests = manifest::read_str("mesh.yaml", mesh).unwrap();
    let offline = Offline::new(&manifests, &[], false).unwrap();
    let line = json!({"from": "outside", "to": "service/shop/cart", "port": 80, "http": {}});
    let (found, _) = answers(&offline, &[line]);
    assert_eq!(found[0]["verdict"], "allow");
    assert!(found[0].get("differs").is_none(), "{}", found[0]);
}

#[test]
fn who_asks_somebody_of_whom_the_files_say_nothing_waits_for_the_answer() {
    let ask = r#"
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: shop}
spec:
  action: CUSTOM
  provider: {name: ext}
  selector: {matchLabels: {app: cart}}
  rules: [{to: [{operation: {ports: ["9090"]}}]}]
"#;
    let mesh = |providers: &str| {
        format!(
            "{MESH}{ask}---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\n\
             data:\n  mesh: |\n    trustDomain: cluster.local\n    accessLogFile: /dev/stdout\n{providers}"
        )
    };
    let named = |name: &str| {
        let settings = "envoyExtAuthzGrpc: {service: ext.shop, port: 9000}";
        format!("    extensionProviders:\n    - name: {name}\n      {settings}\n")
    };
    let line = json!({"from": "shop/front", "to": "shop/cart", "port": 9090});
    let allow_all = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                     metadata: {name: all, namespace: shop}\nspec: {rules: [{}]}\n";
    for (text, verdict, reason) in [
        (
            format!("{MESH}{ask}{allow_all}"),
            "custom",
            "needs an external authorizer",
        ),
        (
            format!("{}{allow_all}", mesh(&named("ext"))),
            "custom",
            "needs an external authorizer",
        ),
        (
            format!("{}{allow_all}", mesh(&named("other"))),
            "deny",
            "no authorizer can be asked",
        ),
    ] {
        let manifests = manifest::read_str("mesh.yaml", &text).unwrap();
        let offline = Offline::new(&manifests, &[], false).unwrap();
        let (answers, errors) = answers(&offline, std::slice::from_ref(&line));
        assert_eq!(errors, 0, "{answers:?}");
        assert_eq!(
            (&answers[0]["verdict"], &answers[0]["reason"]),
            (&json!(verdict), &json!(reason))
        );
        assert_eq!(answers[0]["policy"], json!("shop/ask"));
    }
}
