//! What RequestAuthentications ask of the tokens of a request: the rules that apply to one pod, together.
//!
//! Invariant: a rule that can't be read whole or whose keys are no keys stays a rule, with no key: a token of that
//! issuer is refused, never taken unseen and never passed by. How Istio joins the rules of several objects:
//! `pilot/pkg/security/authn/policy_applier.go` (`newPolicyApplier`, `convertToEnvoyJwtConfig`).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};

use crate::traffic::Traffic;

/// The field that makes a verdict wait for tokens.
pub const JWT_RULES: &str = "jwtRules";
/// What a key server may take where a rule doesn't say (`policy_applier.go`).
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest that a rule may give it.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(60);
/// Claims that are lists with spaces between their values, in every token (`buildSpaceDelimitedClaims`).
pub const LISTS: [&str; 2] = ["permission", "scope"];

/// Where the keys of an issuer are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Keys {
    /// Here: a JSON Web Key Set (RFC 7517, 5) as text.
    Inline(Arc<str>),
    /// At this URI.
    Uri(Arc<str>),
    /// Where the issuer's OpenID configuration says, below this URI.
    Discovery(Arc<str>),
    /// Nowhere, and why: every token of the rule is refused.
    None(Arc<str>),
}

impl Keys {
    /// As istiod takes them: inline ones before a URI, a URI before the issuer's OpenID configuration.
    #[must_use]
    pub fn of(inline: &str, uri: &str, issuer: &str) -> Self {
        let is_http = |text: &str| {
            let scheme = text.split_once("://").map_or("", |(scheme, _)| scheme);
            scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("http")
        };
        if !inline.is_empty() {
            Self::Inline(inline.into())
        } else if is_http(uri) {
            Self::Uri(uri.into())
        } else if !uri.is_empty() {
            Self::None("its `jwksUri` is neither http nor https".into())
        } else if is_http(issuer) {
            Self::Discovery(issuer.into())
        } else {
            Self::None("it has neither keys nor a URI to fetch them from".into())
        }
    }
}

/// A header that may carry a token.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenHeader {
    /// Its name.
    pub name: String,
    /// What stands before the token, such as `Bearer `.
    pub prefix: String,
}

/// A claim that the pod gets as a header.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimHeader {
    /// The header.
    pub header: String,
    /// The claim; a dot leads into a nested one.
    pub claim: String,
}

/// One of `jwtRules`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JwtRule {
    /// Claim `iss`; empty: any.
    pub issuer: String,
    /// One of them must be in claim `aud`; empty: no constraint.
    pub audiences: Vec<String>,
    /// What signatures are checked with.
    pub keys: Keys,
    /// Where a token may be; without any place the header `authorization` and the parameter `access_token`.
    pub from_headers: Vec<TokenHeader>,
    /// Names of query parameters.
    pub from_params: Vec<String>,
    /// Names of cookies.
    pub from_cookies: Vec<String>,
    /// The header that takes the payload, in base64url; empty: none.
    pub payload_header: String,
    /// Claims for the pod.
    pub claim_headers: Vec<ClaimHeader>,
    /// The pod gets the token.
    pub forward: bool,
    /// What the key server may take.
    pub timeout: Duration,
    /// Claims that are lists with spaces between their values, beside `LISTS`.
    pub lists: BTreeSet<String>,
}

impl Default for JwtRule {
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audiences: Vec::new(),
            keys: Keys::None("none is named".into()),
            from_headers: Vec::new(),
            from_params: Vec::new(),
            from_cookies: Vec::new(),
            payload_header: String::new(),
            claim_headers: Vec::new(),
            forward: false,
            timeout: FETCH_TIMEOUT,
            lists: BTreeSet::new(),
        }
    }
}

/// Every rule that applies to a pod: a token is taken if one of them takes it, no token is fine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tokens {
    /// The RequestAuthentications, root namespace first, then by name.
    pub policies: Vec<PolicyRef>,
    /// Their rules, by issuer; several of one issuer stand beside each other.
    pub rules: Vec<JwtRule>,
}

impl JwtRule {
    /// Takes no token of any issuer: what is left of an object that can't be read.
    #[must_use]
    pub fn refusing(why: impl Into<Arc<str>>) -> Self {
        Self {
            keys: Keys::None(why.into()),
            ..Self::default()
        }
    }

