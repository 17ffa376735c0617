//! One stream of Envoy's: what it asked for, what it was sent, what it answered.
//!
//! Invariant: a response holds one resource, so that a refusal names the one that was refused; a resource is sent
//! again only when it differs from what Envoy has, or when Envoy asks for it anew.
//!
//! Delta xDS (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds>): the first
//! request of a kind subscribes to all (`*`, or no name at all) or to names; a request with a nonce answers the
//! response that had it, with `error_detail` where it was refused.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Wire,
};

use super::catalog::{Catalog, Kind, Name, Outcome};

/// A version of a resource at Envoy's.
#[derive(Debug)]
struct Held {
    version: Arc<str>,
    /// Envoy has it for certain: it said so, or agreed to this very sending.
    agreed: bool,
}

#[derive(Debug, Default)]
struct Subscription {
    /// A first request came.
    asked: bool,
    /// Everything of the kind is wanted.
    all: bool,
    names: BTreeSet<Arc<str>>,
    /// By name, what was sent last, or what Envoy said it has.
    has: BTreeMap<Arc<str>, Held>,
    /// Names that Envoy was told are not there.
    absent: BTreeSet<Arc<str>>,
    /// Something was sent; Envoy waits for a first response before it takes connections.
    answered: bool,
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    /// What Envoy is to be told is not there.
    fn gone(&self, kind: Kind, catalog: &Catalog) -> Vec<Arc<str>> {
        let lacks = |name: &&Arc<str>| catalog.offer(&(kind, Arc::clone(name))).is_none();
        match kind {
            Kind::Cluster | Kind::Listener => self.has.keys().filter(lacks).cloned().collect(),
            // What Envoy has it keeps: its listener goes first, and one that still drains keeps its rules. What it
            // never had it must be told of, or it waits for it.
            Kind::Endpoints | Kind::Extension => {
                let never = |name: &&Arc<str>| !self.has.contains_key(*name);
                let untold = |name: &&Arc<str>| !self.absent.contains(*name);
                let names = self.names.iter().filter(never).filter(untold);
                names.filter(lacks).cloned().collect()
            }
        }
    }
}

/// What a nonce stands for: the resource that was sent, none where resources were taken back.
type Sent = Option<(Name, Arc<str>)>;

/// A stream's state.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    of_kind: BTreeMap<Kind, Subscription>,
    waiting: HashMap<String, Sent>,
    nonce: u64,
    /// One resource at a time: an Envoy before this one ended while it took some.
    careful: bool,
}

impl Conversation {
    pub(super) fn new(careful: bool) -> Self {
        Self {
            careful,
            ..Self::default()
        }
    }

    /// What was sent and not answered.
    pub(super) fn unanswered(&self) -> Vec<(Name, Arc<str>)> {
        self.waiting.values().flatten().cloned().collect()
    }

    /// Takes a request in: what it says of earlier responses goes into the catalog, what it asks for is noted.
    pub(super) fn hear(&mut self, request: &DeltaDiscoveryRequest, catalog: &mut Catalog) {
        if let Some(kind) = Kind::of(&request.type_url) {
            self.answer(request, catalog);
            self.subscribe(kind, request, catalog);
        }
    }

    /// What Envoy has and was not asked of counts as taken: the catalog may not have had it when Envoy said so. Whether
    /// there was such.
    pub(super) fn confirm(&mut self, catalog: &mut Catalog) -> bool {
        let mut confirmed = Vec::new();
        for (kind, subscription) in &self.of_kind {
            for (name, held) in subscription.has.iter().filter(|(_, held)| held.agreed) {
                let name: Name = (*kind, Arc::clone(name));
                let awaits = catalog.outcome(&name) == Some(&Outcome::Awaited);
                let wanted = awaits.then(|| catalog.offer(&name)).flatten();
                if wanted.is_some_and(|resource| resource.version == held.version) {
                    confirmed.push((name, Arc::clone(&held.version)));
                }
            }
        }
        for (name, version) in &confirmed {
            catalog.accepted(name, version);
        }
        !confirmed.is_empty()
    }

