//! One virtual machine, from an empty shell to a paused or running guest and back into files.
//!
//! ```text
//! prepare ─► ready ─┬─ boot ────► running ── pause ─► paused ── save ─► paused
//!                   └─ restore ─► paused  ── run ───► running
//! ```
//!
//! Owns: the KVM machine, vCPU threads, guest memory, all devices, and the epoll that device descriptors are in. It is used
//! by one thread, the event loop of the process: that loop watches [`Machine::events`] and calls [`Machine::dispatch`] when it
//! is readable. Never reads the control socket, never opens anything by name after [`Machine::prepare`].

mod assembly;
mod restore;
mod save;
mod usage;

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixListener},
    },
    sync::{Arc, mpsc},
};

use rustix::event::{Timespec, epoll};
use virtio_devices::{
    block::{Block, layers::Disk},
    device::Watch,
    transport::MmioTransport,
};
use vmm_protocol::control::{Fault, MemoryUse, NetSpec, ParkedStream, SavedMemory, Usage};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::{acpi, boot},
    devices::{bus::{Bus, lock}, power},
    jail::ProcessFiles,
    kvm::{KvmError, cpuid, vcpu::Vcpu, vm::Vm},
    memory::{GuestRam, dirty::DirtyPages},
};

/// Names of steps and the microseconds that each took; they add up to the whole.
pub type Phases = Vec<(String, u64)>;

/// Which rules a thread of this process must live under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs guest code: KVM ioctls of one vCPU, futexes, eventfd writes.
    Vcpu,
    /// Reads and writes the disk.
    Block,
}

/// Called on every thread that [`Machine::prepare`] makes, before it does anything else: installs that thread's system call
/// filter. An error ends the preparation.
pub type Confine = Arc<dyn Fn(ThreadKind) -> std::io::Result<()> + Send + Sync>;

/// What a machine is made of. See [`vmm_protocol::control::Request::Prepare`].
pub struct Shell {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// Guest memory; `memory_bytes` long.
    pub memory: File,
    /// A multiple of 2 MiB.
    pub memory_bytes: u64,
    /// How it is mapped.
    pub memory_use: MemoryUse,
    /// 1 to 16.
    pub vcpus: u8,
    /// Length of the disk, in bytes.
    pub disk_bytes: u64,
    /// A network card and the TAP device behind it.
    pub net: Option<(NetSpec, OwnedFd)>,
    /// The bound and listening `vsock` socket.
    pub vsock: UnixListener,
    /// Confines the threads.
    pub confine: Confine,
    /// What of `/proc/self` is needed later; there is no `/proc` any more when the machine is made.
    pub process_files: ProcessFiles,
}

/// What a guest boots from. See [`vmm_protocol::control::Request::Boot`].
pub struct Boot {
    /// A bzImage or an ELF vmlinux with a PVH entry.
    pub kernel: File,
    /// Its initramfs.
    pub initramfs: File,
    /// Raw; read and written in place.
    pub disk: File,
    /// Kernel arguments, ASCII.
    pub cmdline: String,
}

/// A sealed disk layer.
pub struct SealedLayer {
    /// Its data.
    pub data: File,
    /// Which blocks it holds.
    pub map: File,
}

/// What a guest is restored from. See [`vmm_protocol::control::Request::Restore`].
pub struct Restore {
    /// Device state.
    pub state: File,
    /// Memory difference.
    pub difference: Option<File>,
    /// Raw, read-only.
    pub disk_base: File,
    /// The lowest first.
    pub sealed_layers: Vec<SealedLayer>,
    /// Empty; read and written.
    pub disk_top: File,
    /// Parked streams that go on, with their host ends. All others are reset in the guest.
    pub streams: Vec<(ParkedStream, OwnedFd)>,
}

/// What is written beside the state.
pub enum SaveParts {
    /// After a boot: nothing, memory and disk are in their files.
    Image,
    /// For a clone.
    Difference {
        /// Empty; read and written.
        memory: File,
        /// The image's memory file (the one of [`Shell::memory`], or another descriptor of it).
        image_memory: File,
        /// Map of the top disk layer; empty.
        disk_map: File,
        /// Copy the sealed disk layers into the top one first.
        merge_layers: bool,
    },
}

