//! World to tables: who may lend an identity, which policies apply where, what each rule comes down to for
//! each source.
//!
//! Invariant: a cell says what the oracle says for every connection that falls into it; the same world gives
//! the same verdicts whatever was compiled before.
//!
//! ```text
//! workloads, VIPs, endpoints ─ lend ─► address → identity | unknown | pending ─┐
//! policies' CIDR blocks ─ block ─► address → deepest block ────────────────────┤
//! policies ─ prepared ─► identity tests ─ pattern ─► identities that hold ─────┴► slot: sources alike to all
//!                                                                                  │
//! endpoint ─ enrol, scope, protocol ─► profile ─ set ─► ports × policies ─ rule ─► sure, open, or not at all
//!                                                                                  │
//!                                  Tables ◄─ assemble ◄─ rows of outcomes ◄─ row ──┘
//! ```

mod assemble;
mod bits;
mod block;
mod class;
mod destination;
mod enrol;
mod identity;
mod kept;
mod lend;
mod limits;
mod pattern;
mod prepared;
pub mod protocol;
mod question;
mod row;
mod rule;
mod scope;
mod set;
mod slot;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use rustc_hash::FxHashMap;
use thyra_datapath_abi::limits::MAX_ENDPOINTS;
use thyra_datapath_abi::tables::{EndpointTables, PolicyRef, RuleRef, Tables};

pub use self::assemble::Residuals;
use self::assemble::{Legend, Placed, assemble};
use self::block::Blocks;
use self::class::{Classes, Sources, derived};
use self::destination::Destination;
use self::enrol::enrol;
use self::identity::Identities;
use self::kept::{Ground, Kept};
use self::lend::{Lending, Moved};
pub use self::limits::Limits;
use self::prepared::PreparedPolicy;
use self::protocol::{Protocols, protocols};
pub(crate) use self::scope::selects;
use self::scope::{Acting, Policies, cross_check, scope};
use self::set::{Profile, Set, Sets};
use self::slot::{Slots, TestId, Tests};
use crate::authorizer::Provider;
use crate::policy::{AuthorizationPolicy, PolicyAction};
use crate::report::Report;
use crate::world::{Mesh, World};

mod status;

/// Identities and tests that no one uses any more are dropped when they outnumber this and those in use.
const GARBAGE: usize = 1024;

/// Why a world has no tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A limit of `Limits`; the last good tables stay.
    #[error("{count} {what} don't fit, the limit is {limit} {cause}; the last good tables stay")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many (at least).
        count: usize,
        /// How many fit.
        limit: usize,
        /// Where it was met; empty where no one object is to blame.
        cause: String,
    },
    /// An endpoint id outside of 1 to 255.
    #[error("endpoint `{name}` has the id {id}, ids are 1 to {}", MAX_ENDPOINTS - 1)]
    EndpointId {
        /// `namespace/pod`.
        name: String,
        /// The id.
        id: u16,
    },
    /// A source was left out while compiling: a fault of the compiler, refused rather than guessed.
    #[error("a source has no column: this is a fault of the compiler; the last good tables stay")]
    Lost,
}

/// Policies made ready, each beside the object that it was made from.
type PreparedPolicies = HashMap<PolicyRef, (Arc<AuthorizationPolicy>, Arc<PreparedPolicy>)>;

/// The compiler, with what it keeps from one compile to the next.
#[derive(Debug, Default)]
pub struct Compiler {
    identities: Identities,
    tests: Tests,
    lending: Lending,
    mesh: Mesh,
    /// Of the policies that decide over some endpoint, and of no others.
    prepared: PreparedPolicies,
    report: Arc<Report>,
    residuals: Arc<Residuals>,
    /// By endpoint id.
    protocols: Arc<BTreeMap<u16, Protocols>>,
    naming: bool,
    limits: Limits,
    kept: Option<Kept>,
}

impl Compiler {
    /// A compiler that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A compiler of tables that no kernel should have: every verdict that some L7 rule may come before is left
    /// to a residual, which names the first rule that holds. Both give the same verdicts.
    #[must_use]
    pub fn naming() -> Self {
        Self {
            naming: true,
            ..Self::default()
        }
    }

