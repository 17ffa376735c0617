//! The house style of a single file: headers, names, lengths, widths, and nothing left unfinished.

use std::path::Path;

use super::{Finding, Source};

/// Columns; a line with a link may be longer, since a link can't be broken.
const WIDTH: usize = 120;
/// Lines of a file without its tests.
const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 70;
/// A script that grows past this is a program: it belongs in xtask.
const SCRIPT_LINES: usize = 60;
/// A longer file or function says so with its reason.
const LONG: &str = "// long: ";
/// In how many of its first lines a file gives that reason.
const FILE_REASON: usize = 20;
/// Names that say nothing; a file is named after what it holds.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "helper", "types", "misc"];
/// Spelt in halves, so that this file doesn't find itself.
const UNFINISHED: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
const UNSAFE_BLOCK: &str = concat!("unsafe", " {");
/// An error's text, by thiserror.
const ERROR: &str = "#[error(\"";
/// Names that keep their capital in an error's text.
const PROPER: [&str; 5] = ["Envoy", "Istio", "Kubernetes", "Linux", "Thyra"];
/// How far above an unsafe block its reason may start.
const SAFETY_ABOVE: usize = 8;

/// Every rule for one file.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    if source.is_rust() {
        if !source.is_generated() {
            findings.extend(rust(source));
        }
    } else if is_script(source) {
        findings.extend(script(source));
    }
    if source.is_rust() || source.is_markdown() || is_script(source) {
        findings.extend(unfinished(source));
    }
    findings
}

fn rust(source: &Source) -> Vec<Finding> {
    let mut findings = header_and_name(source);
    let lines: Vec<&str> = source.text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        if line.chars().count() > WIDTH && !line.contains("://") {
            findings.push(Finding::new(
                &source.file,
                index + 1,
                format!("wider than {WIDTH} columns; break the line"),
            ));
        }
        if let Some(what) = message_fault(line) {
            findings.push(Finding::new(&source.file, index + 1, what));
        }
        if opens_unsafe(line)
            && !lines[index.saturating_sub(SAFETY_ABOVE)..=index]
                .iter()
                .any(|line| line.contains("SAFETY:"))
        {
            findings.push(Finding::new(
                &source.file,
                index + 1,
                "unsafe without `// SAFETY:` above; say why it is sound",
            ));
        }
    }
    if !source.is_test() {
        findings.extend(lengths(&source.file, code_before_tests(&lines)));
    }
    findings
}

fn header_and_name(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let stem = source
        .file
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default();
    if stem == "mod" {
        findings.push(Finding::new(
            &source.file,
            0,
            "modules name themselves: move `x/mod.rs` to `x.rs`",
        ));
    }
    if EMPTY_NAMES.contains(&stem.as_str()) {
        findings.push(Finding::new(
            &source.file,
            0,
            format!("`{stem}` says nothing; name the file after what it holds"),
        ));
    }
    let starts = source
        .text
        .lines()
        .find(|line| !line.trim().is_empty() && !line.starts_with("#!"));
    if !starts.is_some_and(|line| line.starts_with("//!") || line.starts_with("// long: ")) {
        findings.push(Finding::new(
            &source.file,
            1,
            "no `//!` header; say in one sentence what the file is",
        ));
    }
    findings
}

/// An error's text reads well after `thyra: ` and before `: its source`; an acronym or a name may start it.
fn message_fault(line: &str) -> Option<&'static str> {
    let text = line.trim_start().strip_prefix(ERROR)?;
    let mut letters = text.chars();
    let (first, second) = (letters.next()?, letters.next()?);
    if first.is_ascii_uppercase()
        && second.is_ascii_lowercase()
        && !PROPER.iter().any(|name| text.starts_with(name))
    {
        return Some("an error's text starts in lower case");
    }
    text.contains(".\")]")
        .then_some("an error's text ends without a full stop")
}

/// `unsafe` that opens a block or an impl; an `unsafe fn` states its contract in its documentation.
fn opens_unsafe(line: &str) -> bool {
    let code = line.trim_start();
    !code.starts_with("//") && (code.contains(UNSAFE_BLOCK) || code.starts_with("unsafe impl"))
}

