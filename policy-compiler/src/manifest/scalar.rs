//! What an unquoted scalar means to Kubernetes, whose reader follows YAML 1.1.
//!
//! Invariant: `on`, `n`, `yes` and their kin are booleans; dates and everything else that is not named here
//! are text.

use super::node::Value;

const TRUE: [&str; 11] = [
    "y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON",
];
const FALSE: [&str; 11] = [
    "n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF",
];
const NULL: [&str; 5] = ["", "~", "null", "Null", "NULL"];

/// The value of a plain scalar.
pub(super) fn plain(text: &str) -> Value {
    if NULL.contains(&text) {
        return Value::Null;
    }
    for (list, value) in [(&TRUE, true), (&FALSE, false)] {
        if let Some(word) = list.iter().find(|word| **word == text) {
            return Value::Bool(value, word);
        }
    }
    number(text).unwrap_or_else(|| Value::Text(text.into()))
}

/// The value of a plain scalar that is a mapping key: Kubernetes turns every key into a string.
pub(super) fn key(text: &str) -> Box<str> {
    match plain(text) {
        Value::Bool(value, _) => if value { "true" } else { "false" }.into(),
        Value::Whole(number) => number.to_string().into(),
        Value::Null | Value::Float(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => text.into(),
    }
}

fn number(text: &str) -> Option<Value> {
    let first = text.bytes().next()?;
    if !(first.is_ascii_digit() || matches!(first, b'+' | b'-' | b'.')) {
        return None;
    }
    let digits = text.replace('_', "");
    if let Some(whole) = whole(&digits) {
        return Some(Value::Whole(whole));
    }
    let floating = is_float(&digits).then(|| digits.parse().ok()).flatten();
    let special = || match text {
        ".nan" | ".NaN" | ".NAN" => Some(f64::NAN),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Some(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => Some(f64::NEG_INFINITY),
        _ => None,
    };
    floating.or_else(special).map(Value::Float)
}

/// Decimal, `0x`, `0o`, `0b`, or octal by a leading 0.
fn whole(text: &str) -> Option<i64> {
    let (sign, rest) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    let prefixed = rest.get(..2).map(str::to_ascii_lowercase);
    let (digits, radix) = match prefixed.as_deref() {
        Some("0x") => (&rest[2..], 16),
        Some("0o") => (&rest[2..], 8),
        Some("0b") => (&rest[2..], 2),
        _ if rest.len() > 1 && rest.starts_with('0') => (&rest[1..], 8),
        _ => (rest, 10),
    };
    let plain = digits.bytes().all(|b| b.is_ascii_alphanumeric());
    i64::from_str_radix(&format!("{sign}{digits}"), radix)
        .ok()
        .filter(|_| plain)
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let exponent_fits = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['-', '+']).unwrap_or(e);
        !e.is_empty() && digits(e)
    });
    let mantissa_fits = match mantissa.split_once('.') {
        Some(("", fraction)) => !fraction.is_empty() && digits(fraction),
        Some((whole, fraction)) => digits(whole) && digits(fraction),
        None => !mantissa.is_empty() && digits(mantissa),
    };
    mantissa_fits && exponent_fits
}
