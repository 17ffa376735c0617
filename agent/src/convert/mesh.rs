//! `istio.mesh.v1alpha1.MeshConfig` to the model.
//!
//! Invariant: an empty value is Istio's default, as istiod itself reads it.

use thyra_policy_compiler::traffic::PathNormalization;
use thyra_policy_compiler::world::Mesh;
use thyra_proto::istio::mesh::v1alpha1 as wire;
use thyra_proto::istio::mesh::v1alpha1::mesh_config::proxy_path_normalization::NormalizationType;

/// A MeshConfig; `version` is the resource's, empty where it has none.
#[must_use]
pub fn mesh(message: wire::MeshConfig, version: String) -> Mesh {
    let wire::MeshConfig {
        trust_domain,
        root_namespace,
        trust_domain_aliases,
        extension_providers,
        path_normalization,
    } = message;
    let default = Mesh::default();
    Mesh {
        root_namespace: if root_namespace.is_empty() {
            default.root_namespace
        } else {
            root_namespace
        },
        trust_domain: if trust_domain.is_empty() {
            default.trust_domain
        } else {
            trust_domain
        },
        trust_domain_aliases,
        extension_providers: super::providers::providers(extension_providers),
        path_normalization: path_normalization.map_or_else(PathNormalization::default, |paths| {
            normalization(paths.normalization())
        }),
        version,
    }
}

fn normalization(how: NormalizationType) -> PathNormalization {
    match how {
        NormalizationType::Default | NormalizationType::Base => PathNormalization::Base,
        NormalizationType::None => PathNormalization::None,
        NormalizationType::MergeSlashes => PathNormalization::MergeSlashes,
        NormalizationType::DecodeAndMergeSlashes => PathNormalization::DecodeAndMergeSlashes,
    }
}
