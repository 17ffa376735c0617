//! Keys, certificates and tokens of a cluster that lives for minutes.
//!
//! Invariant: made anew for each lab, in its own folder; nothing of it is worth keeping.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use super::write;
use crate::lab::model::NodeAddresses;

/// Of the one user: the lab, istiod, kube-proxy and the agents' watches.
pub(super) const TOKEN: &str = "lab-admin-token";

pub(super) struct Pki {
    /// Certificate authority, DER.
    pub(super) root: Vec<u8>,
}

impl Pki {
    /// # Errors
    /// A key can't be made, a file can't be written.
    pub(super) fn create(folder: &Path) -> anyhow::Result<Self> {
        let made = "can't make a certificate";
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "thyra-lab");
        let authority_key = KeyPair::generate().context(made)?;
        let root = authority.self_signed(&authority_key).context(made)?;
        let issuer = Issuer::new(authority, authority_key);

        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "localhost",
        ];
        let mut server = CertificateParams::new(names.map(str::to_owned).to_vec()).context(made)?;
        server
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        let mut addresses: Vec<IpAddr> = NodeAddresses::of(0).own.to_vec();
        addresses.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from([10, 96, 0, 1])]);
        server
            .subject_alt_names
            .extend(addresses.into_iter().map(SanType::IpAddress));
        let server_key = KeyPair::generate().context(made)?;
        let certificate = server.signed_by(&server_key, &issuer).context(made)?;
        let accounts = KeyPair::generate().context(made)?;

        write(&folder.join("ca.crt"), &root.pem())?;
        write(&folder.join("api.crt"), &certificate.pem())?;
        write(&folder.join("api.key"), &server_key.serialize_pem())?;
        write(&folder.join("sa.key"), &accounts.serialize_pem())?;
        write(&folder.join("sa.pub"), &accounts.public_key_pem())?;
        write(
            &folder.join("tokens.csv"),
            &format!("{TOKEN},admin,1,\"system:masters\"\n"),
        )?;
        write(&folder.join("kubeconfig"), &kubeconfig(folder))?;
        Ok(Self {
            root: root.der().to_vec(),
        })
    }
}

fn kubeconfig(folder: &Path) -> String {
    let [own, _] = NodeAddresses::of(0).own;
    format!(
        "apiVersion: v1\nkind: Config\n\
         clusters: [{{name: lab, cluster: {{server: \"https://{own}:6443\", \
         certificate-authority: {ca}}}}}]\n\
         users: [{{name: admin, user: {{token: {TOKEN}}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: admin}}}}]\ncurrent-context: lab\n",
        ca = folder.join("ca.crt").display()
    )
}
