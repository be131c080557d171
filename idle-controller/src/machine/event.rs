//! What can happen to a microVM, what the machine wants done about it, and how it says no.

use std::time::Instant;

use vmm_runtime::engine::Exit;

use crate::Refused;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// Time has passed. Carries what the idle clock shows.
    Tick {
        /// Since when nothing has happened on the endpoint; `None` while an answer is being computed.
        quiet_since: Option<Instant>,
    },
    /// A request wants it awake and waits for an answer.
    Request,
    /// A client wrote to a parked stream; nobody waits.
    ParkedWrite,
    /// The API wants it awake.
    ResumeAsked,
    /// The API wants it asleep.
    SuspendAsked,
    /// The API wants it ended.
    TerminateAsked,
    /// The launch or the restore is done, and recorded.
    Started,
    /// The launch or the restore failed; what was on disk is as it was.
    StartFailed {
        /// For people.
        reason: String,
    },
    /// The app's hook did not agree to the launch, the restore or the suspend, which is undone.
    HookFailed {
        /// In AWS's words.
        reason: String,
    },
    /// The restore found the microVM's own snapshot unusable, and always will.
    SnapshotDamaged {
        /// What is wrong with it.
        why: String,
    },
    /// The suspend is done: everything is on stable storage and the process is gone.
    Suspended,
    /// The suspend has undone itself; the microVM runs on.
    TakenBack,
    /// The suspend could not be done; the microVM runs on.
    SuspendFailed {
        /// For people.
        reason: String,
    },
    /// The app or the VMM has ended unasked (while running, or as the outcome of a suspend).
    Exited {
        /// How.
        exit: Exit,
    },
    /// The fallen microVM's directory has been looked at.
    Inspected {
        /// What is there.
        found: Inspection,
    },
    /// Nothing is left but logs.
    Destroyed,
}

impl Event {
    /// For logs, as the cause of a transition.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Tick { .. } => "tick",
            Self::Request => "request",
            Self::ParkedWrite => "parked_write",
            Self::ResumeAsked => "resume_asked",
            Self::SuspendAsked => "suspend_asked",
            Self::TerminateAsked => "terminate_asked",
            Self::Started => "started",
            Self::StartFailed { .. } => "start_failed",
            Self::HookFailed { .. } => "hook_failed",
            Self::SnapshotDamaged { .. } => "snapshot_damaged",
            Self::Suspended => "suspended",
            Self::TakenBack => "taken_back",
            Self::SuspendFailed { .. } => "suspend_failed",
            Self::Exited { .. } => "exited",
            Self::Inspected { .. } => "inspected",
            Self::Destroyed => "destroyed",
        }
    }
}

/// What a fallen microVM left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inspection {
    /// A committed snapshot (or something that could not be read now and may be one: nothing is thrown away on a guess).
    Snapshot,
    /// None.
    Nothing,
}

/// What to do. Each effect that starts an operation is answered by one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Clone it from its image, and tell the app → `Started`, `StartFailed`, `HookFailed`.
    Launch,
    /// Tell the app, and suspend it → `Suspended`, `TakenBack`, `SuspendFailed`, `HookFailed`, `Exited`.
    Suspend,
    /// Tell the suspend in flight to undo itself if it still can. Its outcome says whether it did.
    TakeBack,
    /// Tell the app of one that was adopted that it does not sleep after all → `TakenBack`, `HookFailed`, `Exited`.
    TellAwake,
    /// Restore it from its snapshot, and tell the app → `Started`, `StartFailed`, `HookFailed`, `SnapshotDamaged`.
    Restore,
    /// Look for a committed snapshot → `Inspected`.
    Inspect,
    /// End whatever runs or is in flight, remove what is on disk → `Destroyed`. Overtakes every other operation.
    Destroy,
    /// Let everyone through who waits.
    Release,
    /// Answer everyone who waits.
    Fail(Refused),
    /// Drop the record and its directory; the end of the driver.
    Forget,
}

/// Why an event changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Traffic may not wake it.
    #[error("asleep")]
    Asleep,
    /// It is ending or has ended.
    #[error("terminated")]
    Terminated,
    /// The event cannot happen in this phase: an outcome that nobody waits for.
    #[error("not now")]
    NotNow,
}
