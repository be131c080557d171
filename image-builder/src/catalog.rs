//! The images of this node and the builds that make them.
//!
//! Owns: which versions there are and how far each is, the queue of builds, and the clean-up after them. Never knows how an
//! image is built (see `pipeline`) or what runs from it.
//!
//! Every version that is not built to its end is FAILED with a reason, whatever happened: an error, a panic, a close, a crash.
//! A version is SUCCESSFUL only once its snapshot is on stable storage.

use std::{
    collections::BTreeMap,
    error::Error,
    io,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use model::{ImageName, ImageVersion, Port, Shape};
use tokio::sync::{OnceCell, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmm_runtime::engine::Engine;

use crate::{
    BuildRequest, BuildState, BuilderConfig, CatalogError, ImageRecord,
    base::SharedStore,
    build_log::BuildLog,
    container::Workspace,
    failure::{self, Stop},
    pipeline::{self, Inputs},
    records::Layout,
    sandbox,
};

/// Builds that wait for a place. Each holds a record and a task, so this bounds little memory but much patience.
const MAX_WAITING: usize = 64;

type Records = BTreeMap<ImageName, BTreeMap<ImageVersion, ImageRecord>>;

struct Inner {
    config: BuilderConfig,
    layout: Layout,
    engine: Arc<dyn Engine>,
    /// Written only by this module's `put` and `create`; its lock is never held across anything slow.
    records: watch::Sender<Records>,
    places: Semaphore,
    /// Opened by the first build, so that a node without buildah can still run the images it has.
    store: OnceCell<SharedStore>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

/// The images of this node. Cheap to clone.
#[derive(Clone)]
pub struct Catalog {
    inner: Arc<Inner>,
}

fn storage_error(doing: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> CatalogError {
    CatalogError::Storage { doing: doing.into(), source: source.into() }
}

/// Runs file work off the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

impl Catalog {
    /// Opens the catalog; builds that were under way when the last process ended are marked failed and cleaned up.
    pub async fn open(mut config: BuilderConfig, engine: Arc<dyn Engine>) -> Result<Self, CatalogError> {
        let dir = config.dir.clone();
        let doing = format!("opening the image catalog in {}", dir.display());
        let opened = blocking(move || {
            std::fs::create_dir_all(&dir)?;
            // Builds run in another directory, so every path must be absolute.
            let dir = dir.canonicalize()?;
            let layout = Layout::new(dir.clone());
            let mut records = layout.read_all()?;
            for record in &mut records {
                if matches!(record.state, BuildState::Pending | BuildState::InProgress) {
                    let stop = failure::internal("the node stopped while this image was being built; build it again");
                    settle(record, Err(stop));
                    match std::fs::remove_dir_all(layout.snapshot(&record.name, record.version)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                    layout.write(record)?;
                }
            }
            Ok((dir, layout, records))
        });
        let (dir, layout, found) = opened.await.map_err(|error| storage_error(doing, error))?;
        let work = layout.work();
        sandbox::remove_dir(work.clone()).await.map_err(|error| storage_error(format!("removing {}", work.display()), error))?;

        let mut records = Records::new();
        for record in found {
            records.entry(record.name.clone()).or_default().insert(record.version, record);
        }
        config.dir = dir;
        let places = Semaphore::new(config.max_concurrent_builds.clamp(1, Semaphore::MAX_PERMITS));
        let (store, cancel, tasks) = (OnceCell::new(), CancellationToken::new(), TaskTracker::new());
        let inner = Inner { config, layout, engine, records: watch::Sender::new(records), places, store, cancel, tasks };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Starts building version 1.0 of a new image and returns its record (state PENDING or IN_PROGRESS) at once.
    pub async fn create(&self, request: BuildRequest) -> Result<ImageRecord, CatalogError> {
        // In a task of its own, so that a caller that goes away leaves nothing half begun.
        let inner = Arc::clone(&self.inner);
        let started = self.inner.tasks.spawn(async move { inner.create(request).await });
        started.await.unwrap_or_else(|error| Err(storage_error("starting a build", error)))
    }

    /// One version.
    pub fn get(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        self.inner.records.borrow().get(name)?.get(&version).cloned()
    }

    /// All versions of an image, oldest first; empty if there is no such image.
    pub fn versions(&self, name: &ImageName) -> Vec<ImageRecord> {
        self.inner.records.borrow().get(name).map(|versions| versions.values().cloned().collect()).unwrap_or_default()
    }

    /// The newest version of every image, by name.
    pub fn list(&self) -> Vec<ImageRecord> {
        self.inner.records.borrow().values().filter_map(|versions| versions.values().next_back().cloned()).collect()
    }

    /// The newest version that microVMs can be run from, with its snapshot directory.
    pub fn latest_active(&self, name: &ImageName) -> Option<(ImageRecord, PathBuf)> {
        let records = self.inner.records.borrow();
        let record = records.get(name)?.values().rev().find(|record| record.state == BuildState::Successful)?;
        Some((record.clone(), self.snapshot_dir(name, record.version)))
    }

    /// The directory of a version's snapshot (see `Engine::capture_image`).
    pub fn snapshot_dir(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.inner.layout.snapshot(name, version)
    }

    /// The tags of an image; empty if there is no such image.
    pub fn tags(&self, name: &ImageName) -> Result<BTreeMap<String, String>, CatalogError> {
        self.inner.layout.read_tags(name).map_err(|error| storage_error(format!("reading the tags of image {name}"), error))
    }

    /// Replaces the tags of an image, all at once; durable on return. `false`: there is no such image.
    pub async fn set_tags(&self, name: &ImageName, tags: BTreeMap<String, String>) -> Result<bool, CatalogError> {
        if !self.inner.records.borrow().contains_key(name) {
            return Ok(false);
        }
        let (layout, image) = (self.inner.layout.clone(), name.clone());
        match blocking(move || layout.write_tags(&image, &tags)).await {
            Ok(()) => Ok(true),
            // Deleted meanwhile: its directory is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(storage_error(format!("writing the tags of image {name}"), error)),
        }
    }

    /// The build log so far (container build, then the app's output until the snapshot), as a file.
    pub fn build_log(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.inner.layout.log(name, version)
    }

    /// Returns when the version is SUCCESSFUL or FAILED.
    pub async fn finished(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        let mut records = self.inner.records.subscribe();
        let done = |records: &Records| {
            let record = records.get(name).and_then(|versions| versions.get(&version));
            record.is_none_or(|record| matches!(record.state, BuildState::Successful | BuildState::Failed))
        };
        // The sender lives in `self`, so waiting cannot fail.
        records.wait_for(done).await.ok()?.get(name)?.get(&version).cloned()
    }

    /// Cancels running builds and waits for their clean-up.
    pub async fn close(&self, deadline: CancellationToken) {
        self.inner.cancel.cancel();
        self.inner.tasks.close();
        tokio::select! {
            () = self.inner.tasks.wait() => {}
            () = deadline.cancelled() => tracing::warn!(builds = self.inner.tasks.len(), "builds did not end in time; the next start cleans up"),
        }
    }
}

/// Writes the end of a build into its record.
fn settle(record: &mut ImageRecord, outcome: Result<Port, Stop>) {
    record.updated_at = SystemTime::now();
    match outcome {
        Ok(port) => {
            record.state = BuildState::Successful;
            record.ready_port = Some(port);
        }
        Err(Stop::Failed(failure)) => {
            record.state = BuildState::Failed;
            record.failure = Some(failure);
        }
        Err(Stop::Cancelled) => settle(record, Err(failure::internal("the node was stopped while this image was being built; build it again"))),
    }
}

impl Inner {
    async fn create(self: Arc<Self>, request: BuildRequest) -> Result<ImageRecord, CatalogError> {
        if self.cancel.is_cancelled() {
            return Err(storage_error("starting a build", io::Error::other("the node is stopping")));
        }
        let now = SystemTime::now();
        let record = ImageRecord {
            name: request.name.clone(),
            version: ImageVersion::FIRST,
            state: BuildState::Pending,
            failure: None,
            shape: Shape { memory_mib: request.memory.mib(), vcpus: 1, disk_gib: request.memory.disk_gib() },
            memory: request.memory,
            created_at: now,
            updated_at: now,
            hooks: request.hooks,
            request: request.request.clone(),
            ready_port: None,
        };
        // The name is taken before it is written, so that of two callers only one goes on.
        let mut refused = None;
        self.records.send_if_modified(|records| {
            let waiting = records.values().flat_map(BTreeMap::values).filter(|record| record.state == BuildState::Pending).count();
            if records.contains_key(&record.name) {
                refused = Some(CatalogError::NameTaken(record.name.clone()));
            } else if waiting >= MAX_WAITING {
                refused = Some(CatalogError::TooManyBuilds { limit: MAX_WAITING });
            } else {
                records.entry(record.name.clone()).or_default().insert(record.version, record.clone());
            }
            refused.is_none()
        });
        if let Some(refused) = refused {
            return Err(refused);
        }
        let (layout, first, tags) = (self.layout.clone(), record.clone(), request.tags.clone());
        if let Err(error) = blocking(move || layout.create(&first, &tags)).await {
            self.records.send_modify(|records| {
                records.remove(&record.name);
            });
            return Err(storage_error(format!("writing the record of image {}", record.name), error));
        }
        let inner = Arc::clone(&self);
        let begun = record.clone();
        self.tasks.spawn(async move { inner.build(request, begun).await });
        Ok(record)
    }

    /// Runs a build to its end. Never fails: what goes wrong is in the record.
    async fn build(self: Arc<Self>, request: BuildRequest, mut record: ImageRecord) {
        let place = tokio::select! {
            // The semaphore is never closed.
            place = self.places.acquire() => place.ok(),
            () = self.cancel.cancelled() => None,
        };
        let outcome = if place.is_some() {
            record.state = BuildState::InProgress;
            record.updated_at = SystemTime::now();
            if let Err(error) = self.put(&record).await {
                tracing::error!(image = %record.name, %error, "the record of a build cannot be written");
            }
            tracing::info!(image = %record.name, version = %record.version, "building an image");
            let (inner, build) = (Arc::clone(&self), record.clone());
            // A task of its own: a panic in a build is the end of that build only.
            let attempt = self.tasks.spawn(async move { inner.attempt(&request, &build).await });
            attempt.await.unwrap_or_else(|error| Err(failure::internal(format!("the build ended unexpectedly: {error}"))))
        } else {
            Err(Stop::Cancelled)
        };
        let workspace = self.workspace(&record);
        if let Err(error) = sandbox::remove_dir(workspace.dir.clone()).await {
            tracing::warn!(path = %workspace.dir.display(), %error, "what a build left cannot be removed");
        }
        settle(&mut record, outcome);
        match &record.failure {
            None => tracing::info!(image = %record.name, version = %record.version, "an image was built"),
            Some(failure) => tracing::warn!(image = %record.name, version = %record.version, code = failure.code, reason = failure.message, "an image was not built"),
        }
        if let Err(error) = self.put(&record).await {
            tracing::error!(image = %record.name, %error, "the record of a build cannot be written");
            // What is only in memory would be gone with this process, so it is not called done.
            settle(&mut record, Err(failure::internal(format!("the record of the build could not be written: {error}"))));
            record.ready_port = None;
            self.publish(&record);
        }
    }

    async fn attempt(&self, request: &BuildRequest, record: &ImageRecord) -> Result<Port, Stop> {
        let log_path = self.layout.log(&record.name, record.version);
        let mut log = BuildLog::create(&log_path).map_err(|error| failure::internal(format!("making {} failed: {error}", log_path.display())))?;
        let built = self.attempt_logged(request, record, &mut log).await;
        match &built {
            Ok(_) => log.note("The image is ready."),
            Err(Stop::Failed(failure)) => log.note(&format!("The build failed. {}: {}", failure.code, failure.message)),
            Err(Stop::Cancelled) => log.note("The build was cancelled because the node is stopping."),
        }
        built
    }

    async fn attempt_logged(&self, request: &BuildRequest, record: &ImageRecord, log: &mut BuildLog) -> Result<Port, Stop> {
        let store = self.store.get_or_try_init(|| SharedStore::open(&self.config.base_dir)).await?;
        let workspace = self.workspace(record);
        pipeline::run(Inputs {
            request,
            shape: record.shape,
            store,
            engine: &self.engine,
            workspace: &workspace,
            log,
            label: format!("{}-{}", record.name, record.version),
            snapshot: self.layout.snapshot(&record.name, record.version),
            build_timeout: self.config.build_timeout,
            ready_timeout: self.config.ready_timeout,
            cancel: &self.cancel,
        })
        .await
    }

    fn workspace(&self, record: &ImageRecord) -> Workspace {
        Workspace { dir: self.layout.work().join(format!("{}-{}", record.name, record.version)) }
    }

    /// On disk first, then for everybody to see.
    async fn put(&self, record: &ImageRecord) -> io::Result<()> {
        let (layout, written) = (self.layout.clone(), record.clone());
        blocking(move || layout.write(&written)).await?;
        self.publish(record);
        Ok(())
    }

    fn publish(&self, record: &ImageRecord) {
        self.records.send_modify(|records| {
            records.entry(record.name.clone()).or_default().insert(record.version, record.clone());
        });
    }
}
