//! What the person who asked for a build reads when it fails.
//!
//! Owns: the codes of aws-behaviour §5.1 and which cause gets which. Never a log line: causes that concern the operator
//! are logged where they happen.

use std::{error::Error, fmt::Write as _};

use crate::{BuildFailure, archive::ArchiveError, base::BaseError, dockerfile::DockerfileError, sandbox::SandboxError};

const ARCHIVE_INVALID: &str = "ARCHIVE_INVALID";
const ARCHIVE_DOCKERFILE_NOT_FOUND: &str = "ARCHIVE_DOCKERFILE_NOT_FOUND";
const CONTAINER_BUILD_FAILED: &str = "CONTAINER_BUILD_FAILED";
const DISK_STORAGE_FULL: &str = "DISK_STORAGE_FULL";
const INTERNAL_PLATFORM_ERROR: &str = "INTERNAL_PLATFORM_ERROR";

/// Why a build stopped before its end.
#[derive(Debug)]
pub(crate) enum Stop {
    Failed(BuildFailure),
    /// The node is closing.
    Cancelled,
}

fn failed(code: &str, message: impl Into<String>) -> Stop {
    Stop::Failed(BuildFailure { code: code.to_owned(), message: message.into() })
}

/// The user's code, Dockerfile or app is at fault.
pub(crate) fn container_build(message: impl Into<String>) -> Stop {
    failed(CONTAINER_BUILD_FAILED, message)
}

/// There is no room, on the host or on the image's disk.
pub(crate) fn disk_full(message: impl Into<String>) -> Stop {
    failed(DISK_STORAGE_FULL, message)
}

/// We are at fault.
pub(crate) fn internal(message: impl Into<String>) -> Stop {
    failed(INTERNAL_PLATFORM_ERROR, message)
}

/// Something of ours, with its causes.
pub(crate) fn internal_error(error: &dyn Error) -> Stop {
    internal(chain(error))
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their cause in their own sentence.
        if !text.contains(&cause_text) {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl From<ArchiveError> for Stop {
    fn from(error: ArchiveError) -> Self {
        let message = error.to_string();
        match error {
            ArchiveError::Cancelled => Self::Cancelled,
            ArchiveError::NoDockerfile { .. } | ArchiveError::DockerfileKind => failed(ARCHIVE_DOCKERFILE_NOT_FOUND, message),
            ArchiveError::Object { code, .. } => failed(code, message),
            ArchiveError::Write { ref source, .. } if source.kind() == std::io::ErrorKind::StorageFull => disk_full(message),
            ArchiveError::Write { .. } => internal(message),
            _ => failed(ARCHIVE_INVALID, message),
        }
    }
}

impl From<DockerfileError> for Stop {
    fn from(error: DockerfileError) -> Self {
        let code = match error {
            DockerfileError::TooLarge | DockerfileError::NotText => ARCHIVE_INVALID,
            DockerfileError::Line { .. } | DockerfileError::Syntax { .. } => CONTAINER_BUILD_FAILED,
        };
        failed(code, error.to_string())
    }
}

impl From<BaseError> for Stop {
    fn from(error: BaseError) -> Self {
        match error {
            BaseError::Cancelled { .. } => Self::Cancelled,
            BaseError::DiskFull { .. } => disk_full(chain(&error)),
            _ => internal_error(&error),
        }
    }
}

impl From<SandboxError> for Stop {
    fn from(error: SandboxError) -> Self {
        internal_error(&error)
    }
}
