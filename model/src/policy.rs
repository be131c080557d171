//! When a microVM sleeps and ends, as its owner asked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Running and suspended time together never pass this (aws-behaviour §3.3): 8 hours.
pub const MAX_DURATION: Duration = Duration::from_secs(28_800);

/// What becomes of a microVM whose `/suspend` hook does not answer 200. AWS's guide says that it is not suspended; measured, it
/// is terminated (aws-behaviour §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SuspendHookFailure {
    /// It runs on, and the next idle period tries again.
    #[default]
    Keep,
    /// It ends.
    Terminate,
}

/// The three fields of an idle policy; all or none are given (aws-behaviour §3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdlePolicy {
    /// No traffic for this long: suspend. AWS's least is 60 s.
    pub max_idle: Duration,
    /// Suspended for this long: terminate. Zero means terminate instead of staying suspended.
    pub suspended: Duration,
    /// Whether a request wakes it; without, a request to a sleeping microVM is refused.
    pub auto_resume: bool,
}
