//! The way to the node's Envoy: residuals become its configuration, it is served over a Unix socket, and Envoy
//! itself is kept running.
//!
//! Invariant: nothing here lets a connection pass. A residual that Envoy can't express, has not accepted yet or
//! has refused is named as such, and its flows stay refused.

pub mod ads;
mod als;
pub mod authorizer;
pub mod bootstrap;
pub mod bridge;
pub mod cluster;
pub mod envoy;
pub mod hold;
pub mod inline;
mod keep;
pub mod listener;
pub mod lower;
mod otlp;
pub mod records;

/// The filter that checks tokens, and the metadata that it leaves.
pub const JWT_FILTER: &str = "envoy.filters.http.jwt_authn";

/// Verdicts need L7 and there is no Envoy: their connections are refused with the reason `needs L7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{verdicts} verdicts depend on HTTP and there is no Envoy (`--envoy`): they are refused (`needs L7`)"
)]
pub struct L7Unavailable {
    /// How many distinct verdicts of the live tables.
    pub verdicts: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_its_extent() {
        assert!(
            L7Unavailable { verdicts: 3 }
                .to_string()
                .starts_with("3 verdicts depend on HTTP")
        );
    }
}
