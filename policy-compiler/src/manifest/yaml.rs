//! Text to documents: YAML (JSON is a part of it) as Kubernetes reads it, in bounded time and memory.
//!
//! Invariant: any input ends in documents or in an error that names a place; no input panics, none makes more
//! than `MAX_NODES` nodes, none nests deeper than `MAX_DEPTH`, and aliases copy at most `ALIAS_BUDGET` bytes.

use std::collections::HashMap;

use granit_parser::{Event, Marker, Parser, ScalarStyle, StrInput};

use super::error::Position;
use super::node::{Entry, Node, Value};
use super::scalar;

/// Largest file, bytes. An API server takes objects of up to 1.5 MiB; a file may hold many.
pub const MAX_BYTES: usize = 16 << 20;
/// Deepest nesting; Kubernetes' own objects stay below 30.
pub const MAX_DEPTH: usize = 64;
/// Most nodes of a file.
pub const MAX_NODES: usize = 2_000_000;
/// Most bytes that aliases may copy in a file, each node counted as `NODE_COST`.
const ALIAS_BUDGET: usize = 8 << 20;
/// What a node costs besides its text.
const NODE_COST: usize = 64;

/// What is wrong with a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub at: Position,
    pub text: String,
}

impl Fault {
    fn new(at: Position, text: impl Into<String>) -> Self {
        Self {
            at,
            text: text.into(),
        }
    }
}

/// The documents of a text that are not empty.
pub(super) fn documents(text: &str) -> Result<Vec<Node>, Fault> {
    let start = Position { line: 1, column: 1 };
    if text.len() > MAX_BYTES {
        return Err(Fault::new(
            start,
            format!(
                "the file has {} bytes, more than {MAX_BYTES}; split it",
                text.len()
            ),
        ));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    refuse_controls(text)?;
    // Tabs separate tokens in JSON, and a raw one inside a JSON string is not JSON; in YAML they may not
    // indent.
    let spaced = text
        .trim_start()
        .starts_with(['{', '['])
        .then(|| text.replace('\t', " "));
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(spaced.as_deref().unwrap_or(text));
    while let Some(next) = next(&mut parser)? {
        builder.take(next)?;
    }
    Ok(builder.documents)
}

/// YAML has no control characters but tab, line feed and carriage return; the parser takes NUL for the end.
fn refuse_controls(text: &str) -> Result<(), Fault> {
    let (mut line, mut column) = (1, 0);
    for character in text.chars() {
        column += 1;
        match character {
            '\n' => (line, column) = (line + 1, 0),
            '\t' | '\r' | '\u{85}' => {}
            c if c.is_control() => {
                let code = u32::from(c);
                let text = format!("control character U+{code:04X}; YAML is text, remove it");
                return Err(Fault::new(Position { line, column }, text));
            }
            _ => {}
        }
    }
    Ok(())
}

struct Step<'a> {
    event: Event<'a>,
    at: Position,
}

fn next<'a>(parser: &mut Parser<'a, StrInput<'a>>) -> Result<Option<Step<'a>>, Fault> {
    match parser.next_event() {
        None => Ok(None),
        Some(Ok((event, span))) => Ok(Some(Step {
            event,
            at: position(&span.start),
        })),
        Some(Err(error)) => Err(Fault::new(
            position(error.marker()),
            format!("not YAML: {}", error.info()),
        )),
    }
}

fn position(marker: &Marker) -> Position {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Position {
        line: number(marker.line()).max(1),
        column: number(marker.col()).saturating_add(1),
    }
}

/// A collection that is still open.
struct Open {
    at: Position,
    anchor: usize,
    /// `cost` of the builder when it began.
    cost_before: usize,
    /// Levels of the deepest child so far.
    height: usize,
    kind: OpenKind,
}

enum OpenKind {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        seen: HashMap<Box<str>, Position>,
        key: Option<(Box<str>, Position)>,
    },
}

