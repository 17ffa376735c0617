//! Sets and sources to `Tables`: equal columns, rows, sets and port classes are merged, limits are kept.
//!
//! Invariant: equal content has one number; rows are as wide as there are distinct columns.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use thyra_datapath_abi::tables::{EndpointTables, RuleRef, Tables, Verdict, Would};

use super::CompileError;
use super::limits::{Limits, index};
use super::row::{Needs, Outcome};
use super::scope::Demand;
use super::set::{Decided, Set};
use super::slot::Slots;
use crate::residual::Residual;

/// Names of the numbers in outcomes.
pub(crate) struct Legend<'a> {
    /// By rule id.
    pub(crate) rules: &'a [RuleRef],
    /// Rules of dry-run policies.
    pub(crate) dry: &'a [bool],
    pub(crate) demands: &'a [Demand],
}

/// An endpoint with its sets, by position in the list of sets.
pub(crate) struct Placed {
    pub(crate) tables: EndpointTables,
    pub(crate) name: String,
}

/// What is left to ask of L7, by its address.
pub type Residuals = BTreeMap<Arc<str>, Arc<Residual<RuleRef>>>;

/// Tables without their sources.
pub(crate) struct Assembled {
    pub(crate) tables: Tables,
    /// Column of each slot.
    pub(crate) slot_column: Vec<u16>,
    pub(crate) residuals: Residuals,
}

pub(crate) fn assemble(
    sets: &[Set],
    placed: Vec<Placed>,
    slots: &Slots,
    legend: &Legend<'_>,
    limits: Limits,
) -> Result<Assembled, CompileError> {
    let blame = |set: usize| {
        placed
            .iter()
            .find(|p| usize::from(p.tables.set4) == set || usize::from(p.tables.set6) == set)
            .map_or_else(String::new, |p| format!("at endpoint `{}`", p.name))
    };
    let mut rows = Rows::new(legend, limits);
    let mut numbered = Vec::with_capacity(sets.len());
    for (at, set) in sets.iter().enumerate() {
        let blame = || blame(at);
        let other = rows.row(&set.other, blame)?;
        let mut ports = BTreeMap::new();
        for (port, row) in &set.ports {
            let row = rows.row(row, blame)?;
            if row != other {
                ports.insert(*port, row);
            }
        }
        numbered.push((other, ports));
    }
    let (slot_column, columns) = columns(&rows.list, slots, limits)?;
    let (port_runs, port_classes, set_rows) = port_classes(&numbered, limits)?;
    let (sets, set_number) = merge_sets(set_rows, limits)?;
    let endpoints = placed.into_iter().map(|Placed { tables, .. }| EndpointTables {
        set4: set_number[usize::from(tables.set4)],
        set6: set_number[usize::from(tables.set6)],
        ..tables
    });
    let of_columns = |row: &Rc<Vec<u16>>| columns.iter().map(|slot| row[*slot]).collect();
    let tables = Tables {
        columns: index("columns", columns.len(), limits.columns, String::new)?,
        port_runs: port_runs.into(),
        port_classes,
        sets: sets.into(),
        rows: Arc::new(rows.list.iter().map(of_columns).collect()),
        verdicts: rows.verdicts.into(),
        endpoints: Arc::new(endpoints.collect()),
        ..Tables::default()
    };
    Ok(Assembled {
        tables,
        slot_column,
        residuals: rows.residuals,
    })
}

/// Distinct rows (verdict of each slot) and distinct verdicts.
struct Rows<'a> {
    legend: &'a Legend<'a>,
    limits: Limits,
    list: Vec<Rc<Vec<u16>>>,
    by_content: HashMap<Rc<Vec<u16>>, u16>,
    /// The keys are kept alive by the sets during assembly.
    by_pointer: HashMap<*const Vec<Decided>, u16>,
    verdicts: Vec<Verdict>,
    verdict_of: FxHashMap<Decided, u16>,
    by_verdict: HashMap<Verdict, u16>,
    residuals: Residuals,
}

