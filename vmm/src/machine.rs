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

use std::{
    fs::File,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::Arc,
};

use vmm_protocol::control::{Fault, MemoryUse, NetSpec, ParkedStream, SavedMemory, Usage};

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

/// Why a guest will not run any more: for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Shut down, reset, or what KVM could not do, with RIP and instruction bytes where known.
    pub how: String,
}

/// The virtual machine. Dropping it ends its threads.
pub struct Machine {}

impl Machine {
    /// Makes the KVM machine with its vCPU threads (waiting), guest memory and all devices. Everything that needs a name or a
    /// thread is opened here; afterwards the process may be jailed.
    pub fn prepare(_shell: Shell) -> Result<Self, MachineError> {
        todo!()
    }

    /// Loads a kernel and runs it.
    pub fn boot(&mut self, _boot: Boot) -> Result<Phases, MachineError> {
        todo!()
    }

    /// Takes over a saved machine of the same size. Afterwards it is paused. After an error it cannot be used: some of the
    /// state may have been taken, and nothing of it was run.
    pub fn restore(&mut self, _restore: Restore) -> Result<Phases, MachineError> {
        todo!()
    }

    /// Lets devices and vCPUs run. Harmless if they do.
    pub fn run(&mut self) -> Result<(), MachineError> {
        todo!()
    }

    /// Stops vCPUs and devices. On return nothing of the guest is in flight. Harmless if they are stopped.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        todo!()
    }

    /// Writes out a paused machine and syncs the files; it stays paused and may go on, whatever happened. `cancelled` is asked
    /// between pieces of work of a few milliseconds; `true` gives up with [`Fault::Cancelled`].
    pub fn save(&mut self, _state: File, _parts: SaveParts, _cancelled: &mut dyn FnMut() -> bool) -> Result<SavedMachine, MachineError> {
        todo!()
    }

    /// Counters.
    pub fn usage(&self) -> Usage {
        todo!()
    }

    /// The newest lines of the serial console. Not trusted: whatever the guest wrote, as text.
    pub fn console(&self) -> String {
        todo!()
    }

    /// Presses the power button: a guest with an ACPI driver shuts down by itself.
    pub fn power_button(&self) {
        todo!()
    }

    /// Readable when [`Machine::dispatch`] has something to do.
    pub fn events(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// Does what is ready in the devices, without waiting. `Some` once, when the guest has stopped for good.
    pub fn dispatch(&mut self) -> Option<Stopped> {
        todo!()
    }
}
