//! What a change does to listeners, filters and authorizers, by the versions of what is offered.

use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::authorizer::{
    self as asked, Authorizer, CHECK_TIMEOUT, Check, Provider, STATUS_ON_ERROR,
};
use thyra_policy_compiler::residual::{Ask, Decides, Rules};
use thyra_policy_compiler::tokens::{JwtRule, Keys};

use super::*;

fn cell(http: Answer<RuleRef>) -> Cell {
    let residual = Residual {
        http,
        other: Answer::Constant(Action::Deny, Reason::NotHttp, None),
    };
    Cell {
        name: "cell".into(),
        place: Place {
            pod: "pod".to_owned(),
            netns: "/run/netns/pod".to_owned(),
        },
        address: residual.address(),
        residual: Arc::new(residual),
    }
}

fn inline(folder: &tempfile::TempDir) -> Inline {
    let server = AdsServer::start(&folder.path().join("xds.sock"), None).expect("a socket");
    Inline::new(server, HttpOptions::default())
}

/// Each resource with its version.
fn versions(inline: &Inline) -> BTreeMap<Name, Arc<str>> {
    inline.server.read(|catalog| {
        let slots = inline.slots.iter().chain(&inline.lingering);
        let names = slots.flat_map(|slot| slot.needs().chain(&slot.listeners));
        let offered = names.filter_map(|name| Some((name.clone(), catalog.offer(name)?.version.clone())));
        offered.collect()
    })
}

#[tokio::test]
async fn other_keys_change_the_filter_for_tokens_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut inline = inline(&folder);
    let keys = Keys::Uri("https://keys.example/jwks".into());
    let rule = JwtRule {
        keys: keys.clone(),
        ..JwtRule::default()
    };
    let tokens = Tokens::of(Vec::new(), vec![rule]).expect("a rule");
    let always = Answer::Constant(Action::Allow, Reason::NoPolicy, None);
    let cells = [cell(Answer::Authenticated(
        Arc::new(tokens),
        Arc::new(always.clone()),
    ))];
    inline.apply(&cells);
    let before = versions(&inline);
    assert!(inline.set_keys(KeySets::from([(keys.clone(), "{}".into())])));
    assert!(!inline.set_keys(KeySets::from([(keys, "{}".into())])));
    inline.apply(&cells);
    let after = versions(&inline);
    let changed = after
        .iter()
        .filter(|(name, version)| before.get(*name) != Some(version));
    let changed: Vec<&str> = changed.map(|((_, name), _)| &**name).collect();
    assert_eq!(changed, ["p21001/http/tokens"]);
    assert_eq!(before.len(), after.len());
    // Where tokens are no longer asked for, or are from now on, the listener is another one.
    inline.apply(&[cell(always)]);
    assert_eq!(inline.slots[0].port, L7_FIRST_PORT + 1);
}

fn asking(name: &str) -> Answer<RuleRef> {
    let authorizer = Authorizer {
        target: asked::target("auth/ext.example", 80).expect("a service"),
        check: Check::Grpc,
        timeout: CHECK_TIMEOUT,
        fail_open: true,
        status_on_error: STATUS_ON_ERROR,
        body: None,
    };
    let rule = RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: "ask".into(),
        },
        rule: Some(0),
    };
    Answer::Rules(Arc::new(Rules {
        custom: vec![Ask {
            rule,
            conditions: Arc::default(),
            provider: Arc::new(Provider::new(name, Ok(authorizer))),
        }],
        deny: Vec::new(),
        allow: Vec::new(),
        default_deny: false,
        decides: Decides::EachRequest,
    }))
}

fn changed(before: &BTreeMap<Name, Arc<str>>, after: &BTreeMap<Name, Arc<str>>) -> Vec<Name> {
    let other = after
        .iter()
        .filter(|(name, version)| before.get(*name) != Some(version));
    other.map(|(name, _)| name.clone()).collect()
}

