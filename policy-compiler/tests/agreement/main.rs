//! The tables agree with the oracle on random worlds and connections, the kernel's look-ups agree with the
//! tables, and a compiler that has seen other worlds before agrees with a fresh one.

mod edit;
mod entropy;
mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;

use entropy::Entropy;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use thyra_datapath_abi::tables::{Tables, Verdict};
use thyra_datapath_abi::{Action, Cell, Reason};
use thyra_datapath_engine::BankImage;
use thyra_datapath_engine::Tables as _;
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::host::HostNode;
use thyra_datapath_engine::lookup::{cell, source4, source6};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::explain::{self, Line};
use thyra_policy_compiler::oracle::{Connection, judge};
use thyra_policy_compiler::world::World;

/// Worlds, unless `THYRA_PROP_CASES` says otherwise.
const WORLDS: u32 = 500;
/// Connections tried on each.
const CONNECTIONS: usize = 40;
/// Edits of a world in a row.
const EDITS: usize = 6;

/// The tables' answer, looked up as the kernel does.
fn lookup<'a>(tables: &'a Tables, connection: &Connection) -> Option<&'a Verdict> {
    let endpoint = tables
        .endpoints
        .iter()
        .find(|e| e.endpoint == connection.destination_endpoint)?;
    let set = if connection.destination.is_ipv4() {
        endpoint.set4
    } else {
        endpoint.set6
    };
    tables.verdict(set, connection.port, tables.class_of(connection.source))
}

fn kind(verdict: &Verdict) -> &'static str {
    match (verdict.action, verdict.reason) {
        (Action::Allow, _) => "allow",
        (_, Reason::NeedsL7 | Reason::NeedsCustom) => "L7",
        (Action::Hold, _) => "hold",
        _ => "deny",
    }
}

fn worlds() -> u32 {
    std::env::var("THYRA_PROP_CASES").ok().map_or(WORLDS, |text| {
        text.parse().expect("`THYRA_PROP_CASES` is a number of worlds")
    })
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..Config::default()
    })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 2500..5000)
}

fn agree(world: &World, tables: &Tables, connection: &Connection) -> Result<Verdict, TestCaseError> {
    let judgement = judge(world, connection);
    let found = lookup(tables, connection);
    prop_assert_eq!(
        found,
        Some(&judgement.verdict),
        "left: tables, right: oracle\n{:?}\n{:#?}\n{:#?}",
        connection,
        judgement.trace,
        world
    );
    Ok(judgement.verdict)
}

