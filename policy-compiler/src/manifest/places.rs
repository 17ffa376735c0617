//! Where the parts of a policy stand in its file.
//!
//! Invariant: a path is written as in errors (`spec.rules[0].from[1].source.principals[0]`); what has no place of its
//! own has that of what it is in.

use std::collections::BTreeMap;

use super::error::Position;
use super::node::{Node, Value};
use super::object::Body;
use super::shape::join;

/// Places by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places(BTreeMap<Box<str>, Position>);

impl Places {
    /// Of a policy's spec; of other kinds none are kept.
    pub(super) fn of(object: &Node, body: &Body) -> Self {
        let mut places = Self::default();
        places.0.insert(Box::default(), object.at);
        let is_policy = matches!(
            body,
            Body::AuthorizationPolicy(_) | Body::PeerAuthentication(_) | Body::RequestAuthentication(_)
        );
        if let Some(spec) = object.get("spec").filter(|_| is_policy) {
            places.walk(spec, "spec".to_owned());
        }
        places
    }

    /// Nesting is bounded by `MAX_DEPTH`, and so is this recursion.
    fn walk(&mut self, node: &Node, path: String) {
        match &node.value {
            Value::Map(entries) => {
                for entry in entries {
                    self.walk(&entry.node, join(&path, &entry.key));
                }
            }
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.walk(item, format!("{path}[{index}]"));
                }
            }
            Value::Null | Value::Bool(..) | Value::Whole(_) | Value::Float(_) | Value::Text(_) => {}
        }
        self.0.insert(path.into(), node.at);
    }

    /// The place of a path, or of the nearest that holds it.
    #[must_use]
    pub fn at(&self, path: &str) -> Position {
        let mut path = path;
        loop {
            if let Some(position) = self.0.get(path) {
                return *position;
            }
            path = path.rfind(['.', '[']).map_or("", |end| &path[..end]);
            if path.is_empty() {
                return self.0.get("").copied().unwrap_or_default();
            }
        }
    }
}
