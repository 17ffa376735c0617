//! One mapping of a policy with its path, read field by field.
//!
//! Invariant: each problem is reported where it stands, and counts for the level that is being read.

use super::error::Position;
use super::node::{Node, Value};
use super::reader::Reader;
use super::shape::{join, unknown_field};
use crate::finding::Code;
use crate::policy::{Field, Labels};

/// A mapping of a policy.
pub(super) struct Level<'n> {
    pub node: &'n Node,
    pub path: String,
}

impl<'n> Level<'n> {
    /// `None` (and a report) when `node` is no mapping; unknown fields are reported.
    pub(super) fn open(
        node: &'n Node,
        path: String,
        known: &[&str],
        reader: &mut Reader<'_>,
    ) -> Option<Self> {
        let Value::Map(entries) = &node.value else {
            reader.unreadable(
                node.at,
                &path,
                format!("`{path}` must be a mapping, not {}", node.kind()),
            );
            return None;
        };
        for entry in entries.iter().filter(|e| !known.contains(&&*e.key)) {
            let field = join(&path, &entry.key);
            reader.unreadable_as(
                Code::UnknownField,
                entry.at,
                &field,
                unknown_field(&entry.key, &path, known.iter().copied()),
            );
        }
        Some(Self { node, path })
    }

    /// The path of a field.
    pub(super) fn field(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// Where a field stands, or the level itself.
    pub(super) fn at(&self, key: &str) -> Position {
        self.node
            .entries()
            .iter()
            .find(|e| &*e.key == key)
            .map_or(self.node.at, |e| e.at)
    }

    /// The field is written down, be it as null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.node.entries().iter().any(|e| &*e.key == key)
    }

    /// A string; absent is `None`.
    pub(super) fn text(&self, key: &str, reader: &mut Reader<'_>) -> Option<&'n str> {
        let node = self.node.get(key)?;
        text(node, &self.field(key), reader)
    }

    /// Items of a list; absent is empty.
    pub(super) fn list(&self, key: &str, reader: &mut Reader<'_>) -> &'n [Node] {
        let Some(node) = self.node.get(key) else {
            return &[];
        };
        if !matches!(node.value, Value::List(_)) {
            let path = self.field(key);
            reader.unreadable(
                node.at,
                &path,
                format!("`{path}` must be a list, not {}", node.kind()),
            );
        }
        node.items()
    }

    /// Items of a list that means something else when it is there and empty.
    pub(super) fn list_with_items(&self, key: &str, reader: &mut Reader<'_>) -> &'n [Node] {
        let empty = self.has(key)
            && self
                .node
                .get(key)
                .is_none_or(|n| n.value == Value::List(Vec::new()));
        if empty {
            let path = self.field(key);
            let text =
                format!("`{path}` is empty; leave it out to have no constraint, or list what it matches");
            reader.unreadable(self.at(key), &path, text);
        }
        self.list(key, reader)
    }

    /// Strings of a list, with their places.
    pub(super) fn texts(&self, key: &str, reader: &mut Reader<'_>) -> Vec<(Position, String)> {
        let items = self.list(key, reader);
        let field = self.field(key);
        let read = |(index, item): (usize, &'n Node)| {
            let value = text(item, &format!("{field}[{index}]"), reader)?;
            Some((item.at, value.to_owned()))
        };
        items.iter().enumerate().filter_map(read).collect()
    }

    /// The values of `key`, each by `parse`.
    fn parsed<T, E: ToString>(
        &self,
        key: &str,
        parse: &impl Fn(&str) -> Result<T, E>,
        code: Code,
        reader: &mut Reader<'_>,
    ) -> Vec<T> {
        let field = self.field(key);
        let mut values = Vec::new();
        for (index, (at, value)) in self.texts(key, reader).iter().enumerate() {
            match parse(value) {
                Ok(value) => values.push(value),
                Err(error) => {
                    let path = format!("{field}[{index}]");
                    reader.unreadable_as(code, *at, &path, format!("`{path}`: {}", error.to_string()));
                }
            }
        }
        values
    }

    /// A field and its `not*` twin.
    pub(super) fn pair<T, E: ToString>(
        &self,
        keys: (&str, &str),
        parse: impl Fn(&str) -> Result<T, E>,
        reader: &mut Reader<'_>,
    ) -> Field<T> {
        self.pair_as(Code::BadValue, keys, parse, reader)
    }

    /// The same, whose mistakes have a code of their own.
    pub(super) fn pair_as<T, E: ToString>(
        &self,
        code: Code,
        (key, not_key): (&str, &str),
        parse: impl Fn(&str) -> Result<T, E>,
        reader: &mut Reader<'_>,
    ) -> Field<T> {
        Field {
            values: self.parsed(key, &parse, code, reader),
            not_values: self.parsed(not_key, &parse, code, reader),
        }
    }

    /// `selector.matchLabels`; absent is `None`, `{}` is empty.
    pub(super) fn selector(&self, reader: &mut Reader<'_>) -> Option<Labels> {
        let node = self.node.get("selector")?;
        let level = Level::open(node, self.field("selector"), &["matchLabels"], reader)?;
        let mut labels = Labels::new();
        let Some(node) = node.get("matchLabels") else {
            return Some(labels);
        };
        let path = level.field("matchLabels");
        if !matches!(node.value, Value::Map(_)) {
            reader.unreadable(
                node.at,
                &path,
                format!("`{path}` must be a mapping, not {}", node.kind()),
            );
            return None;
        }
        for entry in node.entries() {
            let place = format!("{path}.{}", entry.key);
            let value = text(&entry.node, &place, reader)?;
            if entry.key.is_empty() || entry.key.contains('*') || value.contains('*') {
                let text =
                    format!("`{place}`: a selector has no wildcards and no empty keys; write exact labels");
                reader.unreadable(entry.at, &place, text);
                return None;
            }
            labels.insert(entry.key.to_string(), value.to_owned());
        }
        Some(labels)
    }
}

/// The text of a node.
pub(super) fn text<'n>(node: &'n Node, path: &str, reader: &mut Reader<'_>) -> Option<&'n str> {
    if let Some(text) = node.text() {
        return Some(text);
    }
    let quotes = match node.value {
        Value::Bool(..) | Value::Whole(_) | Value::Float(_) => "; put it in quotes",
        Value::Null | Value::Text(_) | Value::List(_) | Value::Map(_) => "",
    };
    reader.unreadable(
        node.at,
        path,
        format!("`{path}` must be a string, not {}{quotes}", node.kind()),
    );
    None
}
