//! The loopback engine: microVMs without a guest, for tests of the pieces above the engine.
//!
//! Owns: microVMs whose port N is a TCP address that the test registered, the handles to hold, fail and count what is
//! done to them, and the files that make [`Engine::committed`] and [`Engine::adopt`] answer as a real engine would. Never
//! runs anything: there is no memory to keep, and what listens on the registered addresses does not freeze.
//!
//! A clone of a [`LoopbackEngine`] shares its world. A "restart of serve" is: drop the pieces above, hand a clone to new
//! ones. "Processes" live in the world and so outlive that; [`LoopbackEngine::lose_processes`] is the reboot of a host.

mod gate;
mod streams;
mod vm;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Generation, MicrovmId, Port, Shape};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::gate::Hold;
pub use self::vm::LoopbackVm;
use self::{
    gate::Gate,
    streams::{Flow, Streams},
    vm::{End, Process},
};
use crate::engine::{BootSpec, Engine, EngineError, Exit, ImageSnapshot, LaunchSpec, RestoreSpec, SnapshotRecord, Started, Vm};

/// How often something was done. Failed and taken-back attempts count too, where the name does not say otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// [`Engine::boot`].
    pub boots: usize,
    /// [`Engine::capture_image`].
    pub captures: usize,
    /// [`Engine::launch`].
    pub launches: usize,
    /// [`Engine::restore`].
    pub restores: usize,
    /// [`Vm::suspend`].
    pub suspends: usize,
    /// Suspends that were taken back.
    pub taken_back: usize,
    /// [`Engine::adopt`] that found a process.
    pub adoptions: usize,
    /// [`Vm::kill`] of something that was alive.
    pub kills: usize,
    /// [`Engine::warm`].
    pub warms: usize,
    /// [`Vm::dial`].
    pub dials: usize,
    /// [`Engine::sweep`].
    pub sweeps: usize,
}

/// Where a suspend can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuspendStep {
    /// Streams are parked, nothing is written yet; a cancel is honoured while it waits here.
    BeforeCommit,
    /// The snapshot is committed; a cancel comes too late.
    AfterCommit,
}

/// Everything that outlives a "restart of serve".
#[derive(Default)]
pub(crate) struct World {
    ports: watch::Sender<BTreeMap<Port, SocketAddr>>,
    processes: Mutex<BTreeMap<MicrovmId, Arc<Process>>>,
    counts: watch::Sender<Counts>,
    launch_gate: Gate,
    restore_gate: Gate,
    suspend_gate: Gate,
    committed_gate: Gate,
    dial_gate: Gate,
    fail_launches: Mutex<VecDeque<EngineError>>,
    fail_restores: Mutex<VecDeque<EngineError>>,
    fail_suspends: Mutex<VecDeque<EngineError>>,
}

impl World {
    fn count(&self, add: impl FnOnce(&mut Counts)) {
        self.counts.send_modify(add);
    }
}

/// See the module. Cheap to clone; clones share everything.
#[derive(Clone, Default)]
pub struct LoopbackEngine {
    world: Arc<World>,
}

impl LoopbackEngine {
    /// A world without ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on `port` of every microVM is this address.
    pub fn listen(&self, port: Port, address: SocketAddr) {
        self.world.ports.send_modify(|ports| {
            ports.insert(port, address);
        });
    }

    /// From now on nobody listens on `port`.
    pub fn unlisten(&self, port: Port) {
        self.world.ports.send_modify(|ports| {
            ports.remove(&port);
        });
    }

    /// Launches wait before they do anything.
    pub fn hold_launches(&self) -> Hold {
        self.world.launch_gate.hold()
    }

    /// Restores wait before they do anything.
    pub fn hold_restores(&self) -> Hold {
        self.world.restore_gate.hold()
    }

    /// Suspends wait at this step.
    pub fn hold_suspends(&self, at: SuspendStep) -> Hold {
        match at {
            SuspendStep::BeforeCommit => self.world.suspend_gate.hold(),
            SuspendStep::AfterCommit => self.world.committed_gate.hold(),
        }
    }

    /// Dials wait before they connect.
    pub fn hold_dials(&self) -> Hold {
        self.world.dial_gate.hold()
    }

