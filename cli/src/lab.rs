//! `thyra lab`: a whole node out of network namespaces, with its control plane, its agents and its probes.
//!
//! Invariant: the machine's own network is never touched, and whatever a lab made is found again and removed by its id.

use std::process::ExitCode;

/// `thyra lab …`
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn main(_args: Args) -> ExitCode {
    ExitCode::SUCCESS
}