    /// As it counts: without keys where something in it can't be carried out.
    #[must_use]
    pub fn checked(mut self) -> Self {
        if let Err(why) = self.check() {
            self.keys = Keys::None(why.into());
        }
        self
    }

    fn check(&self) -> Result<(), String> {
        let headers = self
            .from_headers
            .iter()
            .map(|header| &header.name)
            .chain(Some(&self.payload_header).filter(|name| !name.is_empty()))
            .chain(self.claim_headers.iter().map(|claim| &claim.header));
        for name in headers {
            if !is_header_name(name) {
                return Err(format!("`{name}` is no header's name"));
            }
        }
        let mut texts = self
            .audiences
            .iter()
            .chain(&self.from_params)
            .chain(&self.from_cookies)
            .chain(self.claim_headers.iter().map(|claim| &claim.claim));
        if texts.any(String::is_empty) {
            return Err("an audience, parameter, cookie or claim has no name".to_owned());
        }
        match &self.keys {
            Keys::Inline(text) => key_set(text),
            Keys::Uri(_) | Keys::Discovery(_) | Keys::None(_) => Ok(()),
        }
    }
}

/// Whether `text` is a key set: an object with a list `keys` of at least one object that has a `kty` (RFC 7517, 4.1 and
/// 5). What the keys hold is Envoy's to read; one that it can't read checks no token.
///
/// # Errors
/// What is wrong with it, without any of its text.
pub fn key_set(text: &str) -> Result<(), String> {
    let set: Value = serde_json::from_str(text).map_err(|_| "the key set is no JSON".to_owned())?;
    let keys = set.get("keys").and_then(Value::as_array);
    let keys = keys.ok_or_else(|| "the key set has no list `keys`".to_owned())?;
    if keys.is_empty() {
        return Err("the key set is empty".to_owned());
    }
    if !keys
        .iter()
        .all(|key| key.get("kty").is_some_and(Value::is_string))
    {
        return Err("a key of the set has no `kty`".to_owned());
    }
    Ok(())
}

/// A span of time as Go writes it: `5s`, `1m30s`, `0.5s`; at most `MAX_TIMEOUT` of it counts.
///
/// # Errors
/// It isn't one, or none at all.
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 7] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("h", 3600.0),
        ("m", 60.0),
        ("s", 1.0),
    ];
    let wrong = || format!("`{text}` is no duration; write `5s`");
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, tail) = rest.split_at(end.ok_or_else(wrong)?);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let unit = UNITS.iter().find(|(name, _)| tail.starts_with(name));
        let (name, factor) = unit.ok_or_else(wrong)?;
        seconds += number * factor;
        rest = &tail[name.len()..];
    }
    if seconds <= 0.0 {
        return Err(wrong());
    }
    Ok(Duration::try_from_secs_f64(seconds).map_or(MAX_TIMEOUT, |given| given.min(MAX_TIMEOUT)))
}

/// RFC 9110, 5.1: a token.
fn is_header_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(fits)
}

impl Tokens {
    /// The rules in the order that they have for Envoy; none without any.
    #[must_use]
    pub fn of(policies: Vec<PolicyRef>, mut rules: Vec<JwtRule>) -> Option<Self> {
        // Stable: those of one issuer stay in the order of their objects.
        rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
        (!rules.is_empty()).then_some(Self { policies, rules })
    }

    /// Why a verdict waits for them.
    pub fn because(&self) -> impl Iterator<Item = (RuleRef, Arc<str>)> {
        self.policies.iter().map(|policy| {
            let rule = RuleRef {
                policy: policy.clone(),
                rule: None,
            };
            (rule, JWT_RULES.into())
        })
    }

    /// Issuers that stand in several rules.
    #[must_use]
    pub fn repeated_issuers(&self) -> BTreeSet<&str> {
        let pairs = self.rules.iter().zip(self.rules.iter().skip(1));
        let same = pairs.filter(|(a, b)| a.issuer == b.issuer);
        same.map(|(a, _)| a.issuer.as_str()).collect()
    }