    /// The next launch that passes the gate fails so. Calls queue.
    pub fn fail_next_launch(&self, error: EngineError) {
        self.world.fail_launches.lock().push_back(error);
    }

    /// The next restore that passes the gate fails so; the snapshot stays. Calls queue.
    pub fn fail_next_restore(&self, error: EngineError) {
        self.world.fail_restores.lock().push_back(error);
    }

    /// The next suspend that passes [`SuspendStep::BeforeCommit`] fails so; the microVM runs on, unless the error is
    /// [`EngineError::Ended`]. Calls queue.
    pub fn fail_next_suspend(&self, error: EngineError) {
        self.world.fail_suspends.lock().push_back(error);
    }

    /// The app or VMM of a running microVM ends by itself. `false` if it is not running.
    pub fn exit(&self, id: MicrovmId, exit: Exit) -> bool {
        let process = self.world.processes.lock().remove(&id);
        process.is_some_and(|process| process.end(End::Unasked(exit)))
    }

    /// Every process is gone and nobody is told: what a reboot of the host leaves.
    pub fn lose_processes(&self) {
        for process in std::mem::take(&mut *self.world.processes.lock()).into_values() {
            process.end(End::Asked);
        }
    }

    /// The microVMs that run (not booted guests of image builds), with their generation.
    pub fn running(&self) -> BTreeMap<MicrovmId, Generation> {
        self.world.processes.lock().iter().map(|(id, process)| (*id, process.generation)).collect()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        *self.world.counts.borrow()
    }

    /// Returns when the counts satisfy `wanted`.
    pub async fn counted(&self, mut wanted: impl FnMut(&Counts) -> bool) -> Counts {
        let mut counts = self.world.counts.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        counts.wait_for(|counts| wanted(counts)).await.map(|counts| *counts).unwrap_or_else(|_| self.counts())
    }

    fn start(&self, id: MicrovmId, dir: &Path, generation: Generation, streams: Arc<Streams>) -> Arc<LoopbackVm> {
        let process = Process::new(dir.to_owned(), generation);
        self.world.processes.lock().insert(id, process.clone());
        LoopbackVm::new(self.world.clone(), Some(id), process, streams, Vec::new())
    }
}

const MANIFEST: &str = "manifest.json";
const COMMITTED: &str = "snapshot.json";

fn failed(doing: impl Into<String>, source: io::Error) -> EngineError {
    EngineError::Failed { doing: doing.into(), source: Box::new(source) }
}

/// The snapshot file of a loopback microVM.
#[derive(Debug, Serialize, Deserialize)]
struct Committed {
    record: SnapshotRecord,
}

fn read_committed(dir: &Path) -> Result<Option<SnapshotRecord>, EngineError> {
    let path = dir.join(COMMITTED);
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Committed>(&bytes)
            .map(|committed| Some(committed.record))
            .map_err(|error| EngineError::BadSnapshot { dir: dir.to_owned(), why: format!("{COMMITTED} is damaged: {error}") }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(format!("reading {}", path.display()), error)),
    }
}

fn commit(dir: &Path, record: SnapshotRecord) -> Result<(), EngineError> {
    let (path, tmp) = (dir.join(COMMITTED), dir.join("snapshot.tmp"));
    let bytes = serde_json::to_vec(&Committed { record }).expect("a record has string keys only");
    std::fs::write(&tmp, bytes).and_then(|()| std::fs::rename(&tmp, &path)).map_err(|error| failed(format!("writing {}", path.display()), error))
}

