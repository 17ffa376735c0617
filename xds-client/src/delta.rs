//! Delta discovery as a pure state machine: no connection, no clock, no task.
//!
//! ```text
//!             connect()                receive()               answer()
//! (no stream) ────────► asked, unready ─────────► batch at hand ────────► ready ──┐
//!                 ▲                                    ▲                          │ receive()
//!                 └── connect(): the next stream       └──────────────────────────┘
//! ```
//!
//! Invariant: `held` is what was applied and never refused since. The first request of a type on a stream
//! names it, so the server can tell what is gone; what was refused isn't in it, so the server sends it again.

use std::collections::{BTreeMap, BTreeSet};

use thyra_proto::envoy::config::core::v3::Node;
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use thyra_proto::google::rpc::Status;

use crate::cause::chain;
use crate::decode;
use crate::kind::Kind;
use crate::sink::{Named, Rejected};

/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// One stream's knowledge, kept from connection to connection.
#[derive(Clone, Debug)]
pub struct Delta {
    node: Node,
    types: BTreeMap<Kind, TypeState>,
}

#[derive(Clone, Debug, Default)]
struct TypeState {
    /// Applied, by name.
    held: BTreeMap<String, Held>,
    /// Refused when last seen.
    rejected: BTreeSet<String>,
    /// Its first response on this stream was answered.
    ready: bool,
}

#[derive(Clone, Debug)]
struct Held {
    /// As the server wrote it, to be repeated to the server.
    version: String,
    content: Content,
}

/// How a resource is recognised as unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// By the version that was found in or on it.
    Version(String),
    /// There is none: by its bytes.
    Bytes(Vec<u8>),
}

/// A response sorted out, to be applied and then answered.
#[derive(Debug)]
pub struct Batch {
    /// Its type.
    pub kind: Kind,
    /// New and changed.
    pub resources: Vec<Named>,
    /// Gone.
    pub removed: Vec<String>,
    /// Not decoded.
    pub undecodable: Vec<Rejected>,
    /// First of its type on this stream.
    pub initial: bool,
    nonce: String,
    /// Resources in the response, changed or not.
    total: usize,
    /// What is held once the resource is applied.
    changed: BTreeMap<String, Held>,
}

/// What came in.
#[derive(Debug)]
pub enum Received {
    /// To be applied, then given to [`Delta::answer`].
    Batch(Batch),
    /// A type that wasn't asked for; the request refuses it.
    Unasked(DeltaDiscoveryRequest),
}

impl Batch {
    /// It changes nothing: everything in it is held already.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty() && self.removed.is_empty() && self.undecodable.is_empty()
    }
}

impl Delta {
    /// A client that holds nothing and will ask for `kinds`.
    #[must_use]
    pub fn new(node: Node, kinds: &[Kind]) -> Self {
        Self {
            node,
            types: kinds.iter().map(|kind| (*kind, TypeState::default())).collect(),
        }
    }

