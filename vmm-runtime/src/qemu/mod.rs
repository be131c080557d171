//! The `qemu` engine: microVMs on Debian's QEMU, for hosts without hardware virtualisation (and with it, if told so).
//!
//! Owns: what is told to a QEMU process, how its memory is read and written from outside, the form of its disk layers.
//! Everything else is [`crate::host`]'s.

pub mod command;
pub mod disk;
pub mod memory;
pub mod qmp;

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use model::Shape;
use parking_lot::Mutex;
use serde_json::json;
use tokio::{net::UnixStream, sync::broadcast::error::RecvError};
use vmm_protocol::memdiff::DiffError;

pub use self::command::Accel;
use self::{
    command::{AGENT_SOCKET, CONSOLE, CONSOLE_BYTES, Guest, Machine, QMP_SOCKET},
    memory::{Mapping, WriteError},
    qmp::{Qmp, QmpError},
};
pub use crate::host::{DEFAULT_LOG_BYTES, HostConfig, Limits, PoolConfig, process};
use crate::{
    engine::{EngineError, Usage},
    host::{
        Backend, Image, Load, ProcessEngine, ProcessVm, Role, Save, SavedParts, Stopwatch,
        backend::{DIFFERENCE, STATE, state_file},
        bad_snapshot, blocking,
        cpu::Cpu,
        exchange_failed, failed,
        process::Process,
        version,
    },
    snapshot::{
        atomic,
        manifest::{Fingerprint, Part},
    },
};

/// What the engine is made of.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The program, by path or by name.
    pub qemu: PathBuf,
    /// How guest code is run.
    pub accel: Accel,
    /// What every engine has.
    pub host: HostConfig,
}

/// Of one process beside its guest's memory: the translator's cache, which grows to 1 GiB (`DEFAULT_CODE_GEN_BUFFER_SIZE`), and
/// 256 MiB for the program, its devices and what the kernel holds for them.
const OVERHEAD_BYTES: u64 = (1024 + 256) << 20;
/// One part in so many of guest memory for page tables, here and in KVM, and reverse maps: 8 bytes a page each, and room.
const KERNEL_SHARE: u64 = 64;

/// See the module.
pub type QemuEngine = ProcessEngine<Qemu>;
/// A microVM of the `qemu` engine.
pub type QemuVm = ProcessVm<Qemu>;

/// What is known of QEMU on this host.
pub struct Qemu {
    program: PathBuf,
    accel: Accel,
    kernel: PathBuf,
    initrd: PathBuf,
    limits: Limits,
    version: String,
    cpu: String,
}

/// A connection to one QEMU.
pub struct QemuVmm {
    qmp: Qmp,
    /// The channel to the agent, until it is taken. Connected early: QEMU would not tell a guest that runs of a host that
    /// came later.
    agent: Mutex<Option<UnixStream>>,
    mapping: Mapping,
}

const MISSING: &str = "install qemu-system-x86";
/// How long a QEMU may take from its start to its first answer. Seen: 0.03 s idle, 0.4 s on a crowded machine.
const START_LIMIT: Duration = Duration::from_secs(20);
const CONSOLE_LIMIT: Duration = Duration::from_secs(1);
/// Under this name QEMU keeps the descriptor that the state is read from.
const STATE_FD: &str = "state";

/// The facts of the host's CPU that a guest carries in its memory. Translated code sees only the TSC, whose rate is the
/// model's; under KVM the guest has seen the features too.
fn host_cpu(accel: Accel) -> String {
    let cpu = Cpu::of_host();
    let model = cpu.field("model name");
    match accel {
        Accel::Tcg => model.to_owned(),
        Accel::Kvm => format!("{model}, features {}", cpu.features_hash()),
    }
}

impl QemuEngine {
    /// Looks whether QEMU is there. Starts no microVM.
    pub async fn new(config: QemuConfig) -> Result<Self, EngineError> {
        let QemuConfig { qemu, accel, host } = config;
        let version = version(&qemu, "QEMU emulator version ", MISSING).await?;
        let (kernel, initrd, limits) = (host.kernel.clone(), host.initrd.clone(), host.limits);
        Self::over(Qemu { program: qemu, accel, kernel, initrd, limits, version, cpu: host_cpu(accel) }, host)
    }

    /// The version of QEMU that was found.
    pub fn vmm_version(&self) -> &str {
        &self.backend().version
    }
}

impl Qemu {
    fn machine(&self, shape: Shape) -> Machine {
        Machine { accel: self.accel, shape }
    }

