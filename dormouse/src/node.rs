//! The composition root: makes the pieces, hands each what it needs, starts them, and stops them in order.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use config::Config;
use control_api::{AccessKeys, ApiConfig, Pieces};
use gateway::{AccessLogTarget, Gateway, GatewayConfig, Limits, Microvms, Tls};
use idle_controller::{Controller, ControllerConfig};
use image_builder::{BuilderConfig, Catalog};
use model::SystemClock;
use token::KeyRing;
use tokio::{
    signal::unix::{Signal, SignalKind},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    EgressPolicy,
    engine::Engine,
    guest_kit,
    kvm::{self, HostConfig, PoolConfig},
    qemu,
};

use crate::{
    api_settings,
    admin::{Admin, Readiness},
    doctor,
    env::{self, NodeFile},
    files,
    handover::{self, Listeners, Offer, Predecessor, Successor},
    log::Log,
    notify, pki,
    reload::{self, Reloads},
};

/// How long builds and API calls get once the edge has drained.
const CLOSE_GRACE: Duration = Duration::from_secs(10);

/// What `dormouse serve` is told.
pub struct Serve {
    /// The settings.
    pub config: Config,
    /// Where they were read; `None`: they are the defaults.
    pub config_file: Option<PathBuf>,
    /// Whether a running node is to be followed.
    pub upgrade: bool,
}

/// How a node's life in this process ended.
enum Ended {
    /// It was told to.
    Stopped,
    /// A new process waits for what it held.
    Followed(Successor),
}

/// `dormouse serve`.
pub fn serve(serve: Serve) -> Result<()> {
    let Serve { config, config_file, upgrade } = &serve;
    let log = Log::start(config)?;
    // Before anything is opened: each connection at the edge takes up to two.
    gateway::raise_open_files().context("raising the limit of open files to its hard limit")?;
    files::private_dir(&config.node.data_dir)?;
    let data_dir = fs::canonicalize(&config.node.data_dir).with_context(|| format!("finding {}", config.node.data_dir.display()))?;
    // Listen first: a taken port is the most common mistake and should be told before anything slow.
    let (listeners, mut predecessor, mut held) = if *upgrade {
        let (listeners, predecessor) = handover::take_over(&data_dir, config)?;
        (listeners, Some(predecessor), None)
    } else {
        let held = lock(&data_dir)?;
        files::remove_leftovers(&data_dir)?;
        (Listeners::open(config)?, None, Some(held))
    };
    loop {
        let place = Place { config, config_file: config_file.as_deref(), data_dir: &data_dir, listeners: &listeners, log: &log };
        let runtime = runtime()?;
        let ended = runtime.block_on(run(place, predecessor.take(), &mut held));
        // Whatever a task still held of a microVM is let go of: a new process could not reach it otherwise.
        runtime.shutdown_timeout(CLOSE_GRACE);
        match ended? {
            Ended::Stopped => return Ok(()),
            Ended::Followed(successor) => {
                held = None;
                if successor.release() {
                    tracing::info!("the new process has taken over; this one ends");
                    return Ok(());
                }
                tracing::error!("the new process ended before it had taken over; its own last words say why. This one starts again");
            }
        }
    }
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

pub(crate) fn credentials_file(data_dir: &Path) -> PathBuf {
    data_dir.join("credentials")
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")
}

/// What does not change when a node starts again in the same process.
#[derive(Clone, Copy)]
struct Place<'a> {
    config: &'a Config,
    config_file: Option<&'a Path>,
    data_dir: &'a Path,
    listeners: &'a Listeners,
    log: &'a Log,
}

