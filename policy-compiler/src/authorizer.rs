//! Whom CUSTOM policies ask: the `extensionProviders` of MeshConfig, as far as one can be asked for a verdict.
//!
//! Invariant: a provider that can't be asked as it is written is kept with the reason, and what a CUSTOM rule with it
//! matches is denied. What istiod takes and how: `pilot/pkg/security/authz/builder/extauthz.go`
//! (`processExtensionProvider`), istio at a5f9585.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What a check may take where the provider doesn't say (`timeoutOrDefault`).
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(600);
/// What a client gets when a check fails and the provider doesn't say (`ExtAuthz.status_on_error`).
pub const STATUS_ON_ERROR: u16 = 403;
/// Statuses that can be an answer's last one (`envoy.type.v3.StatusCode`).
const STATUSES: [u16; 55] = [
    200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402,
    403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 421, 422, 423, 424, 426, 428,
    429, 431, 500, 501, 502, 503, 504, 505, 506, 507, 508, 510, 511,
];

/// The service that is asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Its namespace; none where only one has such a host.
    pub namespace: Option<String>,
    /// Host name, as istiod knows it.
    pub host: String,
    /// Port of the Service.
    pub port: u16,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}:{}", self.host, self.port),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// How much of a request's body the authorizer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BodyInCheck {
    /// Most bytes.
    pub max_bytes: u32,
    /// A longer one is sent in part; else it is refused with 413.
    pub partial: bool,
    /// As bytes, not as text (gRPC).
    pub as_bytes: bool,
}

/// What an HTTP authorizer gets and gives. Names of headers may begin or end with `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HttpCheck {
    /// In front of the request's own path.
    pub path_prefix: String,
    /// Headers of the request that it gets, beside those that Envoy always sends.
    pub request_headers: Vec<String>,
    /// Headers that it gets besides.
    pub added_headers: BTreeMap<String, String>,
    /// Headers of its answer that the pod gets.
    pub to_upstream: Vec<String>,
    /// Headers of its answer that the client gets when it allows.
    pub to_downstream_on_allow: Vec<String>,
    /// The same when it denies.
    pub to_downstream_on_deny: Vec<String>,
}

/// How it is asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// By a request of its own: 200 allows. Only of HTTP requests.
    Http(HttpCheck),
    /// `envoy.service.auth.v3.Authorization/Check`, also of streams that are not HTTP.
    Grpc,
}

/// A provider that can be asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Authorizer {
    /// Where.
    pub target: Target,
    /// How.
    pub check: Check,
    /// What a check may take.
    pub timeout: Duration,
    /// Who can't be checked passes.
    pub fail_open: bool,
    /// What a client gets who can't be checked, unless `fail_open`.
    pub status_on_error: u16,
    /// What it gets of the body; none without.
    pub body: Option<BodyInCheck>,
}

/// A provider by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Provider {
    /// As policies name it.
    pub name: Arc<str>,
    /// How it is asked, or why it can't be.
    pub authorizer: Result<Arc<Authorizer>, Arc<str>>,
}

/// Every provider of the mesh config by name.
pub type Providers = BTreeMap<String, Arc<Provider>>;

impl Provider {
    /// A provider that can be asked, once `authorizer` holds.
    #[must_use]
    pub fn new(name: &str, authorizer: Result<Authorizer, String>) -> Self {
        Self {
            name: name.into(),
            authorizer: authorizer
                .and_then(Authorizer::checked)
                .map(Arc::new)
                .map_err(Arc::from),
        }
    }

    /// A provider of a kind that answers no questions.
    #[must_use]
    pub fn of_kind(name: &str, kind: &str) -> Self {
        Self::new(name, Err(format!("a provider of kind {kind} can't be asked")))
    }

    /// What a policy names and the mesh config doesn't have.
    #[must_use]
    pub fn absent(name: &str) -> Self {
        Self::new(name, Err("not in the mesh config".to_owned()))
    }