    /// Sends what differs from what Envoy has: clusters before the listeners that lead to them, and those before the
    /// rules that they ask for.
    pub(super) fn news(&mut self, catalog: &Catalog) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        for kind in Kind::ALL {
            self.news_of(kind, catalog, &mut responses);
        }
        responses
    }

    fn answer(&mut self, request: &DeltaDiscoveryRequest, catalog: &mut Catalog) {
        let Some(Some((name, version))) = self.waiting.remove(&request.response_nonce) else {
            return;
        };
        match &request.error_detail {
            None => {
                catalog.accepted(&name, &version);
                let subscription = self.of_kind.get_mut(&name.0);
                let held = subscription.and_then(|subscription| subscription.has.get_mut(&name.1));
                if let Some(held) = held.filter(|held| held.version == version) {
                    held.agreed = true;
                }
            }
            Some(error) => catalog.refused(&name, &version, &error.message),
        }
    }

    fn subscribe(&mut self, kind: Kind, request: &DeltaDiscoveryRequest, catalog: &mut Catalog) {
        let subscription = self.of_kind.entry(kind).or_default();
        let first = !std::mem::replace(&mut subscription.asked, true);
        if first {
            subscription.all = kind.is_whole() && request.resource_names_subscribe.is_empty();
            for (name, version) in &request.initial_resource_versions {
                let held = Held {
                    version: version.as_str().into(),
                    agreed: true,
                };
                subscription.has.insert(name.as_str().into(), held);
                catalog.accepted(&(kind, name.as_str().into()), version);
            }
        }
        for name in &request.resource_names_subscribe {
            if name == "*" {
                subscription.all = true;
            } else {
                subscription.names.insert(name.as_str().into());
                // Asked for anew is sent anew, except at the start, where versions say what is there.
                if !first {
                    subscription.has.remove(name.as_str());
                }
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                subscription.all = false;
            }
            subscription.names.remove(name.as_str());
            subscription.has.remove(name.as_str());
            subscription.absent.remove(name.as_str());
        }
    }

    fn news_of(&mut self, kind: Kind, catalog: &Catalog, responses: &mut Vec<DeltaDiscoveryResponse>) {
        let Some(subscription) = self.of_kind.get_mut(&kind) else {
            return;
        };
        let busy = self.careful && self.waiting.values().any(Option::is_some);
        let mut sending = Vec::new();
        for (name, resource) in catalog.offered(kind) {
            let full = busy || (self.careful && !sending.is_empty());
            let held = subscription.has.get(name).map(|held| &held.version);
            if !full && subscription.wants(name) && held != Some(&resource.version) {
                sending.push((Arc::clone(name), resource.clone()));
            }
        }
        let gone = subscription.gone(kind, catalog);
        for name in &gone {
            subscription.has.remove(name);
        }
        if !kind.is_whole() {
            subscription.absent.extend(gone.iter().cloned());
        }
        for (name, resource) in &sending {
            let held = Held {
                version: Arc::clone(&resource.version),
                agreed: false,
            };
            subscription.has.insert(Arc::clone(name), held);
            subscription.absent.remove(name);
        }
        let empty = kind.is_whole() && !subscription.answered;
        subscription.answered = true;
        if !gone.is_empty() || (empty && sending.is_empty()) {
            let removed = gone.iter().map(|name| name.as_ref().to_owned()).collect();
            responses.push(self.respond(kind, None, removed));
        }
        for (name, resource) in sending {
            let wire = Wire {
                name: name.as_ref().to_owned(),
                version: resource.version.as_ref().to_owned(),
                resource: Some(resource.body),
                ..Wire::default()
            };
            let sent = ((kind, name), resource.version);
            responses.push(self.respond(kind, Some((sent, wire)), Vec::new()));
        }
    }

    fn respond(
        &mut self,
        kind: Kind,
        one: Option<((Name, Arc<str>), Wire)>,
        removed_resources: Vec<String>,
    ) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let (sent, wire) = one.unzip();
        self.waiting.insert(nonce.clone(), sent);
        DeltaDiscoveryResponse {
            type_url: kind.type_url().to_owned(),
            resources: wire.into_iter().collect(),
            removed_resources,
            nonce,
            ..DeltaDiscoveryResponse::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Any;
    use envoy_types::pb::google::rpc::Status;

    use super::*;
    use crate::ads::{Outcome, Resource};

    fn put(catalog: &mut Catalog, kind: Kind, name: &str, version: &str) {
        let resource = Resource {
            version: version.into(),
            body: Any::default(),
            needs: Vec::new(),
        };
        catalog.put((kind, name.into()), resource);
    }

    fn ask(kind: Kind, names: &[&str]) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: kind.type_url().to_owned(),
            resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn reply(kind: Kind, nonce: &str, error: Option<&str>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            response_nonce: nonce.to_owned(),
            error_detail: error.map(|message| Status {
                message: message.to_owned(),
                ..Status::default()
            }),
            ..ask(kind, &[])
        }
    }

    /// Heard and answered.
    fn request(
        talk: &mut Conversation,
        request: &DeltaDiscoveryRequest,
        catalog: &mut Catalog,
    ) -> Vec<DeltaDiscoveryResponse> {
        talk.hear(request, catalog);
        talk.news(catalog)
    }

    fn sent(responses: &[DeltaDiscoveryResponse]) -> Vec<String> {
        let each = responses.iter().map(|response| {
            let names = response
                .resources
                .iter()
                .map(|r| format!("{}@{}", r.name, r.version));
            let gone = response.removed_resources.iter().map(|name| format!("-{name}"));
            names.chain(gone).collect::<Vec<_>>().join(" ")
        });
        each.collect()
    }

    #[test]
    fn each_response_holds_one_resource_and_a_refusal_names_it() {
        let mut catalog = Catalog::default();
        put(&mut catalog, Kind::Listener, "a", "1");
        put(&mut catalog, Kind::Listener, "b", "1");
        let mut talk = Conversation::default();
        let responses = request(&mut talk, &ask(Kind::Listener, &[]), &mut catalog);
        assert_eq!(sent(&responses), ["a@1", "b@1"]);
        request(
            &mut talk,
            &reply(Kind::Listener, &responses[0].nonce, None),
            &mut catalog,
        );
        let after = request(
            &mut talk,
            &reply(Kind::Listener, &responses[1].nonce, Some("bad")),
            &mut catalog,
        );
        let outcome = |name: &str| catalog.outcome(&(Kind::Listener, name.into())).cloned();
        assert_eq!(outcome("a"), Some(Outcome::Accepted));
        assert_eq!(outcome("b"), Some(Outcome::Refused("bad".into())));
        // It never had it, so it is told that there is none.
        assert_eq!(sent(&after), ["-b"]);
    }

    #[test]
    fn an_empty_catalog_still_answers_so_that_envoy_starts() {
        let mut catalog = Catalog::default();
        let mut talk = Conversation::default();
        assert_eq!(
            sent(&request(&mut talk, &ask(Kind::Listener, &["*"]), &mut catalog)),
            [""]
        );
        assert!(talk.news(&catalog).is_empty());
    }

    #[test]
    fn only_what_changed_is_sent_and_rules_only_to_who_asked() {
        let mut catalog = Catalog::default();
        put(&mut catalog, Kind::Listener, "a", "1");
        put(&mut catalog, Kind::Extension, "a/0", "1");
        put(&mut catalog, Kind::Extension, "b/0", "1");
        let mut talk = Conversation::default();
        assert_eq!(
            sent(&request(&mut talk, &ask(Kind::Listener, &[]), &mut catalog)),
            ["a@1"]
        );
        assert_eq!(
            sent(&request(&mut talk, &ask(Kind::Extension, &["a/0"]), &mut catalog)),
            ["a/0@1"]
        );
        put(&mut catalog, Kind::Extension, "a/0", "2");
        put(&mut catalog, Kind::Extension, "b/0", "2");
        assert_eq!(sent(&talk.news(&catalog)), ["a/0@2"]);
        assert!(talk.news(&catalog).is_empty());
        catalog.remove(&(Kind::Listener, "a".into()));
        catalog.remove(&(Kind::Extension, "a/0".into()));
        assert_eq!(sent(&talk.news(&catalog)), ["-a"]);
    }

    #[test]
    fn rules_that_are_not_there_are_said_to_be_absent_once() {
        let mut catalog = Catalog::default();
        let mut talk = Conversation::default();
        assert_eq!(
            sent(&request(&mut talk, &ask(Kind::Extension, &["a/0"]), &mut catalog)),
            ["-a/0"]
        );
        assert!(talk.news(&catalog).is_empty());
        put(&mut catalog, Kind::Extension, "a/0", "1");
        assert_eq!(sent(&talk.news(&catalog)), ["a/0@1"]);
    }

    #[test]
    fn a_careful_conversation_sends_one_resource_at_a_time() {
        let mut catalog = Catalog::default();
        for name in ["a", "b"] {
            put(&mut catalog, Kind::Listener, name, "1");
        }
        put(&mut catalog, Kind::Extension, "a/0", "1");
        let mut talk = Conversation::new(true);
        let first = request(&mut talk, &ask(Kind::Listener, &[]), &mut catalog);
        assert_eq!(sent(&first), ["a@1"]);
        assert!(request(&mut talk, &ask(Kind::Extension, &["a/0"]), &mut catalog).is_empty());
        assert_eq!(talk.unanswered().len(), 1);
        let second = request(
            &mut talk,
            &reply(Kind::Listener, &first[0].nonce, None),
            &mut catalog,
        );
        assert_eq!(sent(&second), ["b@1"]);
    }

    #[test]
    fn an_envoy_that_comes_back_is_sent_only_what_it_lacks() {
        let mut catalog = Catalog::default();
        put(&mut catalog, Kind::Listener, "a", "1");
        put(&mut catalog, Kind::Listener, "b", "2");
        let mut talk = Conversation::default();
        let versions = [("a", "1"), ("b", "1"), ("c", "1")];
        let back = DeltaDiscoveryRequest {
            initial_resource_versions: versions.map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
            ..ask(Kind::Listener, &["*"])
        };
        assert_eq!(sent(&request(&mut talk, &back, &mut catalog)), ["-c", "b@2"]);
        let outcome = catalog.outcome(&(Kind::Listener, "a".into()));
        assert_eq!(outcome, Some(&Outcome::Accepted));
    }

    #[test]
    fn what_envoy_kept_while_nothing_was_known_counts_as_taken_once_it_is_wanted_again() {
        let mut catalog = Catalog::default();
        let mut talk = Conversation::default();
        let versions = [("a", "1"), ("b", "1"), ("c", "1")];
        let back = DeltaDiscoveryRequest {
            initial_resource_versions: versions.map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
            ..ask(Kind::Listener, &["*"])
        };
        // A new bridge that knows nothing yet: it hears, and says nothing.
        talk.hear(&back, &mut catalog);
        assert!(!talk.confirm(&mut catalog));
        put(&mut catalog, Kind::Listener, "a", "1");
        put(&mut catalog, Kind::Listener, "b", "2");
        assert!(talk.confirm(&mut catalog));
        assert!(!talk.confirm(&mut catalog), "once");
        let outcome = |name: &str| catalog.outcome(&(Kind::Listener, name.into())).cloned();
        assert_eq!(outcome("a"), Some(Outcome::Accepted));
        assert_eq!(outcome("b"), Some(Outcome::Awaited));
        assert_eq!(sent(&talk.news(&catalog)), ["-c", "b@2"]);
    }

    #[test]
    fn what_envoy_agreed_to_once_is_asked_again_after_something_else_was_sent() {
        let mut catalog = Catalog::default();
        put(&mut catalog, Kind::Listener, "a", "1");
        let mut talk = Conversation::default();
        let first = request(&mut talk, &ask(Kind::Listener, &[]), &mut catalog);
        let agreed = reply(Kind::Listener, &first[0].nonce, None);
        request(&mut talk, &agreed, &mut catalog);
        put(&mut catalog, Kind::Listener, "a", "2");
        assert_eq!(sent(&talk.news(&catalog)), ["a@2"]);
        // Back, before Envoy has answered: until it does, it may still be at the other one.
        put(&mut catalog, Kind::Listener, "a", "1");
        let back = talk.news(&catalog);
        assert_eq!(sent(&back), ["a@1"]);
        assert!(!talk.confirm(&mut catalog));
        let name = (Kind::Listener, "a".into());
        assert_eq!(catalog.outcome(&name), Some(&Outcome::Awaited));
        request(
            &mut talk,
            &reply(Kind::Listener, &back[0].nonce, None),
            &mut catalog,
        );
        assert_eq!(catalog.outcome(&name), Some(&Outcome::Accepted));
    }
}
