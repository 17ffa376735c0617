//! What an earlier agent left of Envoy: the process, and which port is whose.
//!
//! Invariant: both or neither. An Envoy whose ports nobody knows could be told to judge on one what its open
//! connections were not judged by; it is ended, and so is what can't be known again.

use std::path::{Path, PathBuf};

use thyra_datapath::{EnvoyGroup, EnvoyGroupError};
use thyra_node_proxy_bridge::envoy::{EnvoyConfig, Left, end_strays};
use thyra_node_proxy_bridge::inline::Kept;
use tracing::{info, warn};

use crate::chain::chain;

/// An Envoy at work.
pub(super) struct Found {
    pub(super) envoy: Left,
    pub(super) kept: Kept,
}

impl Found {
    /// The one to take over, whose sockets are `known`; whatever else runs as Envoy is ended.
    ///
    /// # Errors
    /// It doesn't end.
    pub(super) fn look(
        config: &EnvoyConfig,
        group: &EnvoyGroup,
        known: bool,
    ) -> Result<Option<Self>, EnvoyGroupError> {
        end_strays(config);
        let kept = Kept::load(&ports(&config.folder)).unwrap_or_else(|error| {
            warn!(%error, "which port is whose can't be read");
            None
        });
        if let (true, Some(kept)) = (known, kept)
            && let Some(envoy) = Left::find(config)
        {
            return Ok(Some(Self { envoy, kept }));
        }
        if !group.is_empty() {
            info!("envoy is replaced; its connections are reset");
            group.empty()?;
        }
        Ok(None)
    }
}

/// No Envoy is wanted any more.
pub(super) fn end(folder: &Path) {
    let ended = EnvoyGroup::find(folder).and_then(|group| match group {
        Some(group) => group.empty().and_then(|()| group.remove()),
        None => Ok(()),
    });
    if let Err(error) = ended {
        warn!(
            error = chain(&error),
            "an envoy that nobody wants stays; it gets no connection"
        );
    }
}

/// Where it is noted which process it is; beside its folder, which it writes to itself.
pub(super) fn note(folder: &Path) -> PathBuf {
    folder.with_extension("json")
}

/// Where it is stored which port is whose.
pub(super) fn ports(folder: &Path) -> PathBuf {
    folder.with_extension("ports.json")
}