    /// As it counts for streams that are not HTTP.
    #[must_use]
    pub fn of_streams(self: &Arc<Self>) -> Arc<Self> {
        match &self.authorizer {
            Ok(authorizer) if matches!(authorizer.check, Check::Http(_)) => Arc::new(Self {
                name: Arc::clone(&self.name),
                authorizer: Err("it can be asked of HTTP requests only".into()),
            }),
            _ => Arc::clone(self),
        }
    }

    /// The field that makes a verdict wait for it.
    #[must_use]
    pub fn field(&self) -> Arc<str> {
        match &self.authorizer {
            Ok(_) => format!("provider {}", self.name).into(),
            Err(why) => format!("provider {} ({why})", self.name).into(),
        }
    }
}

/// The providers that can be asked, in words that differ where one of them does; empty without any.
#[must_use]
pub fn fingerprint(providers: &Providers) -> String {
    let known = providers.values().filter_map(|provider| {
        let authorizer = provider.authorizer.as_ref().ok()?;
        Some(format!("{} {authorizer:?}", provider.name))
    });
    known.collect::<Vec<_>>().join("\n")
}

/// The provider into the list; two of one name are none, as in istiod.
pub fn insert(providers: &mut Providers, provider: Provider) {
    let name = provider.name.to_string();
    let provider = if providers.contains_key(&name) {
        Provider::new(
            &name,
            Err("two providers of the mesh config have this name".to_owned()),
        )
    } else {
        provider
    };
    providers.insert(name, Arc::new(provider));
}

impl Authorizer {
    /// Whether Envoy can be told all of it.
    fn checked(self) -> Result<Self, String> {
        if self.target.host.is_empty() {
            return Err("it names no `service`".to_owned());
        }
        if self.target.port == 0 {
            return Err("its `port` is not one from 1 to 65535".to_owned());
        }
        if !STATUSES.contains(&self.status_on_error) {
            return Err(format!(
                "`statusOnError` {} is no status of HTTP",
                self.status_on_error
            ));
        }
        if self.timeout.is_zero() {
            return Err("its `timeout` is nothing at all".to_owned());
        }
        if self.body.is_some_and(|body| body.max_bytes == 0) {
            return Err("`maxRequestBytes` must be more than 0".to_owned());
        }
        if let Check::Http(check) = &self.check {
            check.check()?;
        }
        Ok(self)
    }
}

impl HttpCheck {
    fn check(&self) -> Result<(), String> {
        if !self.path_prefix.is_empty() && !self.path_prefix.starts_with('/') {
            return Err(format!(
                "`pathPrefix` must begin with `/`, and is `{}`",
                self.path_prefix
            ));
        }
        let prefix_byte = |byte: u8| byte.is_ascii_graphic() && !b"?#".contains(&byte);
        if !self.path_prefix.bytes().all(prefix_byte) {
            return Err(format!("`pathPrefix` is no path: `{}`", self.path_prefix));
        }
        let lists = [
            &self.request_headers,
            &self.to_upstream,
            &self.to_downstream_on_allow,
            &self.to_downstream_on_deny,
        ];
        for name in lists.into_iter().flatten() {
            let bare = name
                .strip_prefix('*')
                .or_else(|| name.strip_suffix('*'))
                .unwrap_or(name);
            if !is_header_name(bare) {
                return Err(format!(
                    "`{name}` is no header's name, nor the beginning or end of one with a `*`"
                ));
            }
        }
        for (name, value) in &self.added_headers {
            let plain = value
                .bytes()
                .all(|byte| byte == b'\t' || (b' '..0x7f).contains(&byte) || byte >= 0x80);
            if !is_header_name(name) || !plain {
                return Err(format!(
                    "`includeAdditionalHeadersInCheck`: `{name}` is no header"
                ));
            }
        }
        Ok(())
    }
}

/// RFC 9110, 5.1: a token.
fn is_header_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(fits)
}

/// `service` and `port` as MeshConfig has them: `[<namespace>/]<host>`.
///
/// # Errors
/// It is no such text.
pub fn target(service: &str, port: u32) -> Result<Target, String> {
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    if host.contains('/') || namespace == Some("") {
        return Err(format!(
            "`service` is `{service}`; write `<namespace>/<host>` or `<host>`"
        ));
    }
    Ok(Target {
        namespace: namespace.map(str::to_owned),
        host: host.to_owned(),
        port: u16::try_from(port).unwrap_or(0),
    })
}

