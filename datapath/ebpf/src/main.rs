//! The programs at the host end of a pod's veth: `to_pod` at its egress, `from_pod` at its ingress; and those that give
//! a connection to Envoy: `steer` in the pod's network namespace, `register` at Envoy's control group, `from_agent`
//! at the interface of what was held.
//!
//! Invariant: nothing is decided here. This crate loads bytes, looks up maps and carries out what the engine
//! says; off the BPF target it is an empty program, so that the whole workspace builds with one compiler.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics, asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "atomics of this target are intrinsics only")
)]

#[cfg(target_arch = "bpf")]
mod direct;
#[cfg(target_arch = "bpf")]
mod events;
#[cfg(target_arch = "bpf")]
mod flows;
#[cfg(target_arch = "bpf")]
mod held;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod node;
#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod segment;
#[cfg(target_arch = "bpf")]
mod skb;
#[cfg(target_arch = "bpf")]
mod steered;
#[cfg(target_arch = "bpf")]
mod steps;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
