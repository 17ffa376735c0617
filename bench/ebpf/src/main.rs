//! The usual way to enforce identities in the kernel, for comparison: an LPM trie from address to identity, then three
//! probes of a hash table of rules (as Cilium's policy map has them), and an LRU table of a pod's own connections.
//!
//! Invariant: no more than that. IPv4 and TCP without options of IP; no counters, no events, no resets, no check of
//! sources: whatever it leaves out makes it faster.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