/// What a save wrote; what [`vmm_protocol::control::Saved`] says, with the host ends of the streams.
pub struct SavedMachine {
    /// Length of the device state.
    pub state_bytes: u64,
    /// Its CRC-32.
    pub state_crc32: u32,
    /// The memory difference.
    pub memory: Option<SavedMemory>,
    /// CRC-32 of the map of the top disk layer.
    pub map_crc32: Option<u32>,
    /// Whether the sealed layers are not part of the chain any more.
    pub merged: bool,
    /// Open streams. The machine keeps its own descriptors of them until it ends, and goes on with them if it runs again.
    pub streams: Vec<(ParkedStream, OwnedFd)>,
    /// Time of each step.
    pub phases: Phases,
}

/// Why the machine did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct MachineError {
    /// Whose fault it is.
    pub fault: Fault,
    /// A sentence with the whole chain of causes.
    pub why: String,
}

impl MachineError {
    /// With all causes of `error` in one sentence.
    fn new(fault: Fault, doing: &str, error: &dyn std::error::Error) -> Self {
        let mut why = format!("{doing}: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            why = format!("{why}: {error}");
            cause = error.source();
        }
        Self { fault, why }
    }

    fn request(why: &str) -> Self {
        Self { fault: Fault::Request, why: why.to_owned() }
    }

    fn host(doing: &str, error: &dyn std::error::Error) -> Self {
        Self::new(Fault::Host, doing, error)
    }

    fn kvm(doing: &str, error: &KvmError) -> Self {
        Self::new(if error.is_bad_state() { Fault::Snapshot } else { Fault::Host }, doing, error)
    }
}

/// Measures steps.
struct Steps {
    phases: Phases,
    last: std::time::Instant,
}

impl Steps {
    fn begin() -> Self {
        Self { phases: Vec::new(), last: std::time::Instant::now() }
    }

    /// What was done since the step before is called so.
    fn done(&mut self, name: &str) {
        let now = std::time::Instant::now();
        self.phases.push((name.to_owned(), (now - self.last).as_micros() as u64));
        self.last = now;
    }
}

/// Fixed places of virtio devices.
mod slot {
    pub const BLOCK: usize = 0;
    pub const VSOCK: usize = 1;
    pub const RNG: usize = 2;
    pub const BALLOON: usize = 3;
    pub const NET: usize = 4;
}

/// "Device" of our own descriptors in the epoll.
const OWN: u32 = u32::MAX;
/// Events that are taken at a time; the rest is there the next time.
const EVENTS: usize = 64;
const STOPPED: &str = "the guest has stopped for good";
/// A kernel or an initramfs; larger is not one.
const MAX_BOOT_FILE: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Made; there is no guest in it.
    Ready,
    /// A restore failed half-way.
    Spoilt,
    Paused,
    Running,
    /// The guest has ended itself.
    Stopped,
}

/// Why a guest will not run any more: for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Shut down, reset, or what KVM could not do, with RIP and instruction bytes where known.
    pub how: String,
}

