//! Values of Istio's security fields as text to typed matches: the one place that knows which wildcards a
//! field has.
//!
//! Invariant: a value is either read whole or refused by name; what istiod accepts is accepted here with
//! istiod's meaning, so YAML and xDS can't disagree. Nothing is skipped, defaulted or cut.

mod l7_verdict;

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub(crate) use self::l7_verdict::unread;
pub use self::l7_verdict::{L7_VERDICT, l7_verdict};
use crate::policy::{Condition, Field, MtlsMode, PolicyAction, ServiceAccountRef, StringMatch};
use crate::traffic::PathNormalization;
use crate::world::AppProtocol;

/// Longest `serviceAccounts` value, characters (the CRD's `maxLength`).
const MAX_SERVICE_ACCOUNT: usize = 320;
/// Most values of a `serviceAccounts` field (the CRD's `maxItems`).
pub const MAX_SERVICE_ACCOUNTS: usize = 16;
/// Bits that every IPv4-mapped IPv6 address begins with.
const MAPPED_BITS: u8 = 96;
/// Ports that are TCP for istiod when the Service declares nothing: SMTP, DNS, MySQL, MongoDB.
const WELL_KNOWN_TCP: [u16; 4] = [25, 53, 3306, 27017];

/// A value that can't be read; the text says what it should look like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The empty string.
    #[error("an empty value is not allowed; write `*` for any value that is present, or leave the field out")]
    Empty,
    /// Neither address nor block.
    #[error(
        "`{0}` is not an IP address or CIDR block; write it like `10.1.2.3`, `10.1.0.0/16` or `2001:db8::/32`"
    )]
    Address(String),
    /// A mask beyond the address.
    #[error("the prefix length of `{value}` is not a number from 0 to {most}")]
    PrefixLength {
        /// As written.
        value: String,
        /// 32 or 128.
        most: u8,
    },
    /// Not 0 to 65535.
    #[error(
        "`{0}` is not a port; write a number from 0 to 65535 in quotes, like \"8080\" (names and ranges \
        are unknown here)"
    )]
    Port(String),
    /// A `*` where the field has none.
    #[error(
        "`{0}`: a service account is matched exactly, `*` is not allowed; use `principals` for a wildcard"
    )]
    ServiceAccountWildcard(String),
    /// Not `name` or `namespace/name`.
    #[error("`{0}` is not a service account; write `name` or `namespace/name`")]
    ServiceAccount(String),
    /// A wildcard in the middle, more than one, or a `/`.
    #[error("`{0}` is not a trust domain; write it without `/` and with at most one `*`, first or last")]
    TrustDomain(String),
    /// A template that Istio doesn't have.
    #[error(
        "`{0}` is not a path template; `{{*}}` stands for one whole segment, `{{**}}` for any rest; no \
        other template may follow it"
    )]
    PathTemplate(String),
    /// `ALLOW`, `DENY`, `AUDIT`, `CUSTOM`.
    #[error("`{0}` is not an action; write `ALLOW`, `DENY`, `AUDIT` or `CUSTOM`")]
    Action(String),
    /// mTLS mode.
    #[error("`{0}` is not an mTLS mode; write `STRICT`, `PERMISSIVE`, `DISABLE` or `UNSET`")]
    Mode(String),
    /// `pathNormalization.normalization`.
    #[error(
        "`{0}` is not a way to normalise paths; write `BASE`, `NONE`, `MERGE_SLASHES` or \
        `DECODE_AND_MERGE_SLASHES`"
    )]
    Normalization(String),
    /// Not what Go's `strconv.ParseBool` reads.
    #[error("`{0}` is not a boolean; write \"true\" or \"false\"")]
    Bool(String),
}

/// A `when` entry that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConditionError {
    /// istiod accepts it, Thyra can't express it: an unknown term (matched in DENY, not matched in ALLOW).
    #[error("condition key `{0}` can't be expressed")]
    Inexpressible(String),
    /// istiod refuses it too.
    #[error("`{key}` is not a condition key; {mend}")]
    UnknownKey {
        /// As written.
        key: String,
        /// What to write instead.
        mend: String,
    },
    /// Neither values nor not-values.
    #[error("condition `{0}` has neither `values` nor `notValues`; give at least one")]
    NoValues(String),
    /// One value is bad.
    #[error("condition `{key}`: {error}")]
    Value {
        /// As written.
        key: String,
        /// `true` for one of `notValues`.
        negated: bool,
        /// Position in its list, from 0.
        index: usize,
        /// What is wrong.
        error: ValueError,
    },
}

