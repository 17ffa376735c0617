//! The words by which the admin API names actions, modes and events.
//!
//! Invariant: they are an interface; a word never changes its meaning.

use thyra_datapath_abi::{Action, EventKind, Mode, Reason};

/// An action.
#[must_use]
pub fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        // Memory that nobody wrote denies.
        Action::Deny | Action::Missing => "deny",
        Action::Hold => "hold",
        Action::Proxy => "proxy",
    }
}

/// A mode.
#[must_use]
pub fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Off => "off",
        Mode::Audit => "audit",
        Mode::Enforce => "enforce",
    }
}

/// A kind of event.
#[must_use]
pub fn event(kind: EventKind) -> &'static str {
    match kind {
        EventKind::New => "new",
        EventKind::Deny => "drop",
        EventKind::Revoke => "revoke",
        EventKind::Spoof => "spoof",
        EventKind::Malformed => "malformed",
        EventKind::Audit => "audit",
        EventKind::Outbound => "outbound",
        EventKind::Answered => "answered",
    }
}

/// A reason's stable number.
#[must_use]
#[expect(
    clippy::as_conversions,
    reason = "the number is the enum's own representation"
)]
pub const fn number(reason: Reason) -> u8 {
    reason as u8
}

/// Whether a packet with this reason did not go on: numbers from `NoPolicy` on let it pass.
#[must_use]
pub const fn is_refusal(reason: Reason) -> bool {
    number(reason) < number(Reason::NoPolicy)
}