#[async_trait]
impl Engine for LoopbackEngine {
    fn name(&self) -> &'static str {
        "loopback"
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        self.world.count(|counts| counts.boots += 1);
        let process = Process::booted(spec.dir, spec.root_disk, spec.shape);
        Ok(LoopbackVm::new(self.world.clone(), None, process, Streams::new(), spec.app.exposed))
    }

    /// The root disk moves into the image directory, if there is one.
    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        self.world.count(|counts| counts.captures += 1);
        let vm = vm.as_any().downcast_ref::<LoopbackVm>().ok_or_else(|| EngineError::Host { what: "capture a microVM of another engine".to_owned() })?;
        let (root_disk, shape) = vm.booted().ok_or_else(|| EngineError::Host { what: "capture an image of a microVM that was not booted for it".to_owned() })?;
        vm.ensure_alive("capture")?;
        let write = || -> io::Result<ImageSnapshot> {
            let tmp = into.with_extension("tmp");
            std::fs::create_dir_all(&tmp)?;
            let disk_bytes = match std::fs::metadata(&root_disk) {
                Ok(metadata) => {
                    std::fs::rename(&root_disk, tmp.join("disk.raw"))?;
                    metadata.len()
                }
                Err(_) => 0,
            };
            let snapshot = ImageSnapshot { engine: "loopback".to_owned(), shape, memory_bytes: 0, disk_bytes };
            std::fs::write(tmp.join(MANIFEST), serde_json::to_vec(&snapshot)?)?;
            std::fs::rename(&tmp, &into)?;
            Ok(snapshot)
        };
        let snapshot = write().map_err(|error| failed(format!("writing the image snapshot {}", into.display()), error))?;
        vm.kill().await;
        Ok(snapshot)
    }

    /// The image directory need not hold an image: tests above the engine may name any.
    async fn launch(&self, spec: LaunchSpec) -> Result<Started, EngineError> {
        let begun = Instant::now();
        self.world.count(|counts| counts.launches += 1);
        self.world.launch_gate.pass().await;
        if let Some(error) = self.world.fail_launches.lock().pop_front() {
            return Err(error);
        }
        let vm = self.start(spec.id, &spec.dir, Generation(0), Streams::new());
        Ok(Started { vm, read_bytes: 0, phases: vec![("loopback", begun.elapsed())] })
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Started, EngineError> {
        let begun = Instant::now();
        self.world.count(|counts| counts.restores += 1);
        self.world.restore_gate.pass().await;
        if let Some(error) = self.world.fail_restores.lock().pop_front() {
            return Err(error);
        }
        let bad = |why: String| EngineError::BadSnapshot { dir: spec.dir.clone(), why };
        let record = read_committed(&spec.dir)?.ok_or_else(|| bad("there is none".to_owned()))?;
        if spec.generation <= record.generation {
            return Err(bad(format!("it is of generation {}, and generation {} was to follow it", record.generation, spec.generation)));
        }
        let parked = spec.predecessor.as_ref().and_then(|vm| vm.as_any().downcast_ref::<LoopbackVm>()).and_then(LoopbackVm::take_parked_streams);
        let (streams, from) = parked.map_or_else(|| (Streams::new(), None), |(streams, from)| (streams, Some(from)));
        streams.set(Flow::Held);
        let vm = self.start(spec.id, &spec.dir, spec.generation, streams);
        if let Some(from) = from {
            vm.took(from);
        }
        Ok(Started { vm, read_bytes: 0, phases: vec![("loopback", begun.elapsed())] })
    }

    async fn adopt(&self, id: MicrovmId, _dir: PathBuf, _image_dir: PathBuf, generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError> {
        let mut processes = self.world.processes.lock();
        let Some(process) = processes.get(&id).cloned() else { return Ok(None) };
        if process.generation != generation {
            processes.remove(&id);
            process.end(End::Asked);
            return Ok(None);
        }
        drop(processes);
        self.world.count(|counts| counts.adoptions += 1);
        Ok(Some(LoopbackVm::new(self.world.clone(), Some(id), process, Streams::new(), Vec::new())))
    }

    async fn committed(&self, dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError> {
        read_committed(&dir)
    }

    async fn warm(&self, _image_dir: PathBuf) {
        self.world.count(|counts| counts.warms += 1);
    }

    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError> {
        self.world.count(|counts| counts.sweeps += 1);
        self.world.processes.lock().retain(|id, process| {
            let kept = keep.contains(id);
            if !kept {
                process.end(End::Asked);
            }
            kept
        });
        Ok(())
    }

    async fn close(&self) {}
}

/// How long a loopback microVM takes to answer a dial that is never answered.
/// What [`Vm::dial_shell`] of a loopback microVM leads to, if a test has put something there.
pub const SHELL: Port = Port::new(u16::MAX).expect("it is not 0");

const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// What a booted guest of an image build keeps for its capture.
type Booted = (PathBuf, Shape);

#[cfg(test)]
mod tests;
