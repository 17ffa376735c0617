//! The layers of docs/architecture.md: a crate names only crates below it, and keeps out what would tie it to
//! the world.

use super::{Finding, Source, manifests::Manifest};

/// A crate's place and what it may name.
struct Layer {
    name: &'static str,
    level: u8,
    may_name: &'static [&'static str],
}

const PROTO: &str = "thyra-proto";
const ABI: &str = "thyra-datapath-abi";
const ENGINE: &str = "thyra-datapath-engine";
const EBPF: &str = "thyra-datapath-ebpf";
const DATAPATH: &str = "thyra-datapath";
const COMPILER: &str = "thyra-policy-compiler";
const XDS: &str = "thyra-xds-client";
const BRIDGE: &str = "thyra-node-proxy-bridge";
const AGENT: &str = "thyra-agent";
const CLI: &str = "thyra-cli";
const BENCH: &str = "thyra-bench";
const BENCH_EBPF: &str = "thyra-bench-ebpf";
const XTASK: &str = "xtask";

/// All that a program at the top may name.
const LIBRARIES: &[&str] = &[PROTO, ABI, ENGINE, DATAPATH, COMPILER, XDS, BRIDGE];

const LAYERS: &[Layer] = &[
    Layer {
        name: PROTO,
        level: 0,
        may_name: &[],
    },
    Layer {
        name: ABI,
        level: 0,
        may_name: &[],
    },
    Layer {
        name: ENGINE,
        level: 1,
        may_name: &[ABI],
    },
    Layer {
        name: EBPF,
        level: 1,
        may_name: &[ABI, ENGINE],
    },
    Layer {
        name: BENCH_EBPF,
        level: 1,
        may_name: &[],
    },
    Layer {
        name: DATAPATH,
        level: 2,
        may_name: &[ABI, ENGINE],
    },
    Layer {
        name: COMPILER,
        level: 2,
        may_name: &[ABI, ENGINE],
    },
    Layer {
        name: XDS,
        level: 2,
        may_name: &[PROTO],
    },
    Layer {
        name: BRIDGE,
        level: 3,
        may_name: &[ABI, COMPILER, PROTO, DATAPATH],
    },
    Layer {
        name: AGENT,
        level: 4,
        may_name: LIBRARIES,
    },
    Layer {
        name: CLI,
        level: 4,
        may_name: LIBRARIES,
    },
    Layer {
        name: BENCH,
        level: 5,
        may_name: &[PROTO, ABI, ENGINE, DATAPATH, COMPILER, XDS, BRIDGE, AGENT],
    },
    // The first thing that a fresh machine compiles.
    Layer {
        name: XTASK,
        level: 5,
        may_name: &[],
    },
];

/// What a crate stays free of, whoever asks.
const FREE_OF: &[(&str, &[&str], &str)] = &[
    (
        COMPILER,
        &["tokio", "aya", "rustix", "libc", "prost", "tonic"],
        "the compiler is pure: no I/O, no kernel, no wire",
    ),
    (
        XDS,
        &["aya", "kube"],
        "the client knows resources, not the kernel or the cluster",
    ),
    (AGENT, &["aya"], "the kernel is datapath's alone"),
    (CLI, &["aya"], "the kernel is datapath's alone"),
    (
        ABI,
        &["aya", "aya-ebpf", "serde"],
        "linked into the kernel programs",
    ),
    (
        ENGINE,
        &["aya", "aya-ebpf", "serde"],
        "linked into the kernel programs",
    ),
];

/// Programs may use anyhow; a library's errors are types.
const PROGRAMS: &[&str] = &[AGENT, CLI, BENCH, XTASK];

/// Folders whose code must give the same answer at any time of day.
const TIMELESS: &[&str] = &["policy-compiler/src", "datapath/abi/src", "datapath/engine/src"];
const CLOCKS: &[&str] = &["SystemTime", "Instant::now"];

/// Checks every member's dependencies, and the pure ones' sources for clocks.
pub(super) fn check(manifests: &[Manifest], sources: &[Source]) -> Vec<Finding> {
    manifests
        .iter()
        .flat_map(arrows)
        .chain(sources.iter().flat_map(clocks))
        .collect()
}

fn clocks(source: &Source) -> Vec<Finding> {
    if !TIMELESS.iter().any(|folder| source.file.starts_with(folder)) {
        return Vec::new();
    }
    let lines = source.text.lines().enumerate();
    let reads = lines.filter(|(_, line)| CLOCKS.iter().any(|clock| line.contains(clock)));
    reads
        .map(|(index, _)| {
            Finding::new(
                &source.file,
                index + 1,
                "reads a clock; take the time as an argument",
            )
        })
        .collect()
}

