//! A pod as its CNI registered it, and the folder that remembers it across restarts.
//!
//! Invariant: addresses are canonical and at most one of each family; what can't be read is refused, never
//! dropped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thyra_proto::thyra::v1 as api;

use crate::state_file::{self, StateError};

/// Annotation under which a registration tells its namespace's labels (a JSON object of strings), used only
/// where no API server tells them.
pub const NAMESPACE_LABELS: &str = "thyra.io/namespace-labels";

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    /// Pod uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Path of its network namespace, may be empty.
    pub netns: String,
    /// Host end of its veth, by name.
    pub host_interface: String,
    /// One or two; never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Its own MAC, where the CNI told it.
    pub mac: Option<[u8; 6]>,
    /// The registration's word.
    pub labels: BTreeMap<String, String>,
    /// The registration's word.
    pub annotations: BTreeMap<String, String>,
    /// The registration's word; `default` where it says nothing.
    pub service_account: String,
    /// The registration's word.
    pub containers: Vec<String>,
}

/// What is wrong with a registration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRegistration {
    /// The request holds no endpoint.
    #[error("the request holds no endpoint")]
    Empty,
    /// A field that must be there isn't.
    #[error("`{0}` is empty")]
    Missing(&'static str),
    /// A value that can't be read.
    #[error("`{field}`: `{value}` {why}")]
    Value {
        /// Field.
        field: &'static str,
        /// As given.
        value: String,
        /// What is wrong.
        why: &'static str,
    },
}

