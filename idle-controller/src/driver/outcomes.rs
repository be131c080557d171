//! What the outcome of an operation means: the event it becomes, and what is counted and noted on the way.

use std::time::{Duration, Instant};

use model::chain;
use vmm_runtime::engine::{EngineError, Exit, Started, SuspendOutcome};

use super::{Driver, Wake};
use crate::{
    machine::{Event, Inspection, Phase},
    metrics::{StartOutcome, SuspendEnd},
    operations::{Kind, Operation, OperationError, Outcome},
};

impl Driver {
    /// The operation in flight has ended.
    pub(super) async fn ended(&mut self, operation: Operation, outcome: Outcome) {
        match outcome {
            Outcome::Start { queued, result: Ok(started) } => self.started(started, queued).await,
            Outcome::Start { queued, result: Err(error) } => self.start_failed(operation.kind, queued, error).await,
            Outcome::Suspend(result) => self.suspend_ended(operation.began, result).await,
            Outcome::Inspect(result) => {
                let now = self.node.clock.now();
                let found = match result {
                    Ok(Some(snapshot)) => {
                        self.seat.meter.sleeps(snapshot.memory_bytes.saturating_add(snapshot.disk_bytes), 0, now);
                        Inspection::Snapshot
                    }
                    Ok(None) => {
                        self.seat.meter.ended(now);
                        Inspection::Nothing
                    }
                    Err(error) => {
                        tracing::warn!(microvm.id = %self.seat.id, error = chain(&error), "whether a dead microVM has a snapshot could not be read; it is kept");
                        self.seat.meter.sleeps(0, 0, now);
                        Inspection::Snapshot
                    }
                };
                self.vm = None;
                self.feed(Event::Inspected { found }).await;
            }
            Outcome::Destroy => {
                self.feed(Event::Destroyed).await;
                if let Phase::Terminated { reason, .. } = self.machine.phase() {
                    self.node.metrics.terminated(reason);
                }
            }
        }
    }

    async fn start_failed(&mut self, kind: Kind, queued: Duration, error: OperationError) {
        let launch = kind == Kind::Launch;
        let own = self.node.microvm_dir(self.seat.id);
        tracing::warn!(microvm.id = %self.seat.id, launch, error = chain(&error), "a start failed");
        let (outcome, event) = match error {
            OperationError::Hook(failed) => (StartOutcome::Failed, Event::HookFailed { reason: failed.to_string() }),
            OperationError::Engine(EngineError::Ended { exit: exit @ Exit::App { .. }, .. }) if launch => {
                (StartOutcome::Failed, Event::Exited { exit })
            }
            // Only what belongs to this microVM alone is its end. An image that cannot be used now may be put back.
            OperationError::Engine(EngineError::BadSnapshot { dir, why }) if !launch && dir.starts_with(&own) => {
                (StartOutcome::Damaged, Event::SnapshotDamaged { why })
            }
            OperationError::Engine(error) => (StartOutcome::Failed, Event::StartFailed { reason: chain(&error) }),
        };
        if let Some(wake) = self.wake.take() {
            self.failed = wake.failed(queued, self.node.clock.now());
        }
        self.start_ended(launch, outcome);
        self.feed(event).await;
        self.failed.clear();
    }

    fn start_ended(&self, launch: bool, outcome: StartOutcome) {
        if launch {
            self.node.metrics.launch_ended(outcome);
        } else {
            self.node.metrics.wake_ended(outcome);
        }
    }

    async fn suspend_ended(&mut self, began: Instant, result: Result<SuspendOutcome, OperationError>) {
        let now = self.node.clock.now();
        let took = now.saturating_duration_since(began);
        let (end, event) = match result {
            Ok(SuspendOutcome::Suspended(snapshot)) => {
                self.node.metrics.suspended(&snapshot, took);
                // What was written is what is kept: the memory that differs from the image, and the disk's own layers.
                let bytes = snapshot.memory_bytes.saturating_add(snapshot.disk_bytes);
                self.seat.meter.sleeps(bytes, bytes, now);
                tracing::info!(
                    microvm.id = %self.seat.id, generation = %snapshot.generation, memory_bytes = snapshot.memory_bytes,
                    disk_bytes = snapshot.disk_bytes, took = ?took, phases = ?snapshot.phases, "a snapshot is on stable storage"
                );
                self.predecessor = self.vm.take();
                self.exit = None;
                self.node.warm(self.record.image_dir.clone());
                (SuspendEnd::Suspended, Event::Suspended)
            }
            Ok(SuspendOutcome::TakenBack) => (SuspendEnd::TakenBack, Event::TakenBack),
            Err(OperationError::Engine(EngineError::Ended { exit, .. })) => (SuspendEnd::Ended, Event::Exited { exit }),
            Err(OperationError::Hook(failed)) => (SuspendEnd::Failed, Event::HookFailed { reason: failed.to_string() }),
            Err(OperationError::Engine(error)) => {
                tracing::warn!(microvm.id = %self.seat.id, error = chain(&error), "a suspend failed; the microVM runs on");
                (SuspendEnd::Failed, Event::SuspendFailed { reason: chain(&error) })
            }
        };
        self.node.metrics.suspend_ended(end);
        if let Some(wake) = &mut self.wake {
            wake.phases.push(("take-back", now.saturating_duration_since(wake.asked_at)));
            if end == SuspendEnd::TakenBack || end == SuspendEnd::Failed {
                self.node.metrics.wake_ended(StartOutcome::TakenBack);
            }
        }
        self.feed(event).await;
    }

    /// A start has succeeded: nobody learns of it before it is durable. If it cannot be made durable it is undone, since
    /// a crash would throw away what happened in the microVM from now on.
    async fn started(&mut self, started: Started, queued: Duration) {
        let mut machine = self.machine.clone();
        let recording = self.node.clock.now();
        let stepped = machine.step(recording, Event::Started);
        let Ok(effects) = stepped else {
            // Nothing was waiting for it.
            started.vm.kill().await;
            return;
        };
        self.seat.meter.started(machine.generation(), started.read_bytes, recording);
        if let Err(error) = self.save(&machine).await {
            self.note_save_failure(&error);
            started.vm.kill().await;
            // Asleep as before, or, if this was its launch, about to be ended.
            self.seat.meter.sleeps_again(self.node.clock.now());
            let launch = self.wake.take().is_some_and(|mut wake| {
                let launch = wake.launch;
                wake.phases.extend(started.phases);
                self.failed = wake.failed(queued, self.node.clock.now());
                launch
            });
            self.start_ended(launch, StartOutcome::Failed);
            let reason = format!("it could not be recorded that it runs: {}", chain(&error));
            return self.feed(Event::StartFailed { reason }).await;
        }
        let now = self.node.clock.now();
        let mut wake = self.wake.take().unwrap_or(Wake { asked_at: recording, launch: false, phases: Vec::new() });
        wake.phases.push(("queue", queued));
        wake.phases.extend(started.phases);
        wake.phases.push(("record", now.saturating_duration_since(recording)));
        let total = now.saturating_duration_since(wake.asked_at);
        if wake.launch {
            self.node.metrics.launched(&wake.phases, total);
            self.node.warm(self.record.image_dir.clone());
        } else {
            self.node.metrics.woken(&wake.phases, total);
        }
        let phases = wake.phases.clone();
        self.start_ended(wake.launch, StartOutcome::Started);
        self.wake = Some(wake);
        self.predecessor = None;
        self.now_runs(started.vm);
        self.enter(machine, "started", &phases, effects).await;
    }
}
