//! The `kvm` engine: microVMs on `dormouse-vmm`, our own VMM, for hosts with hardware virtualisation.
//!
//! Owns: what is said to a VMM process on its control socket, and the files that are handed to it. Everything else is
//! [`crate::host`]'s. The process opens no file by name; it reads and writes what it is handed, and nothing else.

mod channel;
pub mod control;
mod network;
mod probe;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::Shape;
use tokio::net::UnixStream;
use vmm_protocol::control::{CONTROL_SOCKET, Fault, MACHINE_LAYOUT, MemoryUse, NetSpec, Reply, Request, SaveKind, Saved};

use self::{
    channel::Channel,
    control::{Control, ControlError},
};
pub use self::{
    network::{GUEST_ADDRESS, HOST_ADDRESS, Network},
    probe::{Probe, probe},
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
        process::{Process, name_argument},
        version,
    },
    snapshot::manifest::{Fingerprint, Part},
};

/// What the engine is made of.
#[derive(Debug, Clone)]
pub struct KvmConfig {
    /// `dormouse-vmm`, by path or by name.
    pub vmm: PathBuf,
    /// What every engine has.
    pub host: HostConfig,
    /// If the node is root, each VMM process becomes the user and group of this number plus its own process number. The kernel
    /// sees to it that no two living processes have one, so nothing has to be recorded, given back, or agreed upon with
    /// another node on this host. (Nodes in containers with process numbers of their own, but the host's users, each need a
    /// range: 4194304 numbers from here on.) Files do not matter: all are handed in open.
    pub uid_base: u32,
    /// Whether each guest has a network card, in a network of its own with nobody else in it. Images are of one kind or the
    /// other: one made with a card is refused without.
    pub net: bool,
}

impl KvmConfig {
    /// The usual one: without a network.
    pub fn new(vmm: PathBuf, host: HostConfig) -> Self {
        Self { vmm, host, uid_base: DEFAULT_UID_BASE, net: false }
    }
}

/// See the module.
pub type KvmEngine = ProcessEngine<Kvm>;
/// A microVM of the `kvm` engine.
pub type KvmVm = ProcessVm<Kvm>;

/// What is known of `dormouse-vmm` on this host.
pub struct Kvm {
    program: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    limits: Limits,
    uid_base: u32,
    net: bool,
    version: String,
    cpu: String,
}

/// A connection to one VMM process.
pub struct KvmVmm {
    control: Control,
    channel: Channel,
    /// The guest's network, if it has one and this node has made it.
    network: Option<Network>,
}

/// Of one process beside its guest's memory:
/// - 16 MiB: the program (5 MiB at most), its stacks, the two buffers of 1 MiB and the writer's of a save;
/// - 256 MiB: what 1024 streams (the muxer's limit) can hold for clients that do not read, 256 KiB (a window) each;
/// - 32 MiB: what the kernel holds for it: the machine and 16 vCPUs, sockets with the node, descriptors.
const OVERHEAD_BYTES: u64 = (16 + 256 + 32) << 20;
/// One part in so many of guest memory for page tables, here and in KVM, and reverse maps: 8 bytes a page each, and room.
const KERNEL_SHARE: u64 = 64;
/// The default: between systemd's numbers for containers, which end at 1879048191, and those that it has for files of foreign
/// images, from 2147352576 on.
pub const DEFAULT_UID_BASE: u32 = 2_000_000_000;

const DEV_KVM: &str = "/dev/kvm";
const MISSING: &str = "run: make build";
/// How long a process may take from its start to a machine without a guest.
const START_LIMIT: Duration = Duration::from_secs(20);
/// What counters and console may take; a process that is saving answers afterwards.
const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// What a save may take with all of a large guest's memory changed, on a slow disk. Cancelling it takes milliseconds.
const SAVE_LIMIT: Duration = Duration::from_secs(300);
/// Between two tries to connect to a process whose last node is still there.
const CONNECT_EVERY: Duration = Duration::from_millis(5);

