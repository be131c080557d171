//! What the driver has done for it in child tasks: the engine's operations with the hooks that belong to them, each with its
//! outcome.
//!
//! Owns: how an effect is performed, when which hook is called (see `operations/told.rs`), and how everything of a microVM is
//! removed. Never changes a phase. A task here is aborted when its [`Operation`] is dropped, which is what a crash of the whole
//! process would do to it.

mod told;

use std::{
    future::Future,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hooks::HookFailed;
use model::{Hook, Hooks, chain};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use vmm_runtime::engine::{EngineError, LaunchSpec, NO_OUTPUT, RestoreSpec, SnapshotRecord, Started, SuspendOutcome, Usage, Vm};

use crate::{controller::Node, metrics::Counted, registry::Record};

/// How long a terminate lets a launch or a restore that is already with the engine end by itself before it is dropped
/// half way: a restore takes well under a second, and one that ended leaves less to clean than one that was cut.
const OVERTAKE_GRACE: Duration = Duration::from_secs(2);
/// How long an engine may take to kill a process.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// In a microVM's directory: where engines keep what its app says (see `vmm_runtime::engine::NO_OUTPUT`).
pub(crate) const LOG_DIR: &str = "log";

/// What is in flight.
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) began: Instant,
    /// Takes a suspend back; takes a start that still waits for its slot out of the line.
    pub(crate) cancel: CancellationToken,
    pub(crate) task: AbortOnDropHandle<Outcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Launch,
    Restore,
    Suspend,
    Inspect,
    Destroy,
}

/// How it ended.
pub(crate) enum Outcome {
    /// Of a launch or a restore.
    Start {
        /// In line for a start slot.
        queued: Duration,
        result: Result<Started, OperationError>,
    },
    Suspend(Result<SuspendOutcome, OperationError>),
    Inspect(Result<Option<SnapshotRecord>, EngineError>),
    Destroy,
}

/// Why an operation did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OperationError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The app did not agree.
    #[error(transparent)]
    Hook(HookFailed),
}

impl Operation {
    pub(crate) fn spawn(
        kind: Kind,
        began: Instant,
        work: impl FnOnce(CancellationToken) -> futures::future::BoxFuture<'static, Outcome>,
    ) -> Self {
        let cancel = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(work(cancel.clone())));
        Self { kind, began, cancel, task }
    }

    /// The outcome of an operation whose task panicked: the engine's fault, and the microVM's trouble only.
    pub(crate) fn panicked(kind: Kind, error: tokio::task::JoinError) -> Outcome {
        let failed = |doing: &str| EngineError::Failed { doing: doing.to_owned(), source: Box::new(error) };
        match kind {
            Kind::Launch | Kind::Restore => Outcome::Start { queued: Duration::ZERO, result: Err(failed("the engine's start").into()) },
            Kind::Suspend => Outcome::Suspend(Err(failed("the engine's suspend").into())),
            Kind::Inspect => Outcome::Inspect(Err(failed("the engine's look for a snapshot"))),
            Kind::Destroy => Outcome::Destroy,
        }
    }
}

/// The microVM's first start, with its `/run`.
pub(crate) async fn launch(node: Arc<Node>, record: Record, cancel: CancellationToken) -> Outcome {
    let dir = node.microvm_dir(record.id);
    let (queued, started) = in_turn(&node, &cancel, async {
        let made = dir.clone();
        blocking_io(move || fresh_dir(&made, record.keep_output))
            .await
            .map_err(|source| EngineError::Failed { doing: format!("making {}", dir.display()), source: Box::new(source) })?;
        let identity = record.identity.clone();
        let spec = LaunchSpec { id: record.id, dir, image_dir: record.image_dir.clone(), identity, egress: record.egress };
        node.engine.launch(spec).await
    })
    .await;
    let run = record.run_due.as_ref().map(|due| hooks::run_body(record.id, due.payload.as_ref()));
    let result = match started {
        Ok(started) if run.is_some() => told::started(&node, &record, started, Hook::Run, run, &cancel).await,
        other => other.map_err(OperationError::from),
    };
    Outcome::Start { queued, result }
}

