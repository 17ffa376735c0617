//! Small tables, written by hand.

use std::sync::Arc;

use thyra_datapath::abi::tables::{
    ClassInfo, EndpointTables, PolicyRef, RuleRef, SourceAddress, Tables, Verdict,
};
use thyra_datapath::abi::{Action, Mode, Reason};

use crate::node::Pod;

/// One policy set for all endpoints: `allowed` pods may connect, everybody else may not.
pub(crate) struct Policy<'a> {
    pub(crate) endpoints: &'a [(Pod, u16)],
    pub(crate) allowed: &'a [Pod],
    pub(crate) denied: &'a [Pod],
    pub(crate) mode: Mode,
}

/// A rule of the policy `shop/<name>`.
pub(crate) fn rule(name: &str) -> RuleRef {
    RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        },
        rule: Some(0),
    }
}

pub(crate) fn allow(name: &str) -> Verdict {
    verdict(Action::Allow, Reason::PolicyAllow, name)
}

pub(crate) fn deny(name: &str) -> Verdict {
    verdict(Action::Deny, Reason::PolicyDeny, name)
}

fn verdict(action: Action, reason: Reason, name: &str) -> Verdict {
    Verdict {
        action,
        reason,
        rule: Some(rule(name)),
        because: Vec::new(),
        residual: None,
        would: None,
    }
}

impl Policy<'_> {
    /// The tables; `turned` numbers classes, columns, rows and verdicts the other way round, which changes
    /// no verdict as long as one bank is read alone.
    pub(crate) fn tables(&self, turned: bool) -> Tables {
        let (allowed, denied, deny_at, allow_at) = if turned { (2, 1, 1, 0) } else { (1, 2, 0, 1) };
        let class = |principal: &str| ClassInfo {
            principal: Some(Arc::from(principal)),
            identity: 1,
            pending: false,
            blocks: Vec::new(),
        };
        let outsider = ClassInfo {
            principal: None,
            identity: 0,
            pending: false,
            blocks: Vec::new(),
        };
        let local = |pod: &Pod| {
            self.endpoints
                .iter()
                .find(|(p, _)| p == pod)
                .map_or(0, |(_, id)| *id)
        };
        let pods = self
            .allowed
            .iter()
            .map(|pod| (pod, allowed))
            .chain(self.denied.iter().map(|p| (p, denied)));
        let mut addresses: Vec<_> = pods
            .flat_map(|(pod, class)| [pod.v4(), pod.v6()].map(|address| (address, class, local(pod))))
            .map(|(address, class, local)| SourceAddress {
                address,
                class,
                local,
            })
            .collect();
        addresses.sort();
        let mut verdicts = vec![deny("deny"), deny("deny")];
        verdicts[allow_at] = allow("allow");
        let cell = |class: u32| if class == allowed { allow_at } else { deny_at };
        let row = [0, 1, 2]
            .map(|class| u16::try_from(cell(class)).unwrap())
            .to_vec();
        let blank = vec![u16::try_from(deny_at).unwrap(); 3];
        let (rows, index) = if turned {
            (vec![blank, row], 1)
        } else {
            (vec![row, blank], 0)
        };
        let endpoints = self.endpoints.iter();
        Tables {
            classes: vec![outsider, class("shop/one"), class("shop/two")].into(),
            class_column: vec![0, 1, 2].into(),
            columns: 3,
            addresses: addresses.into(),
            blocks: Arc::default(),
            port_runs: vec![(0, 0)].into(),
            port_classes: 1,
            sets: vec![vec![index]].into(),
            rows: rows.into(),
            verdicts: verdicts.into(),
            endpoints: endpoints
                .map(|(_, id)| EndpointTables {
                    endpoint: *id,
                    set4: 0,
                    set6: 0,
                    mode: self.mode,
                })
                .collect::<Vec<_>>()
                .into(),
        }
    }
}
