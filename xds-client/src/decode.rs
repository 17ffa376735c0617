//! From a resource on the wire to a typed one.
//!
//! Invariant: total, or refused with its reason. Nothing is skipped or guessed; fields of policies that this
//! build doesn't know are listed beside the policy.

use prost::Message;
use prost_types::Any;
use thyra_proto::envoy::service::discovery::v3::Resource;
use thyra_proto::istio::mcp::v1alpha1::{Metadata, Resource as Envelope};
use thyra_proto::istio::mesh::v1alpha1::MeshConfig;
use thyra_proto::istio::security::Authorization;
use thyra_proto::istio::security::v1beta1::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use thyra_proto::istio::workload::Address;
use thyra_proto::istio::workload::address::Type as AddressType;

use crate::kind::Kind;
use crate::sink::{Body, Named};
use crate::unknown::{self, WalkError};

/// Full name of the envelope of raw configuration kinds.
const ENVELOPE: &str = "istio.mcp.v1alpha1.Resource";

/// Why a resource is refused.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// No `Any` at all.
    #[error("no body")]
    NoBody,
    /// An envelope without metadata.
    #[error("no metadata")]
    NoMetadata,
    /// Another type than the subscription's.
    #[error("body of type `{found}`, expected `{expected}`")]
    WrongType {
        /// Full protobuf name.
        expected: &'static str,
        /// The type URL found.
        found: String,
    },
    /// The decoder gave up.
    #[error("malformed `{message}`")]
    Malformed {
        /// Full protobuf name.
        message: &'static str,
        /// Where and why.
        source: prost::DecodeError,
    },
    /// Scanning for unknown fields gave up.
    #[error("unreadable fields")]
    Fields(#[from] WalkError),
    /// An Address that is neither a workload nor a service.
    #[error("neither a workload nor a service: a form this build doesn't know")]
    NeitherWorkloadNorService,
    /// Removals go by the outer name, so the inner one must agree.
    #[error("the resource calls itself `{inner}`")]
    OtherName {
        /// The name inside.
        inner: String,
    },
}

/// The version by which a resource is known to be unchanged: the server's own, else the metadata's; empty:
/// there is none.
#[must_use]
pub fn version(kind: Kind, resource: &Resource) -> String {
    if !resource.version.is_empty() || !kind.is_enveloped() {
        return resource.version.clone();
    }
    // What can't be read has no version and is refused when it is decoded.
    let envelope = resource
        .resource
        .as_ref()
        .map(|any| Envelope::decode(any.value.as_slice()));
    match envelope {
        Some(Ok(Envelope {
            metadata: Some(metadata),
            body: _,
        })) => metadata.version,
        Some(
            Ok(Envelope {
                metadata: None,
                body: _,
            })
            | Err(_),
        )
        | None => String::new(),
    }
}

/// Decodes a resource of `kind`; `version` is [`version`]'s word on it.
///
/// # Errors
/// If any part of it can't be read, or its name inside is another.
pub fn named(kind: Kind, version: &str, resource: &Resource) -> Result<Named, DecodeError> {
    let any = resource.resource.as_ref().ok_or(DecodeError::NoBody)?;
    let (body, unknown) = match kind {
        Kind::Address => (Body::Address(message(kind.message(), any)?), Vec::new()),
        Kind::MeshConfig => (
            Body::MeshConfig(message::<MeshConfig>(kind.message(), any)?),
            Vec::new(),
        ),
        Kind::Authorization => {
            let reduced: Authorization = message(kind.message(), any)?;
            (
                Body::Authorization(reduced),
                unknown::fields(kind.message(), "authorization", &any.value)?,
            )
        }
        Kind::AuthorizationPolicy | Kind::PeerAuthentication | Kind::RequestAuthentication => {
            enveloped(kind, any)?
        }
    };
    let inner = inner_name(&body)?;
    if inner.as_ref().is_some_and(|inner| *inner != resource.name) {
        return Err(DecodeError::OtherName {
            inner: inner.unwrap_or_default(),
        });
    }
    Ok(Named {
        name: resource.name.clone(),
        version: version.to_owned(),
        body,
        unknown,
    })
}

fn enveloped(kind: Kind, any: &Any) -> Result<(Body, Vec<String>), DecodeError> {
    let Envelope { metadata, body } = message(ENVELOPE, any)?;
    let metadata = metadata.ok_or(DecodeError::NoMetadata)?;
    let spec = body.ok_or(DecodeError::NoBody)?;
    let body = match kind {
        Kind::PeerAuthentication => {
            let spec: PeerAuthentication = message(kind.message(), &spec)?;
            Body::PeerAuthentication { metadata, spec }
        }
        Kind::RequestAuthentication => {
            let spec: RequestAuthentication = message(kind.message(), &spec)?;
            Body::RequestAuthentication { metadata, spec }
        }
        Kind::AuthorizationPolicy | Kind::Address | Kind::Authorization | Kind::MeshConfig => {
            let spec: AuthorizationPolicy = message(Kind::AuthorizationPolicy.message(), &spec)?;
            Body::AuthorizationPolicy { metadata, spec }
        }
    };
    Ok((body, unknown::fields(kind.message(), "spec", &spec.value)?))
}

fn message<T: Message + Default>(expected: &'static str, any: &Any) -> Result<T, DecodeError> {
    // The prefix of a type URL may be any; its last segment is the type.
    if any.type_url.rsplit('/').next() != Some(expected) {
        return Err(DecodeError::WrongType {
            expected,
            found: any.type_url.clone(),
        });
    }
    T::decode(any.value.as_slice()).map_err(|source| DecodeError::Malformed {
        message: expected,
        source,
    })
}

/// The name that the resource gives itself; none for MeshConfig, which has no name.
fn inner_name(body: &Body) -> Result<Option<String>, DecodeError> {
    let of_metadata = |metadata: &Metadata| Some(metadata.name.clone());
    Ok(match body {
        Body::Address(Address {
            r#type: Some(AddressType::Workload(workload)),
        }) => Some(workload.uid.clone()),
        Body::Address(Address {
            r#type: Some(AddressType::Service(service)),
        }) => Some(format!("{}/{}", service.namespace, service.hostname)),
        Body::Address(Address { r#type: None }) => return Err(DecodeError::NeitherWorkloadNorService),
        Body::Authorization(policy) => Some(format!("{}/{}", policy.namespace, policy.name)),
        Body::AuthorizationPolicy { metadata, spec: _ } => of_metadata(metadata),
        Body::PeerAuthentication { metadata, spec: _ } => of_metadata(metadata),
        Body::RequestAuthentication { metadata, spec: _ } => of_metadata(metadata),
        Body::MeshConfig(_) => None,
    })
}
