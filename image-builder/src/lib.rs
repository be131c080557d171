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
mod image;
mod image_config;
mod job;
mod pipeline;
mod records;
mod reference;
mod rootfs;
mod sandbox;
#[cfg(any(test, feature = "testing"))]
mod scripted;

use std::{collections::BTreeMap, path::PathBuf};

use model::{BuildNetwork, Hooks, ImageName, ImageVersion, MemorySize, Rights, SizeSeen};
use vmm_runtime::EgressPolicy;

pub use base::{BaseError, ensure_base};
pub use catalog::{Catalog, Lease, NotRunnable};
pub use image::{BuildFacts, BuildFailure, BuildState, Deletion, Image, ImageFacts, ImageRecord, ImageState, VersionState, VersionStatus};
#[cfg(feature = "testing")]
pub use scripted::ScriptedBuilds;

/// The variable of every guest that holds the version of its image (aws-behaviour §5.3). The builder sets it, because it is
/// the catalog that gives an image its version.
pub const VERSION_VARIABLE: &str = "AWS_LAMBDA_MICROVM_IMAGE_VERSION";

/// Where the catalog keeps what.
#[derive(Debug, Clone)]
pub struct BuilderConfig {
    /// Images live in `<dir>/<name>/<version>/`, work in progress in `<dir>/.work/`, what is being removed in `<dir>/.trash/`.
    pub dir: PathBuf,
    /// Base images and their caches, shared by every node on the host (made once by mmdebstrap).
    pub base_dir: PathBuf,
    /// Builds at a time; more wait.
    pub max_concurrent_builds: usize,
    /// Builds that run and wait together; one more is refused.
    pub max_unfinished_builds: usize,
    /// Images; one more is refused.
    pub max_images: usize,
    /// Versions of one image; one more is refused.
    pub max_versions: usize,
    /// How long the app has to listen.
    pub ready_timeout: std::time::Duration,
    /// How long the container build has.
    pub build_timeout: std::time::Duration,
    /// What guests see of their size.
    pub size_seen: SizeSeen,
    /// Which network RUN steps have, unless their image may have none.
    pub network: BuildNetwork,
    /// What RUN steps reach if that is the internet.
    pub egress: EgressPolicy,
}

/// Where the code of an image comes from. Paths are those that were checked, without a symbolic link in them: the build, which may begin
/// much later, follows none.
#[derive(Debug, Clone)]
pub enum Artifact {
    /// A zip file on this host.
    Zip(PathBuf),
    /// A directory on this host.
    Directory(PathBuf),
    /// A zip in the embedded S3, looked for when the build begins, as AWS does.
    Object {
        /// `s3://bucket/key`, for messages.
        uri: String,
        /// The directory of its bucket.
        bucket: PathBuf,
        /// The file that it is if it is there.
        object: PathBuf,
    },
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
    /// Variables added to the image's ENV, before [`VERSION_VARIABLE`].
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

/// Why the catalog did not do what it was asked. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// There is an image of this name (aws-behaviour §5.1).
    #[error("A MicroVM image with the name '{0}' already exists in this account")]
    NameTaken(ImageName),
    /// Too many builds run and wait already (aws-behaviour §5.1).
    #[error("The maximum number of concurrent builds has been reached: this node takes {limit}. Try again when one of them has ended")]
    TooManyBuilds {
        /// How many may run and wait.
        limit: usize,
    },
    /// aws-behaviour §7.4.
    #[error("The maximum number of MicroVM images has been reached: this node takes {limit}. Delete one that is not needed")]
    TooManyImages {
        /// How many there may be.
        limit: usize,
    },
    /// aws-behaviour §7.4.
    #[error("The maximum number of versions of a MicroVM image has been reached: this node takes {limit}. Delete one that is not needed")]
    TooManyVersions {
        /// How many there may be.
        limit: usize,
    },
    /// There is no such image.
    #[error("there is no image '{0}'")]
    UnknownImage(ImageName),
    /// The image never had such a version.
    #[error("the image '{0}' has no version {1}")]
    UnknownVersion(ImageName, ImageVersion),
    /// Something else is under way with the image (aws-behaviour §5.1).
    #[error("MicroVM Image is already in state: {0}")]
    Busy(ImageState),
    /// An image that is being built or changed is not deleted (aws-behaviour §5.1).
    #[error("Cannot delete MicroVM image in its current state: {0}")]
    NotDeletable(ImageState),
    /// microVMs of the image have not ended yet (aws-behaviour §5.1).
    #[error("Cannot delete microvm image with running microvms.")]
    InUse,
    /// microVMs of the version have not ended yet.
    #[error("Cannot delete microvm image version with running microvms.")]
    VersionInUse,
    /// An image has at least one version (aws-behaviour §5.1).
    #[error("Cannot delete version {0}, the last one of the MicroVM image. Delete the MicroVM image instead.")]
    LastVersion(ImageVersion),
    /// Only what was built can be run.
    #[error("Version {0} of the MicroVM image cannot be made ACTIVE: it was not built, or is being deleted")]
    NotActivatable(ImageVersion),
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
