//! The tables agree with the oracle on random worlds and connections, the kernel's look-ups agree with the
//! tables, and a compiler that has seen other worlds before agrees with a fresh one.

mod canonical;
mod edit;
mod entropy;
mod found;
mod requests;
mod world;

use std::cell::{Cell as Counter, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use canonical::canonical;
use entropy::Entropy;
use proptest::prelude::*;
use thyra_datapath_abi::tables::{RuleRef, Tables, Verdict};
use thyra_datapath_abi::{Action, Cell, Reason};
use thyra_datapath_engine::BankImage;
use thyra_datapath_engine::Tables as _;
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::host::HostNode;
use thyra_datapath_engine::lookup::{cell, source4, source6};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::explain::{self, Line};
use thyra_policy_compiler::oracle::{Connection, judge, judge_traffic};
use thyra_policy_compiler::residual::{self, Answer, Context, Ending};
use thyra_policy_compiler::traffic::Traffic;
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

fn agree(world: &World, tables: &Tables, connection: &Connection) -> Result<Verdict, TestCaseError> {
    let judgement = judge(world, connection);
    // The oracle knows no residuals; what they say is compared below.
    let found = lookup(tables, connection).cloned().map(|verdict| Verdict {
        residual: None,
        ..verdict
    });
    prop_assert_eq!(
        found.as_ref(),
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
    found::run("tables_say_what_the_oracle_says", worlds(), |bytes| {
        let mut entropy = Entropy(bytes);
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

/// The last word by the tables and their residuals.
fn last_word(
    compiler: &Compiler,
    world: &World,
    tables: &Tables,
    connection: &Connection,
    traffic: &Traffic,
) -> Option<Ending<RuleRef>> {
    let verdict = lookup(tables, connection)?;
    let Connection {
        source,
        destination_endpoint,
        port,
        ..
    } = *connection;
    let context = Context {
        traffic,
        source: source.to_canonical(),
        paths: world.mesh.path_normalization,
    };
    let protocols = compiler.protocols().get(&destination_endpoint);
    let declared = protocols.and_then(|ports| ports.get(&port));
    let declares_http = declared.is_some_and(|declared| declared.http);
    residual::end(world, verdict, compiler.residuals(), declares_http, &context)
}

/// A residual does not tell a term that can't be expressed from one that doesn't hold.
fn same_cause(found: &Ending<RuleRef>, wanted: &Ending<RuleRef>) -> bool {
    let inexpressible = [wanted.reason, found.reason].contains(&Reason::NotExpressible);
    found.rule == wanted.rule && (found.reason == wanted.reason || inexpressible)
}

/// Neither an awaited identity, nor Services that disagree, nor a proxy of the pod's own: what can be named for
/// sure.
fn is_judged_once(compiler: &Compiler, world: &World, tables: &Tables, connection: &Connection) -> bool {
    let protocols = compiler.protocols().get(&connection.destination_endpoint);
    let declared = protocols.and_then(|ports| ports.get(&connection.port));
    let disagree = declared.is_some_and(|declared| declared.disagree());
    let class = tables.class_of(connection.source);
    let endpoint = &world.endpoints[&connection.destination_endpoint];
    let proxied = endpoint.containers.iter().any(|name| name == "istio-proxy");
    !disagree && !proxied && !tables.is_pending(class)
}

/// A connection; of eight the first one whose verdict needs L7.
fn asking(entropy: &mut Entropy<'_>, world: &World, tables: &Tables) -> Connection {
    let drawn: Vec<Connection> = (0..8).map(|_| world::connection(entropy, world)).collect();
    let asks = |c: &&Connection| lookup(tables, c).is_some_and(|verdict| verdict.residual.is_some());
    *drawn.iter().find(asks).unwrap_or(&drawn[0])
}

/// Whether every rule that may hold is asked. Where no byte is needed the first one that holds for sure is
/// named; one before it may hold as well for this request.
fn is_exact(compiler: &Compiler, cell: &Verdict, traffic: &Traffic) -> bool {
    fn asks(answer: &Answer<RuleRef>) -> bool {
        match answer {
            Answer::Constant(..) => false,
            Answer::Rules(_) => true,
            Answer::Stricter(a, b) => asks(a) && asks(b),
            Answer::Authenticated(_, then) => asks(then),
        }
    }
    let residual = cell
        .residual
        .as_ref()
        .and_then(|address| compiler.residuals().get(address));
    residual.is_some_and(|residual| {
        asks(if traffic.http.is_some() {
            &residual.http
        } else {
            &residual.other
        })
    })
}

// long: one run through worlds, and what must have been met in it
#[test]
fn residuals_say_what_the_oracle_says_of_every_request() {
    let shares: RefCell<BTreeMap<String, u32>> = RefCell::default();
    let fields: RefCell<BTreeMap<String, u32>> = RefCell::default();
    found::run(
        "residuals_say_what_the_oracle_says_of_every_request",
        worlds(),
        |bytes| {
            let mut entropy = Entropy(bytes);
            let world = world::world(&mut entropy);
            let mut compiler = Compiler::new();
            let tables = compiler.compile(&world).expect("a small world fits");
            let mut naming = Compiler::naming();
            let named_tables = naming.compile(&world).expect("a small world fits");
            for _ in 0..CONNECTIONS {
                let connection = asking(&mut entropy, &world, &tables);
                let traffic = requests::traffic(&mut entropy);
                let mut trace = Vec::new();
                let wanted = judge_traffic(&world, &connection, &traffic, &mut trace);
                let found = last_word(&compiler, &world, &tables, &connection, &traffic);
                let cell = lookup(&tables, &connection).expect("every cell has a verdict");
                let exact = is_exact(&compiler, cell, &traffic);
                let alike = found.as_ref().is_some_and(|found| {
                    found.action == wanted.action && (same_cause(found, &wanted) || !exact)
                });
                let one = is_judged_once(&compiler, &world, &tables, &connection);
                let by = last_word(&naming, &world, &named_tables, &connection, &traffic).filter(|_| one);
                let named = found.clone().map(|found| residual::named(found, by));
                prop_assert!(
                    named
                        .as_ref()
                        .is_some_and(|named| !one || same_cause(named, &wanted)),
                    "named: {:?}\noracle: {:?}\n{:?}\n{:?}\n{:#?}\n{:#?}",
                    named,
                    wanted,
                    connection,
                    traffic,
                    trace,
                    world
                );
                prop_assert!(
                    alike,
                    "residual: {:?}\noracle: {:?}\n{:?}\n{:?}\n{:#?}\n{:#?}\n{:#?}",
                    found,
                    wanted,
                    connection,
                    traffic,
                    trace,
                    cell,
                    world
                );
                let ended = format!(
                    "{:?}{}",
                    wanted.action,
                    if cell.residual.is_some() { " by L7" } else { "" }
                );
                *shares.borrow_mut().entry(ended).or_default() += 1;
                for (_, field) in &cell.because {
                    *fields.borrow_mut().entry(field.to_string()).or_default() += 1;
                }
            }
            Ok(())
        },
    );
    let shares = shares.into_inner();
    let total: u32 = shares.values().sum();
    println!(
        "{total} connections with a first request: {shares:?}\nasked: {:#?}",
        fields.into_inner()
    );
    let share = |ended: &str| shares.get(ended).copied().unwrap_or(0);
    for ended in ["Allow by L7", "Deny by L7", "Proxy by L7"] {
        assert!(
            share(ended) * 40 >= total,
            "`{ended}` is under 2.5 % of the cases"
        );
    }
    let by_l7 = share("Allow by L7") + share("Deny by L7") + share("Proxy by L7");
    for (kind, share) in [("allow", share("Allow")), ("deny", share("Deny")), ("L7", by_l7)] {
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
    found::run(
        "the_kernels_look_ups_find_the_same_cells",
        worlds() / 4,
        |bytes| {
            let mut entropy = Entropy(bytes);
            let world = world::world(&mut entropy);
            let tables = Compiler::new().compile(&world).expect("a small world fits");
            let node = HostNode::new(image(None, &tables), 0);
            for _ in 0..CONNECTIONS {
                let connection = world::connection(&mut entropy, &world);
                if connection.source.is_ipv4() != connection.destination.is_ipv4() {
                    continue;
                }
                let verdict = lookup(&tables, &connection).expect("every cell has a verdict");
                let index = tables.verdicts.iter().position(|known| known == verdict).unwrap();
                let wanted = Cell::new(verdict.cell_action(), u16::try_from(index + 1).unwrap()).unwrap();
                prop_assert_eq!(
                    kernel(&node, &connection),
                    wanted,
                    "{:?}\n{:#?}",
                    connection,
                    world
                );
            }
            Ok(())
        },
    );
}

/// The bank that a node would write; verdicts have their places as ids.
fn image(before: Option<(&Tables, &BankImage)>, tables: &Tables) -> BankImage {
    let id = |index: usize| u16::try_from(index + 1).unwrap();
    BankImage::build_after(before, tables, &id).expect("a small world fits")
}

#[test]
fn a_compiler_with_a_past_says_what_a_fresh_one_says() {
    let (edits, short) = (Counter::new(0_u32), Counter::new(0_u32));
    found::run(
        "a_compiler_with_a_past_says_what_a_fresh_one_says",
        worlds() * 2,
        |bytes| {
            let mut entropy = Entropy(bytes);
            let mut world = world::world(&mut entropy);
            let mut compiler = Compiler::new();
            let mut before = compiler.compile(&world).expect("a small world fits");
            let mut written = (before.clone(), image(None, &before));
            for _ in 0..EDITS {
                edit::edit(&mut entropy, &mut world);
                // What arrives together is compiled together.
                if entropy.chance(30) {
                    edit::edit(&mut entropy, &mut world);
                }
                let kept = compiler.compile(&world).expect("a small world fits");
                edits.set(edits.get() + 1);
                short.set(short.get() + u32::from(Arc::ptr_eq(&before.rows, &kept.rows)));
                if entropy.chance(4) {
                    let after = image(Some((&written.0, &written.1)), &kept);
                    prop_assert!(after == image(None, &kept), "{:#?}", world);
                    written = (kept.clone(), after);
                }
                before = kept.clone();
                let mut fresh_compiler = Compiler::new();
                let fresh = fresh_compiler.compile(&world).expect("a small world fits");
                let canonical_fresh = canonical(&fresh);
                prop_assert_eq!(&canonical(&kept), &canonical_fresh, "{:#?}", world);
                prop_assert_eq!(compiler.report(), fresh_compiler.report());
                for address in canonical_fresh
                    .verdicts
                    .iter()
                    .filter_map(|v| v.residual.as_ref())
                {
                    let of = |compiler: &Compiler| compiler.residuals().get(address).cloned();
                    prop_assert!(of(&compiler).is_some());
                    prop_assert_eq!(of(&compiler), of(&fresh_compiler));
                }
            }
            Ok(())
        },
    );
    let (edits, short) = (edits.get(), short.get());
    println!("{edits} edits, {short} of them moved addresses only");
    assert!(short * 20 >= edits, "{short} of {edits} edits took the short way");
}

#[test]
fn canonical_tables_say_what_the_tables_say() {
    found::run(
        "canonical_tables_say_what_the_tables_say",
        worlds() / 4,
        |bytes| {
            let world = world::world(&mut Entropy(bytes));
            let tables = Compiler::new().compile(&world).expect("a small world fits");
            let renumbered = canonical(&tables);
            prop_assert_eq!(canonical(&renumbered), renumbered.clone());
            for connection in world::connections(&world) {
                prop_assert_eq!(lookup(&tables, &connection), lookup(&renumbered, &connection));
            }
            Ok(())
        },
    );
}

fn holds(ports: &str, port: u16) -> bool {
    ports.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        ports == explain::ANY || (first.parse().unwrap()..=last.parse().unwrap()).contains(&port)
    })
}

/// The verdict that a person reads off the lines: the source's own line, else that of `ANY`.
fn read_off<'a>(lines: &'a [Line], tables: &Tables, connection: &Connection) -> Option<&'a Verdict> {
    let info = tables.class(tables.class_of(connection.source)).unwrap();
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
    found::run("a_person_reads_every_cell_off_the_lines", worlds() / 4, |bytes| {
        let mut entropy = Entropy(bytes);
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
}
