//! Tables for people: an endpoint's cells as few lines, and a verdict as a sentence.
//!
//! Invariant: the lines cover every cell of the endpoint. A source's line is that of its identity with the
//! longest run of its blocks from the outermost on; one without any fares like the outsider and is read off
//! the line `ANY`.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables::{Tables, Verdict};

/// What stands in the place of a block for whoever has no line of his own.
pub const ANY: &str = "ANY";

/// Sources and ports with one verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// 4 or 6; 0 where both families agree.
    pub family: u8,
    /// Identity number; 0 for unknown.
    pub identity: u32,
    /// Principal; none for sources without identity.
    pub principal: Option<Arc<str>>,
    /// The identity has not arrived.
    pub pending: bool,
    /// CIDR blocks where they make a difference; `ANY` for everybody without a line.
    pub blocks: Vec<Arc<str>>,
    /// `9080`, `1-79`, `80,443`, `ANY`.
    pub ports: String,
    /// The verdict.
    pub verdict: Verdict,
    /// A source address that the line holds, where there is one, to ask the kernel's tables about.
    pub source: Option<IpAddr>,
    /// A port that the line holds.
    pub port: u16,
}

/// First and last port of runs.
pub(crate) type Ranges = Vec<(u16, u16)>;

/// What a source meets: verdicts (by index) with the ports they hold, in order of the first port.
pub(crate) type Fate = Vec<(u16, Ranges)>;

/// Principal, and whether it is awaited.
type Source = (Option<Arc<str>>, bool);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Who {
    principal: Option<Arc<str>>,
    pending: bool,
    blocks: Vec<Arc<str>>,
}

/// The cells of `endpoint`, outsider last; empty when the tables don't know the endpoint.
#[must_use]
pub fn lines(tables: &Tables, endpoint: u16) -> Vec<Line> {
    let Some(placed) = tables.endpoint(endpoint) else {
        return Vec::new();
    };
    let samples = samples(tables);
    let four = fates(tables, placed.set4, &samples[0]);
    let six = fates(tables, placed.set6, &samples[1]);
    let mut lines = Vec::new();
    let all: BTreeMap<&Who, ()> = four.keys().chain(six.keys()).map(|who| (who, ())).collect();
    // Those without identity come after the others, the outsider last.
    let mut order: Vec<&Who> = all.into_keys().collect();
    order.sort_by_key(|who| {
        let unknown = who.principal.is_none() && !who.pending;
        (unknown, unknown && who.blocks.iter().any(|block| &**block == ANY))
    });
    for who in order {
        let (in_four, in_six) = (four.get(who), six.get(who));
        match (in_four, in_six) {
            (Some((fate, class)), Some((other, _))) if fate == other => {
                push(tables, &mut lines, 0, who, fate, *class, &samples);
            }
            _ => {
                if let Some((fate, class)) = in_four {
                    push(tables, &mut lines, 4, who, fate, *class, &samples);
                }
                if let Some((fate, class)) = in_six {
                    push(tables, &mut lines, 6, who, fate, *class, &samples);
                }
            }
        }
    }
    lines
}

/// What a person reads of a verdict: `denied by shop/lock#0`, `allowed, no policy applies`, …
#[must_use]
pub fn text(verdict: &Verdict) -> String {
    let mut text = match verdict.action {
        Action::Allow => "allowed",
        Action::Deny => "denied",
        Action::Hold => "held back",
        Action::Proxy => "for the proxy",
        Action::Missing => "dropped",
    }
    .to_owned();
    if let Some(rule) = &verdict.rule {
        // Writing to a String can't fail.
        let _infallible = write!(text, " by {rule}");
    }
    let _infallible = write!(text, ": {}", verdict.reason.text());
    if !verdict.because.is_empty() {
        let because: Vec<String> = verdict
            .because
            .iter()
            .map(|(rule, field)| format!("{rule} {field}"))
            .collect();
        let _infallible = write!(text, " ({})", because.join(", "));
    }
    if let Some(would) = &verdict.would {
        let action = match would.action {
            Action::Allow => "allow",
            Action::Hold => "hold back",
            _ => "deny",
        };
        let by = would
            .rule
            .as_ref()
            .map_or_else(String::new, |rule| format!(" by {rule}"));
        let _infallible = write!(
            text,
            "; dry-run policies would {action} it{by}: {}",
            would.reason.text()
        );
    }
    text
}

/// By family: a source address of each class that can be met there.
fn samples(tables: &Tables) -> [BTreeMap<u32, Option<IpAddr>>; 2] {
    let mut samples = [BTreeMap::from([(0, None)]), BTreeMap::from([(0, None)])];
    for address in tables.addresses.iter() {
        let family = usize::from(address.address.is_ipv6());
        samples[family].insert(address.class, Some(address.address));
    }
    for block in tables.blocks.iter() {
        let family = usize::from(block.network.is_ipv6());
        let sample = (tables.class_of(block.network) == block.class).then_some(block.network);
        let known = samples[family].entry(block.class).or_insert(sample);
        *known = known.or(sample);
    }
    for (family, outsider) in ["203.0.113.7", "2001:db8::7"].into_iter().enumerate() {
        let address = outsider
            .parse()
            .ok()
            .filter(|address| tables.class_of(*address) == 0);
        samples[family].insert(0, address);
    }
    samples
}

