//! What the engines that run one process per microVM have in common, which is nearly everything.
//!
//! Owns: the processes and everything in the directories of microVMs and images; the order of steps of a boot, launch,
//! suspend, restore and adoption; what is undone when a step fails. What differs from VMM to VMM is behind [`Backend`].
//! Never decides when.
//!
//! ```text
//! boot ── a VMM, memory shared with a file ── capture_image ─► <image>/{manifest.json, state, memory, disk}
//! launch ── a VMM, the image's memory MAP_PRIVATE, empty top disk layer, image's state ─► runs as generation 0
//! suspend ─► <microVM>/gen-<n>/{manifest.json, state, memory.diff}, top layer <microVM>/disk/<n>.* sealed
//! restore ── as launch, with the difference laid over the memory, and a new top layer
//! ```
//! A VMM process outlives `serve`; `<microVM>/process.json` says which one it is, and the next `serve` adopts it.

mod adopt;
mod applog;
pub(crate) mod backend;
pub(crate) mod calls;
pub mod cgroup;
pub(crate) mod cpu;
mod egress;
mod image;
mod layers;
mod pool;
pub mod process;
mod record;
mod roles;
mod snapshots;
mod sparse;
mod start;
mod suspend;
mod vm;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Generation, MicrovmId};
use parking_lot::Mutex;

use self::{cgroup::Cgroups, pool::Pool, process::Process};
pub use self::{
    applog::DEFAULT_LOG_BYTES,
    egress::EgressPolicy,
    backend::{Backend, Load, Role, Save, SavedParts},
    image::Image,
    layers::Layers,
    pool::PoolConfig,
    vm::ProcessVm,
};
use crate::{
    engine::{BootSpec, Engine, EngineError, Exit, ImageSnapshot, LaunchSpec, Phases, RestoreSpec, SnapshotRecord, Started, Vm},
    snapshot::manifest::ManifestError,
};

/// How long each step may take. The defaults are many times what an idle machine needs, for crowded ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From the start of a kernel to its agent's first word.
    pub boot: Duration,
    /// For the agent to mount the root disk and start the app.
    pub start_app: Duration,
    /// For the agent of a restored guest to be ready.
    pub attach: Duration,
    /// For the agent to freeze the app before a suspend.
    pub quiesce: Duration,
    /// For a command to the VMM.
    pub command: Duration,
    /// For saving or loading device state.
    pub state: Duration,
    /// For the guest to connect to one of its ports.
    pub dial: Duration,
    /// For a killed process to be gone.
    pub kill: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(120),
            start_app: Duration::from_secs(60),
            attach: Duration::from_secs(20),
            quiesce: Duration::from_secs(10),
            command: Duration::from_secs(10),
            state: Duration::from_secs(30),
            dial: Duration::from_secs(10),
            kill: Duration::from_secs(10),
        }
    }
}

/// What every engine is made of.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Kernel to boot (bzImage, or an ELF with a PVH note). Only a boot needs it.
    pub kernel: PathBuf,
    /// Initramfs with the guest agent. Only a boot needs it.
    pub initrd: PathBuf,
    /// Stands for kernel and initramfs in manifests.
    pub guest_fingerprint: String,
    /// Where processes have their own directories; one engine at a time uses it.
    pub run_dir: PathBuf,
    /// Ready processes.
    pub pool: PoolConfig,
    /// Deadlines.
    pub limits: Limits,
    /// Where guests may connect to that have internet egress.
    pub egress: Arc<EgressPolicy>,
    /// Credentials of execution roles: a file as AWS's shared credentials, with a profile named by the ARN of each.
    pub roles: Option<PathBuf>,
    /// Bytes that are kept of what one microVM's app says.
    pub log_bytes: u64,
}

/// What the engine and its microVMs share.
pub struct Shared<B: Backend> {
    backend: B,
    config: HostConfig,
    /// `None`: this host has none that could be used.
    cgroups: Option<Cgroups>,
    pool: Arc<Pool<B>>,
    /// Images whose memory and disk were read and found right, by the checksum of their manifest.
    verified: Mutex<HashMap<PathBuf, Arc<tokio::sync::OnceCell<u32>>>>,
}

/// The engine of one kind of VMM.
pub struct ProcessEngine<B: Backend> {
    shared: Arc<Shared<B>>,
}

impl<B: Backend> ProcessEngine<B> {
    /// Makes the run directory. Starts no process.
    pub(crate) fn over(backend: B, mut config: HostConfig) -> Result<Self, EngineError> {
        let cgroups = match Cgroups::find() {
            Ok(cgroups) => {
                tracing::info!(dir = %cgroups.dir().display(), "each VMM process gets a cgroup that limits its memory and tasks");
                Some(cgroups)
            }
            Err(why) => {
                tracing::warn!(%why, "VMM processes have no limit on memory and tasks: no cgroup v2 with these controllers can be used here (under systemd: Delegate=yes)");
                None
            }
        };
        fs::create_dir_all(&config.run_dir)
            .and_then(|()| {
                config.run_dir = config.run_dir.canonicalize()?;
                Ok(())
            })
            .map_err(|error| failed(format!("creating the run directory {}", config.run_dir.display()), error))?;
        Ok(Self { shared: Arc::new_cyclic(|shared| Shared { pool: Pool::new(config.pool, shared.clone()), backend, config, cgroups, verified: Mutex::default() }) })
    }

    pub(crate) fn backend(&self) -> &B {
        &self.shared.backend
    }
}

