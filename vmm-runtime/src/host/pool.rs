//! Ready processes: VMMs that wait for the state of some clone of one image, so that a wake does not pay for their start.
//!
//! Owns: how many wait for which image, and refilling in the background with low priority. A wake takes one or starts
//! one itself; it never waits for a refill. A ready process has the image's memory mapped and no disk yet, so it fits
//! every microVM of the image.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use model::Shape;
use parking_lot::Mutex;

use super::{
    Backend, Image, Role, Shared,
    cgroup::{self, Ceiling},
    failed,
    process::{Priority, Process},
    record,
};
use crate::engine::EngineError;

const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How many processes wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// For each image that was used lately.
    pub per_image: usize,
    /// For all images together; the least recently used image gives up its own first. One takes about 20 MiB.
    pub total: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { per_image: 1, total: 8 }
    }
}

/// A process and the connection to it.
pub(super) struct Ready<B: Backend> {
    pub process: Process,
    pub vmm: B::Vmm,
}

impl<B: Backend> Ready<B> {
    async fn end(self, shared: &Shared<B>) {
        self.process.kill(KILL_LIMIT).await;
        // Late is not wrong: nobody waits for it.
        let _ = tokio::time::timeout(KILL_LIMIT, shared.backend.gone(&self.vmm)).await;
        self.process.remove_dir();
    }
}

/// What a process for a guest of this shape may take.
fn ceiling<B: Backend>(backend: &B, shape: Shape) -> Ceiling {
    let memory_bytes = (u64::from(shape.memory_mib) << 20) + backend.overhead_bytes(shape);
    let vcpus = u32::from(shape.vcpus);
    // Devices and the rest of the VMM work beside the vCPUs.
    Ceiling { memory_bytes, tasks: vcpus + B::OTHER_TASKS, cpus: vcpus + 1 }
}

/// Starts a process and connects to it.
pub(super) async fn start<B: Backend>(shared: &Shared<B>, role: &Role, priority: Priority) -> Result<Ready<B>, EngineError> {
    let (program, mend) = shared.backend.program();
    let ceiling = ceiling(&shared.backend, role.shape());
    let arguments = |dir: &Path| {
        let cgroup = shared.cgroups.as_ref().map(|cgroups| cgroups.create(dir, ceiling)).transpose()?;
        Ok(shared.backend.arguments(dir, role, cgroup.as_deref()))
    };
    let process = Process::start(program, &shared.config.run_dir, arguments, priority).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => EngineError::Host { what: format!("{} is not there; {mend}", program.display()) },
        _ => failed(format!("starting {}", program.display()), error),
    })?;
    let process = KillOnDrop::new(process);
    if !B::JOINS_CGROUP
        && let Some(cgroup) = cgroup::of(process.get().dir())
    {
        cgroup::join(&cgroup, process.get().pid()).map_err(|error| failed("limiting a VMM process", error))?;
    }
    let vmm = shared.backend.connect(process.get(), role).await?;
    if priority == Priority::Low && !process.get().raise_priority() {
        tracing::debug!(pid = process.get().pid(), "a ready process keeps its low priority: raising it takes CAP_SYS_NICE");
    }
    Ok(Ready { process: process.keep(), vmm })
}

/// Ends a process unless it is kept, also when a future is dropped.
pub(super) struct KillOnDrop {
    process: Option<Process>,
    /// The microVM whose record names the process, and has to forget it.
    pub recorded_in: Option<PathBuf>,
}

impl KillOnDrop {
    pub fn new(process: Process) -> Self {
        Self { process: Some(process), recorded_in: None }
    }

    pub fn get(&self) -> &Process {
        self.process.as_ref().expect("it is taken out only by `keep`, which consumes this")
    }

    pub fn keep(mut self) -> Process {
        self.process.take().expect("as in `get`")
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.signal_kill();
            process.remove_dir();
            if let Some(dir) = &self.recorded_in {
                record::remove(dir);
            }
        }
    }
}

struct Shelf<B: Backend> {
    image: Arc<Image>,
    ready: Vec<Ready<B>>,
    used: Instant,
}

struct State<B: Backend> {
    shelves: HashMap<PathBuf, Shelf<B>>,
    closed: bool,
}

impl<B: Backend> State<B> {
    fn count(&self) -> usize {
        self.shelves.values().map(|shelf| shelf.ready.len()).sum()
    }
}

/// All ready processes.
pub(super) struct Pool<B: Backend> {
    config: PoolConfig,
    /// What the pool is a part of.
    shared: Weak<Shared<B>>,
    state: Mutex<State<B>>,
    /// One refill at a time.
    refilling: tokio::sync::Mutex<()>,
}

impl<B: Backend> Pool<B> {
    pub fn new(config: PoolConfig, shared: Weak<Shared<B>>) -> Arc<Self> {
        let state = State { shelves: HashMap::new(), closed: false };
        Arc::new(Self { config, shared, state: Mutex::new(state), refilling: tokio::sync::Mutex::new(()) })
    }

