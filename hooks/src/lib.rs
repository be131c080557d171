//! Calls of an app's lifecycle hooks (aws-behaviour §4): a POST to a fixed path on the hook port in the guest.
//!
//! Owns: how a hook is called, how often it is tried, what its answer means, and the sentences that say so. Never decides
//! what becomes of a microVM whose hook failed, nor when a hook is due.
//!
//! Every call has a connection of its own, made after everything that came before it: a connection that lived through a
//! freeze is what loses microVMs at AWS (ABCA F01). What breaks before the app has answered a byte is tried again until the
//! hook's time is over, so an app may hear the same call twice; one that answers is heard once.
#![forbid(unsafe_code)]

mod exchange;
mod outcome;

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use model::{Hook, Hooks, MicrovmId, RunPayload};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout_at};
use vmm_runtime::engine::Vm;

use crate::exchange::{Broken, Progress, exchange};
pub use crate::outcome::{HookFailed, Outcome};

/// The first wait between two tries, and the longest: a listener that is about to be there is not kept waiting, and a hook that
/// says "not yet" for an hour is not asked a million times.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_millis(500);

/// Calls a hook, if it is enabled. `Err` says why the app may not be taken as having agreed.
pub async fn call(vm: &dyn Vm, hooks: &Hooks, hook: Hook, body: Option<Bytes>) -> Result<(), HookFailed> {
    let Some(limit) = hooks.timeout(hook) else { return Ok(()) };
    // Only while an image is built is there time to say "not yet".
    let may_wait = matches!(hook, Hook::Ready | Hook::Validate);
    let outcome = tokio::select! {
        // Its end explains whatever else is seen of it.
        biased;
        exit = vm.exited() => Outcome::Ended(exit),
        outcome = tried(vm, hooks, hook, body, limit, may_wait) => outcome,
    };
    match outcome {
        Outcome::Answered(StatusCode::OK) => Ok(()),
        outcome => Err(HookFailed { hook, limit, outcome }),
    }
}

/// What `/run` is sent. Without a payload the text is empty, so that an app may always read it.
pub fn run_body(id: MicrovmId, payload: Option<&RunPayload>) -> Bytes {
    let payload = payload.map_or("", |payload| payload.0.as_str());
    json!({"microvmId": id, "runHookPayload": payload}).to_string().into()
}

async fn tried(vm: &dyn Vm, hooks: &Hooks, hook: Hook, body: Option<Bytes>, limit: Duration, may_wait: bool) -> Outcome {
    let deadline = Instant::now() + limit;
    let mut wait = FIRST_WAIT;
    let mut last = Outcome::TimedOut;
    loop {
        let progress = Progress::default();
        let outcome = timeout_at(deadline, pin!(exchange(vm, hooks.port, hook, body.clone(), &progress))).await;
        let outcome = match progress.status.get() {
            Some(status) => Ok(Ok(*status)),
            None => outcome,
        };
        last = match outcome {
            Ok(Ok(StatusCode::SERVICE_UNAVAILABLE)) if may_wait => Outcome::Answered(StatusCode::SERVICE_UNAVAILABLE),
            Ok(Ok(status)) => return Outcome::Answered(status),
            Ok(Err(Broken { outcome, final_word: true })) => return outcome,
            Ok(Err(Broken { outcome, .. })) => outcome,
            // The app has the call and does not answer.
            Err(_elapsed) if progress.sent.into_inner() => return Outcome::TimedOut,
            Err(_elapsed) => return last,
        };
        tracing::debug!(hook = hook.name(), port = %hooks.port, outcome = ?last, "a lifecycle hook is tried again");
        if timeout_at(deadline, sleep(wait)).await.is_err() {
            return last;
        }
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

#[cfg(test)]
mod tests;