/// `statusOnError` as MeshConfig has it.
///
/// # Errors
/// It is no number.
pub fn status(text: &str) -> Result<u16, String> {
    if text.is_empty() {
        return Ok(STATUS_ON_ERROR);
    }
    text.parse()
        .map_err(|_| format!("`statusOnError` is `{text}`; write a status of HTTP such as `\"403\"`"))
}

/// The `timeout` as protobuf has it.
///
/// # Errors
/// It is negative.
pub fn timeout(seconds: i64, nanos: i32) -> Result<Duration, String> {
    let (seconds, nanos) = (u64::try_from(seconds), u32::try_from(nanos));
    match (seconds, nanos) {
        (Ok(seconds), Ok(nanos)) => Ok(Duration::new(seconds, nanos)),
        _ => Err("its `timeout` is negative".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authorizer(check: Check) -> Authorizer {
        Authorizer {
            target: target("foo/ext.foo.svc.cluster.local", 8000).expect("a service"),
            check,
            timeout: CHECK_TIMEOUT,
            fail_open: false,
            status_on_error: STATUS_ON_ERROR,
            body: None,
        }
    }

    fn why(authorizer: Authorizer) -> String {
        Provider::new("ext", Ok(authorizer))
            .authorizer
            .expect_err("refused")
            .to_string()
    }

    #[test]
    fn what_envoy_can_not_be_told_is_named() {
        let http = |check: HttpCheck| authorizer(Check::Http(check));
        let prefix = |text: &str| HttpCheck {
            path_prefix: text.to_owned(),
            ..HttpCheck::default()
        };
        let upstream = |text: &str| HttpCheck {
            to_upstream: vec![text.to_owned()],
            ..HttpCheck::default()
        };
        let added = |name: &str, value: &str| HttpCheck {
            added_headers: [(name.to_owned(), value.to_owned())].into(),
            ..HttpCheck::default()
        };
        assert!(why(http(prefix("check"))).contains("pathPrefix"));
        assert!(why(http(prefix("/a b"))).contains("pathPrefix"));
        assert!(why(http(upstream("*"))).contains("`*`"));
        assert!(why(http(upstream("x y"))).contains("`x y`"));
        assert!(why(http(added("x-a", "1\r\nx-b: 2"))).contains("`x-a`"));
        let mut odd = authorizer(Check::Grpc);
        odd.status_on_error = 999;
        assert!(why(odd).contains("999"));
        for fine in [
            upstream("x-*"),
            upstream("*-id"),
            prefix("/check/"),
            added("x-a", "1"),
        ] {
            assert!(
                Provider::new("ext", Ok(http(fine.clone()))).authorizer.is_ok(),
                "{fine:?}"
            );
        }
    }

    #[test]
    fn a_service_has_a_namespace_or_not() {
        let of = |text: &str| target(text, 1).map(|target| (target.namespace, target.host));
        assert_eq!(of("a/b.c"), Ok((Some("a".to_owned()), "b.c".to_owned())));
        assert_eq!(of("b.c"), Ok((None, "b.c".to_owned())));
        assert!(of("/b").is_err() && of("a/b/c").is_err());
    }

    #[test]
    fn two_of_one_name_are_none() {
        let mut providers = Providers::new();
        for _ in 0..2 {
            insert(&mut providers, Provider::new("ext", Ok(authorizer(Check::Grpc))));
        }
        assert!(providers["ext"].authorizer.is_err());
    }

    #[test]
    fn over_http_nothing_is_asked_of_other_streams() {
        let streams = |check| Arc::new(Provider::new("ext", Ok(authorizer(check)))).of_streams();
        assert!(streams(Check::Http(HttpCheck::default())).authorizer.is_err());
        assert!(streams(Check::Grpc).authorizer.is_ok());
    }
}
