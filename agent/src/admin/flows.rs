//! Which flows a caller wants, and the stream of those that end.
//!
//! Invariant: a caller that is too slow misses flows and is told so by the end of the stream, not by silence.

use thyra_proto::thyra::v1 as api;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// What `FlowFilter.verdict` takes.
const VERDICTS: [&str; 3] = ["allow", "deny", "audit"];

/// A filter whose words are known.
#[derive(Clone, Debug)]
pub(super) struct Filter(api::FlowFilter);

impl Filter {
    pub(super) fn new(filter: Option<api::FlowFilter>) -> Result<Self, Status> {
        let filter = filter.unwrap_or_default();
        if !filter.verdict.is_empty() && !VERDICTS.contains(&filter.verdict.as_str()) {
            let all = VERDICTS.join(", ");
            return Err(Status::invalid_argument(format!(
                "no flow has the verdict `{}` (verdicts: {all})",
                filter.verdict
            )));
        }
        Ok(Self(filter))
    }

    /// Whether the caller wants it.
    pub(super) fn takes(&self, flow: &api::Flow) -> bool {
        let api::FlowFilter {
            from,
            to,
            related_to,
            verdict,
        } = &self.0;
        let source = [
            flow.source.as_str(),
            &flow.source_workload,
            &flow.source_principal,
        ];
        let destination = [
            flow.destination.as_str(),
            &flow.destination_workload,
            &flow.destination_principal,
        ];
        let side = |filter: &String, names: &[&str]| filter.is_empty() || names.contains(&filter.as_str());
        let own = !related_to.is_empty() && flow.endpoint.to_string() == *related_to;
        (verdict.is_empty() || verdict == outcome(flow))
            && side(from, &source)
            && side(to, &destination)
            && (side(related_to, &source) || side(related_to, &destination) || own)
    }
}

/// `allow`, `deny`, or `audit` where it passed though its verdict is another.
fn outcome(flow: &api::Flow) -> &'static str {
    let refuses = flow
        .verdict
        .as_ref()
        .is_some_and(|verdict| verdict.action == "deny");
    match flow.state.as_str() {
        "denied" => "deny",
        _ if refuses => "audit",
        _ => "allow",
    }
}

/// Feeds one caller until it goes away.
pub(super) async fn follow(
    filter: Filter,
    mut flows: broadcast::Receiver<api::Flow>,
    sender: mpsc::Sender<Result<api::Flow, Status>>,
    stop: CancellationToken,
) {
    loop {
        let next = tokio::select! {
            next = flows.recv() => next,
            () = sender.closed() => return,
            () = stop.cancelled() => return,
        };
        let told = match next {
            Ok(flow) if filter.takes(&flow) => sender.send(Ok(flow)).await,
            Ok(_) => Ok(()),
            Err(RecvError::Lagged(missed)) => {
                let why = format!("this listener was too slow: {missed} flows were missed; ask again");
                // It has ended either way.
                let _gone = sender.send(Err(Status::data_loss(why))).await;
                return;
            }
            Err(RecvError::Closed) => return,
        };
        if told.is_err() {
            return;
        }
    }
}