impl<'a> Rows<'a> {
    fn new(legend: &'a Legend<'a>, limits: Limits) -> Self {
        Self {
            legend,
            limits,
            list: Vec::new(),
            by_content: HashMap::new(),
            by_pointer: HashMap::new(),
            verdicts: Vec::new(),
            verdict_of: FxHashMap::default(),
            by_verdict: HashMap::new(),
            residuals: Residuals::new(),
        }
    }

    fn row(&mut self, row: &Rc<Vec<Decided>>, blame: impl Fn() -> String) -> Result<u16, CompileError> {
        if let Some(known) = self.by_pointer.get(&Rc::as_ptr(row)) {
            return Ok(*known);
        }
        let mut cells = Vec::with_capacity(row.len());
        for decided in row.iter() {
            cells.push(self.verdict(decided, &blame)?);
        }
        let number = match self.by_content.get(&cells) {
            Some(known) => *known,
            None => {
                let number = index::<u16>("rows", self.list.len() + 1, self.limits.rows, blame)? - 1;
                let cells = Rc::new(cells);
                self.list.push(Rc::clone(&cells));
                self.by_content.insert(cells, number);
                number
            }
        };
        self.by_pointer.insert(Rc::as_ptr(row), number);
        Ok(number)
    }

    fn verdict(&mut self, decided: &Decided, blame: &impl Fn() -> String) -> Result<u16, CompileError> {
        if let Some(known) = self.verdict_of.get(decided) {
            return Ok(*known);
        }
        let mut verdict = self.legend.verdict(decided);
        if let Some(residual) = self.legend.residual(&decided.0) {
            let address = residual.address();
            verdict.residual = Some(Arc::clone(&address));
            self.residuals
                .entry(address)
                .or_insert_with(|| Arc::new(residual));
        }
        let number = match self.by_verdict.get(&verdict) {
            Some(known) => *known,
            None => {
                let limit = self.limits.verdicts;
                let number = index::<u16>("verdicts", self.verdicts.len() + 1, limit, blame)? - 1;
                self.verdicts.push(verdict.clone());
                self.by_verdict.insert(verdict, number);
                number
            }
        };
        self.verdict_of.insert(decided.clone(), number);
        Ok(number)
    }
}

impl Legend<'_> {
    fn verdict(&self, (outcome, tried): &Decided) -> Verdict {
        Verdict {
            action: outcome.action(),
            reason: outcome.reason(),
            rule: self.rule(outcome),
            because: needs(outcome).map_or_else(Vec::new, |needs| self.named(needs)),
            residual: None,
            would: tried.as_ref().map(|tried| Would {
                action: tried.action(),
                reason: tried.reason(),
                rule: self.dry_rule(tried),
            }),
        }
    }

    fn rule(&self, outcome: &Outcome) -> Option<RuleRef> {
        match outcome {
            Outcome::Allow(rule)
            | Outcome::Deny(rule)
            | Outcome::NotExpressible(rule)
            | Outcome::NoAuthorizer(rule) => Some(self.rules[*rule].clone()),
            Outcome::Strict(demand) | Outcome::StrictUnread(demand) => Some(RuleRef {
                policy: self.demands[*demand].policy.clone(),
                rule: None,
            }),
            _ => None,
        }
    }

    /// The rule that makes the difference: where L7 is asked, the first one of a dry-run policy.
    fn dry_rule(&self, tried: &Outcome) -> Option<RuleRef> {
        let asking = needs(tried).and_then(|needs| needs.because.iter().find(|(rule, _)| self.dry[*rule]));
        asking
            .map(|(rule, _)| self.rules[*rule].clone())
            .or_else(|| self.rule(tried))
    }

    /// What an Envoy of ours is to answer; a pod's own proxy has its own copy of the policies.
    fn residual(&self, outcome: &Outcome) -> Option<Residual<RuleRef>> {
        match outcome {
            Outcome::NeedsL7(needs) | Outcome::NeedsCustom(needs) => {
                Some(needs.residual.named(&|rule: &usize| self.rules[*rule].clone()))
            }
            _ => None,
        }
    }

    /// Rules and their fields, then the RequestAuthentications.
    fn named(&self, needs: &Needs) -> Vec<(RuleRef, Arc<str>)> {
        let rules = needs
            .because
            .iter()
            .map(|(rule, field)| (self.rules[*rule].clone(), Arc::clone(field)));
        let tokens = needs.residual.http.tokens().into_iter();
        rules.chain(tokens.flat_map(|tokens| tokens.because())).collect()
    }
}