#[test]
fn tables_say_what_the_oracle_says() {
    let shares: RefCell<BTreeMap<&'static str, u32>> = RefCell::default();
    let reasons: RefCell<BTreeMap<&'static str, u32>> = RefCell::default();
    let result = runner(worlds()).run(&bytes(), |bytes| {
        let mut entropy = Entropy(&bytes);
        let world = world::world(&mut entropy);
        let tables = Compiler::new().compile(&world).expect("a small world fits");
        prop_assert_eq!(
            &Compiler::new().compile(&world).expect("it fitted before"),
            &tables
        );
        for _ in 0..CONNECTIONS {
            let connection = world::connection(&mut entropy, &world);
            let verdict = agree(&world, &tables, &connection)?;
            *shares.borrow_mut().entry(kind(&verdict)).or_default() += 1;
            *reasons.borrow_mut().entry(verdict.reason.text()).or_default() += 1;
            if verdict.would.is_some() {
                *reasons
                    .borrow_mut()
                    .entry("(dry-run would change it)")
                    .or_default() += 1;
            }
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
    let shares = shares.into_inner();
    let total: u32 = shares.values().sum();
    println!("{total} connections: {shares:?}\n{:#?}", reasons.into_inner());
    for kind in ["allow", "deny", "L7"] {
        let share = shares.get(kind).copied().unwrap_or(0);
        assert!(
            share * 20 >= total,
            "`{kind}` is under 5 % of the cases: {share} of {total}"
        );
    }
}

/// The kernel's answer: the cell with the verdict's index plus one.
fn kernel(node: &HostNode, connection: &Connection) -> Cell {
    let tables = &node;
    let sets = tables.sets(connection.destination_endpoint);
    let class = match connection.source {
        IpAddr::V4(address) => source4(tables, address.into()).class,
        IpAddr::V6(address) => source6(tables, Address6::from_bytes(address.octets())).class,
    };
    let set = if connection.destination.is_ipv4() {
        sets.set4()
    } else {
        sets.set6()
    };
    cell(tables, set, class, connection.port.to_be_bytes())
}

#[test]
fn the_kernels_look_ups_find_the_same_cells() {
    let result = runner(worlds() / 4).run(&bytes(), |bytes| {
        let mut entropy = Entropy(&bytes);
        let world = world::world(&mut entropy);
        let tables = Compiler::new().compile(&world).expect("a small world fits");
        let image = BankImage::build(&tables, &|index| u16::try_from(index + 1).unwrap());
        let node = HostNode::new(image.expect("a small world fits"), 0);
        for _ in 0..CONNECTIONS {
            let connection = world::connection(&mut entropy, &world);
            if connection.source.is_ipv4() != connection.destination.is_ipv4() {
                continue;
            }
            let verdict = lookup(&tables, &connection).expect("every cell has a verdict");
            let index = tables.verdicts.iter().position(|known| known == verdict).unwrap();
            let wanted = Cell::new(verdict.action, u16::try_from(index + 1).unwrap()).unwrap();
            prop_assert_eq!(
                kernel(&node, &connection),
                wanted,
                "{:?}\n{:#?}",
                connection,
                world
            );
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

#[test]
fn a_compiler_with_a_past_says_what_a_fresh_one_says() {
    let result = runner(worlds() / 2).run(&bytes(), |bytes| {
        let mut entropy = Entropy(&bytes);
        let mut world = world::world(&mut entropy);
        let mut compiler = Compiler::new();
        compiler.compile(&world).expect("a small world fits");
        for _ in 0..EDITS {
            edit::edit(&mut entropy, &mut world);
            let kept = compiler.compile(&world).expect("a small world fits");
            let mut fresh_compiler = Compiler::new();
            let fresh = fresh_compiler.compile(&world).expect("a small world fits");
            for connection in world::connections(&world) {
                let (left, right) = (lookup(&kept, &connection), lookup(&fresh, &connection));
                prop_assert_eq!(left, right, "{:?}\n{:#?}", connection, world);
            }
            prop_assert_eq!(compiler.report(), fresh_compiler.report());
            let size = |t: &Tables| {
                (
                    t.classes.len(),
                    t.columns,
                    t.rows.len(),
                    t.sets.len(),
                    t.port_classes,
                )
            };
            prop_assert_eq!(size(&kept), size(&fresh));
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

fn holds(ports: &str, port: u16) -> bool {
    ports.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        ports == explain::ANY || (first.parse().unwrap()..=last.parse().unwrap()).contains(&port)
    })
}

/// The verdict that a person reads off the lines: the source's own line, else that of `ANY`.
fn read_off<'a>(lines: &'a [Line], tables: &Tables, connection: &Connection) -> Option<&'a Verdict> {
    let info = &tables.classes[usize::from(tables.class_of(connection.source))];
    let family = if connection.destination.is_ipv4() { 4 } else { 6 };
    let here = || {
        lines
            .iter()
            .filter(|line| line.family == 0 || line.family == family)
    };
    let is_any = |line: &Line| line.blocks.iter().any(|block| &**block == explain::ANY);
    let of_blocks = |depth: usize| -> Vec<&Line> {
        here()
            .filter(|line| line.principal == info.principal && line.pending == info.pending)
            .filter(|line| line.blocks[..] == info.blocks[..depth])
            .collect()
    };
    let read = (0..=info.blocks.len())
        .rev()
        .map(of_blocks)
        .find(|lines| !lines.is_empty())
        .unwrap_or_else(|| here().filter(|line| is_any(line)).collect());
    let mut found = read.iter().filter(|line| holds(&line.ports, connection.port));
    let verdict = &found.next()?.verdict;
    found.next().is_none().then_some(verdict)
}

#[test]
fn a_person_reads_every_cell_off_the_lines() {
    let result = runner(worlds() / 4).run(&bytes(), |bytes| {
        let mut entropy = Entropy(&bytes);
        let world = world::world(&mut entropy);
        let tables = Compiler::new().compile(&world).expect("a small world fits");
        for connection in world::connections(&world) {
            if connection.source.is_ipv4() != connection.destination.is_ipv4() {
                continue;
            }
            let lines = explain::lines(&tables, connection.destination_endpoint);
            let read = read_off(&lines, &tables, &connection);
            prop_assert_eq!(
                read,
                lookup(&tables, &connection),
                "{:?}\n{:#?}\n{:#?}",
                connection,
                lines,
                tables
            );
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}