pub(crate) fn failed(doing: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
    EngineError::Failed { doing: doing.into(), source: source.into() }
}

pub(crate) fn bad_snapshot(dir: &Path, why: impl Into<String>) -> EngineError {
    EngineError::BadSnapshot { dir: dir.to_owned(), why: why.into() }
}

fn bad_manifest(dir: &Path, error: ManifestError) -> EngineError {
    match error {
        ManifestError::Read(error) => failed(format!("reading the manifest in {}", dir.display()), error),
        error => bad_snapshot(dir, error.to_string()),
    }
}

/// How a process ended, for people.
fn vmm_exit(process: &Process, what: &str) -> Exit {
    Exit::Vmm { detail: format!("{what}; the VMM's output: {}", process.output_tail()) }
}

/// What a failed exchange with a VMM means: often, that its process has ended.
pub(crate) fn exchange_failed(
    process: &Process,
    doing: &'static str,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> EngineError {
    if process.is_alive() { failed(doing, error) } else { EngineError::Ended { step: doing, exit: vmm_exit(process, "the VMM ended") } }
}

/// Runs what blocks (file systems, `/proc`) where it harms nobody.
pub(crate) async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that shuts down cancels blocking work, and then nobody polls this any more.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Measures the steps of an operation; they add up to the whole.
pub struct Stopwatch {
    last: Instant,
    phases: Phases,
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: Instant::now(), phases: Vec::new() }
    }

    /// A step has ended.
    pub fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now - self.last));
        self.last = now;
    }
}

/// What a program that only says something may take.
const SAY_LIMIT: Duration = Duration::from_secs(10);

/// The first line that a program says when it is run with this argument. `mend` says what to do without the program.
pub(crate) async fn first_line(program: &Path, argument: &str, mend: &str) -> Result<String, EngineError> {
    let missing = |what: String| EngineError::Host { what };
    let run = tokio::process::Command::new(program).arg(argument).kill_on_drop(true).stdin(Stdio::null()).output();
    let output = tokio::time::timeout(SAY_LIMIT, run)
        .await
        .map_err(|_| missing(format!("{} {argument} does not end", program.display())))?
        .map_err(|error| missing(format!("{} cannot be run ({error}); {mend}", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => Err(missing(format!("{} {argument} says nothing of use ({})", program.display(), output.status))),
    }
}

/// The version that a program says, which stands after `prefix`.
pub(crate) async fn version(program: &Path, prefix: &str, mend: &str) -> Result<String, EngineError> {
    let line = first_line(program, "--version", mend).await?;
    let version = line.strip_prefix(prefix).map(|version| version.trim().to_owned());
    version.ok_or_else(|| EngineError::Host { what: format!("{} --version does not say a version, but {line:?}", program.display()) })
}

#[async_trait]
impl<B: Backend> Engine for ProcessEngine<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(start::boot(&self.shared, spec).await?)
    }

    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        let vm = vm.as_any().downcast_ref::<ProcessVm<B>>().ok_or_else(|| EngineError::Host { what: "capture a microVM of another engine".to_owned() })?;
        image::capture(vm.core().clone(), into).await
    }

    async fn launch(&self, spec: LaunchSpec) -> Result<Started, EngineError> {
        start::launch(&self.shared, spec).await
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Started, EngineError> {
        start::restore(&self.shared, spec).await
    }

    async fn adopt(&self, id: MicrovmId, dir: PathBuf, image_dir: PathBuf, generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError> {
        Ok(adopt::adopt(&self.shared, id, dir, image_dir, generation).await?.map(|vm| vm as Arc<dyn Vm>))
    }

    async fn committed(&self, dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError> {
        blocking(move || Ok(snapshots::committed(&dir)?.map(|committed| committed.manifest.record))).await
    }

    async fn warm(&self, image_dir: PathBuf) {
        match image::load(&self.shared, &image_dir).await {
            Ok(image) => self.shared.pool.refill(&image),
            Err(error) => tracing::warn!(image = %image_dir.display(), error = &error as &dyn std::error::Error, "an image cannot be made ready"),
        }
    }

    async fn forget(&self, image_dir: PathBuf) {
        self.shared.pool.forget(&image_dir).await;
        self.shared.verified.lock().remove(&image_dir);
    }

    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError> {
        let run_dir = self.shared.config.run_dir.clone();
        let (keep, ready) = (keep.to_vec(), self.shared.pool.dirs());
        let kept = |dir: &Path| ready.iter().any(|ready| ready == dir) || record::owner_of(dir).is_some_and(|owner| keep.contains(&owner.id));
        let doing = |error: io::Error| failed(format!("looking for VMM processes of {}", run_dir.display()), error);
        let (unwanted, wanted): (Vec<Process>, Vec<Process>) = Process::find_all(&run_dir).map_err(doing)?.into_iter().partition(|process| !kept(process.dir()));
        for process in &unwanted {
            tracing::info!(pid = process.pid(), dir = %process.dir().display(), "ending a VMM process that belongs to no microVM");
            process.kill(self.shared.config.limits.kill).await;
        }
        for entry in fs::read_dir(&run_dir).map_err(doing)? {
            let dir = entry.map_err(doing)?.path();
            if !wanted.iter().any(|process| process.dir() == dir) {
                record::disown(&dir);
                cgroup::remove_process_dir(&dir);
            }
        }
        Ok(())
    }

    async fn close(&self) {
        self.shared.pool.close().await;
    }
}
