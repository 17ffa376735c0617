//! The production control plane: etcd, kube-apiserver, istiod and kube-proxy, with the lab in the kubelet's
//! and the endpoint
//! controller's place.
//!
//! Invariant: agents learn nothing from the lab but their pods' interfaces; all else comes through the API
//! server and istiod.

mod api;
mod install;
mod pki;
mod proxy;
mod shape;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use api::Api;
pub(crate) use install::Versions;
use pki::Pki;

use super::model::{Model, NodeAddresses};
use super::netns::Netns;
use super::object::text;
use super::process::{Process, Spec};
use super::registry::RunDir;

/// Where istiod lives, and the mesh's root namespace by default.
const ISTIO_SYSTEM: &str = "istio-system";
/// The agents' service account.
const AGENT_ACCOUNT: &str = "thyra-agent";
/// How long a part may take to come up on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(50);
const TOKEN_SECONDS: u64 = 86_400;

/// All of it.
pub(crate) struct Cluster {
    api: Api,
    binaries: PathBuf,
    folder: PathBuf,
    processes: Vec<Process>,
    /// EndpointSlices as last applied, by `namespace/name`.
    slices: BTreeMap<String, Value>,
}

impl Cluster {
    /// Starts etcd, the API server and istiod in the first node.
    ///
    /// # Errors
    /// A program is missing or doesn't come up; then with the end of its log.
    pub(crate) async fn start(dir: &RunDir, home: &Netns) -> anyhow::Result<Self> {
        let binaries = binaries()?;
        let folder = dir.path().join("cluster");
        fs::create_dir_all(&folder).with_context(|| format!("can't make `{}`", folder.display()))?;
        let pki = Pki::create(&folder)?;
        let part = |name: &str, flags, environment| {
            Process::start(spec(home, &folder, &binaries, name, flags, environment))
        };
        let mut processes = vec![
            part("etcd", etcd_flags(&folder), &[])?,
            part("kube-apiserver", api_server_flags(&folder), &[])?,
        ];
        let api = Api::new(home.clone(), &pki)?;
        wait_for(&mut processes, "the API server", || api.get("/readyz")).await?;
        let mut cluster = Self {
            api,
            binaries,
            folder,
            processes,
            slices: BTreeMap::new(),
        };
        cluster.create_resource_kinds().await?;
        cluster.create_namespace(ISTIO_SYSTEM).await?;
        let flags = istiod_flags(&cluster.folder);
        let istiod = spec(
            home,
            &cluster.folder,
            &cluster.binaries,
            "istiod",
            flags,
            ISTIOD_ENVIRONMENT,
        );
        let istiod = Process::start(istiod)?;
        cluster.processes.push(istiod);
        Ok(cluster)
    }

    /// istio's own custom resources.
    async fn create_resource_kinds(&mut self) -> anyhow::Result<()> {
        let path = self.binaries.join("../crds/crd-all.gen.yaml");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("can't read `{}`; build it with `make cluster`", path.display()))?;
        let documents = text
            .split("\n---")
            .filter_map(|document| Some((crd_name(document)?, document)));
        let applied = documents.map(|(name, document)| self.api.apply_crd(name, document));
        futures::future::try_join_all(applied).await?;
        for path in shape::CUSTOM_LISTS {
            wait_for(&mut self.processes, "istio's resource kinds", || {
                self.api.get(path)
            })
            .await?;
        }
        Ok(())
    }

    /// Waits for istiod's root certificate and writes what each node's agent needs; returns their flags.
    ///
    /// # Errors
    /// istiod doesn't come up.
    pub(crate) async fn credentials(&mut self, model: &Model) -> anyhow::Result<Vec<Vec<(String, String)>>> {
        let mut all = Vec::new();
        let path = format!("/api/v1/namespaces/{ISTIO_SYSTEM}/configmaps/istio-ca-root-cert");
        let map = wait_for(&mut self.processes, "istiod", || self.api.get(&path)).await?;
        let root = self.folder.join("root-cert.pem");
        write(&root, &text(&map, "/data/root-cert.pem"))?;
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": AGENT_ACCOUNT, "namespace": ISTIO_SYSTEM}
        });
        self.api.apply(&account).await?;
        for (index, node) in model.nodes.iter().enumerate() {
            let pod = self.api.apply(&agent_pod(index, node)).await?;
            let token = self.token(&pod).await?;
            let path = self.folder.join(format!("token-{index}"));
            write(&path, &token)?;
            let flag = |key: &str, value: String| (key.to_owned(), value);
            let [own, _] = NodeAddresses::of(0).own;
            all.push(vec![
                flag("policy-source", "auto".to_owned()),
                flag("xds-address", format!("https://{own}:15012")),
                flag("xds-server-name", format!("istiod.{ISTIO_SYSTEM}.svc")),
                flag("xds-root", root.display().to_string()),
                flag("xds-token", path.display().to_string()),
                flag("kubeconfig", self.folder.join("kubeconfig").display().to_string()),
                flag("pod-name", text(&pod, "/metadata/name")),
            ]);
        }
        Ok(all)
    }

    /// Starts again what has ended; says what and how.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn revive(&mut self) -> anyhow::Result<Vec<String>> {
        let mut texts = Vec::new();
        for process in &mut self.processes {
            texts.extend(process.revive()?);
        }
        Ok(texts)
    }

    /// A service-account token bound to the agent's pod, for istiod's audience.
    async fn token(&self, pod: &Value) -> anyhow::Result<String> {
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {
                "audiences": ["istio-ca"], "expirationSeconds": TOKEN_SECONDS,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod",
                    "name": pod.pointer("/metadata/name"), "uid": pod.pointer("/metadata/uid")
                }
            }
        });
        let path = format!("/api/v1/namespaces/{ISTIO_SYSTEM}/serviceaccounts/{AGENT_ACCOUNT}/token");
        let answer = self
            .api
            .post(&path, &request)
            .await
            .context("no token for the agent")?;
        Ok(text(&answer, "/status/token"))
    }
}

