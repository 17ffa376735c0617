//! The cells of the tables that need a listener in a pod.
//!
//! Invariant: a cell's name says where it is in terms that outlive a compile: the pod, the first port of its port
//! class, the first source of its column.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_datapath_abi::tables::{ClassInfo, Tables};
use thyra_datapath_abi::{Action, Mode};
use thyra_node_proxy_bridge::inline::Cell;
use thyra_node_proxy_bridge::listener::Place;
use thyra_policy_compiler::compile::Residuals;

use crate::registration::Registration;

/// All of them, by name. Endpoints whose network namespace isn't known have none, and those that aren't enforced.
#[must_use]
pub fn cells(
    tables: &Tables,
    residuals: &Residuals,
    registrations: &BTreeMap<u16, Registration>,
) -> Vec<Cell> {
    let needy: BTreeMap<u16, &Arc<str>> = (0_u16..)
        .zip(tables.verdicts.iter())
        .filter(|(_, verdict)| verdict.cell_action() == Action::Proxy)
        .filter_map(|(index, verdict)| Some((index, verdict.residual.as_ref()?)))
        .collect();
    if needy.is_empty() {
        return Vec::new();
    }
    let ports = first_ports(tables);
    let sources = first_sources(tables);
    let mut cells: BTreeMap<Arc<str>, Cell> = BTreeMap::new();
    for endpoint in tables.endpoints.iter().filter(|e| e.mode == Mode::Enforce) {
        let known = registrations.get(&endpoint.endpoint);
        let Some(registration) = known.filter(|known| !known.netns.is_empty()) else {
            continue;
        };
        for (family, set) in [(4, endpoint.set4), (6, endpoint.set6)] {
            let rows = tables.sets.get(usize::from(set)).into_iter().flatten();
            for (port, row) in ports.iter().zip(rows) {
                let row = tables.rows.get(usize::from(*row)).into_iter().flatten();
                for (source, verdict) in sources.iter().zip(row) {
                    let Some(address) = needy.get(verdict) else {
                        continue;
                    };
                    let Some(residual) = residuals.get(*address) else {
                        continue;
                    };
                    let name: Arc<str> = format!("{}/{family}/{port}/{source}", registration.uid).into();
                    cells.entry(Arc::clone(&name)).or_insert_with(|| Cell {
                        name,
                        place: Place {
                            pod: registration.uid.clone(),
                            netns: registration.netns.clone(),
                        },
                        address: Arc::clone(address),
                        residual: Arc::clone(residual),
                    });
                }
            }
        }
    }
    cells.into_values().collect()
}

/// The first port of each port class.
fn first_ports(tables: &Tables) -> Vec<u16> {
    let mut ports = vec![0; usize::from(tables.port_classes)];
    for (first, class) in tables.port_runs.iter().rev() {
        if let Some(port) = ports.get_mut(usize::from(*class)) {
            *port = *first;
        }
    }
    ports
}

/// The first source of each column.
fn first_sources(tables: &Tables) -> Vec<String> {
    let mut sources = vec![String::new(); usize::from(tables.columns)];
    for (class, column) in tables.classes.iter().zip(tables.class_column.iter()) {
        if let Some(source) = sources.get_mut(usize::from(*column)).filter(|s| s.is_empty()) {
            *source = words(class);
        }
    }
    sources
}

fn words(class: &ClassInfo) -> String {
    match &class.principal {
        Some(principal) => format!("{principal}+{}", class.blocks.join(",")),
        None => format!("outside+{}", class.blocks.join(",")),
    }
}
