//! The event ring: who may write to it how often, and when its reader is woken.
//!
//! Invariant: an event that is not written is counted as lost; a flood of refusals spends only its own
//! budget.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use thyra_datapath_abi::limits::{EVENT_BURST, EVENT_COST_NS, EVENT_RING_BYTES};
use thyra_datapath_abi::{Event, EventKind};

use crate::maps;
use crate::node::counters;

/// The reader polls by a timer; it is woken early when this much waits for it.
#[expect(clippy::as_conversions, reason = "a constant of `limits` in a const context")]
const WAKE_BYTES: u64 = EVENT_RING_BYTES as u64 / 4;

/// Writes an event, or counts it as lost. Inlined, so that it is made in the ring and not on the stack.
#[inline(always)]
pub fn report(kind: EventKind, event: &Event) {
    let now = if is_refusal(kind) {
        time_to_refuse()
    } else {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    };
    if now == 0 {
        return;
    }
    let Some(mut entry) = maps::EVENTS.reserve::<Event>(0) else {
        return lost();
    };
    entry.write(Event {
        time_ns: now,
        ..*event
    });
    entry.submit(wake());
}

/// The clock of the last timer interrupt, which costs a fraction of the exact one.
#[inline(always)]
pub fn coarse_now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The time, if there is budget to report a refusal; else 0, and one more is lost. A global function (`steps`), as is
/// the next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn time_to_refuse() -> u64 {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if spend(now) {
        now
    } else {
        lost();
        0
    }
}

/// Flags of a submit.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn wake() -> u64 {
    let waiting = maps::EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    if waiting > WAKE_BYTES {
        0
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}

/// What an outsider can cause at will.
#[inline(always)]
fn is_refusal(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Deny | EventKind::Revoke | EventKind::Spoof | EventKind::Malformed
    )
}

/// Takes one refusal out of this CPU's budget, which fills with time.
#[inline(always)]
fn spend(now: u64) -> bool {
    let Some(counters) = counters() else {
        return false;
    };
    // SAFETY: this CPU's own element.
    unsafe {
        let budget = &raw mut (*counters).budget;
        let credit = (*budget)
            .credit_ns
            .wrapping_add(now.wrapping_sub((*budget).filled_ns));
        let most = EVENT_BURST * EVENT_COST_NS;
        let credit = if credit > most { most } else { credit };
        (*budget).filled_ns = now;
        let enough = credit >= EVENT_COST_NS;
        (*budget).credit_ns = if enough { credit - EVENT_COST_NS } else { credit };
        enough
    }
}

#[inline(always)]
fn lost() {
    if let Some(counters) = counters() {
        // SAFETY: this CPU's own element.
        unsafe { (*counters).lost += 1 }
    }
}
