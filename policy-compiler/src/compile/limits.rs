//! How much the tables may hold.
//!
//! Invariant: what does not fit is an error that names it; nothing is cut.

use thyra_datapath_abi::limits;

use super::CompileError;

/// What 16 bits can number.
const NUMBERS: usize = 65_535;

/// The most of each thing that tables hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Source classes.
    pub classes: usize,
    /// Columns of a row.
    pub columns: usize,
    /// Rows.
    pub rows: usize,
    /// Policy sets.
    pub sets: usize,
    /// Port classes.
    pub port_classes: usize,
    /// Verdicts.
    pub verdicts: usize,
    /// Exact source addresses of both families together.
    pub addresses: usize,
    /// CIDR blocks of one family.
    pub blocks: usize,
}

impl Limits {
    /// What the kernel's maps hold. The datapath refuses tables that are larger.
    pub const KERNEL: Self = Self {
        classes: limits::MAX_CLASSES,
        // Column 0 and row 0 mean "never written" in the kernel, verdict 0 "no verdict": one less fits of each.
        columns: limits::MAX_COLUMNS - 1,
        rows: limits::MAX_ROWS - 1,
        sets: limits::MAX_SETS,
        port_classes: limits::MAX_PORT_CLASSES,
        verdicts: limits::MAX_VERDICTS - 1,
        addresses: limits::MAX_ADDRESSES,
        blocks: limits::MAX_BLOCKS,
    };

    /// What the numbers in `Tables` can name: for tables that no kernel gets.
    pub const WIDEST: Self = Self {
        classes: 1 << 31,
        columns: NUMBERS,
        rows: NUMBERS,
        sets: NUMBERS,
        port_classes: NUMBERS,
        verdicts: NUMBERS,
        addresses: 1 << 31,
        blocks: 1 << 31,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::KERNEL
    }
}

/// A count as an index type, or the error that it doesn't fit.
pub(super) fn index<T: TryFrom<usize>>(
    what: &'static str,
    count: usize,
    limit: usize,
    cause: impl FnOnce() -> String,
) -> Result<T, CompileError> {
    match T::try_from(count) {
        Ok(number) if count <= limit => Ok(number),
        _ => Err(CompileError::TooMany {
            what,
            count,
            limit,
            cause: cause(),
        }),
    }
}
