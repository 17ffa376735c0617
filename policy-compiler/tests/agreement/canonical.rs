//! Tables with the numbers that follow from their content alone: two that say the same are equal then.
//!
//! Invariant: what no address, block or endpoint leads to is left out; nothing else is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thyra_datapath_abi::tables::{ClassInfo, EndpointTables, SourceAddress, SourceBlock, Tables, Verdict};

/// A row by what it says of each class.
type Row = Vec<Verdict>;

/// The same tables, canonically numbered.
pub(crate) fn canonical(tables: &Tables) -> Tables {
    let (class_of, classes) = classes(tables);
    let rows: Vec<Row> = tables
        .rows
        .iter()
        .map(|row| classes.iter().map(|(_, old)| cell(tables, row, *old)).collect())
        .collect();
    let by_content = sets(tables, &rows);
    let distinct: Vec<&Vec<&Row>> = by_content.keys().collect();
    let (port_runs, port_classes) = ports(tables, &distinct);
    let distinct_rows: BTreeSet<&Row> = port_classes.iter().flatten().copied().collect();
    let distinct_rows: Vec<&Row> = distinct_rows.into_iter().collect();
    let row_number = |row: &&Row| index(&distinct_rows, row);
    let by_class: Vec<Vec<&Verdict>> = (0..classes.len())
        .map(|class| distinct_rows.iter().map(|row| &row[class]).collect())
        .collect();
    let (class_column, columns) = numbered(&by_class);
    let verdicts: BTreeSet<&Verdict> = columns.iter().flatten().copied().collect();
    let verdicts: Vec<&Verdict> = verdicts.into_iter().collect();
    let of_row = |row: usize| {
        columns
            .iter()
            .map(|column| index(&verdicts, &column[row]))
            .collect()
    };
    let set_number = |old: u16| {
        let at = by_content
            .values()
            .position(|olds| olds.contains(&usize::from(old)));
        u16::try_from(at.unwrap()).unwrap()
    };
    Tables {
        classes: classes.into_iter().map(|(info, _)| info).collect(),
        class_column: class_column.into(),
        columns: u16::try_from(columns.len()).unwrap(),
        addresses: Arc::new(tables.addresses.iter().map(|a| address(a, &class_of)).collect()),
        blocks: Arc::new(tables.blocks.iter().map(|b| block(b, &class_of)).collect()),
        port_runs: port_runs.into(),
        port_classes: u16::try_from(port_classes.len()).unwrap(),
        sets: Arc::new(
            (0..distinct.len())
                .map(|set| port_classes.iter().map(|class| row_number(&class[set])).collect())
                .collect(),
        ),
        rows: Arc::new((0..distinct_rows.len()).map(of_row).collect()),
        verdicts: Arc::new(verdicts.into_iter().cloned().collect()),
        endpoints: Arc::new(
            tables
                .endpoints
                .iter()
                .map(|e| EndpointTables {
                    set4: set_number(e.set4),
                    set6: set_number(e.set6),
                    ..*e
                })
                .collect(),
        ),
    }
}

/// The sets that endpoints have, by what they say of each run of ports; the numbers that they had.
fn sets<'a>(tables: &Tables, rows: &'a [Row]) -> BTreeMap<Vec<&'a Row>, Vec<usize>> {
    let placed = tables.endpoints.iter();
    let used: BTreeSet<usize> = placed
        .flat_map(|e| [usize::from(e.set4), usize::from(e.set6)])
        .collect();
    let mut by_content: BTreeMap<Vec<&Row>, Vec<usize>> = BTreeMap::new();
    for set in used {
        let of_run = |(_, class): &(u16, u16)| tables.sets[set][usize::from(*class)];
        let runs = tables.port_runs.iter();
        let content = runs.map(|run| &rows[usize::from(of_run(run))]).collect();
        by_content.entry(content).or_default().push(set);
    }
    by_content
}

/// Runs of ports that all sets treat alike, and the row of each set in each class, in order of ports.
fn ports<'a>(tables: &Tables, sets: &[&Vec<&'a Row>]) -> (Vec<(u16, u16)>, Vec<Vec<&'a Row>>) {
    let of_runs: Vec<Vec<&Row>> = (0..tables.port_runs.len())
        .map(|run| sets.iter().map(|set| set[run]).collect())
        .collect();
    let (run_class, classes) = numbered(&of_runs);
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for ((first, _), class) in tables.port_runs.iter().zip(run_class) {
        if runs.last().is_none_or(|(_, last)| *last != class) {
            runs.push((*first, class));
        }
    }
    (runs, classes)
}

/// The number of each class that something has; class 0 stays first, the others go by what they stand for. And
/// each with the number that it had.
fn classes(tables: &Tables) -> (BTreeMap<u32, u32>, Vec<(ClassInfo, u32)>) {
    let addresses = tables.addresses.iter().map(|a| a.class);
    let blocks = tables.blocks.iter().map(|b| b.class);
    let used: BTreeSet<u32> = addresses.chain(blocks).filter(|class| *class != 0).collect();
    let mut sorted: Vec<(ClassInfo, u32)> = used
        .into_iter()
        .map(|class| (tables.class(class).unwrap().clone(), class))
        .collect();
    sorted.sort();
    sorted.insert(0, (tables.class(0).unwrap().clone(), 0));
    let numbers = sorted
        .iter()
        .zip(0..)
        .map(|((_, old), new)| (*old, new))
        .collect();
    (numbers, sorted)
}

fn cell(tables: &Tables, row: &[u16], class: u32) -> Verdict {
    let column = tables.column(class).unwrap();
    tables.verdicts[usize::from(row[usize::from(column)])].clone()
}

fn address(address: &SourceAddress, class_of: &BTreeMap<u32, u32>) -> SourceAddress {
    SourceAddress {
        class: class_of[&address.class],
        ..*address
    }
}

fn block(block: &SourceBlock, class_of: &BTreeMap<u32, u32>) -> SourceBlock {
    SourceBlock {
        class: class_of[&block.class],
        ..*block
    }
}

/// The number of each in the order in which they are met first; and the distinct ones.
fn numbered<T: Ord + Clone>(list: &[T]) -> (Vec<u16>, Vec<T>) {
    let mut distinct: Vec<T> = Vec::new();
    let numbers = list
        .iter()
        .map(|item| {
            let known = distinct.iter().position(|known| known == item);
            let number = known.unwrap_or_else(|| {
                distinct.push(item.clone());
                distinct.len() - 1
            });
            u16::try_from(number).unwrap()
        })
        .collect();
    (numbers, distinct)
}

fn index<T: PartialEq>(list: &[T], item: &T) -> u16 {
    u16::try_from(list.iter().position(|known| known == item).unwrap()).unwrap()
}
