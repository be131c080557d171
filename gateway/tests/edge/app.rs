//! Apps for the guest: a well-behaved one, and one that says exactly what a test tells it to.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
};
use tokio_rustls::TlsAcceptor;

use crate::rig::{Body, full};

/// What the well-behaved app shows of itself.
#[derive(Clone, Default)]
pub struct App {
    /// Requests whose header came.
    pub requests: Arc<AtomicUsize>,
    /// Connections that asked whether it speaks TLS, or spoke it.
    pub hellos: Arc<AtomicUsize>,
    /// Connections that were made for requests.
    pub connections: Arc<AtomicUsize>,
    /// Requests that came over a connection that had carried another host before.
    pub mixed: Arc<AtomicUsize>,
    /// Requests to `/slow` wait for this.
    pub go: Arc<Notify>,
    /// Counts requests to `/slow` and bodies of `/events` that were dropped unfinished.
    pub dropped: Arc<AtomicUsize>,
}

struct Unfinished(Option<Arc<AtomicUsize>>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(dropped) = self.0.take() {
            dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl App {
    /// Serves HTTP/1.1 and HTTP/2 with prior knowledge.
    pub async fn start() -> (Self, SocketAddr) {
        Self::start_over(None).await
    }

    /// Serves over TLS, with a certificate of its own making, what these protocols name.
    pub async fn start_tls(alpn: &[&str]) -> (Self, SocketAddr) {
        Self::start_over(Some(self_signed(alpn))).await
    }

    async fn start_over(tls: Option<TlsAcceptor>) -> (Self, SocketAddr) {
        let app = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = app.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tcp.set_nodelay(true).unwrap();
                tokio::spawn(serving.clone().serve(tcp, tls.clone()));
            }
        });
        (app, address)
    }

    async fn serve(self, tcp: TcpStream, tls: Option<TlsAcceptor>) {
        if says_hello(&tcp).await {
            self.hellos.fetch_add(1, Ordering::SeqCst);
        }
        match tls {
            None => self.serve_http(TokioIo::new(tcp)).await,
            Some(tls) => {
                if let Ok(tls) = tls.accept(tcp).await {
                    self.serve_http(TokioIo::new(tls)).await;
                }
            }
        }
    }

    async fn serve_http(self, io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static) {
        let first_host = Arc::new(OnceLock::new());
        let service = service_fn(move |request: Request<Incoming>| {
            let app = self.clone();
            let host = request.uri().authority().map(ToString::to_string);
            let host = host.unwrap_or_else(|| request.headers()["host"].to_str().unwrap().to_owned());
            if first_host.get().is_none() {
                app.connections.fetch_add(1, Ordering::SeqCst);
            }
            if *first_host.get_or_init(|| host.clone()) != host {
                app.mixed.fetch_add(1, Ordering::SeqCst);
            }
            async move { Ok::<_, std::convert::Infallible>(app.answer(request).await) }
        });
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection_with_upgrades(io, service).await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        match request.uri().path() {
            "/slow" => {
                let mut unfinished = Unfinished(Some(self.dropped.clone()));
                self.go.notified().await;
                unfinished.0 = None;
                Response::new(full("at last"))
            }
            // Two events; the second one after `go`.
            "/events" => {
                let (send, receive) = mpsc::channel::<Bytes>(1);
                let (go, dropped) = (self.go.clone(), self.dropped.clone());
                tokio::spawn(async move {
                    let _ = send.send(Bytes::from_static(b"data: 1\n\n")).await;
                    tokio::select! {
                        () = go.notified() => { let _ = send.send(Bytes::from_static(b"data: 2\n\n")).await; }
                        () = send.closed() => { dropped.fetch_add(1, Ordering::SeqCst); }
                    }
                });
                let frames = futures::stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) });
                let body = StreamBody::new(frames.map(|bytes| Ok(Frame::data(bytes))));
                Response::builder().header("content-type", "text/event-stream").body(BodyExt::boxed(body)).unwrap()
            }
            // Echoes each piece of the body at once, then sends trailers, as a gRPC server does.
            "/duplex" => {
                let trailers: HeaderMap = [("grpc-status", "0"), ("grpc-message", "fine")]
                    .into_iter()
                    .map(|(name, value)| (http::HeaderName::from_static(name), http::HeaderValue::from_static(value)))
                    .collect();
                let echoed = request.into_body().into_data_stream().map(|bytes| Ok(Frame::data(bytes?)));
                let body = StreamBody::new(echoed.chain(futures::stream::once(async move { Ok(Frame::trailers(trailers)) })));
                Response::builder().header("content-type", "application/grpc").body(BodyExt::boxed(body)).unwrap()
            }
            "/length" => {
                let length = request.into_body().collect().await.map(|body| body.to_bytes().len());
                Response::new(full(format!("{length:?}")))
            }
            // What came in, one field to a line.
            _ => {
                let mut text = format!("{} {} {:?}\n", request.method(), request.uri().path(), request.version());
                for (name, value) in request.headers() {
                    text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
                }
                let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                text.push_str(&format!("\n{}", String::from_utf8_lossy(&body)));
                Response::builder().header("set-cookie", "a=1").header("set-cookie", "b=2").body(full(text)).unwrap()
            }
        }
    }
}

/// Plays a script to each connection. What the guest reads is kept.
pub async fn scripted<F, R>(script: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Clone + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    speaking_first(move |tcp| {
        let script = script.clone();
        async move {
            // The question whether the app speaks TLS is not part of the play.
            if !says_hello(&tcp).await {
                script(tcp).await;
            }
        }
    })
    .await
}

/// The same for a script that does not wait for the first byte, and is played to every connection.
pub async fn speaking_first<F, R>(script: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(script(tcp));
        }
    });
    address
}

/// Whether the first byte of a connection is a TLS handshake's.
pub async fn says_hello(tcp: &TcpStream) -> bool {
    let mut first = [0];
    matches!(tcp.peek(&mut first).await, Ok(1)) && first == [22]
}

/// TLS as an app in a guest has it.
pub fn self_signed(alpn: &[&str]) -> TlsAcceptor {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["inside.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config =
        rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// Reads until the end of a header.
pub async fn read_header(tcp: &mut TcpStream) -> String {
    let mut header = Vec::new();
    while !header.ends_with(b"\r\n\r\n") {
        match tcp.read_u8().await {
            Ok(byte) => header.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&header).into_owned()
}

/// A guest that reads a header, says these bytes and closes.
pub async fn canned(answer: impl Into<Vec<u8>>) -> SocketAddr {
    let answer = Arc::new(answer.into());
    scripted(move |mut tcp| {
        let answer = answer.clone();
        async move {
            read_header(&mut tcp).await;
            let _ = tcp.write_all(&answer).await;
            let _ = tcp.shutdown().await;
        }
    })
    .await
}
