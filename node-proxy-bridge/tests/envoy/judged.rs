//! What the host says of a stream, and whether Envoy says the same.

use std::net::IpAddr;
use std::path::Path;

use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::lower::rule_of;
use thyra_policy_compiler::residual::{Answer, Context, Ending, Residual};
use thyra_policy_compiler::traffic::{PathNormalization, Traffic};

use super::client::{self, PORT, Reply};
use super::token;

/// A stream and how it is judged.
pub(crate) struct Case<'a> {
    pub(crate) residual: &'a Residual<RuleRef>,
    pub(crate) traffic: Traffic,
    pub(crate) source: IpAddr,
    pub(crate) paths: PathNormalization,
}

impl Case<'_> {
    pub(crate) fn host(&self) -> Ending<RuleRef> {
        self.residual.end(&Context {
            traffic: &self.traffic,
            source: self.source,
            paths: self.paths,
        })
    }

    /// Asks Envoy; whether it lets the stream pass, or how it disagrees with the host.
    pub(crate) async fn compare(&self, oracle: &Path) -> Result<bool, String> {
        // How one that is asked of a stream knows what to say.
        let refused = self.traffic.answers.get("ext") == Some(&false);
        let mut stream = client::connect_from(oracle, self.source, PORT + u16::from(refused)).await;
        let host = self.host();
        let allowed = host.action == Action::Allow;
        let Some(request) = &self.traffic.http else {
            let bytes = match &self.traffic.sni {
                Some(name) => client::client_hello(Some(name).filter(|name| !name.is_empty()).map(|n| &**n)),
                None => b"\x00\x01\x02 neither TLS nor HTTP\r\n".to_vec(),
            };
            let passes = client::passes(&mut stream, &bytes).await;
            return if passes == allowed {
                Ok(passes)
            } else {
                Err(self.words(&host, &format!("passes: {passes}")))
            };
        };
        let reply = client::ask(
            &mut stream,
            &client::http_answered(request, &self.traffic.answers),
        )
        .await;
        let agree = (reply.status == 200) == allowed && self.same_rule(&host, &reply);
        if agree {
            Ok(allowed)
        } else {
            Err(self.words(&host, &format!("{reply:?}")))
        }
    }

    /// Where two Services disagree the host names one of two rules that allow.
    fn same_rule(&self, host: &Ending<RuleRef>, reply: &Reply) -> bool {
        // It is asked first, and says no to what no rule of another kind lets pass either.
        if reply.reason.starts_with("ext_authz_denied") {
            return self.traffic.answers.values().any(|answer| !answer);
        }
        let answer = token::unchecked(&self.residual.http);
        if reply.status == 200 && matches!(answer, Answer::Stricter(..)) {
            return true;
        }
        let named = reply.reason.strip_prefix("rbac_access_denied_matched_policy[");
        let named = named
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(&reply.reason);
        let host = host.rule.as_ref().map(ToString::to_string);
        rule_of(named) == host.as_deref()
    }

    fn words(&self, host: &Ending<RuleRef>, envoy: &str) -> String {
        let lines = if self.traffic.http.is_some() {
            self.residual.http_words()
        } else {
            self.residual.other_words()
        };
        format!(
            "host: {:?} by {:?}\nenvoy: {envoy}\n{:?} from {} ({:?})\n{}\n",
            host.action,
            host.rule.as_ref().map(ToString::to_string),
            self.traffic,
            self.source,
            self.paths,
            lines.join("\n")
        )
    }
}
