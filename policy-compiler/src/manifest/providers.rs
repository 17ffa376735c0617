//! `extensionProviders` of MeshConfig: those that CUSTOM policies may ask.
//!
//! Invariant: a provider with a field that can't be read can't be asked; strictly read it is the user's mistake too.
//! protobuf's JSON takes numbers in quotes, and every field's name in both of its forms.

use std::collections::BTreeMap;
use std::time::Duration;

use super::mesh::camel;
use super::node::{Node, Value, shorten};
use super::reader::{Reader, Rigour};
use super::shape::{self, unknown_field};
use crate::authorizer::{
    self, Authorizer, BodyInCheck, CHECK_TIMEOUT, Check, HttpCheck, Provider, Providers,
};
use crate::finding::Code;

const HTTP: &str = "envoyExtAuthzHttp";
const GRPC: &str = "envoyExtAuthzGrpc";
/// Kinds that trace, log or carry secrets.
const OTHERS: [&str; 13] = [
    "zipkin",
    "lightstep",
    "datadog",
    "stackdriver",
    "opencensus",
    "skywalking",
    "prometheus",
    "envoyFileAccessLog",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "opentelemetry",
    "sds",
];
/// Of both kinds that can be asked.
const COMMON: [&str; 7] = [
    "service",
    "port",
    "timeout",
    "failOpen",
    "statusOnError",
    "includeRequestBodyInCheck",
    "clearRouteCache",
];
/// Of HTTP alone.
const OF_HTTP: [&str; 7] = [
    "pathPrefix",
    "includeHeadersInCheck",
    "includeRequestHeadersInCheck",
    "includeAdditionalHeadersInCheck",
    "headersToUpstreamOnAllow",
    "headersToDownstreamOnAllow",
    "headersToDownstreamOnDeny",
];
const OF_BODY: [&str; 3] = ["maxRequestBytes", "allowPartialMessage", "packAsBytes"];

/// The providers in the list at `node`.
pub(super) fn read(node: &Node, providers: &mut Providers, reader: &mut Reader<'_>) {
    shape::check(
        shape::Shape::List(&shape::Shape::Any),
        node,
        "extensionProviders",
        reader,
    );
    for (index, item) in node.items().iter().enumerate() {
        let path = format!("extensionProviders[{index}]");
        match item.text_of("name") {
            Some(name) if !name.is_empty() => {
                authorizer::insert(providers, provider(item, name, &path, reader))
            }
            _ => reader.error(item.at, format!("`{path}` needs a `name`")),
        }
    }
}

fn provider(item: &Node, name: &str, path: &str, reader: &mut Reader<'_>) -> Provider {
    let mut known = vec!["name", HTTP, GRPC];
    known.extend(OTHERS);
    let fields = Fields::open(item, path, &known, reader);
    for kind in [HTTP, GRPC] {
        if let Some(node) = fields.get(kind) {
            let mut known = COMMON.to_vec();
            known.extend(OF_HTTP.iter().filter(|_| kind == HTTP));
            let fields = Fields::open(node, &format!("{path}.{kind}"), &known, reader);
            return Provider::new(name, authorizer(fields, kind == HTTP, reader));
        }
    }
    let kind = OTHERS.into_iter().find(|kind| fields.get(kind).is_some());
    Provider::of_kind(name, kind.unwrap_or("none that is known"))
}

fn authorizer(mut fields: Fields<'_>, http: bool, reader: &mut Reader<'_>) -> Result<Authorizer, String> {
    let port = fields.number("port", reader).unwrap_or(0);
    let service = fields.text("service", reader).unwrap_or_default();
    let status = fields.text("statusOnError", reader).unwrap_or_default();
    let timeout = fields.timeout(reader);
    let fail_open = fields.flag("failOpen", reader);
    // There is one route.
    let _cleared = fields.flag("clearRouteCache", reader);
    let (body, of_body) = body(&fields, reader);
    let check = if http {
        Check::Http(check(&mut fields, reader))
    } else {
        Check::Grpc
    };
    if let Some(why) = fields.wrong.or(of_body) {
        return Err(why);
    }
    Ok(Authorizer {
        target: authorizer::target(&service, port)?,
        check,
        timeout: timeout?,
        fail_open,
        status_on_error: authorizer::status(&status)?,
        body,
    })
}

fn check(fields: &mut Fields<'_>, reader: &mut Reader<'_>) -> HttpCheck {
    let mut request_headers = fields.texts("includeRequestHeadersInCheck", reader);
    let older = fields.texts("includeHeadersInCheck", reader);
    if request_headers.is_empty() {
        request_headers = older;
    }
    HttpCheck {
        path_prefix: fields.text("pathPrefix", reader).unwrap_or_default(),
        request_headers,
        added_headers: fields.labels("includeAdditionalHeadersInCheck", reader),
        to_upstream: fields.texts("headersToUpstreamOnAllow", reader),
        to_downstream_on_allow: fields.texts("headersToDownstreamOnAllow", reader),
        to_downstream_on_deny: fields.texts("headersToDownstreamOnDeny", reader),
    }
}

