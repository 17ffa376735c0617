//! Wire messages to the compiler's model: total, or refused by name.
//!
//! Invariant: every field of a message is either carried over or named here as one that can't change a
//! verdict; nothing is skipped, defaulted or cut.

pub mod authorization;
pub mod mesh;
pub mod peer;
pub mod policy;
pub mod providers;
pub mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::parse::{ConditionError, ValueError};
use thyra_policy_compiler::policy::{Field, Labels, Unknown};
use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::r#type::v1beta1::WorkloadSelector;

/// Why a resource is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// The resource's name is not `namespace/name`.
    #[error("name `{0}` is not `namespace/name`")]
    Name(String),
    /// The resource has no content.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// An address that is neither 4 nor 16 bytes.
    #[error("`{field}`: an address has {bytes} bytes (4 or 16 are possible)")]
    Address {
        /// Where.
        field: &'static str,
        /// Length found.
        bytes: usize,
    },
    /// A number out of its range.
    #[error("`{field}`: `{value}` is out of range")]
    Number {
        /// Where.
        field: String,
        /// As sent.
        value: i64,
    },
    /// A value that can't be read.
    #[error("`{field}`: {error}")]
    Value {
        /// Where.
        field: String,
        /// What.
        error: ValueError,
    },
    /// A condition that can't be read.
    #[error("`{field}`: {error}")]
    Condition {
        /// Where.
        field: String,
        /// What.
        error: ConditionError,
    },
    /// A scope that this node's settings contradict.
    #[error(
        "`scope` is the mesh but `{namespace}` is not the root namespace `{root}` (set `--root-namespace`)"
    )]
    Scope {
        /// The policy's.
        namespace: String,
        /// As configured.
        root: String,
    },
}

/// `namespace/name` of a raw resource.
///
/// # Errors
/// It isn't of that form.
pub fn reference(name: &str) -> Result<PolicyRef, ConvertError> {
    match name.split_once('/') {
        Some((namespace, rest)) if !namespace.is_empty() && !rest.is_empty() && !rest.contains('/') => {
            Ok(PolicyRef {
                namespace: Arc::from(namespace),
                name: Arc::from(rest),
            })
        }
        _ => Err(ConvertError::Name(name.into())),
    }
}

/// What every raw resource's metadata tells.
struct Meta {
    reference: PolicyRef,
    version: String,
    created: i64,
    annotations: BTreeMap<String, String>,
}

fn meta(metadata: Metadata) -> Result<Meta, ConvertError> {
    // The labels of the policy object itself select nothing.
    let Metadata {
        name,
        create_time,
        version,
        labels: _,
        annotations,
    } = metadata;
    Ok(Meta {
        reference: reference(&name)?,
        version,
        created: create_time.map_or(0, |t| t.seconds),
        annotations: annotations.into_iter().collect(),
    })
}

fn labels(selector: Option<WorkloadSelector>) -> Option<Labels> {
    selector.map(|WorkloadSelector { match_labels }| match_labels.into_iter().collect())
}

fn field<T>(
    at: &str,
    name: &str,
    values: &[String],
    not_values: &[String],
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Field<T>, ConvertError> {
    let all = |list: &[String], name: &str| {
        list.iter()
            .enumerate()
            .map(|(i, v)| {
                parse(v).map_err(|error| ConvertError::Value {
                    field: format!("{at}.{name}[{i}]"),
                    error,
                })
            })
            .collect::<Result<Vec<T>, _>>()
    };
    let mut negated = String::from("not");
    let mut letters = name.chars();
    negated.extend(letters.next().map(|c| c.to_ascii_uppercase()));
    negated.extend(letters);
    Ok(Field {
        values: all(values, name)?,
        not_values: all(not_values, &negated)?,
    })
}

/// The unknown fields below `path` (`spec.rules[0].from[1]`): those whose own path starts there.
fn unknown_below(unknown: &[String], path: &str) -> Vec<Unknown> {
    let below = |u: &&String| {
        u.strip_prefix(path)
            .is_some_and(|rest| rest.starts_with(['.', ' ']))
    };
    unknown
        .iter()
        .filter(below)
        .map(|u| Unknown(Arc::from(u.as_str())))
        .collect()
}

#[cfg(test)]
mod tests;