async fn run(place: Place<'_>, predecessor: Option<Predecessor>, held: &mut Option<File>) -> Result<Ended> {
    let Place { config, data_dir, listeners, .. } = place;
    let mut signals = Signals::new()?;
    let metrics = prometheus::Registry::new();
    place.log.register(&metrics)?;
    let admin = Admin::new(metrics.clone());
    let mut servers = JoinSet::new();
    let stop_admin = CancellationToken::new();
    {
        let (router, stop, listener) = (admin.clone().router(), stop_admin.clone(), Listeners::for_tokio(&listeners.admin)?);
        servers.spawn(async move { axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await.context("serving the admin listener") });
    }

    let keys = KeyRing::open_or_create(&data_dir.join("token-keys.json"))?;
    let access_keys = AccessKeys::open_or_create(&credentials_file(data_dir))?;
    access_keys.set_roles(api_settings::roles(&config.api.keys));
    let certificate = pki::certificate(data_dir, &config.edge)?;
    let tls = Tls::from(certificate.load()?);
    let engine = open_engine(config, data_dir).await?;
    let clock = Arc::new(SystemClock);

    // From here on clients are accepted; their requests wait until the microVMs are there.
    let microvms = Microvms::awaited();
    files::private_dir(&data_dir.join("run"))?;
    let gateway = Gateway::on(
        Listeners::for_tokio(&listeners.edge)?,
        GatewayConfig {
            listen: config.edge.listen,
            domain_suffix: config.edge.domain_suffix.clone(),
            access_log: config.log.access.clone().map_or(AccessLogTarget::Stderr, AccessLogTarget::File),
            limits: config.edge.limits.clone(),
        },
        microvms.clone(),
        keys.clone(),
        tls.clone(),
        &metrics,
    )
    .context("opening the edge")?;
    let (edge, limits) = (gateway.local_addr(), gateway.limits());
    let (stop_edge, stop_api) = (CancellationToken::new(), CancellationToken::new());
    let mut edge_task = tokio::spawn(gateway.serve(stop_edge.clone()));

    let replaced = match predecessor {
        Some(predecessor) => {
            tracing::info!("ready to follow the running node; requests wait until it has let go of the microVMs");
            tokio::select! {
                replaced = predecessor.replace() => Some(replaced?),
                () = signals.stop() => bail!("told to stop before the running node had let go; it goes on"),
            }
        }
        None => None,
    };
    if held.is_none() {
        *held = Some(lock_when_free(data_dir).await?);
    }

    let controller = Controller::open(
        ControllerConfig {
            dir: data_dir.to_owned(),
            max_concurrent_starts: config.lifecycle.max_concurrent_starts,
            max_waiting_per_microvm: config.lifecycle.max_waiting_per_microvm,
            keep_terminated: config.lifecycle.keep_terminated,
            max_microvms: config.lifecycle.max_microvms,
            suspend_hook_failure: config.lifecycle.suspend_hook_failure,
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
            max_unfinished_builds: config.build.max_unfinished,
            max_images: config.build.max_images,
            max_versions: config.build.max_versions,
            ready_timeout: config.build.ready_timeout,
            build_timeout: config.build.timeout,
            size_seen: config.guest.size_seen,
            network: config.build.network,
            egress: egress_policy(config),
        },
        Arc::clone(&engine),
    )
    .await?;

    let api = control_api::router(
        ApiConfig {
            dir: data_dir.to_owned(),
            s3_dir: data_dir.join("s3"),
            region: config.node.region.clone(),
            account: config.node.account.clone(),
            endpoint_authority_suffix: match edge.port() {
                443 => config.edge.domain_suffix.clone(),
                port => format!("{}:{port}", config.edge.domain_suffix),
            },
            allow_file_artifacts: config.api.allow_file_artifacts,
            prices: config.prices,
            max_memory_mib: config.lifecycle.max_memory_mib,
            rates: api_settings::rates(&config.api.rates),
            least_idle: config.lifecycle.least_idle,
            max_concurrent_requests: ApiConfig::DEFAULT_MAX_CONCURRENT_REQUESTS,
            request_timeout: ApiConfig::DEFAULT_REQUEST_TIMEOUT,
        },
        Pieces { controller: controller.clone(), catalog: catalog.clone(), tokens: keys.clone(), access_keys: access_keys.clone(), clock },
        &metrics,
    )?;

    let mut reloads = reloads(place, &metrics, certificate, tls, &keys, &access_keys, limits)?;
    let offer = Offer::open(data_dir)?;
    microvms.arrive(controller.clone());
    let (api_address, admin_address) = (listeners.api.local_addr()?, listeners.admin.local_addr()?);
    {
        let (stop, listener) = (stop_api.clone(), Listeners::for_tokio(&listeners.api)?);
        servers.spawn(async move { control_api::serve(listener, api, stop, CLOSE_GRACE).await.context("serving the API listener") });
    }

    NodeFile {
        pid: std::process::id(),
        edge: edge.to_string(),
        api: api_address.to_string(),
        admin: admin_address.to_string(),
        region: config.node.region.clone(),
        domain_suffix: config.edge.domain_suffix.clone(),
        ca: data_dir.join("ca.pem").to_string_lossy().into_owned(),
    }
    .write(data_dir)?;
    admin.set_ready(Readiness::Ready);
    tracing::info!(edge = %edge, api = %api_address, admin = %admin_address, data = %data_dir.display(), engine = engine.name(), "dormouse serves; eval \"$(dormouse env --data-dir {})\" points the aws command at it", data_dir.display());

    if let Some(replaced) = replaced {
        // Much may have changed while the other process drained, and it was that one which noticed.
        reloads.all("this process took over");
        replaced.adopted().await;
    }
    notify::ready();

    let mut poll = tokio::time::interval(reload::POLL);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let ended = {
        let mut successor = std::pin::pin!(offer.successor(listeners));
        loop {
            // No arm loses anything when another one wins.
            tokio::select! {
                _ = signals.term.recv() => break Ok(Ended::Stopped),
                _ = signals.int.recv() => break Ok(Ended::Stopped),
                _ = signals.hup.recv() => reloads.all("SIGHUP"),
                _ = signals.usr2.recv() => start_successor(),
                _ = poll.tick() => reloads.changed(),
                successor = &mut successor => break Ok(Ended::Followed(successor)),
                // A server that ends by itself is a fault: the node goes down in order and says so.
                server = servers.join_next() => break Err(match server {
                    Some(Ok(Err(error))) => error,
                    other => anyhow!("a listener ended by itself: {other:?}"),
                }),
                edge = &mut edge_task => break Err(anyhow!("the edge ended by itself: {edge:?}")),
            }
        }
    };

    tracing::info!("stopping: nothing new is taken, what runs may finish");
    admin.set_ready(Readiness::NotReady);
    drop(offer);
    if matches!(ended, Ok(Ended::Followed(_))) {
        // The new process says what there is to say; both would answer, by turns.
        stop_admin.cancel();
    }
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
    ended
}

