//! The resources that Envoy should have, with what it made of each.
//!
//! Invariant: a resource is offered in its wanted version, or, where Envoy refused that one, in the last one that
//! it took; else not at all.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::util::pack_any;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// So often may Envoy end while it takes a resource.
const STRIKES: u8 = 2;

/// A kind of resource, in the order in which they are offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Clusters (CDS): pods, external authorizers.
    Cluster,
    /// Addresses of clusters (EDS).
    Endpoints,
    /// Listeners (LDS).
    Listener,
    /// Configurations of filters (ECDS).
    Extension,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Endpoints, Self::Listener, Self::Extension];

    /// As the wire names it.
    #[must_use]
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
        }
    }

    /// Envoy asks for all there are, and waits at its start to be told of them; of the others it asks by name.
    #[must_use]
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::Cluster | Self::Listener)
    }

    /// The kind that the wire names so.
    #[must_use]
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// A resource's kind and name.
pub type Name = (Kind, Arc<str>);

/// A resource in one version.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    /// Equal versions of a name have equal bodies.
    pub version: Arc<str>,
    /// What is sent.
    pub body: Any,
    /// It is offered only together with these: Envoy takes no connection at all as long as a listener waits for
    /// rules that don't come.
    pub needs: Vec<Name>,
}

impl Resource {
    /// A listener, whose bytes are its version.
    #[must_use]
    pub fn listener(listener: Listener, needs: Vec<Name>) -> Self {
        Self::by_content(pack_any(listener), needs)
    }

    /// A cluster, the same way.
    #[must_use]
    pub fn cluster(cluster: Cluster) -> Self {
        Self::by_content(pack_any(cluster), Vec::new())
    }

    /// A cluster's addresses, the same way.
    #[must_use]
    pub fn endpoints(endpoints: ClusterLoadAssignment) -> Self {
        Self::by_content(pack_any(endpoints), Vec::new())
    }

    fn by_content(body: Any, needs: Vec<Name>) -> Self {
        let digest = Sha256::digest(&body.value);
        Self {
            version: hex(&digest[..16]).into(),
            body,
            needs,
        }
    }

    /// The rules of a filter, with their name: a residual has one lowering, whose bytes come in any order (a map's), so
    /// its address is the version.
    #[must_use]
    pub fn rules(rules: TypedExtensionConfig, residual: &Arc<str>) -> (Name, Self) {
        let name = (Kind::Extension, rules.name.as_str().into());
        let resource = Self {
            version: Arc::clone(residual),
            body: pack_any(rules),
            needs: Vec::new(),
        };
        (name, resource)
    }
}

/// Bytes as hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What Envoy made of a resource's wanted version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has not answered yet, or there is no Envoy.
    Awaited,
    /// It has it.
    Accepted,
    /// It refused it, with these words.
    Refused(Arc<str>),
}

#[derive(Clone, Debug)]
struct Entry {
    wanted: Resource,
    /// The last one that was taken.
    good: Option<Resource>,
    outcome: Outcome,
    /// How often Envoy ended while it took the wanted version, and nothing else.
    strikes: u8,
}

impl Entry {
    fn offered(&self) -> Option<&Resource> {
        match self.outcome {
            Outcome::Refused(_) => self.good.as_ref(),
            Outcome::Awaited | Outcome::Accepted => Some(&self.wanted),
        }
    }
}

/// All resources.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    entries: BTreeMap<Name, Entry>,
}

impl Catalog {
    /// Wants a resource in this version; the same version again changes nothing.
    pub fn put(&mut self, name: Name, wanted: Resource) {
        match self.entries.get_mut(&name) {
            Some(entry) if entry.wanted.version == wanted.version => {}
            Some(entry) => {
                entry.wanted = wanted;
                entry.outcome = Outcome::Awaited;
                entry.strikes = 0;
            }
            None => {
                let entry = Entry {
                    wanted,
                    good: None,
                    outcome: Outcome::Awaited,
                    strikes: 0,
                };
                self.entries.insert(name, entry);
            }
        }
    }

    /// Wants it no more.
    pub fn remove(&mut self, name: &Name) {
        self.entries.remove(name);
    }

    /// What Envoy made of a resource; none of one that nobody wants.
    #[must_use]
    pub fn outcome(&self, name: &Name) -> Option<&Outcome> {
        self.entries.get(name).map(|entry| &entry.outcome)
    }

