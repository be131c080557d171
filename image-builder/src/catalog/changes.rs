//! What may be done to images when, in which order it is written down, and what becomes of deletions.
//!
//! Each change: `changes` is taken, the rules are asked of the state as it is, the disk is written, the state is published.

use std::{collections::BTreeMap, io, sync::Arc, time::SystemTime};

use model::{ImageName, ImageVersion, SizeSeen};

use super::{Entry, Inner, State, blocking, later_than, stopping, storage_error};
use crate::{
    BuildRequest, BuildState, CatalogError, Deletion, Image, ImageFacts, ImageRecord, ImageState, VersionState, VersionStatus,
    image::BuildFacts,
};

fn new_version(request: &BuildRequest, version: ImageVersion, now: SystemTime, seen: SizeSeen) -> ImageRecord {
    ImageRecord {
        name: request.name.clone(),
        version,
        state: BuildState::Pending,
        status: VersionStatus::Active,
        deletion: None,
        failure: None,
        build: BuildFacts::fresh(),
        shape: request.memory.shape(seen, std::thread::available_parallelism().map_or(1, usize::from)),
        memory: request.memory,
        created_at: now,
        updated_at: now,
        hooks: request.hooks,
        request: request.request.clone(),
        ready_port: None,
        damaged: false,
    }
}

fn find<'s>(state: &'s State, name: &ImageName) -> Result<&'s Image, CatalogError> {
    state.images.get(name).map(|entry| &entry.image).ok_or_else(|| CatalogError::UnknownImage(name.clone()))
}

/// Nothing else may be under way.
fn idle(image: &Image) -> Result<(), CatalogError> {
    if image.is_busy() { Err(CatalogError::Busy(image.state())) } else { Ok(()) }
}

impl Inner {
    fn may_build(&self, state: &State) -> Result<(), CatalogError> {
        if self.cancel.is_cancelled() {
            return Err(stopping());
        }
        let records = state.images.values().flat_map(|entry| &entry.image.versions);
        let limit = self.config.max_unfinished_builds;
        if records.filter(|record| !record.state.is_finished()).count() >= limit { Err(CatalogError::TooManyBuilds { limit }) } else { Ok(()) }
    }

    pub(super) async fn create(self: Arc<Self>, request: BuildRequest) -> Result<Image, CatalogError> {
        let _turn = self.changes.lock().await;
        {
            let state = self.state.borrow();
            if state.images.contains_key(&request.name) {
                return Err(CatalogError::NameTaken(request.name));
            }
            let limit = self.config.max_images;
            if state.images.len() >= limit {
                return Err(CatalogError::TooManyImages { limit });
            }
            self.may_build(&state)?;
        }
        let now = SystemTime::now();
        let record = new_version(&request, ImageVersion::FIRST, now, self.config.size_seen);
        let facts = ImageFacts {
            name: request.name.clone(),
            id: uuid::Uuid::new_v4().to_string(),
            created_at: now,
            updated_at: now,
            last_version: record.version,
            deletion: None,
            tags: request.tags.clone(),
        };
        let image = Image { facts, versions: vec![record.clone()] };
        let (layout, made) = (self.layout.clone(), image.clone());
        let written = blocking(move || made.versions.iter().try_for_each(|first| layout.create_image(&made.facts, first))).await;
        written.map_err(|error| storage_error(format!("making the image {}", request.name), error))?;
        self.state.send_modify(|state| {
            state.deleted.remove(&request.name);
            state.images.insert(request.name.clone(), Entry::new(image.clone()));
        });
        self.start_build(request, record);
        Ok(image)
    }

    pub(super) async fn update(self: Arc<Self>, request: BuildRequest) -> Result<Image, CatalogError> {
        let _turn = self.changes.lock().await;
        let mut facts = {
            let state = self.state.borrow();
            let image = find(&state, &request.name)?;
            idle(image)?;
            let limit = self.config.max_versions;
            if image.versions.len() >= limit {
                return Err(CatalogError::TooManyVersions { limit });
            }
            self.may_build(&state)?;
            image.facts.clone()
        };
        let major = facts.last_version.major.checked_add(1).ok_or(CatalogError::TooManyVersions { limit: u32::MAX as usize })?;
        let record = new_version(&request, ImageVersion { major, minor: 0 }, later_than(facts.updated_at), self.config.size_seen);
        (facts.last_version, facts.updated_at) = (record.version, record.created_at);
        let (layout, made, new) = (self.layout.clone(), facts.clone(), record.clone());
        let written = blocking(move || layout.create_version(&made, &new)).await;
        written.map_err(|error| storage_error(format!("making version {} of the image {}", record.version, record.name), error))?;
        self.publish(&request.name, |entry| {
            entry.image.facts = facts;
            entry.put(record.clone());
        });
        let image = find(&self.state.borrow(), &request.name)?.clone();
        self.start_build(request, record);
        Ok(image)
    }