fn arrows(manifest: &Manifest) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: String| findings.push(Finding::new(&manifest.file(), 0, what));
    let name = manifest.name();
    let Some(layer) = layer(name) else {
        find(format!(
            "`{name}` has no layer; give it one here and in docs/architecture.md"
        ));
        return findings;
    };
    for kind in ["dependencies", "build-dependencies"] {
        for dependency in manifest.dependencies(kind) {
            if self::layer(dependency).is_some() && !layer.may_name.contains(&dependency) {
                find(format!(
                    "`{name}` may not depend on `{dependency}`; arrows only point down"
                ));
            }
            for (crate_name, banned, reason) in FREE_OF {
                if *crate_name == name && banned.contains(&dependency) {
                    find(format!("`{name}` may not depend on `{dependency}`: {reason}"));
                }
            }
            if dependency == "anyhow" && !PROGRAMS.contains(&name) {
                find(format!(
                    "`{name}` is a library; its errors are thiserror enums, not anyhow"
                ));
            }
        }
    }
    // A test may borrow a neighbour, never a crate above.
    for dependency in manifest.dependencies("dev-dependencies") {
        if self::layer(dependency).is_some_and(|other| other.level > layer.level) {
            find(format!(
                "the tests of `{name}` may not depend on `{dependency}`, which is above it"
            ));
        }
    }
    findings
}

fn layer(name: &str) -> Option<&'static Layer> {
    LAYERS.iter().find(|layer| layer.name == name)
}

#[cfg(test)]
mod tests {
    use super::{LAYERS, Source, arrows, clocks, layer};
    use crate::tidy::manifests::tests::manifest;

    fn findings(name: &str, rest: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"{name}\"\n{rest}");
        arrows(&manifest("x", &text))
            .into_iter()
            .map(|finding| finding.what)
            .collect()
    }

    #[test]
    fn the_table_itself_only_points_down() {
        for upper in LAYERS {
            for name in upper.may_name {
                let lower = layer(name).expect("every name in the table has a layer");
                let beside = upper.level == 1 && lower.level == 1;
                assert!(lower.level < upper.level || beside, "{} → {name}", upper.name);
            }
        }
    }

    #[test]
    fn an_arrow_up_or_across_is_found() {
        assert_eq!(
            findings(
                "thyra-datapath-engine",
                "[dependencies]\nthyra-datapath-abi = \"1\"\n"
            ),
            [""; 0]
        );
        let up = findings(
            "thyra-datapath-abi",
            "[dependencies]\nthyra-datapath-engine = \"1\"\n",
        );
        assert!(up[0].contains("only point down"), "{up:?}");
        let across = findings(
            "thyra-policy-compiler",
            "[dependencies]\nthyra-xds-client = \"1\"\n",
        );
        assert!(across[0].contains("only point down"), "{across:?}");
        let hidden = findings(
            "thyra-proto",
            "[target.'cfg(unix)'.build-dependencies]\nthyra-agent = \"1\"\n",
        );
        assert!(hidden[0].contains("only point down"), "{hidden:?}");
    }

    #[test]
    fn the_compiler_stays_pure() {
        let found = findings(
            "thyra-policy-compiler",
            "[dependencies]\ntokio = \"1\"\nanyhow = \"1\"\n",
        );
        assert!(found.iter().any(|what| what.contains("pure")), "{found:?}");
        assert!(found.iter().any(|what| what.contains("thiserror")), "{found:?}");
    }

    #[test]
    fn the_compiler_knows_no_clock() {
        let reads = |file: &str| {
            clocks(&Source {
                file: file.into(),
                text: "let t = Instant::now();".to_owned(),
            })
            .len()
        };
        assert_eq!(
            (
                reads("policy-compiler/src/compile.rs"),
                reads("agent/src/store.rs")
            ),
            (1, 0)
        );
    }

    #[test]
    fn a_test_may_borrow_a_neighbour_but_nothing_above() {
        assert_eq!(
            findings(
                "thyra-datapath",
                "[dev-dependencies]\nthyra-policy-compiler = \"1\"\n"
            ),
            [""; 0]
        );
        assert_eq!(
            findings("thyra-datapath", "[dev-dependencies]\nthyra-agent = \"1\"\n").len(),
            1
        );
    }

    #[test]
    fn a_crate_without_a_layer_is_found() {
        assert!(findings("thyra-new", "")[0].contains("no layer"));
    }
}