    /// A compiler with other limits than the kernel's.
    #[must_use]
    pub fn with_limits(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// What the last successful compile had to say.
    #[must_use]
    pub fn report(&self) -> &Arc<Report> {
        &self.report
    }

    /// What the last successful compile left to L7, by the address that its verdicts name; some that they no
    /// longer name may be among them.
    #[must_use]
    pub fn residuals(&self) -> &Arc<Residuals> {
        &self.residuals
    }

    /// What the Services in front of each pod said of its ports in the last successful compile, by endpoint id.
    #[must_use]
    pub fn protocols(&self) -> &Arc<BTreeMap<u16, Protocols>> {
        &self.protocols
    }

    /// The tables of `world`.
    ///
    /// # Errors
    /// What doesn't fit, by name; the caller keeps its last good tables then.
    pub fn compile(&mut self, world: &World) -> Result<Tables, CompileError> {
        // Put back only by what succeeds.
        let mut kept = self.kept.take();
        if self.mesh != world.mesh {
            // Trust domain aliases are written into the tests.
            self.prepared.clear();
            self.mesh = world.mesh.clone();
            kept = None;
        }
        let moved = self.lending.update(world, &mut self.identities);
        let mut kept = kept.filter(|kept| !self.is_littered(kept.used.len()));
        if let Some(near) = kept.take_if(|kept| kept.reaches(world, &moved, &self.identities))
            && let Some(tables) = self.move_addresses(world, near, &moved)
        {
            return Ok(tables);
        }
        self.compile_whole(world, kept, &moved)
    }

    /// The short way, where it leads to the tables.
    fn move_addresses(&mut self, world: &World, mut kept: Kept, moved: &Moved) -> Option<Tables> {
        let (lending, identities) = (&self.lending, &self.identities);
        kept.walk(world, moved, lending, identities, &mut self.tests, self.limits)?;
        if moved.problems {
            let problems = self.lending.problems().chain(&kept.problems).cloned();
            Arc::make_mut(&mut self.report).set_problems(problems.collect());
        }
        let tables = kept.tables.clone();
        self.kept = Some(kept);
        Some(tables)
    }

    /// The long way; the classes of sources that `kept` has already are taken from there.
    fn compile_whole(
        &mut self,
        world: &World,
        kept: Option<Kept>,
        moved: &Moved,
    ) -> Result<Tables, CompileError> {
        let policies = Policies::of(world);
        let mut problems = Vec::new();
        let destinations = self.destinations(world, &policies, &mut problems)?;
        let prepared = self.prepare(world, &policies, &destinations);
        let blocks = Blocks::new(&source_blocks(&prepared), &world.node.pod_ranges);
        let used = used_tests(&prepared);
        let slots = self.slots(&used, &blocks);
        let providers = providers(&policies, world);
        let mut sets = Sets::new(&slots, &blocks, &prepared, &providers, self.naming);
        let (list, placed) = place(world, &destinations, &prepared, &mut sets);
        let (rules, dry) = legend(&prepared);
        let legend = Legend {
            rules: &rules,
            dry: &dry,
            demands: &sets.demands,
        };
        let assembled = assemble(&list, placed, &slots, &legend, self.limits)?;
        let (mut tables, slot_column) = (assembled.tables, assembled.slot_column);
        let sources = Sources {
            identities: &self.identities,
            blocks: &blocks,
            slots: &slots,
            slot_column: &slot_column,
            numbers: &world.identities,
            limits: self.limits,
        };
        let kept = kept.filter(|kept| kept.seats(world, moved, &blocks, &self.identities));
        let classes = match kept {
            Some(kept) => kept.seat_again(sources, &mut tables)?,
            None => Classes::of(sources, self.lending.lenders(), &mut tables)?,
        };
        let mut report = status::report(world, &policies, &destinations, &mut problems);
        report.set_problems(self.lending.problems().chain(&problems).cloned().collect());
        self.report = Arc::new(report);
        self.residuals = Arc::new(assembled.residuals);
        let protocols = destinations.into_iter().map(|d| (d.endpoint.id, d.protocols));
        self.protocols = Arc::new(protocols.collect());
        if self.is_littered(used.len()) {
            self.forget();
        } else {
            self.kept = Some(Kept {
                tables: tables.clone(),
                blocks,
                slots,
                used,
                slot_column,
                classes,
                problems,
                ground: Ground::of(world),
            });
        }
        Ok(tables)
    }

    fn destinations<'a>(
        &self,
        world: &'a World,
        policies: &Policies,
        problems: &mut Vec<String>,
    ) -> Result<Vec<Destination<'a>>, CompileError> {
        let mut destinations = Vec::with_capacity(world.endpoints.len());
        for endpoint in world.endpoints.values() {
            if endpoint.id == 0 || usize::from(endpoint.id) >= MAX_ENDPOINTS {
                return Err(CompileError::EndpointId {
                    name: format!("{}/{}", endpoint.namespace, endpoint.name),
                    id: endpoint.id,
                });
            }
            if [IpAddr::is_ipv4, IpAddr::is_ipv6]
                .iter()
                .any(|family| endpoint.addresses.iter().filter(|a| family(a)).count() > 1)
            {
                problems.push(format!(
                    "pod `{}/{}` has several addresses of one family; \
                     `destination.ip` is judged by the first",
                    endpoint.namespace, endpoint.name
                ));
            }
            let workload = self.lending.workload_of(endpoint);
            let mut enrolment = enrol(world, endpoint, workload);
            problems.append(&mut enrolment.problems);
            let mut scope = scope(world, policies, endpoint);
            let listed = workload.map(|workload| cross_check(&scope, policies, workload));
            scope.notes.extend(listed.unwrap_or_default());
            destinations.push(Destination {
                protocols: protocols(world, endpoint, workload, problems),
                scope,
                endpoint,
                enrolment,
            });
        }
        Ok(destinations)
    }

    /// The policies that decide over some endpoint, by index; `None` for the rest.
    fn prepare(
        &mut self,
        world: &World,
        policies: &Policies,
        destinations: &[Destination<'_>],
    ) -> Vec<Option<Arc<PreparedPolicy>>> {
        let mut used = vec![false; policies.all.len()];
        for destination in destinations.iter().filter(|d| d.is_judged(world)) {
            for at in &destination.scope.policies {
                used[*at] = true;
            }
        }
        let mut prepared = vec![None; policies.all.len()];
        let mut kept = PreparedPolicies::default();
        for at in (0..used.len()).filter(|at| used[*at]) {
            prepared[at] = Some(match &policies.all[at] {
                Acting::Unreadable(reference) => Arc::new(PreparedPolicy::unreadable(reference.clone())),
                Acting::Policy(policy) => {
                    let ready = self.prepared_policy(policy, &world.mesh);
                    kept.insert(policy.reference.clone(), (Arc::clone(policy), Arc::clone(&ready)));
                    ready
                }
            });
        }
        // A policy that is gone, or decides over no endpoint any more, leaves nothing behind.
        self.prepared = kept;
        prepared
    }

    fn prepared_policy(&mut self, policy: &Arc<AuthorizationPolicy>, mesh: &Mesh) -> Arc<PreparedPolicy> {
        match self.prepared.get(&policy.reference) {
            Some((of, prepared)) if Arc::ptr_eq(of, policy) => Arc::clone(prepared),
            _ => Arc::new(PreparedPolicy::new(policy, mesh, &mut self.tests)),
        }
    }

    fn slots(&mut self, used: &[TestId], blocks: &Blocks) -> Slots {
        let addresses = self
            .lending
            .lenders()
            .iter()
            .map(|(address, lender)| (lender.lent, blocks.place(*address).block));
        let ranges = blocks.iter().map(|(_, place)| (derived(place), place.block));
        Slots::new(&mut self.tests, used, &self.identities, addresses.chain(ranges))
    }

    /// Whether most of what is kept is no longer used; `tests`: how many are.
    fn is_littered(&self, tests: usize) -> bool {
        let identities = self.lending.lenders().len();
        self.tests.len() > 2 * tests + GARBAGE || self.identities.len() > 2 * identities + GARBAGE
    }

    /// The next compile starts afresh.
    fn forget(&mut self) {
        *self = Self {
            report: std::mem::take(&mut self.report),
            residuals: std::mem::take(&mut self.residuals),
            protocols: std::mem::take(&mut self.protocols),
            naming: self.naming,
            limits: self.limits,
            ..Self::default()
        };
    }
}

