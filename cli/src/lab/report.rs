//! What came of a scenario: one result an entry, as a table and as JSON.
//!
//! Invariant: every entry of probes.yaml has exactly one result, in order; `ok` is what the exit code counts.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, Color, Table};
use serde::Serialize;

use super::verdict::Verdict;

/// The whole.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) scenario: String,
    pub(crate) control_plane: String,
    pub(crate) generation: u64,
    pub(crate) probes: Vec<ProbeResult>,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

/// One entry's result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProbeResult {
    pub(crate) index: usize,
    pub(crate) kind: &'static str,
    pub(crate) from: Option<String>,
    pub(crate) to: Option<String>,
    pub(crate) port: Option<u16>,
    pub(crate) ip: Option<u8>,
    pub(crate) expect: String,
    pub(crate) actual: String,
    pub(crate) ok: bool,
    pub(crate) verdict: Option<Verdict>,
    pub(crate) latency_us: u64,
}

impl Report {
    pub(crate) fn new(
        scenario: String,
        control_plane: &str,
        generation: u64,
        probes: Vec<ProbeResult>,
    ) -> Self {
        let passed = probes.iter().filter(|probe| probe.ok).count();
        let failed = probes.len() - passed;
        Self {
            scenario,
            control_plane: control_plane.to_owned(),
            generation,
            probes,
            passed,
            failed,
        }
    }

    /// For people; `colour` only on a terminal.
    pub(crate) fn table(&self, colour: bool) -> String {
        let mut table = Table::new();
        table.load_preset(NOTHING);
        table.set_header(["", "FROM", "TO", "IP", "EXPECTED", "ACTUAL", "VERDICT", "TIME"]);
        for probe in &self.probes {
            let mark = Cell::new(if probe.ok { "✓" } else { "✗" });
            let mark = match (colour, probe.ok) {
                (true, true) => mark.fg(Color::Green),
                (true, false) => mark.fg(Color::Red),
                (false, _) => mark,
            };
            let mut row = vec![mark];
            row.extend(probe.columns().map(Cell::new));
            table.add_row(row);
        }
        let summary = format!(
            "{}: {} of {} as expected ({} control plane, generation {})",
            self.scenario,
            self.passed,
            self.probes.len(),
            self.control_plane,
            self.generation
        );
        format!("{}\n\n{summary}", table.trim_fmt())
    }
}

impl ProbeResult {
    fn columns(&self) -> [String; 7] {
        let to = match (&self.to, self.port) {
            (Some(to), Some(port)) => format!("{to}:{port}"),
            (Some(to), None) => to.clone(),
            (None, _) => String::new(),
        };
        let from = match (&self.from, self.kind) {
            (Some(from), "probe") => from.clone(),
            (Some(from), kind) => format!("{kind} {from}"),
            (None, kind) => kind.to_owned(),
        };
        let milliseconds = std::time::Duration::from_micros(self.latency_us).as_secs_f64() * 1000.0;
        [
            from,
            to,
            self.ip.map_or_else(String::new, |ip| ip.to_string()),
            self.expect.clone(),
            self.actual.clone(),
            self.verdict.as_ref().map_or_else(String::new, Verdict::sentence),
            format!("{milliseconds:.1} ms"),
        ]
    }
}

impl Verdict {
    /// `allow by shop/allow-front#0`, `deny: no allow rule matched`.
    fn sentence(&self) -> String {
        match (&self.policy, self.rule) {
            (Some(policy), Some(rule)) => format!("{} by {policy}#{rule}", self.action),
            (Some(policy), None) => format!("{} by {policy}", self.action),
            (None, _) if self.reason.is_empty() => self.action.clone(),
            (None, _) => format!("{}: {}", self.action, self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ProbeResult, Report, Verdict};

    fn result(ok: bool) -> ProbeResult {
        ProbeResult {
            index: 0,
            kind: "probe",
            from: Some("shop/front".into()),
            to: Some("shop/cart".into()),
            port: Some(8080),
            ip: Some(4),
            expect: "allow".into(),
            actual: if ok { "allow" } else { "deny" }.into(),
            ok,
            verdict: Some(Verdict {
                action: "allow".into(),
                policy: Some("shop/allow-front".into()),
                rule: Some(0),
                reason: "policy".into(),
                enforced_by: "kernel".into(),
            }),
            latency_us: 1500,
        }
    }

    #[test]
    fn the_counts_follow_the_results() {
        let report = Report::new("x".into(), "embedded", 3, vec![result(true), result(false)]);
        assert_eq!((report.passed, report.failed), (1, 1));
        let text = report.table(false);
        assert!(text.contains("shop/cart:8080"), "{text}");
        assert!(text.contains("allow by shop/allow-front#0"), "{text}");
        assert!(text.contains("x: 1 of 2 as expected"), "{text}");
    }

    #[test]
    fn the_json_has_every_field_of_the_interface() {
        let report = Report::new("x".into(), "embedded", 3, vec![result(true)]);
        let json = serde_json::to_value(&report).expect("plain data");
        for key in [
            "scenario",
            "control_plane",
            "generation",
            "probes",
            "passed",
            "failed",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        let probe = &json["probes"][0];
        for key in [
            "index",
            "kind",
            "from",
            "to",
            "port",
            "ip",
            "expect",
            "actual",
            "ok",
            "verdict",
            "latency_us",
        ] {
            assert!(probe.get(key).is_some(), "{key}");
        }
    }
}
