//! One gateway, one controller, one loopback engine, and clients for them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use config::{Config, EdgeLimits};
use gateway::{AccessLogTarget, Gateway, GatewayConfig, Limits, Microvms, Tls};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use idle_controller::{Controller, ControllerConfig, MicrovmHandle, RunSpec};
use model::{IdlePolicy, ImageVersion, MicrovmState, Port, PortScope, SystemClock};
use rustls_pki_types::ServerName;
use token::{Claims, KeyRing};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{engine::Engine, loopback::LoopbackEngine};

pub const SUFFIX: &str = "microvm.localhost";
/// Nothing in these tests takes longer than this unless it hangs.
pub const CEILING: Duration = Duration::from_secs(20);

/// Waits for something with a ceiling.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(CEILING, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {CEILING:?}"),
    }
}

/// Looks again and again until it is so.
pub async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + CEILING;
    while !so() {
        assert!(tokio::time::Instant::now() < deadline, "{what} was not so within {CEILING:?}");
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub type Body = BoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

pub struct Rig {
    pub engine: LoopbackEngine,
    pub controller: Controller,
    pub keys: KeyRing,
    pub address: SocketAddr,
    pub metrics: prometheus::Registry,
    pub limits: Limits,
    pub access_log: PathBuf,
    tls: Tls,
    config: GatewayConfig,
    pub stop: CancellationToken,
    pub served: Option<JoinHandle<()>>,
    authority: Authority,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut EdgeLimits)) -> Self {
        let engine = LoopbackEngine::new();
        Self::over(engine.clone(), Arc::new(engine), change).await
    }

    /// Over an engine that wraps a loopback engine.
    pub async fn over(engine: LoopbackEngine, wrapper: Arc<dyn Engine>, change: impl FnOnce(&mut EdgeLimits)) -> Self {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let metrics = prometheus::Registry::new();
        let controller = Controller::open(
            ControllerConfig {
                dir: dir.path().join("controller"),
                max_concurrent_starts: 8,
                max_waiting_per_microvm: 100,
                keep_terminated: Duration::from_secs(600),
                max_microvms: 100,
                suspend_hook_failure: Default::default(),
            },
            wrapper,
            Arc::new(SystemClock),
            &metrics,
        )
        .await
        .unwrap();
        let keys = KeyRing::open_or_create(&dir.path().join("keys")).unwrap();
        let authority = Authority::new();
        let access_log = dir.path().join("access.log");
        let mut limits = EdgeLimits { hold: Duration::from_secs(10), grace: Duration::from_secs(10), ..Config::defaults().edge.limits };
        change(&mut limits);
        let config = GatewayConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            domain_suffix: SUFFIX.to_owned(),
            limits,
            access_log: AccessLogTarget::File(access_log.clone()),
        };
        let tls = Tls::from(Arc::new(authority.server()));
        let gateway = Gateway::bind(config.clone(), controller.clone(), keys.clone(), tls.clone(), &metrics).await.unwrap();
        let (address, limits) = (gateway.local_addr(), gateway.limits());
        let stop = CancellationToken::new();
        let served = tokio::spawn(gateway.serve(stop.clone()));
        Self { engine, controller, keys, address, metrics, limits, tls, config, stop, served: Some(served), access_log, authority, _dir: dir }
    }

    /// Another gateway for the same microVMs on a listener of its own, which clients use from now on.
    pub fn move_to(&mut self, listener: std::net::TcpListener, microvms: impl Into<Microvms>) {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        self.metrics = prometheus::Registry::new();
        let gateway = Gateway::on(listener, self.config.clone(), microvms, self.keys.clone(), self.tls.clone(), &self.metrics).unwrap();
        (self.address, self.limits) = (gateway.local_addr(), gateway.limits());
        self.stop = CancellationToken::new();
        self.served = Some(tokio::spawn(gateway.serve(self.stop.clone())));
    }

    /// A microVM that runs, with this app on its port 8080.
    pub async fn microvm(&self, app: SocketAddr) -> Microvm {
        self.engine.listen(Port::DEFAULT, app);
        self.run(Some(IdlePolicy { max_idle: Duration::from_secs(600), suspended: Duration::from_secs(600), auto_resume: true })).await
    }

    /// A microVM that runs.
    pub async fn run(&self, idle: Option<IdlePolicy>) -> Microvm {
        let spec = RunSpec {
            image: "test".parse().unwrap(),
            version: ImageVersion::FIRST,
            image_dir: "/nonexistent".into(),
            idle,
            max_duration: Duration::from_secs(3600),
            identity: BTreeMap::new(),
            egress: Default::default(),
            hooks: None,
            run_payload: None,
            request: serde_json::Value::Null,
            size: model::MemorySize::DEFAULT,
            keep_output: true,
        };
        let view = self.controller.run(spec).await.unwrap();
        let handle = self.controller.find(view.id).unwrap();
        within("the launch", handle.wait_until(|view| view.state == MicrovmState::Running)).await;
        Microvm { host: format!("{}.{SUFFIX}", view.endpoint), handle }
    }

    /// A token for one microVM.
    pub fn token(&self, microvm: &Microvm, ports: PortScope) -> String {
        self.mint(microvm, |claims| claims.ports = ports)
    }

    pub fn mint(&self, microvm: &Microvm, change: impl FnOnce(&mut Claims)) -> String {
        let now = SystemTime::now();
        let mut claims = Claims {
            microvm: microvm.handle.id(),
            ports: PortScope::All,
            shell: false,
            issued_at: now,
            expires_at: now + Duration::from_secs(600),
        };
        change(&mut claims);
        self.keys.mint(&claims)
    }

    pub async fn tls(&self, alpn: &[&str]) -> TlsStream<TcpStream> {
        self.tls_as("anything.microvm.localhost", alpn).await
    }

    pub async fn tls_as(&self, name: &'static str, alpn: &[&str]) -> TlsStream<TcpStream> {
        self.tls_over(TcpStream::connect(self.address).await.unwrap(), name, alpn).await
    }

    /// A connection from this address of the loopback network: another client.
    pub async fn tcp_from(&self, source: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    pub async fn h1_from(&self, source: &str) -> H1 {
        H1::over(self.tls_over(self.tcp_from(source).await, "anything.microvm.localhost", &["http/1.1"]).await).await
    }

    pub async fn tls_over(&self, tcp: TcpStream, name: &'static str, alpn: &[&str]) -> TlsStream<TcpStream> {
        self.try_tls_over(tcp, name, alpn).await.unwrap()
    }

    pub async fn try_tls(&self, name: &'static str, alpn: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
        self.try_tls_over(TcpStream::connect(self.address).await.unwrap(), name, alpn).await
    }

    async fn try_tls_over(&self, tcp: TcpStream, name: &'static str, alpn: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
        tcp.set_nodelay(true).unwrap();
        within("the TLS handshake", self.tls_client(alpn).connect(ServerName::try_from(name).unwrap(), tcp)).await
    }

    /// A client that keeps its sessions, if it is used again.
    pub fn tls_client(&self, alpn: &[&str]) -> TlsConnector {
        let mut config = rustls::ClientConfig::builder().with_root_certificates(self.authority.roots.clone()).with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }

    pub async fn h1(&self) -> H1 {
        H1::over(self.tls(&["http/1.1"]).await).await
    }

    pub async fn h2(&self) -> H2 {
        let io = TokioIo::new(self.tls(&["h2", "http/1.1"]).await);
        let (send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        H2(send)
    }

    /// The access log so far.
    pub fn log(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(&self.access_log).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// One value of `/metrics`.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let metric = self.one_metric(name, labels);
        metric.get_counter().get_value() + metric.get_gauge().get_value()
    }

    /// How many values one histogram of `/metrics` has been given.
    pub fn observations(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.one_metric(name, labels).get_histogram().get_sample_count()
    }

    fn one_metric(&self, name: &str, labels: &[(&str, &str)]) -> prometheus::proto::Metric {
        let families = self.metrics.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("no metric {name}"));
        let fits = |metric: &&prometheus::proto::Metric| {
            labels.iter().all(|(name, value)| metric.get_label().iter().any(|pair| pair.name() == *name && pair.value() == *value))
        };
        family.get_metric().iter().find(fits).unwrap_or_else(|| panic!("no {name} with {labels:?}")).clone()
    }

    /// Everything of `/metrics` as text.
    pub fn metrics_text(&self) -> String {
        prometheus::TextEncoder::new().encode_to_string(&self.metrics.gather()).unwrap()
    }

    pub fn renew_certificate(&self) {
        self.tls.replace(&self.authority.server());
    }

    pub async fn suspend(&self, microvm: &Microvm) {
        within("the suspend to be taken", microvm.handle.suspend()).await.unwrap();
        let view = within("the suspend", microvm.handle.wait_until(|view| view.state == MicrovmState::Suspended)).await;
        assert_eq!(view.state, MicrovmState::Suspended);
    }
}

