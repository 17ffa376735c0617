//! YAML with the line of every node, for the lab's own files.
//!
//! Invariant: nothing in a file is skipped: an unknown key, a repeated key or a value of the wrong form is a
//! problem with
//! its file and line.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use granit_parser::{Event, Parser, ScalarStyle, Span};

/// Nodes of one file, aliases counted as often as they are used: more is an anchor bomb.
const MAX_NODES: usize = 100_000;
/// Nested collections; a scenario needs four.
const MAX_DEPTH: usize = 64;

/// What is wrong in a file, where, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {text}", file.display())]
pub(crate) struct Problem {
    pub(crate) file: Arc<Path>,
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) file: Arc<Path>,
    pub(crate) line: usize,
    pub(crate) value: Value,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// As written; `plain` if without quotes.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

/// A mapping whose keys were checked.
pub(crate) struct Fields<'a> {
    node: &'a Node,
    what: &'static str,
    entries: &'a [(Node, Node)],
}

/// A collection that isn't finished yet.
struct Open {
    node: Node,
    key: Option<Node>,
    anchor: usize,
}

struct Loader {
    file: Arc<Path>,
    stack: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    root: Option<Node>,
}

/// Reads the one document of a file; `None` if it holds nothing.
///
/// # Errors
/// Text that isn't YAML, or more documents, nodes or levels than a lab file can need.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Option<Node>, Problem> {
    let file: Arc<Path> = file.into();
    let mut loader = Loader {
        file: file.clone(),
        stack: Vec::new(),
        anchors: HashMap::new(),
        nodes: 0,
        root: None,
    };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| Problem {
            file: file.clone(),
            line: error.marker().line(),
            text: format!("not YAML: {}", error.info()),
        })?;
        loader.take(event, span)?;
    }
    Ok(loader.root.filter(|root| !root.is_null()))
}

impl Loader {
    fn problem(&self, span: Span, text: &str) -> Problem {
        Problem {
            file: self.file.clone(),
            line: span.start.line(),
            text: text.to_owned(),
        }
    }

    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Problem> {
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let value = Value::Scalar {
                    text: text.into_owned(),
                    plain: matches!(style, ScalarStyle::Plain),
                };
                let node = self.node(span, value);
                self.finish(node, anchor, 1, span)
            }
            Event::SequenceStart(_, anchor, _) => self.open(Value::List(Vec::new()), anchor, span),
            Event::MappingStart(_, anchor, _) => self.open(Value::Map(Vec::new()), anchor, span),
            Event::SequenceEnd | Event::MappingEnd => match self.stack.pop() {
                Some(open) => {
                    let size = open.node.size();
                    self.finish(open.node, open.anchor, size, span)
                }
                None => Ok(()),
            },
            Event::Alias(anchor) => {
                let Some((node, size)) = self.anchors.get(&anchor).cloned() else {
                    return Err(self.problem(span, "an alias without its anchor; write the value out"));
                };
                self.count(size, span)?;
                self.finish(node, 0, size, span)
            }
            Event::DocumentStart(..) if self.root.is_some() => {
                Err(self.problem(span, "a second document; put everything into one"))
            }
            _ => Ok(()),
        }
    }

    fn node(&self, span: Span, value: Value) -> Node {
        Node {
            file: self.file.clone(),
            line: span.start.line(),
            value,
        }
    }

    fn open(&mut self, value: Value, anchor: usize, span: Span) -> Result<(), Problem> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(self.problem(span, "nested too deeply; a scenario needs four levels"));
        }
        let node = self.node(span, value);
        self.stack.push(Open {
            node,
            key: None,
            anchor,
        });
        Ok(())
    }

    fn count(&mut self, size: usize, span: Span) -> Result<(), Problem> {
        self.nodes = self.nodes.saturating_add(size);
        if self.nodes > MAX_NODES {
            return Err(self.problem(span, "more than 100000 values; split the scenario"));
        }
        Ok(())
    }

    fn finish(&mut self, node: Node, anchor: usize, size: usize, span: Span) -> Result<(), Problem> {
        self.count(1, span)?;
        if anchor != 0 {
            self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(top) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match (&mut top.node.value, top.key.take()) {
            (Value::List(items), _) => items.push(node),
            (Value::Map(entries), Some(key)) => entries.push((key, node)),
            (Value::Map(_) | Value::Scalar { .. }, _) => top.key = Some(node),
        }
        Ok(())
    }
}

