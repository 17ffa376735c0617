//! Identities met so far, numbered in the order they were met.
//!
//! Invariant: a number stands for one (trust domain, namespace, service account) as long as the table lives.

use std::collections::HashMap;
use std::sync::Arc;

use crate::world::Workload;

/// Who a workload is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) trust_domain: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
}

impl Identity {
    fn of(workload: &Workload) -> Self {
        Self {
            trust_domain: workload.trust_domain.clone(),
            namespace: workload.namespace.clone(),
            service_account: workload.service_account.clone(),
        }
    }

    fn is_of(&self, workload: &Workload) -> bool {
        self.service_account == workload.service_account
            && self.namespace == workload.namespace
            && self.trust_domain == workload.trust_domain
    }
}

/// The table of identities; never shrinks.
#[derive(Debug, Default)]
pub(crate) struct Identities {
    list: Vec<(Identity, Arc<str>)>,
    by_principal: HashMap<Arc<str>, Vec<usize>>,
}

impl Identities {
    pub(crate) fn intern(&mut self, workload: &Workload) -> usize {
        let principal: Arc<str> = workload.principal().into();
        let numbers = self.by_principal.entry(Arc::clone(&principal)).or_default();
        let known = numbers
            .iter()
            .find(|number| self.list[**number].0.is_of(workload));
        if let Some(known) = known {
            return *known;
        }
        let number = self.list.len();
        numbers.push(number);
        self.list.push((Identity::of(workload), principal));
        number
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Those with this principal: one, unless names hold a `/`.
    pub(crate) fn with_principal(&self, principal: &str) -> &[usize] {
        self.by_principal.get(principal).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn get(&self, number: usize) -> &Identity {
        &self.list[number].0
    }

    pub(crate) fn principal(&self, number: usize) -> &Arc<str> {
        &self.list[number].1
    }
}