/// A certificate authority that the clients trust.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    roots: rustls::RootCertStore,
}

impl Authority {
    fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.self_signed(&key).unwrap().der().clone()).unwrap();
        Self { issuer: rcgen::Issuer::new(ca, key), roots }
    }

    /// A fresh wildcard certificate, as a server shows it.
    fn server(&self) -> rustls::ServerConfig {
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec![format!("*.{SUFFIX}"), "unknown.example".to_owned(), "127.0.0.1".to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![leaf.der().clone()], key).unwrap()
    }
}

pub struct Microvm {
    pub host: String,
    pub handle: MicrovmHandle,
}

impl Microvm {
    pub fn state(&self) -> MicrovmState {
        self.handle.view().state
    }
}

pub struct H1(pub hyper::client::conn::http1::SendRequest<Body>);
pub struct H2(pub hyper::client::conn::http2::SendRequest<Body>);

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub async fn read(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let body = within("the body", body.collect()).await.expect("a whole body");
        Self { status: parts.status.as_u16(), headers: parts.headers, body: body.to_bytes() }
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn reason(&self) -> &str {
        self.header("x-dormouse-reason").unwrap_or("")
    }
}

impl H1 {
    async fn over(tls: TlsStream<TcpStream>) -> Self {
        let (send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self(send)
    }

    pub async fn send(&mut self, request: Request<Body>) -> Answer {
        within("the connection to be ready", self.0.ready()).await.unwrap();
        Answer::read(within("the answer", self.0.send_request(request)).await.unwrap()).await
    }
}

impl H2 {
    pub async fn send(&mut self, request: Request<Body>) -> Answer {
        within("the connection to be ready", self.0.ready()).await.unwrap();
        Answer::read(within("the answer", self.0.send_request(request)).await.unwrap()).await
    }
}

/// A GET over HTTP/1.1.
pub fn get(host: &str, path: &str, fields: &[(&str, &str)]) -> Request<Body> {
    request("GET", host, path, fields, full(""))
}

pub fn request(method: &str, host: &str, path: &str, fields: &[(&str, &str)], body: Body) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}

/// The same over HTTP/2.
pub fn h2_request(method: &str, host: &str, path: &str, fields: &[(&str, &str)], body: Body) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(format!("https://{host}{path}"));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}
