//! Which fields a kind has and of what type, and the check that finds the ones it hasn't.
//!
//! Invariant: what passes has only known fields of the right type, as deep as the shape goes; what can't
//! matter to a verdict is `Any`.

use super::node::{Node, Value, shorten};
use super::reader::Reader;
use crate::finding::Code;

/// What may stand in a place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    /// Anything: not looked at.
    Any,
    /// A string.
    Text,
    /// A whole number.
    Whole,
    /// A boolean.
    Boolean,
    /// A string or a whole number (`targetPort`).
    TextOrWhole,
    /// A mapping from strings to strings.
    Labels,
    /// A list.
    List(&'static Shape),
    /// A mapping from any key.
    Map(&'static Shape),
    /// A mapping with these keys and no others.
    Fields(&'static [Field]),
}

/// Name and shape.
pub(super) type Field = (&'static str, Shape);

/// A list of strings.
pub(super) const TEXTS: Shape = Shape::List(&Shape::Text);

impl Shape {
    fn wanted(self) -> &'static str {
        match self {
            Shape::Any => "anything",
            Shape::Text => "a string",
            Shape::Whole => "a whole number",
            Shape::Boolean => "true or false",
            Shape::TextOrWhole => "a string or a whole number",
            Shape::Labels | Shape::Map(_) | Shape::Fields(_) => "a mapping",
            Shape::List(_) => "a list",
        }
    }
}

/// Reports every place under `node` that isn't of `shape`; `path` is its path in the object. Null is absent.
pub(super) fn check(shape: Shape, node: &Node, path: &str, reader: &mut Reader<'_>) {
    match (shape, &node.value) {
        (Shape::Any, _)
        | (_, Value::Null)
        | (Shape::Text | Shape::TextOrWhole, Value::Text(_))
        | (Shape::Whole | Shape::TextOrWhole, Value::Whole(_))
        | (Shape::Boolean, Value::Bool(..)) => {}
        (Shape::Labels, Value::Map(entries)) => {
            for entry in entries {
                check(
                    Shape::Text,
                    &entry.node,
                    &format!("{path}.{}", shorten(&entry.key)),
                    reader,
                );
            }
        }
        (Shape::List(of), Value::List(items)) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                if item.value == Value::Null {
                    reader.error(
                        item.at,
                        format!("`{path}` is empty; remove it or give {}", of.wanted()),
                    );
                }
                check(*of, item, &path, reader);
            }
        }
        (Shape::Map(of), Value::Map(entries)) => {
            for entry in entries {
                check(
                    *of,
                    &entry.node,
                    &format!("{path}.{}", shorten(&entry.key)),
                    reader,
                );
            }
        }
        (Shape::Fields(fields), Value::Map(entries)) => {
            for entry in entries {
                match fields.iter().find(|(name, _)| *name == &*entry.key) {
                    Some((name, of)) => check(*of, &entry.node, &join(path, name), reader),
                    None => reader.mistake(
                        entry.at,
                        Code::UnknownField,
                        unknown_field(&entry.key, path, names(fields)),
                    ),
                }
            }
        }
        _ => reader.error(node.at, wrong_type(shape, node, path)),
    }
}

/// `a.b`, or `b` at the top.
pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

fn wrong_type(shape: Shape, node: &Node, path: &str) -> String {
    let quotes = match (shape, &node.value) {
        (Shape::Text, Value::Bool(..) | Value::Whole(_) | Value::Float(_)) => "; put it in quotes",
        (Shape::Whole, Value::Text(text)) if text.parse::<i64>().is_ok() => "; remove the quotes",
        _ => "",
    };
    format!("`{path}` must be {}, not {}{quotes}", shape.wanted(), node.kind())
}

pub(super) fn names(fields: &'static [Field]) -> impl Iterator<Item = &'static str> {
    fields.iter().map(|(name, _)| *name)
}

/// The text for a field that is not known.
pub(super) fn unknown_field<'a>(key: &str, path: &str, known: impl Iterator<Item = &'a str>) -> String {
    let place = if path.is_empty() {
        "here".to_owned()
    } else {
        format!("in `{path}`")
    };
    match closest(key, known) {
        Some(name) => format!("unknown field `{}` {place}; did you mean `{name}`?", shorten(key)),
        None => format!("unknown field `{}` {place}; remove it", shorten(key)),
    }
}

/// The known name that a slip of the pen turns into `key`, if there is one.
pub(super) fn closest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 64;
    if key.len() > LONGEST {
        return None;
    }
    let lower = key.to_ascii_lowercase();
    let most = ((key.len() + 1) / 3).clamp(1, 3);
    known
        .map(|name| (distance(&lower, &name.to_ascii_lowercase()), name))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Letters to insert, remove, replace or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
