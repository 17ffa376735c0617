//! Where the server is and how it is recognised.
//!
//! Invariant: parsed once. A token never leaves over a plain connection to another machine.

use std::net::IpAddr;
use std::path::PathBuf;

use http::Uri;

/// An xDS server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) security: Security,
    /// Read anew for each stream.
    pub(crate) token: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Security {
    Plain,
    Tls {
        /// Against the DNS names of the certificate.
        name: String,
        /// PEM, read anew for each connection.
        root: PathBuf,
    },
}

/// Why a server's description is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ServerError {
    /// Not a URI.
    #[error("xds address `{address}` is no `http://host:port` or `https://host:port`: {reason}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `https://` without anything to check the server by.
    #[error("xds address `{address}` needs the file of its root certificates (istio-ca-root-cert)")]
    NoRoot {
        /// As given.
        address: String,
    },
    /// Anybody on the way could read it.
    #[error("a token would go to `{address}` in the clear: use `https://`, or leave the token out")]
    TokenInClear {
        /// As given.
        address: String,
    },
}

impl Server {
    /// `address` is `http://host:port` (tests and local use) or `https://host:port`; `name` overrides the
    /// host as the name that the certificate must have; `root` and `token` are files.
    ///
    /// # Errors
    /// If the address can't be used, or what it needs is missing.
    pub fn new(
        address: &str,
        name: Option<String>,
        root: Option<PathBuf>,
        token: Option<PathBuf>,
    ) -> Result<Self, ServerError> {
        let refuse = |reason: &str| ServerError::Address {
            address: address.to_owned(),
            reason: reason.to_owned(),
        };
        let uri: Uri = address
            .parse()
            .map_err(|error: http::uri::InvalidUri| refuse(&error.to_string()))?;
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| refuse("no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = uri.port_u16().ok_or_else(|| refuse("no port"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(refuse("a path has no meaning here"));
        }
        let security = match uri.scheme_str() {
            Some("http") if token.is_some() && !is_this_machine(&host) => {
                return Err(ServerError::TokenInClear {
                    address: address.to_owned(),
                });
            }
            Some("http") => Security::Plain,
            Some("https") => Security::Tls {
                name: name.unwrap_or_else(|| host.clone()),
                root: root.ok_or_else(|| ServerError::NoRoot {
                    address: address.to_owned(),
                })?,
            },
            _ => return Err(refuse("the scheme must be `http` or `https`")),
        };
        Ok(Self {
            host,
            port,
            security,
            token,
        })
    }

    /// `host:port`, bracketed where it is IPv6.
    #[must_use]
    pub fn authority(&self) -> String {
        authority(&self.host, self.port)
    }

    /// What the server is called in requests: its certificate's name, where it has one.
    pub(crate) fn origin(&self) -> String {
        match &self.security {
            Security::Plain => format!("http://{}", self.authority()),
            Security::Tls { name, root: _ } => format!("https://{}", authority(name, self.port)),
        }
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(address: &str, token: bool) -> Result<Server, ServerError> {
        Server::new(
            address,
            None,
            Some("root.pem".into()),
            token.then(|| "token".into()),
        )
    }

    #[test]
    fn addresses_are_parsed_once_or_refused() {
        let istiod = server("https://istiod.istio-system.svc:15012", true).unwrap();
        assert_eq!(istiod.authority(), "istiod.istio-system.svc:15012");
        assert_eq!(
            server("http://[fd00::1]:15010", false).unwrap().authority(),
            "[fd00::1]:15010"
        );
        for bad in [
            "istiod:15012",
            "ftp://a:1",
            "https://istiod",
            "https://a:1/path",
            "http://:1",
            "",
            "https://a:99999",
        ] {
            assert!(
                matches!(server(bad, false), Err(ServerError::Address { .. })),
                "`{bad}`"
            );
        }
    }

    #[test]
    fn a_token_never_leaves_the_machine_in_the_clear() {
        assert!(matches!(
            server("http://10.0.0.1:15010", true),
            Err(ServerError::TokenInClear { .. })
        ));
        assert!(server("http://127.0.0.1:15010", true).is_ok());
        assert!(server("http://10.0.0.1:15010", false).is_ok());
    }

    #[test]
    fn tls_needs_a_root() {
        let missing = Server::new("https://a:1", None, None, None);
        assert_eq!(
            missing,
            Err(ServerError::NoRoot {
                address: "https://a:1".into()
            })
        );
    }
}
