//! Whether one constraint holds wherever another does, read off their texts.
//!
//! Invariant: `true` is certain; `false` may only mean that it takes more than texts to tell.

use ipnet::IpNet;

use crate::policy::{Condition, Field, Operation, Rule, ServiceAccountRef, Source, StringMatch};

/// A value of a field.
pub(super) trait Cover {
    /// Whether whatever `other` matches matches this too.
    fn covers(&self, other: &Self) -> bool;
    /// Whether nothing matches both.
    fn excludes(&self, other: &Self) -> bool;
}

impl Cover for StringMatch {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Present, _) => true,
            (Self::Prefix(start), Self::Exact(text) | Self::Prefix(text)) => text.starts_with(start.as_str()),
            (Self::Suffix(end), Self::Exact(text) | Self::Suffix(text)) => text.ends_with(end.as_str()),
            (one, other) => one == other,
        }
    }

    fn excludes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(text), pattern @ (Self::Exact(_) | Self::Prefix(_) | Self::Suffix(_)))
            | (pattern @ (Self::Prefix(_) | Self::Suffix(_)), Self::Exact(text)) => {
                !pattern.covers(&Self::Exact(text.clone()))
            }
            (Self::Prefix(one), Self::Prefix(other)) => {
                !one.starts_with(other.as_str()) && !other.starts_with(one.as_str())
            }
            (Self::Suffix(one), Self::Suffix(other)) => {
                !one.ends_with(other.as_str()) && !other.ends_with(one.as_str())
            }
            _ => false,
        }
    }
}

impl Cover for IpNet {
    fn covers(&self, other: &Self) -> bool {
        self.contains(other)
    }
    fn excludes(&self, other: &Self) -> bool {
        !self.contains(other) && !other.contains(self)
    }
}

macro_rules! by_equality {
    ($($kind:ty),*) => {
        $(impl Cover for $kind {
            fn covers(&self, other: &Self) -> bool {
                self == other
            }
            fn excludes(&self, other: &Self) -> bool {
                self != other
            }
        })*
    };
}

by_equality!(u16, ServiceAccountRef);

/// A path, whose templates overlap in ways that texts don't show.
impl Cover for String {
    fn covers(&self, other: &Self) -> bool {
        self == other || self == "*"
    }
    fn excludes(&self, _: &Self) -> bool {
        false
    }
}

/// Whether a field holds wherever `narrow` does.
pub(super) fn field<T: Cover>(wide: &Field<T>, narrow: &Field<T>) -> bool {
    let values = wide.values.is_empty()
        || (!narrow.values.is_empty()
            && narrow
                .values
                .iter()
                .all(|value| wide.values.iter().any(|w| w.covers(value))));
    let not = |n: &T| {
        narrow.not_values.iter().any(|other| other.covers(n))
            || (!narrow.values.is_empty() && narrow.values.iter().all(|value| value.excludes(n)))
    };
    values && wide.not_values.iter().all(not)
}

/// Whether a field holds for nothing at all.
pub(super) fn is_never<T: Cover>(field: &Field<T>) -> bool {
    let excluded = |value: &T| field.not_values.iter().any(|not| not.covers(value));
    !field.values.is_empty() && field.values.iter().all(excluded)
}

/// Whether a rule holds wherever `narrow` does; what is unknown in it holds, as in a DENY policy.
pub(super) fn rule(wide: &Rule, narrow: &Rule) -> bool {
    let any = |wide_is_empty: bool, narrow_is_empty: bool| wide_is_empty || !narrow_is_empty;
    any(wide.from.is_empty(), narrow.from.is_empty())
        && any(wide.to.is_empty(), narrow.to.is_empty())
        && (wide.from.is_empty() || narrow.from.iter().all(|n| wide.from.iter().any(|w| source(w, n))))
        && (wide.to.is_empty() || narrow.to.iter().all(|n| wide.to.iter().any(|w| operation(w, n))))
        && wide
            .when
            .iter()
            .all(|w| narrow.when.iter().any(|n| condition(w, n)))
}

fn source(wide: &Source, narrow: &Source) -> bool {
    field(&wide.principals, &narrow.principals)
        && field(&wide.namespaces, &narrow.namespaces)
        && field(&wide.service_accounts, &narrow.service_accounts)
        && field(&wide.trust_domains, &narrow.trust_domains)
        && field(&wide.ip_blocks, &narrow.ip_blocks)
        && field(&wide.remote_ip_blocks, &narrow.remote_ip_blocks)
        && field(&wide.request_principals, &narrow.request_principals)
}

fn operation(wide: &Operation, narrow: &Operation) -> bool {
    field(&wide.ports, &narrow.ports)
        && field(&wide.hosts, &narrow.hosts)
        && field(&wide.methods, &narrow.methods)
        && field(&wide.paths, &narrow.paths)
}

fn condition(wide: &Condition, narrow: &Condition) -> bool {
    use Condition as C;
    match (wide, narrow) {
        (C::SourceIp(w), C::SourceIp(n))
        | (C::RemoteIp(w), C::RemoteIp(n))
        | (C::DestinationIp(w), C::DestinationIp(n)) => field(w, n),
        (C::SourceNamespace(w), C::SourceNamespace(n))
        | (C::SourcePrincipal(w), C::SourcePrincipal(n))
        | (C::SourceTrustDomain(w), C::SourceTrustDomain(n))
        | (C::Sni(w), C::Sni(n)) => field(w, n),
        (C::SourceServiceAccount(w), C::SourceServiceAccount(n)) => field(w, n),
        (C::DestinationPort(w), C::DestinationPort(n)) => field(w, n),
        (C::Request { key: k, values: w }, C::Request { key, values: n }) => k == key && field(w, n),
        _ => false,
    }
}
