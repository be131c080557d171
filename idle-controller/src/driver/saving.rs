//! The driver's durable record: what it says of a machine, and when it is written.

use std::time::{Duration, SystemTime};

use model::{Hook, MicrovmState, chain};

use super::Driver;
use crate::{
    controller::Node,
    handle::MicrovmView,
    machine::{Machine, Phase},
    metering::SavedUsage,
    registry::{Record, SavedState, WriteError},
};

/// How long a record that could not be written waits for the next try.
const SAVE_RETRY: Duration = Duration::from_secs(5);

impl Driver {
    /// Writes down how much of its durations is used up, so that the next start counts from here.
    pub(super) async fn checkpoint(&mut self) {
        if self.machine.phase().public() == MicrovmState::Terminated && self.unsaved_until.is_none() {
            return;
        }
        self.record = Self::record_of(&self.node, &self.record, &self.machine);
        if let Err(error) = self.node.store.put(&self.record, &self.metered()).await {
            self.note_save_failure(&error);
        }
    }

    /// Makes durable what `machine` would say, if that differs from what is durable.
    pub(super) async fn save(&mut self, machine: &Machine) -> Result<(), WriteError> {
        let record = Self::record_of(&self.node, &self.record, machine);
        let before = &self.record;
        if record.state == before.state && record.generation == before.generation && record.resume_due == before.resume_due {
            return Ok(());
        }
        // A start that cannot be recorded is undone, so the record is taken over only then.
        let is_start = record.generation > self.record.generation || self.record.state == SavedState::Pending;
        let outcome = self.node.store.put(&record, &self.metered()).await;
        if outcome.is_ok() || !is_start || record.state != SavedState::Running {
            self.record = record;
        }
        if outcome.is_ok() {
            self.unsaved_until = None;
        }
        outcome
    }

    /// What it has used, to be written down.
    pub(super) fn metered(&self) -> SavedUsage {
        self.seat.meter.save(self.node.clock.now(), self.node.clock.wall())
    }

    pub(super) fn save_later(&mut self, error: &WriteError) {
        self.note_save_failure(error);
        self.unsaved_until = Some(self.node.clock.now() + SAVE_RETRY);
    }

    pub(super) fn note_save_failure(&self, error: &WriteError) {
        self.node.metrics.registry_failures.inc();
        tracing::error!(microvm.id = %self.seat.id, error = chain(error), "a microVM's record could not be written; check the disk of the data directory");
    }

    /// The record of `machine`, whose last one is `before`, as of now.
    pub(crate) fn record_of(node: &Node, before: &Record, machine: &Machine) -> Record {
        let (now, wall) = (node.clock.now(), node.clock.wall());
        let policy = machine.policy();
        let state = match machine.phase() {
            Phase::Launching { .. } => SavedState::Pending,
            Phase::Running { .. } | Phase::Suspending { .. } | Phase::TakingBack { .. } | Phase::Fallen { .. } => SavedState::Running,
            Phase::Suspended { trouble, .. } => SavedState::Suspended { reason: trouble.as_ref().map(|trouble| trouble.reason.clone()) },
            Phase::Waking { .. } => match &before.state {
                suspended @ SavedState::Suspended { .. } => suspended.clone(),
                _ => SavedState::Suspended { reason: None },
            },
            Phase::Terminating { reason } => SavedState::Terminating { reason: reason.clone() },
            Phase::Terminated { reason, .. } => {
                SavedState::Terminated { reason: reason.clone(), at: terminated_at(before).unwrap_or(wall) }
            }
        };
        let asleep = match (machine.phase(), policy.idle) {
            (Phase::Suspended { until: Some(until), .. } | Phase::Waking { until: Some(until), .. }, Some(idle)) => {
                idle.suspended.saturating_sub(until.saturating_duration_since(now))
            }
            _ => Duration::ZERO,
        };
        // Whatever follows PENDING, its hook has answered or is not heard any more: what it was sent is a secret to forget.
        let run_due = if state == SavedState::Pending { before.run_due.clone() } else { None };
        // Of a suspend that is under way nobody knows any more, after a crash, whether the app has been told.
        let may_be_told = matches!(machine.phase(), Phase::Suspending { .. } | Phase::TakingBack { .. });
        let resume_due = may_be_told && before.hooks.is_some_and(|hooks| hooks.timeout(Hook::Suspend).is_some() && hooks.timeout(Hook::Resume).is_some());
        Record {
            generation: machine.generation(),
            run_due,
            resume_due,
            state,
            saved_at: wall,
            lived: policy.max_duration.saturating_sub(policy.ends_at.saturating_duration_since(now)),
            asleep,
            ..before.clone()
        }
    }
}

pub(super) fn terminated_at(record: &Record) -> Option<SystemTime> {
    match record.state {
        SavedState::Terminated { at, .. } => Some(at),
        SavedState::Pending | SavedState::Running | SavedState::Suspended { .. } | SavedState::Terminating { .. } => None,
    }
}

/// What the world first sees of a recorded microVM.
pub(crate) fn first_view(record: &Record, machine: &Machine) -> MicrovmView {
    MicrovmView {
        id: record.id,
        endpoint: record.endpoint,
        state: machine.phase().public(),
        state_reason: machine.phase().reason(),
        image: record.image.clone(),
        version: record.version,
        idle: record.idle,
        max_duration: record.max_duration,
        started_at: record.started_at,
        terminated_at: terminated_at(record),
        generation: machine.generation(),
        request: record.request.clone(),
    }
}