impl Registration {
    /// `namespace/name`.
    #[must_use]
    pub fn pod(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Labels of its namespace, where the registration tells them.
    #[must_use]
    pub fn namespace_labels(&self) -> Option<BTreeMap<String, String>> {
        serde_json::from_str(self.annotations.get(NAMESPACE_LABELS)?).ok()
    }

    /// The wire form.
    #[must_use]
    pub fn to_api(&self) -> api::Endpoint {
        api::Endpoint {
            pod_uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            netns_path: self.netns.clone(),
            host_interface: self.host_interface.clone(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            mac: self.mac.map(mac_text).unwrap_or_default(),
            labels: self.labels.clone().into_iter().collect(),
            annotations: self.annotations.clone().into_iter().collect(),
            service_account: self.service_account.clone(),
            containers: self.containers.clone(),
        }
    }
}

impl TryFrom<api::Endpoint> for Registration {
    type Error = BadRegistration;

    fn try_from(endpoint: api::Endpoint) -> Result<Self, BadRegistration> {
        let api::Endpoint {
            pod_uid,
            namespace,
            name,
            netns_path,
            host_interface,
            addresses,
            mac,
            labels,
            annotations,
            service_account,
            containers,
        } = endpoint;
        let service_account = if service_account.is_empty() {
            "default".into()
        } else {
            service_account
        };
        let registration = Self {
            uid: filled("pod_uid", pod_uid)?,
            namespace: filled("namespace", namespace)?,
            name: filled("name", name)?,
            netns: netns_path,
            host_interface: interface(host_interface)?,
            addresses: read_addresses(&addresses)?,
            mac: read_mac(&mac)?,
            labels: labels.into_iter().collect(),
            annotations: annotations.into_iter().collect(),
            service_account,
            containers,
        };
        match registration.annotations.get(NAMESPACE_LABELS) {
            Some(text) if registration.namespace_labels().is_none() => Err(bad(
                "annotations",
                text,
                "of thyra.io/namespace-labels is not a JSON object of strings",
            )),
            _ => Ok(registration),
        }
    }
}

fn bad(field: &'static str, value: &str, why: &'static str) -> BadRegistration {
    BadRegistration::Value {
        field,
        value: value.into(),
        why,
    }
}

fn filled(field: &'static str, value: String) -> Result<String, BadRegistration> {
    if value.is_empty() {
        Err(BadRegistration::Missing(field))
    } else {
        Ok(value)
    }
}

/// An interface name is 1 to 15 bytes without `/` or blanks (`dev_valid_name` in the kernel).
fn interface(name: String) -> Result<String, BadRegistration> {
    let name = filled("host_interface", name)?;
    if name.len() > 15 || name.contains(|c: char| c == '/' || c == '\0' || c.is_whitespace()) {
        return Err(bad("host_interface", &name, "is not an interface name"));
    }
    Ok(name)
}

fn read_addresses(texts: &[String]) -> Result<Vec<IpAddr>, BadRegistration> {
    if texts.is_empty() {
        return Err(BadRegistration::Missing("addresses"));
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in texts {
        let parsed = text
            .parse::<IpAddr>()
            .map_err(|_| bad("addresses", text, "is not an IP address"))?;
        let address = parsed.to_canonical();
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(bad("addresses", text, "can't be a pod's address"));
        }
        if addresses.iter().any(|a| a.is_ipv4() == address.is_ipv4()) {
            return Err(bad("addresses", text, "is a second address of one family"));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

fn read_mac(text: &str) -> Result<Option<[u8; 6]>, BadRegistration> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = || bad("mac", text, "is not like `aa:bb:cc:dd:ee:ff`");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        Err(wrong())
    } else {
        Ok(Some(mac))
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The file of known endpoints.
#[derive(Clone, Debug)]
pub struct Register(PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    endpoints: BTreeMap<u16, Registration>,
}

impl Register {
    /// The register in a state folder.
    #[must_use]
    pub fn new(state: &Path) -> Self {
        Self(state.join("endpoints.json"))
    }

    /// What was stored last; nothing when there is no file yet.
    ///
    /// # Errors
    /// The file can't be read or isn't ours.
    pub fn load(&self) -> Result<BTreeMap<u16, Registration>, StateError> {
        Ok(state_file::load::<Stored>(&self.0)?
            .map(|s| s.endpoints)
            .unwrap_or_default())
    }

    /// Replaces what is stored, atomically.
    ///
    /// # Errors
    /// The folder can't be written (a full disk, say); the old file stays then.
    pub fn store(&self, endpoints: &BTreeMap<u16, Registration>) -> Result<(), StateError> {
        state_file::store(
            &self.0,
            &Stored {
                endpoints: endpoints.clone(),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> api::Endpoint {
        api::Endpoint {
            pod_uid: "u1".into(),
            namespace: "shop".into(),
            name: "front".into(),
            host_interface: "veth0".into(),
            addresses: vec!["::ffff:10.0.0.1".into(), "fd00::1".into()],
            mac: "AA:bb:00:01:02:03".into(),
            ..api::Endpoint::default()
        }
    }

    #[test]
    fn a_registration_survives_wire_and_disk() {
        let registration = Registration::try_from(endpoint()).expect("good");
        assert_eq!(
            registration.addresses[0],
            "10.0.0.1".parse::<IpAddr>().expect("literal")
        );
        assert_eq!(
            Registration::try_from(registration.to_api()),
            Ok(registration.clone())
        );
        let dir = tempfile::tempdir().expect("a folder");
        let register = Register::new(dir.path());
        assert!(register.load().expect("no file is an empty register").is_empty());
        let known = BTreeMap::from([(7, registration)]);
        register.store(&known).expect("stored");
        assert_eq!(register.load().expect("loaded"), known);
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        type Break = fn(&mut api::Endpoint);
        let cases: &[(Break, &str)] = &[
            (|e| e.pod_uid.clear(), "`pod_uid` is empty"),
            (|e| e.host_interface = "a/b".into(), "`host_interface`: `a/b`"),
            (
                |e| e.host_interface = "sixteen-letters-".into(),
                "`host_interface`",
            ),
            (|e| e.addresses.clear(), "`addresses` is empty"),
            (
                |e| e.addresses[0] = "10.0.0".into(),
                "`10.0.0` is not an IP address",
            ),
            (|e| e.addresses[0] = "fd00::2".into(), "second address"),
            (|e| e.addresses[0] = "127.0.0.1".into(), "can't be a pod's"),
            (|e| e.mac = "aa:bb".into(), "`mac`"),
            (|e| e.mac = "aa:bb:cc:dd:ee:ff:00".into(), "`mac`"),
        ];
        for (spoil, says) in cases {
            let mut wrong = endpoint();
            spoil(&mut wrong);
            let error = Registration::try_from(wrong).expect_err("refused").to_string();
            assert!(error.contains(says), "{error} should say {says}");
        }
    }
}
