//! Who asks: the client's address, headers and the claims of a token.

use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use ipnet::IpNet;
use thyra_policy_compiler::policy::{Field, StringMatch};
use thyra_policy_compiler::residual::Test;

use super::Why;
use super::claim::{claim, request_principal};
use super::matcher::{blocks, header};
use super::tree::{Tree, field};

pub(super) fn principal(test: &Test) -> Result<Vec<Tree<Identifier>>, Why> {
    match test {
        Test::RequestPrincipal(values) => field(values, request_principal),
        Test::RemoteBlock(values) | Test::RemoteIp(values) => remote(values),
        Test::Key(key, values) => by_key(key, values),
        Test::Host(_) | Test::Method(_) | Test::Path(_) | Test::Sni(_) => Err(Why::Misplaced),
    }
}

fn remote(values: &Field<IpNet>) -> Result<Vec<Tree<Identifier>>, Why> {
    field(values, |block| {
        let ranges = blocks(block).into_iter();
        Ok(Tree::One(
            ranges
                .map(|range| Tree::Leaf(Identifier::RemoteIp(range)))
                .collect(),
        ))
    })
}

fn by_key(key: &str, values: &Field<StringMatch>) -> Result<Vec<Tree<Identifier>>, Why> {
    match key {
        "request.auth.principal" => return field(values, request_principal),
        "request.auth.audiences" => return field(values, |value| claim(&["aud"], value)),
        "request.auth.presenter" => return field(values, |value| claim(&["azp"], value)),
        _ => {}
    }
    let in_brackets = |prefix: &str| key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']');
    if let Some(path) = in_brackets("request.auth.claims") {
        let path: Vec<&str> = path.split("][").collect();
        if path.contains(&"") {
            return Err(Why::Key);
        }
        return field(values, |value| claim(&path, value));
    }
    let name = in_brackets("request.headers").ok_or(Why::Key)?;
    field(values, |value| {
        Ok(Tree::Leaf(Identifier::Header(header(name, value, false)?)))
    })
}
