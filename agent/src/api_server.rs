//! The way to the Kubernetes API.
//!
//! Invariant: a kubeconfig that is given is used; the in-cluster account only where none is.

use std::path::PathBuf;

use kube::config::{KubeConfigOptions, Kubeconfig};

/// Set in every pod of a cluster.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";

/// Where the API server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiServer {
    /// As a kubeconfig says.
    Kubeconfig(PathBuf),
    /// As the pod's own service account says.
    InCluster,
}

/// Why it can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiServerError {
    /// The kubeconfig can't be used.
    #[error("kubeconfig `{file}` can't be used")]
    Kubeconfig {
        /// Path.
        file: String,
        /// Cause.
        source: kube::config::KubeconfigError,
    },
    /// Not in a cluster after all.
    #[error("the pod's own service account can't be used")]
    InCluster(#[source] kube::config::InClusterError),
    /// The client can't be made.
    #[error("no client for the API server")]
    Client(#[source] kube::Error),
}

impl ApiServer {
    /// A given kubeconfig, else the cluster that this process runs in, else none.
    #[must_use]
    pub fn find(kubeconfig: Option<&PathBuf>) -> Option<Self> {
        match kubeconfig {
            Some(file) => Some(Self::Kubeconfig(file.clone())),
            None => std::env::var_os(IN_CLUSTER).map(|_| Self::InCluster),
        }
    }

    /// A client.
    ///
    /// # Errors
    /// The kubeconfig or the service account can't be read.
    pub async fn client(&self) -> Result<kube::Client, ApiServerError> {
        let config = match self {
            Self::Kubeconfig(path) => {
                let file = || path.display().to_string();
                let wrong = |source| ApiServerError::Kubeconfig { file: file(), source };
                let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
                let options = KubeConfigOptions::default();
                kube::Config::from_custom_kubeconfig(kubeconfig, &options)
                    .await
                    .map_err(wrong)?
            }
            Self::InCluster => kube::Config::incluster().map_err(ApiServerError::InCluster)?,
        };
        kube::Client::try_from(config).map_err(ApiServerError::Client)
    }
}
