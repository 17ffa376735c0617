//! The manifests in `deploy/` against the flags that the agent has.

use clap::Parser;
use thyra_agent::Settings;
use thyra_agent::l7::EnvoyChoice;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

#[test]
fn the_daemonsets_give_flags_that_the_agent_takes() {
    assert_eq!(envoy_of("daemonset.yaml"), EnvoyChoice::At("/envoy/envoy".into()));
    let socket = "/run/thyra-envoy/xds.sock";
    assert_eq!(
        envoy_of("daemonset-envoy.yaml"),
        EnvoyChoice::Given(socket.into())
    );
}

fn envoy_of(manifest: &str) -> EnvoyChoice {
    let path = format!("{}/../deploy/{manifest}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect(&path);
    let filled = text
        .replace("$(NODE_NAME)", "n0")
        .replace("$(NODE_IPS)", "192.0.2.1,2001:db8::1")
        .replace("$(POD_NAMESPACE)", "istio-system")
        .replace("$(POD_NAME)", "thyra-agent-x");
    let flags = filled
        .lines()
        .filter_map(|l| l.trim().strip_prefix("- --"))
        .map(|f| format!("--{f}"));
    let line: Vec<String> = std::iter::once("thyra-agent".to_owned()).chain(flags).collect();
    assert!(line.len() > 5, "{line:?}");
    let config = Line::try_parse_from(line)
        .expect("known flags")
        .settings
        .resolve()
        .expect("good values");
    assert_eq!(config.node.node_addresses.len(), 2);
    assert_eq!(config.namespace, "istio-system");
    config.envoy
}
