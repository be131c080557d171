//! What connections cost in memory that are open and say nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    gateway_node,
    report::Report,
    subject::{Bench, Kind, Subject},
};

/// Time for a subject to come to rest before its memory is read.
const REST: Duration = Duration::from_millis(700);

/// An upstream that takes WebSockets and never says a word on them; it runs as long as this process.
pub fn silent_websockets() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("opening the upstream for WebSockets")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).expect("a listener that does not block");
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    if let Ok(socket) = tokio_tungstenite::accept_async(stream).await {
                        // Until the other side is gone.
                        let _ = socket.into_inner().read(&mut [0]).await;
                    }
                });
            }
        });
    });
    Ok(address)
}

/// Measures one subject, freshly started for each kind of connection.
pub fn measure(bench: &Bench, kind: &Kind, connections: usize, report: &mut Report) -> Result<()> {
    for (what, count) in [("h1", connections), ("h2", connections), ("websocket", connections / 4)] {
        let subject = bench.start(kind)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let each = runtime.block_on(of_one(&subject, what, count)).with_context(|| format!("opening idle {what} connections to {}", subject.name))?;
        report.add(&subject.name, &format!("idle {what}"), "KiB each", each)?;
    }
    Ok(())
}

async fn of_one(subject: &Subject, what: &str, count: usize) -> Result<f64> {
    // What the first connections cost the process once is no part of it.
    drop(open(subject, what, 50).await?);
    tokio::time::sleep(REST).await;
    let before = subject.pss_kib()?;
    let kept = open(subject, what, count).await?;
    tokio::time::sleep(REST).await;
    let after = subject.pss_kib()?;
    drop(kept);
    Ok(after.saturating_sub(before) as f64 / count as f64)
}

/// What keeps a connection open.
type Kept = Box<dyn std::any::Any>;

async fn open(subject: &Subject, what: &str, count: usize) -> Result<Vec<Kept>> {
    let mut kept: Vec<Kept> = Vec::with_capacity(count);
    for _ in 0..count {
        kept.push(match what {
            "h1" => Box::new(h1(subject, "/", "").await?),
            "h2" => Box::new(h2(subject).await?),
            _ => Box::new(websocket(subject).await?),
        });
    }
    Ok(kept)
}

/// A connection after one request.
async fn h1(subject: &Subject, path: &str, fields: &str) -> Result<TlsStream<TcpStream>> {
    let mut stream = tls(subject, b"http/1.1").await?;
    let token = subject.token.as_ref().map(|token| format!("X-aws-proxy-auth: {token}\r\n")).unwrap_or_default();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{token}{fields}\r\n", subject.host).as_bytes()).await?;
    let mut answer = vec![0; 4096];
    let mut read = 0;
    // The two bytes of the body come with the header or right after it; a switch of protocols has no body.
    while !answer[..read].windows(4).any(|end| end == b"\r\n\r\n") || (fields.is_empty() && !answer[..read].ends_with(b"ok")) {
        let more = stream.read(&mut answer[read..]).await?;
        ensure!(more > 0, "the connection ended: {}", String::from_utf8_lossy(&answer[..read]));
        read += more;
    }
    let expected = if fields.is_empty() { "HTTP/1.1 200" } else { "HTTP/1.1 101" };
    ensure!(answer.starts_with(expected.as_bytes()), "not {expected}: {}", String::from_utf8_lossy(&answer[..read]));
    Ok(stream)
}

async fn websocket(subject: &Subject) -> Result<TlsStream<TcpStream>> {
    let port = gateway_node::WEBSOCKETS;
    let fields = format!(
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}",
        if subject.token.is_some() { format!("X-aws-proxy-port: {port}\r\n") } else { String::new() }
    );
    h1(subject, "/websocket", &fields).await
}

async fn h2(subject: &Subject) -> Result<hyper::client::conn::http2::SendRequest<Empty<Bytes>>> {
    let io = TokioIo::new(tls(subject, b"h2").await?);
    let (mut send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
    tokio::spawn(connection);
    let mut request = http::Request::get(format!("https://{}/", subject.host));
    if let Some(token) = &subject.token {
        request = request.header("x-aws-proxy-auth", token);
    }
    let answer = send.send_request(request.body(Empty::new())?).await?;
    ensure!(answer.status() == 200, "the answer is {}", answer.status());
    answer.into_body().collect().await?;
    Ok(send)
}

async fn tls(subject: &Subject, protocol: &[u8]) -> Result<TlsStream<TcpStream>> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&subject.certificate)? {
        roots.add(certificate?)?;
    }
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(subject.address).await?;
    let name = ServerName::try_from(subject.host.clone())?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
}
