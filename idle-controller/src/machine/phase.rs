//! Where one microVM is in its life. Each variant holds only what is valid in it.

use std::time::{Duration, Instant};

use model::MicrovmState;
use serde::{Deserialize, Serialize};

/// What the driver knows; the API shows [`Phase::public`] of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Being cloned from its image. An engine operation is in flight (or waits for a start slot).
    Launching {
        /// What follows.
        next: AfterStart,
    },
    /// Awake; nothing in flight.
    Running {
        /// When to look at the idle clock next; `None` without an idle policy. Activity does not move it: whoever looks
        /// finds the activity and moves it then.
        idle_at: Option<Instant>,
        /// The suspends that failed since the last one that did not.
        trouble: Option<Trouble>,
    },
    /// Its memory is being written. A suspend is in flight.
    Suspending {
        /// Who wanted it.
        cause: SuspendCause,
        /// Failed suspends before this one.
        failures: u32,
    },
    /// A suspend is in flight and has been told to undo itself, which it may have been too late for.
    TakingBack {
        /// What follows if it was too late.
        committed: AfterTakeBack,
        /// What follows once it is awake.
        next: AfterStart,
        /// As in `Suspending`.
        failures: u32,
    },
    /// The VMM died; whether there is a snapshot to fall back on is being looked up.
    Fallen {
        /// What was seen of the death.
        detail: String,
        /// Somebody wants it awake again, and what follows then.
        wake: Option<AfterStart>,
    },
    /// On stable storage; no process.
    Suspended {
        /// When it ends unless it is woken; `None`: not before its maximum duration.
        until: Option<Instant>,
        /// What went wrong on the way here, if it did not just go to sleep.
        trouble: Option<Trouble>,
    },
    /// Being restored from its snapshot. An engine operation is in flight (or waits for a start slot).
    Waking {
        /// As in `Suspended`: a wake does not stop that clock until it has succeeded.
        until: Option<Instant>,
        /// Failed wakes before this one.
        failures: u32,
        /// What follows.
        next: AfterStart,
    },
    /// Everything that is left of it is being removed.
    Terminating {
        /// Why.
        reason: EndReason,
    },
    /// Only its record is left.
    Terminated {
        /// Why.
        reason: EndReason,
        /// When the record goes too.
        forget_at: Instant,
    },
}

/// What a microVM does once it is awake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterStart {
    /// Serve.
    Serve,
    /// Go to sleep (again): that was asked for after the start had begun. Who waits is let through first.
    Suspend,
}

/// What happens if a take-back comes too late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterTakeBack {
    /// Restore at once.
    Wake,
    /// Sleep on: whoever came may not wake it (`autoResume=false`).
    Sleep,
}

/// Who wanted a suspend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SuspendCause {
    /// The idle clock.
    Idle,
    /// The API.
    Asked,
}

/// Something that went wrong and is not the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// For people; shown as the state's reason.
    pub(crate) reason: String,
    /// How often in a row.
    pub(crate) failures: u32,
    /// Before this, nothing is tried again that nobody asked for.
    pub(crate) retry_at: Instant,
}

/// Why a microVM ended. `Display` is the API's `stateReason`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EndReason {
    /// TerminateMicrovm (aws-behaviour §3.5).
    #[error("Success.")]
    Asked,
    /// Running and suspended time together are used up.
    #[error("The maximum duration of {} seconds is over.", .0.as_secs_f64())]
    MaxDuration(Duration),
    /// It slept for as long as its policy lets it.
    #[error("The suspended duration of {} seconds is over.", .0.as_secs_f64())]
    SuspendedDuration(Duration),
    /// The app's own end (aws-behaviour §3.5).
    #[error("Container Stopped with Exit Code: {0}")]
    AppExited(i32),
    /// It never ran.
    #[error("The MicroVM could not be launched: {0}")]
    LaunchFailed(String),
    /// Its app did not agree to run (or, if that is so configured, to be suspended): AWS's words (aws-behaviour §3.5).
    #[error("{0}")]
    HookFailed(String),
    /// Its VMM died and there was no snapshot.
    #[error("The MicroVM was lost and has no snapshot: {0}")]
    Lost(String),
    /// Its snapshot can never be used; the files are kept for the operator under names that begin with `damaged-`.
    #[error("The MicroVM's snapshot is damaged: {0}")]
    Damaged(String),
}

impl EndReason {
    /// A label for metrics and logs.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::MaxDuration(_) => "max_duration",
            Self::SuspendedDuration(_) => "suspended_duration",
            Self::AppExited(_) => "app_exited",
            Self::LaunchFailed(_) => "launch_failed",
            Self::HookFailed(_) => "hook_failed",
            Self::Lost(_) => "lost",
            Self::Damaged(_) => "damaged",
        }
    }

    /// All labels, so that a metric can show zeros.
    pub(crate) const LABELS: [&'static str; 8] =
        ["asked", "max_duration", "suspended_duration", "app_exited", "launch_failed", "hook_failed", "lost", "damaged"];
}

impl Phase {
    /// The state that the API shows. The one place that decides it.
    pub(crate) fn public(&self) -> MicrovmState {
        match self {
            // Not answering yet.
            Self::Launching { .. } => MicrovmState::Pending,
            Self::Running { .. } => MicrovmState::Running,
            Self::Suspending { .. } => MicrovmState::Suspending,
            // Whichever way it goes, the suspend is what is under way.
            Self::TakingBack { .. } => MicrovmState::Suspending,
            // It no longer answers, and what it falls back to is a snapshot; `Terminating` may follow `Suspending` too.
            Self::Fallen { .. } => MicrovmState::Suspending,
            Self::Suspended { .. } => MicrovmState::Suspended,
            // There is no RESUMING (aws-behaviour §3.1).
            Self::Waking { .. } => MicrovmState::Pending,
            Self::Terminating { .. } => MicrovmState::Terminating,
            Self::Terminated { .. } => MicrovmState::Terminated,
        }
    }

    /// The state's reason, `None` while healthy.
    pub(crate) fn reason(&self) -> Option<String> {
        match self {
            Self::Launching { .. } | Self::Suspending { .. } | Self::TakingBack { .. } | Self::Waking { .. } => None,
            Self::Running { trouble, .. } | Self::Suspended { trouble, .. } => trouble.as_ref().map(|trouble| trouble.reason.clone()),
            Self::Fallen { detail, .. } => Some(detail.clone()),
            Self::Terminating { reason } | Self::Terminated { reason, .. } => Some(reason.to_string()),
        }
    }

    /// For logs and the golden table.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Launching { .. } => "Launching",
            Self::Running { .. } => "Running",
            Self::Suspending { .. } => "Suspending",
            Self::TakingBack { .. } => "TakingBack",
            Self::Fallen { .. } => "Fallen",
            Self::Suspended { .. } => "Suspended",
            Self::Waking { .. } => "Waking",
            Self::Terminating { .. } => "Terminating",
            Self::Terminated { .. } => "Terminated",
        }
    }

    /// Whether an engine operation is in flight whose outcome the machine waits for.
    pub(crate) fn is_settled(&self) -> bool {
        match self {
            Self::Running { .. } | Self::Suspended { .. } | Self::Terminated { .. } => true,
            Self::Launching { .. }
            | Self::Suspending { .. }
            | Self::TakingBack { .. }
            | Self::Fallen { .. }
            | Self::Waking { .. }
            | Self::Terminating { .. } => false,
        }
    }
}
