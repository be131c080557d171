//! The images of this node and the builds that make them.
//!
//! Owns: which images and versions there are and how far each is, what may be asked of them when (aws-behaviour §5.1), the
//! queue of builds, deletions, and the clean-up after both. Never knows how an image is built (see `pipeline`) or what runs
//! from it: who deletes says whether microVMs are left, and who runs one holds a [`Lease`] until it can be seen by those
//! who say so.
//!
//! Every version that is not built to its end is FAILED with a reason, whatever happened: an error, a panic, a close, a crash.
//! A version is SUCCESSFUL only once its snapshot is on stable storage. A deletion that was told is done: it is written down
//! first, then the files go, then the record.
//!
//! Locks: `changes` is held by whoever writes (but for the record of a build under way, which nobody else may change);
//! the state's own lock is never held across anything slow, and is taken while `changes` is held, never the other way round.

mod builds;
mod changes;

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use model::{ImageName, ImageVersion};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmm_runtime::engine::Engine;

use crate::{
    BuildRequest, BuilderConfig, CatalogError, Deletion, Image, ImageRecord, ImageState, VersionState, VersionStatus,
    failure,
    job::{Builder, RealBuilder},
    records::{Found, Layout},
    sandbox,
};

/// What everybody sees. What is here is on stable storage as well, but for leases.
#[derive(Default)]
struct State {
    images: BTreeMap<ImageName, Entry>,
    deleted: BTreeSet<ImageName>,
}

struct Entry {
    image: Image,
    /// How many are about to run a microVM of a version.
    leases: BTreeMap<ImageVersion, usize>,
    /// Versions whose deletion is being written down: no lease is given any more.
    closing: BTreeSet<ImageVersion>,
}

impl Entry {
    fn new(image: Image) -> Self {
        Self { image, leases: BTreeMap::new(), closing: BTreeSet::new() }
    }

    fn put(&mut self, record: ImageRecord) {
        match self.image.versions.iter_mut().find(|other| other.version == record.version) {
            Some(old) => *old = record,
            None => {
                self.image.versions.push(record);
                self.image.versions.sort_by_key(|record| record.version);
            }
        }
    }
}

struct Inner {
    config: BuilderConfig,
    layout: Layout,
    engine: Arc<dyn Engine>,
    builder: Arc<dyn Builder>,
    state: watch::Sender<State>,
    changes: Mutex<()>,
    /// Held by whoever empties the trash.
    trash: Mutex<()>,
    places: Semaphore,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

/// The images of this node. Cheap to clone.
#[derive(Clone)]
pub struct Catalog {
    inner: Arc<Inner>,
}

/// Leave to run a microVM of a version: the version is not deleted while it is held. To be dropped once the microVM can be
/// seen by those who delete.
pub struct Lease {
    inner: Arc<Inner>,
    record: ImageRecord,
}

impl Lease {
    /// The version.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// The directory of its snapshot.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.inner.layout.snapshot(&self.record.name, self.record.version)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.inner.quietly(|state| {
            if let Some(entry) = state.images.get_mut(&self.record.name)
                && let Some(count) = entry.leases.get_mut(&self.record.version)
            {
                *count = count.saturating_sub(1);
            }
        });
    }
}

/// Why nothing can be run from an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotRunnable {
    /// There is no such image.
    UnknownImage,
    /// The image has no such version.
    UnknownVersion,
    /// The version asked for, or every one, is not built, INACTIVE or being deleted.
    NotActive,
}

