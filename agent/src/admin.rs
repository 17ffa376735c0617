//! The admin API: answers from the snapshot, the board and the kernel.
//!
//! Invariant: an answer is taken from one snapshot; nothing here changes what is enforced.

pub mod detail;
mod diff;
mod dry_run;
mod entries;
mod flows;
mod held_flows;
mod identities;
mod policies;
mod policy_json;
mod status;
pub mod verdict;
mod wait;

use std::pin::Pin;
use std::sync::Arc;

use thyra_datapath_abi::{Event, EventKind};
use thyra_proto::MONITOR_KINDS;
use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::admin_service_server::AdminService;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::board::Board;
use crate::denied::is_refusal;
use crate::flows::{Flows, pairs};
use crate::monitor::{Hub, Namer, Seen};
use crate::requests::Requests;
use crate::snapshot::Snapshot;
use crate::store::{Handle, SharedPlane, lock};

/// Events that one slow listener may have waiting.
const STREAM_DEPTH: usize = 256;
/// The kind that no filter holds back: it may be what was asked for that is missing.
const LOST: &str = "lost";

/// The service.
#[derive(Clone)]
pub struct Admin {
    /// What is enforced.
    pub handle: Handle,
    /// Counters, names and what the kernel holds.
    pub plane: SharedPlane,
    /// How the sources stand.
    pub board: Arc<Board>,
    /// Events.
    pub hub: Hub,
    /// What Envoy judged.
    pub requests: Arc<Requests>,
    /// The flow log.
    pub flows: Arc<Flows>,
    /// What never changes.
    pub about: Arc<About>,
    /// Ends streams that never end by themselves.
    pub stop: CancellationToken,
}

/// What never changes while the agent runs.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Node name.
    pub node: String,
    /// `--policy-source`.
    pub policy_source: String,
    /// Start, seconds since the epoch.
    pub started_unix: u64,
}

impl Admin {
    fn endpoint_id(&self, name: &str) -> Result<u16, Status> {
        let unknown = || {
            Status::not_found(format!(
                "no endpoint `{name}` on this node (`thyra endpoint list` shows all)"
            ))
        };
        self.handle.snapshot().endpoint(name).ok_or_else(unknown)
    }

    /// Runs what reads kernel maps away from the tasks that answer others.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Status> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.map_err(|e| Status::internal(e.to_string()))?
            .map(Response::new)
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    type WatchFlowsStream = Pin<Box<dyn Stream<Item = Result<api::Flow, Status>> + Send>>;
    type MonitorStream = Pin<Box<dyn Stream<Item = Result<api::MonitorEvent, Status>> + Send>>;

    async fn get_status(
        &self,
        _: Request<api::GetStatusRequest>,
    ) -> Result<Response<api::GetStatusResponse>, Status> {
        self.blocking(|s| Ok(status::status(s))).await
    }

    async fn get_endpoint(
        &self,
        request: Request<api::GetEndpointRequest>,
    ) -> Result<Response<api::EndpointDetail>, Status> {
        let id = self.endpoint_id(&request.into_inner().endpoint)?;
        self.blocking(move |s| {
            detail::one(&s.handle.snapshot(), &s.plane, id)
                .ok_or_else(|| Status::not_found("the endpoint has just gone"))
        })
        .await
    }

    async fn get_endpoint_policy(
        &self,
        request: Request<api::GetEndpointPolicyRequest>,
    ) -> Result<Response<api::GetEndpointPolicyResponse>, Status> {
        let id = self.endpoint_id(&request.into_inner().endpoint)?;
        self.blocking(move |s| entries::policy(&s.handle.snapshot(), &s.plane, id))
            .await
    }

    async fn list_identities(
        &self,
        _: Request<api::ListIdentitiesRequest>,
    ) -> Result<Response<api::ListIdentitiesResponse>, Status> {
        self.blocking(|s| Ok(identities::list(&s.handle.snapshot())))
            .await
    }

    async fn list_policies(
        &self,
        _: Request<api::ListPoliciesRequest>,
    ) -> Result<Response<api::ListPoliciesResponse>, Status> {
        self.blocking(|s| Ok(policies::list(&s.handle.snapshot()))).await
    }

    async fn dry_run(
        &self,
        request: Request<api::DryRunRequest>,
    ) -> Result<Response<api::DryRunResponse>, Status> {
        let request = request.into_inner();
        self.blocking(move |s| dry_run::dry_run(&s.handle.snapshot(), &request))
            .await
    }

