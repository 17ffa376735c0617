//! Kubernetes manifests as users have them (YAML, JSON, lists, many documents) to typed objects, with places
//! for errors.
//!
//! Invariant: an input is read whole or refused with file, line and mend; an object of a kind that Thyra
//! reads never has a field that was skipped. Reading is bounded in time and memory and never panics.

mod address;
mod authentication;
mod authorization;
mod error;
mod fields;
mod kinds;
mod level;
mod mesh;
mod metadata;
mod node;
pub mod object;
mod places;
mod pod;
mod providers;
mod reader;
mod scalar;
mod service;
mod shape;
mod world;
mod yaml;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::sync::Arc;

pub use address::{NodePlan, Plan, PlanError, PodPlan, addresses};
pub use error::{Location, ManifestError, Position};
pub use object::{Body, Ignored, Object, ObjectKey};
pub use places::Places;
pub use world::{WorldError, mesh, world};
pub use yaml::{MAX_BYTES, MAX_DEPTH, MAX_NODES};

use crate::finding::Code;
use kinds::Sorted;
use reader::{Reader, Rigour};

/// File names that are read from a folder.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];
/// Most bytes of all files of a folder together.
const MAX_FOLDER_BYTES: usize = 64 << 20;

/// What a set of files holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifests {
    /// Objects of the kinds that Thyra reads, in order of files and documents.
    pub objects: Vec<Object>,
    /// Objects that can't change a verdict.
    pub ignored: Vec<Ignored>,
    /// Accepted, but probably not what was meant.
    pub warnings: Vec<ManifestError>,
}

impl Manifests {
    /// The object with a key.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        self.objects.iter().find(|object| object.key() == *key)
    }

    /// Puts `other`'s objects in, each in the place of the one with its key (as `kubectl apply` would).
    pub fn apply(&mut self, other: Manifests) {
        let mut places: BTreeMap<ObjectKey, usize> = self.objects.iter().map(Object::key).zip(0..).collect();
        for object in other.objects {
            match places.entry(object.key()) {
                Entry::Occupied(place) => self.objects[*place.get()] = object,
                Entry::Vacant(place) => {
                    place.insert(self.objects.len());
                    self.objects.push(object);
                }
            }
        }
        self.ignored.extend(other.ignored);
        self.warnings.extend(other.warnings);
    }

    /// Takes away the objects that `other` names; returns those that were there.
    pub fn delete(&mut self, other: &Manifests) -> Vec<Object> {
        let gone: std::collections::BTreeSet<ObjectKey> = other.objects.iter().map(Object::key).collect();
        let (deleted, kept) = std::mem::take(&mut self.objects)
            .into_iter()
            .partition(|o| gone.contains(&o.key()));
        self.objects = kept;
        deleted
    }

    /// All pods, in order.
    pub fn pods(&self) -> impl Iterator<Item = &object::Pod> {
        self.objects.iter().filter_map(|object| match &object.body {
            Body::Pod(pod) => pod.as_deref(),
            _ => None,
        })
    }

    /// All Services, in order.
    pub fn services(&self) -> impl Iterator<Item = &object::Service> {
        self.objects.iter().filter_map(|object| match &object.body {
            Body::Service(service) => Some(&**service),
            _ => None,
        })
    }
}

/// All `*.yaml`, `*.yml` and `*.json` files directly in `folder`, in order of their names; a file's own path
/// is read as that file alone.
///
/// # Errors
/// All mistakes of all files, in order.
pub fn read_dir(folder: &Path) -> Result<Manifests, Vec<ManifestError>> {
    let mut manifests = Manifests::default();
    let mut errors = Vec::new();
    let mut total = 0;
    for path in files(folder)? {
        let name = path.display().to_string();
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(text) => {
                errors.push(at_start(&name, text));
                continue;
            }
        };
        total += bytes.len();
        if total > MAX_FOLDER_BYTES {
            errors.push(at_start(
                &name,
                format!("the folder's files have more than {MAX_FOLDER_BYTES} bytes"),
            ));
            break;
        }
        match read_bytes(&name, &bytes) {
            Ok(read) => {
                manifests.objects.extend(read.objects);
                manifests.ignored.extend(read.ignored);
                manifests.warnings.extend(read.warnings);
            }
            Err(more) => errors.extend(more),
        }
    }
    if errors.is_empty() {
        distinct(manifests)
    } else {
        Err(errors)
    }
}

