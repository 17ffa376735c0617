//! What the manifest reader accepts, what it refuses and how it says so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use thyra_policy_compiler::authorizer::{Check, Provider};
use thyra_policy_compiler::manifest::{self, Body, Manifests, Object};
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, L7Verdict, MtlsMode, PolicyAction, StringMatch,
};
use thyra_policy_compiler::world::{AppProtocol, NodeOptions, WorkloadKind};

fn read(text: &str) -> Manifests {
    manifest::read_str("test.yaml", text).unwrap_or_else(|errors| panic!("{errors:#?}"))
}

fn only(text: &str) -> Object {
    let mut manifests = read(text);
    assert_eq!(manifests.objects.len(), 1, "{manifests:?}");
    manifests.objects.remove(0)
}

fn policy(spec: &str) -> AuthorizationPolicy {
    match only(&policy_text(spec)).body {
        Body::AuthorizationPolicy(policy) => policy,
        other => panic!("{other:?}"),
    }
}

fn policy_text(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: p, namespace: shop}}\nspec:\n{spec}\n"
    )
}

fn errors(text: &str) -> Vec<String> {
    match manifest::read_str("f.yaml", text) {
        Ok(read) => panic!("no error in {text:?}: {read:?}"),
        Err(errors) => errors.iter().map(ToString::to_string).collect(),
    }
}

/// The one error, which must contain all of `parts`.
fn refused(text: &str, parts: &[&str]) {
    let errors = errors(text);
    let joined = errors.join("\n");
    for part in parts {
        assert!(joined.contains(part), "{part:?} is not in:\n{joined}");
    }
}

fn policy_refused(spec: &str, parts: &[&str]) {
    refused(&policy_text(spec), parts);
}