/// A complete node that an alias may copy.
struct Anchored {
    node: Node,
    size: Size,
}

/// What a subtree costs, in bytes and levels.
#[derive(Clone, Copy)]
struct Size {
    cost: usize,
    height: usize,
}

#[derive(Default)]
struct Builder {
    documents: Vec<Node>,
    open: Vec<Open>,
    anchors: HashMap<usize, Anchored>,
    nodes: usize,
    /// Cost of all nodes so far, to know what a subtree costs.
    cost: usize,
    copied: usize,
}

impl Builder {
    fn take(&mut self, step: Step<'_>) -> Result<(), Fault> {
        let Step { event, at } = step;
        match event {
            Event::StreamStart | Event::StreamEnd | Event::DocumentStart(..) => Ok(()),
            Event::DocumentEnd => {
                self.anchors.clear();
                Ok(())
            }
            Event::Alias(id) => self.alias(id, at),
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.map(|tag| tag.suffix().to_owned());
                self.scalar(&text, style, anchor, tag.as_deref(), at)
            }
            Event::SequenceStart(_, anchor, _) => self.begin(at, anchor, OpenKind::List(Vec::new())),
            Event::MappingStart(_, anchor, _) => {
                let kind = OpenKind::Map {
                    entries: Vec::new(),
                    seen: HashMap::new(),
                    key: None,
                };
                self.begin(at, anchor, kind)
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(at),
            // Comments and the events of options that are off.
            _ => Ok(()),
        }
    }

    fn count(&mut self, text: usize, at: Position) -> Result<(), Fault> {
        self.nodes += 1;
        self.cost += NODE_COST + text;
        if self.nodes > MAX_NODES {
            return Err(Fault::new(
                at,
                format!("more than {MAX_NODES} values in one file; split it"),
            ));
        }
        Ok(())
    }

