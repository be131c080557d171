//! The composition root: makes the pieces, hands each what it needs, starts them, and stops them in order.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use config::Config;
use control_api::{AccessKeys, ApiConfig, Pieces};
use gateway::{AccessLogTarget, Gateway, GatewayConfig};
use idle_controller::{Controller, ControllerConfig};
use image_builder::{BuilderConfig, Catalog};
use model::SystemClock;
use token::KeyRing;
use tokio::{net::TcpListener, signal::unix::SignalKind, task::JoinSet};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    engine::Engine,
    guest_kit,
    kvm::{self, HostConfig, Limits, PoolConfig},
    qemu,
};

use crate::{
    admin::{Admin, Readiness},
    doctor,
    env::{self, NodeFile},
    files,
    log::Log,
    pki,
};

/// How long builds and API calls get once the edge has drained.
const CLOSE_GRACE: Duration = Duration::from_secs(10);

/// `dormouse serve`.
pub fn serve(config: Config) -> Result<()> {
    let log = Log::start(&config)?;
    runtime()?.block_on(run(config, &log))
}

/// `dormouse env`.
pub fn env(config: Config) -> Result<()> {
    let data_dir = &config.node.data_dir;
    let node = NodeFile::read(data_dir)?;
    let keys = AccessKeys::open_or_create(&credentials_file(data_dir))?;
    let key = keys.first();
    print!("{}", env::exports(&node, &key.id, &key.secret));
    Ok(())
}

/// `dormouse doctor`.
pub fn doctor(config: Config) -> Result<()> {
    if runtime()?.block_on(doctor::run(&config)) { Ok(()) } else { bail!("something is missing; see the lines marked MISSING") }
}

/// `dormouse base`.
pub fn base(config: Config) -> Result<()> {
    let _log = Log::start(&config)?;
    runtime()?.block_on(async {
        image_builder::ensure_base(&config.guest.base_dir, &|line: &str| println!("    {line}")).await?;
        Ok(())
    })
}

fn credentials_file(data_dir: &Path) -> PathBuf {
    data_dir.join("credentials")
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")
}

async fn run(config: Config, log: &Log) -> Result<()> {
    files::private_dir(&config.node.data_dir)?;
    let data_dir = fs::canonicalize(&config.node.data_dir).with_context(|| format!("finding {}", config.node.data_dir.display()))?;
    let _lock = lock(&data_dir)?;

    // Listen first: a taken port is the most common mistake and should be told before anything slow.
    let api_listener = listen("api.listen", config.api.listen).await?;
    let admin_listener = listen("admin.listen", config.admin.listen).await?;

    let metrics = prometheus::Registry::new();
    log.register(&metrics)?;
    let admin = Admin::new(metrics.clone());
    let mut servers = JoinSet::new();
    let stop_admin = CancellationToken::new();
    {
        let (router, stop) = (admin.clone().router(), stop_admin.clone());
        servers.spawn(async move { axum::serve(admin_listener.listener, router).with_graceful_shutdown(stop.cancelled_owned()).await.context("serving the admin listener") });
    }

    let keys = KeyRing::open_or_create(&data_dir.join("token-keys.json"))?;
    let access_keys = AccessKeys::open_or_create(&credentials_file(&data_dir))?;
    let tls = pki::server_config(&data_dir, &config.edge.domain_suffix)?;
    let engine = open_engine(&config, &data_dir).await?;
    let clock = Arc::new(SystemClock);

    let controller = Controller::open(
        ControllerConfig {
            dir: data_dir.clone(),
            max_concurrent_starts: config.lifecycle.max_concurrent_starts,
            max_waiting_per_microvm: config.lifecycle.max_waiting_per_microvm,
            keep_terminated: config.lifecycle.keep_terminated,
            max_microvms: config.lifecycle.max_microvms,
        },
        Arc::clone(&engine),
        clock.clone(),
        &metrics,
    )
    .await?;
    let catalog = Catalog::open(
        BuilderConfig {
            dir: data_dir.join("images"),
            base_dir: config.guest.base_dir.clone(),
            max_concurrent_builds: config.build.max_concurrent,
            ready_timeout: config.build.ready_timeout,
            build_timeout: config.build.timeout,
        },
        Arc::clone(&engine),
    )
    .await?;

    let gateway = Gateway::bind(
        GatewayConfig {
            listen: config.edge.listen,
            domain_suffix: config.edge.domain_suffix.clone(),
            access_log: config.log.access.clone().map_or(AccessLogTarget::Stderr, AccessLogTarget::File),
            limits: config.edge.limits.clone(),
        },
        controller.clone(),
        keys.clone(),
        tls,
        &metrics,
    )
    .await
    .with_context(|| format!("edge.listen: opening {}", config.edge.listen))?;
    let edge = gateway.local_addr();

    let api = control_api::router(
        ApiConfig {
            dir: data_dir.clone(),
            s3_dir: data_dir.join("s3"),
            region: config.node.region.clone(),
            account: config.node.account.clone(),
            endpoint_authority_suffix: match edge.port() {
                443 => config.edge.domain_suffix.clone(),
                port => format!("{}:{port}", config.edge.domain_suffix),
            },
            allow_file_artifacts: config.api.allow_file_artifacts,
            least_idle: config.lifecycle.least_idle,
            max_concurrent_requests: ApiConfig::DEFAULT_MAX_CONCURRENT_REQUESTS,
            request_timeout: ApiConfig::DEFAULT_REQUEST_TIMEOUT,
        },
        Pieces { controller: controller.clone(), catalog: catalog.clone(), tokens: keys.clone(), access_keys: access_keys.clone(), clock },
        &metrics,
    )?;

    let (stop_edge, stop_api) = (CancellationToken::new(), CancellationToken::new());
    let mut edge_task = tokio::spawn(gateway.serve(stop_edge.clone()));
    {
        let stop = stop_api.clone();
        servers.spawn(async move { control_api::serve(api_listener.listener, api, stop, CLOSE_GRACE).await.context("serving the API listener") });
    }

    NodeFile {
        pid: std::process::id(),
        edge: edge.to_string(),
        api: api_listener.address.to_string(),
        admin: admin_listener.address.to_string(),
        region: config.node.region.clone(),
        domain_suffix: config.edge.domain_suffix.clone(),
        ca: data_dir.join("ca.pem").to_string_lossy().into_owned(),
    }
    .write(&data_dir)?;
    admin.set_ready(Readiness::Ready);
    tracing::info!(edge = %edge, api = %api_listener.address, admin = %admin_listener.address, data = %data_dir.display(), engine = engine.name(), "dormouse serves; eval \"$(dormouse env --data-dir {})\" points the aws command at it", data_dir.display());

    let failed = tokio::select! {
        () = stop_signal(&keys, &access_keys) => None,
        // A server that ends by itself is a fault: the node goes down in order and says so.
        ended = servers.join_next() => Some(match ended {
            Some(Ok(Err(error))) => error,
            other => anyhow::anyhow!("a listener ended by itself: {other:?}"),
        }),
        ended = &mut edge_task => Some(anyhow::anyhow!("the edge ended by itself: {ended:?}")),
    };

    tracing::info!("stopping: nothing new is taken, what runs may finish");
    admin.set_ready(Readiness::NotReady);
    stop_edge.cancel();
    if !edge_task.is_finished() {
        // The edge keeps its own grace period; it returns as soon as nothing is left.
        let _ = (&mut edge_task).await;
    }
    stop_api.cancel();
    let deadline = CancellationToken::new();
    let timer = {
        let deadline = deadline.clone();
        tokio::spawn(async move {
            tokio::time::sleep(CLOSE_GRACE).await;
            deadline.cancel();
        })
    };
    catalog.close(deadline).await;
    timer.abort();
    let left: Vec<_> = controller.list().into_iter().filter(|view| view.state == model::MicrovmState::Running).collect();
    controller.close().await;
    engine.close().await;
    stop_admin.cancel();
    while servers.join_next().await.is_some() {}
    if left.is_empty() {
        tracing::info!("stopped; no microVM runs");
    } else {
        tracing::info!(running = left.len(), "stopped; running microVMs go on and are adopted by the next start with this data directory");
    }
    failed.map_or(Ok(()), Err)
}

