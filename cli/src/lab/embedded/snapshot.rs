//! Everything the control plane says at one moment, by type and name.
//!
//! Invariant: a version changes exactly when its resource does.

use std::collections::BTreeMap;

use prost::Message;
use prost_types::Any;

use super::{Held, Objects, mesh, security, workload};
use crate::lab::model::Model;

/// The types that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Type {
    Address,
    /// Always empty: the raw policies say more.
    Authorization,
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
    MeshConfig,
}

/// A resource and its version.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) version: String,
    pub(super) body: Any,
}

#[derive(Debug, Default)]
pub(super) struct Snapshot(BTreeMap<Type, BTreeMap<String, Stored>>);

const TYPES: &[(Type, &str)] = &[
    (Type::Address, "type.googleapis.com/istio.workload.Address"),
    (
        Type::Authorization,
        "type.googleapis.com/istio.security.Authorization",
    ),
    (
        Type::AuthorizationPolicy,
        "security.istio.io/v1/AuthorizationPolicy",
    ),
    (
        Type::PeerAuthentication,
        "security.istio.io/v1/PeerAuthentication",
    ),
    (
        Type::RequestAuthentication,
        "security.istio.io/v1/RequestAuthentication",
    ),
    (Type::MeshConfig, "core/v1alpha1/MeshConfig"),
];

static NOTHING: BTreeMap<String, Stored> = BTreeMap::new();

impl Type {
    pub(super) fn of(url: &str) -> Option<Self> {
        TYPES
            .iter()
            .find(|(_, known)| *known == url)
            .map(|(kind, _)| *kind)
    }

    pub(super) fn url(self) -> &'static str {
        TYPES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, url)| url)
    }

    /// istiod sends these kinds as whole lists.
    pub(super) fn resent_whole(self) -> bool {
        !matches!(self, Self::Address | Self::Authorization)
    }
}

impl Snapshot {
    pub(super) fn resources(&self, kind: Type) -> &BTreeMap<String, Stored> {
        self.0.get(&kind).unwrap_or(&NOTHING)
    }

    /// Version of the mesh's settings.
    pub(super) fn mesh_version(&self) -> String {
        self.resources(Type::MeshConfig)
            .values()
            .map(|stored| stored.version.clone())
            .collect()
    }

    /// # Errors
    /// An object that has no form on the wire.
    pub(super) fn build(objects: &Objects, model: &Model) -> anyhow::Result<Self> {
        let mut all: BTreeMap<Type, BTreeMap<String, Stored>> = BTreeMap::new();
        let mut mesh_config = mesh::defaults();
        for held in objects.values() {
            let Held {
                object,
                version,
                created: _,
            } = held;
            let kind = match object.kind.as_str() {
                "AuthorizationPolicy" => Type::AuthorizationPolicy,
                "PeerAuthentication" => Type::PeerAuthentication,
                "RequestAuthentication" => Type::RequestAuthentication,
                "ConfigMap" => {
                    mesh_config = mesh::read(object)?;
                    continue;
                }
                _ => continue,
            };
            let stored = Stored {
                version: version.to_string(),
                body: security::resource(held)?,
            };
            all.entry(kind).or_default().insert(object.key(), stored);
        }
        for (name, address) in workload::addresses(objects, model)? {
            let body = any("istio.workload.Address", &address);
            all.entry(Type::Address).or_default().insert(
                name,
                Stored {
                    version: fingerprint(&body.value),
                    body,
                },
            );
        }
        let body = any("istio.mesh.v1alpha1.MeshConfig", &mesh_config);
        // istiod gives the mesh's settings no name.
        let stored = Stored {
            version: fingerprint(&body.value),
            body,
        };
        all.entry(Type::MeshConfig)
            .or_default()
            .insert(String::new(), stored);
        Ok(Self(all))
    }
}

pub(super) fn any(message_type: &str, message: &impl Message) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{message_type}"),
        value: message.encode_to_vec(),
    }
}

/// FNV-1a, 64 bits: a version needs to differ, not to be secret.
fn fingerprint(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}
