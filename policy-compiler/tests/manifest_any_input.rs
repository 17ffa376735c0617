//! Any text, valid or not, ends in objects or errors: the reader never panics and names a place in the file.

use proptest::prelude::*;
use thyra_policy_compiler::manifest;

const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  selector: {matchLabels: {app: a}}
  action: DENY
  rules:
  - from:
    - source: {principals: ['*'], ipBlocks: [10.0.0.0/8]}
    to:
    - operation: {ports: ['80']}
    when:
    - key: source.ip
      values: [1.2.3.4]
";

/// Pieces that mean something to YAML or to the reader.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("---\n"),
        Just("...\n"),
        Just("- "),
        Just("? "),
        Just(": "),
        Just("\n"),
        Just("  "),
        Just("\t"),
        Just("&a "),
        Just("*a"),
        Just("<<: "),
        Just("!!str "),
        Just("! "),
        Just("|\n"),
        Just(">-\n"),
        Just("'"),
        Just("\""),
        Just("["),
        Just("]"),
        Just("{"),
        Just("}"),
        Just(","),
        Just("#"),
        Just("%YAML 1.2\n"),
        Just("apiVersion: v1\n"),
        Just("kind: Pod\n"),
        Just("spec: "),
        Just("rules: "),
        Just("on"),
        Just("0x_"),
        Just("1e999"),
        Just("-.inf"),
        Just("\u{feff}"),
        Just("\u{85}"),
        Just("\u{2028}"),
        Just("é"),
        Just("\\u"),
        Just("\\x0"),
        Just("9999999999999999999"),
    ]
    .prop_map(str::to_owned)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn pieces_of_yaml_never_panic(pieces in prop::collection::vec(piece(), 0..40)) {
        let text = pieces.concat();
        prop_assert!(manifest::read_str("f", &text).map_or(true, |read| read.objects.is_empty()));
    }

    #[test]
    fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(manifest::read_bytes("f", &bytes).map_or(true, |read| read.objects.is_empty()));
    }

    #[test]
    fn a_damaged_policy_never_panics(at in 0..POLICY.len(), cut in 0..20usize, with in piece()) {
        let end = (at + cut).min(POLICY.len());
        let text = format!("{}{with}{}", &POLICY[..at], &POLICY[end..]);
        if let Err(errors) = manifest::read_str("f", &text) {
            for error in errors {
                prop_assert!(error.at.position.line > 0, "{error}");
            }
        }
    }
}
