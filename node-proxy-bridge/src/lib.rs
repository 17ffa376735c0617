//! The way to the node's proxy for verdicts that need L7: its types, and a clear "not yet".
//!
//! Invariant: nothing here lets a connection pass. As long as there is no proxy, a cell that needs L7
//! refuses, and the agent says so.

use std::num::NonZeroU32;

use thyra_policy_compiler::policy::Unknown;

/// The number of a residual: what is left of an endpoint's policies for one source class and port once
/// everything that the kernel knows has been put in. 0 is "no residual" and can't be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResidualId(NonZeroU32);

impl ResidualId {
    /// A residual's number; none for 0.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

/// Verdicts need L7 and this node has no proxy: their connections are refused with the reason `needs L7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{verdicts} verdicts depend on HTTP and there is no L7 proxy yet: they are refused (`needs L7`)")]
pub struct L7Unavailable {
    /// How many distinct verdicts of the live tables.
    pub verdicts: usize,
}

/// Why a residual can't be given to a proxy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResidualError {
    /// There is no proxy.
    #[error(transparent)]
    Unavailable(#[from] L7Unavailable),
    /// It holds a term that no proxy could judge either.
    #[error("`{}` can't be expressed", .0.0)]
    NotExpressible(Unknown),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_no_residual() {
        assert_eq!(ResidualId::new(0), None);
        assert_eq!(ResidualId::new(7).map(ResidualId::get), Some(7));
    }

    #[test]
    fn what_is_missing_is_said_with_its_extent() {
        assert!(
            L7Unavailable { verdicts: 3 }
                .to_string()
                .starts_with("3 verdicts depend on HTTP")
        );
    }
}
