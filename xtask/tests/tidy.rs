//! The rules of the tree as tests, so that plain `cargo test` enforces them.

use xtask::{
    tidy::{self, RULES},
    tree::Tree,
};

/// Runs the rule with this claim and shows every finding.
fn holds(claim: &str) {
    let tree = Tree::find().expect("the tree is there");
    let sources = tidy::sources(&tree).expect("the tree is readable");
    let (_, rule) = RULES
        .iter()
        .find(|(name, _)| *name == claim)
        .expect("the rule exists");
    let findings = rule(&tree, &sources).expect("the rule can be judged");
    let shown: Vec<_> = findings.iter().map(ToString::to_string).collect();
    assert!(
        shown.is_empty(),
        "{} findings:\n{}\n",
        shown.len(),
        shown.join("\n")
    );
}

#[test]
fn arrows_between_crates_only_point_down() {
    holds("arrows between crates only point down");
}

#[test]
fn every_manifest_inherits_the_lints_and_names_its_licence() {
    holds("every manifest inherits the lints and names its licence");
}

#[test]
fn every_dependencys_licence_is_allowed() {
    holds("every dependency's licence is allowed");
}

#[test]
fn source_files_keep_the_house_style() {
    holds("source files keep the house style");
}

#[test]
fn no_source_file_is_dead() {
    holds("no source file is dead");
}

#[test]
fn documents_name_only_what_exists() {
    holds("documents name only what exists");
}

#[test]
fn no_rule_is_left_out_here() {
    assert_eq!(RULES.len(), 6);
}