/// Condition keys without brackets, as Istio's reference lists them.
pub const CONDITION_KEYS: [&str; 15] = [
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[name]",
    "request.headers[name]",
    "experimental.envoy.filters.name[key]",
];

/// Exact, `prefix*`, `*suffix` or `*`; a `*` elsewhere is an ordinary character, as for istiod.
pub fn string_match(value: &str) -> Result<StringMatch, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    if value == "*" {
        return Ok(StringMatch::Present);
    }
    if let Some(suffix) = value.strip_prefix('*') {
        return Ok(StringMatch::Suffix(suffix.to_owned()));
    }
    if let Some(prefix) = value.strip_suffix('*') {
        return Ok(StringMatch::Prefix(prefix.to_owned()));
    }
    Ok(StringMatch::Exact(value.to_owned()))
}

/// Trust domain, namespace and service account of `<trust domain>/ns/<namespace>/sa/<service account>`; none of a
/// text with other parts.
#[must_use]
pub fn principal_parts(principal: &str) -> Option<(&str, &str, &str)> {
    let parts: Vec<&str> = principal.split('/').collect();
    match parts[..] {
        [domain, "ns", namespace, "sa", account] => Some((domain, namespace, account)),
        _ => None,
    }
}

/// A value of `principals` or `source.principal`, without `spiffe://`.
pub fn principal(value: &str) -> Result<StringMatch, ValueError> {
    string_match(value)
}

/// A value of `namespaces` or `source.namespace`: `*` anywhere is any run of characters.
pub fn namespace(value: &str) -> Result<StringMatch, ValueError> {
    match string_match(value)? {
        StringMatch::Exact(v) | StringMatch::Prefix(v) | StringMatch::Suffix(v) if v.contains('*') => {
            Ok(StringMatch::Glob(value.to_owned()))
        }
        plain => Ok(plain),
    }
}

/// A value of `serviceAccounts` or `source.serviceAccount`; without a namespace it is the policy's.
pub fn service_account(value: &str, policy_namespace: &str) -> Result<ServiceAccountRef, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    if value.contains('*') {
        return Err(ValueError::ServiceAccountWildcard(value.to_owned()));
    }
    let (namespace, name) = value.split_once('/').unwrap_or((policy_namespace, value));
    let bad = namespace.is_empty() || name.is_empty() || name.contains('/');
    if bad || value.chars().count() > MAX_SERVICE_ACCOUNT {
        return Err(ValueError::ServiceAccount(value.to_owned()));
    }
    Ok(ServiceAccountRef {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// A value of `trustDomains`: exact or one `*`, first or last.
pub fn trust_domain(value: &str) -> Result<StringMatch, ValueError> {
    if value.contains('/') {
        return Err(ValueError::TrustDomain(value.to_owned()));
    }
    one_wildcard(value)
}

/// A value of `source.trustDomain`, where istiod takes a `/` too (which no trust domain has).
fn one_wildcard(value: &str) -> Result<StringMatch, ValueError> {
    let read = string_match(value)?;
    match &read {
        StringMatch::Exact(v) | StringMatch::Prefix(v) | StringMatch::Suffix(v) | StringMatch::Glob(v)
            if v.contains('*') =>
        {
            Err(ValueError::TrustDomain(value.to_owned()))
        }
        _ => Ok(read),
    }
}

/// An address or CIDR block: host bits are masked, IPv4-mapped IPv6 becomes IPv4, an address is its own
/// block.
pub fn ip_block(value: &str) -> Result<IpNet, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (value, None),
    };
    let address: IpAddr = address
        .parse()
        .map_err(|_| ValueError::Address(value.to_owned()))?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = match length {
        None => most,
        Some(text) => prefix_length(text, most).ok_or_else(|| ValueError::PrefixLength {
            value: value.to_owned(),
            most,
        })?,
    };
    Ok(block(address, length))
}

/// Digits without sign or leading zero, at most `most`; as Go's `netip.ParsePrefix`.
fn prefix_length(text: &str, most: u8) -> Option<u8> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    text.parse().ok().filter(|length| plain && *length <= most)
}

