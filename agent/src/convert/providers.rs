//! `MeshConfig.extensionProviders` to the model: whom CUSTOM policies may ask.
//!
//! Invariant: a provider whose settings can't be carried out stays, as one that can't be asked.

use thyra_policy_compiler::authorizer::{
    self, Authorizer, BodyInCheck, CHECK_TIMEOUT, Check, HttpCheck, Provider, Providers,
};
use thyra_proto::istio::mesh::v1alpha1::mesh_config as wire;
use wire::extension_provider::{
    EnvoyExternalAuthorizationGrpcProvider, EnvoyExternalAuthorizationHttpProvider,
    EnvoyExternalAuthorizationRequestBody, Provider as Kind,
};

/// The providers by name; one without a name can't be named by a policy.
#[must_use]
pub fn providers(messages: Vec<wire::ExtensionProvider>) -> Providers {
    let mut providers = Providers::new();
    for message in messages {
        let wire::ExtensionProvider { name, provider } = message;
        if name.is_empty() {
            continue;
        }
        let provider = match provider {
            Some(Kind::EnvoyExtAuthzHttp(settings)) => Provider::new(&name, http(settings)),
            Some(Kind::EnvoyExtAuthzGrpc(settings)) => Provider::new(&name, grpc(settings)),
            Some(other) => Provider::of_kind(&name, kind(&other)),
            None => Provider::of_kind(&name, "none that is known"),
        };
        authorizer::insert(&mut providers, provider);
    }
    providers
}

fn http(settings: EnvoyExternalAuthorizationHttpProvider) -> Result<Authorizer, String> {
    let EnvoyExternalAuthorizationHttpProvider {
        service,
        port,
        path_prefix,
        fail_open,
        status_on_error,
        include_headers_in_check,
        headers_to_upstream_on_allow,
        headers_to_downstream_on_deny,
        timeout,
        include_request_headers_in_check,
        include_additional_headers_in_check,
        include_request_body_in_check,
        headers_to_downstream_on_allow,
        // There is one route.
        clear_route_cache: _,
    } = settings;
    let check = HttpCheck {
        path_prefix,
        request_headers: if include_request_headers_in_check.is_empty() {
            include_headers_in_check
        } else {
            include_request_headers_in_check
        },
        added_headers: include_additional_headers_in_check.into_iter().collect(),
        to_upstream: headers_to_upstream_on_allow,
        to_downstream_on_allow: headers_to_downstream_on_allow,
        to_downstream_on_deny: headers_to_downstream_on_deny,
    };
    Ok(Authorizer {
        target: authorizer::target(&service, port)?,
        check: Check::Http(check),
        timeout: span(timeout)?,
        fail_open,
        status_on_error: authorizer::status(&status_on_error)?,
        body: include_request_body_in_check.map(body),
    })
}

fn grpc(settings: EnvoyExternalAuthorizationGrpcProvider) -> Result<Authorizer, String> {
    let EnvoyExternalAuthorizationGrpcProvider {
        service,
        port,
        fail_open,
        status_on_error,
        timeout,
        include_request_body_in_check,
        // There is one route.
        clear_route_cache: _,
    } = settings;
    Ok(Authorizer {
        target: authorizer::target(&service, port)?,
        check: Check::Grpc,
        timeout: span(timeout)?,
        fail_open,
        status_on_error: authorizer::status(&status_on_error)?,
        body: include_request_body_in_check.map(body),
    })
}

fn span(timeout: Option<prost_types::Duration>) -> Result<std::time::Duration, String> {
    timeout.map_or(Ok(CHECK_TIMEOUT), |timeout| {
        authorizer::timeout(timeout.seconds, timeout.nanos)
    })
}

fn body(settings: EnvoyExternalAuthorizationRequestBody) -> BodyInCheck {
    let EnvoyExternalAuthorizationRequestBody {
        max_request_bytes,
        allow_partial_message,
        pack_as_bytes,
    } = settings;
    BodyInCheck {
        max_bytes: max_request_bytes,
        partial: allow_partial_message,
        as_bytes: pack_as_bytes,
    }
}

/// As MeshConfig's JSON names it.
fn kind(provider: &Kind) -> &'static str {
    match provider {
        Kind::EnvoyExtAuthzHttp(_) => "envoyExtAuthzHttp",
        Kind::EnvoyExtAuthzGrpc(_) => "envoyExtAuthzGrpc",
        Kind::Zipkin(_) => "zipkin",
        Kind::Lightstep(_) => "lightstep",
        Kind::Datadog(_) => "datadog",
        Kind::Stackdriver(_) => "stackdriver",
        Kind::Opencensus(_) => "opencensus",
        Kind::Skywalking(_) => "skywalking",
        Kind::Prometheus(_) => "prometheus",
        Kind::EnvoyFileAccessLog(_) => "envoyFileAccessLog",
        Kind::EnvoyHttpAls(_) => "envoyHttpAls",
        Kind::EnvoyTcpAls(_) => "envoyTcpAls",
        Kind::EnvoyOtelAls(_) => "envoyOtelAls",
        Kind::Opentelemetry(_) => "opentelemetry",
        Kind::Sds(_) => "sds",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provider(name: &str, provider: Option<Kind>) -> wire::ExtensionProvider {
        wire::ExtensionProvider {
            name: name.to_owned(),
            provider,
        }
    }

    #[test]
    fn providers_are_read_whole_or_can_not_be_asked() {
        let settings = EnvoyExternalAuthorizationHttpProvider {
            service: "foo/ext.foo.svc.cluster.local".to_owned(),
            port: 8000,
            fail_open: true,
            status_on_error: "503".to_owned(),
            include_headers_in_check: vec!["x-old".to_owned()],
            timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 500_000_000,
            }),
            ..EnvoyExternalAuthorizationHttpProvider::default()
        };
        let broken = EnvoyExternalAuthorizationGrpcProvider {
            service: "ext".to_owned(),
            ..EnvoyExternalAuthorizationGrpcProvider::default()
        };
        let held = providers(vec![
            provider("web", Some(Kind::EnvoyExtAuthzHttp(settings))),
            provider("portless", Some(Kind::EnvoyExtAuthzGrpc(broken))),
            provider("traces", Some(Kind::Zipkin(wire::extension_provider::Unread {}))),
            provider("", None),
            provider("newer", None),
        ]);
        let web = held["web"].authorizer.as_ref().expect("it can be asked");
        assert_eq!(web.target.to_string(), "foo/ext.foo.svc.cluster.local:8000");
        assert_eq!(
            (web.timeout.as_millis(), web.status_on_error, web.fail_open),
            (1500, 503, true)
        );
        assert!(matches!(&web.check, Check::Http(check) if check.request_headers == ["x-old"]));
        for (name, why) in [
            ("portless", "port"),
            ("traces", "zipkin"),
            ("newer", "none that is known"),
        ] {
            let told = held[name].authorizer.as_ref().expect_err(name);
            assert!(told.contains(why), "{name}: {told}");
        }
        assert_eq!(held.len(), 4);
    }
}
