//! What every engine must do.
//!
//! Owns: the words between the idle controller (or the image builder) and whatever runs microVMs. Never holds policy: an
//! engine does what it is told, says what went wrong, and keeps the promises written at each method. The conformance
//! suite in `conformance.rs` holds every engine to them.
//!
//! Directories. An image snapshot lives in one directory that the engine fills once ([`Engine::capture_image`]) and only
//! reads afterwards. A microVM lives in one directory of its own that the engine may fill as it likes; everything that a
//! later process needs to restore or adopt the microVM is in it. Killing `serve` at any instant must leave both in a
//! state that [`Engine::adopt`] or [`Engine::restore`] understands.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use model::{Door, Egress, Generation, MicrovmId, Port, Shape};
pub use protocol::agent::AppSpec;
use protocol::link::MuxStream;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

/// A file of this name in a microVM's directory, put there before its launch, asks the engine to keep nothing of what the app
/// says, in no life of the microVM. Without it the output is in `log/app.log` and, what is older, in `log/app.log.1`.
pub const NO_OUTPUT: &str = "no-output";

/// A byte stream to `127.0.0.1:<port>` in a guest. Half-close (`shutdown`) reaches the other end as end of file.
///
/// A stream that is open when its microVM is suspended is *parked*: it stays valid, and bytes written to it before the
/// next restore wait (within its window) and are counted by [`Vm::parked_write`]. After the restore it is *held*: it moves again
/// when [`Vm::release_streams`] says so.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {
    /// How many bytes it has taken so far. Zero from one that does not count.
    fn written(&self) -> u64 {
        0
    }

    /// After the app has ended the stream or broken it off: whether it is certain that of the bytes behind the first `from` it has
    /// seen none and will see none, so that they may be said again on another stream. Waits while that may become known.
    fn poll_untouched(&mut self, _cx: &mut Context<'_>, _from: u64) -> Poll<bool> {
        Poll::Ready(false)
    }
}

impl ByteStream for MuxStream {
    fn written(&self) -> u64 {
        MuxStream::written(self)
    }

    fn poll_untouched(&mut self, cx: &mut Context<'_>, from: u64) -> Poll<bool> {
        MuxStream::poll_untouched(self, cx, from)
    }
}

impl ByteStream for DuplexStream {}
impl ByteStream for TcpStream {}

/// A boxed [`ByteStream`].
pub type GuestStream = Pin<Box<dyn ByteStream>>;

/// Boot a guest from a root disk, for an image build.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Names the build in logs.
    pub name: String,
    /// The engine's own directory for this boot; exists and is empty. The root disk is used in place.
    pub dir: PathBuf,
    /// Raw ext4 file system. It becomes part of the image: the engine may move or write it.
    pub root_disk: PathBuf,
    /// Size of the guest.
    pub shape: Shape,
    /// What to start.
    pub app: AppSpec,
}

/// Clone a new microVM from an image snapshot.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// Its id.
    pub id: MicrovmId,
    /// Its own directory; exists and is empty, but for [`NO_OUTPUT`].
    pub dir: PathBuf,
    /// The directory that [`Engine::capture_image`] filled.
    pub image_dir: PathBuf,
    /// Variables told to the guest agent at this restore (region, image name …), for what is started later.
    pub identity: BTreeMap<String, String>,
    /// Where it may connect to.
    pub egress: Egress,
}

/// Restore a suspended microVM from its newest committed snapshot.
#[derive(Clone)]
pub struct RestoreSpec {
    /// Its id.
    pub id: MicrovmId,
    /// Its own directory.
    pub dir: PathBuf,
    /// The directory of the image snapshot it is a clone of.
    pub image_dir: PathBuf,
    /// The generation this restore begins (one more than the snapshot's).
    pub generation: Generation,
    /// The `Vm` that this process suspended into the very snapshot, if it was this process: its parked streams go on in
    /// the restored microVM. Without it (after a restart of `serve`) the guest's ends of old streams are reset. On a
    /// failed restore the streams stay parked there, and they come back there when the restored `Vm` is killed (or ends) before
    /// its [`Vm::release_streams`].
    pub predecessor: Option<Arc<dyn Vm>>,
    /// As in [`LaunchSpec::identity`].
    pub identity: BTreeMap<String, String>,
    /// Where it may connect to.
    pub egress: Egress,
}

