//! The `qemu` engine: microVMs on Debian's QEMU, for hosts without hardware virtualisation (and with it, if told so).
//!
//! Owns: QEMU processes and everything in the directories of microVMs and images of this engine. Never decides when.
//!
//! ```text
//! boot ── QEMU, memory shared with a file ── capture_image ─► <image>/{manifest.json, state, memory, disk}
//! launch ── QEMU, the image's memory MAP_PRIVATE, empty top disk layer, image's state ─► runs as generation 0
//! suspend ─► <microVM>/gen-<n>/{manifest.json, state, memory.diff}, top layer <microVM>/disk/<n>.qcow2 sealed
//! restore ── as launch, with the difference written over the memory first, and a new top layer
//! ```
//! A QEMU process outlives `serve`; `<microVM>/process.json` says which one it is, and the next `serve` adopts it.

mod adopt;
mod applog;
pub mod command;
pub mod disk;
mod image;
pub mod memory;
mod pool;
pub mod process;
pub mod qmp;
mod record;
mod start;
mod suspend;
mod vm;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Generation, MicrovmId};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

pub use self::{command::Accel, pool::PoolConfig, vm::QemuVm};
use self::{
    command::Machine,
    pool::{Launcher, Pool},
    process::Process,
};
use crate::{
    engine::{BootSpec, Engine, EngineError, ImageSnapshot, LaunchSpec, Phases, RestoreSpec, SnapshotRecord, Started, Vm},
    snapshot::manifest::{self, Fingerprint, ManifestError, MicrovmManifest},
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
    /// For a QMP command.
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

/// What the engine is made of.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The program, by path or by name.
    pub qemu: PathBuf,
    /// How guest code is run.
    pub accel: Accel,
    /// Kernel to boot (bzImage, or an ELF with a PVH note). Only [`Engine::boot`] needs it.
    pub kernel: PathBuf,
    /// Initramfs with the guest agent. Only [`Engine::boot`] needs it.
    pub initrd: PathBuf,
    /// Stands for kernel and initramfs in manifests.
    pub guest_fingerprint: String,
    /// Where processes have their own directories; one engine at a time uses it.
    pub run_dir: PathBuf,
    /// Ready processes.
    pub pool: PoolConfig,
    /// Deadlines.
    pub limits: Limits,
}

/// What the engine and its microVMs share.
pub(crate) struct Shared {
    config: QemuConfig,
    vmm: String,
    cpu: String,
    pool: Arc<Pool>,
    /// Images whose memory and disk were read and found right, by the checksum of their manifest.
    verified: Mutex<HashMap<PathBuf, Arc<tokio::sync::OnceCell<u32>>>>,
}

impl Shared {
    fn fingerprint(&self, machine: &Machine) -> Fingerprint {
        Fingerprint { engine: NAME.to_owned(), vmm: self.vmm.clone(), machine: machine.fingerprint(), cpu: self.cpu.clone() }
    }
}

/// See the module.
pub struct QemuEngine {
    shared: Arc<Shared>,
}

const NAME: &str = "qemu";
/// What `qemu --version` may take.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

fn failed(doing: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
    EngineError::Failed { doing: doing.into(), source: source.into() }
}

fn bad_snapshot(dir: &Path, why: impl Into<String>) -> EngineError {
    EngineError::BadSnapshot { dir: dir.to_owned(), why: why.into() }
}

/// Runs what blocks (file systems, `/proc`) where it harms nobody.
async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
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
struct Stopwatch {
    last: Instant,
    phases: Phases,
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: Instant::now(), phases: Vec::new() }
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now - self.last));
        self.last = now;
    }
}

