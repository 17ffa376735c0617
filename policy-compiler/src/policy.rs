//! The internal model of Istio's security resources: what every front end (YAML, xDS) produces and the
//! compiler reads.
//!
//! Invariant: nothing is dropped on the way in. What can't be expressed is kept as `unknown` with its name,
//! so that it counts as matched in DENY and CUSTOM and as not matched in ALLOW.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use thyra_datapath_abi::tables::PolicyRef;

use crate::tokens::JwtRule;

/// Labels of a pod or of a selector.
pub type Labels = BTreeMap<String, String>;

/// `spec.action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyAction {
    /// Allow what a rule matches; what no ALLOW rule matches is denied.
    Allow,
    /// Deny what a rule matches.
    Deny,
    /// Never a verdict.
    Audit,
    /// Ask the named extension provider about what a rule matches.
    Custom,
}

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Namespace and name.
    pub reference: PolicyRef,
    /// `metadata.resourceVersion`, as text; empty where the source has none.
    pub version: String,
    /// What it does.
    pub action: PolicyAction,
    /// Extension provider of a CUSTOM policy.
    pub provider: Option<String>,
    /// `spec.selector.matchLabels`; none when the selector is absent. A present, empty one selects all pods
    /// of the scope.
    pub selector: Option<Labels>,
    /// The policy has `targetRef` or `targetRefs`: a waypoint's, not enforced here.
    pub has_target_refs: bool,
    /// Annotation `istio.io/dry-run` parsed as a bool.
    pub dry_run: bool,
    /// Annotation `thyra.io/l7-verdict`.
    pub l7_verdict: L7Verdict,
    /// OR; empty matches nothing.
    pub rules: Vec<Rule>,
    /// Unknown fields of the spec itself (`spec.field 99`): they make every rule of it unknown.
    pub unknown: Vec<Unknown>,
}

/// What one verdict of L7 by a policy's rules is for: annotation `thyra.io/l7-verdict`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum L7Verdict {
    /// Each request has its own: `request`, or no annotation.
    #[default]
    Request,
    /// The first request of a connection decides for all of it: `connection`.
    Connection,
    /// Another word; each request has its own, which is the stricter.
    Unread(Arc<str>),
}

/// A term that can't be expressed: its path in the policy (`spec.rules[0].from[1].source field 99`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unknown(pub Arc<str>);

/// One of `spec.rules`: (OR over `from`) AND (OR over `to`) AND (AND over `when`); an empty list is no
/// constraint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Any source; empty: any.
    pub from: Vec<Source>,
    /// Any operation; empty: any.
    pub to: Vec<Operation>,
    /// All conditions.
    pub when: Vec<Condition>,
    /// Unknown fields of this rule, or an unknown condition key.
    pub unknown: Vec<Unknown>,
}

/// A field and its `not*` twin: OR over `values` (if any) AND NOT (OR over `not_values`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Field<T> {
    /// One must match; empty: no constraint.
    pub values: Vec<T>,
    /// None may match.
    pub not_values: Vec<T>,
}

impl<T> Default for Field<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            not_values: Vec::new(),
        }
    }
}

impl<T> Field<T> {
    /// Neither values nor not-values: no constraint.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty() && self.not_values.is_empty()
    }

    /// How many values and not-values.
    #[must_use]
    pub fn count(&self) -> usize {
        self.values.len() + self.not_values.len()
    }
}

/// A string pattern as Istio has it; which wildcards a field knows is decided where it is parsed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// `prefix*`.
    Prefix(String),
    /// `*suffix`.
    Suffix(String),
    /// `*`: present (for a principal: a known identity).
    Present,
    /// Wildcards anywhere (`namespaces: ["a*b"]`), kept as written: `*` is any run of characters.
    Glob(String),
}

impl StringMatch {
    /// A value of `requestPrincipals` as one for the issuer and one for the subject: it is cut at its last `/`, and
    /// a part that is `*` alone stands for any (istio, `pilot/pkg/security/authz/model/generator.go`,
    /// `requestPrincipalGenerator`). `a/*` is issuer `a`, not every issuer that begins with `a/`.
    #[must_use]
    pub fn of_issuer_and_subject(&self) -> (Self, Self) {
        let any = |text: &str, otherwise: fn(String) -> Self| {
            if text.is_empty() {
                Self::Present
            } else {
                otherwise(text.to_owned())
            }
        };
        match self {
            Self::Present => (Self::Present, Self::Present),
            Self::Suffix(text) => match text.rsplit_once('/') {
                Some((issuer, subject)) => (any(issuer, Self::Suffix), Self::Exact(subject.to_owned())),
                None => (Self::Present, Self::Suffix(text.clone())),
            },
            Self::Prefix(text) => match text.rsplit_once('/') {
                Some((issuer, subject)) => (Self::Exact(issuer.to_owned()), any(subject, Self::Prefix)),
                None => (Self::Prefix(text.clone()), Self::Present),
            },
            Self::Exact(text) | Self::Glob(text) => {
                let (issuer, subject) = text.rsplit_once('/').unwrap_or((text, ""));
                (Self::Exact(issuer.to_owned()), Self::Exact(subject.to_owned()))
            }
        }
    }
}