/// The virtual machine. Dropping it ends its threads.
///
/// Fields are dropped in this order: first the threads, which use everything else; guest memory last.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus>,
    vm: Arc<Vm>,
    ram: Arc<GuestRam>,
    /// What each vCPU was told to be; empty before there is a guest.
    identities: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
    phase: Phase,
    disk_bytes: u64,
    epoll: Arc<OwnedFd>,
    stops: mpsc::Receiver<String>,
    stopped: EventFd,
    /// How the guest ended, from when it is known until [`Machine::dispatch`] has said it.
    untold: Option<Stopped>,
    /// How pages of guest memory are found that were written.
    dirty: DirtyPages,
    process_files: ProcessFiles,
    counters: usage::Counters,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("phase", &self.phase).field("vcpus", &self.vcpus.len()).field("memory_bytes", &self.ram.bytes()).finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes the KVM machine with its vCPU threads (waiting), guest memory and all devices. Everything that needs a name or a
    /// thread is opened here; afterwards the process may be jailed.
    pub fn prepare(shell: Shell) -> Result<Self, MachineError> {
        assembly::assemble(shell)
    }

    /// Loads a kernel and runs it.
    pub fn boot(&mut self, boot: Boot) -> Result<Phases, MachineError> {
        let Boot { kernel, initramfs, disk, cmdline } = boot;
        if self.phase != Phase::Ready {
            return Err(MachineError::request("there is a guest in this machine already"));
        }
        let mut steps = Steps::begin();
        let disk = Disk::raw(disk).map_err(|error| MachineError::host("opening the disk", &error))?;
        self.with_block(|block| block.set_disk(disk))?.map_err(|error| MachineError::host("attaching the disk", &error))?;
        let kernel = read_whole(&kernel, "the kernel")?;
        let initramfs = read_whole(&initramfs, "the initramfs")?;
        steps.done("files");
        let tables = acpi::Machine { vcpus: self.vcpus.len() as u8, slots: (0..self.bus.virtio.len()).filter(|slot| self.bus.virtio[*slot].is_some()).collect() };
        let entry = boot::load(self.ram.memory(), self.ram.bytes(), &kernel, &initramfs, &cmdline, &tables).map_err(|error| MachineError::host("booting", &error))?;
        crate::devices::vmgenid::renew(self.ram.memory()).map_err(|error| MachineError::host("writing the VMGenID", &error))?;
        steps.done("load");
        let count = self.vcpus.len() as u8;
        self.identities = (0..count).map(|vcpu| cpuid::of_vcpu(self.vm.cpuid(), vcpu, count)).collect();
        for ((index, vcpu), identity) in self.vcpus.iter().enumerate().zip(self.identities.clone()) {
            let entry = (index == 0).then_some(entry);
            let started = vcpu.with(move |fd| boot::start(fd, &identity, entry)).and_then(|started| started);
            started.map_err(|error| MachineError::kvm("setting a vCPU to its start", &error))?;
        }
        self.phase = Phase::Paused;
        self.run()?;
        steps.done("start");
        Ok(steps.phases)
    }

    /// Takes over a saved machine of the same size. Afterwards it is paused. After an error it cannot be used: some of the
    /// state may have been taken, and nothing of it was run.
    pub fn restore(&mut self, restore: Restore) -> Result<Phases, MachineError> {
        if self.phase != Phase::Ready {
            return Err(MachineError::request("there is a guest in this machine already"));
        }
        self.phase = Phase::Spoilt;
        let phases = restore::restore(self, restore)?;
        self.phase = Phase::Paused;
        Ok(phases)
    }

    /// Lets devices and vCPUs run. Harmless if they do.
    pub fn run(&mut self) -> Result<(), MachineError> {
        match self.phase {
            Phase::Running => return Ok(()),
            Phase::Paused => {}
            Phase::Ready => return Err(MachineError::request("there is no guest in this machine yet")),
            Phase::Spoilt => return Err(MachineError::request("the restore into this machine failed")),
            Phase::Stopped => return Err(MachineError::request(STOPPED)),
        }
        // Devices first: what they raise meets vCPUs that still stand, and is pending when those start.
        for device in self.bus.virtio.iter().flatten() {
            lock(device).resume();
        }
        for vcpu in &self.vcpus {
            vcpu.run().map_err(|error| MachineError::kvm("running a vCPU", &error))?;
        }
        self.phase = Phase::Running;
        Ok(())
    }

    /// Stops vCPUs and devices. On return nothing of the guest is in flight; after an error it runs on. Harmless if they are
    /// stopped.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        match self.phase {
            Phase::Paused | Phase::Stopped => return Ok(()),
            Phase::Running => {}
            Phase::Ready | Phase::Spoilt => return Err(MachineError::request("there is no guest in this machine")),
        }
        if let Err(error) = self.stop_all() {
            // A vCPU hangs in a device (whose file, most likely, is on a disk that hangs). Those that have stopped must not be
            // left so, since the guest counts as running; and the one that hangs goes on when it can. Unless the guest has ended.
            self.look_for_end();
            for vcpu in self.vcpus.iter().filter(|_| self.phase == Phase::Running) {
                vcpu.run().map_err(|error| MachineError::kvm("running a vCPU", &error))?;
            }
            return Err(error);
        }
        self.phase = Phase::Paused;
        // It may have ended itself just now. Such a guest must not be saved: it would be restored behind its own end.
        self.look_for_end();
        Ok(())
    }

    /// The first vCPU to stop says why.
    fn look_for_end(&mut self) {
        if let Ok(how) = self.stops.try_recv()
            && self.phase != Phase::Stopped
        {
            self.phase = Phase::Stopped;
            self.untold = Some(Stopped { how });
        }
    }

    /// vCPUs first, so that no device is entered any more; all are asked before the first is waited for.
    fn stop_all(&self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.ask_to_stop();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_stopped().map_err(|error| MachineError::kvm("stopping a vCPU", &error))?;
        }
        for device in self.bus.virtio.iter().flatten() {
            lock(device).pause();
        }
        Ok(())
    }

    /// Writes out a paused machine and syncs the files; it stays paused and may go on, whatever happened. `cancelled` is asked
    /// between pieces of work of a few milliseconds; `true` gives up with [`Fault::Cancelled`].
    pub fn save(&mut self, state: File, parts: SaveParts, cancelled: &mut dyn FnMut() -> bool) -> Result<SavedMachine, MachineError> {
        match self.phase {
            Phase::Paused => {}
            Phase::Stopped => return Err(MachineError::request(STOPPED)),
            _ => return Err(MachineError::request("only a paused guest can be saved")),
        }
        save::save(self, &state, parts, cancelled)
    }

    /// Counters.
    pub fn usage(&self) -> Usage {
        self.counters.read(self)
    }

    /// The newest lines of the serial console. Not trusted: whatever the guest wrote, as text.
    pub fn console(&self) -> String {
        lock(&self.bus.console).text()
    }

    /// Sends a copy of all that the guest writes to its serial console there: for a person who looks for a fault.
    pub fn copy_console(&self, to: OwnedFd) {
        lock(&self.bus.console).copy_to(Arc::new(to));
    }

    /// Presses the power button: a guest with an ACPI driver shuts down by itself.
    pub fn power_button(&self) {
        self.bus.power.raise(power::EVENT_BUTTON);
    }

    /// Readable when [`Machine::dispatch`] has something to do.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Does what is ready in the devices, without waiting. `Some` once, when the guest has stopped for good.
    pub fn dispatch(&mut self) -> Option<Stopped> {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Interrupted: it will be readable again.
        let (ready, _) = epoll::wait(&self.epoll, &mut events, Some(&now)).ok()?;
        for event in ready {
            match Watch::decode(event.data.u64()) {
                (OWN, _) => {
                    let _ = self.stopped.read();
                    self.look_for_end();
                }
                (slot, token) => {
                    if let Some(Some(device)) = self.bus.virtio.get(slot as usize) {
                        lock(device).ready(token);
                    }
                }
            }
        }
        let stopped = self.untold.take()?;
        if let Err(error) = self.stop_all() {
            tracing::warn!(%error, "the guest has stopped, but not all of its vCPUs");
        }
        Some(stopped)
    }

    fn device<T>(&self, slot: usize, f: impl FnOnce(&mut MmioTransport) -> T) -> Option<T> {
        self.bus.virtio[slot].as_ref().map(|device| f(&mut lock(device)))
    }

    fn with_block<T>(&self, f: impl FnOnce(&mut Block) -> T) -> Result<T, MachineError> {
        self.device(slot::BLOCK, |transport| transport.device_as::<Block>().map(f)).flatten().ok_or_else(|| MachineError::request("this machine has no disk"))
    }
}

/// Reads a file that the node handed over, from its start whatever its position is.
fn read_whole(file: &File, what: &str) -> Result<Vec<u8>, MachineError> {
    let doing = format!("reading {what}");
    let bytes = file.metadata().map_err(|error| MachineError::host(&doing, &error))?.len();
    if bytes > MAX_BOOT_FILE {
        return Err(MachineError::request(&format!("{what} has {bytes} bytes, more than any")));
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, 0).map_err(|error| MachineError::host(&doing, &error))?;
    Ok(content)
}
