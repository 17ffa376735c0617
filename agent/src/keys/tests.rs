//! Key sets from a server in the same process.

use std::collections::VecDeque;
use std::net::SocketAddr;

use thyra_policy_compiler::tokens::JwtRule;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::reach::Reach;

const ONE: &str = r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#;
const TWO: &str = r#"{"keys":[{"kty":"oct","k":"BBBB"}]}"#;
/// More than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

/// Answers with these, one after the other, and then with the last one.
async fn serve(answers: Vec<(u16, String)>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut answers: VecDeque<_> = answers.into();
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                return;
            };
            let mut request = [0; 4096];
            let _length = stream.read(&mut request).await;
            let (status, body) = if answers.len() > 1 {
                answers.pop_front().expect("one")
            } else {
                answers[0].clone()
            };
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nlocation: /\r\n\r\n",
                body.len()
            );
            let _sent = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    address
}

fn keyring(reach: Reach) -> Keyring {
    stored_keyring(reach, None)
}

fn stored_keyring(reach: Reach, state: Option<&Path>) -> Keyring {
    drop(rustls::crypto::ring::default_provider().install_default());
    Keyring::new(Client::new(reach), Handle::current(), state)
}

fn tokens(keys: Keys) -> Tokens {
    let rule = JwtRule {
        keys,
        timeout: Duration::from_secs(2),
        ..JwtRule::default()
    };
    Tokens {
        policies: Vec::new(),
        rules: vec![rule],
    }
}

fn at(address: SocketAddr) -> Keys {
    Keys::Uri(format!("http://{address}/jwks").into())
}