/// `serviceAccounts` value; an omitted namespace was filled in with the policy's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceAccountRef {
    /// Namespace.
    pub namespace: String,
    /// Service account name.
    pub name: String,
}

/// `from[].source`: all fields AND.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Against `<trust domain>/ns/<ns>/sa/<sa>`.
    pub principals: Field<StringMatch>,
    /// Against the identity's namespace.
    pub namespaces: Field<StringMatch>,
    /// Exact namespace and service account, any trust domain.
    pub service_accounts: Field<ServiceAccountRef>,
    /// Against the identity's trust domain.
    pub trust_domains: Field<StringMatch>,
    /// Against the packet's source; masked; never v4-mapped.
    pub ip_blocks: Field<IpNet>,
    /// Plain TCP: as `ip_blocks`; HTTP: by X-Forwarded-For.
    pub remote_ip_blocks: Field<IpNet>,
    /// HTTP only.
    pub request_principals: Field<StringMatch>,
    /// Unknown fields.
    pub unknown: Vec<Unknown>,
}

/// `to[].operation`: all fields AND.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// The pod's own port.
    pub ports: Field<u16>,
    /// HTTP only.
    pub hosts: Field<StringMatch>,
    /// HTTP only.
    pub methods: Field<StringMatch>,
    /// HTTP only; kept as written (templates `{*}`, `{**}` are parsed where they are judged).
    pub paths: Field<String>,
    /// Unknown fields.
    pub unknown: Vec<Unknown>,
}

/// `when[]`: a key with values and not-values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Field<IpNet>),
    /// `remote.ip`.
    RemoteIp(Field<IpNet>),
    /// `source.namespace`.
    SourceNamespace(Field<StringMatch>),
    /// `source.principal`.
    SourcePrincipal(Field<StringMatch>),
    /// `source.serviceAccount`.
    SourceServiceAccount(Field<ServiceAccountRef>),
    /// `source.trustDomain`.
    SourceTrustDomain(Field<StringMatch>),
    /// `destination.ip`.
    DestinationIp(Field<IpNet>),
    /// `destination.port`.
    DestinationPort(Field<u16>),
    /// `connection.sni`.
    Sni(Field<StringMatch>),
    /// `request.headers[..]`, `request.auth.*`: HTTP only; the key as written.
    Request {
        /// As written.
        key: String,
        /// Values and not-values.
        values: Field<StringMatch>,
    },
}

/// mTLS mode of a PeerAuthentication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MtlsMode {
    /// Inherit.
    #[default]
    Unset,
    /// No constraint.
    Disable,
    /// No constraint.
    Permissive,
    /// The source must have a known identity.
    Strict,
}

/// A PeerAuthentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Namespace and name.
    pub reference: PolicyRef,
    /// `metadata.resourceVersion`, as text.
    pub version: String,
    /// Creation time, seconds since the epoch (the oldest wins on a level; ties by name); 0 when unknown.
    pub created: i64,
    /// As in `AuthorizationPolicy`.
    pub selector: Option<Labels>,
    /// `spec.mtls.mode`.
    pub mode: MtlsMode,
    /// `spec.portLevelMtls`, by pod port.
    pub ports: BTreeMap<u16, MtlsMode>,
    /// Unknown fields: a port or mode that can't be read counts as STRICT.
    pub unknown: Vec<Unknown>,
}

/// A RequestAuthentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuthentication {
    /// Namespace and name.
    pub reference: PolicyRef,
    /// `metadata.resourceVersion`, as text.
    pub version: String,
    /// As in `AuthorizationPolicy`.
    pub selector: Option<Labels>,
    /// As in `AuthorizationPolicy`.
    pub has_target_refs: bool,
    /// `spec.jwtRules`, each as it counts (`JwtRule::checked`).
    pub rules: Vec<JwtRule>,
    /// Unknown fields, or why it can't be read at all: no token is taken where it may apply.
    pub unknown: Vec<Unknown>,
}

/// `true` if `address` is in `block`; families never mix.
#[must_use]
pub fn block_holds(block: &IpNet, address: IpAddr) -> bool {
    block.contains(&address)
}