#[test]
fn a_policy_is_read_whole() {
    let p = policy(
        "  selector: {matchLabels: {app: cart}}
  action: DENY
  rules:
  - from:
    - source:
        principals: [\"cluster.local/ns/shop/sa/front\", \"*\"]
        notNamespaces: [\"team-*\"]
        ipBlocks: [1.2.3.4/8, \"::ffff:5.6.7.8\"]
    - source: {serviceAccounts: [front, other/back]}
    to:
    - operation: {ports: [\"8080\"], notPaths: [/healthz]}
    when:
    - {key: destination.port, values: [\"8080\"], notValues: [\"9090\"]}
    - {key: \"request.headers[x-team]\", values: [blue]}",
    );
    assert_eq!(p.action, PolicyAction::Deny);
    assert_eq!(p.selector.as_ref().map(|s| s["app"].clone()), Some("cart".into()));
    let rule = &p.rules[0];
    assert_eq!(rule.from[0].principals.values[1], StringMatch::Present);
    assert_eq!(
        rule.from[0].namespaces.not_values,
        [StringMatch::Prefix("team-".into())]
    );
    let blocks: Vec<String> = rule.from[0]
        .ip_blocks
        .values
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(blocks, ["1.0.0.0/8", "5.6.7.8/32"]);
    assert_eq!(rule.from[1].service_accounts.values[0].namespace, "shop");
    assert_eq!(rule.from[1].service_accounts.values[1].namespace, "other");
    assert_eq!(rule.to[0].ports.values, [8080]);
    assert!(matches!(&rule.when[0], Condition::DestinationPort(f) if f.not_values == [9090]));
    assert!(p.unknown.is_empty() && rule.unknown.is_empty());
}

#[test]
fn an_empty_selector_is_not_an_absent_one() {
    assert_eq!(policy("  selector: {}").selector, Some(Default::default()));
    assert_eq!(policy("  action: ALLOW").selector, None);
    assert!(policy("  {}").rules.is_empty());
    assert_eq!(policy("  rules: [{}]").rules.len(), 1);
}

#[test]
fn an_unknown_field_is_named_with_its_place_and_a_mend() {
    policy_refused(
        "  rules:\n  - from:\n    - source: {principal: [a]}",
        &[
            "f.yaml:7:16",
            "unknown field `principal` in `spec.rules[0].from[0].source`",
            "did you mean `principals`?",
        ],
    );
    policy_refused("  ruels: []", &["f.yaml:5:3", "did you mean `rules`?"]);
    policy_refused("  rules: [{form: []}]", &["did you mean `from`?"]);
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - name: c\n    imag: x\n",
        &[
            "f.yaml:7:5",
            "unknown field `imag` in `spec.containers[0]`",
            "did you mean `image`?",
        ],
    );
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, lables: {}}\nspec: {containers: [{name: c}]}\n",
        &["labels"],
    );
}

// long: a table, a value each
#[test]
fn bad_values_are_refused_where_they_stand() {
    for (spec, part) in [
        (
            "  rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]",
            "prefix length",
        ),
        (
            "  rules: [{from: [{source: {ipBlocks: [300.1.1.1]}}]}]",
            "`300.1.1.1` is not an IP address",
        ),
        ("  rules: [{from: [{source: {ipBlocks: [\"\"]}}]}]", "empty value"),
        (
            "  rules: [{to: [{operation: {ports: [\"70000\"]}}]}]",
            "`70000` is not a port",
        ),
        (
            "  rules: [{to: [{operation: {ports: [http]}}]}]",
            "`http` is not a port",
        ),
        (
            "  rules: [{to: [{operation: {ports: [8080]}}]}]",
            "put it in quotes",
        ),
        (
            "  rules: [{from: [{source: {principals: [\"spiffe://a/ns/b/sa/c\"]}}]}]",
            "without `spiffe://`",
        ),
        (
            "  rules: [{from: [{source: {principals: [\"cluster.local/shop/front\"]}}]}]",
            "is not a principal",
        ),
        (
            "  rules: [{from: [{source: {principals: [\"\"]}}]}]",
            "empty value",
        ),
        (
            "  rules: [{from: [{source: {namespaces: [on]}}]}]",
            "which YAML reads as the boolean true",
        ),
        (
            "  rules: [{from: [{source: {namespaces: [n]}}]}]",
            "which YAML reads as the boolean false",
        ),
        (
            "  rules: [{from: [{source: {serviceAccounts: [\"a/*\"]}}]}]",
            "`*` is not allowed",
        ),
        (
            "  rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]",
            "can't stand beside",
        ),
        (
            "  rules: [{from: [{source: {trustDomains: [\"a*b\"]}}]}]",
            "not a trust domain",
        ),
        ("  rules: [{from: [{source: {}}]}]", "must not be empty"),
        (
            "  rules: [{from: [{source: {principals: []}}]}]",
            "must not be empty",
        ),
        ("  rules: [{from: []}]", "`spec.rules[0].from` is empty"),
        ("  rules: [{from: }]", "`spec.rules[0].from` is empty"),
        ("  rules: [{to: [{operation: {}}]}]", "must not be empty"),
        (
            "  rules: [{to: [{operation: {paths: [\"/{a}\"]}}]}]",
            "not a path template",
        ),
        (
            "  rules: [{when: [{key: source.uid, values: [a]}]}]",
            "`source.uid` is not a condition key",
        ),
        (
            "  rules: [{when: [{key: source.ip}]}]",
            "neither `values` nor `notValues`",
        ),
        (
            "  rules: [{when: [{key: source.ip, values: [x]}]}]",
            "`x` is not an IP address",
        ),
        ("  action: allow", "`allow` is not an action"),
        (
            "  action: ALLOW\n  provider: {name: x}",
            "belongs to action CUSTOM",
        ),
        ("  action: CUSTOM\n  rules: [{}]", "needs `provider.name`"),
        ("  selector: {matchLabels: {a: \"b*\"}}", "no wildcards"),
        ("  selector: {matchLabels: {a: yes}}", "put it in quotes"),
        (
            "  selector: {matchLabels: {a: b}}\n  targetRefs: [{kind: Service, name: x}]",
            "only one of",
        ),
        (
            "  targetRefs: [{kind: Pod, name: x}]",
            "kind `Pod` of group `` is no target",
        ),
        (
            "  targetRefs: [{group: apps, kind: Service, name: x}]",
            "kind `Service` of group `apps` is no target",
        ),
        (
            "  targetRefs: [{kind: Service, name: x, namespace: ops}]",
            "in the policy's own namespace, `shop`, not in `ops`",
        ),
        (
            "  rules: [{when: [{key: source.principal, values: [\"spiffe://a/ns/b/sa/c\"]}]}]",
            "without `spiffe://`",
        ),
        ("  rules: {}", "`spec.rules` must be a list"),
        ("  rules: [null]", "`spec.rules[0]` must be a mapping"),
    ] {
        policy_refused(spec, &[part, "f.yaml:"]);
    }
}

#[test]
fn what_istiod_takes_is_taken() {
    let p = policy(
        "  rules: [{from: [{source: {principals: [\"td/ns/*/sa/a\", x], notPrincipals: []}}], \
         to: [{operation: {methods: [GET], ports: []}}]}]",
    );
    assert_eq!(
        p.rules[0].from[0].principals.values[0],
        StringMatch::Exact("td/ns/*/sa/a".into())
    );
    assert_eq!(read(&policy_text("  action: DENY")).warnings.len(), 1);
    let experimental = policy("  rules: [{when: [{key: \"experimental.envoy.filters.a[b]\", values: [x]}]}]");
    assert_eq!(experimental.rules[0].unknown.len(), 1);
    assert!(experimental.rules[0].when.is_empty());
}

#[test]
fn what_a_verdict_is_for_is_an_annotation_and_another_word_leaves_it_strict() {
    let text = |value: &str| {
        format!(
            "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\n\
             metadata: {{name: p, annotations: {{thyra.io/l7-verdict: {value}}}}}\nspec: {{}}\n"
        )
    };
    let read = |value: &str| {
        let Body::AuthorizationPolicy(policy) = only(&text(value)).body else {
            panic!()
        };
        policy.l7_verdict
    };
    assert_eq!(read("connection"), L7Verdict::Connection);
    assert_eq!(read("request"), L7Verdict::Request);
    assert_eq!(read("Connection"), L7Verdict::Unread("Connection".into()));
}

#[test]
fn dry_run_is_an_annotation() {
    let text = |value: &str| {
        format!(
            "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\n\
             metadata: {{name: p, annotations: {{istio.io/dry-run: {value}}}}}\nspec: {{}}\n"
        )
    };
    let Body::AuthorizationPolicy(policy) = only(&text("\"true\"")).body else {
        panic!()
    };
    assert!(policy.dry_run);
    assert_eq!(&*policy.reference.namespace, "default");
    refused(&text("\"maybe\""), &["`maybe` is not a boolean"]);
    refused(&text("true"), &["put it in quotes"]);
}

#[test]
fn peer_authentication_has_ports_only_with_a_selector() {
    let text = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: \
            shop}}\nspec: {spec}\n"
        )
    };
    let Body::PeerAuthentication(peer) = only(&text(
        "{selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: \
        PERMISSIVE}}}",
    ))
    .body
    else {
        panic!()
    };
    assert_eq!(peer.mode, MtlsMode::Strict);
    assert_eq!(peer.ports[&9090], MtlsMode::Permissive);
    refused(
        &text("{portLevelMtls: {9090: {mode: STRICT}}}"),
        &["needs a `selector`"],
    );
    refused(&text("{mtls: {mode: strict}}"), &["`strict` is not an mTLS mode"]);
    refused(&text("{mtls: STRICT}"), &["`spec.mtls` must be a mapping"]);
    refused(
        &text("{selector: {matchLabels: {a: b}}, portLevelMtls: {web: {mode: STRICT}}}"),
        &["`spec.portLevelMtls.web` is not a port"],
    );
}

#[test]
fn kinds_are_read_ignored_or_refused() {
    let manifests = read(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: s, namespace: shop}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {name: other}\ndata: {anything: at all}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: VirtualService\n\
         metadata: {name: v}\nspec: {whatever: 1}\n---\n\
         apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n---\n# nothing here\n---\n",
    );
    let kinds: Vec<&str> = manifests.ignored.iter().map(|i| i.kind.as_str()).collect();
    assert_eq!(kinds, ["Secret", "ConfigMap", "VirtualService", "Service"]);
    assert_eq!(manifests.ignored[0].at.to_string(), "test.yaml:1:1");
    assert!(manifests.objects.is_empty());
    for (header, part) in [
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy",
            "did you mean `AuthorizationPolicy`?",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: Policy",
            "unknown kind `Policy`",
        ),
        (
            "apiVersion: security.istio.io/v1alpha1\nkind: AuthorizationPolicy",
            "write `apiVersion: security.istio.io/v1`",
        ),
        (
            "apiVersion: v1\nkind: AuthorizationPolicy",
            "write `apiVersion: security.istio.io/v1`",
        ),
        (
            "apiVersion: extensions/v1beta1\nkind: Deployment",
            "write `apiVersion: apps/v1`",
        ),
        ("apiVersion: v1\nkind: pod", "did you mean `Pod`?"),
        ("kind: Pod", "`apiVersion` is missing"),
        ("apiVersion: v1", "`kind` is missing"),
    ] {
        refused(&format!("{header}\nmetadata: {{name: x}}\nspec: {{}}\n"), &[part]);
    }
    refused("just text", &["must be a mapping"]);
}