/// The masked block of an address whose prefix length is in range; a block inside `::ffff:0:0/96` is an IPv4
/// block.
fn block(address: IpAddr, length: u8) -> IpNet {
    let mapped = match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().zip(length.checked_sub(MAPPED_BITS)),
        IpAddr::V4(v4) => Some((v4, length)),
    };
    let net = match (mapped, address) {
        (Some((v4, length)), _) => IpNet::V4(Ipv4Net::new_assert(v4, length)),
        (None, IpAddr::V6(v6)) => IpNet::V6(Ipv6Net::new_assert(v6, length)),
        (None, IpAddr::V4(v4)) => IpNet::V4(Ipv4Net::from(v4)),
    };
    net.trunc()
}

/// A port in decimal digits; 0 is accepted (as by istiod) and matches nothing.
pub fn port(value: &str) -> Result<u16, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    value
        .parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| ValueError::Port(value.to_owned()))
}

/// A value of `paths`, kept as written once its template is known to be well-formed.
pub fn path(value: &str) -> Result<String, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    let bad = || ValueError::PathTemplate(value.to_owned());
    let template = value.contains("{*}") || value.contains("{**}");
    let mut rest_seen = false;
    for segment in value.trim_matches('/').split('/') {
        match segment {
            "{*}" | "{**}" if rest_seen => return Err(bad()),
            "{*}" => {}
            "{**}" => rest_seen = true,
            _ if segment.contains(['{', '}']) => return Err(bad()),
            _ if template && !is_path_literal(segment) => return Err(bad()),
            _ => {}
        }
    }
    Ok(value.to_owned())
}

/// One or more of RFC 3986's `pchar`.
fn is_path_literal(segment: &str) -> bool {
    !segment.is_empty()
        && segment
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b))
}

/// `spec.action`; empty is ALLOW, as in Istio.
pub fn action(value: &str) -> Result<PolicyAction, ValueError> {
    match value {
        "" | "ALLOW" => Ok(PolicyAction::Allow),
        "DENY" => Ok(PolicyAction::Deny),
        "AUDIT" => Ok(PolicyAction::Audit),
        "CUSTOM" => Ok(PolicyAction::Custom),
        _ => Err(ValueError::Action(value.to_owned())),
    }
}

/// `mtls.mode`; empty is UNSET.
pub fn mtls_mode(value: &str) -> Result<MtlsMode, ValueError> {
    match value {
        "" | "UNSET" => Ok(MtlsMode::Unset),
        "DISABLE" => Ok(MtlsMode::Disable),
        "PERMISSIVE" => Ok(MtlsMode::Permissive),
        "STRICT" => Ok(MtlsMode::Strict),
        _ => Err(ValueError::Mode(value.to_owned())),
    }
}

/// `MeshConfig.pathNormalization.normalization`; empty and DEFAULT are BASE.
pub fn path_normalization(value: &str) -> Result<PathNormalization, ValueError> {
    match value {
        "" | "DEFAULT" | "BASE" => Ok(PathNormalization::Base),
        "NONE" => Ok(PathNormalization::None),
        "MERGE_SLASHES" => Ok(PathNormalization::MergeSlashes),
        "DECODE_AND_MERGE_SLASHES" => Ok(PathNormalization::DecodeAndMergeSlashes),
        _ => Err(ValueError::Normalization(value.to_owned())),
    }
}

/// Annotation `istio.io/dry-run`, read as Go's `strconv.ParseBool`; absent is false. istiod enforces a policy
/// whose annotation can't be read, and so must a caller that keeps the policy.
pub fn dry_run(annotation: Option<&str>) -> Result<bool, ValueError> {
    match annotation {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some(other) => Err(ValueError::Bool(other.to_owned())),
    }
}

/// A `when` entry; `policy_namespace` completes service accounts without one.
pub fn condition(
    key: &str,
    values: &[String],
    not_values: &[String],
    policy_namespace: &str,
) -> Result<Condition, ConditionError> {
    let known = known_key(key)?;
    if values.is_empty() && not_values.is_empty() {
        return Err(ConditionError::NoValues(key.to_owned()));
    }
    let lists = Lists {
        key,
        values,
        not_values,
    };
    Ok(match known {
        Key::SourceIp => Condition::SourceIp(lists.read(ip_block)?),
        Key::RemoteIp => Condition::RemoteIp(lists.read(ip_block)?),
        Key::DestinationIp => Condition::DestinationIp(lists.read(ip_block)?),
        Key::SourceNamespace => Condition::SourceNamespace(lists.read(namespace)?),
        Key::SourcePrincipal => Condition::SourcePrincipal(lists.read(principal)?),
        Key::SourceTrustDomain => Condition::SourceTrustDomain(lists.read(one_wildcard)?),
        Key::SourceServiceAccount => {
            Condition::SourceServiceAccount(lists.read(|v| service_account(v, policy_namespace))?)
        }
        Key::DestinationPort => Condition::DestinationPort(lists.read(port)?),
        Key::Sni => Condition::Sni(lists.read(string_match)?),
        Key::Request => Condition::Request {
            key: key.to_owned(),
            values: lists.read(string_match)?,
        },
        Key::Inexpressible => return Err(ConditionError::Inexpressible(key.to_owned())),
    })
}

