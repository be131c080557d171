//! What is known of an image, of its versions and of their builds.
//!
//! Owns: the records as they are kept, and the states that follow from them (aws-behaviour §5.1). Never decides what may be
//! done, and never reads or writes a file.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use model::{Hooks, ImageName, ImageVersion, MemorySize, Port, Shape};
use serde::{Deserialize, Serialize};

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum BuildState {
    /// Waits for a place.
    Pending,
    /// Is being built.
    InProgress,
    /// microVMs can be run from it.
    Successful,
    /// `failure` says why.
    Failed,
}

impl BuildState {
    /// Whether the build has ended.
    pub fn is_finished(self) -> bool {
        matches!(self, Self::Successful | Self::Failed)
    }
}

/// How far the deletion of an image or of a version is. Once it has been written down it is done, by the next process if
/// need be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Deletion {
    /// Its files are being removed.
    UnderWay,
    /// They could not be removed; nothing is run from it, and it can be deleted again.
    Failed,
}

/// Whether RunMicrovm takes a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum VersionStatus {
    /// It does.
    #[default]
    Active,
    /// It does not; what runs goes on.
    Inactive,
}

/// What a version is to the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum VersionState {
    /// See [`BuildState`].
    Pending,
    /// See [`BuildState`].
    InProgress,
    /// See [`BuildState`].
    Successful,
    /// See [`BuildState`].
    Failed,
    /// See [`Deletion`].
    Deleting,
    /// It was there and is not any more.
    Deleted,
    /// See [`Deletion`].
    DeleteFailed,
}

/// What an image is to the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ImageState {
    /// Its first version is being built.
    Creating,
    /// Its first version was built, and there was no other.
    Created,
    /// Its first version could not be built.
    CreateFailed,
    /// Another version is being built, or one is being deleted.
    Updating,
    /// Its newest version was built.
    Updated,
    /// Its newest version could not be built.
    UpdateFailed,
    /// See [`Deletion`].
    Deleting,
    /// See [`Deletion`].
    DeleteFailed,
    /// It was there and is not any more.
    Deleted,
}

impl fmt::Display for ImageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "CREATING",
            Self::Created => "CREATED",
            Self::CreateFailed => "CREATE_FAILED",
            Self::Updating => "UPDATING",
            Self::Updated => "UPDATED",
            Self::UpdateFailed => "UPDATE_FAILED",
            Self::Deleting => "DELETING",
            Self::DeleteFailed => "DELETE_FAILED",
            Self::Deleted => "DELETED",
        })
    }
}

/// Why a build failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildFailure {
    /// `ARCHIVE_DOCKERFILE_NOT_FOUND`, `ARCHIVE_INVALID`, `CONTAINER_BUILD_FAILED`, `DISK_STORAGE_FULL`, `INTERNAL_PLATFORM_ERROR` …
    pub code: String,
    /// A sentence for the person who asked: which line failed, and the last lines of its output.
    pub message: String,
}

/// The build of a version. There is one: a node builds for its own kind of processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BuildFacts {
    /// `build-<uuid>`; empty in records of old nodes.
    pub id: String,
    /// Bytes of the root disk that held data before the first boot; there once the container build has succeeded.
    pub code_bytes: Option<u64>,
    /// Bytes of the memory snapshot that hold data; there once the snapshot was taken.
    pub memory_bytes: Option<u64>,
    /// Bytes of the disk snapshot that hold data; there once the snapshot was taken.
    pub disk_bytes: Option<u64>,
}

impl BuildFacts {
    /// Of a build that was just asked for.
    pub(crate) fn fresh() -> Self {
        Self { id: format!("build-{}", uuid::Uuid::new_v4()), ..Self::default() }
    }
}

/// One version of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Name of the image.
    pub name: ImageName,
    /// Version.
    pub version: ImageVersion,
    /// How far its build is.
    pub state: BuildState,
    /// Whether RunMicrovm takes it, once it is built.
    #[serde(default)]
    pub status: VersionStatus,
    /// Whether it is being deleted.
    #[serde(default)]
    pub deletion: Option<Deletion>,
    /// For a failure: the code of aws-behaviour §5.1 (`CONTAINER_BUILD_FAILED` …) and a sentence.
    pub failure: Option<BuildFailure>,
    /// Its build.
    #[serde(default)]
    pub build: BuildFacts,
    /// Size of a guest of it.
    pub shape: Shape,
    /// Baseline size asked for.
    pub memory: MemorySize,
    /// When the build was asked for.
    pub created_at: SystemTime,
    /// When the record last changed.
    pub updated_at: SystemTime,
    /// As in [`crate::BuildRequest::hooks`].
    #[serde(default)]
    pub hooks: Option<Hooks>,
    /// As in [`crate::BuildRequest::request`].
    pub request: serde_json::Value,
    /// The first exposed port that listened when the snapshot was taken; the hook port if it was `/ready` that said so.
    pub ready_port: Option<Port>,
    /// The record on disk cannot be read: this one stands in for it, so that the version can be seen and deleted. Until it is
    /// deleted nothing of what lies there is touched.
    #[serde(skip)]
    pub damaged: bool,
}