    fn start_build(self: &Arc<Self>, request: BuildRequest, record: ImageRecord) {
        let build = Arc::clone(self);
        self.tasks.spawn(async move { build.build(request, record).await });
    }

    pub(super) async fn set_status(&self, name: &ImageName, version: ImageVersion, status: VersionStatus) -> Result<ImageRecord, CatalogError> {
        let _turn = self.changes.lock().await;
        let mut record = {
            let state = self.state.borrow();
            let image = find(&state, name)?;
            let record = image.version(version).ok_or_else(|| CatalogError::UnknownVersion(name.clone(), version))?;
            idle(image)?;
            record.clone()
        };
        if status == VersionStatus::Active && (record.state != BuildState::Successful || record.deletion.is_some()) {
            return Err(CatalogError::NotActivatable(version));
        }
        if record.shown_status() == status {
            return Ok(record);
        }
        record.status = status;
        record.updated_at = later_than(record.updated_at);
        self.put(&record).await.map_err(|error| storage_error(format!("recording version {version} of the image {name}"), error))?;
        Ok(record)
    }

    pub(super) async fn set_tags(&self, name: &ImageName, tags: BTreeMap<String, String>) -> Result<Image, CatalogError> {
        let _turn = self.changes.lock().await;
        let mut image = find(&self.state.borrow(), name)?.clone();
        if image.facts.deletion.is_some() {
            return Err(CatalogError::Busy(image.state()));
        }
        image.facts.tags = tags;
        image.facts.updated_at = later_than(image.facts.updated_at);
        self.put_facts(&image.facts).await.map_err(|error| storage_error(format!("recording the image {name}"), error))?;
        Ok(image)
    }

    pub(super) async fn delete_version(
        self: Arc<Self>,
        name: ImageName,
        version: ImageVersion,
        in_use: impl FnOnce() -> bool + Send,
    ) -> Result<VersionState, CatalogError> {
        let _turn = self.changes.lock().await;
        if self.cancel.is_cancelled() {
            return Err(stopping());
        }
        let mut record = {
            let state = self.state.borrow();
            let image = find(&state, &name)?;
            let Some(record) = image.version(version) else {
                let was = version.minor == 0 && version.major > 0 && version <= image.facts.last_version;
                return if was { Ok(VersionState::Deleted) } else { Err(CatalogError::UnknownVersion(name, version)) };
            };
            if record.deletion == Some(Deletion::UnderWay) {
                return Ok(VersionState::Deleting);
            }
            idle(image)?;
            if image.versions.len() == 1 {
                return Err(CatalogError::LastVersion(version));
            }
            record.clone()
        };
        if !self.shut(&name, &[version], in_use) {
            return Err(CatalogError::VersionInUse);
        }
        record.deletion = Some(Deletion::UnderWay);
        record.updated_at = later_than(record.updated_at);
        let written = self.put(&record).await;
        self.open_again(&name, &[version]);
        written.map_err(|error| storage_error(format!("recording that version {version} of the image {name} is deleted"), error))?;
        let inner = Arc::clone(&self);
        self.tasks.spawn(async move { inner.remove_version(record).await });
        Ok(VersionState::Deleting)
    }