/// A wake, with its `/resume`.
pub(crate) async fn restore(node: Arc<Node>, record: Record, predecessor: Option<Arc<dyn Vm>>, cancel: CancellationToken) -> Outcome {
    let spec = RestoreSpec {
        id: record.id,
        dir: node.microvm_dir(record.id),
        image_dir: record.image_dir.clone(),
        generation: record.generation.next(),
        predecessor,
        identity: record.identity.clone(),
        egress: record.egress,
    };
    let (queued, started) = in_turn(&node, &cancel, node.engine.restore(spec)).await;
    let result = match started {
        Ok(started) => told::started(&node, &record, started, Hook::Resume, None, &cancel).await,
        Err(error) => Err(error.into()),
    };
    Outcome::Start { queued, result }
}

/// A suspend, after its `/suspend`; `cancel` takes it back. `sample` sees what the VMM counted last.
pub(crate) async fn suspend(
    node: Arc<Node>,
    record: Record,
    vm: Arc<dyn Vm>,
    sample: impl FnOnce(Usage) + Send,
    cancel: CancellationToken,
) -> Outcome {
    Outcome::Suspend(told::suspended(&node, &record, vm.as_ref(), sample, cancel).await)
}

/// The end of a suspend that an earlier process of ours had begun: its `/resume`.
pub(crate) async fn tell_awake(record: Record, vm: Arc<dyn Vm>) -> Outcome {
    Outcome::Suspend(told::awake_after_all(&record, vm.as_ref()).await)
}

/// Whether there is something to fall back on after the death of `fallen`.
pub(crate) async fn inspect(node: Arc<Node>, record: Record, fallen: Option<Arc<dyn Vm>>) -> Outcome {
    if let Some(vm) = fallen {
        // Dead already; this ends its streams.
        kill(&record, vm.as_ref()).await;
    }
    Outcome::Inspect(node.engine.committed(node.microvm_dir(record.id)).await)
}

/// Waits for one of the node's start slots, first come first served, and does `start` in it.
async fn in_turn(
    node: &Node,
    cancel: &CancellationToken,
    start: impl Future<Output = Result<Started, EngineError>>,
) -> (Duration, Result<Started, EngineError>) {
    let began = node.clock.now();
    let waiting = Counted::new(&node.metrics.starts_waiting);
    let slot = tokio::select! {
        biased;
        () = cancel.cancelled() => None,
        slot = node.start_slots.acquire() => slot.ok(),
    };
    drop(waiting);
    let queued = node.clock.now().saturating_duration_since(began);
    let result = match slot {
        Some(_slot) => start.await,
        None => Err(EngineError::Host { what: "the microVM was ended before its turn to start came".to_owned() }),
    };
    (queued, result)
}

/// What [`destroy`] does with the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remains {
    /// Only logs stay.
    Logs,
    /// Everything stays, under names that begin with `damaged-`, until the record goes.
    Damaged,
}

/// Ends whatever is left of a microVM. One that is awake is told so by its `/terminate` if there is a `farewell`. Then it kills
/// first and asks later: what was `overtaken` ends because its microVM is gone.
pub(crate) async fn destroy(
    node: Arc<Node>,
    record: Record,
    mut overtaken: Option<Operation>,
    vms: Vec<Arc<dyn Vm>>,
    farewell: Option<Hooks>,
    remains: Remains,
) -> Outcome {
    if let Some(operation) = &overtaken {
        operation.cancel.cancel();
    }
    if let (Some(hooks), Some(vm)) = (farewell, vms.first())
        && is_awake(&mut overtaken).await
        && let Err(failed) = hooks::call(vm.as_ref(), &hooks, Hook::Terminate, None).await
    {
        tracing::info!(microvm.id = %record.id, why = failed.detail(), "a microVM's terminate hook did not answer 200; it ends all the same");
    }
    for vm in vms {
        kill(&record, vm.as_ref()).await;
    }
    let dir = node.microvm_dir(record.id);
    if let Some(mut operation) = overtaken {
        match tokio::time::timeout(OVERTAKE_GRACE, &mut operation.task).await {
            Ok(Ok(Outcome::Start { result: Ok(started), .. })) => kill(&record, started.vm.as_ref()).await,
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => {
                // Cut half way, or it broke: nobody has told us what it left, so the engine looks for it.
                operation.task.abort();
                let _ = (&mut operation.task).await;
                let generation = match operation.kind {
                    Kind::Restore => record.generation.next(),
                    Kind::Launch | Kind::Suspend | Kind::Inspect | Kind::Destroy => record.generation,
                };
                match node.engine.adopt(record.id, dir.clone(), record.image_dir.clone(), generation).await {
                    Ok(Some(vm)) => kill(&record, vm.as_ref()).await,
                    Ok(None) => {}
                    Err(error) => {
                        tracing::error!(microvm.id = %record.id, error = chain(&error), "what an interrupted start left cannot be found; the next start of the node ends it");
                    }
                }
            }
        }
    }
    let cleared = dir.clone();
    if let Err(error) = blocking_io(move || clear(&cleared, remains)).await {
        tracing::warn!(microvm.id = %record.id, dir = %dir.display(), error = chain(&error), "a terminated microVM's files could not all be removed");
    }
    Outcome::Destroy
}

