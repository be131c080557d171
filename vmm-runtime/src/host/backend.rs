//! What differs from VMM to VMM.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use model::Shape;
use rustix::fs::MemfdFlags;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use vmm_protocol::memdiff::Reader;

use super::{Image, Layers, Stopwatch, process::Process};
use crate::{
    engine::{EngineError, Usage},
    snapshot::manifest::{Fingerprint, Part},
};

/// Device state, in every snapshot.
pub(crate) const STATE: &str = "state";
/// Memory difference, in a microVM's snapshot.
pub(crate) const DIFFERENCE: &str = "memory.diff";

/// What a process is started for.
#[derive(Clone)]
pub enum Role {
    /// Boots a kernel, writing guest memory into a file.
    Boot {
        /// Size of the guest.
        shape: Shape,
        /// The file; it is not there yet.
        memory: PathBuf,
        /// Raw root disk.
        root_disk: PathBuf,
    },
    /// Waits for the state of some clone of the image, reading guest memory from its file and writing none of it back.
    Clone(Arc<Image>),
}

impl Role {
    /// Size of the guest.
    pub fn shape(&self) -> Shape {
        match self {
            Self::Boot { shape, .. } => *shape,
            Self::Clone(image) => image.shape(),
        }
    }

    /// The file with guest memory.
    pub fn memory(&self) -> PathBuf {
        match self {
            Self::Boot { memory, .. } => memory.clone(),
            Self::Clone(image) => image.memory(),
        }
    }
}

/// A saved machine, all of it checked but the pages of the memory difference.
pub struct Load<'a, B: Backend> {
    /// Where the snapshot is, for errors.
    pub dir: &'a Path,
    /// What it is a clone of.
    pub image: &'a Image,
    /// Its disk; the files of the top layer are not there yet.
    pub layers: &'a Layers,
    /// Device state.
    pub state: &'a [u8],
    /// Its memory, unless that is the image's.
    pub difference: Option<Reader<File>>,
    /// The connection to the VMM process that wrote the snapshot, if it was a process of this `serve`.
    pub predecessor: Option<&'a B::Vmm>,
}

/// Where a stopped microVM is saved to.
pub struct Save<'a> {
    /// The directory of the snapshot that is being written.
    pub dir: &'a Path,
    /// What it is a clone of.
    pub image: &'a Image,
    /// Its disk.
    pub layers: &'a mut Layers,
    /// Asks to give up.
    pub cancel: &'a CancellationToken,
}

/// What was written, durably. The top disk layer is whole and may be sealed.
pub struct SavedParts {
    /// [`STATE`], with the checksum of the whole file.
    pub state: Part,
    /// [`DIFFERENCE`], with the checksum of its header.
    pub memory: Part,
}

/// One kind of VMM.
///
/// A process is used by one role in one life: started, connected, then booting or waiting for [`Backend::load`]. Errors
/// leave its process unfit for anything but an end, except where a method says otherwise.
#[async_trait]
pub trait Backend: Send + Sync + Sized + 'static {
    /// Name of the engine.
    const NAME: &'static str;

    /// Endings of the files of a disk layer.
    const LAYER_FILES: &'static [&'static str];

    /// A connection to a process. Dropping it does not end the process.
    type Vmm: Send + Sync + 'static;

    /// What a host must be to restore what is saved here.
    fn fingerprint(&self, shape: Shape) -> Fingerprint;

    /// The program, by path or by name, and what it is told if it is not there.
    fn program(&self) -> (&Path, &'static str);

    /// Whether the program joins the cgroup that it is told by itself, before it does anything else. If not, it is put into it
    /// as soon as it runs.
    const JOINS_CGROUP: bool;

    /// Tasks beside the vCPUs' threads, with room.
    const OTHER_TASKS: u32;

    /// Memory that the process may take beside the guest's.
    fn overhead_bytes(&self, shape: Shape) -> u64;

    /// Its arguments; one of them is [`super::process::name_argument`]. `cgroup` is there already.
    fn arguments(&self, process_dir: &Path, role: &Role, cgroup: Option<&Path>) -> Vec<String>;

    /// Connects to a fresh process. On return it boots, or is ready to load.
    async fn connect(&self, process: &Process, role: &Role) -> Result<Self::Vmm, EngineError>;

    /// Connects to a process with a guest that runs, of an earlier `serve`. If its guest is stopped (a suspend was cut off)
    /// it goes on.
    async fn reconnect(&self, process: &Process, image: &Image) -> Result<Self::Vmm, EngineError>;

    /// The channel to the guest agent of a guest that runs; waits for an agent that is not there yet.
    async fn agent(&self, process: &Process, vmm: &Self::Vmm) -> io::Result<UnixStream>;

    /// Puts a saved machine into a process that waits for one, and leaves it stopped.
    async fn load(&self, process: &Process, vmm: &Self::Vmm, saved: Load<'_, Self>, watch: &mut Stopwatch) -> Result<(), EngineError>;

    /// Lets a stopped guest run.
    async fn run(&self, process: &Process, vmm: &Self::Vmm) -> Result<(), EngineError>;

    /// Stops the guest, with nothing in flight. After an error it may be stopped, and [`Backend::run`] is tried.
    async fn pause(&self, process: &Process, vmm: &Self::Vmm) -> Result<(), EngineError>;

    /// Writes the device state of a stopped guest whose memory and disk are in their files.
    async fn save_image(&self, process: &Process, vmm: &Self::Vmm, dir: &Path) -> Result<Part, EngineError>;

    /// Writes what of a stopped guest differs from its image. `Ok(None)`: cancelled. Whatever the outcome, the guest may go
    /// on if the process lives.
    async fn save_difference(&self, process: &Process, vmm: &Self::Vmm, save: Save<'_>, watch: &mut Stopwatch) -> Result<Option<SavedParts>, EngineError>;

    /// Returns how, when the VMM says that the guest will not run any more. Never, if it does not.
    async fn stopped(&self, vmm: &Self::Vmm) -> String;

    /// Returns when nothing of a killed process touches a file any more.
    async fn gone(&self, _vmm: &Self::Vmm) {}

    /// The newest output of the serial console; empty if it cannot be had soon.
    async fn console(&self, vmm: &Self::Vmm) -> String;

    /// Counters, if they can be had.
    async fn usage(&self, process: &Process, vmm: &Self::Vmm) -> Option<Usage>;
}

/// Device state as a file without a name, for a VMM to read what was checked and not what has become of it.
pub(crate) fn state_file(state: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC)?);
    file.write_all(state)?;
    io::Seek::rewind(&mut file)?;
    Ok(file)
}
