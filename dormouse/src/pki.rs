//! The node's own certificate authority and the certificate of its endpoints.
//!
//! Owns: `<data>/ca.pem` (what clients trust), `<data>/tls/` (keys, mode 0600). Never replaces a CA that is there: its
//! clients trust it. Never writes a certificate that the configuration names.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use time::{Duration, OffsetDateTime};

use crate::files;

/// A leaf is made anew when it has less than this left.
const RENEW_BEFORE: Duration = Duration::days(60);
/// Browsers refuse leaves of more than 825 days.
const LEAF_LIFE: Duration = Duration::days(820);
const CA_LIFE: Duration = Duration::days(3_650);

/// Where the certificate that the edge shows is.
pub struct Certificate {
    /// The chain, PEM.
    pub chain: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

/// The operator's certificate or, if there is none, a wildcard of our own for the endpoints, of which whatever is missing is
/// made.
pub fn certificate(data_dir: &Path, edge: &config::Edge) -> Result<Certificate> {
    let tls = data_dir.join("tls");
    files::private_dir(&tls)?;
    let (ca_pem, ca_key) = authority(data_dir, &tls)?;
    match (&edge.certificate, &edge.private_key) {
        (Some(chain), Some(key)) => Ok(Certificate { chain: chain.clone(), key: key.clone() }),
        (None, None) => leaf(&tls, &edge.domain_suffix, &ca_pem, ca_key),
        _ => bail!("edge.certificate and edge.private_key belong together, and only one of them is set"),
    }
}

impl Certificate {
    /// Reads both files.
    pub fn load(&self) -> Result<Arc<rustls::ServerConfig>> {
        let chain = CertificateDer::pem_file_iter(&self.chain)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("reading the certificates in {}", self.chain.display()))?;
        if chain.is_empty() {
            bail!("{} holds no certificate", self.chain.display());
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).with_context(|| format!("reading the private key in {}", self.key.display()))?;
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(|| format!("the certificate in {} cannot be used with the key in {}; replace both by a pair", self.chain.display(), self.key.display()))?;
        Ok(Arc::new(config))
    }
}

fn authority(data_dir: &Path, tls: &Path) -> Result<(String, KeyPair)> {
    let (pem_path, key_path) = (data_dir.join("ca.pem"), tls.join("ca.key"));
    match (pem_path.exists(), key_path.exists()) {
        (true, true) => {
            let pem = files::read_text(&pem_path)?;
            let key = KeyPair::from_pem(&files::read_text(&key_path)?).with_context(|| format!("{} is not a private key", key_path.display()))?;
            Ok((pem, key))
        }
        (false, false) => {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "Dormouse local CA");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let now = OffsetDateTime::now_utc();
            params.not_before = now - Duration::days(1);
            params.not_after = now + CA_LIFE;
            let pem = params.self_signed(&key)?.pem();
            // The key first: a certificate without its key would look like a half that somebody removed.
            files::write_private(&key_path, key.serialize_pem().as_bytes())?;
            files::write_public(&pem_path, pem.as_bytes())?;
            Ok((pem, key))
        }
        (true, false) => bail!("{} is there but its key {} is not; restore the key, or remove the certificate to have both made anew (clients must then trust the new one)", pem_path.display(), key_path.display()),
        (false, true) => {
            fs::remove_file(&key_path).with_context(|| format!("removing {}, which has no certificate", key_path.display()))?;
            authority(data_dir, tls)
        }
    }
}

fn leaf(tls: &Path, domain_suffix: &str, ca_pem: &str, ca_key: KeyPair) -> Result<Certificate> {
    let (pem_path, key_path, about_path) = (tls.join("edge.pem"), tls.join("edge.key"), tls.join("edge.json"));
    let now = OffsetDateTime::now_utc();
    let fresh = fs::read(&about_path).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok()).is_some_and(|about| {
        about["domain_suffix"] == domain_suffix && about["not_after"].as_i64().is_some_and(|end| end > (now + RENEW_BEFORE).unix_timestamp())
    });
    if !fresh || !pem_path.exists() || !key_path.exists() {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![format!("*.{domain_suffix}"), domain_suffix.to_owned(), "localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, format!("*.{domain_suffix}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - Duration::days(1);
        params.not_after = now + LEAF_LIFE;
        let not_after = params.not_after.unix_timestamp();
        let issuer = Issuer::from_ca_cert_pem(ca_pem, ca_key).context("ca.pem is not a CA certificate")?;
        let certificate = params.signed_by(&key, &issuer)?;
        files::write_private(&key_path, key.serialize_pem().as_bytes())?;
        files::write_public(&pem_path, certificate.pem().as_bytes())?;
        files::write_public(&about_path, serde_json::json!({ "domain_suffix": domain_suffix, "not_after": not_after }).to_string().as_bytes())?;
    }
    Ok(Certificate { chain: pem_path, key: key_path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_config(data_dir: &Path, domain_suffix: &str) -> Result<Arc<rustls::ServerConfig>> {
        let edge = config::Edge { domain_suffix: domain_suffix.to_owned(), ..config::Config::defaults().edge };
        certificate(data_dir, &edge)?.load()
    }

    #[test]
    fn the_operators_certificate_is_shown_and_a_half_of_one_is_refused() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        server_config(theirs.path(), "a.localhost").unwrap();
        let (chain, key) = (theirs.path().join("tls/edge.pem"), theirs.path().join("tls/edge.key"));
        let mut edge = config::Config::defaults().edge;
        edge.certificate = Some(chain.clone());
        assert!(certificate(ours.path(), &edge).err().unwrap().to_string().contains("belong together"));
        edge.private_key = Some(key.clone());
        let certificate = certificate(ours.path(), &edge).unwrap();
        certificate.load().unwrap();
        // Somebody else's key, then no certificate at all.
        fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = certificate.load().unwrap_err();
        assert!(error.to_string().contains("edge.key") && error.to_string().contains("edge.pem"), "{error}");
        fs::write(&chain, "").unwrap();
        assert!(certificate.load().unwrap_err().to_string().contains("holds no certificate"));
        assert!(!ours.path().join("tls/edge.pem").exists());
    }

    #[test]
    fn the_ca_stays_and_the_leaf_follows_the_domain() {
        let dir = tempfile::tempdir().unwrap();
        server_config(dir.path(), "a.localhost").unwrap();
        let (ca, leaf) = (fs::read(dir.path().join("ca.pem")).unwrap(), fs::read(dir.path().join("tls/edge.pem")).unwrap());
        server_config(dir.path(), "a.localhost").unwrap();
        assert_eq!(fs::read(dir.path().join("tls/edge.pem")).unwrap(), leaf);
        server_config(dir.path(), "b.localhost").unwrap();
        assert_ne!(fs::read(dir.path().join("tls/edge.pem")).unwrap(), leaf);
        assert_eq!(fs::read(dir.path().join("ca.pem")).unwrap(), ca);
    }

    #[test]
    fn a_ca_without_its_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        server_config(dir.path(), "a.localhost").unwrap();
        fs::remove_file(dir.path().join("tls/ca.key")).unwrap();
        let error = server_config(dir.path(), "a.localhost").unwrap_err();
        assert!(error.to_string().contains("ca.key"), "{error}");
        assert!(dir.path().join("ca.pem").exists());
    }

    #[test]
    fn keys_are_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        server_config(dir.path(), "a.localhost").unwrap();
        for name in ["tls/ca.key", "tls/edge.key"] {
            assert_eq!(fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
    }
}
