//! `thyra policy validate`: files before they are applied.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_policy_compiler::finding::{Code, Finding, Severity};
use thyra_policy_compiler::validate::{self, Report};

use super::{BAD_INPUT, read};
use crate::output::{Format, Show, show};

/// A warning, which `--strict` takes for an error.
const WARNED: u8 = 1;

/// What was found, as `-o json` shows it.
#[derive(Debug, Serialize)]
struct Findings {
    findings: Vec<Row>,
    /// What could not be checked for want of objects.
    unchecked: Vec<&'static str>,
    /// `kind (place)` of objects that can't change a verdict.
    ignored: Vec<String>,
    /// Objects that were read.
    objects: usize,
    errors: usize,
    warnings: usize,
}

#[derive(Debug, Serialize)]
struct Row {
    severity: Severity,
    code: Code,
    file: String,
    /// From 1; 0 when the file has no lines.
    line: u32,
    /// From 1, in characters.
    column: u32,
    /// `namespace/name`, where it is about one policy.
    #[serde(skip_serializing_if = "String::is_empty")]
    policy: String,
    message: String,
    /// `file:line:column`.
    #[serde(skip)]
    place: String,
}

impl From<Finding> for Row {
    fn from(finding: Finding) -> Self {
        Self {
            severity: finding.code.severity(),
            code: finding.code,
            place: finding.at.to_string(),
            file: finding.at.file.to_string(),
            line: finding.at.position.line,
            column: finding.at.position.column,
            policy: finding.object,
            message: finding.text,
        }
    }
}

impl Show for Findings {
    fn text(&self) -> String {
        let mut text = String::new();
        for row in &self.findings {
            let severity = match row.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            let policy = if row.policy.is_empty() {
                String::new()
            } else {
                format!("{}: ", row.policy)
            };
            text += &format!(
                "{}: {severity}[{}]: {policy}{}\n",
                row.place, row.code, row.message
            );
        }
        for ignored in &self.ignored {
            text += &format!("ignored: {ignored}\n");
        }
        for unchecked in &self.unchecked {
            text += &format!("not checked: {unchecked}\n");
        }
        text + &format!(
            "{} objects read, {} errors, {} warnings\n",
            self.objects, self.errors, self.warnings
        )
    }
}

impl Findings {
    fn new(report: Report, ignored: Vec<String>, objects: usize) -> Self {
        let count = |severity| {
            let of = |finding: &&Finding| finding.code.severity() == severity;
            report.findings.iter().filter(of).count()
        };
        Self {
            errors: count(Severity::Error),
            warnings: count(Severity::Warning),
            findings: report.findings.into_iter().map(Row::from).collect(),
            unchecked: report.unchecked.into_iter().collect(),
            ignored,
            objects,
        }
    }
}

/// Runs the command.
pub(super) fn run(files: &[PathBuf], strict: bool, format: Format) -> Result<ExitCode> {
    let findings = match read(files)? {
        Ok(manifests) => {
            let ignored = manifests.ignored.iter().map(|i| format!("{} ({})", i.kind, i.at));
            Findings::new(
                validate::validate(&manifests),
                ignored.collect(),
                manifests.objects.len(),
            )
        }
        Err(errors) => {
            let report = Report {
                findings: errors.into_iter().map(Finding::from).collect(),
                ..Report::default()
            };
            Findings::new(report, Vec::new(), 0)
        }
    };
    show(&findings, format)?;
    Ok(match (findings.errors, findings.warnings) {
        (1.., _) => ExitCode::from(BAD_INPUT),
        (0, 1..) if strict => ExitCode::from(WARNED),
        _ => ExitCode::SUCCESS,
    })
}
