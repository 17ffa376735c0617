//! A scenario with an agent that has what `deploy/daemonset.yaml` gives it, and no more.
//!
//! Invariant: the capabilities are read from the manifest, so that one taken away there fails here.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{step::Tally, suite, tree::Tree};

/// It needs everything of the agent: programs, pods' namespaces, an Envoy that is started, told and ended.
const SCENARIO: &str = "testdata/lab/s20-each-request";
const MANIFEST: &str = "deploy/daemonset.yaml";
/// Names of Linux capabilities stand behind this.
const ADD: &str = "add: [";

/// Runs it; its probes are the checks.
pub(crate) fn tests(tree: &Tree) -> Result<Tally> {
    let path = tree.root().join(MANIFEST);
    let manifest = fs::read_to_string(&path).with_context(|| format!("read `{}`", path.display()))?;
    let bounds =
        bounds(&manifest).with_context(|| format!("`{MANIFEST}` gives the agent no capabilities"))?;
    let script = script(tree)?;
    let agent = tree.target().join("debug/thyra-agent");
    suite::lab(tree, SCENARIO.as_ref(), suite::ControlPlane::Embedded, |thyra| {
        thyra
            .env("THYRA_AGENT", script)
            .env("THYRA_CONTAINED", agent)
            .env("THYRA_CAPABILITIES", bounds);
    })
}

/// As setpriv(1) takes them: none but these.
fn bounds(manifest: &str) -> Option<String> {
    let names = manifest.split_once(ADD)?.1.split_once(']')?.0;
    let names = names.split(',').map(|name| name.trim().to_lowercase());
    Some(names.fold("-all".to_owned(), |all, name| format!("{all},+{name}")))
}

fn script(tree: &Tree) -> Result<PathBuf> {
    let folder = tree.target().join("test");
    fs::create_dir_all(&folder).with_context(|| format!("make `{}`", folder.display()))?;
    let path = folder.join("contained-agent.sh");
    fs::write(&path, include_str!("contained/agent.sh"))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("write `{}`", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::bounds;

    #[test]
    fn the_manifests_capabilities_are_read() {
        let manifest = "capabilities:\n  drop: [ALL]\n  # Why.\n  add: [BPF, NET_ADMIN]\n";
        assert_eq!(bounds(manifest).as_deref(), Some("-all,+bpf,+net_admin"));
        assert_eq!(bounds("privileged: true\n"), None);
    }
}