    /// The traffic with its claims as conditions see them (`seen`).
    #[must_use]
    pub fn seen_in<'a>(&self, traffic: &'a Traffic) -> Cow<'a, Traffic> {
        let Some(claims) = traffic.http.as_ref().and_then(|request| request.claims.as_ref()) else {
            return Cow::Borrowed(traffic);
        };
        let mut seen = traffic.clone();
        if let Some(request) = &mut seen.http {
            request.claims = Some(self.seen(claims));
        }
        Cow::Owned(seen)
    }

    /// The claims as conditions see them: those that a rule of their issuer names as lists are lists.
    #[must_use]
    pub fn seen(&self, claims: &Map<String, Value>) -> Map<String, Value> {
        let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or_default();
        let rules = self.rules.iter();
        let own = rules.filter(|rule| rule.issuer.is_empty() || rule.issuer == issuer);
        let mut seen = claims.clone();
        for name in own.flat_map(|rule| &rule.lists) {
            if let Some(Value::String(text)) = seen.get(name) {
                let parts = text.split(' ').filter(|part| !part.is_empty());
                let list = parts.map(|part| Value::String(part.to_owned())).collect();
                seen.insert(name.clone(), Value::Array(list));
            }
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &str = r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#;

    fn rule(issuer: &str) -> JwtRule {
        JwtRule {
            issuer: issuer.to_owned(),
            keys: Keys::Inline(KEYS.into()),
            ..JwtRule::default()
        }
    }

    #[test]
    fn what_is_no_key_set_is_told_by_its_cause_and_never_by_its_text() {
        assert_eq!(key_set(KEYS), Ok(()));
        for (text, why) in [
            ("secret", "no JSON"),
            ("[]", "no list `keys`"),
            (r#"{"keys":"secret"}"#, "no list `keys`"),
            (r#"{"keys":[]}"#, "empty"),
            (r#"{"keys":[{"n":"secret"}]}"#, "no `kty`"),
            (r#"{"keys":["secret"]}"#, "no `kty`"),
        ] {
            let told = key_set(text).expect_err(text);
            assert!(told.contains(why) && !told.contains("secret"), "{text}: {told}");
        }
    }

    #[test]
    fn a_duration_is_read_as_go_writes_it() {
        for (text, millis) in [("5s", 5000), ("1m0.5s", 60_000), ("250ms", 250), ("9h", 60_000)] {
            assert_eq!(duration(text).map(|d| d.as_millis()), Ok(millis), "{text}");
        }
        for text in ["", "5", "s", "-5s", "5s5", "0s", "1.2.3s", "five"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rule_that_cant_be_carried_out_stays_without_keys() {
        let named = |name: &str| TokenHeader {
            name: name.to_owned(),
            prefix: String::new(),
        };
        assert_eq!(rule("i").checked(), rule("i"));
        let broken = [
            JwtRule {
                keys: Keys::Inline("{".into()),
                ..rule("i")
            },
            JwtRule {
                from_headers: vec![named("x y")],
                ..rule("i")
            },
            JwtRule {
                payload_header: "x\n".to_owned(),
                ..rule("i")
            },
            JwtRule {
                audiences: vec![String::new()],
                ..rule("i")
            },
        ];
        for rule in broken {
            let checked = rule.clone().checked();
            assert!(matches!(checked.keys, Keys::None(_)), "{rule:?}");
            assert_eq!(checked.issuer, "i");
        }
    }

    #[test]
    fn rules_stand_by_issuer_and_two_of_one_are_told() {
        let tokens = Tokens::of(Vec::new(), vec![rule("b"), rule("a"), rule("b")]).expect("rules");
        let issuers: Vec<&str> = tokens.rules.iter().map(|rule| rule.issuer.as_str()).collect();
        assert_eq!(issuers, ["a", "b", "b"]);
        assert_eq!(tokens.repeated_issuers(), BTreeSet::from(["b"]));
        assert_eq!(Tokens::of(Vec::new(), Vec::new()), None);
    }

    #[test]
    fn a_claim_that_its_issuers_rule_names_is_a_list() {
        let listed = JwtRule {
            lists: BTreeSet::from(["roles".to_owned()]),
            ..rule("a")
        };
        let tokens = Tokens::of(Vec::new(), vec![listed, rule("b")]).expect("rules");
        let claims = |issuer: &str| -> Map<String, Value> {
            [("iss", issuer), ("roles", " x  y ")]
                .map(|(name, text)| (name.to_owned(), Value::from(text)))
                .into_iter()
                .collect()
        };
        assert_eq!(tokens.seen(&claims("a"))["roles"], serde_json::json!(["x", "y"]));
        assert_eq!(tokens.seen(&claims("b"))["roles"], Value::from(" x  y "));
    }
}
