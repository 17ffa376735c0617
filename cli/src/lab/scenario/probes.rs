//! `probes.yaml`: what is tried, in order, and what must come of it.
//!
//! Invariant: an entry that is read can be run: its kind, its peers' form and its expectation fit each other.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::lab::yaml::{Fields, Node, Problem};

/// How long a probe waits for anything before it calls it a drop.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);

/// One entry of the list.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) file: Arc<Path>,
    pub(crate) line: usize,
    pub(crate) action: Action,
}

#[derive(Clone, Debug)]
pub(crate) enum Action {
    Probe(Probe),
    /// Manifest files, relative to the scenario.
    Apply(Vec<PathBuf>),
    /// Manifest files, relative to the scenario.
    Delete(Vec<PathBuf>),
    Open {
        name: String,
        probe: Probe,
    },
    ExpectOpen {
        name: String,
        state: ConnectionState,
    },
}

/// One connection attempt.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) from: Peer,
    pub(crate) to: Target,
    pub(crate) port: u16,
    pub(crate) kind: Kind,
    pub(crate) family: Family,
    pub(crate) timeout: Duration,
    pub(crate) expect: Expect,
}

/// Who dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// `namespace/pod`.
    Pod(String),
    /// The first node itself.
    Host,
    /// 203.0.113.7, 2001:db8::7.
    Outside,
}

/// Who is dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// `namespace/pod`.
    Pod(String),
    /// `namespace/name`.
    Service(String),
    /// The first node itself.
    Host,
    /// 203.0.113.7, 2001:db8::7.
    Outside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// What is sent.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// One line (a GET to a port that speaks HTTP).
    Plain,
    /// One datagram.
    Udp,
    Http(HttpRequest),
    Tls(TlsHello),
}

#[derive(Clone, Debug)]
pub(crate) struct HttpRequest {
    pub(crate) method: String,
    /// Raw, as given.
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    /// 1 or 2.
    pub(crate) version: u8,
    pub(crate) body: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct TlsHello {
    pub(crate) sni: Option<String>,
    pub(crate) alpn: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    Allow,
    Deny,
    Drop,
    /// An HTTP status.
    Status(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionState {
    Alive,
    Reset,
    Timeout,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(pod) => f.write_str(pod),
            Self::Host => f.write_str("host"),
            Self::Outside => f.write_str("outside"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(pod) => f.write_str(pod),
            Self::Service(service) => write!(f, "service/{service}"),
            Self::Host => f.write_str("host"),
            Self::Outside => f.write_str("outside"),
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::Deny => f.write_str("deny"),
            Self::Drop => f.write_str("drop"),
            Self::Status(status) => write!(f, "{status}"),
        }
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alive => "alive",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
        })
    }
}

