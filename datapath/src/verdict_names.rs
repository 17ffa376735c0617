//! Which verdict a verdict id stands for; ids live across generations and restarts.
//!
//! Invariant: an id changes its meaning only when neither bank of tables refers to it, and the new meaning is
//! written before any program can count under it. For a while an id keeps its meaning unused, so that a
//! verdict that comes back finds its counter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thyra_datapath_abi::limits::MAX_VERDICTS;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef, Verdict, Would};
use thyra_datapath_abi::{Action, Reason};

use crate::counters::reason_number;
use crate::state_file::{self, StateError};

const FILE: &str = "verdicts.json";
/// Names kept of verdicts that the live tables don't use: they may come back, and their events may still be
/// on the way.
const MAX_REMEMBERED: usize = 512;

/// The names of the verdict ids.
#[derive(Debug)]
pub(crate) struct VerdictNames {
    path: PathBuf,
    /// Names the maps that the ids belong to: names of other maps' ids mean nothing here.
    instance: String,
    by_id: BTreeMap<u16, Verdict>,
    by_verdict: HashMap<Verdict, u16>,
    /// Number of the commit that last used an id.
    last_use: HashMap<u16, u64>,
    commits: u64,
    /// What the live bank refers to.
    live: BTreeSet<u16>,
    last: u16,
}

/// Ids for the verdicts of one `Tables`, not yet in force.
#[derive(Debug)]
pub(crate) struct Assignment {
    /// By index in `Tables::verdicts`.
    pub(crate) ids: Vec<u16>,
    /// Ids that get a new meaning; their counters must be set to zero.
    pub(crate) fresh: BTreeMap<u16, Verdict>,
}

/// More distinct verdicts in both banks than ids.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tables need {needed} verdict ids beside those in use, {free} are free of {}", MAX_VERDICTS - 1)]
pub struct VerdictsFull {
    /// Verdicts that have no id yet.
    pub needed: usize,
    /// Ids that neither bank refers to.
    pub free: usize,
}

impl VerdictNames {
    /// Reads the names for the maps called `instance`, of which `live` are referred to. Without a file, or
    /// with one about other maps, those ids are taken and have no name.
    pub(crate) fn read(
        state_dir: &Path,
        instance: String,
        live: BTreeSet<u16>,
        notes: &mut Vec<String>,
    ) -> Result<Self, StateError> {
        let path = state_dir.join(FILE);
        let file = state_file::read_or_note::<File>(&path, notes)?.filter(|file| file.instance == instance);
        let by_id: BTreeMap<u16, Verdict> = file
            .into_iter()
            .flat_map(|file| file.verdicts)
            .map(|named| (named.id, named.into()))
            .collect();
        let by_verdict = by_id.iter().map(|(id, verdict)| (verdict.clone(), *id)).collect();
        let last = by_id.keys().chain(&live).max().copied().unwrap_or(0);
        Ok(Self {
            path,
            instance,
            by_id,
            by_verdict,
            last_use: HashMap::new(),
            commits: 0,
            live,
            last,
        })
    }

    pub(crate) fn get(&self, id: u16) -> Option<&Verdict> {
        self.by_id.get(&id)
    }

    /// Those that a bank refers to, with their names.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (u16, &Verdict)> {
        self.live.iter().filter_map(|id| Some((*id, self.by_id.get(id)?)))
    }

    /// Ids that have a name or are referred to.
    pub(crate) fn known(&self) -> impl Iterator<Item = u16> {
        self.by_id
            .keys()
            .chain(&self.live)
            .copied()
            .collect::<BTreeSet<_>>()
            .into_iter()
    }

    /// Ids that the live bank refers to.
    pub(crate) fn live(&self) -> &BTreeSet<u16> {
        &self.live
    }

    /// Finds an id for each verdict; changes nothing.
    pub(crate) fn assign(&self, verdicts: &[Verdict]) -> Result<Assignment, VerdictsFull> {
        let kept: BTreeSet<u16> = verdicts
            .iter()
            .filter_map(|v| self.by_verdict.get(v).copied())
            .collect();
        let mut fresh: BTreeMap<&Verdict, u16> = verdicts
            .iter()
            .filter(|v| !self.by_verdict.contains_key(v))
            .map(|v| (v, 0))
            .collect();
        let free = self.free(&kept, fresh.len())?;
        for (id, free) in fresh.values_mut().zip(free) {
            *id = free;
        }
        let id = |verdict: &Verdict| {
            self.by_verdict
                .get(verdict)
                .or_else(|| fresh.get(verdict))
                .copied()
        };
        // Every verdict is in one of the two.
        let ids = verdicts.iter().filter_map(id).collect();
        let fresh = fresh
            .into_iter()
            .map(|(verdict, id)| (id, verdict.clone()))
            .collect();
        Ok(Assignment { ids, fresh })
    }

    /// Writes the names as they are once an assignment is accepted; needed only when it has fresh ids.
    pub(crate) fn save(&self, assignment: &Assignment) -> Result<(), StateError> {
        let others = self
            .by_id
            .iter()
            .filter(|(id, _)| !assignment.fresh.contains_key(id));
        let verdicts = others
            .chain(&assignment.fresh)
            .map(|(id, verdict)| Named::new(*id, verdict))
            .collect();
        state_file::write(
            &self.path,
            &File {
                instance: self.instance.clone(),
                verdicts,
            },
        )
    }

    /// The assignment is live.
    pub(crate) fn accept(&mut self, assignment: Assignment) {
        self.commits += 1;
        for (id, verdict) in assignment.fresh {
            if let Some(former) = self.by_id.insert(id, verdict.clone()) {
                self.by_verdict.remove(&former);
            }
            self.by_verdict.insert(verdict, id);
            self.last = id;
        }
        for id in &assignment.ids {
            self.last_use.insert(*id, self.commits);
        }
        self.live = assignment.ids.into_iter().collect();
        self.forget();
    }

    /// Drops the names that were not used for longest, down to a bound.
    fn forget(&mut self) {
        let surplus = self.by_id.len().saturating_sub(self.live.len() + MAX_REMEMBERED);
        let unused: Vec<u16> = self
            .by_id
            .keys()
            .filter(|id| !self.live.contains(id))
            .copied()
            .collect();
        for id in self.by_age(unused).into_iter().take(surplus) {
            if let Some(former) = self.by_id.remove(&id) {
                self.by_verdict.remove(&former);
            }
            self.last_use.remove(&id);
        }
    }

    /// Ids for new meanings, best first: those without a name, from the last given one on, then those that
    /// were not used for longest.
    fn free(&self, kept: &BTreeSet<u16>, needed: usize) -> Result<Vec<u16>, VerdictsFull> {
        let limit = u16::try_from(MAX_VERDICTS).unwrap_or(u16::MAX);
        let round = (self.last + 1..limit).chain(1..=self.last.min(limit - 1));
        let nameless = round.filter(|id| !self.live.contains(id) && !self.by_id.contains_key(id));
        let mut free: Vec<u16> = nameless.take(needed).collect();
        if free.len() < needed {
            let named = self
                .by_id
                .keys()
                .filter(|id| !self.live.contains(id) && !kept.contains(id));
            free.extend(self.by_age(named.copied().collect()));
        }
        if free.len() < needed {
            return Err(VerdictsFull {
                needed,
                free: free.len(),
            });
        }
        free.truncate(needed);
        Ok(free)
    }

    fn by_age(&self, mut ids: Vec<u16>) -> Vec<u16> {
        ids.sort_by_key(|id| self.last_use.get(id).copied().unwrap_or(0));
        ids
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    instance: String,
    verdicts: Vec<Named>,
}

