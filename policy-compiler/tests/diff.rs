//! What a change changes, against the matrices of both sides (which are checked against the oracle).

use std::collections::BTreeMap;
use std::path::Path;

use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::Tables;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::diff::{Change, Diff, Side, diff};
use thyra_policy_compiler::manifest::{self, Body, Manifests};
use thyra_policy_compiler::matrix::{Fate, matrix};
use thyra_policy_compiler::world::{NodeOptions, World};

fn scenario(name: &str) -> Manifests {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab");
    manifest::read_dir(&lab.join(name).join("manifests")).unwrap()
}

fn compiled(manifests: &Manifests) -> (World, Tables) {
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let world = manifest::world(manifests, options).unwrap();
    let tables = Compiler::new().compile(&world).unwrap();
    (world, tables)
}

fn changes(before: &Manifests, after: &Manifests) -> Diff {
    let (before, after) = (compiled(before), compiled(after));
    let side = |(world, tables): &'static (World, Tables)| Side { world, tables };
    let leak = |side: (World, Tables)| &*Box::leak(Box::new(side));
    diff(side(leak(before)), side(leak(after)), |_, _| {})
}

/// Source, endpoint, family.
type Pair = (String, String, u8);

/// What happens on each port, read off the matrix.
fn fates(manifests: &Manifests) -> BTreeMap<Pair, Vec<Fate>> {
    let (world, tables) = compiled(manifests);
    let matrix = matrix(&world, &tables, false);
    let mut fates = BTreeMap::new();
    for (from, line) in matrix.sources.iter().zip(&matrix.cells) {
        for (to, cell) in matrix.endpoints.iter().zip(line) {
            for family in [4, 6] {
                let source = match from.namespace.as_str() {
                    "" => from.members[0].clone(),
                    namespace => format!("{namespace}/{}", from.members[0]),
                };
                // A block is of one family.
                if from.namespace.is_empty() && source.contains('/') && source.contains(':') != (family == 6)
                {
                    continue;
                }
                let mut ports = vec![Fate::Deny; 65_536];
                let mut known = false;
                for part in cell
                    .iter()
                    .filter(|part| part.family == 0 || part.family == family)
                {
                    for (first, last) in &part.runs {
                        ports[usize::from(*first)..=usize::from(*last)].fill(part.fate);
                        known = true;
                    }
                }
                if known {
                    fates.insert(
                        (source, format!("{}/{}", to.namespace, to.members[0]), family),
                        ports,
                    );
                }
            }
        }
    }
    fates
}

/// The same as the diff tells it: the fates before, turned where a change says so.
fn turned(mut fates: BTreeMap<Pair, Vec<Fate>>, diff: &Diff) -> BTreeMap<Pair, Vec<Fate>> {
    for change in &diff.changes {
        for source in &change.sources {
            for family in [4, 6]
                .into_iter()
                .filter(|f| change.family == 0 || change.family == *f)
            {
                let pair = (source.clone(), change.endpoint.clone(), family);
                let Some(ports) = fates.get_mut(&pair) else {
                    continue;
                };
                for (first, last) in &change.runs {
                    for port in &mut ports[usize::from(*first)..=usize::from(*last)] {
                        assert_eq!(*port, change.before, "{change:?}");
                        *port = change.after;
                    }
                }
            }
        }
    }
    fates
}

#[test]
fn every_turn_is_told_and_nothing_else() {
    let scenarios = ["quickstart", "conditions", "s05-strict-ports"];
    let mut turns = 0;
    for name in scenarios {
        let whole = scenario(name);
        let is_policy =
            |body: &Body| matches!(body, Body::AuthorizationPolicy(_) | Body::PeerAuthentication(_));
        for gone in whole.objects.iter().filter(|object| is_policy(&object.body)) {
            let mut without = whole.clone();
            without.objects.retain(|object| object.key() != gone.key());
            for (before, after) in [(&whole, &without), (&without, &whole)] {
                let diff = changes(before, after);
                let told = turned(fates(before), &diff);
                for (pair, ports) in fates(after) {
                    if let Some(told) = told.get(&pair) {
                        assert!(*told == ports, "{name} without {}: {pair:?}", gone.name);
                    }
                }
                turns += diff.changes.len();
            }
        }
    }
    assert!(turns > 30, "only {turns} changes");
}

#[test]
fn the_same_files_differ_in_nothing() {
    let whole = scenario("quickstart");
    assert_eq!(changes(&whole, &whole), Diff::default());
}

#[test]
fn a_pod_that_comes_is_named_and_not_compared() {
    let whole = scenario("quickstart");
    let mut without = whole.clone();
    without
        .objects
        .retain(|object| !(object.kind == "Pod" && object.name == "cart"));
    let diff = changes(&without, &whole);
    assert_eq!((diff.added, diff.removed), (vec!["shop/cart".to_owned()], vec![]));
    assert!(diff.changes.iter().all(|change| change.endpoint != "shop/cart"));
}

/// The quickstart with one policy more.
fn with_policy(spec: &str) -> Manifests {
    let mut all = scenario("quickstart");
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
         spec: {spec}\n"
    );
    all.apply(manifest::read_str("p.yaml", &text).unwrap());
    all
}

#[test]
fn other_conditions_on_a_request_are_a_change() {
    let front = "selector: {matchLabels: {app: front}}";
    let path = |path: &str| {
        with_policy(&format!(
            "{{{front}, rules: [{{to: [{{operation: {{paths: [{path}]}}}}]}}]}}"
        ))
    };
    let diff = changes(&path("/a"), &path("/b"));
    assert!(!diff.changes.is_empty());
    let l7 = |change: &Change| (change.before, change.after) == (Fate::NeedsL7, Fate::NeedsL7);
    assert!(diff.changes.iter().all(l7), "{diff:#?}");
    assert_eq!(changes(&path("/a"), &path("/a")), Diff::default());
}

#[test]
fn a_block_is_not_hidden_by_one_inside_it_that_begins_alike() {
    let deny = |source: &str| {
        with_policy(&format!(
            "{{action: DENY, rules: [{{from: [{{source: {{{source}}}}}]}}]}}"
        ))
    };
    let before = deny("ipBlocks: [198.18.0.0/24], notIpBlocks: [198.18.0.0/24]");
    let after = deny("ipBlocks: [198.18.0.0/15], notIpBlocks: [198.18.0.0/24]");
    let diff = changes(&before, &after);
    let lost =
        |change: &&Change| change.after == Fate::Deny && change.sources.contains(&"198.18.0.0/15".to_owned());
    assert!(diff.changes.iter().any(|change| lost(&change)), "{diff:#?}");
    assert!(
        !diff
            .changes
            .iter()
            .any(|change| change.sources.contains(&"198.18.0.0/24".to_owned())),
        "{diff:#?}"
    );
}