/// The distinct sets, and each destination with the numbers of its own.
fn place(
    world: &World,
    destinations: &[Destination<'_>],
    prepared: &[Option<Arc<PreparedPolicy>>],
    sets: &mut Sets<'_>,
) -> (Vec<Set>, Vec<Placed>) {
    let mut list = Vec::new();
    let mut known: FxHashMap<Profile, u16> = FxHashMap::default();
    let mut placed = Vec::with_capacity(destinations.len());
    for destination in destinations {
        let mut number = |family: fn(&IpAddr) -> bool| {
            let profile = destination.profile(world, prepared, family);
            *known.entry(profile).or_insert_with_key(|profile| {
                list.push(sets.set(profile));
                // Two for each of 255 endpoints at most.
                u16::try_from(list.len() - 1).unwrap_or(u16::MAX)
            })
        };
        placed.push(Placed {
            tables: EndpointTables {
                endpoint: destination.endpoint.id,
                set4: number(IpAddr::is_ipv4),
                set6: number(IpAddr::is_ipv6),
                mode: destination.enrolment.mode,
            },
            name: destination.name(),
        });
    }
    (list, placed)
}

fn used_tests(prepared: &[Option<Arc<PreparedPolicy>>]) -> Vec<TestId> {
    let all: BTreeSet<TestId> = prepared
        .iter()
        .flatten()
        .flat_map(|policy| policy.tests())
        .collect();
    all.into_iter().collect()
}

fn source_blocks(prepared: &[Option<Arc<PreparedPolicy>>]) -> HashSet<IpNet> {
    prepared
        .iter()
        .flatten()
        .flat_map(|policy| policy.blocks())
        .collect()
}

/// Whom a CUSTOM policy asks, by policy index.
fn providers(policies: &Policies, world: &World) -> HashMap<usize, Arc<Provider>> {
    let mut providers = HashMap::new();
    for (at, acting) in policies.all.iter().enumerate() {
        let Acting::Policy(policy) = acting else { continue };
        if policy.action == PolicyAction::Custom {
            let name = policy.provider.as_deref().unwrap_or("");
            providers.insert(at, world.mesh.provider(name));
        }
    }
    providers
}

/// Reference of every rule by its id, and whether its policy is tried only.
fn legend(prepared: &[Option<Arc<PreparedPolicy>>]) -> (Vec<RuleRef>, Vec<bool>) {
    prepared
        .iter()
        .flatten()
        .flat_map(|policy| {
            policy
                .rules
                .iter()
                .map(|rule| (rule.reference.clone(), policy.dry_run))
        })
        .unzip()
}

#[cfg(test)]
mod tests;