#[test]
fn lists_and_json_are_the_same_as_documents() {
    let yaml = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: \
    a}}\n\
                - {apiVersion: v1, kind: ServiceAccount, metadata: {name: b, namespace: a}}\n";
    let json = "{\"apiVersion\": \"v1\",\n\t\"kind\": \"List\", \"items\": [\n\
                {\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"a\"}},\n\
                {\"apiVersion\": \"v1\", \"kind\": \"ServiceAccount\", \
                \"metadata\": {\"name\": \"b\", \"namespace\": \"a\"}}]}";
    let keys = |text| read(text).objects.iter().map(Object::key).collect::<Vec<_>>();
    assert_eq!(keys(yaml), keys(json));
    assert_eq!(keys(yaml).len(), 2);
}

#[test]
fn the_same_object_twice_is_an_error_when_it_differs() {
    let one = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";
    assert_eq!(read(&format!("{one}---\n{one}")).objects.len(), 1);
    let other = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: z}}\n";
    refused(
        &format!("{one}---\n{other}"),
        &["f.yaml:5:1", "stands twice", "f.yaml:1:1"],
    );
    refused("a: 1\na: 2\n", &["f.yaml:2:1", "key `a` stands twice", "line 1"]);
}

const SHOP: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: front, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: front}}
  template:
    metadata: {labels: {app: front}}
    spec:
      serviceAccountName: front
      securityContext: {runAsUser: 1000}
      containers:
      - name: web
        image: docker.io/x:1
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080, name: http-web}, {containerPort: 53, name: dns, protocol: UDP}]
        readinessProbe: {httpGet: {path: /, port: http-web}}
        resources: {limits: {cpu: 100m}}
        volumeMounts: [{name: tmp, mountPath: /tmp}]
      volumes: [{name: tmp, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: back, namespace: shop, labels: {app: back}}
spec: {containers: [{name: c, ports: [{containerPort: 9000}]}]}
status: {podIPs: [{ip: 10.244.0.2}, {ip: \"fd00:10:244::2\"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: shop}
spec: {hostNetwork: true, containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec:
  selector: {app: front}
  ports:
  - {name: http, port: 80, targetPort: http-web}
  - {name: tcp-x, port: 81, targetPort: 8081}
  - {port: 53, protocol: UDP}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop}
spec: {address: 10.9.9.9, serviceAccount: vm, labels: {app: vm}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: corp.example
    trustDomainAliases: [old.example]
    rootNamespace: istio-config
    extensionProviders:
    - name: opa
      envoyExtAuthzGrpc: {service: opa, port: 9191}
";

/// A MeshConfig with this provider, as a user writes it.
fn provided(provider: &str) -> Result<Arc<Provider>, String> {
    let text = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    \
         extensionProviders:\n    - name: ext\n      {provider}\n"
    );
    let found = manifest::read_str("mesh.yaml", &text).map_err(|errors| errors[0].to_string())?;
    let world = manifest::world(&found, NodeOptions::default()).map_err(|error| error.to_string())?;
    Ok(world.mesh.provider("ext"))
}

#[test]
fn a_provider_is_read_as_istio_writes_it() {
    let whole = provided(
        "envoyExtAuthzHttp: {service: foo/ext.foo.svc.cluster.local, port: \"8000\", timeout: 0.5s, failOpen: true, \
         statusOnError: \"503\", pathPrefix: /check, includeRequestHeadersInCheck: [x-a, \"x-b*\"], \
         includeAdditionalHeadersInCheck: {x-c: d}, headersToUpstreamOnAllow: [x-e], headersToDownstreamOnDeny: [x-f], \
         headersToDownstreamOnAllow: [x-g], \
         includeRequestBodyInCheck: {maxRequestBytes: 4096, allowPartialMessage: true}}",
    );
    let whole = whole.expect("a provider");
    let asked = whole.authorizer.as_ref().expect("it can be asked");
    assert_eq!(asked.target.to_string(), "foo/ext.foo.svc.cluster.local:8000");
    assert_eq!(
        (asked.timeout.as_millis(), asked.fail_open, asked.status_on_error),
        (500, true, 503)
    );
    assert_eq!(
        asked
            .body
            .map(|body| (body.max_bytes, body.partial, body.as_bytes)),
        Some((4096, true, false))
    );
    let Check::Http(check) = &asked.check else {
        panic!("{asked:?}")
    };
    assert_eq!(
        (check.path_prefix.as_str(), &check.request_headers[..]),
        ("/check", &["x-a".to_owned(), "x-b*".to_owned()][..])
    );
    assert_eq!(check.added_headers["x-c"], "d");
    for (provider, why) in [
        (
            "envoyExtAuthzGrpc: {service: ext, port: 9000, statusOnError: teapot}",
            "statusOnError",
        ),
        (
            "envoyExtAuthzGrpc: {service: ext, port: 9000, timeout: soon}",
            "timeout",
        ),
        ("envoyExtAuthzGrpc: {service: ext}", "port"),
        ("envoyExtAuthzGrpc: {port: 9000}", "service"),
        ("zipkin: {service: ext, port: 9411}", "zipkin"),
    ] {
        let told = provided(provider).expect("a mesh config");
        let told = told.authorizer.as_ref().expect_err(provider);
        assert!(told.contains(why), "{provider}: {told}");
    }
    for (provider, why) in [
        (
            "envoyExtAuthzGrpc: {servise: ext, port: 9000}",
            "did you mean `service`?",
        ),
        (
            "envoyExtAuthzHttp: {service: ext, port: [1]}",
            "port` must be a whole number",
        ),
        (
            "envoyExtAuthzGrpc: {service: ext, port: 1, pathPrefix: /}",
            "pathPrefix",
        ),
    ] {
        let told = provided(provider).expect_err(provider);
        assert!(
            told.contains("mesh.yaml:8") && told.contains(why),
            "{provider}: {told}"
        );
    }
}

#[test]
fn a_world_is_what_istiod_would_tell() {
    let manifests = read(SHOP);
    let world = manifest::world(&manifests, NodeOptions::default()).expect("a world");
    assert_eq!(world.mesh.trust_domain, "corp.example");
    assert_eq!(world.mesh.root_namespace, "istio-config");
    let opa = world.mesh.provider("opa");
    let asked = opa.authorizer.as_ref().expect("it can be asked");
    assert_eq!(
        (asked.target.to_string(), &asked.check),
        ("opa:9191".into(), &Check::Grpc)
    );
    let front = &world.workloads["Kubernetes//Pod/shop/front"];
    let addresses: Vec<String> = front.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(
        addresses,
        ["10.244.0.3", "fd00:10:244::3"],
        "the addresses of `back` are taken"
    );
    assert_eq!(front.service_account, "front");
    let ports = &front.services["shop/front.shop.svc.cluster.local"];
    assert_eq!(
        (ports[0].port, ports[0].target_port, ports[0].protocol),
        (80, 8080, AppProtocol::Http)
    );
    assert_eq!(
        (ports[1].port, ports[1].target_port, ports[1].protocol),
        (81, 8081, AppProtocol::NotHttp)
    );
    assert_eq!(ports.len(), 2, "UDP is not judged");
    assert!(world.workloads["Kubernetes//Pod/shop/agent"].host_network);
    let entry = &world.workloads["Kubernetes/networking.istio.io/WorkloadEntry/shop/vm"];
    assert_eq!(entry.kind, WorkloadKind::Other);
    let names: Vec<&str> = world.endpoints.values().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["front", "back"], "a host-network pod is no endpoint");
    let service = &world.services["shop/front.shop.svc.cluster.local"];
    let vips: Vec<String> = service.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["10.96.0.10", "fd00:10:96::a"]);
}

#[test]
fn a_controllers_pod_can_be_applied_by_itself() {
    let manifests = read(SHOP);
    let pod = manifests.pods().next().expect("front");
    assert_eq!(pod.manifest["kind"], "Pod");
    assert_eq!(pod.manifest["metadata"]["name"], "front");
    assert_eq!(pod.manifest["metadata"]["labels"]["app"], "front");
    assert_eq!(
        pod.manifest["spec"]["containers"][0]["ports"][0]["containerPort"],
        8080
    );
    assert_eq!(manifests.objects[0].raw["spec"]["replicas"], 3);
}

#[test]
fn mesh_config_errors_are_in_the_files_lines() {
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n \
     mesh: |\n    \
                trustDomain: a\n    trustDomian: b\n";
    refused(text, &["f.yaml:7:5", "did you mean `trustDomain`?"]);
}

#[test]
fn two_pods_of_one_name_are_refused() {
    let text = format!(
        "{SHOP}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: front, namespace: shop}}\nspec: \
        {{containers: [{{name: c}}]}}\n"
    );
    let error = manifest::addresses(&read(&text), 1).expect_err("two pods `front`");
    assert!(error.to_string().contains("second pod `shop/front`"), "{error}");
}

#[test]
fn apply_replaces_and_delete_removes() {
    let mut manifests = read(&policy_text("  action: ALLOW"));
    manifests.apply(read(&policy_text("  action: DENY\n  rules: [{}]")));
    assert_eq!(manifests.objects.len(), 1);
    assert!(
        matches!(&manifests.objects[0].body, Body::AuthorizationPolicy(p) if p.action == PolicyAction::Deny)
    );
    assert_eq!(manifests.delete(&read(&policy_text("  {}"))).len(), 1);
    assert!(manifests.objects.is_empty());
}

#[test]
fn an_object_in_force_keeps_what_cannot_be_read_as_unknown() {
    let json = serde_json::json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop", "resourceVersion": "7", "managedFields": [{}]},
        "spec": {"action": "DENY", "later": 1, "rules": [
            {"from": [{"source": {"ipBlocks": ["x"], "later": ["a"]}}],
             "to": [{"operation": {"ports": ["99999"]}}]},
            {"when": [{"key": "later.key", "values": ["a"]}], "later": {}},
        ]},
    });
    let object = manifest::object_from_json("api", &json)
        .expect("kept")
        .expect("a policy");
    let Body::AuthorizationPolicy(policy) = object.body else {
        panic!()
    };
    assert_eq!(policy.version, "7");
    let names = |list: &[thyra_policy_compiler::policy::Unknown]| {
        list.iter().map(|u| u.0.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(&policy.unknown), ["spec.later"]);
    assert_eq!(
        names(&policy.rules[0].from[0].unknown),
        [
            "spec.rules[0].from[0].source.later",
            "spec.rules[0].from[0].source.ipBlocks[0]"
        ]
    );
    assert_eq!(
        names(&policy.rules[0].to[0].unknown),
        ["spec.rules[0].to[0].operation.ports[0]"]
    );
    assert_eq!(
        names(&policy.rules[1].unknown),
        ["spec.rules[1].later", "spec.rules[1].when[0]"]
    );
}

#[test]
fn hostile_input_ends_soon_and_never_panics() {
    let bomb = (1..30).fold("a0: &a0 [x, x]\n".to_owned(), |text, n| {
        let before = n - 1;
        format!("{text}a{n}: &a{n} [*a{before}, *a{before}]\n")
    });
    let deep = (1..2000).fold("a0: &a0 [x]\n".to_owned(), |text, n| {
        let before = n - 1;
        format!("{text}a{n}: &a{n} [[[[[*a{before}]]]]]\n")
    });
    let million = 2 << 20;
    for (name, text) in [
        ("bomb", bomb),
        ("deep aliases", deep),
        ("brackets", "[".repeat(10 << 20)),
        ("braces", "{".repeat(million)),
        ("map in map", "a: {".repeat(million / 4)),
        ("dashes", "- ".repeat(million / 2)),
        ("questions", "? ".repeat(million / 2)),
        ("colons", ": ".repeat(million / 2)),
        ("anchors", "&a ".repeat(million / 3)),
        ("bangs", "! ".repeat(million / 2)),
        ("quote", format!("a: \"{}", "x".repeat(million))),
        ("items", "- a\n".repeat(million / 4)),
        ("commas", format!("[{}]", ",".repeat(million))),
        ("documents", "---\n".repeat(million / 4)),
        ("comments", "#\n".repeat(million / 2)),
        ("one line", "a".repeat(10 << 20)),
        ("spaces", " ".repeat(million)),
        ("tabs", "\t".repeat(million)),
        ("self", "&a [*a]".to_owned()),
        ("nul", "apiVersion: v1\0\nkind: Pod\n".to_owned()),
        ("percent", "%YAML 9.9\n---\na".to_owned()),
        ("too big", "a".repeat(20 << 20)),
    ] {
        let start = Instant::now();
        let result = manifest::read_str("f.yaml", &text);
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{name} took {:?}",
            start.elapsed()
        );
        match result {
            Ok(read) => assert!(read.objects.is_empty(), "{name}"),
            Err(errors) => assert!(!errors.is_empty() && errors.len() <= 50, "{name}"),
        }
    }
    let error = manifest::read_bytes("f.yaml", b"a: b\nc: \xff").expect_err("not UTF-8");
    assert_eq!(
        error[0].to_string(),
        "f.yaml:2:4: not UTF-8; save the file as UTF-8"
    );
    refused("a: b\nc: \0", &["f.yaml:2:4", "control character"]);
}
