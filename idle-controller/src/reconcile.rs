//! What is true of each recorded microVM after this process was away: taken from the processes and files that are there.
//!
//! Owns: the rules by which a record, a process and a snapshot become a phase again. Takes no input but those, and can be
//! repeated: a crash in the middle of it leaves what it found.
//!
//! | record says | a process is there | a snapshot is there | it becomes |
//! |---|---|---|---|
//! | PENDING, its `/run` hook not answered | ended by the sweep: nobody had reached it | – | launched once more |
//! | PENDING | yes | – | RUNNING |
//! | PENDING | no | – | TERMINATED, with a reason |
//! | RUNNING (or was suspending) | yes | – | RUNNING; if its app may have heard `/suspend`, once `/resume` has answered |
//! | RUNNING (or was suspending) | no | yes | SUSPENDED; with a reason if the snapshot is older than what ran |
//! | RUNNING (or was suspending) | no | no | TERMINATED, with a reason |
//! | SUSPENDED (or was waking) | ended by the sweep: nobody had reached it | – | SUSPENDED |
//! | TERMINATING | ended by the sweep | – | what is left of it is removed |

use std::{path::PathBuf, sync::Arc, time::Duration};

use model::{MicrovmId, Usage, chain};
use vmm_runtime::engine::Engine;

use crate::{
    controller::Node,
    driver::Beginning,
    machine::{Effect, EndReason, Event, Machine, Phase, Policy},
    metering::{Found, Meter, SavedUsage},
    operations::blocking_io,
    registry::{Record, SavedState},
};

/// What a microVM's user reads whose VMM went while nobody looked.
const GONE: &str = "its VMM process ended while the node was down";

/// The microVMs whose processes must survive the sweep.
pub(crate) fn keep(records: &[Record]) -> Vec<MicrovmId> {
    let keeps = |record: &&Record| match record.state {
        // One that has not heard its `/run`, or whose answer nobody heard, is no microVM yet.
        SavedState::Pending => record.run_due.is_none(),
        SavedState::Running => true,
        SavedState::Suspended { .. } | SavedState::Terminating { .. } | SavedState::Terminated { .. } => false,
    };
    records.iter().filter(keeps).map(|record| record.id).collect()
}

/// Finds out what has become of one microVM, and enforces what has expired meanwhile (design §4 rule 7). The record is
/// the old one: the caller compares and writes.
pub(crate) async fn recover(node: &Node, record: Record, usage: Option<SavedUsage>) -> Beginning {
    let (now, saved_at) = (node.clock.now(), record.saved_at);
    let usage = usage.unwrap_or(SavedUsage { usage: Usage::default(), stored_bytes: 0, saved_at });
    let meter = |found| Arc::new(Meter::restored(record.size, Arc::clone(&node.sums), usage, found, now, node.clock.wall()));
    // A wall clock that went backwards meanwhile counts as no time at all.
    let away = node.clock.wall().duration_since(record.saved_at).unwrap_or_default();
    let left = record.max_duration.saturating_sub(record.lived.saturating_add(away));
    let policy = node.policy(record.idle, record.max_duration, left, now);
    let generation = record.generation;

    let (mut machine, vm, mut effects) = match &record.state {
        SavedState::Terminated { reason, at } => {
            let ago = node.clock.wall().duration_since(*at).unwrap_or_default();
            let keep = node.config.keep_terminated.saturating_sub(ago);
            return Beginning {
                machine: Machine::ended(policy, generation, reason.clone(), keep, now),
                meter: meter(Found::Ended),
                record,
                vm: None,
                effects: vec![],
                ticket: None,
            };
        }
        SavedState::Terminating { reason } => (Machine::ending(policy, generation, reason.clone()), None, vec![Effect::Destroy]),
        SavedState::Suspended { reason } => {
            (Machine::asleep(policy, generation, record.asleep.saturating_add(away), reason.clone(), now), None, vec![])
        }
        SavedState::Pending if record.run_due.is_some() => (Machine::launching(policy), None, vec![Effect::Launch]),
        SavedState::Pending | SavedState::Running => {
            let dir = node.microvm_dir(record.id);
            let adopted = match node.engine.adopt(record.id, dir.clone(), record.image_dir.clone(), generation).await {
                Ok(adopted) => adopted,
                Err(error) => {
                    tracing::error!(microvm.id = %record.id, error = chain(&error), "a microVM's process could not be taken over");
                    None
                }
            };
            match (adopted, &record.state) {
                (Some(vm), _) if record.resume_due => (Machine::adopted_in_suspend(policy, generation), Some(vm), vec![Effect::TellAwake]),
                (Some(vm), _) => (Machine::adopted(policy, generation, now), Some(vm), vec![]),
                (None, SavedState::Pending) => {
                    let reason = EndReason::LaunchFailed("the node was restarted before it ran".to_owned());
                    (Machine::ending(policy, generation, reason), None, vec![Effect::Destroy])
                }
                (None, _) => {
                    let (machine, effects) = fall_back(node.engine.as_ref(), &record, dir, policy, now).await;
                    (machine, None, effects)
                }
            }
        }
    };
    let meter = meter(match (&vm, machine.phase()) {
        (Some(_), _) => Found::Running(generation),
        (None, Phase::Suspended { .. }) => Found::Sleeping,
        (None, _) => Found::Ended,
    });
    // Refused only where there is nothing to enforce.
    effects.extend(machine.step(now, Event::Tick { quiet_since: None }).unwrap_or_default());
    Beginning { machine, meter, record, vm, effects, ticket: None }
}

/// It ran, and its process is gone.
async fn fall_back(engine: &dyn Engine, record: &Record, dir: PathBuf, policy: Policy, now: std::time::Instant) -> (Machine, Vec<Effect>) {
    let generation = record.generation;
    let reason = match engine.committed(dir).await {
        // The suspend that was under way had just been done.
        Ok(Some(snapshot)) if snapshot.generation == generation => None,
        Ok(Some(_)) => Some(format!("fell back to its last snapshot: {GONE}")),
        Ok(None) => return (Machine::ending(policy, generation, EndReason::Lost(GONE.to_owned())), vec![Effect::Destroy]),
        Err(error) => {
            // Nothing is thrown away because it cannot be read now; a wake will tell.
            tracing::error!(microvm.id = %record.id, error = chain(&error), "whether a microVM has a snapshot could not be read");
            Some(format!("{GONE}; its snapshot could not be read: {}", chain(&error)))
        }
    };
    (Machine::asleep(policy, generation, Duration::ZERO, reason, now), vec![])
}

/// Removes the directories of microVMs that no record knows. Names that are not a microVM's are left alone.
pub(crate) async fn remove_orphans(microvms: PathBuf, known: Vec<MicrovmId>) {
    let removed = blocking_io(move || {
        for entry in std::fs::read_dir(&microvms)? {
            let entry = entry?;
            let id = entry.file_name().to_str().and_then(|name| name.parse::<MicrovmId>().ok());
            if let Some(id) = id
                && !known.contains(&id)
            {
                tracing::warn!(microvm.id = %id, dir = %entry.path().display(), "removing the directory of a microVM that the registry does not know");
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    });
    if let Err(error) = removed.await {
        tracing::warn!(error = chain(&error), "directories without a microVM could not all be removed");
    }
}