fn spec(
    netns: &Netns,
    folder: &Path,
    binaries: &Path,
    name: &str,
    flags: Vec<String>,
    environment: &'static [(&'static str, &'static str)],
) -> Spec {
    let node = netns.name().rsplit('-').next().unwrap_or_default();
    Spec {
        name: format!("`{name}`"),
        program: binaries.join(name),
        arguments: flags.into_iter().map(Into::into).collect(),
        environment,
        folder: folder.to_owned(),
        log: folder.join(format!("{name}-{node}.log")),
        netns: netns.clone(),
    }
}

/// The pod that the agent is on this node, as its DaemonSet would have made it.
fn agent_pod(index: usize, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{AGENT_ACCOUNT}-{index}"), "namespace": ISTIO_SYSTEM},
        "spec": {
            "serviceAccountName": AGENT_ACCOUNT, "nodeName": node, "hostNetwork": true,
            "containers": [{"name": "agent", "image": "thyra-agent"}]
        }
    })
}

/// `metadata.name` of a CRD; none of what is no CRD.
fn crd_name(document: &str) -> Option<&str> {
    let name = document.lines().find_map(|line| line.strip_prefix("  name: "))?;
    name.ends_with(".istio.io").then_some(name)
}

fn etcd_flags(folder: &Path) -> Vec<String> {
    let flags = [
        "--unsafe-no-fsync",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=default=http://127.0.0.1:2380",
    ];
    let data = format!("--data-dir={}", folder.join("etcd").display());
    flags
        .iter()
        .map(|flag| (*flag).to_owned())
        .chain([data])
        .collect()
}

fn api_server_flags(folder: &Path) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    let [own, _] = NodeAddresses::of(0).own;
    vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        "--bind-address=::".to_owned(),
        format!("--advertise-address={own}"),
        "--secure-port=6443".to_owned(),
        format!("--cert-dir={}", folder.display()),
        format!("--tls-cert-file={}", file("api.crt")),
        format!("--tls-private-key-file={}", file("api.key")),
        format!("--token-auth-file={}", file("tokens.csv")),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112".to_owned(),
        "--authorization-mode=RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        // There is no controller manager that would make service accounts.
        "--disable-admission-plugins=ServiceAccount".to_owned(),
    ]
}

fn istiod_flags(folder: &Path) -> Vec<String> {
    vec![
        "discovery".to_owned(),
        format!("--kubeconfig={}", folder.join("kubeconfig").display()),
        "--grpcAddr=127.0.0.1:15010".to_owned(),
        "--secureGRPCAddr=:15012".to_owned(),
        "--httpAddr=127.0.0.1:15080".to_owned(),
        "--httpsAddr=127.0.0.1:15017".to_owned(),
        "--monitoringAddr=127.0.0.1:15014".to_owned(),
        "--ctrlz_port=0".to_owned(),
        "--domain=cluster.local".to_owned(),
    ]
}

const ISTIOD_ENVIRONMENT: &[(&str, &str)] = &[
    ("PILOT_ENABLE_AMBIENT", "true"),
    ("PILOT_ENABLE_GATEWAY_API", "false"),
    ("AMBIENT_ENABLE_DRY_RUN_AUTHORIZATION_POLICY", "true"),
    ("CLUSTER_ID", "Kubernetes"),
    ("POD_NAME", "istiod-lab"),
    ("POD_NAMESPACE", ISTIO_SYSTEM),
];

/// `$THYRA_CLUSTER_BIN`, else where `make cluster` puts them.
pub(crate) fn binaries() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("THYRA_CLUSTER_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let cache = std::env::var_os("THYRA_CACHE").map(PathBuf::from);
            let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/thyra"));
            cache
                .or(home)
                .context("neither THYRA_CACHE nor HOME is set; set one of them")?
                .join("cluster/bin")
        }
    };
    for name in ["etcd", "kube-apiserver", "istiod", "kube-proxy"] {
        if !path.join(name).is_file() {
            bail!(
                "there is no `{}`; build it with `make cluster`",
                path.join(name).display()
            );
        }
    }
    Ok(path)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("can't write `{}`", path.display()))
}

/// Asks until there is an answer, as long as every process lives.
async fn wait_for<F>(processes: &mut [Process], what: &str, ask: impl Fn() -> F) -> anyhow::Result<Value>
where
    F: Future<Output = Result<Value, api::ApiError>>,
{
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        for process in processes.iter_mut() {
            process.check()?;
        }
        if Instant::now() > deadline {
            let last = processes.last().map(Process::last_words).unwrap_or_default();
            bail!("{what} doesn't come up ({error}):\n{last}");
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::crd_name;

    #[test]
    fn a_crd_is_known_by_its_name() {
        let document = "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata:\n  \
                        annotations:\n    x: y\n  name: authorizationpolicies.security.istio.io\nspec:\n";
        assert_eq!(
            crd_name(document),
            Some("authorizationpolicies.security.istio.io")
        );
        assert_eq!(crd_name("# nothing"), None);
    }
}
