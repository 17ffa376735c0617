//! Ids keep their meaning while anything may refer to them.

use super::*;

fn verdict(name: &str) -> Verdict {
    let rule = |rule| RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        },
        rule,
    };
    Verdict {
        action: Action::Deny,
        reason: Reason::NeedsL7,
        rule: Some(rule(Some(2))),
        because: vec![(rule(None), "paths".into())],
        residual: Some("00ff".into()),
        would: Some(Would {
            action: Action::Allow,
            reason: Reason::NoPolicy,
            rule: None,
        }),
    }
}

fn names(dir: &Path) -> VerdictNames {
    VerdictNames::read(dir, "here".into(), BTreeSet::new(), &mut Vec::new()).unwrap()
}

fn commit(names: &mut VerdictNames, verdicts: &[Verdict]) -> Vec<u16> {
    let assignment = names.assign(verdicts).unwrap();
    names.save(&assignment).unwrap();
    let ids = assignment.ids.clone();
    names.accept(assignment);
    ids
}

#[test]
fn a_verdict_keeps_its_id_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = names(dir.path());
    let first = commit(&mut names, &[verdict("a"), verdict("b")]);
    commit(&mut names, &[verdict("c")]);
    assert_eq!(
        commit(&mut names, &[verdict("b"), verdict("a")]),
        [first[1], first[0]]
    );
}

#[test]
fn names_survive_a_restart_whole() {
    let dir = tempfile::tempdir().unwrap();
    let ids = commit(&mut names(dir.path()), &[verdict("a")]);
    assert_eq!(names(dir.path()).get(ids[0]), Some(&verdict("a")));
}

#[test]
fn names_of_other_maps_mean_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ids = commit(&mut names(dir.path()), &[verdict("a")]);
    let elsewhere =
        VerdictNames::read(dir.path(), "elsewhere".into(), BTreeSet::new(), &mut Vec::new()).unwrap();
    assert_eq!(elsewhere.get(ids[0]), None);
}

#[test]
fn a_live_id_without_a_name_is_not_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = VerdictNames::read(dir.path(), "here".into(), [1, 2].into(), &mut Vec::new()).unwrap();
    assert_eq!(commit(&mut names, &[verdict("a")]), [3]);
    assert_eq!(names.get(1), None);
}

#[test]
fn an_id_gets_another_meaning_only_when_neither_bank_refers_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = names(dir.path());
    let old = commit(&mut names, &[verdict("old")])[0];
    let full: Vec<_> = (0..MAX_VERDICTS - 2).map(|n| verdict(&n.to_string())).collect();
    let ids = commit(&mut names, &full);
    assert!(!ids.contains(&old), "live while they were assigned");
    let assignment = names.assign(&[verdict("new"), verdict("new")]).unwrap();
    assert_eq!(assignment.ids, [old, old], "all others are live");
    assert_eq!(assignment.fresh, [(old, verdict("new"))].into());
    names.accept(assignment);
    assert_eq!(names.get(old), Some(&verdict("new")));
    assert!(!commit(&mut names, &[verdict("old")]).contains(&old));
}

#[test]
fn names_that_nobody_uses_are_forgotten_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = names(dir.path());
    let first = commit(&mut names, &[verdict("first")])[0];
    let many: Vec<_> = (0..MAX_REMEMBERED).map(|n| verdict(&n.to_string())).collect();
    commit(&mut names, &many);
    let last = commit(&mut names, &[verdict("last")])[0];
    assert_eq!(names.get(first), None);
    assert_eq!(names.get(last), Some(&verdict("last")));
    assert_eq!(names.known().count(), MAX_REMEMBERED + 1);
}

#[test]
fn more_verdicts_than_ids_are_refused_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = names(dir.path());
    commit(&mut names, &[verdict("live")]);
    let many: Vec<_> = (0..MAX_VERDICTS - 1).map(|n| verdict(&n.to_string())).collect();
    let refused = names.assign(&many).unwrap_err();
    assert_eq!(
        refused,
        VerdictsFull {
            needed: MAX_VERDICTS - 1,
            free: MAX_VERDICTS - 2
        }
    );
}