enum Key {
    SourceIp,
    RemoteIp,
    SourceNamespace,
    SourcePrincipal,
    SourceServiceAccount,
    SourceTrustDomain,
    DestinationIp,
    DestinationPort,
    Sni,
    Request,
    Inexpressible,
}

fn known_key(key: &str) -> Result<Key, ConditionError> {
    let unknown = |mend: &str| ConditionError::UnknownKey {
        key: key.to_owned(),
        mend: mend.to_owned(),
    };
    Ok(match key {
        "source.ip" => Key::SourceIp,
        "remote.ip" => Key::RemoteIp,
        "source.namespace" => Key::SourceNamespace,
        "source.principal" => Key::SourcePrincipal,
        "source.serviceAccount" => Key::SourceServiceAccount,
        "source.trustDomain" => Key::SourceTrustDomain,
        "destination.ip" => Key::DestinationIp,
        "destination.port" => Key::DestinationPort,
        "connection.sni" => Key::Sni,
        "request.auth.principal" | "request.auth.audiences" | "request.auth.presenter" => Key::Request,
        "" => return Err(unknown("it must not be empty")),
        "destination.namespace" => {
            return Err(unknown("put the policy into that namespace instead"));
        }
        "destination.name" | "destination.user" => {
            return Err(unknown("use the policy's `selector` instead"));
        }
        _ if key.starts_with("destination.labels") => {
            return Err(unknown("use the policy's `selector` instead"));
        }
        _ => bracketed(key).ok_or_else(|| unknown(&format!("known are {}", CONDITION_KEYS.join(", "))))?,
    })
}

/// Keys of the form `name[part]`, the part not empty.
fn bracketed(key: &str) -> Option<Key> {
    let (name, part) = key.strip_suffix(']')?.split_once('[')?;
    if part.is_empty() {
        return None;
    }
    match name {
        "request.headers" | "request.auth.claims" => Some(Key::Request),
        _ if name.starts_with("experimental.envoy.filters.") => Some(Key::Inexpressible),
        _ => None,
    }
}

struct Lists<'a> {
    key: &'a str,
    values: &'a [String],
    not_values: &'a [String],
}

impl Lists<'_> {
    fn read<T>(&self, one: impl Fn(&str) -> Result<T, ValueError>) -> Result<Field<T>, ConditionError> {
        let all = |list: &[String], negated: bool| {
            let read = |(index, value): (usize, &String)| {
                let key = self.key.to_owned();
                one(value).map_err(|error| ConditionError::Value {
                    key,
                    negated,
                    index,
                    error,
                })
            };
            list.iter()
                .enumerate()
                .map(read)
                .collect::<Result<Vec<T>, ConditionError>>()
        };
        Ok(Field {
            values: all(self.values, false)?,
            not_values: all(self.not_values, true)?,
        })
    }
}

/// What a Service port declares: `appProtocol`, else the part of its name before `-`, as istiod reads them;
/// `port` is the Service's.
#[must_use]
pub fn app_protocol(app_protocol: Option<&str>, name: &str, port: u16) -> AppProtocol {
    let declared = app_protocol.unwrap_or(name).to_ascii_lowercase();
    match (app_protocol, declared.as_str()) {
        (Some(_), "kubernetes.io/h2c" | "kubernetes.io/ws") => return AppProtocol::Http,
        (Some(_), "kubernetes.io/wss") => return AppProtocol::Tls,
        _ => {}
    }
    if declared.starts_with("grpc-web") {
        return AppProtocol::Http;
    }
    match declared.split('-').next().unwrap_or_default() {
        "http" | "http2" | "http_proxy" | "grpc" => AppProtocol::Http,
        "https" | "tls" => AppProtocol::Tls,
        "tcp" | "udp" | "mongo" | "redis" | "mysql" => AppProtocol::NotHttp,
        _ if WELL_KNOWN_TCP.contains(&port) => AppProtocol::NotHttp,
        _ => AppProtocol::Unknown,
    }
}

#[cfg(test)]
mod tests;
