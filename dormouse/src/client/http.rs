//! One signed HTTP/1.1 request over a connection of its own, and connections to the edge.
//!
//! Requests are few and local: a pool would be more code than it saves. The signature is aws-sigv4's, which is what the AWS SDK
//! signs with; the SDK itself (one crate for each service, S3's alone larger than this whole node) would be that with a lot around it.

use std::{fs, path::Path, sync::Arc, time::SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use aws_credential_types::Credentials;
use aws_sigv4::{
    http_request::{PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings, UriPathNormalizationMode, sign},
    sign::v4,
};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::place::Place;

/// A body.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A byte stream, plain or not.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Which signing rules: S3's differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The control API, and what this node offers beyond it.
    Lambda,
    /// S3.
    S3,
}

/// Signs a request and sends it. `digest`: SHA-256 of the body, in hex. `target`: path and query, encoded.
pub async fn send(place: &Place, service: Service, method: &str, target: &str, digest: &str, body: Body, length: u64) -> Result<Response<Incoming>> {
    let base = match service {
        Service::Lambda => &place.api,
        Service::S3 => &place.s3,
    };
    let base = base.trim_end_matches('/');
    let (scheme, authority) = base.split_once("://").with_context(|| format!("the node's address {base:?} should be http://host:port"))?;
    let (authority, prefix) = authority.find('/').map_or((authority, ""), |at| authority.split_at(at));
    let path = format!("{prefix}{target}");
    let mut request = Request::builder().method(method).uri(&path).header("host", authority);
    if length > 0 {
        request = request.header("content-length", length);
        if service == Service::Lambda {
            request = request.header("content-type", "application/json");
        }
    }
    let mut request = request.body(body).context("making a request")?;

    let mut settings = SigningSettings::default();
    if service == Service::S3 {
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    }
    let identity = Credentials::new(&place.key, &place.secret, None, None, "dormouse").into();
    let name = match service {
        Service::Lambda => "lambda",
        Service::S3 => "s3",
    };
    let parameters = v4::SigningParams::builder().identity(&identity).region(&place.region).name(name).time(SystemTime::now()).settings(settings).build();
    let parameters = parameters.context("signing a request")?.into();
    let url = format!("{scheme}://{authority}{path}");
    let headers: Vec<(String, String)> =
        request.headers().iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned())).collect();
    let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let signable = SignableRequest::new(method, &url, headers, SignableBody::Precomputed(digest.to_owned())).context("signing a request")?;
    let (instructions, _) = sign(signable, &parameters).context("signing a request")?.into_parts();
    instructions.apply_to_request_http1x(&mut request);

    let stream = connect(scheme, authority, place.ca.as_deref()).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(|| format!("talking to {base}"))?;
    // Ends with the answer, or with the program.
    tokio::spawn(connection);
    sender.send_request(request).await.with_context(|| format!("asking {base}; is the node running?"))
}

async fn connect(scheme: &str, authority: &str, ca: Option<&Path>) -> Result<Box<dyn Stream>> {
    let (host, port) = split(authority, if scheme == "https" { 443 } else { 80 })?;
    let tcp = TcpStream::connect((host, port)).await.with_context(|| format!("connecting to {scheme}://{authority}; is the node running?"))?;
    match scheme {
        "http" => Ok(Box::new(tcp)),
        "https" => Ok(Box::new(over_tls(tcp, host, ca).await?)),
        other => bail!("the node's address begins with {other}://, which this program does not speak"),
    }
}

/// A TLS connection to the edge for one endpoint (`host[:port]`).
pub async fn to_edge(place: &Place, endpoint: &str) -> Result<impl Stream + use<>> {
    let (host, port) = split(endpoint, 443)?;
    // The edge's own address goes before the name: names under .localhost are not resolved everywhere.
    let tcp = match &place.edge {
        Some(edge) => TcpStream::connect(edge.as_str()).await.with_context(|| format!("connecting to the edge {edge}"))?,
        None => TcpStream::connect((host, port)).await.with_context(|| format!("connecting to {endpoint}"))?,
    };
    over_tls(tcp, host, place.ca.as_deref()).await
}

async fn over_tls(tcp: TcpStream, host: &str, ca: Option<&Path>) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let pem = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                roots.add(certificate.with_context(|| format!("reading {}", path.display()))?).with_context(|| format!("trusting {}", path.display()))?;
            }
        }
        None => {
            for certificate in rustls_native_certs::load_native_certs().certs {
                // One that cannot be used is not what the edge's chain leads to.
                let _ = roots.add(certificate);
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).with_context(|| format!("{host} is no name for a certificate"))?;
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.with_context(|| format!("the TLS handshake with {host}"))
}

/// Host and port.
pub fn split(authority: &str, default_port: u16) -> Result<(&str, u16)> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| anyhow!("{authority} has no port that is a number"))?),
        _ => (authority, default_port),
    };
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port))
}