impl Family {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(crate) fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

impl Entry {
    /// A problem with this entry, with its place.
    pub(crate) fn problem(&self, text: String) -> String {
        Problem {
            file: self.file.clone(),
            line: self.line,
            text,
        }
        .to_string()
    }
}

/// Reads `probes.yaml`; no file is no probes.
///
/// # Errors
/// Every entry that can't be used.
pub(crate) fn read(path: &Path) -> Result<Vec<Entry>, Vec<Problem>> {
    let Some(node) = super::read_yaml(path).map_err(|problem| vec![problem])? else {
        return Ok(Vec::new());
    };
    let mut entries = Vec::new();
    let mut problems = Vec::new();
    for item in node.list("probes.yaml").map_err(|problem| vec![problem])? {
        match read_action(item) {
            Ok(action) => entries.push(Entry {
                file: item.file.clone(),
                line: item.line,
                action,
            }),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        Ok(entries)
    } else {
        Err(problems)
    }
}

fn read_action(item: &Node) -> Result<Action, Problem> {
    let has = |key: &str| {
        item.map("an entry").map(|entries| {
            entries
                .iter()
                .any(|(name, _)| name.text("a key").is_ok_and(|name| name == key))
        })
    };
    if has("apply")? {
        return read_files(item, "apply").map(Action::Apply);
    }
    if has("delete")? {
        return read_files(item, "delete").map(Action::Delete);
    }
    if has("open")? {
        let fields = item.fields("an `open` entry", &["open"])?;
        return read_open(fields.need("open")?);
    }
    if has("expect_open")? {
        let fields = item.fields("an `expect_open` entry", &["expect_open"])?;
        return read_expect_open(fields.need("expect_open")?);
    }
    let known = [
        "from", "to", "port", "http", "tls", "udp", "ip", "timeout", "expect",
    ];
    let fields = item.fields("a probe", &known)?;
    let kind = read_kind(item, &fields)?;
    let expect = read_expect(fields.need("expect")?, &kind)?;
    read_probe(&fields, kind, expect).map(Action::Probe)
}

fn read_files(item: &Node, key: &'static str) -> Result<Vec<PathBuf>, Problem> {
    let fields = item.fields("an `apply` or `delete` entry", &[key])?;
    let value = fields.need(key)?;
    match &value.value {
        crate::lab::yaml::Value::List(items) => items
            .iter()
            .map(|item| item.text(key).map(PathBuf::from))
            .collect(),
        _ => Ok(vec![PathBuf::from(value.text(key)?)]),
    }
}

fn read_open(node: &Node) -> Result<Action, Problem> {
    let fields = node.fields("`open`", &["name", "from", "to", "port", "ip", "timeout"])?;
    let name = fields.need("name")?.text("name")?.to_owned();
    Ok(Action::Open {
        name,
        probe: read_probe(&fields, Kind::Plain, Expect::Allow)?,
    })
}

fn read_expect_open(node: &Node) -> Result<Action, Problem> {
    let fields = node.fields("`expect_open`", &["name", "state"])?;
    let state = fields.need("state")?;
    let state = match state.text("state")? {
        "alive" => ConnectionState::Alive,
        "reset" => ConnectionState::Reset,
        "timeout" => ConnectionState::Timeout,
        other => {
            return Err(state.problem(format_args!(
                "`state` is `{other}`; it must be alive, reset or timeout"
            )));
        }
    };
    Ok(Action::ExpectOpen {
        name: fields.need("name")?.text("name")?.to_owned(),
        state,
    })
}

fn read_probe(fields: &Fields<'_>, kind: Kind, expect: Expect) -> Result<Probe, Problem> {
    let port = fields.need("port")?;
    let number: u16 = port.parsed("port", "a number from 1 to 65535")?;
    if number == 0 {
        return Err(port.problem("`port` is `0`; it must be a number from 1 to 65535"));
    }
    let family = match fields.get("ip") {
        None => Family::V4,
        Some(ip) => match ip.text("ip")? {
            "4" => Family::V4,
            "6" => Family::V6,
            other => return Err(ip.problem(format_args!("`ip` is `{other}`; it must be 4 or 6"))),
        },
    };
    Ok(Probe {
        from: read_peer(fields.need("from")?)?,
        to: read_target(fields.need("to")?)?,
        port: number,
        kind,
        family,
        timeout: fields.get("timeout").map_or(Ok(DEFAULT_TIMEOUT), read_duration)?,
        expect,
    })
}

fn read_peer(node: &Node) -> Result<Peer, Problem> {
    match node.text("from")? {
        "host" => Ok(Peer::Host),
        "outside" => Ok(Peer::Outside),
        text if is_path(text, 2) => Ok(Peer::Pod(text.to_owned())),
        text => Err(node.problem(format_args!(
            "`from` is `{text}`; it must be namespace/pod, host or outside"
        ))),
    }
}

fn read_target(node: &Node) -> Result<Target, Problem> {
    let text = node.text("to")?;
    match text.strip_prefix("service/") {
        Some(service) if is_path(service, 2) => return Ok(Target::Service(service.to_owned())),
        _ => {}
    }
    match text {
        "host" => Ok(Target::Host),
        "outside" => Ok(Target::Outside),
        _ if is_path(text, 2) => Ok(Target::Pod(text.to_owned())),
        _ => Err(node.problem(format_args!(
            "`to` is `{text}`; it must be namespace/pod or service/namespace/name"
        ))),
    }
}

fn is_path(text: &str, parts: usize) -> bool {
    text.split('/').count() == parts && text.split('/').all(|part| !part.is_empty())
}

fn read_duration(node: &Node) -> Result<Duration, Problem> {
    let text = node.text("timeout")?;
    let bad = || node.problem(format_args!("`timeout` is `{text}`; it must be like 2s or 500ms"));
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let number: f64 = number.trim().parse().map_err(|_| bad())?;
    let seconds = number * unit;
    if seconds > 0.0 && seconds <= 600.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(bad())
    }
}

fn read_expect(node: &Node, kind: &Kind) -> Result<Expect, Problem> {
    let text = node.text("expect")?;
    let expect = match text {
        "allow" => Expect::Allow,
        "deny" => Expect::Deny,
        "drop" => Expect::Drop,
        _ => match text.parse::<u16>() {
            Ok(status) if (100..1000).contains(&status) => Expect::Status(status),
            _ => {
                return Err(node.problem(format_args!(
                    "`expect` is `{text}`; it must be allow, deny, drop or an HTTP status"
                )));
            }
        },
    };
    if matches!(expect, Expect::Status(_)) && !matches!(kind, Kind::Http(_)) {
        return Err(node.problem("`expect` is an HTTP status, but the probe has no `http`; add it"));
    }
    Ok(expect)
}

fn read_kind(item: &Node, fields: &Fields<'_>) -> Result<Kind, Problem> {
    let udp = fields.get("udp").map_or(Ok(false), |udp| udp.boolean("udp"))?;
    match (fields.get("http"), fields.get("tls"), udp) {
        (None, None, false) => Ok(Kind::Plain),
        (None, None, true) => Ok(Kind::Udp),
        (Some(http), None, false) => read_http(http).map(Kind::Http),
        (None, Some(tls), false) => read_tls(tls).map(Kind::Tls),
        _ => Err(item.problem("`http`, `tls` and `udp` exclude each other; keep one")),
    }
}

fn read_http(node: &Node) -> Result<HttpRequest, Problem> {
    let fields = node.fields("`http`", &["method", "path", "headers", "version", "body"])?;
    let text = |key: &str, default: &str| -> Result<String, Problem> {
        fields
            .get(key)
            .map_or(Ok(default.to_owned()), |value| value.text(key).map(str::to_owned))
    };
    let version = match fields.get("version") {
        None => 1,
        Some(version) => match version.text("version")? {
            "1" => 1,
            "2" => 2,
            other => return Err(version.problem(format_args!("`version` is `{other}`; it must be 1 or 2"))),
        },
    };
    let mut headers = Vec::new();
    if let Some(given) = fields.get("headers") {
        for (key, value) in given.map("`headers`")? {
            headers.push((
                key.text("a header")?.to_owned(),
                value.text("a header's value")?.to_owned(),
            ));
        }
    }
    Ok(HttpRequest {
        method: text("method", "GET")?,
        path: text("path", "/")?,
        headers,
        version,
        body: text("body", "")?,
    })
}

fn read_tls(node: &Node) -> Result<TlsHello, Problem> {
    let fields = node.fields("`tls`", &["sni", "alpn"])?;
    let sni = fields
        .get("sni")
        .map(|sni| sni.text("sni").map(str::to_owned))
        .transpose()?;
    let alpn = match fields.get("alpn") {
        None => Vec::new(),
        Some(alpn) => match &alpn.value {
            crate::lab::yaml::Value::List(items) => items
                .iter()
                .map(|item| item.text("alpn").map(str::to_owned))
                .collect::<Result<_, _>>()?,
            _ => vec![alpn.text("alpn")?.to_owned()],
        },
    };
    Ok(TlsHello { sni, alpn })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Action, Entry, Expect, Family, Kind, Peer, Target, read};

