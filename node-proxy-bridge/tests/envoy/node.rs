//! A node's part: an Envoy, the bridge that feeds it, and a folder of their own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::bridge::{Bridge, BridgeConfig, Question, Standing, Wanted};
use thyra_node_proxy_bridge::envoy::{Binary, DEFAULT_HEAP, EnvoyConfig, EnvoyState, Supervisor};
use thyra_node_proxy_bridge::listener::{HttpOptions, Reading};
use thyra_policy_compiler::residual::Residual;
use thyra_policy_compiler::traffic::PathNormalization;

/// What Envoy gets to take a change.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// The Envoy of this machine; none where it may be missing.
pub(crate) async fn binary() -> Option<Binary> {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_test_writer();
        // Another test may have been first.
        let _first = log.try_init();
    }
    let cache = std::env::var_os("THYRA_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/thyra"))
    });
    let beside = cache.map(|cache| cache.join("envoy/envoy"));
    let named = std::env::var_os("THYRA_ENVOY").map(PathBuf::from);
    match Binary::find(named.as_deref(), beside.as_deref()).await {
        Ok(binary) => Some(binary),
        Err(error) => {
            missing(&format!("{error}; `make envoy` installs one"));
            None
        }
    }
}

/// Says loudly what a test is skipped for; on CI nothing is.
pub(crate) fn missing(what: &str) {
    let on_ci = std::env::var("CI").is_ok_and(|v| !v.is_empty() && v != "false" && v != "0");
    assert!(!on_ci, "{what}");
    println!("SKIPPED: {what}");
}

/// An Envoy with its bridge.
pub(crate) struct Node {
    pub(crate) bridge: Bridge,
    pub(crate) supervisor: Supervisor,
    pub(crate) folder: TempDir,
}

impl Node {
    pub(crate) async fn start(binary: &Binary, paths: PathNormalization, reasons: bool) -> Self {
        Self::start_as(binary, paths, reasons, None).await
    }

    pub(crate) async fn start_as(
        binary: &Binary,
        paths: PathNormalization,
        reasons: bool,
        user: Option<(u32, u32)>,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("thyra-l7-").tempdir().unwrap();
        if let Some((uid, gid)) = user {
            std::os::unix::fs::chown(folder.path(), Some(uid), Some(gid)).unwrap();
        }
        let config = EnvoyConfig {
            binary: binary.clone(),
            folder: folder.path().to_owned(),
            node: "test".to_owned(),
            concurrency: 1,
            heap: DEFAULT_HEAP,
            user,
            cgroup: None,
            note: None,
        };
        let bridge = Bridge::start(BridgeConfig {
            xds_socket: config.xds_socket(),
            oracles: folder.path().to_owned(),
            owner: user,
            http: HttpOptions {
                paths,
                reasons,
                ..HttpOptions::default()
            },
        })
        .unwrap();
        let supervisor = Supervisor::start(config).unwrap();
        let node = Self {
            bridge,
            supervisor,
            folder,
        };
        node.ready().await;
        node
    }

    /// Waits until Envoy is ready; its process.
    pub(crate) async fn ready(&self) -> u32 {
        let mut state = self.supervisor.state();
        let ready = state.wait_for(|state| matches!(state, EnvoyState::Ready { .. }));
        let ready = tokio::time::timeout(LIMIT, ready).await;
        match &*ready.expect("envoy becomes ready").unwrap() {
            EnvoyState::Ready { pid } => *pid,
            state => panic!("{state:?}"),
        }
    }

    /// The socket of a residual's oracle.
    pub(crate) async fn oracle(&self, question: &Question) -> PathBuf {
        match self.bridge.settled(question, LIMIT).await {
            Standing::Active(socket) => socket,
            standing => panic!("{question:?}: {standing:?}"),
        }
    }
}

/// A cell that asks for a residual.
pub(crate) fn wanted(cell: &str, reading: Reading, residual: &Arc<Residual<RuleRef>>) -> Wanted {
    Wanted {
        cell: cell.into(),
        reading,
        residual: Arc::clone(residual),
    }
}