async fn qemu_version(qemu: &Path) -> Result<String, EngineError> {
    let missing = |what: String| EngineError::Host { what };
    let run = tokio::process::Command::new(qemu).arg("--version").kill_on_drop(true).stdin(std::process::Stdio::null()).output();
    let output = tokio::time::timeout(VERSION_LIMIT, run)
        .await
        .map_err(|_| missing(format!("{} --version does not end", qemu.display())))?
        .map_err(|error| missing(format!("{} cannot be run ({error}); install qemu-system-x86", qemu.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next().and_then(|line| line.strip_prefix("QEMU emulator version ")) {
        Some(version) if output.status.success() => Ok(version.trim().to_owned()),
        _ => Err(missing(format!("{} --version does not say a version", qemu.display()))),
    }
}

/// The facts of the host's CPU that a guest carries in its memory. Translated code sees only the TSC, whose rate is the
/// model's; under KVM the guest has seen the features too.
fn host_cpu(accel: Accel) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    let model = field("model name");
    match accel {
        Accel::Tcg => model.to_owned(),
        Accel::Kvm => format!("{model}, features {}", hex::encode(&Sha256::digest(field("flags"))[..8])),
    }
}

impl QemuEngine {
    /// Looks whether QEMU is there. Starts no microVM.
    pub async fn new(mut config: QemuConfig) -> Result<Self, EngineError> {
        let vmm = qemu_version(&config.qemu).await?;
        fs::create_dir_all(&config.run_dir)
            .and_then(|()| {
                config.run_dir = config.run_dir.canonicalize()?;
                Ok(())
            })
            .map_err(|error| failed(format!("creating the run directory {}", config.run_dir.display()), error))?;
        let cpu = host_cpu(config.accel);
        let pool = Pool::new(config.pool, Launcher { qemu: config.qemu.clone(), run_dir: config.run_dir.clone() });
        Ok(Self { shared: Arc::new(Shared { config, vmm, cpu, pool, verified: Mutex::default() }) })
    }

    /// The version of QEMU that was found.
    pub fn vmm_version(&self) -> &str {
        &self.shared.vmm
    }
}

/// The newest committed snapshot of a microVM.
struct Committed {
    manifest: MicrovmManifest,
    dir: PathBuf,
}

const GENERATION_PREFIX: &str = "gen-";

fn generation_dir(microvm_dir: &Path, generation: Generation) -> PathBuf {
    microvm_dir.join(format!("{GENERATION_PREFIX}{generation}"))
}

/// The generations that were committed, in no order.
fn generations(microvm_dir: &Path) -> io::Result<Vec<Generation>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(microvm_dir)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.strip_prefix(GENERATION_PREFIX)?.parse().ok()).map(Generation));
    }
    Ok(found)
}

/// `Ok(None)`: it never was suspended.
fn committed(microvm_dir: &Path) -> Result<Option<Committed>, EngineError> {
    let newest = match generations(microvm_dir) {
        Ok(generations) => generations.into_iter().max(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(format!("looking for snapshots in {}", microvm_dir.display()), error)),
    };
    let Some(generation) = newest else { return Ok(None) };
    let dir = generation_dir(microvm_dir, generation);
    let (manifest, _) = manifest::read::<MicrovmManifest>(&dir).map_err(|error| bad_manifest(&dir, error))?;
    if manifest.record.generation != generation {
        return Err(bad_snapshot(&dir, format!("its manifest is that of generation {}", manifest.record.generation)));
    }
    Ok(Some(Committed { manifest, dir }))
}

fn bad_manifest(dir: &Path, error: ManifestError) -> EngineError {
    match error {
        ManifestError::Read(error) => failed(format!("reading the manifest in {}", dir.display()), error),
        error => bad_snapshot(dir, error.to_string()),
    }
}

#[async_trait]
impl Engine for QemuEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(start::boot(&self.shared, spec).await?)
    }

    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        let vm = vm.as_any().downcast_ref::<QemuVm>().ok_or_else(|| EngineError::Host { what: "capture a microVM of another engine".to_owned() })?;
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
        blocking(move || Ok(committed(&dir)?.map(|committed| committed.manifest.record))).await
    }

    async fn warm(&self, image_dir: PathBuf) {
        match image::load(&self.shared, &image_dir).await {
            Ok(image) => image.refill(&self.shared),
            Err(error) => tracing::warn!(image = %image_dir.display(), error = &error as &dyn std::error::Error, "an image cannot be made ready"),
        }
    }

    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError> {
        let run_dir = self.shared.config.run_dir.clone();
        let (keep, ready) = (keep.to_vec(), self.shared.pool.dirs());
        let kept = |dir: &Path| ready.iter().any(|ready| ready == dir) || record::owner_of(dir).is_some_and(|owner| keep.contains(&owner.id));
        let doing = || format!("looking for QEMU processes of {}", run_dir.display());
        let (unwanted, wanted): (Vec<Process>, Vec<Process>) =
            Process::find_all(&run_dir).map_err(|error| failed(doing(), error))?.into_iter().partition(|process| !kept(process.dir()));
        for process in &unwanted {
            tracing::info!(pid = process.pid(), dir = %process.dir().display(), "ending a QEMU process that belongs to no microVM");
            process.kill(self.shared.config.limits.kill).await;
        }
        for entry in fs::read_dir(&run_dir).map_err(|error| failed(doing(), error))? {
            let dir = entry.map_err(|error| failed(doing(), error))?.path();
            if !wanted.iter().any(|process| process.dir() == dir)
                && let Err(error) = fs::remove_dir_all(&dir)
            {
                tracing::warn!(dir = %dir.display(), %error, "a leftover cannot be removed");
            }
        }
        Ok(())
    }

    async fn close(&self) {
        self.shared.pool.close().await;
    }
}
