//! The gateway under test: the real crate with a real controller, over an engine whose microVM is this host's upstream.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use config::{Config, EdgeLimits};
use gateway::{AccessLogTarget, Gateway, GatewayConfig};
use idle_controller::{Controller, ControllerConfig, RunSpec};
use model::{Generation, IdlePolicy, ImageVersion, MicrovmId, MicrovmState, Port, PortScope, SystemClock};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use token::{Claims, KeyRing};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use vmm_runtime::engine::{
    BootSpec, DialError, Engine, EngineError, Exit, GuestStream, ImageSnapshot, LaunchSpec, RestoreSpec, SnapshotRecord, Started, SuspendOutcome,
    Usage, Vm,
};

/// Endpoints are below this name.
pub const SUFFIX: &str = "microvm.localhost";
/// What the bench tells the gateway, and what it answers, in its directory.
pub const SETTINGS: &str = "settings.json";
pub const READY: &str = "ready.json";
/// The guest port of the silent WebSockets.
pub const WEBSOCKETS: u16 = 8081;

/// Runs until SIGTERM.
pub fn run(dir: &Path) -> Result<()> {
    let settings: serde_json::Value = serde_json::from_str(&fs::read_to_string(dir.join(SETTINGS)).context("reading the settings")?)?;
    // The node's runtime, which has a worker for each core: here there is one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(serve(dir, &settings))
}

async fn serve(dir: &Path, settings: &serde_json::Value) -> Result<()> {
    let text = |key: &str| settings[key].as_str().with_context(|| format!("no {key}"));
    let address = |key: &str| Ok::<SocketAddr, anyhow::Error>(text(key)?.parse()?);
    let metrics = prometheus::Registry::new();
    let engine = Direct { upstream: address("upstream")?, websockets: address("websockets")? };
    let controller = Controller::open(
        ControllerConfig {
            dir: dir.join("controller"),
            max_concurrent_starts: 1,
            max_waiting_per_microvm: 100,
            keep_terminated: Duration::from_secs(600),
            max_microvms: 10,
            suspend_hook_failure: Default::default(),
        },
        Arc::new(engine),
        Arc::new(SystemClock),
        &metrics,
    )
    .await?;
    let hour = Duration::from_secs(3600);
    let spec = RunSpec {
        image: "bench".parse()?,
        version: ImageVersion::FIRST,
        image_dir: "/nonexistent".into(),
        idle: Some(IdlePolicy { max_idle: hour, suspended: hour, auto_resume: true }),
        max_duration: hour,
        identity: BTreeMap::new(),
        egress: Default::default(),
        hooks: None,
        run_payload: None,
        request: serde_json::Value::Null,
        size: model::MemorySize::DEFAULT,
        keep_output: true,
    };
    let view = controller.run(spec).await?;
    let microvm = controller.find(view.id).context("the microVM has gone")?;
    microvm.wait_until(|view| view.state == MicrovmState::Running).await;

    let keys = KeyRing::open_or_create(&dir.join("keys.json"))?;
    let now = SystemTime::now();
    let token = keys.mint(&Claims { microvm: view.id, ports: PortScope::All, shell: false, issued_at: now, expires_at: now + hour });
    let (certificate, key) = (PathBuf::from(text("cert")?), PathBuf::from(text("key")?));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(
        CertificateDer::pem_file_iter(&certificate)?.collect::<Result<_, _>>()?,
        PrivateKeyDer::from_pem_file(&key)?,
    )?;
    // All connections come from one address.
    let limits = EdgeLimits { max_connections_per_address: 10_000, ..Config::defaults().edge.limits };
    let config = GatewayConfig { listen: address("listen")?, domain_suffix: SUFFIX.to_owned(), access_log: AccessLogTarget::File(dir.join("access.log")), limits };
    let gateway = Gateway::bind(config, controller.clone(), keys, Arc::new(tls), &metrics).await?;
    let stop = CancellationToken::new();
    let served = tokio::spawn(gateway.serve(stop.clone()));
    let ready = serde_json::json!({ "host": format!("{}.{SUFFIX}", view.endpoint), "token": token });
    fs::write(dir.join("ready.new"), ready.to_string())?;
    fs::rename(dir.join("ready.new"), dir.join(READY))?;
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    term.recv().await;
    served.abort();
    Ok(())
}

/// An engine of one microVM whose ports are sockets of this host.
#[derive(Clone, Copy)]
struct Direct {
    upstream: SocketAddr,
    websockets: SocketAddr,
}

fn never<T>(what: &str) -> Result<T, EngineError> {
    Err(EngineError::Host { what: format!("{what}: this engine only dials") })
}

#[async_trait]
impl Engine for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    async fn boot(&self, _spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        never("boot")
    }

    async fn capture_image(&self, _vm: Arc<dyn Vm>, _into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        never("capture an image")
    }

    async fn launch(&self, _spec: LaunchSpec) -> Result<Started, EngineError> {
        Ok(Started { vm: Arc::new(*self), read_bytes: 0, phases: Vec::new() })
    }

    async fn restore(&self, _spec: RestoreSpec) -> Result<Started, EngineError> {
        never("restore")
    }

    async fn adopt(&self, _id: MicrovmId, _dir: PathBuf, _image: PathBuf, _generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError> {
        Ok(None)
    }

    async fn committed(&self, _dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError> {
        Ok(None)
    }

    async fn warm(&self, _image_dir: PathBuf) {}

    async fn sweep(&self, _keep: &[MicrovmId]) -> Result<(), EngineError> {
        Ok(())
    }

    async fn close(&self) {}
}

#[async_trait]
impl Vm for Direct {
    async fn dial(&self, port: Port) -> Result<GuestStream, DialError> {
        let address = if port.get() == WEBSOCKETS { self.websockets } else { self.upstream };
        let stream = TcpStream::connect(address).await.map_err(|_| DialError::Refused { port })?;
        let _ = stream.set_nodelay(true);
        Ok(Box::pin(stream))
    }

    async fn dial_shell(&self) -> Result<GuestStream, DialError> {
        Err(DialError::NoShell)
    }

    async fn ready(&self, _limit: Duration) -> Result<Port, EngineError> {
        Ok(Port::DEFAULT)
    }

    async fn suspend(&self, _cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
        never("suspend")
    }

    fn release_streams(&self) {}

    async fn parked_write(&self) {
        std::future::pending().await
    }

    async fn kill(&self) {}

    async fn exited(&self) -> Exit {
        std::future::pending().await
    }

    async fn usage(&self) -> Usage {
        Usage::default()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
