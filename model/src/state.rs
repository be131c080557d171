//! What the API shows of a microVM.

use serde::{Deserialize, Serialize};

/// The six public states, in AWS's spelling (aws-behaviour §3.1). There is no RESUMING and no FAILED.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MicrovmState {
    /// Being cloned from its image, or being resumed.
    Pending,
    /// Answers requests.
    Running,
    /// Its memory is being written.
    Suspending,
    /// Asleep: memory, devices and disk are on stable storage.
    Suspended,
    /// Being ended.
    Terminating,
    /// Ended; stays readable for a while.
    Terminated,
}

impl MicrovmState {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::Suspending, Self::Suspended, Self::Terminating, Self::Terminated];

    /// The API's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Running => "RUNNING",
            Self::Suspending => "SUSPENDING",
            Self::Suspended => "SUSPENDED",
            Self::Terminating => "TERMINATING",
            Self::Terminated => "TERMINATED",
        }
    }
}

impl std::fmt::Display for MicrovmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
