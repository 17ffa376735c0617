//! Who keeps Envoy running: this agent, or somebody else.
//!
//! Invariant: it isn't there before something needs it, and the agent's end is not its own.

use std::sync::Arc;

use thyra_datapath::EnvoyGroup;
use thyra_node_proxy_bridge::envoy::{EnvoyConfig, EnvoyState, Given, GivenState, Left, Supervisor};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::warn;

use super::L7Error;
use crate::chain::chain;

/// See the module.
pub(super) enum Keeper {
    /// This agent starts it.
    Own {
        config: Box<EnvoyConfig>,
        group: EnvoyGroup,
        supervisor: Option<Supervisor>,
    },
    /// It is given.
    Given(Arc<Given>),
}

impl Keeper {
    /// Goes on with the one that an earlier agent left.
    pub(super) fn take_over(&mut self, left: Left, states: &watch::Sender<u64>) -> Result<(), L7Error> {
        if let Self::Own {
            config, supervisor, ..
        } = self
        {
            let taken = Supervisor::take_over(EnvoyConfig::clone(config), left)?;
            count(taken.state(), states, &Handle::current());
            *supervisor = Some(taken);
        }
        Ok(())
    }

    /// From now on something needs it.
    pub(super) fn start(&mut self, states: &watch::Sender<u64>, runtime: &Handle) {
        match self {
            Self::Given(given) => {
                if let Err(error) = given.want() {
                    warn!(error = chain(&error), "envoy can't be started by anybody");
                }
            }
            Self::Own {
                config, supervisor, ..
            } if supervisor.is_none() => {
                let _inside = runtime.enter();
                match Supervisor::start(EnvoyConfig::clone(config)) {
                    Ok(started) => {
                        count(started.state(), states, runtime);
                        *supervisor = Some(started);
                    }
                    Err(error) => warn!(error = chain(&error), "envoy can't be started"),
                }
            }
            Self::Own { .. } => {}
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        match self {
            Self::Given(given) => matches!(&*given.state().borrow(), GivenState::Here { .. }),
            Self::Own { supervisor, .. } => supervisor
                .as_ref()
                .is_some_and(|own| matches!(&*own.state().borrow(), EnvoyState::Ready { .. })),
        }
    }

    /// It was started and is not ready yet.
    pub(super) fn is_starting(&self) -> bool {
        match self {
            // When somebody else starts it, nobody here knows.
            Self::Given(_) => false,
            Self::Own { supervisor, .. } => supervisor
                .as_ref()
                .is_some_and(|own| *own.state().borrow() == EnvoyState::Starting),
        }
    }

    /// What is wrong with it; none while it isn't needed or is ready.
    pub(super) fn problem(&self) -> Option<String> {
        match self {
            Self::Given(given) => of_given(&given.state().borrow()),
            Self::Own { supervisor, .. } => of_own(&supervisor.as_ref()?.state().borrow()),
        }
    }

    /// Leaves it at work, for the next agent.
    pub(super) fn leave(self, runtime: &Handle) {
        let Self::Own {
            group, supervisor, ..
        } = self
        else {
            return;
        };
        if let Some(supervisor) = supervisor {
            runtime.block_on(supervisor.leave());
        }
        if group.is_empty()
            && let Err(error) = group.remove()
        {
            warn!(error = chain(&error), "envoy's control group stays");
        }
    }
}

fn of_own(state: &EnvoyState) -> Option<String> {
    match state {
        EnvoyState::Ready { .. } | EnvoyState::Stopped => None,
        EnvoyState::Starting => Some("envoy is starting; verdicts that need L7 are refused".to_owned()),
        EnvoyState::Waiting { why, wait } => Some(format!(
            "envoy: {why}; it is started again within {wait:?}, verdicts that need L7 are refused"
        )),
    }
}

fn of_given(state: &GivenState) -> Option<String> {
    match state {
        GivenState::Away(why) => Some(format!(
            "no envoy is there (`--envoy-socket`): {why}; verdicts that need L7 are refused"
        )),
        GivenState::Here { loose, .. } if loose.is_empty() => None,
        GivenState::Here { pid, loose } => Some(format!(
            "the envoy that is given (process {pid}) is not confined as it could be: {}; \
             `thyra-agent envoy` starts one that is",
            loose.join(", ")
        )),
    }
}

/// Counts changes.
pub(super) fn count<T: Send + Sync + 'static>(
    mut state: watch::Receiver<T>,
    states: &watch::Sender<u64>,
    runtime: &Handle,
) {
    let states = states.clone();
    runtime.spawn(async move {
        while state.changed().await.is_ok() {
            states.send_modify(|count| *count += 1);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_an_envoy_that_is_given_is_said() {
        let said = |state| of_given(&state).unwrap_or_default();
        assert!(said(GivenState::Away("none asks".to_owned())).contains("none asks; verdicts"));
        let here = |loose| GivenState::Here { pid: 7, loose };
        assert_eq!(said(here(Vec::new())), "");
        assert!(said(here(vec!["it runs as root"])).contains("process 7"));
    }
}