fn files(folder: &Path) -> Result<Vec<std::path::PathBuf>, Vec<ManifestError>> {
    let name = folder.display().to_string();
    let bad = |error: std::io::Error| vec![at_start(&name, format!("can't be read: {error}"))];
    if !std::fs::metadata(folder).map_err(bad)?.is_dir() {
        return Ok(vec![folder.to_owned()]);
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(bad)? {
        let path = entry.map_err(bad)?.path();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if EXTENSIONS.contains(&extension) && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file's bytes, never more than one beyond the limit.
fn read_bounded(path: &Path) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    std::fs::File::open(path)
        .and_then(|file| file.take(most).read_to_end(&mut bytes))
        .map_err(|error| format!("can't be read: {error}"))?;
    Ok(bytes)
}

fn at_start(file: &str, text: String) -> ManifestError {
    ManifestError {
        at: Location {
            file: file.into(),
            position: Position::default(),
        },
        code: Code::NotReadable,
        text,
    }
}

/// The objects of a file's bytes, which must be UTF-8.
///
/// # Errors
/// As [`read_str`].
pub fn read_bytes(name: &str, bytes: &[u8]) -> Result<Manifests, Vec<ManifestError>> {
    match std::str::from_utf8(bytes) {
        Ok(text) => read_str(name, text),
        Err(error) => {
            let good = &bytes[..error.valid_up_to()];
            let line = good.iter().filter(|b| **b == b'\n').count() + 1;
            let column = good.iter().rev().take_while(|b| **b != b'\n').count() + 1;
            let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let position = Position {
                line: number(line),
                column: number(column),
            };
            let at = Location {
                file: name.into(),
                position,
            };
            Err(vec![ManifestError {
                at,
                code: Code::NotReadable,
                text: "not UTF-8; save the file as UTF-8".into(),
            }])
        }
    }
}

/// The objects of a text; `name` is what errors call it.
///
/// # Errors
/// All mistakes found, in order of their places; at most 50.
pub fn read_str(name: &str, text: &str) -> Result<Manifests, Vec<ManifestError>> {
    let file: Arc<str> = name.into();
    let mut reader = Reader::new(&file, Rigour::Strict);
    let documents = match yaml::documents(text) {
        Ok(documents) => documents,
        Err(fault) => {
            return Err(vec![ManifestError {
                at: Location::new(&file, fault.at),
                code: Code::Syntax,
                text: fault.text,
            }]);
        }
    };
    let lines: Vec<&str> = text.lines().collect();
    let mut manifests = Manifests::default();
    for document in &documents {
        collect(document, &lines, &mut manifests, &mut reader);
    }
    manifests.warnings = reader.warnings;
    let mut errors = reader.errors;
    errors.sort();
    if errors.is_empty() {
        distinct(manifests)
    } else {
        Err(errors)
    }
}

/// Sorts a document, and a list's items.
fn collect(node: &node::Node, lines: &[&str], into: &mut Manifests, reader: &mut Reader<'_>) {
    match kinds::sort(node, lines, reader) {
        Sorted::Object(object) => into.objects.push(*object),
        Sorted::Ignored(ignored) => into.ignored.push(ignored),
        // Nesting is bounded by `MAX_DEPTH`, and so is this recursion.
        Sorted::Items(items) => items.iter().for_each(|item| collect(item, lines, into, reader)),
        Sorted::Bad => {}
    }
}

/// An object as an API server holds it; `name` is what errors call it, `None` an object of a kind that isn't
/// read. The object is in force already, so what can't be read in a policy becomes an unknown term (matched
/// in DENY, not matched in ALLOW) instead of an error.
///
/// # Errors The object has no name or version that could be read, or (other kinds than policies) a value that
/// can't be.
pub fn object_from_json(name: &str, json: &serde_json::Value) -> Result<Option<Object>, Vec<ManifestError>> {
    let file: Arc<str> = name.into();
    let mut reader = Reader::new(&file, Rigour::Lenient);
    let sorted = kinds::sort(&node::Node::from_json(json), &[], &mut reader);
    match sorted {
        Sorted::Object(object) => Ok(Some(*object)),
        Sorted::Ignored(_) | Sorted::Items(_) => Ok(None),
        Sorted::Bad => Err(reader.errors),
    }
}

/// Two equal objects of one key count once; two that differ are an error.
fn distinct(manifests: Manifests) -> Result<Manifests, Vec<ManifestError>> {
    let mut first: BTreeMap<ObjectKey, Object> = BTreeMap::new();
    let mut objects = Vec::with_capacity(manifests.objects.len());
    let mut errors = Vec::new();
    for object in manifests.objects {
        match first.entry(object.key()) {
            Entry::Vacant(place) => {
                place.insert(object.clone());
                objects.push(object);
            }
            Entry::Occupied(place) if place.get().raw == object.raw => {}
            Entry::Occupied(place) => errors.push(ManifestError {
                at: object.at,
                code: Code::DefinedTwice,
                text: format!(
                    "{} `{}` stands twice with different contents, first at {}; remove one",
                    object.kind,
                    object.name,
                    place.get().at
                ),
            }),
        }
    }
    if errors.is_empty() {
        Ok(Manifests { objects, ..manifests })
    } else {
        Err(errors)
    }
}
