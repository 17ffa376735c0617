//! Any sequence of changes, pushes and outages: in the end the sink has what the server has.
//!
//! Invariant: the server here is istiod's reading of the protocol, reduced to sets of names, and shares
//! nothing with the client.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;
use thyra_proto::envoy::config::core::v3::Node;
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use thyra_xds_client::delta::{Delta, Received};
use thyra_xds_client::{Kind, Rejected, unknown};

use crate::wire::{empty_policy, garbage, raw_policy, response, workload};

/// What can happen.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A resource is made or changed.
    Set(u8, Quality),
    /// A resource is deleted.
    Delete(u8),
    /// The server tells what changed.
    Push,
    /// The server tells what changed, and the connection goes away before it arrives.
    LostPush,
    /// The stream ends and the next one begins.
    Outage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quality {
    Good,
    /// Decodes, but the sink doesn't want it.
    Unwanted,
    Undecodable,
}

/// The server: what there is, and what it believes the client to have.
struct Model {
    kind: Kind,
    there: BTreeMap<String, (u32, Quality)>,
    clock: u32,
    changed: BTreeSet<String>,
    told: BTreeSet<String>,
    nonce: u32,
}

/// The client and everything that its sink holds.
struct Client {
    delta: Delta,
    sink: BTreeMap<String, String>,
    /// Refused and still there: it fails closed.
    unreadable: BTreeSet<String>,
}

impl Model {
    fn resource(&self, name: &str) -> Option<Resource> {
        let (version, quality) = self.there.get(name)?;
        let version = version.to_string();
        Some(match (self.kind, quality) {
            (Kind::Address, Quality::Undecodable) => garbage(Kind::Address, name),
            (Kind::Address, _) => workload(name, &version),
            (_, Quality::Undecodable) => raw_policy(name, &version, vec![0xff]),
            (_, _) => empty_policy(name, &version),
        })
    }

    /// Addresses: what the client doesn't hold in this version. Raw kinds: all of it, every time.
    fn push(&mut self, held: &BTreeMap<String, String>, first: bool) -> DeltaDiscoveryResponse {
        let known: BTreeSet<String> = if first {
            held.keys().cloned().collect()
        } else {
            self.told.clone()
        };
        let is_due = |name: &String| match (self.kind, first) {
            (Kind::Address, true) => {
                let version = self.there[name].0.to_string();
                held.get(name) != Some(&version)
            }
            (Kind::Address, false) => self.changed.contains(name),
            (_, _) => true,
        };
        let due = self.there.keys().filter(|name| is_due(name));
        let resources = due.filter_map(|name| self.resource(name)).collect();
        let gone: Vec<&str> = known
            .iter()
            .map(String::as_str)
            .filter(|name| !self.there.contains_key(*name))
            .collect();
        self.nonce += 1;
        let push = response(self.kind, &self.nonce.to_string(), resources, &gone);
        self.told = self.there.keys().cloned().collect();
        self.changed.clear();
        push
    }

    fn wanted(&self) -> BTreeMap<String, String> {
        let good = self
            .there
            .iter()
            .filter(|(_, (_, quality))| *quality == Quality::Good);
        good.map(|(name, (version, _))| (name.clone(), version.to_string()))
            .collect()
    }
}

impl Client {
    fn take(&mut self, model: &Model, push: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let Received::Batch(batch) = self.delta.receive(push) else {
            panic!("unasked")
        };
        let mut refused = Vec::new();
        for name in &batch.removed {
            self.sink.remove(name);
            self.unreadable.remove(name);
        }
        for rejected in &batch.undecodable {
            self.sink.remove(&rejected.name);
            self.unreadable.insert(rejected.name.clone());
        }
        for named in &batch.resources {
            if model
                .there
                .get(&named.name)
                .is_some_and(|(_, quality)| *quality == Quality::Unwanted)
            {
                self.sink.remove(&named.name);
                self.unreadable.insert(named.name.clone());
                refused.push(Rejected {
                    name: named.name.clone(),
                    error: "unwanted".into(),
                });
            } else {
                self.sink.insert(named.name.clone(), named.version.clone());
                self.unreadable.remove(&named.name);
            }
        }
        self.delta.answer(batch, refused)
    }

