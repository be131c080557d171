//! From a zip (or directory) with a Dockerfile at its root to an image snapshot that microVMs are cloned from.
//!
//! Owns: the catalog of images and their versions, the builds, the base images the node holds. Never decides who may
//! build, and never runs a microVM for a user.

#![forbid(unsafe_code)]

mod archive;
mod base;
mod build_log;
mod catalog;
mod container;
mod dockerfile;
mod failure;
mod image_config;
mod pipeline;
mod records;
mod reference;
mod rootfs;
mod sandbox;

use std::{collections::BTreeMap, path::PathBuf, time::SystemTime};

use model::{Hooks, ImageName, ImageVersion, MemorySize, Rights, Shape};

pub use base::{BaseError, ensure_base};
pub use catalog::Catalog;

/// Where the catalog keeps what.
#[derive(Debug, Clone)]
pub struct BuilderConfig {
    /// Images live in `<dir>/<name>/<version>/`, work in progress in `<dir>/.work/`.
    pub dir: PathBuf,
    /// Base images and their caches, shared by every node on the host (made once by mmdebstrap).
    pub base_dir: PathBuf,
    /// Builds at a time; more wait.
    pub max_concurrent_builds: usize,
    /// How long the app has to listen.
    pub ready_timeout: std::time::Duration,
    /// How long the container build has.
    pub build_timeout: std::time::Duration,
}

/// Where the code of an image comes from.
#[derive(Debug, Clone)]
pub enum Artifact {
    /// A zip file on this host (an S3 object is resolved to its file by the caller).
    Zip(PathBuf),
    /// A directory on this host.
    Directory(PathBuf),
}

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Name of the image.
    pub name: ImageName,
    /// The code.
    pub artifact: Artifact,
    /// Baseline size.
    pub memory: MemorySize,
    /// Variables added to the image's ENV.
    pub environment: BTreeMap<String, String>,
    /// What the app may do.
    pub rights: Rights,
    /// Which hooks of the app are called, by the build and by the microVMs of the image.
    pub hooks: Option<Hooks>,
    /// The image's tags, if the image is new.
    pub tags: BTreeMap<String, String>,
    /// Opaque to the builder: what the API wants to remember of the request (roles, description …), as JSON.
    pub request: serde_json::Value,
}

/// How far a version is (aws-behaviour §5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum BuildState {
    /// Waits for a place.
    Pending,
    /// Is being built.
    InProgress,
    /// microVMs can be run from it.
    Successful,
    /// `state_reason` says why.
    Failed,
}

/// One version of an image.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ImageRecord {
    /// Name of the image.
    pub name: ImageName,
    /// Version.
    pub version: ImageVersion,
    /// How far it is.
    pub state: BuildState,
    /// For a failure: the code of aws-behaviour §5.1 (`CONTAINER_BUILD_FAILED` …) and a sentence.
    pub failure: Option<BuildFailure>,
    /// Size of a guest of it.
    pub shape: Shape,
    /// Baseline size asked for.
    pub memory: MemorySize,
    /// When the build was asked for.
    pub created_at: SystemTime,
    /// When the state last changed.
    pub updated_at: SystemTime,
    /// As in [`BuildRequest::hooks`].
    #[serde(default)]
    pub hooks: Option<Hooks>,
    /// As in [`BuildRequest::request`].
    pub request: serde_json::Value,
    /// The first exposed port that listened when the snapshot was taken; the hook port if it was `/ready` that said so.
    pub ready_port: Option<model::Port>,
}

/// Why a build failed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BuildFailure {
    /// `ARCHIVE_DOCKERFILE_NOT_FOUND`, `ARCHIVE_INVALID`, `CONTAINER_BUILD_FAILED`, `DISK_STORAGE_FULL`, `INTERNAL_PLATFORM_ERROR` …
    pub code: String,
    /// A sentence for the person who asked: which line failed, and the last lines of its output.
    pub message: String,
}

/// Why a build was not even started.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// There is an image of this name.
    #[error("A MicroVM image with the name '{0}' already exists in this account")]
    NameTaken(ImageName),
    /// Too many builds wait already (AWS: ServiceQuotaExceededException, aws-behaviour §5.1).
    #[error("{limit} image builds are waiting already; try again when some of them have ended")]
    TooManyBuilds {
        /// How many may wait.
        limit: usize,
    },
    /// The catalog's own storage failed.
    #[error("{doing} failed")]
    Storage {
        /// What was tried.
        doing: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
