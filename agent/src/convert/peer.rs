//! `security.istio.io` PeerAuthentication to the model.
//!
//! Invariant: a mode or a port that can't be read counts as STRICT.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_policy_compiler::policy::{MtlsMode, PeerAuthentication, Unknown};
use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::security::v1beta1 as wire;
use wire::peer_authentication::{MutualTls, mutual_tls::Mode};

use super::{ConvertError, Meta, labels, meta};

/// A PeerAuthentication; `unknown` are the paths of fields that its protobuf type doesn't know.
///
/// # Errors
/// Its name can't be read.
pub fn authentication(
    metadata: Metadata,
    spec: wire::PeerAuthentication,
    unknown: &[String],
) -> Result<PeerAuthentication, ConvertError> {
    let Meta {
        reference,
        version,
        created,
        annotations: _,
    } = meta(metadata)?;
    let wire::PeerAuthentication {
        selector,
        mtls,
        port_level_mtls,
    } = spec;
    let mut unknown: Vec<Unknown> = unknown.iter().map(|u| Unknown(Arc::from(u.as_str()))).collect();
    let mut read = |at: String, MutualTls { mode }: MutualTls| match Mode::try_from(mode) {
        Ok(Mode::Unset) => MtlsMode::Unset,
        Ok(Mode::Disable) => MtlsMode::Disable,
        Ok(Mode::Permissive) => MtlsMode::Permissive,
        Ok(Mode::Strict) => MtlsMode::Strict,
        Err(_) => {
            unknown.push(Unknown(Arc::from(format!("{at} mode {mode}"))));
            MtlsMode::Strict
        }
    };
    let mut mode = mtls.map_or(MtlsMode::Unset, |m| read("spec.mtls".into(), m));
    let mut ports = BTreeMap::new();
    for (number, m) in port_level_mtls {
        let port_mode = read(format!("spec.portLevelMtls[{number}]"), m);
        if let Ok(port) = u16::try_from(number) {
            ports.insert(port, port_mode);
        } else {
            mode = MtlsMode::Strict;
        }
    }
    Ok(PeerAuthentication {
        reference,
        version,
        created,
        selector: labels(selector),
        mode,
        ports,
        unknown,
    })
}
