//! A token's claims: what the filter `jwt_authn` leaves in the request's metadata.
//!
//! Invariant: filter and key are those that `jwt_authn` is set up with (`PAYLOAD`), as in Istio
//! (`pilot/pkg/xds/filters`: `EnvoyJwtFilterName`, `EnvoyJwtFilterPayload`).

use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::config::rbac::v3::{MetadataSource, SourcedMetadata};
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::PathSegment;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::path_segment::Segment;
use envoy_types::pb::envoy::r#type::matcher::v3::value_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, OrMatcher, ValueMatcher, list_matcher,
};
use thyra_policy_compiler::policy::StringMatch;

use super::Why;
use super::matcher::text;
use super::tree::Tree;
use crate::JWT_FILTER;

/// The metadata key of the claims.
pub(super) const PAYLOAD: &str = "payload";

/// A claim that meets `value`, or a list one of whose texts does.
pub(super) fn claim(path: &[&str], value: &StringMatch) -> Result<Tree<Identifier>, Why> {
    let one = string(value)?;
    let of_list = ListMatcher {
        match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(one.clone()))),
    };
    let either = OrMatcher {
        value_matchers: vec![pattern(MatchPattern::ListMatch(Box::new(of_list))), one],
    };
    Ok(metadata(path, pattern(MatchPattern::OrMatch(either))))
}

/// `<iss>/<sub>`: a value is cut at its last `/` and each part compared with its claim, as Istio does it
/// (generator.go, `requestPrincipalGenerator`): `a/*` is issuer `a`, not every issuer that begins with `a/`.
pub(super) fn request_principal(value: &StringMatch) -> Result<Tree<Identifier>, Why> {
    let (issuer, subject) = value.of_issuer_and_subject();
    Ok(Tree::All(vec![
        metadata(&["iss"], string(&issuer)?),
        metadata(&["sub"], string(&subject)?),
    ]))
}

fn string(value: &StringMatch) -> Result<ValueMatcher, Why> {
    Ok(pattern(MatchPattern::StringMatch(text(value)?)))
}

fn pattern(pattern: MatchPattern) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(pattern),
    }
}

fn metadata(path: &[&str], value: ValueMatcher) -> Tree<Identifier> {
    let keys = std::iter::once(&PAYLOAD).chain(path);
    let segment = |key: &&str| PathSegment {
        segment: Some(Segment::Key((*key).to_owned())),
    };
    let matcher = MetadataMatcher {
        filter: JWT_FILTER.to_owned(),
        path: keys.map(segment).collect(),
        value: Some(value),
        invert: false,
    };
    Tree::Leaf(Identifier::SourcedMetadata(SourcedMetadata {
        metadata_matcher: Some(matcher),
        metadata_source: MetadataSource::Dynamic.into(),
    }))
}