/// Ends at SIGTERM or SIGINT; SIGHUP reads keys again.
async fn stop_signal(keys: &KeyRing, access_keys: &AccessKeys) {
    let signal = |kind| tokio::signal::unix::signal(kind).expect("a signal handler can be installed: the runtime has its signal driver");
    let (mut term, mut int, mut hup) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    loop {
        tokio::select! {
            _ = term.recv() => return,
            _ = int.recv() => return,
            _ = hup.recv() => {
                let outcome = keys.reload().map_err(anyhow::Error::from).and_then(|()| Ok(access_keys.reload()?));
                match outcome {
                    Ok(()) => tracing::info!("SIGHUP: token keys and access keys read again"),
                    Err(error) => tracing::error!(error = %error, "SIGHUP: the keys could not be read again; the old ones stay in force"),
                }
            }
        }
    }
}

struct Listening {
    listener: TcpListener,
    address: SocketAddr,
}

async fn listen(key: &str, address: SocketAddr) -> Result<Listening> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("{key}: opening {address} (is another node or program using it?)"))?;
    let address = listener.local_addr()?;
    Ok(Listening { listener, address })
}

/// One process per data directory.
fn lock(data_dir: &Path) -> Result<File> {
    let path = data_dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).with_context(|| format!("opening {}", path.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!("another dormouse serve uses the data directory {}", data_dir.display()),
        Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

async fn open_engine(config: &Config, data_dir: &Path) -> Result<Arc<dyn Engine>> {
    let choice = doctor::choose(config).await;
    tracing::info!("engine: {}", choice.why);
    let agent = doctor::agent_path(config).map_err(|why| anyhow::anyhow!("{why}; run: make build"))?;
    let kit = guest_kit::assemble(&config.guest.kernel_dir, &agent, &data_dir.join("guest"))?;
    let ready = config.engine.ready_processes;
    let host = HostConfig {
        kernel: kit.kernel,
        initrd: kit.initrd,
        guest_fingerprint: kit.fingerprint,
        run_dir: data_dir.join("run/vmm"),
        pool: PoolConfig { per_image: ready.min(1), total: ready },
        limits: Limits::default(),
    };
    match choice.engine {
        doctor::Engine::Kvm => {
            let vmm = doctor::vmm_path(config).map_err(|why| anyhow::anyhow!("{why}; run: make build"))?;
            Ok(Arc::new(kvm::KvmEngine::new(kvm::KvmConfig { uid_base: config.engine.first_user, ..kvm::KvmConfig::new(vmm, host) }).await?))
        }
        doctor::Engine::Qemu => {
            let accel = match config.engine.accelerator {
                config::Accelerator::Tcg => qemu::Accel::Tcg,
                config::Accelerator::Kvm => qemu::Accel::Kvm,
            };
            Ok(Arc::new(qemu::QemuEngine::new(qemu::QemuConfig { qemu: config.engine.qemu.clone(), accel, host }).await?))
        }
    }
}