    pub(super) async fn delete(self: Arc<Self>, name: ImageName, in_use: impl FnOnce() -> bool + Send) -> Result<ImageState, CatalogError> {
        let _turn = self.changes.lock().await;
        if self.cancel.is_cancelled() {
            return Err(stopping());
        }
        let mut image = {
            let state = self.state.borrow();
            let image = match find(&state, &name) {
                Err(_) if state.deleted.contains(&name) => return Ok(ImageState::Deleted),
                found => found?,
            };
            match image.facts.deletion {
                Some(Deletion::UnderWay) => return Ok(ImageState::Deleting),
                None if image.is_busy() => return Err(CatalogError::NotDeletable(image.state())),
                None | Some(Deletion::Failed) => image.clone(),
            }
        };
        let versions: Vec<ImageVersion> = image.versions.iter().map(|record| record.version).collect();
        if !self.shut(&name, &versions, in_use) {
            return Err(CatalogError::InUse);
        }
        image.facts.deletion = Some(Deletion::UnderWay);
        image.facts.updated_at = later_than(image.facts.updated_at);
        let written = self.put_facts(&image.facts).await;
        self.open_again(&name, &versions);
        written.map_err(|error| storage_error(format!("recording that the image {name} is deleted"), error))?;
        let inner = Arc::clone(&self);
        self.tasks.spawn(async move { inner.remove_image(image).await });
        Ok(ImageState::Deleting)
    }

    /// Gives no more leases of these versions, if there are none and nothing runs. Whoever had one before has either given it
    /// back, and `in_use` sees its microVM, or is counted here.
    fn shut(&self, name: &ImageName, versions: &[ImageVersion], in_use: impl FnOnce() -> bool) -> bool {
        let mut shut = false;
        self.quietly(|state| {
            if let Some(entry) = state.images.get_mut(name) {
                let leased = versions.iter().any(|version| entry.leases.get(version).is_some_and(|count| *count > 0));
                shut = !leased && !in_use();
                if shut {
                    entry.closing.extend(versions);
                }
            }
        });
        shut
    }

    /// From here on the record says what `closing` said.
    fn open_again(&self, name: &ImageName, versions: &[ImageVersion]) {
        self.quietly(|state| {
            if let Some(entry) = state.images.get_mut(name) {
                entry.closing.retain(|version| !versions.contains(version));
            }
        });
    }

    async fn remove_version(&self, mut record: ImageRecord) {
        self.engine.forget(self.layout.snapshot(&record.name, record.version)).await;
        let (layout, name, version) = (self.layout.clone(), record.name.clone(), record.version);
        if let Err(error) = blocking(move || layout.discard_version(&name, version)).await {
            tracing::error!(image = %record.name, version = %record.version, %error, "a version could not be deleted");
            record.deletion = Some(Deletion::Failed);
            if let Err(error) = self.put(&record).await {
                tracing::error!(image = %record.name, %error, "nor could that be written down; the next start tries again");
                self.publish(&record.name.clone(), |entry| entry.put(record));
            }
            return;
        }
        tracing::info!(image = %record.name, version = %record.version, "a version was deleted");
        let now = later_than(record.updated_at);
        self.publish(&record.name, |entry| {
            entry.image.versions.retain(|other| other.version != record.version);
            entry.image.facts.updated_at = now;
        });
        self.empty_trash().await;
    }

    async fn remove_image(&self, mut image: Image) {
        let name = image.facts.name.clone();
        for record in &image.versions {
            self.engine.forget(self.layout.snapshot(&name, record.version)).await;
        }
        let (layout, discarded) = (self.layout.clone(), name.clone());
        if let Err(error) = blocking(move || layout.discard_image(&discarded)).await {
            tracing::error!(image = %name, %error, "an image could not be deleted");
            image.facts.deletion = Some(Deletion::Failed);
            if let Err(error) = self.put_facts(&image.facts).await {
                tracing::error!(image = %name, %error, "nor could that be written down; the next start tries again");
                self.publish(&name, |entry| entry.image.facts = image.facts);
            }
            return;
        }
        tracing::info!(image = %name, "an image was deleted");
        self.state.send_modify(|state| {
            state.images.remove(&name);
            state.deleted.insert(name);
        });
        self.empty_trash().await;
    }

    /// On disk first, then for everybody to see.
    pub(super) async fn put(&self, record: &ImageRecord) -> io::Result<()> {
        let (layout, written) = (self.layout.clone(), record.clone());
        blocking(move || layout.write(&written)).await?;
        self.publish(&record.name, |entry| entry.put(record.clone()));
        Ok(())
    }

    async fn put_facts(&self, facts: &ImageFacts) -> io::Result<()> {
        let (layout, written) = (self.layout.clone(), facts.clone());
        blocking(move || layout.write_image(&written)).await?;
        self.publish(&facts.name, |entry| entry.image.facts = facts.clone());
        Ok(())
    }
}
