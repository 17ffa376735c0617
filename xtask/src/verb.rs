//! The verbs by name: each has one line of help and one function, so `help` can't drift from what exists.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

use crate::{bench, child, cluster, demo, envoy, lint, mutants, setup, suite, tree::Tree};

/// What a verb gets: the tree it works on and the words after its name.
pub(crate) struct Call<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) args: &'a [String],
}

struct Verb {
    name: &'static str,
    summary: &'static str,
    run: fn(&Call<'_>) -> Result<ExitCode>,
}

const VERBS: &[Verb] = &[
    Verb {
        name: "help",
        summary: "list the verbs",
        run: help,
    },
    Verb {
        name: "demo",
        summary: "install what is missing, build, and watch the quickstart's policies decide in the kernel",
        run: demo::run,
    },
    Verb {
        name: "test",
        summary: "install what is missing, then run every test; the last line says `N passed, N failed`",
        run: suite::run,
    },
    Verb {
        name: "setup",
        summary: "install what building and running need (Debian, as root)",
        run: setup::run,
    },
    Verb {
        name: "cluster",
        summary: "build etcd, kube-apiserver, kubectl, kube-proxy and istiod into the cache folder",
        run: cluster::run,
    },
    Verb {
        name: "cluster-path",
        summary: "print the folder that `cluster` builds into, without building",
        run: cluster::print_path,
    },
    Verb {
        name: "envoy",
        summary: "install the stock Envoy that the tests run into the cache folder, and print its path",
        run: envoy::run,
    },
    Verb {
        name: "bench",
        summary: "measure against no policy; writes target/bench/results.json",
        run: bench::run,
    },
    Verb {
        name: "fuzz-policy",
        summary: "a million random connections and requests against the oracle; keeps what it finds",
        run: fuzz_policy,
    },
    Verb {
        name: "fuzz-packets",
        summary: "a hundred million changed packets through the engine: none may let in whom policy refuses",
        run: fuzz_packets,
    },
    Verb {
        name: "fuzz-l7",
        summary: "ten thousand random residuals against the real Envoy (some 20 requests each)",
        run: fuzz_l7,
    },
    Verb {
        name: "mutants",
        summary: "seeded mistakes of the compiler, each of which the tests must catch (about 15 minutes)",
        run: mutants::run,
    },
    Verb {
        name: "proto",
        summary: "regenerate the checked-in protobuf code from the .proto files",
        run: proto,
    },
    Verb {
        name: "lint",
        summary: "rustfmt, clippy and the licence check, over the whole workspace",
        run: lint::run,
    },
    Verb {
        name: "tidy",
        summary: "the rules of the tree: layers, headers, lengths, links, licences",
        run: tidy,
    },
];

/// Runs the verb that `args` names.
///
/// # Errors
/// An unknown verb, or whatever stopped the verb before it could report by exit code.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let (name, rest) = args
        .split_first()
        .map_or(("help", &[][..]), |(first, rest)| (first.as_str(), rest));
    let Some(verb) = VERBS.iter().find(|verb| verb.name == name) else {
        bail!("unknown verb `{name}`; `cargo xtask help` lists them");
    };
    let tree = Tree::find()?;
    (verb.run)(&Call {
        tree: &tree,
        args: rest,
    })
}

fn help(_: &Call<'_>) -> Result<ExitCode> {
    println!("make VERB, or cargo xtask VERB [ARGS]; with make, arguments go into ARGS=\"…\"\n");
    for verb in VERBS {
        println!("  {:<13} {}", verb.name, verb.summary);
    }
    Ok(ExitCode::SUCCESS)
}

/// Worlds, of 40 connections each, unless the first argument says otherwise.
const FUZZED: &str = "25000";
/// Packets of one `fuzz-packets`.
const FUZZED_PACKETS: &str = "100000000";

fn fuzz_policy(call: &Call<'_>) -> Result<ExitCode> {
    let worlds = call.args.first().map_or(FUZZED, String::as_str);
    let mut tests = long_tests(
        call,
        "thyra-policy-compiler",
        "agreement",
        "say_what_the_oracle_says",
    );
    tests
        .env("THYRA_PROP_CASES", worlds)
        .env("THYRA_PROP_PROGRESS", "1");
    child::check(&mut tests)?;
    Ok(ExitCode::SUCCESS)
}

fn fuzz_packets(call: &Call<'_>) -> Result<ExitCode> {
    let packets = call.args.first().map_or(FUZZED_PACKETS, String::as_str);
    let mut tests = long_tests(call, "thyra-datapath-engine", "packets", "no_change_of_a_packet");
    child::check(tests.env("THYRA_PACKETS", packets))?;
    Ok(ExitCode::SUCCESS)
}

/// Residuals of one `fuzz-l7`.
const FUZZED_RESIDUALS: &str = "10000";

fn fuzz_l7(call: &Call<'_>) -> Result<ExitCode> {
    envoy::install()?;
    let residuals = call.args.first().map_or(FUZZED_RESIDUALS, String::as_str);
    // Not optimised: Envoy does the work, and its protobuf types alone take minutes to optimise.
    let mut tests = call.tree.cargo();
    tests
        .args(["test", "-p", "thyra-node-proxy-bridge", "--test", "envoy"])
        .args(["--", "--nocapture", "envoy_answers_what_the_residual_says"]);
    child::check(tests.env("THYRA_L7_CASES", residuals))?;
    Ok(ExitCode::SUCCESS)
}

/// The tests of a package's test file whose names hold `filter`, optimised.
fn long_tests(call: &Call<'_>, package: &str, file: &str, filter: &str) -> Command {
    let mut cargo = call.tree.cargo();
    cargo
        .args(["test", "--release", "-p", package, "--test", file])
        .args(["--", "--nocapture", filter]);
    cargo
}

fn proto(call: &Call<'_>) -> Result<ExitCode> {
    child::check(
        call.tree
            .cargo()
            .args(["test", "-p", "thyra-proto"])
            .env("BLESS", "1"),
    )?;
    println!("proto: regenerated; look at the difference before you commit it");
    Ok(ExitCode::SUCCESS)
}

fn tidy(call: &Call<'_>) -> Result<ExitCode> {
    let findings = crate::tidy::check(call.tree)?;
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings", findings.len());
    Ok(if findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
