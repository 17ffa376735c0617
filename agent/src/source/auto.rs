//! Policies from istiod's config stream; where istiod refuses it, from the Kubernetes API.
//!
//! Invariant: one of the two tells at a time; what the other told stays until it is told anew.

use std::future::pending;

use thyra_xds_client::{ClientConfig, StreamState};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::istiod::{CONFIG, StreamSink};
use super::kubernetes::{self, Policies};
use super::{Feed, POLICIES, Source};
use crate::board::State;
use crate::chain::chain;
use crate::change::Topic;

/// See the module.
pub struct Auto {
    client: ClientConfig,
    fallback: Option<Policies>,
}

impl Auto {
    /// The config stream, and what stands in when it is refused.
    #[must_use]
    pub fn new(client: ClientConfig, fallback: Option<Policies>) -> Self {
        Self { client, fallback }
    }
}

#[async_trait::async_trait]
impl Source for Auto {
    fn name(&self) -> &'static str {
        CONFIG
    }

    fn topics(&self) -> Vec<Topic> {
        POLICIES.to_vec()
    }

    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken) {
        let Self { client, fallback } = *self;
        let sink = StreamSink::new(CONFIG, feed.clone(), String::new(), false);
        let mut states = sink.states();
        let stream = thyra_xds_client::run(client, sink, stop.clone());
        let watch = async {
            let mut standing_in: Option<(CancellationToken, JoinHandle<()>)> = None;
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                match (state, &fallback) {
                    (Some(StreamState::Refused { .. }), Some(policies)) if standing_in.is_none() => {
                        info!("istiod refuses the config stream: policies come from the Kubernetes API");
                        let until = stop.child_token();
                        let source = Box::new(policies.clone());
                        let task = tokio::spawn(source.run(feed.clone(), until.clone()));
                        standing_in = Some((until, task));
                    }
                    (Some(StreamState::Refused { .. }), None) => {
                        warn!("istiod refuses the config stream, and no API server stands in");
                    }
                    (Some(StreamState::Synced { .. }), _) => end(standing_in.take(), &feed).await,
                    _ => {}
                }
            }
            pending::<()>().await;
        };
        tokio::select! {
            () = stream => {}
            () = watch => {}
        }
    }
}

async fn end(standing_in: Option<(CancellationToken, JoinHandle<()>)>, feed: &Feed) {
    let Some((until, task)) = standing_in else { return };
    info!("istiod serves the config stream again");
    until.cancel();
    if let Err(error) = task.await {
        warn!(error = chain(&error), "the Kubernetes source ended badly");
    }
    feed.board
        .state(kubernetes::NAME, State::Stopped, "istiod serves policies again");
}