    /// One that is ready now, if any.
    pub fn take(&self, image: &Image) -> Option<Ready<B>> {
        let mut state = self.state.lock();
        // A process has the memory of the image that it was started for, whatever has come to the same place since.
        let shelf = state.shelves.get_mut(&image.dir).filter(|shelf| shelf.image.crc32 == image.crc32)?;
        while let Some(ready) = shelf.ready.pop() {
            if ready.process.is_alive() {
                return Some(ready);
            }
            tracing::warn!(dir = %ready.process.dir().display(), output = ready.process.output_tail(), "a ready VMM process had ended");
            ready.process.remove_dir();
        }
        None
    }

    /// Directories of those that wait.
    pub fn dirs(&self) -> Vec<PathBuf> {
        let state = self.state.lock();
        state.shelves.values().flat_map(|shelf| &shelf.ready).map(|ready| ready.process.dir().to_owned()).collect()
    }

    /// Fills up for this image, in the background.
    pub fn refill(self: &Arc<Self>, image: &Arc<Image>) {
        let outdated = {
            let mut state = self.state.lock();
            if state.closed || self.config.per_image == 0 || self.config.total == 0 {
                return;
            }
            let fresh = || Shelf { image: image.clone(), ready: Vec::new(), used: Instant::now() };
            let shelf = state.shelves.entry(image.dir.clone()).or_insert_with(fresh);
            shelf.used = Instant::now();
            let outdated = shelf.image.crc32 != image.crc32;
            outdated.then(|| std::mem::replace(shelf, fresh()).ready)
        };
        let (pool, image_dir) = (self.clone(), image.dir.clone());
        // Ends by itself when the shelf is full, the image fails, or the pool is closed.
        tokio::spawn(async move {
            let _one = pool.refilling.lock().await;
            if let Some(shared) = pool.shared.upgrade() {
                for ready in outdated.into_iter().flatten() {
                    ready.end(&shared).await;
                }
            }
            while pool.add_one(&image_dir).await {}
        });
    }

    /// `false`: there is nothing more to do.
    async fn add_one(&self, image_dir: &Path) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let (image, surplus) = {
            let mut state = self.state.lock();
            let Some(shelf) = state.shelves.get(image_dir).filter(|_| !state.closed) else { return false };
            if shelf.ready.len() >= self.config.per_image {
                return false;
            }
            let wanted = shelf.image.clone();
            let surplus = if state.count() < self.config.total { None } else { self.evict(&mut state, image_dir) };
            if surplus.is_none() && state.count() >= self.config.total {
                return false;
            }
            (wanted, surplus)
        };
        if let Some(surplus) = surplus {
            surplus.end(&shared).await;
        }
        let started = start(&shared, &Role::Clone(image.clone()), Priority::Low).await;
        let unwanted = {
            let mut state = self.state.lock();
            let closed = state.closed;
            match (started, state.shelves.get_mut(image_dir)) {
                (Ok(ready), Some(shelf)) if !closed && Arc::ptr_eq(&shelf.image, &image) => {
                    shelf.ready.push(ready);
                    return true;
                }
                (Ok(ready), _) => vec![ready],
                (Err(error), _) => {
                    tracing::warn!(image = %image_dir.display(), error = &error as &dyn std::error::Error, "no process could be made ready for an image");
                    // Those that are ready already would belong to nobody: a process outlives what holds it.
                    state.shelves.remove(image_dir).map(|shelf| shelf.ready).unwrap_or_default()
                }
            }
        };
        for unwanted in unwanted {
            unwanted.end(&shared).await;
        }
        false
    }

    /// Takes a process from the image that was not used for the longest time.
    fn evict(&self, state: &mut State<B>, but: &Path) -> Option<Ready<B>> {
        let others = state.shelves.iter_mut().filter(|(dir, shelf)| *dir != but && !shelf.ready.is_empty());
        let (dir, shelf) = others.min_by_key(|(_, shelf)| shelf.used)?;
        let (dir, evicted) = (dir.clone(), shelf.ready.pop());
        if shelf.ready.is_empty() {
            state.shelves.remove(&dir);
        }
        evicted
    }

    /// Ends those that wait for an image that is about to go: they hold its memory file, and with it its space on disk.
    pub async fn forget(&self, image_dir: &Path) {
        let shelf = self.state.lock().shelves.remove(image_dir);
        if let Some(shared) = self.shared.upgrade() {
            for ready in shelf.into_iter().flat_map(|shelf| shelf.ready) {
                ready.end(&shared).await;
            }
        }
    }

    /// Ends all that wait; none are made ready any more.
    pub async fn close(&self) {
        let shelves = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.shelves)
        };
        if let Some(shared) = self.shared.upgrade() {
            for ready in shelves.into_values().flat_map(|shelf| shelf.ready) {
                ready.end(&shared).await;
            }
        }
        // A process that was being started meanwhile ends with its refill.
        let _last = self.refilling.lock().await;
    }
}

#[cfg(test)]
mod tests;
