//! Slots: the sources that no policy tells apart, one column candidate each; every predicate of a rule as a
//! set of them.
//!
//! Invariant: a source without identity yet has two slots, the kindest and the harshest identity it may turn
//! out to have; seen from ALLOW the kindest matches every identity field, seen from DENY none.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;
use rustc_hash::{FxHashMap, FxHashSet};

use super::bits::Bits;
use super::block::{BlockId, Blocks};
use super::identity::Identities;
use super::lend::Lent;
use super::pattern::IdentityTest;
use crate::policy::Field;

/// Number of an interned identity test.
pub(crate) type TestId = usize;

/// Who the sources of a slot are: a representative stands for all identities that answer every test alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Who {
    Unknown,
    Pending,
    /// Number of the group of identities.
    Group(usize),
}

/// A column candidate.
pub(crate) type Slot = (Who, BlockId);

/// Which side of a verdict a rule works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// A match opens.
    Allow,
    /// A match closes: DENY, CUSTOM.
    Deny,
}

/// Identity tests with their answers for every identity met so far; kept between compiles.
#[derive(Debug, Default)]
pub(crate) struct Tests {
    list: Vec<Answered>,
    index: HashMap<IdentityTest, TestId>,
}

#[derive(Debug)]
struct Answered {
    test: IdentityTest,
    holds: Bits,
    upto: usize,
}

impl Tests {
    pub(crate) fn intern(&mut self, test: IdentityTest) -> TestId {
        if let Some(known) = self.index.get(&test) {
            return *known;
        }
        let number = self.list.len();
        self.index.insert(test.clone(), number);
        self.list.push(Answered {
            test,
            holds: Bits::default(),
            upto: 0,
        });
        number
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    fn answer(&mut self, number: TestId, identities: &Identities) {
        let Answered { test, holds, upto } = &mut self.list[number];
        if *upto < identities.len() {
            holds.grow(identities.len());
            test.scan(identities, *upto, |identity| holds.insert(identity));
            *upto = identities.len();
        }
    }

    /// What each of `used` says of an identity.
    fn answers(&self, used: &[TestId], identity: usize) -> Bits {
        let mut answers = Bits::empty(used.len());
        for (at, test) in used.iter().enumerate() {
            if self.list[*test].holds.contains(identity) {
                answers.insert(at);
            }
        }
        answers
    }
}

/// The slots of one compile with every used predicate's set of slots.
#[derive(Debug)]
pub(crate) struct Slots {
    /// Column candidates, in order.
    pub(crate) list: Vec<Slot>,
    /// Of each pending candidate: its index; its harsh twin has the index `list.len() + position here`.
    pub(crate) pending: Vec<usize>,
    index: BTreeMap<Slot, usize>,
    group_of: Vec<usize>,
    /// An identity of each group.
    representatives: Vec<usize>,
    /// Group by answers; filled when first asked for.
    by_answers: OnceCell<HashMap<Bits, usize>>,
    identity: FxHashMap<(TestId, Side), Bits>,
    /// Slots that may have no identity.
    pub(crate) nobody: Bits,
}

impl Slots {
    /// `used`: the tests of all rules that may decide here. `met`: what every address and block comes down
    /// to.
    pub(crate) fn new(
        tests: &mut Tests,
        used: &[TestId],
        identities: &Identities,
        met: impl Iterator<Item = (Lent, BlockId)>,
    ) -> Self {
        for test in used {
            tests.answer(*test, identities);
        }
        let (group_of, representatives) = group(tests, used, identities.len());
        let who = |lent| match lent {
            Lent::Unknown => Who::Unknown,
            Lent::Pending => Who::Pending,
            Lent::Known(identity) => Who::Group(group_of[identity]),
        };
        // The outsider comes first: class 0.
        let mut distinct = FxHashSet::from_iter([(Who::Unknown, 0)]);
        distinct.extend(met.map(|(lent, block)| (who(lent), block)));
        let mut index: BTreeMap<Slot, usize> = distinct.into_iter().map(|slot| (slot, 0)).collect();
        let list: Vec<Slot> = index.keys().copied().collect();
        for (at, place) in index.values_mut().enumerate() {
            *place = at;
        }
        let pending: Vec<usize> = (0..list.len()).filter(|at| list[*at].0 == Who::Pending).collect();
        let mut slots = Self {
            nobody: Bits::empty(list.len() + pending.len()),
            list,
            pending,
            index,
            group_of,
            representatives,
            by_answers: OnceCell::new(),
            identity: FxHashMap::default(),
        };
        for at in 0..slots.list.len() {
            if slots.list[at].0 == Who::Unknown {
                slots.nobody.insert(at);
            }
        }
        for harsh in slots.list.len()..slots.len() {
            slots.nobody.insert(harsh);
        }
        for test in used {
            for side in [Side::Allow, Side::Deny] {
                let bits = slots.identity_bits(&tests.list[*test], side);
                slots.identity.insert((*test, side), bits);
            }
        }
        slots
    }