/// How long each step of a launch or restore took, in order. The steps add up to the whole.
pub type Phases = Vec<(&'static str, Duration)>;

/// A microVM that runs, and how it got there.
pub struct Started {
    /// The microVM.
    pub vm: Arc<dyn Vm>,
    /// Bytes of the snapshot it was made from: for a launch the image's, for a restore those that belong to the microVM alone.
    pub read_bytes: u64,
    /// Time of each step.
    pub phases: Phases,
}

/// What an image snapshot holds; also in its `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSnapshot {
    /// Engine that made it and can restore it.
    pub engine: String,
    /// Size of the guest.
    pub shape: Shape,
    /// Bytes of memory that hold data (holes not counted).
    pub memory_bytes: u64,
    /// Bytes of disk that hold data.
    pub disk_bytes: u64,
}

/// What a suspend wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The generation that was running when it was taken.
    pub generation: Generation,
    /// Bytes of memory written.
    pub memory_bytes: u64,
    /// Bytes of the disk layers that belong to the microVM alone.
    pub disk_bytes: u64,
    /// Time of each step.
    #[serde(skip)]
    pub phases: Phases,
}

/// How a suspend ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SuspendOutcome {
    /// The snapshot is on stable storage, the VMM process is gone.
    Suspended(SnapshotRecord),
    /// Cancelled before the commit: the microVM runs on in the same generation, nothing was lost.
    TakenBack,
}

/// Why a microVM's VMM or app ended without being asked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The app (pid 1 of its namespace) exited with this code.
    App {
        /// Exit code; 128 + signal for a signal.
        code: i32,
    },
    /// The VMM process ended or stopped answering.
    Vmm {
        /// For people: what was seen, with the last lines of the console or the VMM's own output.
        detail: String,
    },
}

/// What an engine could not do. `Display` is a sentence for an operator.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The snapshot (image or microVM) on disk cannot be used: missing, damaged, of another engine version or host.
    /// Nothing of it was run.
    #[error("the snapshot in {dir} cannot be used: {why}")]
    BadSnapshot {
        /// Which one.
        dir: PathBuf,
        /// Which part, and what is wrong with it.
        why: String,
    },
    /// The host lacks something: a program, memory, disk space, a device.
    #[error("the host cannot do this: {what}")]
    Host {
        /// What is missing, and the command that mends it if there is one.
        what: String,
    },
    /// The guest did not do its part in time.
    #[error("the guest did not {step} within {limit:?}{detail}")]
    GuestTimeout {
        /// What it should have done.
        step: &'static str,
        /// How long it had.
        limit: Duration,
        /// Empty, or `: ` and the last lines of its console.
        detail: String,
    },
    /// The app or the VMM ended during the operation.
    #[error("the microVM ended during {step}: {exit:?}")]
    Ended {
        /// During what.
        step: &'static str,
        /// How.
        exit: Exit,
    },
    /// Anything else, with its cause.
    #[error("{doing} failed")]
    Failed {
        /// What was tried, on what.
        doing: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why no stream to a guest port could be had.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody listens on the port (the guest answered).
    #[error("nobody listens on port {port} in the guest")]
    Refused {
        /// The port.
        port: Port,
    },
    /// The guest agent opens no shell.
    #[error("the guest opens no shell")]
    NoShell,
    /// The microVM is not awake, or went to sleep meanwhile. Nothing was sent; trying again after a wake is safe.
    #[error("the microVM is not awake")]
    Asleep,
    /// The microVM is gone.
    #[error("the microVM has ended")]
    Gone,
    /// The guest did not answer in time.
    #[error("the guest did not open {door:?} within {limit:?}")]
    Timeout {
        /// What it should have opened.
        door: Door,
        /// How long it had.
        limit: Duration,
    },
}

/// Counters of one microVM; all but the memory only grow within a generation. What an engine does not count is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// CPU time of the VMM process (vCPUs and devices), in microseconds.
    pub cpu_micros: u64,
    /// Memory that belongs to this microVM alone, in bytes.
    pub private_bytes: u64,
    /// The most that was resident at a time, in bytes.
    pub peak_bytes: u64,
    /// Bytes read from the disk.
    pub block_read_bytes: u64,
    /// Bytes written to the disk.
    pub block_written_bytes: u64,
    /// Bytes that the guest sent into its network.
    pub net_sent_bytes: u64,
    /// Bytes that came to the guest out of its network.
    pub net_received_bytes: u64,
    /// Bytes from the guest on its streams.
    pub stream_sent_bytes: u64,
    /// Bytes to the guest on its streams.
    pub stream_received_bytes: u64,
    /// Exits of the vCPUs to the VMM.
    pub exits: u64,
}

