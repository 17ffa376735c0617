//! What the project's verbs do and the rules of its tree; a library so that the rules also run as tests.

mod bench;
mod child;
mod cluster;
mod contained;
mod demo;
mod envoy;
mod go;
mod hash;
mod kernel;
mod lint;
mod mutants;
mod setup;
mod step;
mod suite;
pub mod tidy;
pub mod tree;
pub mod verb;