fn storage_error(doing: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> CatalogError {
    CatalogError::Storage { doing: doing.into(), source: source.into() }
}

fn stopping() -> CatalogError {
    storage_error("changing images", io::Error::other("the node is stopping"))
}

/// Runs file work off the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

impl Catalog {
    /// Opens the catalog. Builds that were under way when the last process ended are marked failed and cleaned up; deletions
    /// are finished.
    pub async fn open(config: BuilderConfig, engine: Arc<dyn Engine>) -> Result<Self, CatalogError> {
        let builder = Arc::new(RealBuilder::new(config.clone(), Arc::clone(&engine)));
        Self::open_with(config, engine, builder).await
    }

    pub(crate) async fn open_with(mut config: BuilderConfig, engine: Arc<dyn Engine>, builder: Arc<dyn Builder>) -> Result<Self, CatalogError> {
        let dir = config.dir.clone();
        let doing = format!("opening the image catalog in {}", dir.display());
        let opened = blocking(move || {
            std::fs::create_dir_all(&dir)?;
            // Builds run in another directory, so every path must be absolute.
            let dir = dir.canonicalize()?;
            let layout = Layout::new(dir.clone());
            let mut found = layout.read_all()?;
            settle_all(&layout, &mut found);
            Ok((dir, layout, found))
        });
        let (dir, layout, found) = opened.await.map_err(|error| storage_error(doing, error))?;
        let work = layout.work();
        sandbox::remove_dir(work.clone()).await.map_err(|error| storage_error(format!("removing {}", work.display()), error))?;

        config.dir = dir;
        let images = found.images.into_iter().map(|image| (image.facts.name.clone(), Entry::new(image))).collect();
        let places = Semaphore::new(config.max_concurrent_builds.clamp(1, Semaphore::MAX_PERMITS));
        let inner = Arc::new(Inner {
            config,
            layout,
            engine,
            builder,
            state: watch::Sender::new(State { images, deleted: found.deleted }),
            changes: Mutex::new(()),
            trash: Mutex::new(()),
            places,
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        // What waits there may be large, and nobody waits for it.
        let trash = Arc::clone(&inner);
        inner.tasks.spawn(async move { trash.empty_trash().await });
        Ok(Self { inner })
    }

    /// Starts building version 1.0 of a new image and returns at once, with that version PENDING or IN_PROGRESS.
    pub async fn create(&self, request: BuildRequest) -> Result<Image, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("starting a build", async move { inner.create(request).await }).await
    }

    /// Starts building the next version of an image, and returns at once.
    pub async fn update(&self, request: BuildRequest) -> Result<Image, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("starting a build", async move { inner.update(request).await }).await
    }

    /// Makes a version ACTIVE or INACTIVE.
    pub async fn set_status(&self, name: ImageName, version: ImageVersion, status: VersionStatus) -> Result<ImageRecord, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("changing a version", async move { inner.set_status(&name, version, status).await }).await
    }

    /// Replaces the tags of an image, all at once; durable on return.
    pub async fn set_tags(&self, name: ImageName, tags: BTreeMap<String, String>) -> Result<Image, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("changing the tags of an image", async move { inner.set_tags(&name, tags).await }).await
    }

    /// Deletes a version: written down on return, done soon. `in_use`: whether microVMs of it are left; asked while no lease
    /// can be taken. What was deleted before is said to be so.
    pub async fn delete_version(
        &self,
        name: ImageName,
        version: ImageVersion,
        in_use: impl FnOnce() -> bool + Send + 'static,
    ) -> Result<VersionState, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("deleting a version", async move { inner.delete_version(name, version, in_use).await }).await
    }

    /// Deletes an image with all its versions, as [`Self::delete_version`].
    pub async fn delete(&self, name: ImageName, in_use: impl FnOnce() -> bool + Send + 'static) -> Result<ImageState, CatalogError> {
        let inner = Arc::clone(&self.inner);
        self.change("deleting an image", async move { inner.delete(name, in_use).await }).await
    }

    /// In a task of its own, so that a caller that goes away leaves nothing half begun.
    async fn change<T: Send + 'static>(&self, doing: &str, work: impl Future<Output = Result<T, CatalogError>> + Send + 'static) -> Result<T, CatalogError> {
        self.inner.tasks.spawn(work).await.unwrap_or_else(|error| Err(storage_error(doing, error)))
    }

    /// An image with all its versions.
    pub fn image(&self, name: &ImageName) -> Option<Image> {
        self.inner.state.borrow().images.get(name).map(|entry| entry.image.clone())
    }

    /// All images, by name.
    pub fn images(&self) -> Vec<Image> {
        self.inner.state.borrow().images.values().map(|entry| entry.image.clone()).collect()
    }

    /// One version.
    pub fn get(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        self.inner.state.borrow().images.get(name)?.image.version(version).cloned()
    }

    /// Leave to run a microVM of a version, or of the newest that is ACTIVE.
    pub fn lease(&self, name: &ImageName, version: Option<ImageVersion>) -> Result<Lease, NotRunnable> {
        let mut leased = Err(NotRunnable::UnknownImage);
        self.inner.quietly(|state| {
            leased = (|| {
                let entry = state.images.get_mut(name).ok_or(NotRunnable::UnknownImage)?;
                let record = match version {
                    Some(version) => entry.image.version(version).ok_or(NotRunnable::UnknownVersion)?,
                    None => entry.image.latest_active().ok_or(NotRunnable::NotActive)?,
                };
                if !record.is_runnable() || entry.image.facts.deletion.is_some() || entry.closing.contains(&record.version) {
                    return Err(NotRunnable::NotActive);
                }
                *entry.leases.entry(record.version).or_default() += 1;
                Ok(record.clone())
            })();
        });
        leased.map(|record| Lease { inner: Arc::clone(&self.inner), record })
    }

    /// The directory of a version's snapshot (see `Engine::capture_image`).
    pub fn snapshot_dir(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.inner.layout.snapshot(name, version)
    }

    /// The build log so far (container build, then the app's output until the snapshot), as a file that grows.
    pub fn build_log(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.inner.layout.log(name, version)
    }

    /// Returns when the build of a version has ended.
    pub async fn finished(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        let find = |state: &State| state.images.get(name).and_then(|entry| entry.image.version(version)).cloned();
        self.wait(|state| find(state).is_none_or(|record| record.state.is_finished()), find).await
    }

    /// Returns when a version is not there (any more), or could not be deleted.
    pub async fn version_gone(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        let find = |state: &State| state.images.get(name).and_then(|entry| entry.image.version(version)).cloned();
        self.wait(|state| find(state).is_none_or(|record| record.deletion == Some(Deletion::Failed)), find).await
    }

    /// Returns when an image is not there (any more), or could not be deleted.
    pub async fn gone(&self, name: &ImageName) -> Option<Image> {
        let find = |state: &State| state.images.get(name).map(|entry| entry.image.clone());
        self.wait(|state| find(state).is_none_or(|image| image.facts.deletion == Some(Deletion::Failed)), find).await
    }

    async fn wait<T>(&self, done: impl Fn(&State) -> bool, find: impl Fn(&State) -> Option<T>) -> Option<T> {
        let mut state = self.inner.state.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let state = state.wait_for(|state| done(state)).await.ok()?;
        find(&state)
    }

    /// Cancels running builds, lets deletions end, and waits for the clean-up.
    pub async fn close(&self, deadline: CancellationToken) {
        self.inner.cancel.cancel();
        self.inner.tasks.close();
        tokio::select! {
            () = self.inner.tasks.wait() => {}
            () = deadline.cancelled() => tracing::warn!(tasks = self.inner.tasks.len(), "builds did not end in time; the next start cleans up"),
        }
    }
}

