//! `metadata`: names as Kubernetes allows them, labels, version, creation time.
//!
//! Invariant: a name that an API server would refuse is refused here, with its place.

use super::fields::METADATA;
use super::node::Node;
use super::object::Metadata;
use super::reader::Reader;
use super::shape::{self, Shape};
use crate::policy::Labels;

/// Where a kind lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// In a namespace, `default` unless it says so.
    Namespaced,
    /// In none.
    Cluster,
}

/// Longest DNS label and longest DNS name.
const MAX_LABEL: usize = 63;
const MAX_NAME: usize = 253;

/// What `metadata` of `object` says; `None` when there is no name to speak of.
pub(super) fn read(object: &Node, scope: Scope, reader: &mut Reader<'_>) -> Option<Metadata> {
    let Some(node) = object.get("metadata") else {
        reader.error(object.at, "`metadata` is missing; give at least `metadata.name`");
        return None;
    };
    shape::check(Shape::Fields(METADATA), node, "metadata", reader);
    let Some(name) = node.get("name") else {
        reader.error(node.at, "`metadata.name` is missing; give the object a name");
        return None;
    };
    let text = name.text()?;
    if !is_dns_name(text) {
        let text = format!(
            "`{text}` is not a name; use lower-case letters, digits, `-` and `.`, at most {MAX_NAME}"
        );
        reader.error(name.at, text);
        return None;
    }
    Some(Metadata {
        name: text.to_owned(),
        namespace: namespace(node, scope, reader)?,
        labels: labels(node.get("labels")),
        annotations: labels(node.get("annotations")),
        version: node.text_of("resourceVersion").unwrap_or_default().to_owned(),
        created: created(node, reader),
    })
}

fn namespace(node: &Node, scope: Scope, reader: &mut Reader<'_>) -> Option<String> {
    if scope == Scope::Cluster {
        return Some(String::new());
    }
    let Some(namespace) = node.get("namespace") else {
        return Some("default".to_owned());
    };
    let text = namespace.text()?;
    if !is_dns_label(text) {
        let text = format!(
            "`{text}` is not a namespace; use lower-case letters, digits and `-`, at most {MAX_LABEL}"
        );
        reader.error(namespace.at, text);
        return None;
    }
    Some(text.to_owned())
}

/// Strings of a mapping.
pub(super) fn labels(node: Option<&Node>) -> Labels {
    let entries = node.map_or(&[][..], Node::entries);
    entries
        .iter()
        .filter_map(|e| Some((e.key.to_string(), e.node.text()?.to_owned())))
        .collect()
}

/// RFC 1123: lower-case letters, digits and `-`, neither first nor last.
pub(super) fn is_dns_label(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().is_some_and(|b| plain(*b)) && bytes.last().is_some_and(|b| plain(*b));
    ends && bytes.len() <= MAX_LABEL && bytes.iter().all(|b| plain(*b) || *b == b'-')
}

/// Labels joined by dots (each may be long, as Kubernetes has it).
fn is_dns_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |part: &str| {
        let bytes = part.as_bytes();
        let ends = bytes.first().is_some_and(|b| plain(*b)) && bytes.last().is_some_and(|b| plain(*b));
        ends && bytes.iter().all(|b| plain(*b) || *b == b'-')
    };
    text.len() <= MAX_NAME && text.split('.').all(label)
}

fn created(node: &Node, reader: &mut Reader<'_>) -> i64 {
    let Some(stamp) = node.get("creationTimestamp") else {
        return 0;
    };
    let Some(text) = stamp.text() else { return 0 };
    seconds(text).unwrap_or_else(|| {
        reader.error(
            stamp.at,
            format!("`{text}` is not a time; write it like `2026-01-31T12:00:00Z`"),
        );
        0
    })
}

/// Seconds since the epoch of `YYYY-MM-DDThh:mm:ssZ`, the form that Kubernetes writes.
fn seconds(text: &str) -> Option<i64> {
    let text = text.strip_suffix('Z')?;
    let (date, time) = text.split_once('T')?;
    let numbers = |text: &str, by: char| {
        text.split(by)
            .map(|n| n.parse().ok())
            .collect::<Option<Vec<i64>>>()
    };
    let (date, time) = (numbers(date, '-')?, numbers(time.split('.').next()?, ':')?);
    let ([year, month, day], [hour, minute, second]) = (&date[..], &time[..]) else {
        return None;
    };
    let in_range = (1..=9999).contains(year)
        && (1..=12).contains(month)
        && (1..=31).contains(day)
        && (0..24).contains(hour)
        && (0..60).contains(minute)
        && (0..=60).contains(second);
    // Days by the civil calendar: years that begin in March put the leap day last.
    let shifted = if *month <= 2 { year - 1 } else { *year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
    in_range.then_some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_seconds_since_the_epoch() {
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(seconds("2000-02-29T12:34:56Z"), Some(951_827_696));
        assert_eq!(seconds("2026-08-27T00:00:00Z"), Some(1_787_788_800));
        for bad in [
            "",
            "2026-08-27",
            "2026-13-01T00:00:00Z",
            "2026-08-27T24:00:00Z",
            "x-1-1T0:0:0Z",
        ] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_are_dns_names() {
        assert!(is_dns_name("a.b-c.9"));
        for bad in ["", "A", "-a", "a-", "a..b", "a/b", "a_b"] {
            assert!(!is_dns_name(bad), "{bad}");
        }
    }
}
