//! The same stock Envoy as people run it without Thyra: an ordinary reverse proxy, and a pair of sidecars.
//!
//! Invariant: it enforces the policy that ours enforces, and is spared what ours isn't: no access log, and no
//! redirection by the kernel before either sidecar (a client asks its own at its port).

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use serde_json::{Value, json};

use super::http::Way;
use crate::{load, mesh, netns};

/// As the agent starts its own.
const CONCURRENCY: &str = "2";
const START: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
/// A certificate's paths.
const TYPE: &str = "type.googleapis.com/envoy";

/// A running Envoy.
pub(super) struct Rival(Child);

impl Drop for Rival {
    fn drop(&mut self) {
        // It is a child of this process: the kill reaches it, or it is gone already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Rival {
    /// Starts one in a pod, on a CPU, with these listeners and clusters; its files go to `folder`.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) fn start(
        envoy: &Path,
        folder: &Path,
        (pod, cpu): (&str, usize),
        (listeners, clusters): (Vec<Value>, Vec<Value>),
    ) -> Result<Self> {
        let config = json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
        let path = folder.join(format!("{pod}.json"));
        std::fs::write(&path, config.to_string())?;
        let log = std::fs::File::create(path.with_extension("log"))?;
        let mut command = Command::new(envoy);
        command
            .arg("--config-path")
            .arg(&path)
            .args(["--concurrency", CONCURRENCY, "--disable-hot-restart"])
            .args(["--log-level", "warning"])
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log));
        let pod = pod.to_owned();
        // A child is where its parent's thread is.
        let started = std::thread::spawn(move || {
            load::pin(cpu)?;
            netns::enter(&pod)?;
            command.spawn().with_context(|| format!("start `{command:?}`"))
        });
        let child = started
            .join()
            .map_err(|_| anyhow::anyhow!("the start of Envoy panicked"))??;
        Ok(Self(child))
    }
}

/// Waits until requests pass, and looks whether those that policy refuses don't.
///
/// # Errors
/// When it isn't so.
pub(super) fn probe(way: &Way) -> Result<()> {
    let since = Instant::now();
    while way.status("GET", "/public/page")? != Some(200) {
        ensure!(
            since.elapsed() < START,
            "{}: no answer within {START:?}",
            way.name
        );
        std::thread::sleep(POLL);
    }
    for (method, path) in [
        ("GET", "/admin/keys"),
        ("POST", "/public/page"),
        ("GET", "/other"),
    ] {
        let status = way.status(method, path)?;
        ensure!(
            status == Some(403),
            "{}: {method} {path} gets {status:?}, although policy refuses it",
            way.name
        );
    }
    Ok(())
}

/// The listener of a reverse proxy or a sidecar; `who` is what the rules read of the client beside its request.
pub(super) fn listener(port: u16, cluster: &str, rules: Option<&Value>, tls: Option<&Certificate>) -> Value {
    let mut filters: Vec<Value> = rules.map(rbac).into_iter().flatten().collect();
    filters.push(json!({
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": format!("{TYPE}.extensions.filters.http.router.v3.Router"),
            "suppress_envoy_headers": true,
        },
    }));
    let manager = json!({
        "@type": format!(
            "{TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        ),
        "stat_prefix": "bench",
        "normalize_path": true,
        "http_filters": filters,
        "route_config": {"virtual_hosts": [{
            "name": "any", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
        }]},
    });
    let mut chain = json!({
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
    });
    if let Some(certificate) = tls {
        chain["transport_socket"] = certificate.socket("Downstream");
    }
    json!({
        "name": format!("port-{port}"),
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "filter_chains": [chain],
    })
}

/// A cluster of one address.
pub(super) fn cluster(name: &str, to: SocketAddr, tls: Option<&Certificate>) -> Value {
    let address = json!({"socket_address": {"address": to.ip().to_string(), "port_value": to.port()}});
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    });
    if let Some(certificate) = tls {
        cluster["transport_socket"] = certificate.socket("Upstream");
    }
    cluster
}

/// A client by its address.
pub(super) fn from_address(address: Ipv4Addr) -> Value {
    json!({"direct_remote_ip": {"address_prefix": address.to_string(), "prefix_len": 32}})
}

/// A client by the name in its certificate.
pub(super) fn from_certificate(workload: u32) -> Value {
    json!({"authenticated": {"principal_name": {"exact": spiffe(workload)}}})
}

/// Any client: a residual has no identity in it either.
pub(super) fn from_anybody() -> Value {
    json!({"any": true})
}

/// DENY before ALLOW, as istiod writes them.
fn rbac(who: &Value) -> [Value; 2] {
    let path = |prefix: &str| json!({"url_path": {"path": {"prefix": prefix}}});
    let get = json!({"header": {"name": ":method", "string_match": {"exact": "GET"}}});
    let filter = |action: &str, permission: Value, who: &Value| {
        json!({
            "name": format!("envoy.filters.http.rbac.{action}"),
            "typed_config": {
                "@type": format!("{TYPE}.extensions.filters.http.rbac.v3.RBAC"),
                "rules": {"action": action, "policies": {
                    action: {"permissions": [permission], "principals": [who]},
                }},
            },
        })
    };
    let allowed = json!({"and_rules": {"rules": [get, path("/public")]}});
    [
        filter("DENY", path("/admin"), &json!({"any": true})),
        filter("ALLOW", allowed, who),
    ]
}

fn spiffe(workload: u32) -> String {
    format!("spiffe://{}", mesh::principal(workload))
}

/// A workload's certificate, its key, and who signs all of them: paths of PEM files.
pub(super) struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    root: PathBuf,
}

impl Certificate {
    fn socket(&self, side: &str) -> Value {
        let file = |path: &Path| json!({"filename": path.display().to_string()});
        let common = json!({
            "tls_certificates": [{
                "certificate_chain": file(&self.chain),
                "private_key": file(&self.key),
            }],
            "validation_context": {"trusted_ca": file(&self.root)},
        });
        let mut context = json!({
            "@type": format!("{TYPE}.extensions.transport_sockets.tls.v3.{side}TlsContext"),
            "common_tls_context": common,
        });
        if side == "Downstream" {
            context["require_client_certificate"] = json!(true);
        }
        json!({"name": "envoy.transport_sockets.tls", "typed_config": context})
    }
}

/// Certificates of the workloads, written to `folder`.
///
/// # Errors
/// When one can't be made or written.
pub(super) fn certificates<const N: usize>(folder: &Path, workloads: [u32; N]) -> Result<[Certificate; N]> {
    let root_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // A certificate of its signer's name would count as signed by itself.
    params.distinguished_name.push(DnType::CommonName, "bench root");
    let root = params.self_signed(&root_key)?;
    let root_path = folder.join("root.pem");
    std::fs::write(&root_path, root.pem())?;
    let issuer = Issuer::new(params, root_key);
    let certificate = |workload: u32| -> Result<Certificate> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = vec![SanType::URI(spiffe(workload).try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let signed = params.signed_by(&key, &issuer)?;
        let made = Certificate {
            chain: folder.join(format!("{workload}.pem")),
            key: folder.join(format!("{workload}.key")),
            root: root_path.clone(),
        };
        std::fs::write(&made.chain, signed.pem())?;
        std::fs::write(&made.key, key.serialize_pem())?;
        Ok(made)
    };
    let made = workloads
        .into_iter()
        .map(certificate)
        .collect::<Result<Vec<_>>>()?;
    made.try_into()
        .map_err(|_| anyhow::anyhow!("another number of certificates"))
}