/// Runs microVMs.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// `qemu`, `kvm`, …; also in manifests, logs and metrics.
    fn name(&self) -> &'static str;

    /// Boots a guest and starts its app. Returns when the guest agent has started the app (not when the app is ready).
    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError>;

    /// Ends a booted guest by turning it into an image snapshot in `into` (a directory that does not exist yet, on the
    /// same file system as the boot directory). Everything is durable on return; a crash leaves no `into`.
    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError>;

    /// A new microVM as a clone of an image snapshot. On return clock, entropy and identity are set and the app runs.
    async fn launch(&self, spec: LaunchSpec) -> Result<Started, EngineError>;

    /// Restores from the newest committed snapshot of the microVM. On return clock, entropy and identity are set and
    /// the app runs. On an error the snapshot is as it was and may be tried again.
    async fn restore(&self, spec: RestoreSpec) -> Result<Started, EngineError>;

    /// Takes over a microVM whose VMM process outlived an earlier `serve`. `Ok(None)`: there is no such process (any
    /// more), and nothing of it is left behind; a committed snapshot, if there is one, is untouched.
    async fn adopt(&self, id: MicrovmId, dir: PathBuf, image_dir: PathBuf, generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError>;

    /// Whether `dir` holds a committed snapshot, and of which generation. Cheap; reads the manifest only.
    async fn committed(&self, dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError>;

    /// A hint that microVMs of this image will be launched or restored soon: keep processes ready for them.
    async fn warm(&self, image_dir: PathBuf);

    /// The image is about to be removed: nothing of it is kept ready any more. No microVM of it runs or sleeps.
    async fn forget(&self, _image_dir: PathBuf) {}

    /// Ends every process of this engine under the data directory that belongs to no microVM in `keep` (ready
    /// processes of an earlier run, crashed builds). Called once at start, before anything is launched.
    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError>;

    /// Ends what waits ready. Running microVMs are left alone.
    async fn close(&self);
}

/// One awake microVM (or a booted guest of an image build).
#[async_trait]
pub trait Vm: Send + Sync + 'static {
    /// Opens a stream to `127.0.0.1:port` (then `[::1]:port`) in the guest.
    async fn dial(&self, port: Port) -> Result<GuestStream, DialError>;

    /// Opens a stream to a new shell of the guest agent's, which speaks the server's side of WebSocket on it
    /// (aws-behaviour §2.1). The shell ends with the stream.
    async fn dial_shell(&self) -> Result<GuestStream, DialError>;

    /// Returns when the app listens on one of the exposed ports (any, if none is exposed), with that port; or with an
    /// error when the app ends or `limit` passes.
    async fn ready(&self, limit: Duration) -> Result<Port, EngineError>;

    /// Freezes the app, stops the vCPUs, writes what changed, commits, ends the VMM process. Open streams are parked
    /// and belong to this `Vm` until a restore takes them over ([`RestoreSpec::predecessor`]). While `cancel` fires before the
    /// commit, the microVM goes on as if nothing had happened, but that its streams may be held until [`Vm::release_streams`].
    /// On an error it goes on in the same way, unless the error is [`EngineError::Ended`].
    async fn suspend(&self, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError>;

    /// Lets the streams of before the last suspend go on. Until then no byte of theirs reaches the app or the client, while new
    /// ones can be dialled: so the app can be told of its wake before anything else (design §4 rule 4). Harmless at other times.
    fn release_streams(&self);

    /// Ends when a parked stream (see [`ByteStream`]) has bytes from the client that wait for the guest.
    async fn parked_write(&self);

    /// Ends the microVM at once. Harmless if it has ended.
    async fn kill(&self);

    /// Ends when the app or the VMM has ended unasked. Never ends after [`Vm::kill`] or a suspend.
    async fn exited(&self) -> Exit;

    /// Counters so far.
    async fn usage(&self) -> Usage;

    /// For an engine to find its own type again.
    fn as_any(&self) -> &dyn std::any::Any;
}