    fn check(&self, model: &Model) -> Result<(), TestCaseError> {
        prop_assert_eq!(&self.sink, &model.wanted());
        let bad = model
            .there
            .iter()
            .filter(|(_, (_, quality))| *quality != Quality::Good);
        let bad: BTreeSet<String> = bad.map(|(name, _)| name.clone()).collect();
        prop_assert_eq!(&self.unreadable, &bad);
        Ok(())
    }

    /// A new stream, up to the first response.
    fn reconnect(&mut self, model: &mut Model) -> Result<(), TestCaseError> {
        let first = self.delta.connect().remove(0);
        let named: Vec<_> = first.initial_resource_versions.keys().collect();
        prop_assert_eq!(named, self.sink.keys().collect::<Vec<_>>());
        let push = model.push(&first.initial_resource_versions, true);
        let _ = self.take(model, push);
        Ok(())
    }
}

fn event() -> impl Strategy<Value = Event> {
    let quality =
        prop_oneof![4 => Just(Quality::Good), 1 => Just(Quality::Unwanted), 1 => Just(Quality::Undecodable)];
    prop_oneof![
        4 => (0..5_u8, quality).prop_map(|(name, quality)| Event::Set(name, quality)),
        2 => (0..5_u8).prop_map(Event::Delete),
        3 => Just(Event::Push),
        1 => Just(Event::LostPush),
        1 => Just(Event::Outage),
    ]
}

fn run(kind: Kind, events: &[Event]) -> Result<(), TestCaseError> {
    let mut model = Model {
        kind,
        there: BTreeMap::new(),
        clock: 0,
        changed: BTreeSet::new(),
        told: BTreeSet::new(),
        nonce: 0,
    };
    let mut client = Client {
        delta: Delta::new(Node::default(), &[kind]),
        sink: BTreeMap::new(),
        unreadable: BTreeSet::new(),
    };
    client.reconnect(&mut model)?;
    for event in events.iter().chain(&[Event::Push]) {
        match event {
            Event::Set(name, quality) => {
                model.clock += 1;
                model.there.insert(format!("ns/{name}"), (model.clock, *quality));
                model.changed.insert(format!("ns/{name}"));
            }
            Event::Delete(name) => {
                model.there.remove(&format!("ns/{name}"));
            }
            Event::Push => {
                let push = model.push(&BTreeMap::new(), false);
                let _ = client.take(&model, push);
                client.check(&model)?;
            }
            Event::LostPush => {
                let _ = model.push(&BTreeMap::new(), false);
                client.reconnect(&mut model)?;
                client.check(&model)?;
            }
            Event::Outage => {
                client.reconnect(&mut model)?;
                client.check(&model)?;
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_sink_ends_with_what_the_server_has_of_versioned_resources(events in vec(event(), 0..40)) {
        run(Kind::Address, &events)?;
    }

    #[test]
    fn the_sink_ends_with_what_the_server_has_of_whole_lists(events in vec(event(), 0..40)) {
        run(Kind::AuthorizationPolicy, &events)?;
    }

    #[test]
    fn the_scan_for_unknown_fields_takes_any_bytes(bytes in vec(any::<u8>(), 0..200)) {
        for kind in Kind::ALL {
            let _ = unknown::fields(kind.message(), "spec", &bytes);
        }
    }

    #[test]
    fn what_decodes_can_also_be_scanned(bytes in vec(any::<u8>(), 0..40)) {
        use prost::Message;
        use thyra_proto::istio::security::v1beta1::AuthorizationPolicy;
        if AuthorizationPolicy::decode(bytes.as_slice()).is_ok() {
            let message = Kind::AuthorizationPolicy.message();
            prop_assert!(unknown::fields(message, "spec", &bytes).is_ok());
        }
    }
}