impl Node {
    pub(crate) fn problem(&self, text: impl Display) -> Problem {
        Problem {
            file: self.file.clone(),
            line: self.line,
            text: text.to_string(),
        }
    }

    fn size(&self) -> usize {
        match &self.value {
            Value::Scalar { .. } => 1,
            Value::List(items) => 1 + items.iter().map(Self::size).sum::<usize>(),
            Value::Map(entries) => {
                1 + entries
                    .iter()
                    .map(|(key, value)| key.size() + value.size())
                    .sum::<usize>()
            }
        }
    }

    fn is_null(&self) -> bool {
        let null = |text: &str| matches!(text, "" | "~" | "null");
        matches!(&self.value, Value::Scalar { text, plain: true } if null(text))
    }

    /// Any scalar, as written.
    pub(crate) fn text(&self, what: &str) -> Result<&str, Problem> {
        match &self.value {
            Value::Scalar { text, .. } if !self.is_null() => Ok(text),
            _ => Err(self.problem(format_args!("`{what}` needs a single value"))),
        }
    }

    pub(crate) fn parsed<T: FromStr>(&self, what: &str, form: &str) -> Result<T, Problem> {
        let text = self.text(what)?;
        text.parse()
            .map_err(|_| self.problem(format_args!("`{what}` is `{text}`; it must be {form}")))
    }

    pub(crate) fn boolean(&self, what: &str) -> Result<bool, Problem> {
        self.parsed(what, "true or false")
    }

    pub(crate) fn list(&self, what: &str) -> Result<&[Node], Problem> {
        match &self.value {
            Value::List(items) => Ok(items),
            _ => Err(self.problem(format_args!("{what} must be a list"))),
        }
    }

    pub(crate) fn map(&self, what: &str) -> Result<&[(Node, Node)], Problem> {
        let Value::Map(entries) = &self.value else {
            return Err(self.problem(format_args!("{what} must be a mapping (`key: value`)")));
        };
        for (at, (key, _)) in entries.iter().enumerate() {
            let name = key.text("a key")?;
            if entries[..at]
                .iter()
                .any(|(other, _)| other.text("a key").is_ok_and(|other| other == name))
            {
                return Err(key.problem(format_args!("`{name}` is given twice; keep one")));
            }
        }
        Ok(entries)
    }

    /// A mapping with no other keys than `known`.
    pub(crate) fn fields(&self, what: &'static str, known: &[&str]) -> Result<Fields<'_>, Problem> {
        let entries = self.map(what)?;
        for (key, _) in entries {
            let name = key.text("a key")?;
            if !known.contains(&name) {
                let known = known.join(", ");
                return Err(key.problem(format_args!("unknown key `{name}` in {what}; known are {known}")));
            }
        }
        Ok(Fields {
            node: self,
            what,
            entries,
        })
    }
}

impl<'a> Fields<'a> {
    /// The value, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Node> {
        let found = self
            .entries
            .iter()
            .find(|(name, _)| name.text("a key").is_ok_and(|name| name == key));
        found.map(|(_, value)| value).filter(|value| !value.is_null())
    }

    pub(crate) fn need(&self, key: &str) -> Result<&'a Node, Problem> {
        self.get(key).ok_or_else(|| {
            let what = self.what;
            self.node.problem(format_args!("{what} has no `{key}`; add it"))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Node, Problem, parse};

    fn read(text: &str) -> Result<Option<Node>, Problem> {
        parse(Path::new("x.yaml"), text)
    }

    #[test]
    fn an_unknown_key_is_a_problem_with_its_line() {
        let node = read("a: 1\nb: 2\n").expect("yaml").expect("a document");
        let error = node.fields("an entry", &["a"]).err().expect("b is unknown");
        assert_eq!(
            error.to_string(),
            "x.yaml:2: unknown key `b` in an entry; known are a"
        );
    }

    #[test]
    fn a_repeated_key_is_a_problem() {
        let node = read("a: 1\na: 2\n").expect("yaml").expect("a document");
        assert_eq!(node.map("it").expect_err("twice").line, 2);
    }

    #[test]
    fn an_anchor_bomb_ends_in_a_problem() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let below = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{below}]\n"));
        }
        assert!(read(&text).is_err());
        assert!(read(&"[".repeat(10_000)).is_err());
    }

    #[test]
    fn anchors_and_empty_files_are_read() {
        let node = read("- &p {a: 1}\n- *p\n").expect("yaml").expect("a document");
        assert_eq!(node.list("it").expect("a list").len(), 2);
        assert!(read("# nothing\n").expect("yaml").is_none());
    }
}