/// The lines up to the unit tests, which come last in a file.
fn code_before_tests<'a>(lines: &'a [&'a str]) -> &'a [&'a str] {
    let tests = lines
        .iter()
        .position(|line| line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test"));
    &lines[..tests.unwrap_or(lines.len())]
}

fn lengths(file: &Path, lines: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let excused = lines.iter().take(FILE_REASON).any(|line| line.starts_with(LONG));
    if lines.len() > FILE_LINES && !excused {
        let what = format!(
            "{} lines; split the file, or start it with `{LONG}<reason>`",
            lines.len()
        );
        findings.push(Finding::new(file, 0, what));
    }
    for start in (0..lines.len()).filter(|index| starts_function(lines[*index])) {
        let length = function_length(&lines[start..]);
        if length > FUNCTION_LINES && !has_reason_above(lines, start) {
            let what = format!("a function of {length} lines; split it, or put `{LONG}<reason>` above it");
            findings.push(Finding::new(file, start + 1, what));
        }
    }
    findings
}

fn starts_function(line: &str) -> bool {
    let mut rest = line.trim_start();
    loop {
        if rest.starts_with("fn ") {
            return true;
        }
        let Some((word, after)) = rest.split_once(' ') else {
            return false;
        };
        // `pub(in path)` has a space of its own.
        let restricts = word.ends_with(')') && line.trim_start().starts_with("pub(");
        let qualifies = ["async", "const", "unsafe", "extern", "\"C\""].contains(&word);
        if !(word.starts_with("pub") || restricts || qualifies) {
            return false;
        }
        rest = after;
    }
}

/// Counted by indentation, which rustfmt guarantees: the body ends at the first `}` as deep as the function's
/// own line.
fn function_length(lines: &[&str]) -> usize {
    let depth = |line: &str| line.len() - line.trim_start().len();
    let own = depth(lines[0]);
    let mut in_body = false;
    for (index, line) in lines.iter().enumerate() {
        let ends_here = index > 0 && depth(line) == own && line.trim_start().starts_with('}');
        let whole_line = index == 0 && line.trim_end().ends_with('}');
        let no_body = !in_body && line.trim_end().ends_with(';');
        if ends_here || whole_line || no_body {
            return index + 1;
        }
        in_body |= line.trim_end().ends_with('{');
    }
    lines.len()
}

fn has_reason_above(lines: &[&str], start: usize) -> bool {
    let above = lines[..start].iter().rev().map(|line| line.trim_start());
    above
        .take_while(|line| line.starts_with("//") || line.starts_with('#'))
        .any(|line| line.starts_with(LONG))
}

fn is_script(source: &Source) -> bool {
    source.file.extension().is_some_and(|extension| extension == "sh")
        || source
            .text
            .lines()
            .next()
            .is_some_and(|line| line.starts_with("#!") && line.contains("sh"))
}

fn script(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let count = source.text.lines().count();
    if count > SCRIPT_LINES {
        let what = format!("{count} lines; what a script can't do in {SCRIPT_LINES} belongs in xtask");
        findings.push(Finding::new(&source.file, 0, what));
    }
    if !source.text.lines().any(|line| line == "set -euo pipefail") {
        findings.push(Finding::new(
            &source.file,
            0,
            "no `set -euo pipefail`; a failing step must end the script",
        ));
    }
    findings
}

/// What is left for later has an issue's number in brackets behind it.
fn unfinished(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in source.text.lines().enumerate() {
        for word in UNFINISHED {
            let bare = line.match_indices(word).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = &line[at + word.len()..];
                let whole =
                    !before.is_some_and(char::is_alphanumeric) && !after.starts_with(char::is_alphanumeric);
                whole && !after.starts_with("(#")
            });
            if bare {
                findings.push(Finding::new(
                    &source.file,
                    index + 1,
                    format!("`{word}` without an issue; write `{word}(#N)`"),
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::{Source, UNSAFE_BLOCK, check, function_length, starts_function};

    fn findings(file: &str, text: &str) -> Vec<String> {
        check(&Source {
            file: file.into(),
            text: text.to_owned(),
        })
        .into_iter()
        .map(|finding| finding.what)
        .collect()
    }

    fn found(file: &str, text: &str, part: &str) {
        let found = findings(file, text);
        assert!(
            found.len() == 1 && found[0].contains(part),
            "wanted `{part}`, got {found:?}"
        );
    }

    #[test]
    fn a_good_file_has_no_findings() {
        assert_eq!(
            findings("a/src/noun.rs", "//! What it is.\n\nfn short() {}\n"),
            [""; 0]
        );
        assert_eq!(findings("a/src/generated/x.rs", "fn no_header() {}\n"), [""; 0]);
    }

    #[test]
    fn names_and_headers_are_required() {
        found("a/src/x/mod.rs", "//! X.\n", "move `x/mod.rs`");
        found("a/src/utils.rs", "//! X.\n", "says nothing");
        found("a/src/noun.rs", "fn f() {}\n", "header");
    }

    #[test]
    fn a_wide_line_is_found_unless_it_is_a_link() {
        let wide = "x".repeat(120);
        found("a.rs", &format!("//! X.\n// {wide}\n"), "wider");
        assert_eq!(findings("a.rs", &format!("//! X.\n// https://{wide}\n")), [""; 0]);
    }

    #[test]
    fn a_long_function_needs_a_reason() {
        let body = "    step();\n".repeat(80);
        let text = format!("//! X.\n\n/// Doc.\npub async fn long() {{\n{body}}}\n");
        found("a.rs", &text, "a function of 82 lines");
        let excused = text.replace("/// Doc.", "/// Doc.\n// long: one table\n#[inline]");
        assert_eq!(findings("a.rs", &excused), [""; 0]);
        let in_tests = text.replace("/// Doc.", "#[cfg(test)]");
        assert_eq!(findings("a.rs", &in_tests), [""; 0]);
    }

    #[test]
    fn a_long_file_needs_a_reason() {
        let text = format!("//! X.\n{}", "const A: u8 = 0;\n".repeat(600));
        found("a.rs", &text, "601 lines");
        assert_eq!(findings("a.rs", &format!("// long: a table\n{text}")), [""; 0]);
        assert_eq!(findings("a/tests/a.rs", &text), [""; 0]);
    }

    #[test]
    fn functions_are_seen_however_they_are_qualified() {
        for line in [
            "fn a() {",
            "    pub(crate) const fn a() {",
            "pub(in crate::x) unsafe extern \"C\" fn a() {",
        ] {
            assert!(starts_function(line), "{line}");
        }
        assert!(!starts_function("let f: fn (u8) = g;"));
        assert_eq!(function_length(&["fn a();", "fn b() {"]), 1);
        assert_eq!(
            function_length(&[
                "    fn a(",
                "        b: u8,",
                "    ) -> u8 {",
                "        b",
                "    }",
                "}"
            ]),
            5
        );
    }

    #[test]
    fn unfinished_work_names_its_issue() {
        let word = concat!("TO", "DO");
        found("a.rs", &format!("//! X.\n// {word}: later\n"), "without an issue");
        assert_eq!(
            findings("a.rs", &format!("//! X.\n// {word}(#12): later\n")),
            [""; 0]
        );
        assert_eq!(
            findings("a.rs", &format!("//! X.\n// {word}S is a name\n")),
            [""; 0]
        );
    }

    #[test]
    fn unsafe_says_why_it_is_sound() {
        let text = format!("//! X.\nfn f() {{\n    {UNSAFE_BLOCK} g() }}\n}}\n");
        found("a.rs", &text, "SAFETY");
        let reasoned = text.replace("{\n", "{\n    // SAFETY: g is pure.\n");
        assert_eq!(findings("a.rs", &reasoned), [""; 0]);
    }

    #[test]
    fn an_errors_text_is_lower_case_without_a_full_stop() {
        found("a.rs", "//! X.\n#[error(\"Bad port\")]\n", "lower case");
        found("a.rs", "//! X.\n#[error(\"bad port.\")]\n", "full stop");
        for good in ["bad port `{0}`", "TLS failed", "Envoy is gone"] {
            assert_eq!(
                findings("a.rs", &format!("//! X.\n#[error(\"{good}\")]\n")),
                [""; 0]
            );
        }
    }

    #[test]
    fn a_script_is_short_and_stops_at_the_first_failure() {
        found("scripts/a.sh", "#!/usr/bin/env bash\ntrue\n", "pipefail");
        found(
            "scripts/a.sh",
            &format!("set -euo pipefail\n{}", "true\n".repeat(70)),
            "belongs in xtask",
        );
    }
}