/// Whether the app of a microVM that is being ended can hear anything. A suspend that is under way is waited for, since it can
/// still go either way.
async fn is_awake(overtaken: &mut Option<Operation>) -> bool {
    let Some(operation) = overtaken else { return true };
    if operation.kind != Kind::Suspend {
        return false;
    }
    let Ok(outcome) = tokio::time::timeout(OVERTAKE_GRACE, &mut operation.task).await else { return false };
    *overtaken = None;
    match outcome {
        Ok(Outcome::Suspend(Ok(SuspendOutcome::TakenBack) | Err(OperationError::Hook(_)))) => true,
        Ok(Outcome::Suspend(Err(OperationError::Engine(error)))) => !matches!(error, EngineError::Ended { .. }),
        _ => false,
    }
}

async fn kill(record: &Record, vm: &dyn Vm) {
    if tokio::time::timeout(KILL_LIMIT, vm.kill()).await.is_err() {
        tracing::error!(microvm.id = %record.id, limit = ?KILL_LIMIT, "the engine did not end a microVM in time; the next start of the node ends it");
    }
}

/// Removes the directory of a microVM that is forgotten.
pub(crate) async fn remove_dir(dir: &Path) -> io::Result<()> {
    let dir = dir.to_owned();
    blocking_io(move || absent_is_fine(std::fs::remove_dir_all(dir))).await
}

fn fresh_dir(dir: &Path, keep_output: bool) -> io::Result<()> {
    absent_is_fine(std::fs::remove_dir_all(dir))?;
    std::fs::create_dir_all(dir)?;
    if keep_output { Ok(()) } else { std::fs::write(dir.join(NO_OUTPUT), "") }
}

/// Logs are what is in [`LOG_DIR`] and what ends in `.log`; what was set aside before stays set aside.
fn clear(dir: &Path, remains: Remains) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut outcome = Ok(());
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text == LOG_DIR || text.ends_with(".log") || text.starts_with("damaged-") {
            continue;
        }
        let done = match remains {
            Remains::Damaged => std::fs::rename(entry.path(), dir.join(format!("damaged-{text}"))),
            Remains::Logs if entry.file_type()?.is_dir() => std::fs::remove_dir_all(entry.path()),
            Remains::Logs => std::fs::remove_file(entry.path()),
        };
        // One that cannot be removed does not keep the others.
        outcome = outcome.and(absent_is_fine(done));
    }
    outcome
}

fn absent_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(crate) async fn blocking_io<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_stay_and_a_damaged_snapshot_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let make = || {
            for file in ["log/app.log", "log/app.log.1", "console.log", "memory", "layers/1/disk"] {
                let path = dir.path().join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, file).unwrap();
            }
        };
        let names = || {
            let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        make();
        clear(dir.path(), Remains::Damaged).unwrap();
        assert_eq!(names(), ["console.log", "damaged-layers", "damaged-memory", "log"]);
        assert_eq!(std::fs::read_to_string(dir.path().join("log/app.log")).unwrap(), "log/app.log");
        assert_eq!(std::fs::read_to_string(dir.path().join("damaged-layers/1/disk")).unwrap(), "layers/1/disk");
        make();
        clear(dir.path(), Remains::Logs).unwrap();
        assert_eq!(names(), ["console.log", "damaged-layers", "damaged-memory", "log"]);
        assert_eq!(std::fs::read_to_string(dir.path().join("log/app.log.1")).unwrap(), "log/app.log.1");
        clear(&dir.path().join("absent"), Remains::Logs).unwrap();
    }
}
