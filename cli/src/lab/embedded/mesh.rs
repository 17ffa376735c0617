//! MeshConfig, as istiod sends it.
//!
//! Invariant: what the manifest reader understood of the ConfigMap is what goes out.

use anyhow::anyhow;
use thyra_policy_compiler::authorizer::{self, Authorizer, Check, Provider};
use thyra_policy_compiler::manifest::{self, Body};
use thyra_policy_compiler::traffic::PathNormalization;
use thyra_policy_compiler::world::Mesh;
use thyra_proto::istio::mesh::v1alpha1::MeshConfig;
use thyra_proto::istio::mesh::v1alpha1::mesh_config::extension_provider::{
    EnvoyExternalAuthorizationGrpcProvider, EnvoyExternalAuthorizationHttpProvider,
    EnvoyExternalAuthorizationRequestBody, Provider as Kind,
};
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
    settings(object).map(|mesh| message(&mesh))
}

fn settings(object: &Object) -> anyhow::Result<Mesh> {
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
        Some(Body::MeshConfig(mesh)) => Ok(mesh),
        _ => Ok(Mesh::default()),
    }
}

/// What an agent that agrees with the ConfigMap holds, as JSON; empty if it can't be read.
pub(crate) fn content(object: &Object) -> String {
    settings(object).map_or_else(|_| String::new(), |mesh| as_json(&mesh))
}

/// What an agent holds where there is no ConfigMap, as JSON.
pub(crate) fn default_content() -> String {
    as_json(&Mesh::default())
}

fn as_json(mesh: &Mesh) -> String {
    serde_json::json!({
        "trustDomain": mesh.trust_domain,
        "rootNamespace": mesh.root_namespace,
        "trustDomainAliases": mesh.trust_domain_aliases,
        "authorizers": authorizer::fingerprint(&mesh.extension_providers),
    })
    .to_string()
}

/// A provider that can't be asked goes out without its settings: it can't be asked either way.
fn provided(provider: &Provider) -> ExtensionProvider {
    let kind = provider.authorizer.as_ref().ok().map(|authorizer| {
        let Authorizer {
            target,
            check,
            timeout,
            fail_open,
            status_on_error,
            body,
        } = &**authorizer;
        let service = match &target.namespace {
            Some(namespace) => format!("{namespace}/{}", target.host),
            None => target.host.clone(),
        };
        let (port, fail_open, status_on_error) =
            (target.port.into(), *fail_open, status_on_error.to_string());
        let timeout = prost_types::Duration::try_from(*timeout).ok();
        let include_request_body_in_check = body.map(|body| EnvoyExternalAuthorizationRequestBody {
            max_request_bytes: body.max_bytes,
            allow_partial_message: body.partial,
            pack_as_bytes: body.as_bytes,
        });
        match check {
            Check::Grpc => Kind::EnvoyExtAuthzGrpc(EnvoyExternalAuthorizationGrpcProvider {
                service,
                port,
                fail_open,
                status_on_error,
                timeout,
                include_request_body_in_check,
                clear_route_cache: false,
            }),
            Check::Http(check) => Kind::EnvoyExtAuthzHttp(EnvoyExternalAuthorizationHttpProvider {
                service,
                port,
                path_prefix: check.path_prefix.clone(),
                fail_open,
                status_on_error,
                include_headers_in_check: Vec::new(),
                headers_to_upstream_on_allow: check.to_upstream.clone(),
                headers_to_downstream_on_deny: check.to_downstream_on_deny.clone(),
                timeout,
                include_request_headers_in_check: check.request_headers.clone(),
                include_additional_headers_in_check: check.added_headers.clone().into_iter().collect(),
                include_request_body_in_check,
                headers_to_downstream_on_allow: check.to_downstream_on_allow.clone(),
                clear_route_cache: false,
            }),
        }
    });
    ExtensionProvider {
        name: provider.name.to_string(),
        provider: kind,
    }
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
            .values()
            .map(|provider| provided(provider))
            .collect(),
        path_normalization: Some(ProxyPathNormalization {
            normalization: normalization.into(),
        }),
    }
}
