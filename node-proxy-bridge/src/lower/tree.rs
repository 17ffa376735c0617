//! And, or, not over conditions that Envoy knows, before they become permissions or principals.
//!
//! Invariant: a message that comes out is one that Envoy takes: no empty sets.

use envoy_types::pb::envoy::config::rbac::v3::permission::{self, Rule};
use envoy_types::pb::envoy::config::rbac::v3::principal::{self, Identifier};
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Principal};
use thyra_policy_compiler::policy::Field;

use super::Why;

/// A condition made of conditions.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tree<L> {
    /// All of them; none: always.
    All(Vec<Tree<L>>),
    /// One of them; none: never.
    One(Vec<Tree<L>>),
    Not(Box<Tree<L>>),
    Leaf(L),
}

/// One of the values, if there are any; none of the not-values.
pub(super) fn field<T, L>(
    field: &Field<T>,
    lower: impl Fn(&T) -> Result<Tree<L>, Why>,
) -> Result<Vec<Tree<L>>, Why> {
    let list = |values: &[T]| values.iter().map(&lower).collect::<Result<Vec<_>, _>>();
    let mut parts = Vec::new();
    if !field.values.is_empty() {
        parts.push(Tree::One(list(&field.values)?));
    }
    if !field.not_values.is_empty() {
        parts.push(Tree::Not(Box::new(Tree::One(list(&field.not_values)?))));
    }
    Ok(parts)
}

impl From<Tree<Rule>> for Permission {
    fn from(tree: Tree<Rule>) -> Self {
        let set = |trees: Vec<Tree<Rule>>| permission::Set {
            rules: trees.into_iter().map(Self::from).collect(),
        };
        let rule = match tree {
            Tree::All(trees) if trees.is_empty() => Rule::Any(true),
            Tree::One(trees) if trees.is_empty() => Rule::NotRule(Box::new(Self {
                rule: Some(Rule::Any(true)),
            })),
            Tree::All(mut trees) | Tree::One(mut trees) if trees.len() == 1 => {
                return Self::from(trees.remove(0));
            }
            Tree::All(trees) => Rule::AndRules(set(trees)),
            Tree::One(trees) => Rule::OrRules(set(trees)),
            Tree::Not(tree) => Rule::NotRule(Box::new(Self::from(*tree))),
            Tree::Leaf(rule) => rule,
        };
        Self { rule: Some(rule) }
    }
}

impl From<Tree<Identifier>> for Principal {
    fn from(tree: Tree<Identifier>) -> Self {
        let set = |trees: Vec<Tree<Identifier>>| principal::Set {
            ids: trees.into_iter().map(Self::from).collect(),
        };
        let identifier = match tree {
            Tree::All(trees) if trees.is_empty() => Identifier::Any(true),
            Tree::One(trees) if trees.is_empty() => Identifier::NotId(Box::new(Self {
                identifier: Some(Identifier::Any(true)),
            })),
            Tree::All(mut trees) | Tree::One(mut trees) if trees.len() == 1 => {
                return Self::from(trees.remove(0));
            }
            Tree::All(trees) => Identifier::AndIds(set(trees)),
            Tree::One(trees) => Identifier::OrIds(set(trees)),
            Tree::Not(tree) => Identifier::NotId(Box::new(Self::from(*tree))),
            Tree::Leaf(identifier) => identifier,
        };
        Self {
            identifier: Some(identifier),
        }
    }
}