async fn until(keyring: &Keyring, done: impl Fn(&Keyring) -> bool) {
    let mut changes = keyring.changes();
    let wait = async {
        while !done(keyring) {
            changes.changed().await.expect("it lives");
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("it comes");
}

fn set(keyring: &Keyring, keys: &Keys) -> Option<String> {
    keyring.sets().get(keys).map(ToString::to_string)
}

#[tokio::test]
async fn a_set_comes_after_failures_and_each_has_a_name() {
    let broken = "no JSON, and secret".to_owned();
    let address = serve(vec![(500, "secret".into()), (200, broken), (200, ONE.into())]).await;
    let (mut keyring, keys) = (keyring(Reach::Anywhere), at(address));
    keyring.want([tokens(keys.clone())].iter());
    until(&keyring, |k| k.failures().concat().contains("status 500")).await;
    until(&keyring, |k| k.failures().concat().contains("no JSON")).await;
    let told = keyring.failures().concat();
    assert!(
        told.contains("tokens that need it are refused") && !told.contains("secret"),
        "{told}"
    );
    until(&keyring, |k| set(k, &keys).as_deref() == Some(ONE)).await;
    assert_eq!(keyring.failures(), Vec::<String>::new());
    // Wanted no more: forgotten.
    keyring.want([].iter());
    assert_eq!(set(&keyring, &keys), None);
}

#[tokio::test]
async fn a_good_set_stays_until_another_good_one_comes() {
    let keys = Keys::Uri("http://keys.example/jwks".into());
    let shared = Shared {
        known: Mutex::default(),
        changes: watch::Sender::new(0),
        store: None,
    };
    shared.fetched(&keys, ONE.into());
    shared.failed(&keys, &KeyError::Slow(LIMIT));
    let mut keyring = keyring(Reach::Others);
    keyring.shared = Arc::new(shared);
    assert_eq!(set(&keyring, &keys).as_deref(), Some(ONE));
    let told = keyring.failures().concat();
    assert!(told.contains("the last good set stays"), "{told}");
    let before = *keyring.changes().borrow();
    keyring.shared.failed(&keys, &KeyError::Slow(LIMIT));
    assert_eq!(
        *keyring.changes().borrow(),
        before,
        "the same failure again is no news"
    );
    keyring.shared.fetched(&keys, TWO.into());
    assert_eq!(set(&keyring, &keys).as_deref(), Some(TWO));
    assert_eq!(keyring.failures(), Vec::<String>::new());
}

#[tokio::test]
async fn a_set_is_fetched_again() {
    let address = serve(vec![(200, ONE.into()), (200, TWO.into())]).await;
    let (mut keyring, keys) = (keyring(Reach::Anywhere), at(address));
    keyring.refresh = Duration::from_millis(300);
    keyring.want([tokens(keys.clone())].iter());
    until(&keyring, |k| set(k, &keys).as_deref() == Some(ONE)).await;
    until(&keyring, |k| set(k, &keys).as_deref() == Some(TWO)).await;
}

#[tokio::test]
async fn an_issuers_configuration_leads_to_its_set() {
    let sets = serve(vec![(200, ONE.into())]).await;
    let told = format!(r#"{{"jwks_uri":"http://{sets}/keys"}}"#);
    let issuer = serve(vec![(200, "{}".into()), (200, told)]).await;
    let (mut keyring, keys) = (
        keyring(Reach::Anywhere),
        Keys::Discovery(format!("http://{issuer}/").into()),
    );
    keyring.want([tokens(keys.clone())].iter());
    until(&keyring, |k| k.failures().concat().contains("no `jwks_uri`")).await;
    until(&keyring, |k| set(k, &keys).as_deref() == Some(ONE)).await;
}

#[tokio::test]
async fn what_must_not_be_asked_or_followed_is_named() {
    let address = serve(vec![(302, String::new())]).await;
    let large = serve(vec![(200, "x".repeat(300 * 1024))]).await;
    for (reach, uri, why) in [
        (Reach::Others, format!("http://{address}/"), "is not dialled"),
        (
            Reach::Others,
            format!("http://localhost:{}/", address.port()),
            "is not dialled",
        ),
        (Reach::Others, "http://[::1]:1/".to_owned(), "is not dialled"),
        (Reach::Anywhere, format!("http://{address}/"), "status 302"),
        (Reach::Anywhere, format!("http://{large}/"), "larger than"),
        (
            Reach::Anywhere,
            format!("http://user:word@{address}/"),
            "without a user",
        ),
        (
            Reach::Anywhere,
            "http://127.0.0.1:1/".to_owned(),
            "can't be asked",
        ),
    ] {
        let mut keyring = keyring(reach);
        keyring.want([tokens(Keys::Uri(uri.as_str().into()))].iter());
        until(&keyring, |k| !k.failures().is_empty()).await;
        let told = keyring.failures().concat();
        assert!(told.contains(why), "{uri}: {told}");
        assert_eq!(keyring.sets().len(), 0);
    }
}

/// A server that answered once and then no more, and the state folder of the agent that asked it.
async fn fetched_once() -> (tempfile::TempDir, Keys) {
    let state = tempfile::tempdir().expect("a folder");
    let address = serve(vec![(200, ONE.into()), (500, String::new())]).await;
    let keys = at(address);
    let mut keyring = stored_keyring(Reach::Anywhere, Some(state.path()));
    keyring.want([tokens(keys.clone())].iter());
    until(&keyring, |k| set(k, &keys).as_deref() == Some(ONE)).await;
    (state, keys)
}

#[tokio::test]
async fn a_fetched_set_is_there_at_once_after_a_restart_though_nobody_answers() {
    use std::os::unix::fs::PermissionsExt as _;

    let (state, keys) = fetched_once().await;
    let file = Store::open(state.path()).expect("a store").file(&keys);
    let mode = std::fs::metadata(&file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut next = stored_keyring(Reach::Anywhere, Some(state.path()));
    next.want([tokens(keys.clone())].iter());
    assert_eq!(
        set(&next, &keys).as_deref(),
        Some(ONE),
        "before anything was fetched"
    );
    until(&next, |k| {
        k.failures().concat().contains("the last good set stays")
    })
    .await;
    assert_eq!(set(&next, &keys).as_deref(), Some(ONE));
    // Wanted no more: nothing stays.
    next.want([].iter());
    assert!(!file.exists());
}

#[tokio::test]
async fn a_stored_set_that_is_broken_old_or_anothers_is_not_used() {
    let (state, keys) = fetched_once().await;
    let file = Store::open(state.path()).expect("a store").file(&keys);
    let good: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("JSON");
    let with = |name: &str, value: serde_json::Value| {
        let mut changed = good.clone();
        changed[name] = value;
        changed.to_string()
    };
    let fetched = good["fetched"].as_u64().expect("a time");
    let used = |text: String| {
        std::fs::write(&file, text).expect("written");
        Store::open(state.path()).expect("a store").load(&keys).is_some()
    };
    assert!(used(good.to_string()));
    assert!(used(with("fetched", (fetched - 86_000).into())));
    for text in [
        "{".to_owned(),
        String::new(),
        with("set", "no keys".into()),
        with("of", "the key set at `http://other/`".into()),
        with("fetched", (fetched - 90_000).into()),
        with("fetched", (fetched + 90_000).into()),
    ] {
        assert!(!used(text.clone()), "{text}");
    }
}

#[tokio::test]
async fn a_stored_set_is_used_no_more_once_it_is_too_old() {
    let (state, keys) = fetched_once().await;
    let file = Store::open(state.path()).expect("a store").file(&keys);
    let mut stored: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("JSON");
    let fetched = stored["fetched"].as_u64().expect("a time");
    // Some seconds are left.
    stored["fetched"] = (fetched - stored::MAX_AGE.as_secs() + 3).into();
    std::fs::write(&file, stored.to_string()).expect("written");
    let mut next = stored_keyring(Reach::Anywhere, Some(state.path()));
    next.want([tokens(keys.clone())].iter());
    assert_eq!(set(&next, &keys).as_deref(), Some(ONE));
    until(&next, |k| set(k, &keys).is_none()).await;
    let told = next.failures().concat();
    assert!(told.contains("tokens that need it are refused"), "{told}");
}
