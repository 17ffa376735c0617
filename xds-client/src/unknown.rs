//! Finds what a protobuf decoder drops in silence: fields and enum values that this build doesn't know.
//!
//! Invariant: walks the same bytes that were decoded, along the descriptors of the same `.proto` files, so
//! that a field is either in the decoded message or in this list.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use prost::Message;
use prost::bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

/// Messages and enums by full name.
static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    // Checked in beside the generated code; a test holds them together.
    let set = FileDescriptorSet::decode(thyra_proto::ISTIO_DESCRIPTORS).unwrap_or_default();
    Schema::new(&set)
});

/// The bytes are not a message of the named type.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// Not protobuf.
    #[error("malformed protobuf in `{path}`")]
    Malformed {
        /// Where, in field names.
        path: String,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// A length that points past the end.
    #[error("truncated protobuf in `{path}`")]
    Truncated {
        /// Where, in field names.
        path: String,
    },
    /// No descriptor of that name.
    #[error("no descriptor of `{message}` in this build")]
    NoDescriptor {
        /// Full protobuf name.
        message: String,
    },
}

/// Unknown fields and enum values of `bytes`, a message with the full name `message`, as paths below `root`
/// (`spec.rules[0].from[0].source field 99`), each once, in order of appearance.
///
/// # Errors
/// If the bytes aren't protobuf or the message isn't one of package `istio`.
pub fn fields(message: &str, root: &str, bytes: &[u8]) -> Result<Vec<String>, WalkError> {
    let mut walk = Walk {
        schema: &SCHEMA,
        found: Vec::new(),
        seen: BTreeSet::new(),
    };
    walk.message(message, root, bytes)?;
    Ok(walk.found)
}

struct Schema {
    messages: BTreeMap<String, Shape>,
    enums: BTreeMap<String, BTreeSet<i32>>,
}

#[derive(Default)]
struct Shape {
    fields: BTreeMap<u32, Field>,
    is_map_entry: bool,
}

struct Field {
    name: String,
    repeated: bool,
    holds: Holds,
}

enum Holds {
    Message(String),
    Enum(String),
    Scalar,
}

struct Walk<'a> {
    schema: &'a Schema,
    found: Vec<String>,
    seen: BTreeSet<String>,
}

impl Schema {
    fn new(set: &FileDescriptorSet) -> Self {
        let mut schema = Self {
            messages: BTreeMap::new(),
            enums: BTreeMap::new(),
        };
        for file in &set.file {
            for message in &file.message_type {
                schema.add_message(file.package(), message);
            }
            for item in &file.enum_type {
                schema.add_enum(file.package(), item);
            }
        }
        schema
    }

    fn add_message(&mut self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            self.add_message(&name, nested);
        }
        for item in &message.enum_type {
            self.add_enum(&name, item);
        }
        let fields = message.field.iter().filter_map(|field| {
            let number = u32::try_from(field.number()).ok()?;
            Some((number, Field::new(field)))
        });
        let is_map_entry = message
            .options
            .as_ref()
            .is_some_and(|options| options.map_entry());
        self.messages.insert(
            name,
            Shape {
                fields: fields.collect(),
                is_map_entry,
            },
        );
    }

    fn add_enum(&mut self, scope: &str, item: &EnumDescriptorProto) {
        let numbers = item.value.iter().map(|value| value.number()).collect();
        self.enums.insert(format!("{scope}.{}", item.name()), numbers);
    }
}

impl Field {
    fn new(field: &FieldDescriptorProto) -> Self {
        let target = field.type_name().trim_start_matches('.').to_owned();
        Self {
            name: field.json_name().to_owned(),
            repeated: field.label() == Label::Repeated,
            holds: match field.r#type() {
                Type::Message => Holds::Message(target),
                Type::Enum => Holds::Enum(target),
                _ => Holds::Scalar,
            },
        }
    }
}

