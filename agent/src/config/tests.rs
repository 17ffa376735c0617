//! Flags, file and defaults together.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

fn flags(args: &[&str]) -> Settings {
    Line::parse_from([&["thyra-agent"], args].concat()).settings
}

const BASE: &[&str] = &["--xds-address=http://127.0.0.1:15010"];

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("agent.toml");
    std::fs::write(
        &file,
        "node = \"from-file\"\ndefault-mode = \"audit\"\npod-cidr = [\"10.1.2.3/16\"]\n",
    )
    .expect("written");
    let path = format!("--config={}", file.display());
    let config = flags(&[BASE, &[&path, "--node=from-flag"]].concat());
    let config = config.with_file().and_then(Settings::resolve).expect("good");
    assert_eq!(config.node.name, "from-flag");
    assert_eq!(config.node.default_mode, Mode::Audit);
    assert_eq!(config.node.pod_ranges[0].to_string(), "10.1.0.0/16");
    assert_eq!(config.state, PathBuf::from(DEFAULT_STATE));
}

#[test]
fn other_protocols_than_tcp_pass_unless_asked_for() {
    let of = |args: &[&str]| flags(&[BASE, args].concat()).resolve().expect("good").non_tcp;
    assert_eq!(of(&[]), NonTcpChoice::Pass);
    assert_eq!(of(&["--non-tcp=enforce"]), NonTcpChoice::Enforce);
}

#[test]
fn local_redirect_is_off_unless_it_is_asked_for() {
    let of = |args: &[&str]| {
        flags(&[BASE, args].concat())
            .resolve()
            .expect("good")
            .local_redirect
    };
    assert!(!of(&[]));
    assert!(of(&["--local-redirect"]));
    assert!(!of(&["--local-redirect=false"]));
}

#[test]
fn the_host_end_is_the_hook_unless_the_pods_is_asked_for() {
    let of = |args: &[&str]| flags(&[BASE, args].concat()).resolve().expect("good").hook;
    assert_eq!(of(&[]), HookChoice::Host);
    assert_eq!(of(&["--hook=pod", "--attach=tcx"]), HookChoice::Pod);
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, "node = \"a\"\ndefalt-mode = \"audit\"\n").expect("written");
    let settings = Settings {
        config: Some(file),
        ..Settings::default()
    };
    let error = settings.with_file().expect_err("unknown key").to_string();
    assert!(
        error.contains("line 2") && error.contains("defalt-mode"),
        "{error}"
    );
}

#[test]
fn what_is_not_supported_or_missing_is_refused_by_name() {
    for (args, says) in [
        (&["--pod-cidr=10.0.0.0/33"][..], "`pod-cidr`"),
        (&["--node-address=nowhere"], "`node-address`"),
        (&["--metrics=9964"], "`metrics`"),
        (&["--hook=pod", "--local-redirect"], "`--local-redirect`"),
        (&["--hook=pod", "--attach=clsact"], "`--attach`"),
        (&["--hook=pod", "--attach=tcx-last"], "`--attach`"),
        (
            &["--workload-source=files", "--policy-source=files"],
            "`--manifests` is missing",
        ),
        (&["--xds-address=https://istiod:15012"], "root certificates"),
        (&["--xds-address=istiod:15012"], "the scheme must be"),
    ] {
        let base = if args[0].starts_with("--xds") { &[] } else { BASE };
        let error = flags(&[base, args].concat())
            .resolve()
            .expect_err("refused")
            .to_string();
        assert!(error.contains(says), "{error} should say {says}");
    }
    assert!(
        flags(&[])
            .resolve()
            .expect_err("no istiod")
            .to_string()
            .contains("--xds-address")
    );
}

#[test]
fn records_leave_out_queries_unless_told_otherwise_and_nothing_only_by_name() {
    let of = |args: &[&str]| flags(&[BASE, args].concat()).resolve();
    let redact = |args: &[&str]| of(args).expect("good").redact;
    let query = Redact {
        query: true,
        ..Redact::NOTHING
    };
    assert_eq!(redact(&[]), query);
    assert_eq!(redact(&["--redact=query"]), query);
    assert_eq!(redact(&["--redact=none"]), Redact::NOTHING);
    let all = Redact {
        query: true,
        path: true,
        server_name: true,
    };
    assert_eq!(
        redact(&["--redact=path,server-name"]),
        all,
        "a path has its query in it"
    );
    let refused = of(&["--redact=none,path"]).expect_err("which of the two");
    assert!(refused.to_string().contains("stands alone"), "{refused}");
}

#[test]
fn a_flow_log_takes_one_of_a_power_of_two_and_says_so_of_another_number() {
    let of = |args: &[&str]| flags(&[BASE, args].concat()).resolve();
    let config = of(&["--flow-log=all", "--flow-log-sample=64"]).expect("good");
    assert_eq!(
        (config.flow_log, config.flow_log_sampling),
        (FlowLogChoice::All, 6)
    );
    let config = of(&[]).expect("good");
    assert_eq!(
        (config.flow_log, config.flow_log_sampling),
        (FlowLogChoice::Denied, 0)
    );
    for wrong in ["0", "3", "65536"] {
        let refused = of(&[&format!("--flow-log-sample={wrong}")]).expect_err("not that one");
        assert!(refused.to_string().contains("is not a power of two"), "{refused}");
    }
}