#[derive(Serialize, Deserialize)]
struct Named {
    id: u16,
    #[serde(flatten)]
    outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rule: Option<Rule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    because: Vec<(Rule, Arc<str>)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    residual: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    would: Option<Dry>,
}

#[derive(Serialize, Deserialize)]
struct Dry {
    #[serde(flatten)]
    outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rule: Option<Rule>,
}

#[derive(Serialize, Deserialize)]
struct Outcome {
    action: Word,
    #[serde(with = "reason")]
    reason: Reason,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Missing,
    Allow,
    Deny,
    Hold,
    Proxy,
}

#[derive(Serialize, Deserialize)]
struct Rule {
    namespace: Arc<str>,
    name: Arc<str>,
    rule: Option<u32>,
}

/// A reason by its stable number.
mod reason {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use thyra_datapath_abi::Reason;

    use super::reason_number;

    pub(super) fn serialize<S: Serializer>(reason: &Reason, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(reason_number(*reason))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Reason, D::Error> {
        let number = u8::deserialize(deserializer)?;
        Reason::from_number(number).ok_or_else(|| de::Error::custom(format!("`{number}` is no reason")))
    }
}

impl Outcome {
    fn new(action: Action, reason: Reason) -> Self {
        let action = match action {
            Action::Missing => Word::Missing,
            Action::Allow => Word::Allow,
            Action::Deny => Word::Deny,
            Action::Hold => Word::Hold,
            Action::Proxy => Word::Proxy,
        };
        Self { action, reason }
    }

    fn action(&self) -> Action {
        match self.action {
            Word::Missing => Action::Missing,
            Word::Allow => Action::Allow,
            Word::Deny => Action::Deny,
            Word::Hold => Action::Hold,
            Word::Proxy => Action::Proxy,
        }
    }
}

impl Named {
    fn new(id: u16, verdict: &Verdict) -> Self {
        let Verdict {
            action,
            reason,
            rule,
            because,
            residual,
            would,
        } = verdict;
        Self {
            id,
            outcome: Outcome::new(*action, *reason),
            rule: rule.as_ref().map(Rule::from),
            because: because
                .iter()
                .map(|(rule, field)| (Rule::from(rule), Arc::clone(field)))
                .collect(),
            residual: residual.clone(),
            would: would.as_ref().map(|Would { action, reason, rule }| Dry {
                outcome: Outcome::new(*action, *reason),
                rule: rule.as_ref().map(Rule::from),
            }),
        }
    }
}

impl From<Named> for Verdict {
    fn from(named: Named) -> Self {
        let Named {
            id: _,
            outcome,
            rule,
            because,
            residual,
            would,
        } = named;
        Self {
            action: outcome.action(),
            reason: outcome.reason,
            rule: rule.map(RuleRef::from),
            because: because
                .into_iter()
                .map(|(rule, field)| (RuleRef::from(rule), field))
                .collect(),
            residual,
            would: would.map(|Dry { outcome, rule }| Would {
                action: outcome.action(),
                reason: outcome.reason,
                rule: rule.map(RuleRef::from),
            }),
        }
    }
}

impl From<&RuleRef> for Rule {
    fn from(rule: &RuleRef) -> Self {
        let RuleRef {
            policy: PolicyRef { namespace, name },
            rule,
        } = rule;
        Self {
            namespace: Arc::clone(namespace),
            name: Arc::clone(name),
            rule: *rule,
        }
    }
}

impl From<Rule> for RuleRef {
    fn from(rule: Rule) -> Self {
        let Rule {
            namespace,
            name,
            rule,
        } = rule;
        Self {
            policy: PolicyRef { namespace, name },
            rule,
        }
    }
}

#[cfg(test)]
mod tests;
