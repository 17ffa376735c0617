//! `--connections`: one JSON connection a line in, one JSON verdict a line out, in the same order. An interface for
//! other people's test suites.
//!
//! Invariant: a line that can't be judged has an answer in its place, `error`, and the rest is judged all the same.

use std::io::{BufRead, Write};
use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables::RuleRef;
use thyra_policy_compiler::oracle::{self, Connection};
use thyra_policy_compiler::residual::Ending;
use thyra_policy_compiler::traffic::{Request, Traffic};

use super::offline::{Offline, Target, connection};
use crate::verdict::{Verdict, Would};

/// Longest line, bytes: a request's head with room to spare.
const MAX_LINE: u64 = 1 << 20;

/// One connection.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    from: String,
    to: String,
    port: u16,
    #[serde(default)]
    ip: Option<u8>,
    #[serde(default)]
    http: Option<Http>,
    #[serde(default)]
    sni: Option<String>,
    #[serde(default)]
    claims: Option<Map<String, Value>>,
}

/// The request, as far as the line says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Http {
    /// `GET` when not said.
    #[serde(default)]
    pub(super) method: Option<String>,
    /// The raw target; `/` when not said.
    #[serde(default)]
    pub(super) path: Option<String>,
    /// A name with one value or several.
    #[serde(default)]
    pub(super) headers: Map<String, Value>,
}

/// One verdict.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Answer {
    verdict: &'static str,
    policy: Option<String>,
    rule: Option<u32>,
    enforced_by: Option<&'static str>,
    reason: String,
    #[serde(skip)]
    reason_number: u32,
    would: Option<&'static str>,
    /// Backends of a Service that end otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    differs: Vec<Differing>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Differing {
    to: String,
    verdict: &'static str,
}

/// What a run of lines came to.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) errors: usize,
    pub(super) differences: usize,
}

/// Answers every line of `input`.
pub(super) fn run(
    offline: &Offline,
    with_oracle: bool,
    mut input: impl BufRead,
    output: &mut impl Write,
) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut text = Vec::new();
    for number in 1_u64.. {
        text.clear();
        let mut head = std::io::Read::take(&mut input, MAX_LINE);
        let read = head.read_until(b'\n', &mut text);
        let whole = head.limit() > 0 || text.ends_with(b"\n");
        if read.context("read the connections")? == 0 {
            break;
        }
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let answer = if whole {
            line(offline, &text, with_oracle, &mut totals)
        } else {
            // The rest of it is no line of its own.
            input.skip_until(b'\n').context("read the connections")?;
            Err(anyhow!("it is longer than {MAX_LINE} bytes"))
        };
        let answer = answer.unwrap_or_else(|error| {
            totals.errors += 1;
            Answer::error(format!("line {number}: {error:#}"))
        });
        serde_json::to_writer(&mut *output, &answer).context("write a verdict")?;
        output.write_all(b"\n").context("write a verdict")?;
    }
    output.flush().context("write the verdicts")?;
    Ok(totals)
}

fn line(offline: &Offline, text: &[u8], with_oracle: bool, totals: &mut Totals) -> Result<Answer> {
    let line: Line = serde_json::from_slice(text).context("not a connection")?;
    let v6 = match line.ip {
        None | Some(4) => false,
        Some(6) => true,
        Some(other) => bail!("`ip` is {other}; there are 4 and 6"),
    };
    // An address says its own family.
    let v6 = line
        .from
        .parse::<IpAddr>()
        .map_or(v6, |address| address.to_canonical().is_ipv6());
    let source = offline.source(&line.from, v6)?;
    let mut answer: Option<Answer> = None;
    for target in offline.targets(&line.to, line.port)? {
        let connection = connection(source, &target)?;
        let traffic = traffic(
            line.http.as_ref(),
            line.sni.as_deref(),
            line.claims.as_ref(),
            (&connection, line.port),
        )?;
        let one = judge(offline, &connection, &traffic, with_oracle, totals)?;
        match &mut answer {
            None => answer = Some(one),
            Some(first) if first.verdict != one.verdict => {
                first.differs.push(differing(&target, one.verdict))
            }
            Some(_) => {}
        }
    }
    answer.context("nothing to judge")
}