/// What an operator says to a running node.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    usr2: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let signal = |kind| tokio::signal::unix::signal(kind).context("installing a signal handler");
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
            usr2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits until the process is told to stop.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// Runs the binary that lies where this one was started from, with the same arguments, to follow this process.
fn start_successor() {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_default();
    let mut command = tokio::process::Command::new(&program);
    command.args(arguments.filter(|argument| argument != "--upgrade")).arg("--upgrade").stdin(std::process::Stdio::null());
    match command.spawn() {
        Ok(mut child) => {
            tracing::info!(pid = child.id(), program = %program.display(), "SIGUSR2: started a new process to follow this one");
            tokio::spawn(async move {
                if let Ok(status) = child.wait().await {
                    tracing::error!(%status, "the new process ended; its own last words say why");
                }
            });
        }
        Err(error) => tracing::error!(%error, program = %program.display(), "SIGUSR2: no new process could be started; this one goes on"),
    }
}

/// Everything that is read again.
fn reloads(place: Place<'_>, metrics: &prometheus::Registry, certificate: pki::Certificate, tls: Tls, keys: &KeyRing, access_keys: &AccessKeys, limits: Limits) -> Result<Reloads> {
    let mut reloads = Reloads::new(metrics)?;
    let (keys, access_keys) = (keys.clone(), access_keys.clone());
    reloads.add("certificate", vec![certificate.chain.clone(), certificate.key.clone()], move || {
        tls.replace(&*certificate.load()?);
        Ok(())
    });
    reloads.add("token-keys", vec![place.data_dir.join("token-keys.json")], move || Ok(keys.reload()?));
    let (credentials, config_file) = (credentials_file(place.data_dir), place.config_file.map(Path::to_owned));
    let files = [Some(credentials), config_file.clone()].into_iter().flatten().collect();
    reloads.add("access-keys", files, move || {
        // The keys first: one that was taken out is gone also if the configuration is wrong just now.
        let keys = access_keys.reload();
        if let Some(file) = &config_file {
            access_keys.set_roles(api_settings::roles(&Config::load(Some(file))?.api.keys));
        }
        Ok(keys?)
    });
    if let Some(file) = place.config_file {
        let (mut running, file) = (place.config.clone(), file.to_owned());
        reloads.add("limits", vec![file.clone()], move || {
            let fresh = Config::load(Some(&file))?;
            limits.replace(fresh.edge.limits.clone());
            running.edge.limits.clone_from(&fresh.edge.limits);
            // Read again with the access keys.
            running.api.keys.clone_from(&fresh.api.keys);
            running.node.data_dir.clone_from(&fresh.node.data_dir);
            if running != fresh {
                tracing::warn!(file = %file.display(), "other settings than the limits of [edge] and [[api.keys]] have changed too; they take effect at the next start or upgrade");
            }
            Ok(())
        });
    }
    Ok(reloads)
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

/// The same after another process, whose end is seen a little before the kernel has given its lock back.
async fn lock_when_free(data_dir: &Path) -> Result<File> {
    let deadline = tokio::time::Instant::now() + CLOSE_GRACE;
    loop {
        match lock(data_dir) {
            Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(10)).await,
            outcome => return outcome,
        }
    }
}

fn egress_policy(config: &Config) -> EgressPolicy {
    EgressPolicy { also: config.guest.egress_allow.clone(), name_servers: config.guest.name_servers.clone() }
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
        limits: kvm::Limits::default(),
        roles: config.guest.roles.clone(),
        egress: Arc::new(egress_policy(config)),
        log_bytes: config.log.microvm_bytes,
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