/// What a start makes of what it finds. An image that cannot be written keeps others from nothing.
fn settle_all(layout: &Layout, found: &mut Found) {
    let mut kept = Vec::new();
    for mut image in std::mem::take(&mut found.images) {
        let name = image.facts.name.clone();
        let warn = |doing: &str, error: &io::Error| tracing::error!(image = %name, %error, "{doing} failed");
        if image.facts.deletion == Some(Deletion::UnderWay) {
            match layout.discard_image(&name) {
                Ok(()) => {
                    tracing::info!(image = %name, "an image was deleted, as the last process had begun to");
                    found.deleted.insert(name);
                    continue;
                }
                Err(error) => {
                    warn("deleting an image", &error);
                    image.facts.deletion = Some(Deletion::Failed);
                    let _ = layout.write_image(&image.facts).inspect_err(|error| warn("recording an image", error));
                }
            }
        }
        image.versions.retain_mut(|record| {
            if record.deletion == Some(Deletion::UnderWay) {
                match layout.discard_version(&name, record.version) {
                    Ok(()) => return false,
                    Err(error) => {
                        warn("deleting a version", &error);
                        record.deletion = Some(Deletion::Failed);
                        let _ = layout.write(record).inspect_err(|error| warn("recording a version", error));
                    }
                }
            }
            if !record.state.is_finished() {
                builds::settle(record, Err(failure::internal("the node stopped while this image was being built; build it again")));
                let _ = layout.write(record).inspect_err(|error| warn("recording a build that was cut off", error));
            }
            let _ = layout.scrub(record).inspect_err(|error| warn("removing what a build left", error));
            true
        });
        kept.push(image);
    }
    found.images = kept;
}

impl Inner {
    /// Changes what watchers do not wait for.
    fn quietly(&self, change: impl FnOnce(&mut State)) {
        self.state.send_if_modified(|state| {
            change(state);
            false
        });
    }

    fn publish(&self, name: &ImageName, change: impl FnOnce(&mut Entry)) {
        self.state.send_modify(|state| {
            if let Some(entry) = state.images.get_mut(name) {
                change(entry);
            }
        });
    }

    /// Removes what was discarded. What cannot be removed is tried again with the next deletion and at the next start.
    async fn empty_trash(&self) {
        let _one = self.trash.lock().await;
        let trash = self.layout.trash();
        let shown = trash.display().to_string();
        if let Err(error) = blocking(move || empty(&trash)).await {
            tracing::warn!(path = shown, %error, "what was deleted still takes space");
        }
    }
}

fn empty(trash: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(trash) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() { std::fs::remove_dir_all(entry.path())? } else { std::fs::remove_file(entry.path())? }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

/// A wall time that never goes back behind another.
fn later_than(other: SystemTime) -> SystemTime {
    SystemTime::now().max(other)
}
