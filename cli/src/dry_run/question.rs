//! One question from files: the cell's verdict, or with a request the last word; on demand with all that was looked
//! at.
//!
//! Invariant: without a word about the first bytes the answer is the kernel's, which may be that L7 must say.

use anyhow::{Context as _, Result};
use serde_json::{Map, Value};
use thyra_policy_compiler::manifest::Manifests;
use thyra_policy_compiler::oracle::{self, Connection, Looked};
use thyra_policy_compiler::traffic::Traffic;

use super::batch::{self, Http};
use super::offline::{Offline, connection};
use super::{Answer, Answers, Args, Protocol};
use crate::verdict::Verdict;

/// What is known of the first bytes.
#[derive(Debug, clap::Args)]
#[group(id = "first", multiple = true)]
pub(super) struct First {
    /// A request: its method
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// A request: its raw path, with the query
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// A request: its host
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// A request: a header; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = pair)]
    headers: Vec<(String, String)>,
    /// A request: a claim of its valid token; may be repeated, then it is a list
    #[arg(long = "jwt-claim", value_name = "NAME=VALUE", value_parser = pair)]
    claims: Vec<(String, String)>,
    /// Server name of a TLS ClientHello
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "write it as NAME=VALUE".to_owned())
}

impl First {
    pub(super) fn is_empty(&self) -> bool {
        !self.is_request() && self.sni.is_none()
    }

    fn is_request(&self) -> bool {
        let named = self.method.is_some() || self.path.is_some() || self.host.is_some();
        named || !self.headers.is_empty() || !self.claims.is_empty()
    }

    fn traffic(&self, connection: &Connection, port: u16) -> Result<Option<Traffic>> {
        if self.is_empty() {
            return Ok(None);
        }
        let mut headers = collect(&self.headers);
        if let Some(host) = &self.host {
            headers.insert("host".into(), host.as_str().into());
        }
        let http = self.is_request().then(|| Http {
            method: self.method.clone(),
            path: self.path.clone(),
            headers,
        });
        let claims = (!self.claims.is_empty()).then(|| collect(&self.claims));
        let at = (connection, port);
        batch::traffic(http.as_ref(), self.sni.as_deref(), claims.as_ref(), at).map(Some)
    }
}

/// Names with a value, or with a list of them.
fn collect(pairs: &[(String, String)]) -> Map<String, Value> {
    let mut all = Map::new();
    for (name, value) in pairs {
        let value = Value::from(value.as_str());
        match all.get_mut(name) {
            None => {
                all.insert(name.clone(), value);
            }
            Some(Value::Array(list)) => list.push(value),
            Some(one) => *one = Value::Array(vec![one.take(), value]),
        }
    }
    all
}

/// The verdicts, and the differences from the oracle if it was asked.
pub(super) fn answer(manifests: &Manifests, args: &Args) -> Result<(Answers, Vec<String>)> {
    let offline = Offline::new(manifests, &[&args.from], args.protocol == Protocol::AsGiven)?;
    let source = offline.source(&args.from, args.ip == 6)?;
    let (mut answers, mut differences) = (Vec::new(), Vec::new());
    for target in offline.targets(&args.to, args.port)? {
        let connection = connection(source, &target)?;
        let traffic = args.first.traffic(&connection, args.port)?;
        let verdict = match &traffic {
            None => kernels(&offline, &connection, args.with_oracle, &mut differences)?,
            Some(traffic) => last(&offline, &connection, traffic, args.with_oracle, &mut differences)?,
        };
        let (endpoint, port) = target;
        answers.push(Answer {
            from: args.from.clone(),
            to: format!("{}/{}", endpoint.namespace, endpoint.name),
            port: port.into(),
            verdict,
            trace: if args.explain {
                trace(&offline, &connection, traffic.as_ref())
            } else {
                Vec::new()
            },
        });
    }
    Ok((Answers(answers), differences))
}

fn kernels(
    offline: &Offline,
    connection: &Connection,
    with_oracle: bool,
    differences: &mut Vec<String>,
) -> Result<Verdict> {
    let verdict = Verdict::from(offline.cell(connection)?);
    if with_oracle {
        let judged = Verdict::from(&oracle::judge(&offline.world, connection).verdict);
        if judged != verdict {
            differences.push(format!(
                "`{}` against `{}`",
                verdict.sentence(),
                judged.sentence()
            ));
        }
    }
    Ok(verdict)
}

fn last(
    offline: &Offline,
    connection: &Connection,
    traffic: &Traffic,
    with_oracle: bool,
    differences: &mut Vec<String>,
) -> Result<Verdict> {
    let mut totals = batch::Totals::default();
    let answer = batch::judge(offline, connection, traffic, with_oracle, &mut totals)
        .context("the compiled tables have no answer")?;
    if totals.differences > 0 {
        differences.push(format!("`{}` is not what the oracle says", answer.verdict()));
    }
    Ok(answer.into())
}

fn trace(offline: &Offline, connection: &Connection, traffic: Option<&Traffic>) -> Vec<String> {
    let looked = match traffic {
        None => oracle::judge(&offline.world, connection).trace,
        Some(traffic) => {
            let mut trace = Vec::new();
            let _ending = oracle::judge_traffic(&offline.world, connection, traffic, &mut trace);
            trace
        }
    };
    looked.iter().map(words).collect()
}

/// `shop/allow-front#0: not matched: to.ports wants [9090], is 8080`
fn words(looked: &Looked) -> String {
    let rule = looked.rule.map(|rule| format!("#{rule}")).unwrap_or_default();
    let clause = if looked.clause.is_empty() {
        String::new()
    } else {
        format!(": {}", looked.clause)
    };
    format!("{}{rule}: {}{clause}", looked.policy, looked.outcome)
}