/// Each source's fate in one family, with a class that meets it; those that fare like the outsider are left
/// out.
fn fates(tables: &Tables, set: u16, samples: &BTreeMap<u32, Option<IpAddr>>) -> BTreeMap<Who, (Fate, u32)> {
    let outsider = fate(tables, set, 0);
    let mut by_source: BTreeMap<Source, Vec<(u32, Fate)>> = BTreeMap::new();
    let mut by_column: BTreeMap<u16, Fate> = BTreeMap::new();
    for class in samples.keys() {
        let (Some(info), Some(column)) = (tables.class(*class), tables.column(*class)) else {
            continue;
        };
        let fate = by_column
            .entry(column)
            .or_insert_with(|| fate(tables, set, *class))
            .clone();
        by_source
            .entry((info.principal.clone(), info.pending))
            .or_default()
            .push((*class, fate));
    }
    let mut fates = BTreeMap::new();
    for ((principal, pending), classes) in by_source {
        let Some((first, common)) = classes.first().cloned() else {
            continue;
        };
        let alike = classes.iter().all(|(_, fate)| *fate == common);
        let is_outsider = principal.is_none() && !pending;
        if alike && !is_outsider {
            if common != outsider {
                let blocks = Vec::new();
                fates.insert(
                    Who {
                        principal,
                        pending,
                        blocks,
                    },
                    (common, first),
                );
            }
            continue;
        }
        for (class, fate) in differing(tables, classes, &outsider) {
            let who = Who {
                principal: principal.clone(),
                pending,
                blocks: blocks(tables, class).to_vec(),
            };
            fates.insert(who, (fate, class));
        }
    }
    let any = Who {
        principal: None,
        pending: false,
        blocks: vec![ANY.into()],
    };
    fates.insert(any, (outsider, 0));
    fates
}

/// Of one identity's classes those that fare otherwise than the next outer block's, or than the outsider.
fn differing(tables: &Tables, mut classes: Vec<(u32, Fate)>, outsider: &Fate) -> Vec<(u32, Fate)> {
    classes.sort_by_key(|(class, _)| blocks(tables, *class).len());
    let mut listed: HashMap<&[Arc<str>], Fate> = HashMap::new();
    classes.retain(|(class, fate)| {
        let blocks = blocks(tables, *class);
        let outer = (0..=blocks.len())
            .rev()
            .find_map(|depth| listed.get(&blocks[..depth]))
            .unwrap_or(outsider);
        let differs = fate != outer;
        if differs {
            listed.insert(blocks, fate.clone());
        }
        differs
    });
    classes
}

fn blocks(tables: &Tables, class: u32) -> &[Arc<str>] {
    tables.class(class).map_or(&[], |info| &info.blocks)
}

/// What a class meets in a policy set, over all ports.
pub(crate) fn fate(tables: &Tables, set: u16, class: u32) -> Fate {
    let verdict = |port_class: u16| -> Option<u16> {
        let row = *tables.sets.get(usize::from(set))?.get(usize::from(port_class))?;
        let column = tables.column(class)?;
        tables
            .rows
            .get(usize::from(row))?
            .get(usize::from(column))
            .copied()
    };
    let mut fate: Fate = Vec::new();
    for (at, (first, port_class)) in tables.port_runs.iter().enumerate() {
        let last = tables
            .port_runs
            .get(at + 1)
            .map_or(u16::MAX, |(next, _)| next.saturating_sub(1));
        let Some(verdict) = verdict(*port_class) else {
            continue;
        };
        match fate.iter_mut().find(|(known, _)| *known == verdict) {
            None => fate.push((verdict, vec![(*first, last)])),
            Some((_, ranges)) => add_range(ranges, *first, last),
        }
    }
    fate
}

/// Adds ports that come after all of `ranges`.
pub(crate) fn add_range(ranges: &mut Ranges, first: u16, last: u16) {
    match ranges.last_mut() {
        Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
        _ => ranges.push((first, last)),
    }
}

fn push(
    tables: &Tables,
    lines: &mut Vec<Line>,
    family: u8,
    who: &Who,
    fate: &Fate,
    class: u32,
    samples: &[BTreeMap<u32, Option<IpAddr>>; 2],
) {
    let sample = &samples[usize::from(family == 6)];
    for (verdict, ranges) in fate {
        lines.push(Line {
            family,
            identity: tables.class(class).map_or(0, |info| info.identity),
            principal: who.principal.clone(),
            pending: who.pending,
            blocks: who.blocks.clone(),
            ports: ports(ranges, ANY),
            verdict: tables.verdicts[usize::from(*verdict)].clone(),
            source: sample.get(&class).copied().flatten(),
            port: ranges.first().map_or(0, |(first, _)| *first),
        });
    }
}

/// `9080`, `1-79`, `80,443`, or `any` where it is every port.
#[must_use]
pub fn ports(ranges: &[(u16, u16)], any: &str) -> String {
    if *ranges == [(0, u16::MAX)] {
        return any.to_owned();
    }
    let texts: Vec<String> = ranges
        .iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        })
        .collect();
    texts.join(",")
}
