//! Connections that are held until they are judged, and those that were, as the kernel's maps have them.
//!
//! Invariant: state, verdict and numbers are the kernel's; only names, and the rules that ask, come from the snapshot.

use std::net::SocketAddr;
use std::sync::Arc;

use thyra_datapath::{Datapath, HeldConnection};
use thyra_datapath_abi::HeldVerdict;
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use crate::monitor::Namer;
use crate::store::lock;

/// Those of an endpoint, or of all, by endpoint and client.
///
/// # Errors
/// INTERNAL when the maps can't be read.
pub(super) fn list(namer: &Namer<'_>, endpoint: Option<u16>) -> Result<api::ListHeldFlowsResponse, Status> {
    let held = lock::read(namer.plane).held_connections();
    let mut held = held.map_err(|error| Status::internal(error.to_string()))?;
    held.retain(|flow| endpoint.is_none_or(|endpoint| flow.endpoint == endpoint));
    held.sort_by_key(|flow| (flow.endpoint, flow.remote, flow.local));
    let now = Datapath::now_ns();
    Ok(api::ListHeldFlowsResponse {
        flows: held.iter().map(|flow| told(namer, flow, now)).collect(),
    })
}

fn told(namer: &Namer<'_>, flow: &HeldConnection, now_ns: u64) -> api::HeldFlow {
    let HeldConnection {
        local,
        remote,
        endpoint,
        residual: number,
        isns,
        is_open: _,
        verdict: _,
        state,
    } = *flow;
    let (standing, verdict, judged_end) = standing(flow);
    let (residual, because) = asked(namer, flow);
    let (source_identity, source_principal) = namer.identity(remote.ip());
    let (destination_identity, destination_principal) = namer.identity(local.ip());
    api::HeldFlow {
        state: standing.to_owned(),
        verdict: verdict.to_owned(),
        endpoint: u32::from(endpoint),
        source: remote.ip().to_string(),
        source_port: u32::from(remote.port()),
        source_workload: namer.workload(remote.ip()),
        source_identity,
        source_principal,
        destination: local.ip().to_string(),
        destination_port: u32::from(local.port()),
        destination_workload: namer.workload(local.ip()),
        destination_identity,
        destination_principal,
        source_isn: isns.client,
        destination_isn: isns.pod,
        judged_end,
        residual,
        residual_number: u32::from(number),
        because,
        age_ms: state.age_ns(now_ns) / 1_000_000,
    }
}

/// State and verdict in a word each, and up to which number was judged (`datapath/abi/src/held.rs`).
fn standing(flow: &HeldConnection) -> (&'static str, &'static str, Option<u32>) {
    match flow.verdict {
        _ if flow.is_open => ("open", "allow", None),
        None => ("await", "", None),
        Some(HeldVerdict {
            action: HeldVerdict::ALLOW,
            end,
            ..
        }) => ("guard", "allow", Some(end)),
        Some(_) => ("deny", "deny", None),
    }
}

/// What is asked of it, and by which rules; empty where the number stands for nothing here any more.
fn asked(namer: &Namer<'_>, flow: &HeldConnection) -> (String, Vec<String>) {
    let mut holds = namer.snapshot.l7.holds.iter();
    let residual: Option<&Arc<str>> = holds
        .find(|(_, number)| **number == flow.residual)
        .map(|(residual, _)| residual);
    let (client, port): (SocketAddr, u16) = (flow.remote, flow.local.port());
    let judged = namer.snapshot.tables.judge(flow.endpoint, client.ip(), port);
    let judged = judged.filter(|verdict| residual.is_some() && verdict.residual.as_ref() == residual);
    let because = judged.iter().flat_map(|verdict| &verdict.because);
    (
        residual.map_or_else(String::new, |residual| residual.to_string()),
        because.map(|(rule, field)| format!("{rule}: {field}")).collect(),
    )
}

#[cfg(test)]
mod tests {
    use thyra_datapath_abi::{FlowState, Isns};

    use super::*;

    #[test]
    fn a_connection_is_open_only_where_the_kernel_says_so_itself() {
        let isns = Isns { client: 1, pod: 2 };
        let end = "10.0.0.1:443".parse().expect("an end");
        let flow = |is_open, action: Option<u32>| HeldConnection {
            local: end,
            remote: end,
            endpoint: 1,
            residual: 1,
            isns,
            is_open,
            verdict: action.map(|action| HeldVerdict { isns, action, end: 7 }),
            state: FlowState::FREE,
        };
        assert_eq!(standing(&flow(false, None)), ("await", "", None));
        let guard = ("guard", "allow", Some(7));
        assert_eq!(standing(&flow(false, Some(HeldVerdict::ALLOW))), guard);
        assert_eq!(
            standing(&flow(true, Some(HeldVerdict::ALLOW))),
            ("open", "allow", None)
        );
        for other in [0, HeldVerdict::DENY, 3] {
            assert_eq!(standing(&flow(false, Some(other))), ("deny", "deny", None));
        }
    }
}
