//! Resources and responses as istiod writes them, built in a line.

use prost::Message;
use prost_types::Any;
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use thyra_proto::istio::mcp::v1alpha1::{Metadata, Resource as Envelope};
use thyra_proto::istio::mesh::v1alpha1::MeshConfig;
use thyra_proto::istio::security::Authorization;
use thyra_proto::istio::security::v1beta1::AuthorizationPolicy;
use thyra_proto::istio::workload::address::Type;
use thyra_proto::istio::workload::{Address, Service, Workload};
use thyra_xds_client::Kind;

/// A message under its type URL.
pub(crate) fn any(message: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{message}"),
        value,
    }
}

/// A resource of the given name and content.
pub(crate) fn resource(name: &str, version: &str, body: Option<Any>) -> Resource {
    Resource {
        name: name.into(),
        version: version.into(),
        resource: body,
        ..Resource::default()
    }
}

/// A workload with a content version.
pub(crate) fn workload(uid: &str, version: &str) -> Resource {
    let workload = Workload {
        uid: uid.into(),
        name: format!("pod-{uid}"),
        ..Workload::default()
    };
    let address = Address {
        r#type: Some(Type::Workload(workload)),
    };
    resource(
        uid,
        version,
        Some(any(Kind::Address.message(), address.encode_to_vec())),
    )
}

/// A service.
pub(crate) fn service(namespace: &str, hostname: &str) -> Resource {
    let service = Service {
        namespace: namespace.into(),
        hostname: hostname.into(),
        ..Service::default()
    };
    let address = Address {
        r#type: Some(Type::Service(service)),
    };
    let name = format!("{namespace}/{hostname}");
    resource(
        &name,
        "1",
        Some(any(Kind::Address.message(), address.encode_to_vec())),
    )
}

/// A resource that no decoder reads.
pub(crate) fn garbage(kind: Kind, name: &str) -> Resource {
    resource(name, "g", Some(any(kind.message(), vec![0xff, 0xff])))
}

/// A raw AuthorizationPolicy whose spec are the given bytes; its version is in the metadata alone.
pub(crate) fn raw_policy(name: &str, version: &str, spec: Vec<u8>) -> Resource {
    raw(Kind::AuthorizationPolicy, name, version, spec)
}

/// A raw resource of any kind.
pub(crate) fn raw(kind: Kind, name: &str, version: &str, spec: Vec<u8>) -> Resource {
    let metadata = Metadata {
        name: name.into(),
        version: version.into(),
        ..Metadata::default()
    };
    let envelope = Envelope {
        metadata: Some(metadata),
        body: Some(any(kind.message(), spec)),
    };
    resource(
        name,
        "",
        Some(any("istio.mcp.v1alpha1.Resource", envelope.encode_to_vec())),
    )
}

/// A policy without any field.
pub(crate) fn empty_policy(name: &str, version: &str) -> Resource {
    raw_policy(name, version, AuthorizationPolicy::default().encode_to_vec())
}

/// Istiod's L4 policy, which never has a version.
pub(crate) fn authorization(namespace: &str, name: &str, dry_run: bool) -> Resource {
    let policy = Authorization {
        name: name.into(),
        namespace: namespace.into(),
        dry_run,
        ..Authorization::default()
    };
    let name = format!("{namespace}/{name}");
    resource(
        &name,
        "",
        Some(any(Kind::Authorization.message(), policy.encode_to_vec())),
    )
}

/// MeshConfig, which has neither name nor version.
pub(crate) fn mesh(trust_domain: &str) -> Resource {
    let mesh = MeshConfig {
        trust_domain: trust_domain.into(),
        ..MeshConfig::default()
    };
    resource(
        "",
        "",
        Some(any(Kind::MeshConfig.message(), mesh.encode_to_vec())),
    )
}

/// A response.
pub(crate) fn response(
    kind: Kind,
    nonce: &str,
    resources: Vec<Resource>,
    removed: &[&str],
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().into(),
        nonce: nonce.into(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).into()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}
