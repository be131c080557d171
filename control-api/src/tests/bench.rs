//! A node's API on a port of its own, and a client that signs as AWS's documents say, without this crate's code for it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use axum::body::Body;
use hmac::{Hmac, Mac as _};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use idle_controller::{Controller, ControllerConfig};
use image_builder::{BuildFailure, BuildRequest, Catalog, ScriptedBuilds};
use model::{Clock, ImageVersion, SystemClock};
use parking_lot::Mutex;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::{OffsetDateTime, macros::format_description};
use token::KeyRing;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use vmm_runtime::loopback::LoopbackEngine;

use crate::{AccessKey, AccessKeys, ApiConfig, Parts, Role};

pub(super) const REGION: &str = "us-east-1";
pub(super) const ACCOUNT: &str = "000000000000";

/// Images whose builds end when the test says so.
pub(super) struct Images {
    pub(super) catalog: Catalog,
    builds: ScriptedBuilds,
}

impl Images {
    /// Ends the build of version 1.0.
    pub(super) async fn end(&self, name: &str, failure: Option<BuildFailure>) {
        self.end_version(name, 1, failure).await;
    }

    pub(super) async fn end_version(&self, name: &str, major: u32, failure: Option<BuildFailure>) {
        self.builds.end(&self.catalog, name, ImageVersion { major, minor: 0 }, failure).await;
    }

    /// What was asked to be built, once that is at least so much.
    pub(super) async fn requests(&self, at_least: usize) -> Vec<BuildRequest> {
        self.builds.requests(at_least).await
    }
}

/// The system's clock, ahead by what a test says.
#[derive(Clone, Default)]
struct ShiftedClock(Arc<Mutex<Duration>>);

impl Clock for ShiftedClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now() + *self.0.lock()
    }
}