    fn entries(text: &str) -> Result<Vec<Entry>, Vec<String>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("probes.yaml");
        std::fs::write(&path, text).expect("written");
        read(&path).map_err(|problems| {
            problems
                .iter()
                .map(|problem| format!("{}: {}", problem.line, problem.text))
                .collect()
        })
    }

    #[test]
    fn every_form_of_the_documentation_is_read() {
        let text = "
- from: shop/front
  to: shop/cart
  port: 8080
  http: { method: GET, path: /public, headers: { x-team: blue }, version: 1, body: \"\" }
  ip: 6
  timeout: 500ms
  expect: 403
- {from: outside, to: service/shop/cart, port: 80, tls: { sni: a.example.com, alpn: h2 }, expect: drop}
- {from: host, to: shop/cart, port: 53, udp: true, expect: allow}
- apply: later/deny.yaml
- open: { name: long, from: shop/front, to: shop/cart, port: 9000 }
- expect_open: { name: long, state: alive }
";
        let entries = entries(text).expect("all forms are known");
        assert_eq!(entries.len(), 6);
        let Action::Probe(first) = &entries[0].action else {
            panic!("a probe")
        };
        assert_eq!(first.from, Peer::Pod("shop/front".into()));
        assert_eq!((first.family, first.expect), (Family::V6, Expect::Status(403)));
        assert_eq!(first.timeout, Duration::from_millis(500));
        let Action::Probe(second) = &entries[1].action else {
            panic!("a probe")
        };
        assert_eq!(second.to, Target::Service("shop/cart".into()));
        assert!(matches!(&second.kind, Kind::Tls(hello) if hello.alpn == ["h2"]));
        assert_eq!(entries[5].line, 13);
    }

    #[test]
    fn a_mistake_names_its_line_and_the_mend() {
        let cases = [
            (
                "- {from: a/b, to: c/d, port: 80, expct: deny}",
                "1: unknown key `expct` in a probe",
            ),
            (
                "- {from: a/b, to: c/d, port: 70000, expect: deny}",
                "1: `port` is `70000`",
            ),
            ("- {from: a, to: c/d, port: 80, expect: deny}", "1: `from` is `a`"),
            (
                "- {from: a/b, to: c/d, port: 80, expect: 200}",
                "1: `expect` is an HTTP status, but",
            ),
            (
                "- {from: a/b, to: c/d, port: 80, expect: maybe}",
                "1: `expect` is `maybe`",
            ),
            ("- {from: a/b, to: c/d, port: 80}", "1: a probe has no `expect`"),
            (
                "- {from: a/b, to: c/d, port: 80, ip: 5, expect: deny}",
                "1: `ip` is `5`",
            ),
            ("- expect_open: {name: x, state: gone}", "1: `state` is `gone`"),
            (
                "- {from: a/b, to: c/d, port: 80, udp: true, tls: {}, expect: deny}",
                "1: `http`, `tls` and",
            ),
        ];
        for (text, wanted) in cases {
            let problems = entries(text).expect_err("a mistake");
            assert!(problems[0].starts_with(wanted), "{} is not {wanted}", problems[0]);
        }
    }
}
