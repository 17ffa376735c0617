//! What an earlier agent left of Envoy: the process, and which port is whose.
//!
//! Invariant: both or neither. An Envoy whose ports nobody knows could be told to judge on one what its open
//! connections were not judged by; it is ended, and so is what can't be known again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thyra_datapath::{EnvoyGroup, EnvoyGroupError};
use thyra_node_proxy_bridge::envoy::{EnvoyConfig, Given, Left, end_noted, end_strays};
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
        // One that was given is in no group of ours.
        end_noted(&note(&config.folder));
        if !group.is_empty() {
            info!("envoy is replaced; its connections are reset");
            group.empty()?;
        }
        Ok(None)
    }
}

/// Which port is whose, if the Envoy that somebody else runs goes on with that; one that does not is ended.
pub(super) fn resumed(given: &Arc<Given>, folder: &Path) -> Option<Kept> {
    let kept = Kept::load(&ports(folder)).unwrap_or_else(|error| {
        warn!(%error, "which port is whose can't be read");
        None
    });
    let resumed = kept.map(|kept| given.resume().map(|()| kept));
    match resumed {
        Some(Ok(kept)) => return Some(kept),
        Some(Err(why)) => info!(why, "no envoy is gone on with"),
        None => {}
    }
    // One that an agent with other flags started would listen on.
    end(folder);
    None
}

/// No Envoy is wanted any more.
pub(super) fn end(folder: &Path) {
    end_noted(&note(folder));
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
