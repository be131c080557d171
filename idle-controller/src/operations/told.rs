//! What the app is told by its hooks around a start and a suspend, and what its word means for them.
//!
//! Owns: the order. After a start nothing reaches the app before its hook has answered 200 (design §4 rule 4): the gate is shut,
//! and streams of an earlier time are held by the engine until the driver releases them. A start whose app does not agree is
//! undone: its process is killed, and the snapshot it came from is as it was.

use bytes::Bytes;
use hooks::{HookFailed, Outcome};
use model::Hook;
use tokio_util::sync::CancellationToken;
use vmm_runtime::engine::{EngineError, Started, SuspendOutcome, Usage, Vm};

use super::{OperationError, kill};
use crate::{controller::Node, registry::Record};

/// The step of a start or suspend that is the app's answer.
const PHASE: &str = "hook";

/// Tells the app of its start, if it wants to know.
pub(super) async fn started(
    node: &Node,
    record: &Record,
    mut started: Started,
    hook: Hook,
    body: Option<Bytes>,
    cancel: &CancellationToken,
) -> Result<Started, OperationError> {
    let Some(hooks) = record.hooks.filter(|hooks| hooks.timeout(hook).is_some()) else { return Ok(started) };
    let began = node.clock.now();
    let called = tokio::select! {
        biased;
        () = cancel.cancelled() => Err(EngineError::Host { what: format!("the microVM was ended during its {} hook", hook.name()) }.into()),
        called = hooks::call(started.vm.as_ref(), &hooks, hook, body) => called.map_err(disagreed),
    };
    if let Err(error) = called {
        // Its streams, if it has any of an earlier time, are parked where they were.
        kill(record, started.vm.as_ref()).await;
        return Err(error);
    }
    started.phases.push((PHASE, node.clock.now().saturating_duration_since(began)));
    Ok(started)
}

/// Tells the app that it will sleep, if it wants to know, and puts it to sleep. An app that was told so and is awake after all
/// is told that, too, before anything else reaches it.
pub(super) async fn suspended(
    node: &Node,
    record: &Record,
    vm: &dyn Vm,
    sample: impl FnOnce(Usage) + Send,
    cancel: CancellationToken,
) -> Result<SuspendOutcome, OperationError> {
    let Some(hooks) = record.hooks.filter(|hooks| hooks.timeout(Hook::Suspend).is_some()) else {
        sample(vm.usage().await);
        return Ok(vm.suspend(cancel).await?);
    };
    let began = node.clock.now();
    // Not cut off by a take-back: an app that is told twice at once would not know which is last.
    let called = hooks::call(vm, &hooks, Hook::Suspend, None).await;
    let took = node.clock.now().saturating_duration_since(began);
    if let Err(failed) = called {
        // It may have begun to get ready for a sleep that does not come.
        if matches!(failed.outcome, Outcome::TimedOut | Outcome::Transport(_)) {
            let _ = hooks::call(vm, &hooks, Hook::Resume, None).await;
        }
        return Err(disagreed(failed));
    }
    sample(vm.usage().await);
    match vm.suspend(cancel).await {
        Ok(SuspendOutcome::Suspended(mut snapshot)) => {
            snapshot.phases.insert(0, (PHASE, took));
            Ok(SuspendOutcome::Suspended(snapshot))
        }
        Err(error @ EngineError::Ended { .. }) => Err(error.into()),
        awake => {
            hooks::call(vm, &hooks, Hook::Resume, None).await.map_err(disagreed)?;
            Ok(awake?)
        }
    }
}

/// Tells the app of a microVM that was adopted in the middle of a suspend that it is awake.
pub(super) async fn awake_after_all(record: &Record, vm: &dyn Vm) -> Result<SuspendOutcome, OperationError> {
    if let Some(hooks) = record.hooks.filter(|hooks| hooks.timeout(Hook::Resume).is_some()) {
        hooks::call(vm, &hooks, Hook::Resume, None).await.map_err(disagreed)?;
    }
    Ok(SuspendOutcome::TakenBack)
}

fn disagreed(failed: HookFailed) -> OperationError {
    match failed.outcome {
        Outcome::Ended(exit) => EngineError::Ended { step: "a lifecycle hook", exit }.into(),
        _ => {
            tracing::warn!(hook = failed.hook.name(), why = failed.detail(), "a lifecycle hook did not answer 200");
            OperationError::Hook(failed)
        }
    }
}
