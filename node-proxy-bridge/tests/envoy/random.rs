//! Random residuals of random worlds, and random requests: Envoy answers what the host says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::listener::Reading;
use thyra_node_proxy_bridge::lower;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::residual::Residual;
use thyra_policy_compiler::traffic::{PathNormalization, Traffic};

use super::authorizer::Running;
use super::custom::places;
use super::entropy::Entropy;
use super::judged::Case;
use super::node::{Node, binary, wanted};
use super::{requests, token, world};

/// Residuals, unless `THYRA_L7_CASES` says otherwise.
const RESIDUALS: u64 = 240;
/// Requests to each.
const REQUESTS: usize = 24;
/// Residuals that Envoy holds at a time.
const AT_ONCE: usize = 200;
/// Residuals of one world: more of the same say little.
const OF_A_WORLD: usize = 6;
/// One in so many is asked of a stream that is not HTTP; worlds have fewer of them.
const STREAMS: usize = 8;
/// Bytes that make a world.
const ENTROPY: usize = 6000;
/// The authorizers of `world`: one is asked over gRPC, the other over HTTP.
const AUTHORIZERS: [&str; 2] = ["ext", "web"];
/// Disagreements that are shown before the test gives up.
const SHOWN: usize = 8;

type Question = (Reading, Arc<Residual<RuleRef>>);

/// SplitMix64: a test that failed is run again with its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}

/// What was met.
#[derive(Default)]
struct Tally {
    inexpressible: BTreeMap<String, u32>,
    /// Of each reading: refused, allowed.
    streams: BTreeMap<Reading, [u32; 2]>,
    disagreements: Vec<String>,
}

fn number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(otherwise, |text| {
        text.parse().unwrap_or_else(|_| panic!("`{name}` is a number"))
    })
}

/// Distinct questions that Envoy can be asked, of worlds whose mesh normalises paths in this way.
fn questions(
    random: &mut Random,
    paths: PathNormalization,
    count: usize,
    tally: &mut Tally,
) -> Vec<Question> {
    let mut found = Vec::new();
    let mut known = BTreeSet::new();
    let mut https = 0;
    while found.len() < count {
        let bytes = random.bytes(ENTROPY);
        let mut world = world::world(&mut Entropy(&bytes));
        world.mesh.path_normalization = paths;
        let mut compiler = Compiler::new();
        compiler.compile(&world).expect("a small world fits");
        let mut of_world = 0;
        for residual in compiler.residuals().values() {
            let asks = lower::asks(&token::unchecked(&residual.http));
            let residual = &Arc::new(Residual {
                http: token::checked(&residual.http),
                other: residual.other.clone(),
            });
            let address = &residual.address();
            let readings = [
                (Reading::Http, asks, lower::http(residual)),
                (
                    Reading::Stream,
                    lower::asks(&residual.other),
                    lower::stream(residual),
                ),
            ];
            for (reading, asks, chain) in readings {
                let enough = reading == Reading::Http && https == count - count / STREAMS;
                if !asks || enough || of_world == OF_A_WORLD || !known.insert((reading, Arc::clone(address)))
                {
                    continue;
                }
                match chain {
                    Ok(_) => {
                        found.push((reading, Arc::clone(residual)));
                        of_world += 1;
                        https += usize::from(reading == Reading::Http);
                    }
                    Err(why) => *tally.inexpressible.entry(why.why.to_string()).or_default() += 1,
                }
            }
        }
    }
    found.truncate(count);
    found
}

fn traffic(entropy: &mut Entropy<'_>, reading: Reading) -> Traffic {
    loop {
        let mut drawn = requests::traffic(entropy);
        match reading {
            // A stream that Envoy reads is no TLS.
            Reading::Http => drawn.sni = None,
            Reading::Stream => drawn.http = None,
        }
        // An answer that isn't known is Envoy's to get: each has one.
        for name in AUTHORIZERS {
            let answer = entropy.chance(50);
            drawn.answers.entry(name.to_owned()).or_insert(answer);
        }
        // The one target that is no path: `named.rs`.
        let is_asterisk = drawn.http.as_ref().is_some_and(|request| request.target == "*");
        if (reading == Reading::Http) == drawn.http.is_some() && !is_asterisk {
            return drawn;
        }
    }
}

async fn ask_all(
    node: &mut Node,
    paths: PathNormalization,
    asked: &[Question],
    random: &mut Random,
    tally: &mut Tally,
) {
    let numbered = asked.iter().enumerate();
    let cells: Vec<_> = numbered
        .map(|(number, (reading, residual))| wanted(&format!("{paths:?} {number}"), *reading, residual))
        .collect();
    node.bridge.apply(&cells);
    for (reading, residual) in asked {
        let oracle = node.oracle(&(*reading, residual.address())).await;
        for _ in 0..REQUESTS {
            let bytes = random.bytes(400);
            let mut entropy = Entropy(&bytes);
            let sources = [
                "10.244.0.3",
                "203.0.113.7",
                "192.0.2.1",
                "2001:db8::7",
                "fd00:10:244::3",
            ];
            let source: IpAddr = entropy.pick(&sources).parse().unwrap();
            let case = Case {
                residual,
                traffic: traffic(&mut entropy, *reading),
                source,
                paths,
            };
            match case.compare(&oracle).await {
                Ok(passed) => tally.streams.entry(*reading).or_default()[usize::from(passed)] += 1,
                Err(words) => tally.disagreements.push(words),
            }
            assert!(
                tally.disagreements.len() < SHOWN,
                "{}",
                tally.disagreements.join("\n")
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_answers_what_the_residual_says() {
    let Some(binary) = binary().await else { return };
    let seed = number("THYRA_L7_SEED", std::process::id().into());
    println!("seed {seed} (`THYRA_L7_SEED` repeats it)");
    let mut random = Random(seed);
    let count = usize::try_from(number("THYRA_L7_CASES", RESIDUALS)).unwrap();
    let mut tally = Tally::default();
    let [ext, web] = AUTHORIZERS;
    let (ext, web) = (Running::grpc(ext).await, Running::http(web).await);
    for paths in [
        PathNormalization::Base,
        PathNormalization::None,
        PathNormalization::MergeSlashes,
        PathNormalization::DecodeAndMergeSlashes,
    ] {
        let mut node = Node::start(&binary, paths, true).await;
        node.bridge.set_places(places([&ext, &web]));
        let mut left = count.div_ceil(4);
        while left > 0 {
            let some = questions(&mut random, paths, left.min(AT_ONCE), &mut tally);
            left -= some.len();
            ask_all(&mut node, paths, &some, &mut random, &mut tally).await;
        }
        node.supervisor.stop().await;
    }
    assert!(
        tally.disagreements.is_empty(),
        "{}",
        tally.disagreements.join("\n")
    );
    assert!(
        ext.asked().len() > 20 && web.asked().len() > 5,
        "hardly anybody is asked"
    );
    println!("{count} residuals; not expressible: {:?}", tally.inexpressible);
    for (reading, [refused, allowed]) in &tally.streams {
        let total = refused + allowed;
        println!("{reading:?}: {total} streams, {allowed} allowed, {refused} refused");
        assert!(
            allowed * 20 >= total && refused * 20 >= total,
            "{reading:?}: under 5 % of either: {allowed} allowed, {refused} refused"
        );
    }
}