    async fn open(&self, process: &Process, memory: &Path, limit: Duration) -> Result<QemuVmm, EngineError> {
        let told = |error: io::Error| failed(format!("connecting to QEMU (it said: {})", process.output_tail()), error);
        let qmp = process.connect(QMP_SOCKET, limit).await.map_err(told)?;
        let qmp = Qmp::start(qmp, limit).await.map_err(|error| failed(format!("talking to QEMU (it said: {})", process.output_tail()), error))?;
        let agent = process.connect(AGENT_SOCKET, limit).await.map_err(told)?;
        let mapping = memory::find_mapping(process.pid(), memory).map_err(|error| failed("finding the guest's memory in QEMU", error))?;
        Ok(QemuVmm { qmp, agent: Mutex::new(Some(agent)), mapping })
    }
}

#[async_trait]
impl Backend for Qemu {
    const NAME: &'static str = "qemu";
    const LAYER_FILES: &'static [&'static str] = &[disk::LAYER];
    type Vmm = QemuVmm;

    fn fingerprint(&self, shape: Shape) -> Fingerprint {
        Fingerprint { engine: Self::NAME.to_owned(), vmm: self.version.clone(), machine: self.machine(shape).fingerprint(), cpu: self.cpu.clone() }
    }

    const JOINS_CGROUP: bool = false;
    /// Threads of the block layer (64 at most), event loops, RCU, a helper of the migration.
    const OTHER_TASKS: u32 = 96;

    fn program(&self) -> (&Path, &'static str) {
        (&self.program, MISSING)
    }

    fn overhead_bytes(&self, shape: Shape) -> u64 {
        OVERHEAD_BYTES + (u64::from(shape.memory_mib) << 20) / KERNEL_SHARE
    }

    fn arguments(&self, process_dir: &Path, role: &Role, _cgroup: Option<&Path>) -> Vec<String> {
        let (machine, memory) = (self.machine(role.shape()), role.memory());
        match role {
            Role::Boot { root_disk, .. } => machine.boot(process_dir, &memory, &Guest { kernel: &self.kernel, initrd: &self.initrd, root_disk }),
            Role::Clone(_) => machine.clone_of(process_dir, &memory),
        }
    }

    async fn connect(&self, process: &Process, role: &Role) -> Result<QemuVmm, EngineError> {
        let vmm = self.open(process, &role.memory(), START_LIMIT).await?;
        if matches!(role, Role::Clone(_)) {
            let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
            vmm.qmp.execute("migrate-set-capabilities", events, START_LIMIT).await.map_err(|error| failed("preparing QEMU for a restore", error))?;
        }
        Ok(vmm)
    }

    async fn reconnect(&self, process: &Process, image: &Image) -> Result<QemuVmm, EngineError> {
        let vmm = self.open(process, &image.memory(), self.limits.command).await?;
        let talking = |error: QmpError| failed("talking to QEMU", error);
        let status = vmm.qmp.execute("query-status", json!({}), self.limits.command).await.map_err(talking)?;
        if status["running"] != true {
            if status["status"] == "shutdown" {
                return Err(failed("adopting it", "the guest has shut down"));
            }
            vmm.qmp.execute("cont", json!({}), self.limits.command).await.map_err(talking)?;
        }
        Ok(vmm)
    }

    async fn agent(&self, _process: &Process, vmm: &QemuVmm) -> io::Result<UnixStream> {
        vmm.agent.lock().take().ok_or_else(|| io::Error::other("the channel is in use"))
    }

    async fn load(&self, process: &Process, vmm: &QemuVmm, saved: Load<'_, Self>, watch: &mut Stopwatch) -> Result<(), EngineError> {
        let disk = async {
            let top = saved.layers.top(disk::LAYER);
            disk::create_overlay(&top, saved.image.disk_bytes()).map_err(|error| failed(format!("creating {}", top.display()), error))?;
            disk::plug(saved.layers, &saved.image.disk(), &vmm.qmp).await.map_err(|error| exchange_failed(process, "plugging the disk", error))
        };
        let (pid, mapping) = (process.pid(), vmm.mapping.clone());
        let memory = async {
            let Some(mut difference) = saved.difference else { return Ok(()) };
            blocking(move || memory::apply_difference(pid, &mapping, &mut difference)).await.map_err(|error| match error {
                DiffError::Damaged(_) | DiffError::OtherSize { .. } => bad_snapshot(saved.dir, error.to_string()),
                error => failed("putting the saved memory into the guest", error),
            })
        };
        tokio::try_join!(disk, memory)?;
        watch.lap("memory and disk");
        load_state(&vmm.qmp, saved.state, self.limits.state).await.map_err(|error| exchange_failed(process, "loading device state", error))?;
        watch.lap("devices");
        Ok(())
    }

    async fn run(&self, process: &Process, vmm: &QemuVmm) -> Result<(), EngineError> {
        let done = vmm.qmp.execute("cont", json!({}), self.limits.command).await;
        done.map(|_| ()).map_err(|error| exchange_failed(process, "letting the guest run", error))
    }

    async fn pause(&self, process: &Process, vmm: &QemuVmm) -> Result<(), EngineError> {
        let done = vmm.qmp.execute("stop", json!({}), self.limits.command).await;
        done.map(|_| ()).map_err(|error| exchange_failed(process, "stopping the guest", error))
    }

    async fn save_image(&self, process: &Process, vmm: &QemuVmm, dir: &Path) -> Result<Part, EngineError> {
        let path = dir.join(STATE);
        // Not `live`: that would take the disks from this process, which may have to merge layers or let the guest go on. What
        // the disks held back was written by `stop`.
        let arguments = json!({ "filename": path, "live": false });
        let done = vmm.qmp.execute("xen-save-devices-state", arguments, self.limits.state).await;
        done.map_err(|error| exchange_failed(process, "saving device state", error))?;
        blocking(move || {
            let state = fs::read(&path)?;
            atomic::sync_file(&path)?;
            Ok(Part { file: STATE.to_owned(), bytes: state.len() as u64, crc32: Some(crc32fast::hash(&state)) })
        })
        .await
        .map_err(|error: io::Error| failed("reading back the saved device state", error))
    }

    async fn save_difference(&self, process: &Process, vmm: &QemuVmm, save: Save<'_>, watch: &mut Stopwatch) -> Result<Option<SavedParts>, EngineError> {
        let state = self.save_image(process, vmm, save.dir).await?;
        watch.lap("devices");
        match disk::merge(save.layers, &vmm.qmp, save.cancel).await {
            Ok(merged) if merged => watch.lap("merge"),
            Ok(_) => {}
            Err(error) if process.is_alive() => tracing::warn!(dir = %save.dir.display(), %error, "disk layers were not merged"),
            Err(error) => return Err(exchange_failed(process, "merging disk layers", error)),
        }
        if save.cancel.is_cancelled() {
            return Ok(None);
        }
        // The seal that follows finds the layer durable already.
        let disk = blocking({
            let top = save.layers.top(disk::LAYER);
            move || atomic::sync_file(&top)
        });
        let difference = blocking({
            let (pid, mapping, image, cancel, to) = (process.pid(), vmm.mapping.clone(), save.image.memory(), save.cancel.clone(), save.dir.join(DIFFERENCE));
            move || memory::write_difference(pid, &mapping, &image, &to, &cancel)
        });
        let (synced, difference) = tokio::join!(disk, difference);
        let written = match difference {
            Ok(written) => written,
            Err(WriteError::Cancelled) => return Ok(None),
            Err(error @ WriteError::Io { .. }) => return Err(exchange_failed(process, "saving the guest's memory", error)),
        };
        synced.map_err(|error| failed("writing the disk layer", error))?;
        watch.lap("memory");
        let memory = Part { file: DIFFERENCE.to_owned(), bytes: written.bytes, crc32: Some(written.header_crc32) };
        Ok(Some(SavedParts { state, memory }))
    }

    async fn stopped(&self, vmm: &QemuVmm) -> String {
        vmm.qmp.guest_stopped().await;
        "the guest shut down or rebooted".to_owned()
    }

    async fn console(&self, vmm: &QemuVmm) -> String {
        let arguments = json!({ "device": CONSOLE, "size": CONSOLE_BYTES });
        let text = vmm.qmp.execute("ringbuf-read", arguments, CONSOLE_LIMIT).await;
        text.ok().and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default()
    }

    async fn usage(&self, process: &Process, _vmm: &QemuVmm) -> Option<Usage> {
        Some(Usage { cpu_micros: process.cpu_micros()?, private_bytes: process.private_bytes()?, ..Usage::default() })
    }
}