impl Walk<'_> {
    fn message(&mut self, message: &str, path: &str, mut bytes: &[u8]) -> Result<(), WalkError> {
        let schema = self.schema;
        let shape = schema
            .messages
            .get(message)
            .ok_or_else(|| WalkError::NoDescriptor {
                message: message.to_owned(),
            })?;
        let mut index: BTreeMap<u32, usize> = BTreeMap::new();
        while !bytes.is_empty() {
            let (tag, wire) = decode_key(&mut bytes).map_err(|source| malformed(path, source))?;
            let Some(field) = shape.fields.get(&tag) else {
                self.note(format!("{path} field {tag}"));
                skip(path, tag, wire, &mut bytes)?;
                continue;
            };
            let mut here = format!("{path}.{}", field.name);
            let count = index.entry(tag).or_default();
            match (&field.holds, wire) {
                (Holds::Message(target), WireType::LengthDelimited) => {
                    let body = delimited(path, &mut bytes)?;
                    let Some(shape) = schema.messages.get(target) else {
                        continue;
                    };
                    if shape.is_map_entry {
                        self.map_entry(shape, &here, body)?;
                    } else {
                        if field.repeated {
                            here = format!("{here}[{count}]");
                        }
                        self.message(target, &here, body)?;
                    }
                }
                (Holds::Enum(target), WireType::Varint) => {
                    let value = decode_varint(&mut bytes).map_err(|source| malformed(path, source))?;
                    self.enum_value(target, &here, value);
                }
                (Holds::Message(_) | Holds::Enum(_) | Holds::Scalar, _) => skip(path, tag, wire, &mut bytes)?,
            }
            *count += 1;
        }
        Ok(())
    }

    /// An entry of a map: field 1 is the key, 2 the value; only the value can hide something.
    fn map_entry(&mut self, shape: &Shape, path: &str, entry: &[u8]) -> Result<(), WalkError> {
        let key = key_of(path, entry)?;
        let here = format!("{path}[{key}]");
        let mut bytes = entry;
        while !bytes.is_empty() {
            let (tag, wire) = decode_key(&mut bytes).map_err(|source| malformed(path, source))?;
            match (tag, wire, shape.fields.get(&tag).map(|field| &field.holds)) {
                (2, WireType::LengthDelimited, Some(Holds::Message(target))) => {
                    let body = delimited(&here, &mut bytes)?;
                    self.message(target, &here, body)?;
                }
                (2, WireType::Varint, Some(Holds::Enum(target))) => {
                    let value = decode_varint(&mut bytes).map_err(|source| malformed(path, source))?;
                    self.enum_value(target, &here, value);
                }
                (1 | 2, _, _) => skip(&here, tag, wire, &mut bytes)?,
                (_, _, _) => {
                    self.note(format!("{here} field {tag}"));
                    skip(&here, tag, wire, &mut bytes)?;
                }
            }
        }
        Ok(())
    }

    fn enum_value(&mut self, target: &str, path: &str, value: u64) {
        // An enum is an int32, sign-extended to 64 bits on the wire; what doesn't fit no enum has.
        let value = i64::from_ne_bytes(value.to_ne_bytes());
        let known = self.schema.enums.get(target);
        let is_known =
            i32::try_from(value).is_ok_and(|value| known.is_some_and(|known| known.contains(&value)));
        if !is_known {
            self.note(format!("{path} value {value}"));
        }
    }

    fn note(&mut self, path: String) {
        if self.seen.insert(path.clone()) {
            self.found.push(path);
        }
    }
}

fn malformed(path: &str, source: prost::DecodeError) -> WalkError {
    WalkError::Malformed {
        path: path.to_owned(),
        source,
    }
}

fn skip(path: &str, tag: u32, wire: WireType, bytes: &mut &[u8]) -> Result<(), WalkError> {
    skip_field(wire, tag, bytes, DecodeContext::default()).map_err(|source| malformed(path, source))
}

fn delimited<'a>(path: &str, bytes: &mut &'a [u8]) -> Result<&'a [u8], WalkError> {
    let length = decode_varint(bytes).map_err(|source| malformed(path, source))?;
    let truncated = || WalkError::Truncated {
        path: path.to_owned(),
    };
    let length = usize::try_from(length).map_err(|_| truncated())?;
    let body = bytes.get(..length).ok_or_else(truncated)?;
    bytes.advance(length);
    Ok(body)
}

/// The key of a map entry as it stands in a path: a number, or quoted text.
fn key_of(path: &str, mut bytes: &[u8]) -> Result<String, WalkError> {
    let mut key = "0".to_owned();
    while !bytes.is_empty() {
        let (tag, wire) = decode_key(&mut bytes).map_err(|source| malformed(path, source))?;
        match (tag, wire) {
            (1, WireType::Varint) => {
                key = decode_varint(&mut bytes)
                    .map_err(|source| malformed(path, source))?
                    .to_string();
            }
            (1, WireType::LengthDelimited) => {
                key = format!("{:?}", String::from_utf8_lossy(delimited(path, &mut bytes)?));
            }
            (_, wire) => skip(path, tag, wire, &mut bytes)?,
        }
    }
    Ok(key)
}