/// A node's API.
pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    pub(super) address: SocketAddr,
    pub(super) engine: LoopbackEngine,
    pub(super) images: Images,
    access_keys: AccessKeys,
    roles: Mutex<BTreeMap<String, Role>>,
    clock: ShiftedClock,
    pub(super) controller: Controller,
    pub(super) tokens: KeyRing,
    pub(super) key: AccessKey,
    pub(super) metrics: prometheus::Registry,
    stop: CancellationToken,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Bench {
    pub(super) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With settings of the test's own.
    pub(super) async fn with(change: impl FnOnce(&mut ApiConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (engine, builds, metrics) = (LoopbackEngine::new(), ScriptedBuilds::default(), prometheus::Registry::new());
        let catalog = builds.catalog(ScriptedBuilds::config(&dir.path().join("images")), Arc::new(engine.clone())).await.unwrap();
        let images = Images { catalog, builds };
        let limits = ControllerConfig {
            dir: dir.path().to_owned(),
            max_concurrent_starts: 4,
            max_waiting_per_microvm: 100,
            keep_terminated: Duration::from_secs(3_600),
            max_microvms: 30,
            suspend_hook_failure: Default::default(),
        };
        let controller = Controller::open(limits, Arc::new(engine.clone()), Arc::new(SystemClock), &metrics).await.unwrap();
        let clock = ShiftedClock::default();
        let tokens = KeyRing::open_or_create(&dir.path().join("keys.json")).unwrap();
        let access_keys = AccessKeys::open_or_create(&dir.path().join("credentials")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut config = ApiConfig {
            dir: dir.path().to_owned(),
            s3_dir: dir.path().join("s3"),
            region: REGION.to_owned(),
            account: ACCOUNT.to_owned(),
            endpoint_authority_suffix: "microvm.localhost:8443".to_owned(),
            allow_file_artifacts: true,
            prices: model::Prices {
                vcpu_second: 1.0,
                gb_second: 0.0,
                snapshot_read_gb: 0.0,
                snapshot_written_gb: 0.0,
                storage_gb_hour: 0.0,
                transfer_gb: 0.0,
            },
            least_idle: Duration::from_secs(60),
            max_memory_mib: 1 << 20,
            rates: crate::Rates::default(),
            max_concurrent_requests: 16,
            request_timeout: Duration::from_secs(20),
        };
        change(&mut config);
        let parts = Parts {
            controller: controller.clone(),
            images: images.catalog.clone(),
            tokens: tokens.clone(),
            access_keys: access_keys.clone(),
            clock: Arc::new(clock.clone()),
        };
        let router = crate::route(config, parts, &metrics).unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(crate::serve(listener, router, stop.clone(), Duration::from_secs(1)));
        Self { key: access_keys.first(), access_keys, roles: Mutex::default(), clock, dir, address, engine, images, controller, tokens, metrics, stop }
    }

    /// With an image that microVMs can be run from.
    pub(super) async fn with_image(name: &str) -> Self {
        let bench = Self::new().await;
        let made = bench.post("/2025-09-09/microvm-images", image_request(name, CODE)).await;
        assert_eq!(made.status, 201, "{made:?}");
        bench.images.end(name, None).await;
        bench
    }

    /// One more access key, with or without a role.
    pub(super) fn add_key(&self, name: &str, role: Option<Role>) -> AccessKey {
        let key = AccessKey { id: format!("AKIA{}", name.to_uppercase()), secret: format!("secret-of-{name}") };
        let path = self.dir.path().join("credentials");
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str(&format!("[{name}]\naws_access_key_id = {}\naws_secret_access_key = {}\n", key.id, key.secret));
        std::fs::write(&path, text).unwrap();
        self.access_keys.reload().unwrap();
        let mut roles = self.roles.lock();
        roles.extend(role.map(|role| (key.id.clone(), role)));
        self.access_keys.set_roles(roles.clone());
        key
    }

    /// The API's clock goes ahead.
    pub(super) fn later(&self, by: Duration) {
        *self.clock.0.lock() += by;
    }

    /// A call by the holder of another key.
    pub(super) async fn by(&self, key: &AccessKey, method: &str, target: &str, body: Value) -> Got {
        let mut call = self.request(method, target, if body.is_null() { Vec::new() } else { body.to_string().into_bytes() }.as_slice());
        call.key = key.clone();
        self.send(call.signed(self.address)).await
    }

    pub(super) fn request(&self, method: &str, target: &str, body: &[u8]) -> Call {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Call {
            method: method.parse().unwrap(),
            path: path.to_owned(),
            query: query.to_owned(),
            body: body.to_vec(),
            service: "lambda",
            region: REGION,
            key: self.key.clone(),
            at: SystemTime::now(),
            headers: HeaderMap::new(),
        }
    }

    pub(super) async fn get(&self, target: &str) -> Got {
        self.send(self.request("GET", target, b"").signed(self.address)).await
    }

    pub(super) async fn delete(&self, target: &str) -> Got {
        self.send(self.request("DELETE", target, b"").signed(self.address)).await
    }

    pub(super) async fn post(&self, target: &str, body: Value) -> Got {
        self.send(self.request("POST", target, body.to_string().as_bytes()).signed(self.address)).await
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Got {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Got { status: head.status, headers: head.headers, body: serde_json::from_slice(&body).unwrap_or(Value::Null), text: String::from_utf8_lossy(&body).into_owned() }
    }

    /// The listener closes, as at the end of a node.
    pub(super) fn close(&self) {
        self.stop.cancel();
    }

    /// The counter of an operation and status.
    pub(super) fn counted(&self, operation: &str, code: &str) -> f64 {
        let families = self.metrics.gather();
        let family = families.iter().find(|family| family.name() == "api_requests_total").unwrap();
        let fits = |metric: &&prometheus::proto::Metric| {
            let labels: Vec<_> = metric.get_label().iter().map(|label| label.value().to_owned()).collect();
            labels == [code.to_owned(), operation.to_owned()]
        };
        family.get_metric().iter().find(fits).map_or(0.0, |metric| metric.get_counter().get_value())
    }
}

pub(super) fn image_arn(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:{ACCOUNT}:microvm-image:{name}")
}

pub(super) fn connector(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:aws:network-connector:aws-network-connector:{name}")
}

/// A directory of any host that is not the node's data.
pub(super) const CODE: &str = "file:///usr/share";

/// The least that CreateMicrovmImage takes.
pub(super) fn image_request(name: &str, uri: &str) -> Value {
    serde_json::json!({
        "name": name,
        "baseImageArn": format!("arn:aws:lambda:{REGION}:aws:microvm-image:al2023-1"),
        "buildRoleArn": "arn:aws:iam::000000000000:role/build",
        "codeArtifact": {"uri": uri},
    })
}

/// An answer.
#[derive(Debug)]
pub(super) struct Got {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Value,
    pub(super) text: String,
}

impl Got {
    pub(super) fn kind(&self) -> &str {
        self.headers.get("x-amzn-errortype").map_or("", |kind| kind.to_str().unwrap())
    }

    pub(super) fn message(&self) -> &str {
        let message = self.body.get("message").or(self.body.get("Message"));
        message.and_then(Value::as_str).unwrap_or_default()
    }
}

/// A request to be signed.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) body: Vec<u8>,
    pub(super) service: &'static str,
    pub(super) region: &'static str,
    pub(super) key: AccessKey,
    pub(super) at: SystemTime,
    pub(super) headers: HeaderMap,
}

impl Call {
    fn target(&self) -> String {
        if self.query.is_empty() { self.path.clone() } else { format!("{}?{}", self.path, self.query) }
    }

    /// Without a signature.
    pub(super) fn plain(&self, address: SocketAddr) -> Request<Body> {
        let mut request = Request::builder().method(self.method.clone()).uri(self.target()).header("host", address.to_string());
        request.headers_mut().unwrap().extend(self.headers.clone());
        request.body(Body::from(self.body.clone())).unwrap()
    }

    /// With the Authorization header that its holder of the key would send.
    pub(super) fn signed(self, address: SocketAddr) -> Request<Body> {
        let date = OffsetDateTime::from(self.at).format(format_description!("[year][month][day]T[hour][minute][second]Z")).unwrap();
        let encode = |text: &str, keep: &str| -> String {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keep.as_bytes().contains(&byte);
            text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
        };
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let again = |text: &str| encode(&decode(text), "");
        // S3 signs the key encoded once, everybody else encodes what is sent once more.
        let path = if self.service == "s3" { encode(&decode(&self.path), "/") } else { encode(&self.path, "/") };
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let mut query: Vec<String> = pairs.map(|(name, value)| format!("{}={}", again(name), again(value))).collect();
        query.sort();
        let hash = hex::encode(Sha256::digest(&self.body));
        let canonical = format!(
            "{}\n{path}\n{}\nhost:{address}\nx-amz-content-sha256:{hash}\nx-amz-date:{date}\n\nhost;x-amz-content-sha256;x-amz-date\n{hash}",
            self.method,
            query.join("&")
        );
        let scope = format!("{}/{}/{}/aws4_request", &date[..8], self.region, self.service);
        let to_sign = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex::encode(Sha256::digest(canonical)));
        let mut signing = format!("AWS4{}", self.key.secret).into_bytes();
        for step in [&date[..8], self.region, self.service, "aws4_request", &to_sign] {
            let mut mac = Hmac::<Sha256>::new_from_slice(&signing).unwrap();
            mac.update(step.as_bytes());
            signing = mac.finalize().into_bytes().to_vec();
        }
        let mut request = self.plain(address);
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature={}",
            self.key.id,
            hex::encode(signing)
        );
        for (name, value) in [("x-amz-date", date), ("x-amz-content-sha256", hash), ("authorization", authorization)] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        request
    }
}