/// How much of the body, and what is wrong with that.
fn body(fields: &Fields<'_>, reader: &mut Reader<'_>) -> (Option<BodyInCheck>, Option<String>) {
    let Some(node) = fields.get("includeRequestBodyInCheck") else {
        return (None, None);
    };
    let path = format!("{}.includeRequestBodyInCheck", fields.path);
    let mut fields = Fields::open(node, &path, &OF_BODY, reader);
    let body = BodyInCheck {
        max_bytes: fields.number("maxRequestBytes", reader).unwrap_or(0),
        partial: fields.flag("allowPartialMessage", reader),
        as_bytes: fields.flag("packAsBytes", reader),
    };
    (Some(body), fields.wrong)
}

/// A mapping by its fields' names; `wrong` is the first thing in it that can't be read.
struct Fields<'n> {
    path: String,
    nodes: BTreeMap<String, &'n Node>,
    wrong: Option<String>,
}

impl<'n> Fields<'n> {
    fn open(node: &'n Node, path: &str, known: &[&str], reader: &mut Reader<'_>) -> Self {
        let mut fields = Self {
            path: path.to_owned(),
            nodes: BTreeMap::new(),
            wrong: None,
        };
        if !matches!(node.value, Value::Map(_) | Value::Null) {
            let text = format!("`{path}` must be a mapping, not {}", node.kind());
            fields.refuse(node, Code::BadValue, text, reader);
        }
        for entry in node.entries() {
            let name = camel(&entry.key);
            if known.contains(&name.as_str()) {
                fields.nodes.insert(name, &entry.node);
            } else {
                let text = unknown_field(&entry.key, path, known.iter().copied());
                fields.refuse(&entry.node, Code::UnknownField, text, reader);
            }
        }
        fields
    }

    fn refuse(&mut self, node: &Node, code: Code, text: String, reader: &mut Reader<'_>) {
        if reader.rigour == Rigour::Strict {
            reader.mistake(node.at, code, text.clone());
        }
        self.wrong.get_or_insert(text);
    }

    fn get(&self, name: &str) -> Option<&'n Node> {
        let node = self.nodes.get(name).copied();
        node.filter(|node| node.value != Value::Null)
    }

    fn wanted<T>(&mut self, node: &Node, name: &str, wanted: &str, reader: &mut Reader<'_>) -> Option<T> {
        let text = format!("`{}.{name}` must be {wanted}, not {}", self.path, node.kind());
        self.refuse(node, Code::BadValue, text, reader);
        None
    }

    fn text(&mut self, name: &str, reader: &mut Reader<'_>) -> Option<String> {
        let node = self.get(name)?;
        match node.text() {
            Some(text) => Some(text.to_owned()),
            None => self.wanted(node, name, "a string", reader),
        }
    }

    fn number(&mut self, name: &str, reader: &mut Reader<'_>) -> Option<u32> {
        let node = self.get(name)?;
        let number = node.whole().and_then(|number| u32::try_from(number).ok());
        let quoted = || node.text().and_then(|text| text.parse().ok());
        match number.or_else(quoted) {
            Some(number) => Some(number),
            None => self.wanted(node, name, "a whole number", reader),
        }
    }

    fn flag(&mut self, name: &str, reader: &mut Reader<'_>) -> bool {
        let Some(node) = self.get(name) else { return false };
        node.boolean()
            .or_else(|| self.wanted(node, name, "true or false", reader))
            .unwrap_or(false)
    }

    fn texts(&mut self, name: &str, reader: &mut Reader<'_>) -> Vec<String> {
        let Some(node) = self.get(name) else {
            return Vec::new();
        };
        let texts: Option<Vec<String>> = match node.value {
            Value::List(_) => node
                .items()
                .iter()
                .map(|item| item.text().map(str::to_owned))
                .collect(),
            _ => None,
        };
        texts
            .or_else(|| self.wanted(node, name, "a list of strings", reader))
            .unwrap_or_default()
    }

    fn labels(&mut self, name: &str, reader: &mut Reader<'_>) -> BTreeMap<String, String> {
        let Some(node) = self.get(name) else {
            return BTreeMap::new();
        };
        let pair = |entry: &super::node::Entry| Some((entry.key.to_string(), entry.node.text()?.to_owned()));
        let pairs: Option<BTreeMap<String, String>> = match node.value {
            Value::Map(_) => node.entries().iter().map(pair).collect(),
            _ => None,
        };
        pairs
            .or_else(|| self.wanted(node, name, "a mapping from strings to strings", reader))
            .unwrap_or_default()
    }

    /// `5s`, `0.5s`: protobuf's JSON of a duration.
    fn timeout(&mut self, reader: &mut Reader<'_>) -> Result<Duration, String> {
        let Some(text) = self.text("timeout", reader) else {
            return Ok(CHECK_TIMEOUT);
        };
        let seconds = text
            .strip_suffix('s')
            .and_then(|number| number.parse::<f64>().ok());
        seconds
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .ok_or_else(|| {
                format!(
                    "its `timeout` is `{}`; write seconds, such as `5s`",
                    shorten(&text)
                )
            })
    }
}
