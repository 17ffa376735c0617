//! The lines of an endpoint and the words of a verdict.

use std::sync::Arc;

use thyra_datapath_abi::tables::{
    ClassInfo, EndpointTables, PolicyRef, RuleRef, SourceAddress, SourceBlock, Tables, Verdict, Would,
};
use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::explain::{lines, text};

fn rule(policy: &str) -> RuleRef {
    RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: policy.into(),
        },
        rule: Some(0),
    }
}

fn verdict(action: Action, reason: Reason, rule: Option<RuleRef>) -> Verdict {
    Verdict {
        action,
        reason,
        rule,
        because: Vec::new(),
        residual: None,
        would: None,
    }
}

fn class(principal: Option<&str>, pending: bool, blocks: &[&str]) -> ClassInfo {
    ClassInfo {
        principal: principal.map(Into::into),
        identity: u32::from(principal.is_some()),
        pending,
        blocks: blocks.iter().map(|block| Arc::from(*block)).collect(),
    }
}

/// Port 80 and 9080 to 9082 are open to `front`, everything else is denied; in IPv6 to a block, too.
fn tables() -> Tables {
    let no_match = verdict(Action::Deny, Reason::Policy, None);
    let allow = verdict(Action::Allow, Reason::PolicyAllow, Some(rule("open")));
    Tables {
        classes: vec![
            class(None, false, &[]),
            class(Some("cluster.local/ns/shop/sa/front"), false, &[]),
            class(Some("cluster.local/ns/shop/sa/back"), false, &[]),
            class(None, false, &["2001:db8::/32"]),
        ]
        .into(),
        class_column: vec![0, 1, 0, 2].into(),
        columns: 3,
        addresses: vec![
            SourceAddress {
                address: "10.0.0.1".parse().unwrap(),
                class: 1,
                local: 0,
            },
            SourceAddress {
                address: "10.0.0.2".parse().unwrap(),
                class: 2,
                local: 0,
            },
            SourceAddress {
                address: "fd00::1".parse().unwrap(),
                class: 1,
                local: 0,
            },
        ]
        .into(),
        blocks: vec![SourceBlock {
            network: "2001:db8::".parse().unwrap(),
            prefix: 32,
            class: 3,
        }]
        .into(),
        port_runs: vec![(0, 0), (80, 1), (81, 0), (9080, 1), (9083, 0)].into(),
        port_classes: 2,
        sets: vec![vec![0, 1]].into(),
        rows: vec![vec![0, 0, 0], vec![0, 1, 1]].into(),
        verdicts: vec![no_match, allow].into(),
        endpoints: vec![EndpointTables {
            endpoint: 7,
            set4: 0,
            set6: 0,
            mode: Mode::Enforce,
        }]
        .into(),
    }
}

#[test]
fn lines_merge_ports_and_families_and_leave_out_who_fares_like_the_outsider() {
    let lines = lines(&tables(), 7);
    let shown: Vec<String> = lines
        .iter()
        .map(|line| {
            let who = line.principal.as_deref().unwrap_or("-");
            let blocks = line.blocks.join(" ");
            format!(
                "{} {who} [{blocks}] {} {:?}",
                line.family, line.ports, line.verdict.action
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "0 cluster.local/ns/shop/sa/front [] 0-79,81-9079,9083-65535 Deny",
            "0 cluster.local/ns/shop/sa/front [] 80,9080-9082 Allow",
            "6 - [2001:db8::/32] 0-79,81-9079,9083-65535 Deny",
            "6 - [2001:db8::/32] 80,9080-9082 Allow",
            "0 - [ANY] ANY Deny",
        ]
    );
    assert_eq!(lines[0].source, Some("10.0.0.1".parse().unwrap()));
    assert_eq!(lines[3].source, Some("2001:db8::".parse().unwrap()));
    assert_eq!(lines[3].port, 80);
}

#[test]
fn an_endpoint_without_tables_has_no_lines() {
    assert!(lines(&tables(), 8).is_empty());
}

#[test]
fn a_verdict_reads_as_a_sentence() {
    assert_eq!(
        text(&verdict(Action::Deny, Reason::PolicyDeny, Some(rule("lock")))),
        "denied by shop/lock#0: policy denied"
    );
    assert_eq!(
        text(&verdict(Action::Deny, Reason::Policy, None)),
        "denied: no allow rule matched"
    );
    let needs = Verdict {
        because: vec![(rule("get"), "methods".into()), (rule("get"), "paths".into())],
        residual: Some("00ff".into()),
        would: Some(Would {
            action: Action::Allow,
            reason: Reason::PolicyAllow,
            rule: Some(rule("try")),
        }),
        ..verdict(Action::Deny, Reason::NeedsL7, None)
    };
    assert_eq!(
        text(&needs),
        "denied: needs L7 (shop/get#0 methods, shop/get#0 paths); \
         dry-run policies would allow it by shop/try#0: policy allowed"
    );
}