    async fn diff(&self, request: Request<api::DiffRequest>) -> Result<Response<api::DiffResponse>, Status> {
        let request = request.into_inner();
        self.blocking(move |s| diff::diff(&s.handle.snapshot(), &s.plane, &request))
            .await
    }

    async fn list_requests(
        &self,
        _: Request<api::ListRequestsRequest>,
    ) -> Result<Response<api::ListRequestsResponse>, Status> {
        Ok(Response::new(self.requests.counted().to_api()))
    }

    async fn list_flows(
        &self,
        request: Request<api::ListFlowsRequest>,
    ) -> Result<Response<api::ListFlowsResponse>, Status> {
        let filter = flows::Filter::new(request.into_inner().filter)?;
        self.blocking(move |s| {
            Ok(api::ListFlowsResponse {
                flows: s.flows.list(&|flow| filter.takes(flow)),
                log: Some(s.flow_log()),
            })
        })
        .await
    }

    async fn watch_flows(
        &self,
        request: Request<api::WatchFlowsRequest>,
    ) -> Result<Response<Self::WatchFlowsStream>, Status> {
        let filter = flows::Filter::new(request.into_inner().filter)?;
        let (sender, receiver) = mpsc::channel(STREAM_DEPTH);
        tokio::spawn(flows::follow(
            filter,
            self.flows.listen(),
            sender,
            self.stop.clone(),
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_flow_pairs(
        &self,
        _: Request<api::ListFlowPairsRequest>,
    ) -> Result<Response<api::ListFlowPairsResponse>, Status> {
        self.blocking(|s| {
            Ok(api::ListFlowPairsResponse {
                pairs: pairs::to_api(&s.flows.counted()),
                bounds: pairs::BOUNDS.to_vec(),
                log: Some(s.flow_log()),
            })
        })
        .await
    }

    async fn list_held_flows(
        &self,
        request: Request<api::ListHeldFlowsRequest>,
    ) -> Result<Response<api::ListHeldFlowsResponse>, Status> {
        let name = request.into_inner().endpoint;
        let endpoint = if name.is_empty() {
            None
        } else {
            Some(self.endpoint_id(&name)?)
        };
        self.blocking(move |s| held_flows::list(&s.namer(&s.handle.snapshot()), endpoint))
            .await
    }

    async fn monitor(
        &self,
        request: Request<api::MonitorRequest>,
    ) -> Result<Response<Self::MonitorStream>, Status> {
        let wanted = request.into_inner();
        if let Some(kind) = wanted.kinds.iter().find(|k| !MONITOR_KINDS.contains(&k.as_str())) {
            let all = MONITOR_KINDS.join(", ");
            return Err(Status::invalid_argument(format!(
                "no event is of kind `{kind}` (kinds: {all})"
            )));
        }
        let (sender, receiver) = mpsc::channel(STREAM_DEPTH);
        // From here on nothing is missed: the caller may act as soon as it has its answer.
        let seen = self.hub.listen();
        self.report_new().await?;
        tokio::spawn(self.clone().serve(wanted, seen, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn wait_enforced(
        &self,
        request: Request<api::WaitEnforcedRequest>,
    ) -> Result<Response<api::WaitEnforcedResponse>, Status> {
        wait::wait(&self.handle, request.into_inner())
            .await
            .map(Response::new)
    }
}

impl Admin {
    /// Feeds one listener until it goes away.
    async fn serve(
        self,
        wanted: api::MonitorRequest,
        seen: broadcast::Receiver<Seen>,
        sender: mpsc::Sender<Result<api::MonitorEvent, Status>>,
    ) {
        self.feed(wanted, seen, sender).await;
        // When this fails, events go on with nobody to hear them until the next listener leaves.
        let _failed = self.report_new().await;
    }

    /// Has allowed connections reported if somebody listens, and only then: a report costs more than its packet.
    async fn report_new(&self) -> Result<(), Status> {
        let set = self.blocking(|admin| {
            let mut plane = lock::write(&admin.plane);
            // Counted under the lock: whoever comes or goes now waits here for the last word.
            plane.report_new(admin.hub.listeners() > 0);
            Ok(())
        });
        set.await.map(drop)
    }

    async fn feed(
        &self,
        wanted: api::MonitorRequest,
        mut seen: broadcast::Receiver<Seen>,
        sender: mpsc::Sender<Result<api::MonitorEvent, Status>>,
    ) {
        loop {
            let next = tokio::select! {
                next = seen.recv() => next,
                () = sender.closed() => return,
                () = self.stop.cancelled() => return,
            };
            let events = match next {
                Ok(seen) => self.events(&seen, wanted.aggregate),
                Err(RecvError::Lagged(batches)) => {
                    vec![agent_event(
                        0,
                        format!("this listener was too slow: {batches} batches of events were missed"),
                    )]
                }
                Err(RecvError::Closed) => return,
            };
            for event in events.into_iter().filter(|e| wants(&wanted, e)) {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        }
    }

    fn flow_log(&self) -> api::FlowLog {
        api::FlowLog {
            lost_events: lock::read(&self.plane).lost(),
            ..self.flows.standing()
        }
    }

    fn namer<'a>(&'a self, snapshot: &'a Snapshot) -> Namer<'a> {
        Namer {
            snapshot,
            plane: &self.plane,
        }
    }

    /// What a listener is told, refusals one by one or counted (`is_aggregated`).
    fn events(&self, seen: &Seen, is_aggregated: bool) -> Vec<api::MonitorEvent> {
        match seen {
            Seen::Agent(at, message) => vec![agent_event(*at, message.to_string())],
            Seen::Kernel(batch) => {
                let snapshot = self.handle.snapshot();
                let namer = self.namer(&snapshot);
                let told = |event: &&Event| {
                    // For the flow log alone.
                    event.kind != ANSWERED && !(is_aggregated && is_refusal(event))
                };
                batch.iter().filter(told).map(|e| namer.name(e)).collect()
            }
            Seen::Denied(at, second) if is_aggregated => {
                let mut events = second.events.clone();
                if second.others > 0 {
                    let message = format!("{} more were refused, of further kinds", second.others);
                    events.push(agent_event(*at, message));
                }
                events
            }
            Seen::Denied(..) => Vec::new(),
            Seen::Lost(at, count) => vec![lost_event(*at, *count)],
            Seen::Request(at, record) => {
                let snapshot = self.handle.snapshot();
                vec![self.namer(&snapshot).request(*at, record)]
            }
        }
    }
}

/// `EventKind::Answered`.
#[expect(
    clippy::as_conversions,
    reason = "the number is the enum's own representation"
)]
const ANSWERED: u8 = EventKind::Answered as u8;

fn lost_event(time_unix_ms: u64, count: u64) -> api::MonitorEvent {
    api::MonitorEvent {
        time_unix_ms,
        kind: LOST.into(),
        message: format!("{count} events of the last second are missing here; the counters have them"),
        count,
        ..api::MonitorEvent::default()
    }
}

fn agent_event(time_unix_ms: u64, message: String) -> api::MonitorEvent {
    api::MonitorEvent {
        time_unix_ms,
        kind: "agent".into(),
        message,
        ..api::MonitorEvent::default()
    }
}

fn wants(wanted: &api::MonitorRequest, event: &api::MonitorEvent) -> bool {
    let api::MonitorRequest {
        kinds,
        from,
        to,
        related_to,
        aggregate: _,
    } = wanted;
    if event.kind == LOST {
        return true;
    }
    let source = [
        event.source.as_str(),
        &event.source_workload,
        &event.source_principal,
    ];
    let destination = [event.destination.as_str(), &event.destination_workload];
    let side = |filter: &String, names: &[&str]| filter.is_empty() || names.contains(&filter.as_str());
    let own = !related_to.is_empty() && event.endpoint.to_string() == *related_to;
    (kinds.is_empty() || kinds.contains(&event.kind))
        && side(from, &source)
        && side(to, &destination)
        && (side(related_to, &source) || side(related_to, &destination) || own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_names_a_side_by_address_or_workload() {
        let event = api::MonitorEvent {
            kind: "drop".into(),
            endpoint: 7,
            source: "10.0.0.1".into(),
            source_workload: "shop/front".into(),
            destination: "10.0.0.2".into(),
            ..api::MonitorEvent::default()
        };
        let ask = |from: &str, to: &str, related: &str| {
            let (from, to, related_to) = (from.into(), to.into(), related.into());
            wants(
                &api::MonitorRequest {
                    kinds: Vec::new(),
                    from,
                    to,
                    related_to,
                    aggregate: false,
                },
                &event,
            )
        };
        assert!(ask("", "", ""));
        assert!(ask("shop/front", "10.0.0.2", ""));
        assert!(!ask("10.0.0.2", "", ""));
        assert!(ask("", "", "10.0.0.2") && ask("", "", "7") && !ask("", "", "8"));
    }
}
