//! MeshConfig, as istiod sends it.
//!
//! Invariant: what the manifest reader understood of the ConfigMap is what goes out.

use anyhow::anyhow;
use thyra_policy_compiler::manifest::{self, Body};
use thyra_policy_compiler::traffic::PathNormalization;
use thyra_policy_compiler::world::Mesh;
use thyra_proto::istio::mesh::v1alpha1::MeshConfig;
use thyra_proto::istio::mesh::v1alpha1::mesh_config::proxy_path_normalization::NormalizationType;
use thyra_proto::istio::mesh::v1alpha1::mesh_config::{ExtensionProvider, ProxyPathNormalization};

use crate::lab::object::Object;

/// A mesh without a ConfigMap.
pub(super) fn defaults() -> MeshConfig {
    message(&Mesh::default())
}

/// # Errors
/// The ConfigMap can't be read.
pub(super) fn read(object: &Object) -> anyhow::Result<MeshConfig> {
    let found = manifest::object_from_json(&object.key(), &object.json).map_err(|errors| {
        anyhow!(
            errors
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("\n")
        )
    })?;
    match found.map(|object| object.body) {
        Some(Body::MeshConfig(mesh)) => Ok(message(&mesh)),
        _ => Ok(defaults()),
    }
}

/// What an agent that agrees with the ConfigMap holds, as JSON; empty if it can't be read.
pub(crate) fn content(object: &Object) -> String {
    read(object).map_or_else(|_| String::new(), |mesh| as_json(&mesh))
}

/// What an agent holds where there is no ConfigMap, as JSON.
pub(crate) fn default_content() -> String {
    as_json(&defaults())
}

fn as_json(mesh: &MeshConfig) -> String {
    serde_json::json!({
        "trustDomain": mesh.trust_domain,
        "rootNamespace": mesh.root_namespace,
        "trustDomainAliases": mesh.trust_domain_aliases,
    })
    .to_string()
}

fn message(mesh: &Mesh) -> MeshConfig {
    let Mesh {
        root_namespace,
        trust_domain,
        trust_domain_aliases,
        extension_providers,
        path_normalization,
        version: _,
    } = mesh;
    let normalization = match path_normalization {
        PathNormalization::None => NormalizationType::None,
        PathNormalization::Base => NormalizationType::Base,
        PathNormalization::MergeSlashes => NormalizationType::MergeSlashes,
        PathNormalization::DecodeAndMergeSlashes => NormalizationType::DecodeAndMergeSlashes,
    };
    MeshConfig {
        trust_domain: trust_domain.clone(),
        root_namespace: root_namespace.clone(),
        trust_domain_aliases: trust_domain_aliases.clone(),
        extension_providers: extension_providers
            .iter()
            .map(|name| ExtensionProvider {
                name: name.clone(),
                provider: None,
            })
            .collect(),
        path_normalization: Some(ProxyPathNormalization {
            normalization: normalization.into(),
        }),
    }
}