    /// Slots, twins included.
    pub(crate) fn len(&self) -> usize {
        self.list.len() + self.pending.len()
    }

    /// Puts identities that were met since into the groups that answer `used`, the same tests, as they do;
    /// `false` when one answers like no group.
    pub(crate) fn admit(&mut self, tests: &mut Tests, used: &[TestId], identities: &Identities) -> bool {
        if self.group_of.len() == identities.len() {
            return true;
        }
        for test in used {
            tests.answer(*test, identities);
        }
        let groups = || {
            let answers = |(group, identity): (usize, &usize)| (tests.answers(used, *identity), group);
            self.representatives.iter().enumerate().map(answers).collect()
        };
        let by_answers = self.by_answers.get_or_init(groups);
        for identity in self.group_of.len()..identities.len() {
            match by_answers.get(&tests.answers(used, identity)) {
                Some(group) => self.group_of.push(*group),
                None => return false,
            }
        }
        true
    }

    /// The candidate of a source.
    pub(crate) fn find(&self, lent: Lent, block: BlockId) -> Option<usize> {
        let who = match lent {
            Lent::Unknown => Who::Unknown,
            Lent::Pending => Who::Pending,
            Lent::Known(identity) => Who::Group(*self.group_of.get(identity)?),
        };
        self.index.get(&(who, block)).copied()
    }

    /// Where an identity test holds; empty for a test that was not among the used ones.
    pub(crate) fn holds(&self, test: TestId, side: Side) -> Bits {
        self.identity
            .get(&(test, side))
            .cloned()
            .unwrap_or_else(|| Bits::empty(self.len()))
    }

    /// Where an address field holds.
    pub(crate) fn held(&self, blocks: &Blocks, field: &Field<IpNet>) -> Bits {
        let held = blocks.held(field);
        let mut bits = Bits::empty(self.len());
        for (at, (_, block)) in self.list.iter().enumerate() {
            if held.contains(*block) {
                bits.insert(at);
            }
        }
        for (position, at) in self.pending.iter().enumerate() {
            if bits.contains(*at) {
                bits.insert(self.list.len() + position);
            }
        }
        bits
    }

    fn identity_bits(&self, answered: &Answered, side: Side) -> Bits {
        let mut bits = Bits::empty(self.len());
        for (at, (who, _)) in self.list.iter().enumerate() {
            let holds = match who {
                Who::Unknown => answered.test.holds_unknown(),
                Who::Pending => side == Side::Allow,
                Who::Group(group) => answered.holds.contains(self.representatives[*group]),
            };
            if holds {
                bits.insert(at);
            }
        }
        if side == Side::Deny {
            for harsh in self.list.len()..self.len() {
                bits.insert(harsh);
            }
        }
        bits
    }
}

/// Parts the identities by the answers of all tests: group of each, representative of each group.
fn group(tests: &Tests, used: &[TestId], identities: usize) -> (Vec<usize>, Vec<usize>) {
    let mut group_of = vec![0; identities];
    let mut size = vec![identities; usize::from(identities > 0)];
    for test in used {
        let mut hit: FxHashMap<usize, usize> = FxHashMap::default();
        for identity in tests.list[*test].holds.iter() {
            *hit.entry(group_of[identity]).or_default() += 1;
        }
        // A group that the test holds as a whole stays one.
        hit.retain(|group, count| *count < size[*group]);
        let mut split: FxHashMap<usize, usize> = FxHashMap::default();
        for identity in tests.list[*test].holds.iter() {
            let group = group_of[identity];
            if !hit.contains_key(&group) {
                continue;
            }
            let to = *split.entry(group).or_insert_with(|| {
                size.push(0);
                size.len() - 1
            });
            size[group] -= 1;
            size[to] += 1;
            group_of[identity] = to;
        }
    }
    let mut representatives = vec![0; size.len()];
    for (identity, group) in group_of.iter().enumerate().rev() {
        representatives[*group] = identity;
    }
    (group_of, representatives)
}