    /// A new stream begins: the requests to send on it, in order. The first one says who asks; each asks for
    /// everything of its type and names what is held.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut node = Some(self.node.clone());
        let mut requests = Vec::with_capacity(self.types.len());
        for (kind, state) in &mut self.types {
            state.ready = false;
            requests.push(DeltaDiscoveryRequest {
                node: node.take(),
                type_url: kind.type_url().to_owned(),
                // None is the wildcard.
                resource_names_subscribe: Vec::new(),
                resource_names_unsubscribe: Vec::new(),
                initial_resource_versions: state.versions(),
                response_nonce: String::new(),
                error_detail: None,
            });
        }
        requests
    }

    /// Has the first response of each type been answered on this stream?
    #[must_use]
    pub fn ready(&self) -> BTreeMap<Kind, bool> {
        self.types
            .iter()
            .map(|(kind, state)| (*kind, state.ready))
            .collect()
    }

    /// Every type is ready.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.types.values().all(|state| state.ready)
    }

    /// Sorts a response out against what is held. Nothing is held yet: that is [`Self::answer`]'s.
    #[must_use]
    pub fn receive(&self, response: DeltaDiscoveryResponse) -> Received {
        let DeltaDiscoveryResponse {
            system_version_info: _,
            resources,
            type_url,
            nonce,
            removed_resources,
            control_plane: _,
        } = response;
        let asked = Kind::from_type_url(&type_url).and_then(|kind| Some((kind, self.types.get(&kind)?)));
        let Some((kind, state)) = asked else {
            let message = format!("type `{type_url}` was not asked for");
            return Received::Unasked(reply(type_url, nonce, Some(message)));
        };
        let total = resources.len();
        // A name that comes twice: the last word counts. One that is also removed: it is there.
        let resources: BTreeMap<String, Resource> = resources
            .into_iter()
            .map(|resource| (resource.name.clone(), resource))
            .collect();
        let mut batch = Batch {
            kind,
            resources: Vec::new(),
            removed: state.removals(removed_resources, &resources),
            undecodable: Vec::new(),
            initial: !state.ready,
            nonce,
            total,
            changed: BTreeMap::new(),
        };
        for (name, resource) in resources {
            batch.sort(state, name, &resource);
        }
        Received::Batch(batch)
    }

    /// The batch was applied, except what `refused` names: what is held from now on, and the ACK or NACK to
    /// send.
    #[must_use]
    pub fn answer(&mut self, batch: Batch, refused: Vec<Rejected>) -> DeltaDiscoveryRequest {
        let Batch {
            kind,
            resources: _,
            removed,
            undecodable,
            initial: _,
            nonce,
            total,
            changed,
        } = batch;
        let mut rejected: BTreeMap<String, String> = BTreeMap::new();
        for Rejected { name, error } in undecodable.into_iter().chain(refused) {
            rejected.entry(name).or_insert(error);
        }
        let state = self.types.entry(kind).or_default();
        state.ready = true;
        for name in &removed {
            state.held.remove(name);
            state.rejected.remove(name);
        }
        for (name, held) in changed {
            state.rejected.remove(&name);
            state.held.insert(name, held);
        }
        for name in rejected.keys() {
            state.held.remove(name);
            state.rejected.insert(name.clone());
        }
        reply(kind.type_url().to_owned(), nonce, complaint(&rejected, total))
    }
}

impl Batch {
    fn sort(&mut self, state: &TypeState, name: String, resource: &Resource) {
        let version = decode::version(self.kind, resource);
        let content = Content::of(&version, resource);
        if state.held.get(&name).is_some_and(|held| held.content == content) {
            return;
        }
        match decode::named(self.kind, &version, resource) {
            Ok(named) => {
                self.changed.insert(
                    name,
                    Held {
                        version: resource.version.clone(),
                        content,
                    },
                );
                self.resources.push(named);
            }
            Err(error) => self.undecodable.push(Rejected {
                name,
                error: chain(&error),
            }),
        }
    }
}

impl TypeState {
    /// What the first request of a stream names. A resource without a name can't be named.
    fn versions(&self) -> BTreeMap<String, String> {
        let named = self.held.iter().filter(|(name, _)| !name.is_empty());
        named
            .map(|(name, held)| (name.clone(), held.version.clone()))
            .collect()
    }

    /// What the response removes. The server wasn't told of refused resources, so in its first response,
    /// which has all that it wasn't told of, their absence says that they are gone.
    fn removals(&self, named: Vec<String>, present: &BTreeMap<String, Resource>) -> Vec<String> {
        let mut gone: BTreeSet<String> = named.into_iter().collect();
        if !self.ready {
            gone.extend(self.rejected.iter().cloned());
        }
        gone.into_iter()
            .filter(|name| !present.contains_key(name))
            .collect()
    }
}

impl Content {
    fn of(version: &str, resource: &Resource) -> Self {
        if version.is_empty() {
            Self::Bytes(
                resource
                    .resource
                    .as_ref()
                    .map(|any| any.value.clone())
                    .unwrap_or_default(),
            )
        } else {
            Self::Version(version.to_owned())
        }
    }
}

/// ACK, or NACK with a message. It never carries a change of subscription.
fn reply(type_url: String, nonce: String, complaint: Option<String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: None,
        type_url,
        resource_names_subscribe: Vec::new(),
        resource_names_unsubscribe: Vec::new(),
        initial_resource_versions: BTreeMap::new(),
        response_nonce: nonce,
        error_detail: complaint.map(|message| Status {
            code: INVALID_ARGUMENT,
            message,
            details: Vec::new(),
        }),
    }
}

/// Names every refused resource.
fn complaint(rejected: &BTreeMap<String, String>, total: usize) -> Option<String> {
    if rejected.is_empty() {
        return None;
    }
    let each: Vec<String> = rejected
        .iter()
        .map(|(name, error)| format!("`{name}`: {error}"))
        .collect();
    Some(format!(
        "{} of {total} resources refused, the others applied: {}",
        rejected.len(),
        each.join("; ")
    ))
}