/// Gives QEMU the state through a descriptor, so that what was checked is what is loaded, and waits until it is in.
async fn load_state(qmp: &Qmp, state: &[u8], limit: Duration) -> Result<(), QmpError> {
    let file = state_file(state).map_err(QmpError::Io)?;
    let mut events = qmp.events();
    qmp.execute_with_fd("getfd", json!({ "fdname": STATE_FD }), file.as_fd(), limit).await?;
    qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{STATE_FD}") }), limit).await?;
    let loaded = async {
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                // QEMU ends when it cannot load a state.
                () = qmp.closed() => return Err(QmpError::Closed),
            };
            match event {
                Ok(event) if event.name == "MIGRATION" && event.data["status"] == "completed" => return Ok(()),
                Ok(event) if event.name == "MIGRATION" && event.data["status"] == "failed" => {
                    return Err(QmpError::Outcome("QEMU does not take the device state".to_owned()));
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => return Err(QmpError::Outcome("QEMU said too much at once".to_owned())),
                Err(RecvError::Closed) => return Err(QmpError::Closed),
            }
        }
    };
    let late = || QmpError::Timeout { command: "migrate-incoming".to_owned(), limit };
    tokio::time::timeout(limit, loaded).await.unwrap_or_else(|_| Err(late()))
}