fn needs(outcome: &Outcome) -> Option<&Needs> {
    match outcome {
        Outcome::NeedsL7(needs) | Outcome::NeedsCustom(needs) | Outcome::OwnProxy(needs) => Some(needs),
        _ => None,
    }
}

/// Column of each slot, and a slot of each column.
fn columns(
    rows: &[Rc<Vec<u16>>],
    slots: &Slots,
    limits: Limits,
) -> Result<(Vec<u16>, Vec<usize>), CompileError> {
    let mut by_content: HashMap<Vec<u16>, u16> = HashMap::new();
    let mut column_of = Vec::with_capacity(slots.list.len());
    let mut columns = Vec::new();
    for slot in 0..slots.list.len() {
        let content: Vec<u16> = rows.iter().map(|row| row[slot]).collect();
        let column = match by_content.get(&content) {
            Some(known) => *known,
            None => {
                columns.push(slot);
                let number = index::<u16>("columns", columns.len(), limits.columns, String::new)? - 1;
                by_content.insert(content, number);
                number
            }
        };
        column_of.push(column);
    }
    Ok((column_of, columns))
}

/// Row of any other port, and of those ports that differ from it.
type SetRows = (u16, BTreeMap<u16, u16>);

/// Runs of ports with one class, number of classes, and each set's row by port class.
type PortClasses = (Vec<(u16, u16)>, u16, Vec<Vec<u16>>);

fn port_classes(sets: &[SetRows], limits: Limits) -> Result<PortClasses, CompileError> {
    let mut by_port: BTreeMap<u16, Vec<(usize, u16)>> = BTreeMap::new();
    for (set, (_, ports)) in sets.iter().enumerate() {
        for (port, row) in ports {
            by_port.entry(*port).or_default().push((set, *row));
        }
    }
    let mut set_rows: Vec<Vec<u16>> = sets.iter().map(|(other, _)| vec![*other]).collect();
    let mut by_content: HashMap<&Vec<(usize, u16)>, u16> = HashMap::new();
    let mut classes: u16 = 1;
    let mut runs: Vec<(u16, u16)> = vec![(0, 0)];
    for (port, content) in &by_port {
        let class = match by_content.get(content) {
            Some(known) => *known,
            None => {
                let class = classes;
                classes = index(
                    "port classes",
                    usize::from(class) + 1,
                    limits.port_classes,
                    || format!("at port {port}"),
                )?;
                by_content.insert(content, class);
                for ((other, _), rows) in sets.iter().zip(&mut set_rows) {
                    rows.push(*other);
                }
                for (set, row) in content {
                    set_rows[*set][usize::from(class)] = *row;
                }
                class
            }
        };
        run(&mut runs, *port, class);
        if let Some(next) = port.checked_add(1) {
            run(&mut runs, next, 0);
        }
    }
    Ok((runs, classes, set_rows))
}

/// From `first` on the class is `class`.
fn run(runs: &mut Vec<(u16, u16)>, first: u16, class: u16) {
    if runs.last().is_some_and(|(last, _)| *last == first) {
        runs.pop();
    }
    if runs.last().is_none_or(|(_, last)| *last != class) {
        runs.push((first, class));
    }
}

/// The distinct sets, and the number of each.
fn merge_sets(sets: Vec<Vec<u16>>, limits: Limits) -> Result<(Vec<Vec<u16>>, Vec<u16>), CompileError> {
    let mut by_content: HashMap<Vec<u16>, u16> = HashMap::new();
    let mut distinct: Vec<Vec<u16>> = Vec::new();
    let mut numbers = Vec::with_capacity(sets.len());
    for set in sets {
        let number = match by_content.get(&set) {
            Some(known) => *known,
            None => {
                let count = distinct.len() + 1;
                let number = index::<u16>("policy sets", count, limits.sets, String::new)? - 1;
                distinct.push(set.clone());
                by_content.insert(set, number);
                number
            }
        };
        numbers.push(number);
    }
    Ok((distinct, numbers))
}