    fn begin(&mut self, at: Position, anchor: usize, kind: OpenKind) -> Result<(), Fault> {
        if self.open.len() >= MAX_DEPTH {
            return Err(Fault::new(at, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        if self.key_is_next() {
            return Err(Fault::new(at, "a list or mapping can't be a key; write a string"));
        }
        let cost_before = self.cost;
        self.count(0, at)?;
        self.open.push(Open {
            at,
            anchor,
            cost_before,
            height: 0,
            kind,
        });
        Ok(())
    }

    fn end(&mut self, at: Position) -> Result<(), Fault> {
        let Some(Open {
            at,
            anchor,
            cost_before,
            height,
            kind,
        }) = self.open.pop()
        else {
            return Err(Fault::new(at, "not YAML: a collection ends that never began"));
        };
        let value = match kind {
            OpenKind::List(items) => Value::List(items),
            OpenKind::Map { entries, .. } => Value::Map(merged(entries)?),
        };
        let size = Size {
            cost: self.cost - cost_before,
            height: height + 1,
        };
        self.finish(Node { at, value }, anchor, size)
    }

    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&str>,
        at: Position,
    ) -> Result<(), Fault> {
        self.count(text.len(), at)?;
        let is_plain = style == ScalarStyle::Plain && tag.is_none();
        if self.key_is_next() {
            let key = if is_plain { scalar::key(text) } else { text.into() };
            return self.key(key, at);
        }
        let value = match (is_plain, tag) {
            (true, _) => scalar::plain(text),
            (false, None | Some("str")) => Value::Text(text.into()),
            (false, Some("int" | "float" | "bool" | "null")) => scalar::plain(text),
            (false, Some(other)) => {
                return Err(Fault::new(
                    at,
                    format!("tag `{other}` is not known to Kubernetes; remove it"),
                ));
            }
        };
        self.finish(
            Node { at, value },
            anchor,
            Size {
                cost: NODE_COST + text.len(),
                height: 0,
            },
        )
    }

    fn alias(&mut self, id: usize, at: Position) -> Result<(), Fault> {
        if self.key_is_next() {
            return Err(Fault::new(at, "an alias can't be a key here; write it out"));
        }
        let Some(Anchored { node, size }) = self.anchors.get(&id) else {
            return Err(Fault::new(
                at,
                "an alias to an anchor that isn't complete before it",
            ));
        };
        let size = *size;
        self.copied += size.cost;
        if self.copied > ALIAS_BUDGET {
            return Err(Fault::new(
                at,
                "aliases unfold to more than 8 MiB; write the values out",
            ));
        }
        if self.open.len() + size.height > MAX_DEPTH {
            return Err(Fault::new(
                at,
                format!("aliases nest deeper than {MAX_DEPTH} levels"),
            ));
        }
        self.cost += size.cost;
        let copy = Node {
            at,
            value: node.value.clone(),
        };
        self.finish(copy, 0, size)
    }

    /// The next node would be a key.
    fn key_is_next(&self) -> bool {
        matches!(
            self.open.last(),
            Some(Open {
                kind: OpenKind::Map { key: None, .. },
                ..
            })
        )
    }

    fn key(&mut self, text: Box<str>, at: Position) -> Result<(), Fault> {
        let Some(Open {
            kind: OpenKind::Map { seen, key, .. },
            ..
        }) = self.open.last_mut()
        else {
            return Err(Fault::new(at, "not YAML: a key outside of a mapping"));
        };
        if let Some(first) = seen.insert(text.clone(), at) {
            return Err(Fault::new(
                at,
                format!(
                    "key `{text}` stands twice in this mapping, first in line {}; remove one",
                    first.line
                ),
            ));
        }
        *key = Some((text, at));
        Ok(())
    }

    /// Puts a complete node where it belongs.
    fn finish(&mut self, node: Node, anchor: usize, size: Size) -> Result<(), Fault> {
        if anchor != 0 {
            self.copied += size.cost;
            if self.copied > ALIAS_BUDGET {
                return Err(Fault::new(
                    node.at,
                    "anchored values are larger than 8 MiB; write them out",
                ));
            }
            self.anchors.insert(
                anchor,
                Anchored {
                    node: node.clone(),
                    size,
                },
            );
        }
        if let Some(open) = self.open.last_mut() {
            open.height = open.height.max(size.height);
        }
        match self.open.last_mut() {
            None if node.value == Value::Null => {}
            None => self.documents.push(node),
            Some(Open {
                kind: OpenKind::List(items),
                ..
            }) => items.push(node),
            Some(Open {
                kind: OpenKind::Map { entries, key, .. },
                ..
            }) => match key.take() {
                Some((key, at)) => entries.push(Entry { key, at, node }),
                None => return Err(Fault::new(node.at, "not YAML: a value without a key")),
            },
        }
        Ok(())
    }
}

/// The entries with merge keys (`<<`) unfolded: what stands in the mapping itself wins, then the first merged
/// one.
fn merged(mut entries: Vec<Entry>) -> Result<Vec<Entry>, Fault> {
    let Some(index) = entries.iter().position(|e| &*e.key == "<<") else {
        return Ok(entries);
    };
    let Node { at, value } = entries.remove(index).node;
    let sources = match value {
        Value::Map(source) => vec![Node {
            at,
            value: Value::Map(source),
        }],
        Value::List(items) => items,
        Value::Null | Value::Bool(..) | Value::Whole(_) | Value::Float(_) | Value::Text(_) => {
            return Err(Fault::new(
                at,
                "a merge key (`<<`) takes a mapping or a list of mappings",
            ));
        }
    };
    for Node { at, value } in sources {
        let Value::Map(source) = value else {
            return Err(Fault::new(
                at,
                "a merge key (`<<`) takes a mapping or a list of mappings",
            ));
        };
        for entry in source {
            if !entries.iter().any(|e| e.key == entry.key) {
                entries.push(entry);
            }
        }
    }
    Ok(entries)
}