    /// What is offered of a kind, by name.
    pub fn offered(&self, kind: Kind) -> impl Iterator<Item = (&Arc<str>, &Resource)> {
        let of_kind = self.entries.iter().filter(move |((k, _), _)| *k == kind);
        of_kind.filter_map(|((_, name), entry)| Some((name, self.complete(entry)?)))
    }

    /// What is offered under a name.
    #[must_use]
    pub fn offer(&self, name: &Name) -> Option<&Resource> {
        self.complete(self.entries.get(name)?)
    }

    fn complete<'a>(&self, entry: &'a Entry) -> Option<&'a Resource> {
        let offered = entry.offered()?;
        let there = |name: &Name| {
            self.entries
                .get(name)
                .is_some_and(|entry| entry.offered().is_some())
        };
        offered.needs.iter().all(there).then_some(offered)
    }

    /// Envoy has this version.
    pub fn accepted(&mut self, name: &Name, version: &str) {
        if let Some(entry) = self.entries.get_mut(name)
            && *entry.wanted.version == *version
        {
            entry.good = Some(entry.wanted.clone());
            entry.outcome = Outcome::Accepted;
            entry.strikes = 0;
        }
    }

    /// Envoy ended while it took this version and nothing else: the second time it counts as refused, since there
    /// are configurations that Envoy doesn't refuse but dies of.
    pub fn ended_while_taking(&mut self, name: &Name, version: &str) {
        if let Some(entry) = self.entries.get_mut(name)
            && *entry.wanted.version == *version
        {
            entry.strikes += 1;
            if entry.strikes >= STRIKES {
                entry.outcome = Outcome::Refused("envoy ended each time it took this".into());
            }
        }
    }

    /// Envoy refused this version.
    pub fn refused(&mut self, name: &Name, version: &str, words: &str) {
        if let Some(entry) = self.entries.get_mut(name)
            && *entry.wanted.version == *version
        {
            entry.outcome = Outcome::Refused(words.into());
        }
    }

    /// The Envoy that took them is gone.
    pub fn forgotten(&mut self) {
        for entry in self.entries.values_mut() {
            if entry.outcome == Outcome::Accepted {
                entry.outcome = Outcome::Awaited;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        (Kind::Listener, "h0".into())
    }

    fn version(version: &str) -> Resource {
        Resource {
            version: version.into(),
            body: Any::default(),
            needs: Vec::new(),
        }
    }

    fn offered(catalog: &Catalog) -> Option<&str> {
        catalog.offer(&name()).map(|resource| &*resource.version)
    }

    #[test]
    fn a_refused_version_leaves_the_last_good_one_in_its_place() {
        let mut catalog = Catalog::default();
        catalog.put(name(), version("1"));
        catalog.accepted(&name(), "1");
        catalog.put(name(), version("2"));
        assert_eq!(catalog.outcome(&name()), Some(&Outcome::Awaited));
        catalog.refused(&name(), "2", "no");
        assert_eq!(offered(&catalog), Some("1"));
        assert_eq!(catalog.outcome(&name()), Some(&Outcome::Refused("no".into())));
        // Envoy's word on the one that it kept is no word on the one that is wanted.
        catalog.accepted(&name(), "1");
        assert_eq!(catalog.outcome(&name()), Some(&Outcome::Refused("no".into())));
        catalog.put(name(), version("3"));
        assert_eq!(offered(&catalog), Some("3"));
    }

    #[test]
    fn a_first_version_that_is_refused_is_offered_no_more() {
        let mut catalog = Catalog::default();
        catalog.put(name(), version("1"));
        catalog.refused(&name(), "1", "no");
        assert_eq!(offered(&catalog), None);
    }

    #[test]
    fn a_listener_without_its_rules_is_not_offered() {
        let mut catalog = Catalog::default();
        let rules: Name = (Kind::Extension, "h0/0".into());
        let needs = vec![rules.clone()];
        catalog.put(
            name(),
            Resource {
                needs,
                ..version("1")
            },
        );
        assert_eq!(offered(&catalog), None);
        catalog.put(rules.clone(), version("1"));
        assert_eq!(offered(&catalog), Some("1"));
        catalog.refused(&rules, "1", "no");
        assert_eq!(offered(&catalog), None);
    }

    #[test]
    fn nothing_counts_as_accepted_by_an_envoy_that_is_gone() {
        let mut catalog = Catalog::default();
        catalog.put(name(), version("1"));
        catalog.accepted(&name(), "1");
        catalog.forgotten();
        assert_eq!(catalog.outcome(&name()), Some(&Outcome::Awaited));
    }
}
