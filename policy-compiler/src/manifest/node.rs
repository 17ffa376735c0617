//! A parsed YAML or JSON value that knows where it stands.
//!
//! Invariant: depth is bounded by the reader that built it (`yaml::MAX_DEPTH`), so walks may recurse.

use super::error::Position;

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// Where it begins.
    pub(super) at: Position,
    /// What it is.
    pub(super) value: Value,
}

/// As Kubernetes reads YAML: scalars by YAML 1.1, keys as strings.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// With the text that made it one.
    Bool(bool, &'static str),
    /// A whole number.
    Whole(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(Box<str>),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in order; keys are distinct.
    Map(Vec<Entry>),
}

/// A key with its place, and what it holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// As a string.
    pub(super) key: Box<str>,
    /// Of the key.
    pub(super) at: Position,
    /// The value.
    pub(super) node: Node,
}

impl Node {
    /// The value of a key; none if this is no mapping, the key is absent, or it holds null (absent, to
    /// Kubernetes).
    #[must_use]
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        let entry = self.entries().iter().find(|e| &*e.key == key)?;
        (entry.node.value != Value::Null).then_some(&entry.node)
    }

    /// The value at a path of keys.
    #[must_use]
    pub(super) fn at_path(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |node, key| node.get(key))
    }

    /// Entries of a mapping; empty for anything else.
    #[must_use]
    pub(super) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// Items of a sequence; empty for anything else.
    #[must_use]
    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// Text, if it is text.
    #[must_use]
    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number, if it is one.
    #[must_use]
    pub(super) fn whole(&self) -> Option<i64> {
        match self.value {
            Value::Whole(number) => Some(number),
            _ => None,
        }
    }

    /// A boolean, if it is one.
    #[must_use]
    pub(super) fn boolean(&self) -> Option<bool> {
        match self.value {
            Value::Bool(value, _) => Some(value),
            _ => None,
        }
    }

    /// Text of a key.
    #[must_use]
    pub(super) fn text_of(&self, key: &str) -> Option<&str> {
        self.get(key)?.text()
    }

    /// What this is, for an error text.
    #[must_use]
    pub(super) fn kind(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(value, text) if *text == if *value { "true" } else { "false" } => {
                format!("the boolean `{text}`")
            }
            Value::Bool(value, text) => format!("`{text}`, which YAML reads as the boolean {value}"),
            Value::Whole(number) => format!("the number `{number}`"),
            Value::Float(number) => format!("the number `{number}`"),
            Value::Text(text) => format!("the string `{}`", shorten(text)),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    /// The value as JSON.
    #[must_use]
    pub(super) fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value, _) => Json::Bool(*value),
            Value::Whole(number) => Json::from(*number),
            Value::Float(number) => Json::from(*number),
            Value::Text(text) => Json::String(text.to_string()),
            Value::List(items) => Json::Array(items.iter().map(Node::to_json).collect()),
            Value::Map(entries) => Json::Object(
                entries
                    .iter()
                    .map(|e| (e.key.to_string(), e.node.to_json()))
                    .collect(),
            ),
        }
    }

    /// A node without places from JSON.
    #[must_use]
    pub(super) fn from_json(json: &serde_json::Value) -> Node {
        use serde_json::Value as Json;
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(true) => Value::Bool(true, "true"),
            Json::Bool(false) => Value::Bool(false, "false"),
            Json::Number(number) => number
                .as_i64()
                .map_or_else(|| Value::Float(number.as_f64().unwrap_or(f64::NAN)), Value::Whole),
            Json::String(text) => Value::Text(text.as_str().into()),
            Json::Array(items) => Value::List(items.iter().map(Node::from_json).collect()),
            Json::Object(entries) => Value::Map(
                entries
                    .iter()
                    .map(|(key, value)| Entry {
                        key: key.as_str().into(),
                        at: Position::default(),
                        node: Node::from_json(value),
                    })
                    .collect(),
            ),
        };
        Node {
            at: Position::default(),
            value,
        }
    }
}

/// The text, cut for an error message.
pub(super) fn shorten(text: &str) -> String {
    const MOST: usize = 80;
    let mut chars = text.chars();
    let head: String = chars.by_ref().take(MOST).collect();
    if chars.next().is_some() {
        format!("{head}…")
    } else {
        head
    }
}