#[tokio::test]
async fn an_authorizer_that_moves_changes_its_addresses_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut inline = inline(&folder);
    let cells = [cell(asking("ext"))];
    inline.apply(&cells);
    let before = versions(&inline);
    let target = asked::target("auth/ext.example", 80).expect("a service");
    let at = |address: &str| Places::from([(target.clone(), vec![address.parse().expect("an address")])]);
    assert!(inline.set_places(at("10.0.0.1:80")));
    inline.apply(&cells);
    let known = versions(&inline);
    let cluster: Name = (Kind::Endpoints, "authorizer/auth/ext.example:80/grpc".into());
    let filter: Name = (Kind::Extension, "p21001/http/custom/0/authorizer".into());
    // Now that the service is known, a failure counts as the provider says.
    assert_eq!(changed(&before, &known), [cluster.clone(), filter]);
    assert!(inline.set_places(at("10.0.0.2:80")) && !inline.set_places(at("10.0.0.2:80")));
    inline.apply(&cells);
    assert_eq!(changed(&known, &versions(&inline)), [cluster]);
}

#[tokio::test]
async fn who_is_asked_by_somebody_else_gets_another_listener_and_authorizers_go_with_the_last_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut inline = inline(&folder);
    let port = |inline: &Inline| inline.slots[0].port;
    let named = |inline: &Inline, prefix: &str| {
        inline.server.read(|catalog| {
            let offered = catalog.offered(Kind::Cluster);
            offered.filter(|(name, _)| name.starts_with(prefix)).count()
        })
    };
    let clusters = |inline: &Inline| named(inline, "authorizer/");
    inline.apply(&[cell(Answer::Constant(Action::Allow, Reason::NoPolicy, None))]);
    for (step, name) in (1..).zip(["ext", "other"]) {
        inline.apply(&[cell(asking(name))]);
        assert_eq!(
            (port(&inline), clusters(&inline)),
            (L7_FIRST_PORT + step, 1),
            "{name}"
        );
        inline.retire();
        assert_eq!(clusters(&inline), 1, "{name}");
    }
    inline.apply(&[cell(Answer::Constant(Action::Allow, Reason::NoPolicy, None))]);
    assert_eq!(clusters(&inline), 1, "the tables still name it");
    inline.retire();
    assert_eq!(clusters(&inline), 0);
    assert_eq!(named(&inline, "pod@"), 1);
    inline.apply(&[]);
    assert_eq!(named(&inline, "pod@"), 1, "the tables still lead there");
    inline.retire();
    assert_eq!(named(&inline, "pod@"), 0);
}

#[tokio::test]
async fn the_next_bridge_keeps_ports_and_sends_nothing_before_it_knows_what_is_wanted() {
    let (allow, deny) = (Action::Allow, Action::Deny);
    let one = cell(Answer::Constant(allow, Reason::NoPolicy, None));
    let two = cell(Answer::Constant(deny, Reason::NoPolicy, None));
    let other = Cell {
        name: "other".into(),
        ..one.clone()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("ports.json");
    let mut before = inline(&folder);
    before.store_in(file.clone());
    before.apply(std::slice::from_ref(&one));
    let port = before.slots[0].port;
    drop(before);

    let mut next = inline(&folder);
    next.take_over(Kept::load(&file).expect("whole").expect("stored"));
    assert!(next.server.is_held());
    // The cell has another residual now, and the residual another cell.
    next.apply(&[two.clone(), other]);
    assert!(!next.server.is_held());
    let port_of = |address: &Arc<str>| next.slots.iter().find(|s| s.residual == *address).map(|s| s.port);
    assert_eq!(
        port_of(&one.address),
        Some(port),
        "what it judges it goes on to judge"
    );
    assert!(port_of(&two.address).is_some_and(|other| other > port));

    for wrong in ["{", r#"{"slots":[],"next":65535}"#] {
        std::fs::write(&file, wrong).expect("written");
        assert!(Kept::load(&file).is_err(), "{wrong}");
    }
    std::fs::remove_file(&file).expect("it was there");
    assert!(Kept::load(&file).expect("no fault").is_none());
}