/// The data and the map of a disk layer.
const LAYER: [&str; 2] = ["layer", "map"];

/// Kernel arguments of every boot. `tsc=reliable`: the watchdog of the clock source takes a stopped guest for a broken TSC.
/// `mitigations=off`: a guest is one trust domain. `reboot=k`: a reset through the keyboard controller, which is there;
/// `pci=off`, `i8042.noaux` and `8250.nr_uarts=1` spare the kernel looking for what is not.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=k tsc=reliable no_timer_check mitigations=off \
                                random.trust_cpu=on pci=off i8042.noaux 8250.nr_uarts=1";

impl KvmEngine {
    /// Looks whether the VMM is there and `/dev/kvm` may be used. Starts no microVM.
    pub async fn new(config: KvmConfig) -> Result<Self, EngineError> {
        let KvmConfig { vmm, host, uid_base, net } = config;
        let version = version(&vmm, "dormouse-vmm ", MISSING).await?;
        open_kvm()?;
        let cpu = Cpu::of_host();
        let [vendor, family, model, stepping] = ["vendor_id", "cpu family", "model", "stepping"].map(|field| cpu.field(field));
        let cpu = format!("{vendor} family {family} model {model} stepping {stepping}, features {}", cpu.features_hash());
        let (kernel, initrd, limits) = (host.kernel.clone(), host.initrd.clone(), host.limits);
        Self::over(Kvm { program: vmm, kernel, initrd, limits, uid_base, net, version, cpu }, host)
    }

    /// The version of the VMM that was found.
    pub fn vmm_version(&self) -> &str {
        &self.backend().version
    }
}

fn open_kvm() -> Result<File, EngineError> {
    File::options().read(true).write(true).open(DEV_KVM).map_err(|error| EngineError::Host {
        what: format!("{DEV_KVM} cannot be opened ({error}); load kvm_intel or kvm_amd, and run as root or in the group kvm"),
    })
}

fn no_network(error: io::Error) -> EngineError {
    EngineError::Host { what: format!("a network for a guest cannot be made ({error}); it takes root, and the kernel's tun (modprobe tun)") }
}

/// Opens or makes a file, and says which in an error.
fn opened(path: &Path, open: impl FnOnce(&Path) -> io::Result<File>) -> Result<File, EngineError> {
    open(path).map_err(|error| failed(format!("opening {}", path.display()), error))
}

fn readable(path: &Path) -> Result<File, EngineError> {
    opened(path, |path| File::open(path))
}

fn fresh(path: &Path) -> Result<File, EngineError> {
    opened(path, |path| File::options().read(true).write(true).create_new(true).open(path))
}

/// What a request that was not done means. `snapshot` is what was to be read.
fn refused(process: &Process, doing: &'static str, snapshot: Option<&Path>, error: ControlError) -> EngineError {
    match (error, snapshot) {
        (ControlError::Refused { fault: Fault::Snapshot, why, .. }, Some(dir)) => bad_snapshot(dir, why),
        (ControlError::Refused { fault: Fault::Host, why, .. }, _) => EngineError::Host { what: format!("{doing}: {why}") },
        (error, _) => exchange_failed(process, doing, error),
    }
}

impl KvmVmm {
    /// A request without descriptors.
    async fn plain(&self, process: &Process, request: Request, limit: Duration, doing: &'static str) -> Result<(), EngineError> {
        self.control.demand(request, &[], limit).await.map(|_| ()).map_err(|error| refused(process, doing, None, error))
    }
}

impl Kvm {
    async fn connected(&self, process: &Process, limit: Duration) -> Result<KvmVmm, EngineError> {
        let told = |error: io::Error| failed(format!("connecting to the VMM (it said: {})", process.output_tail()), error);
        let socket = process.connect_with(CONTROL_SOCKET, limit, async |path| control::connect(&path)).await.map_err(told)?;
        Ok(KvmVmm { control: Control::start(socket).map_err(told)?, channel: Channel::default(), network: None })
    }