impl ImageRecord {
    /// Stands in for a record that cannot be read.
    pub(crate) fn damaged(name: ImageName, version: ImageVersion, changed_at: SystemTime, why: String) -> Self {
        let memory = MemorySize::DEFAULT;
        Self {
            name,
            version,
            state: BuildState::Failed,
            status: VersionStatus::Inactive,
            deletion: None,
            failure: Some(BuildFailure { code: "INTERNAL_PLATFORM_ERROR".to_owned(), message: why }),
            build: BuildFacts::default(),
            shape: Shape { memory_mib: memory.mib(), vcpus: 1, disk_gib: memory.disk_gib() },
            memory,
            created_at: changed_at,
            updated_at: changed_at,
            hooks: None,
            request: serde_json::Value::Null,
            ready_port: None,
            damaged: true,
        }
    }

    /// What the outside is told.
    pub fn shown_state(&self) -> VersionState {
        match (self.deletion, self.state) {
            (Some(Deletion::UnderWay), _) => VersionState::Deleting,
            (Some(Deletion::Failed), _) => VersionState::DeleteFailed,
            (None, BuildState::Pending) => VersionState::Pending,
            (None, BuildState::InProgress) => VersionState::InProgress,
            (None, BuildState::Successful) => VersionState::Successful,
            (None, BuildState::Failed) => VersionState::Failed,
        }
    }

    /// What the outside is told: a version that cannot be run is not ACTIVE.
    pub fn shown_status(&self) -> VersionStatus {
        if self.state == BuildState::Failed || self.deletion.is_some() { VersionStatus::Inactive } else { self.status }
    }

    /// Whether RunMicrovm takes it.
    pub fn is_runnable(&self) -> bool {
        self.state == BuildState::Successful && self.shown_status() == VersionStatus::Active
    }

    /// Whether something is under way with it.
    fn is_busy(&self) -> bool {
        !self.state.is_finished() || self.deletion == Some(Deletion::UnderWay)
    }
}

/// What an image is beside its versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// Its name.
    pub name: ImageName,
    /// Differs from that of another image that had or will have the same name.
    pub id: String,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// When it last changed beside its versions.
    pub updated_at: SystemTime,
    /// The newest version that it ever had: no number is given twice, so that a version that was deleted never comes back as
    /// something else.
    pub last_version: ImageVersion,
    /// Whether it is being deleted.
    pub deletion: Option<Deletion>,
    /// Its tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// An image with all its versions.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it is beside them.
    pub facts: ImageFacts,
    /// Oldest first. Never empty.
    pub versions: Vec<ImageRecord>,
}

impl Image {
    /// What the outside is told: it follows the newest version, and whatever is under way.
    pub fn state(&self) -> ImageState {
        let first = self.facts.last_version == ImageVersion::FIRST;
        match self.facts.deletion {
            Some(Deletion::UnderWay) => return ImageState::Deleting,
            Some(Deletion::Failed) => return ImageState::DeleteFailed,
            None => {}
        }
        if self.versions.iter().any(ImageRecord::is_busy) {
            return if first { ImageState::Creating } else { ImageState::Updating };
        }
        match (first, self.versions.last().map(|record| record.state)) {
            (true, Some(BuildState::Failed)) => ImageState::CreateFailed,
            (true, _) => ImageState::Created,
            (false, Some(BuildState::Failed)) => ImageState::UpdateFailed,
            (false, _) => ImageState::Updated,
        }
    }

    /// Whether something is under way with it or with one of its versions.
    pub(crate) fn is_busy(&self) -> bool {
        self.facts.deletion.is_some() || self.versions.iter().any(ImageRecord::is_busy)
    }

    /// One version.
    pub fn version(&self, version: ImageVersion) -> Option<&ImageRecord> {
        self.versions.iter().find(|record| record.version == version)
    }

    /// The newest that RunMicrovm takes (aws-behaviour §5.1).
    pub fn latest_active(&self) -> Option<&ImageRecord> {
        self.versions.iter().rev().find(|record| record.is_runnable() && self.facts.deletion.is_none())
    }

    /// The newest that could not be built.
    pub fn latest_failed(&self) -> Option<&ImageRecord> {
        self.versions.iter().rev().find(|record| record.state == BuildState::Failed)
    }

    /// When it, or one of its versions, last changed.
    pub fn updated_at(&self) -> SystemTime {
        self.versions.iter().map(|record| record.updated_at).max().map_or(self.facts.updated_at, |versions| versions.max(self.facts.updated_at))
    }
}