fn differing((endpoint, _): &Target, verdict: &'static str) -> Differing {
    Differing {
        to: format!("{}/{}", endpoint.namespace, endpoint.name),
        verdict,
    }
}

/// The first bytes that a line describes, on a connection that dialled `port`.
pub(super) fn traffic(
    http: Option<&Http>,
    sni: Option<&str>,
    claims: Option<&Map<String, Value>>,
    (connection, port): (&Connection, u16),
) -> Result<Traffic> {
    let request = |http: &Http| -> Result<Request> {
        let mut request = Request {
            method: http.method.clone().unwrap_or_else(|| "GET".into()),
            target: http.path.clone().unwrap_or_else(|| "/".into()),
            authority: match connection.destination {
                IpAddr::V4(address) => format!("{address}:{port}"),
                IpAddr::V6(address) => format!("[{address}]:{port}"),
            },
            headers: Vec::new(),
            claims: claims.cloned(),
        };
        for (name, value) in &http.headers {
            let name = name.to_ascii_lowercase();
            for value in texts(&name, value)? {
                match name.as_str() {
                    "host" | ":authority" => request.authority = value,
                    ":method" => request.method = value,
                    ":path" => request.target = value,
                    _ => request.headers.push((name.clone(), value)),
                }
            }
        }
        Ok(request)
    };
    Ok(Traffic {
        sni: sni.map(str::to_owned),
        http: http.map(request).transpose()?,
        ..Traffic::default()
    })
}

fn texts(name: &str, value: &Value) -> Result<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let all = match value {
        Value::Array(list) => list.iter().map(text).collect(),
        value => text(value).map(|text| vec![text]),
    };
    all.with_context(|| format!("header `{name}`: give a text or a list of texts"))
}

/// The answer on one connection.
pub(super) fn judge(
    offline: &Offline,
    connection: &Connection,
    traffic: &Traffic,
    with_oracle: bool,
    totals: &mut Totals,
) -> Result<Answer> {
    let ending = offline.end(connection, traffic)?;
    let would = offline.would(connection, traffic)?;
    if with_oracle {
        let wanted = oracle::judge_traffic(&offline.world, connection, traffic, &mut Vec::new());
        let tried = || oracle::would(&offline.world, connection, traffic).action;
        if wanted.action != ending.action || would.is_some_and(|would| would != tried()) {
            totals.differences += 1;
        }
    }
    let would = would.map(word).filter(|would| *would != word(ending.action));
    let by_envoy = offline.cell(connection)?.residual.is_some();
    Ok(Answer::new(&ending, by_envoy, would))
}

impl Answer {
    fn new(ending: &Ending<RuleRef>, by_envoy: bool, would: Option<&'static str>) -> Self {
        Self {
            verdict: word(ending.action),
            policy: ending.rule.as_ref().map(|rule| rule.policy.to_string()),
            rule: ending.rule.as_ref().and_then(|rule| rule.rule),
            enforced_by: Some(if by_envoy { "kernel+envoy" } else { "kernel" }),
            reason: ending.reason.text().to_owned(),
            reason_number: ending.reason.number().into(),
            would,
            differs: Vec::new(),
        }
    }

    fn error(reason: String) -> Self {
        Self {
            verdict: "error",
            policy: None,
            rule: None,
            enforced_by: None,
            reason,
            reason_number: 0,
            would: None,
            differs: Vec::new(),
        }
    }

    /// `allow`, `deny`, `custom`.
    pub(super) fn verdict(&self) -> &'static str {
        self.verdict
    }
}

impl From<Answer> for Verdict {
    fn from(answer: Answer) -> Self {
        Self {
            action: answer.verdict.to_owned(),
            reason_number: answer.reason_number,
            reason: answer.reason,
            policy: answer.policy,
            rule: answer.rule,
            because: Vec::new(),
            residual: None,
            would: answer.would.map(|would| Would {
                action: would.to_owned(),
                policy: None,
                rule: None,
            }),
            enforced_by: answer.enforced_by.unwrap_or_default().to_owned(),
        }
    }
}

/// Held back is refused, to whoever asks for a verdict.
const fn word(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Proxy => "custom",
        Action::Deny | Action::Hold | Action::Missing => "deny",
    }
}

#[cfg(test)]
mod tests;