    async fn boot(&self, process: &Process, vmm: &KvmVmm, root_disk: &File) -> Result<(), EngineError> {
        let (kernel, initrd) = (readable(&self.kernel)?, readable(&self.initrd)?);
        let descriptors = [kernel.as_fd(), initrd.as_fd(), root_disk.as_fd()];
        let request = Request::Boot { cmdline: KERNEL_ARGUMENTS.to_owned() };
        let booted = vmm.control.demand(request, &descriptors, self.limits.state).await;
        booted.map(|_| ()).map_err(|error| refused(process, "loading the guest kernel", None, error))
    }
}

/// The answer to a save.
fn saved(answer: Result<(Reply, Vec<std::os::fd::OwnedFd>), ControlError>) -> Result<(Saved, Vec<std::os::fd::OwnedFd>), ControlError> {
    match answer? {
        (Reply::Saved(saved), descriptors) => Ok((saved, descriptors)),
        _ => Err(ControlError::Unexpected { request: "Save" }),
    }
}

fn state_part(saved: &Saved) -> Part {
    Part { file: STATE.to_owned(), bytes: saved.state_bytes, crc32: Some(saved.state_crc32) }
}

#[async_trait]
impl Backend for Kvm {
    const NAME: &'static str = "kvm";
    const LAYER_FILES: &'static [&'static str] = &LAYER;
    type Vmm = KvmVmm;

    fn fingerprint(&self, shape: Shape) -> Fingerprint {
        let Shape { memory_mib, vcpus, disk_gib: _ } = shape;
        let card = if self.net { ", network" } else { "" };
        let machine = format!("layout {MACHINE_LAYOUT}, {memory_mib} MiB, {vcpus} vCPUs{card}");
        Fingerprint { engine: Self::NAME.to_owned(), vmm: self.version.clone(), machine, cpu: self.cpu.clone() }
    }

    fn program(&self) -> (&Path, &'static str) {
        (&self.program, MISSING)
    }

    const JOINS_CGROUP: bool = true;
    /// The waiting process, main thread, block worker, KVM's own worker (since Linux 6.14); twice that.
    const OTHER_TASKS: u32 = 8;

    fn overhead_bytes(&self, shape: Shape) -> u64 {
        OVERHEAD_BYTES + (u64::from(shape.memory_mib) << 20) / KERNEL_SHARE
    }

    fn arguments(&self, process_dir: &Path, _role: &Role, cgroup: Option<&Path>) -> Vec<String> {
        let mut arguments = vec!["--dir".to_owned(), process_dir.display().to_string(), "--name".to_owned(), name_argument(process_dir)];
        arguments.extend(["--uid-base".to_owned(), self.uid_base.to_string()]);
        if let Some(cgroup) = cgroup {
            arguments.extend(["--cgroup".to_owned(), cgroup.display().to_string()]);
        }
        arguments
    }

    async fn connect(&self, process: &Process, role: &Role) -> Result<KvmVmm, EngineError> {
        let mut vmm = self.connected(process, START_LIMIT).await?;
        let Shape { memory_mib, vcpus, disk_gib: _ } = role.shape();
        let memory_bytes = u64::from(memory_mib) << 20;
        let kvm = open_kvm()?;
        let (memory, root_disk, disk_bytes, memory_use) = match role {
            Role::Boot { memory, root_disk, .. } => {
                let file = fresh(memory)?;
                file.set_len(memory_bytes).map_err(|error| failed(format!("making {} {memory_mib} MiB long", memory.display()), error))?;
                let disk = opened(root_disk, |path| File::options().read(true).write(true).open(path))?;
                let disk_bytes = disk.metadata().map_err(|error| failed(format!("looking at {}", root_disk.display()), error))?.len();
                (file, Some(disk), disk_bytes, MemoryUse::Shared)
            }
            Role::Clone(image) => (readable(&image.memory())?, None, image.disk_bytes(), MemoryUse::Private),
        };
        let made = if self.net { Some(blocking(Network::make).await.map_err(no_network)?) } else { None };
        let (network, tap) = made.unzip();
        vmm.network = network;
        let net = tap.as_ref().map(|_| NetSpec { mac: network::guest_mac(process.dir()) });
        let request = Request::Prepare { version: vmm_protocol::control::VERSION, vcpus, memory_bytes, memory: memory_use, disk_bytes, net };
        let mut descriptors = vec![kvm.as_fd(), memory.as_fd()];
        descriptors.extend(tap.as_ref().map(AsFd::as_fd));
        let prepared = vmm.control.demand(request, &descriptors, START_LIMIT).await;
        prepared.map_err(|error| refused(process, "making a virtual machine", None, error))?;
        if let Some(root_disk) = root_disk {
            self.boot(process, &vmm, &root_disk).await?;
        }
        Ok(vmm)
    }

    async fn reconnect(&self, process: &Process, _image: &Image) -> Result<KvmVmm, EngineError> {
        let deadline = Instant::now() + self.limits.command;
        loop {
            let vmm = self.connected(process, self.limits.command).await?;
            match vmm.control.demand(Request::Run, &[], self.limits.command).await {
                Ok(_) => return Ok(vmm),
                // It serves one node at a time, and turns others away.
                Err(ControlError::Closed | ControlError::Io(_)) if process.is_alive() && Instant::now() < deadline => tokio::time::sleep(CONNECT_EVERY).await,
                Err(error) => return Err(refused(process, "letting the guest go on", None, error)),
            }
        }
    }

    async fn agent(&self, process: &Process, vmm: &KvmVmm) -> io::Result<UnixStream> {
        vmm.channel.open(process).await
    }

    async fn load(&self, process: &Process, vmm: &KvmVmm, saved: Load<'_, Self>, watch: &mut Stopwatch) -> Result<(), EngineError> {
        let state = state_file(saved.state).map_err(|error| failed("making a file for the device state", error))?;
        let difference = saved.difference.map(vmm_protocol::memdiff::Reader::into_file);
        let base = readable(&saved.image.disk())?;
        let layers = saved.layers.sealed().map(|path| readable(&path)).collect::<Result<Vec<_>, _>>()?;
        let top = fresh(&saved.layers.top(LAYER[0]))?;
        let parked = saved.predecessor.map(|predecessor| predecessor.channel.parked()).transpose();
        let parked = parked.map_err(|error| failed("going on with the channel to the agent", error))?.flatten();

        let mut descriptors = vec![state.as_fd()];
        descriptors.extend(difference.as_ref().map(File::as_fd));
        descriptors.push(base.as_fd());
        descriptors.extend(layers.iter().map(File::as_fd));
        descriptors.push(top.as_fd());
        descriptors.extend(parked.as_ref().map(|parked| parked.theirs.as_fd()));
        let request = Request::Restore {
            difference: difference.is_some(),
            sealed_layers: u32::try_from(saved.layers.sealed_count()).unwrap_or(u32::MAX),
            streams: parked.iter().map(|parked| parked.stream.clone()).collect(),
        };
        let restored = vmm.control.demand(request, &descriptors, self.limits.state).await;
        let phases = restored.map_err(|error| refused(process, "restoring the guest", Some(saved.dir), error))?;
        tracing::debug!(pid = process.pid(), ?phases, "restored");
        if let (Some(parked), Some(predecessor)) = (parked, saved.predecessor) {
            vmm.channel.take_over(parked, &predecessor.channel);
        }
        watch.lap("load");
        Ok(())
    }

    async fn run(&self, process: &Process, vmm: &KvmVmm) -> Result<(), EngineError> {
        vmm.channel.unpark();
        vmm.plain(process, Request::Run, self.limits.command, "letting the guest run").await
    }

    async fn pause(&self, process: &Process, vmm: &KvmVmm) -> Result<(), EngineError> {
        vmm.plain(process, Request::Pause, self.limits.command, "stopping the guest").await
    }

    async fn save_image(&self, process: &Process, vmm: &KvmVmm, dir: &Path) -> Result<Part, EngineError> {
        let state = fresh(&dir.join(STATE))?;
        let answer = vmm.control.ask(Request::Save { kind: SaveKind::Image }, &[state.as_fd()], SAVE_LIMIT).await;
        let (saved, _) = saved(answer).map_err(|error| refused(process, "saving device state", None, error))?;
        Ok(state_part(&saved))
    }

    async fn save_difference(&self, process: &Process, vmm: &KvmVmm, save: Save<'_>, watch: &mut Stopwatch) -> Result<Option<SavedParts>, EngineError> {
        let map_path = save.layers.top(LAYER[1]);
        // What a suspend that was taken back left.
        match fs::remove_file(&map_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(format!("removing {}", map_path.display()), error)),
            _ => {}
        }
        let (state, difference, map) = (fresh(&save.dir.join(STATE))?, fresh(&save.dir.join(DIFFERENCE))?, fresh(&map_path)?);
        let image = readable(&save.image.memory())?;
        let descriptors: [BorrowedFd<'_>; 4] = [state.as_fd(), difference.as_fd(), image.as_fd(), map.as_fd()];
        let kind = SaveKind::Difference { merge_layers: save.layers.want_merge() };
        let saving = vmm.control.ask(Request::Save { kind }, &descriptors, SAVE_LIMIT);
        tokio::pin!(saving);
        let answer = tokio::select! {
            answer = &mut saving => answer,
            () = save.cancel.cancelled() => {
                // Whether it comes in time is told by the answer to the save.
                let (answer, _) = tokio::join!(saving, vmm.control.ask(Request::Cancel, &[], SAVE_LIMIT));
                answer
            }
        };
        let (saved, ends) = match saved(answer) {
            Ok(saved) => saved,
            Err(ControlError::Refused { fault: Fault::Cancelled, .. }) => return Ok(None),
            Err(error) => return Err(refused(process, "saving the guest", None, error)),
        };
        if saved.merged {
            save.layers.merged();
        }
        let memory = saved.memory.ok_or_else(|| failed("saving the guest", ControlError::Unexpected { request: "Save" }))?;
        tracing::debug!(pid = process.pid(), phases = ?saved.phases_us, "saved");
        let parts = SavedParts {
            state: state_part(&saved),
            memory: Part { file: DIFFERENCE.to_owned(), bytes: memory.bytes, crc32: Some(memory.header_crc32) },
        };
        vmm.channel.park(saved.streams, ends);
        watch.lap("save");
        Ok(Some(parts))
    }

    async fn stopped(&self, vmm: &KvmVmm) -> String {
        format!("the guest stopped ({})", vmm.control.stopped().await)
    }

    /// The process that is known is the jail's outer one; the VMM within dies with it, but not in the same instant.
    async fn gone(&self, vmm: &KvmVmm) {
        vmm.control.closed().await;
    }

    async fn console(&self, vmm: &KvmVmm) -> String {
        match vmm.control.ask(Request::Console, &[], LOOK_LIMIT).await {
            Ok((Reply::Console { text }, _)) => text,
            _ => String::new(),
        }
    }

    async fn usage(&self, _process: &Process, vmm: &KvmVmm) -> Option<Usage> {
        let Ok((Reply::Usage(usage), _)) = vmm.control.ask(Request::Usage, &[], LOOK_LIMIT).await else { return None };
        Some(Usage {
            cpu_micros: usage.vcpu_us.saturating_add(usage.vmm_us),
            private_bytes: usage.private_bytes,
            peak_bytes: usage.peak_resident_bytes,
            block_read_bytes: usage.block_read_bytes,
            block_written_bytes: usage.block_written_bytes,
            net_sent_bytes: usage.net_sent_bytes,
            net_received_bytes: usage.net_received_bytes,
            stream_sent_bytes: usage.stream_sent_bytes,
            stream_received_bytes: usage.stream_received_bytes,
            exits: usage.exits,
        })
    }
}
