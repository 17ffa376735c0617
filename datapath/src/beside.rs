//! What else runs at this node's interfaces, and which end of the pods' veths to judge at therefore.

use std::collections::BTreeSet;
use std::io;

use aya::programs::SchedClassifier;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo};

use crate::bpffs::Direction;
use crate::clsact;
use crate::direct::attributes;
use crate::hook::{self, Hook, Role};
use crate::programs::is_direct;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// Veths with a far end in another network namespace.
    veths: usize,
    netkits: usize,
    /// Programs of others, each with an interface where it is.
    others: BTreeSet<(String, String)>,
}

/// What `thyra preflight` says of `--hook`.
pub(crate) fn preflight() -> String {
    match look() {
        Ok(found) => advice(&found, Hook::newest() == Hook::Tcx),
        Err(error) => format!("not known: the interfaces can't be listed: {error}"),
    }
}

fn advice(found: &Found, has_tcx: bool) -> String {
    let netkits = match found.netkits {
        0 => String::new(),
        n => format!("; {n} netkit devices: what goes past their host ends is not judged, neither way"),
    };
    if found.others.is_empty() {
        return format!(
            "`--hook=host`: no other program at any interface, {} veths of pods{netkits}",
            found.veths
        );
    }
    let named: Vec<String> = found
        .others
        .iter()
        .map(|(program, interface)| format!("`{program}` at `{interface}`"))
        .collect();
    let then = if has_tcx {
        "use `--hook=pod` if one of them puts packets straight into pods (`bpf_redirect_peer`), else `--hook=host`"
    } else {
        "if one of them puts packets straight into pods (`bpf_redirect_peer`), those are not judged: `--hook=pod` \
         needs Linux 6.6"
    };
    format!("other programs ({}): {then}{netkits}", named.join(", "))
}

fn look() -> io::Result<Found> {
    let mut found = Found::default();
    for ifindex in clsact::interfaces()? {
        // An interface that goes meanwhile has no attributes.
        let attributes = attributes(ifindex, None)?;
        let name = attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let Some(name) = name else {
            continue;
        };
        let is_elsewhere = attributes
            .iter()
            .any(|a| matches!(a, LinkAttribute::LinkNetNsId(_)));
        found.veths += usize::from(is_elsewhere && is(&attributes, &InfoKind::Veth));
        found.netkits += usize::from(is(&attributes, &InfoKind::Netkit));
        let programs = others(ifindex, &name)?;
        found
            .others
            .extend(programs.into_iter().map(|program| (program, name.clone())));
    }
    Ok(found)
}

fn is(attributes: &[LinkAttribute], kind: &InfoKind) -> bool {
    attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos
            .iter()
            .any(|info| matches!(info, LinkInfo::Kind(found) if found == kind)),
        _ => false,
    })
}

/// Names of the programs of others at an interface.
fn others(ifindex: u32, name: &str) -> io::Result<Vec<String>> {
    let mut others = Vec::new();
    for direction in Direction::BOTH {
        // A kernel without tcx has nothing there.
        let chain = SchedClassifier::query_tcx(name, hook::attach_type(direction));
        let chain = chain.map_or_else(|_| Vec::new(), |(_, chain)| chain);
        let names = chain.iter().map(|info| info.name_as_str().unwrap_or("unnamed"));
        others.extend(names.filter(|name| !is_ours(name)).map(str::to_owned));
        others.extend(clsact::others(ifindex, direction)?);
    }
    Ok(others)
}

fn is_ours(program: &str) -> bool {
    is_direct(program)
        || [Role::To, Role::From, Role::Origin]
            .iter()
            .any(|role| role.program() == program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_end_is_advised_beside_other_programs_alone() {
        let mut found = Found {
            veths: 3,
            ..Found::default()
        };
        assert!(advice(&found, true).starts_with("`--hook=host`"));
        found.others.insert(("cil_from_netdev".into(), "eth0".into()));
        let said = advice(&found, true);
        assert!(
            said.contains("`cil_from_netdev` at `eth0`") && said.contains("use `--hook=pod`"),
            "{said}"
        );
        assert!(advice(&found, false).contains("needs Linux 6.6"));
        found.netkits = 2;
        assert!(advice(&found, true).contains("2 netkit devices"));
    }
}
