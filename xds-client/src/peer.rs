//! The other end of a connection, as its certificate names it.
//!
//! Invariant: only what a verified handshake showed; a plain connection has an address and nothing else.

use std::net::{IpAddr, SocketAddr};

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Address and port.
    pub address: SocketAddr,
    /// Distinguished name; empty on a plain connection and where istiod leaves it out.
    pub subject: String,
    /// DNS names, addresses and URIs (SPIFFE ids among them) of the certificate.
    pub sans: Vec<String>,
    /// When the certificate ends, RFC 2822; empty on a plain connection.
    pub not_after: String,
}

impl Peer {
    /// A peer that showed no certificate.
    #[must_use]
    pub const fn plain(address: SocketAddr) -> Self {
        Self {
            address,
            subject: String::new(),
            sans: Vec::new(),
            not_after: String::new(),
        }
    }

    /// A peer with its leaf certificate in DER, already verified; what can't be parsed is left empty.
    #[must_use]
    pub fn certified(address: SocketAddr, der: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else {
            return Self::plain(address);
        };
        let sans = match certificate.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().map(san).collect(),
            Ok(None) | Err(_) => Vec::new(),
        };
        let not_after = certificate.validity().not_after;
        Self {
            address,
            subject: certificate.subject().to_string(),
            sans,
            not_after: not_after
                .to_rfc2822()
                .unwrap_or_else(|_| not_after.timestamp().to_string()),
        }
    }

    /// SPIFFE ids among the names.
    pub fn spiffe_ids(&self) -> impl Iterator<Item = &str> {
        self.sans
            .iter()
            .map(String::as_str)
            .filter(|san| san.starts_with("spiffe://"))
    }
}

fn san(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => {
            (*name).to_owned()
        }
        GeneralName::IPAddress(bytes) => {
            address(bytes).map_or_else(|| format!("{name}"), |ip| ip.to_string())
        }
        other => other.to_string(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
