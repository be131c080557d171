//! The only code that changes a [`Phase`].

use std::time::{Duration, Instant};

use model::{Generation, IdlePolicy, SuspendHookFailure};
use vmm_runtime::engine::Exit;

use super::{
    event::{Effect, Event, Inspection, Refusal},
    phase::{AfterStart, AfterTakeBack, EndReason, Phase, SuspendCause, Trouble},
};
use crate::Refused;

/// The longest wait between two tries of something that keeps failing and that nobody asked for: often enough that a
/// disk with space again is noticed within a coffee, seldom enough that a broken one is not hammered.
const LONGEST_BACKOFF: Duration = Duration::from_secs(15 * 60);

/// The first wait after a failed wake before bytes on a parked stream try again. Requests never wait for it.
const PARKED_BACKOFF: Duration = Duration::from_secs(1);

/// What the owner asked for. Fixed for life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// When it sleeps; `None`: never by itself, and traffic does not wake it.
    pub(crate) idle: Option<IdlePolicy>,
    /// Running and suspended time together.
    pub(crate) max_duration: Duration,
    /// When that is used up.
    pub(crate) ends_at: Instant,
    /// How long a terminated microVM stays readable.
    pub(crate) keep_terminated: Duration,
    /// What the app's no to a suspend means.
    pub(crate) suspend_hook_failure: SuspendHookFailure,
}

/// Longer than any node lives; what is longer still is taken as this, so that every point in time can be computed.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Policy {
    /// The policy of a microVM that has `left` of its maximum duration.
    pub(crate) fn new(idle: Option<IdlePolicy>, max_duration: Duration, left: Duration, keep_terminated: Duration, now: Instant) -> Self {
        let idle = idle.map(|idle| IdlePolicy { max_idle: idle.max_idle.min(FOREVER), suspended: idle.suspended.min(FOREVER), ..idle });
        let (ends_at, keep_terminated) = (now + left.min(FOREVER), keep_terminated.min(FOREVER));
        Self { idle, max_duration, ends_at, keep_terminated, suspend_hook_failure: SuspendHookFailure::Keep }
    }

    /// Whether traffic may wake it. Without an idle policy nobody asked for that, so it may not.
    fn auto_resume(&self) -> bool {
        self.idle.is_some_and(|idle| idle.auto_resume)
    }

    /// `suspendedDuration` of zero: it ends instead of sleeping (aws-behaviour §3.2).
    fn ends_instead_of_sleeping(&self) -> Option<EndReason> {
        self.idle.filter(|idle| idle.suspended.is_zero()).map(|idle| EndReason::SuspendedDuration(idle.suspended))
    }
}

/// One microVM's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Machine {
    phase: Phase,
    generation: Generation,
    policy: Policy,
}

impl Machine {
    /// A new one, to be launched: perform [`Effect::Launch`].
    pub(crate) fn launching(policy: Policy) -> Self {
        Self { phase: Phase::Launching { next: AfterStart::Serve }, generation: Generation::default(), policy }
    }

    /// One that an earlier process of ours left running.
    pub(crate) fn adopted(policy: Policy, generation: Generation, now: Instant) -> Self {
        let phase = running(&policy, now);
        Self { phase, generation, policy }
    }

    /// The same of one whose app may have been told to sleep: perform [`Effect::TellAwake`]. Nothing else reaches it before.
    pub(crate) fn adopted_in_suspend(policy: Policy, generation: Generation) -> Self {
        // A suspend that does not go on cannot come too late; what follows then is never asked.
        let phase = Phase::TakingBack { committed: AfterTakeBack::Sleep, next: AfterStart::Serve, failures: 0 };
        Self { phase, generation, policy }
    }

    /// One that an earlier process of ours left asleep, with `asleep_for` used up of its suspended duration.
    pub(crate) fn asleep(policy: Policy, generation: Generation, asleep_for: Duration, reason: Option<String>, now: Instant) -> Self {
        let until = policy.idle.map(|idle| now + idle.suspended.saturating_sub(asleep_for));
        let trouble = reason.map(|reason| Trouble { reason, failures: 0, retry_at: now });
        Self { phase: Phase::Suspended { until, trouble }, generation, policy }
    }

    /// One that has to be removed: perform [`Effect::Destroy`].
    pub(crate) fn ending(policy: Policy, generation: Generation, reason: EndReason) -> Self {
        Self { phase: Phase::Terminating { reason }, generation, policy }
    }

    /// One of which only the record is left, for `keep` more.
    pub(crate) fn ended(policy: Policy, generation: Generation, reason: EndReason, keep: Duration, now: Instant) -> Self {
        Self { phase: Phase::Terminated { reason, forget_at: now + keep.min(FOREVER) }, generation, policy }
    }

    /// Where it is.
    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Restores so far.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// What its owner asked for.
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// When it wants its next [`Event::Tick`].
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        let in_phase = match &self.phase {
            Phase::Running { idle_at, .. } => *idle_at,
            Phase::Suspended { until, trouble } => {
                let retry_at = trouble.as_ref().map(|trouble| trouble.retry_at).filter(|at| *at > now);
                until.iter().copied().chain(retry_at).min()
            }
            Phase::Waking { until, .. } => *until,
            Phase::Launching { .. } | Phase::Suspending { .. } | Phase::TakingBack { .. } | Phase::Fallen { .. } => None,
            Phase::Terminating { .. } => return None,
            Phase::Terminated { forget_at, .. } => return Some(*forget_at),
        };
        Some(in_phase.map_or(self.policy.ends_at, |at| at.min(self.policy.ends_at)))
    }

    /// Whether bytes on a parked stream would change anything now. Without this a failed wake would be repeated at once
    /// and for ever, because the bytes are still there.
    pub(crate) fn heeds_parked_writes(&self, now: Instant) -> bool {
        match &self.phase {
            Phase::Suspending { cause, .. } => self.policy.auto_resume() || *cause == SuspendCause::Idle,
            Phase::Suspended { trouble, .. } => {
                self.policy.auto_resume() && trouble.as_ref().is_none_or(|trouble| trouble.retry_at <= now)
            }
            Phase::Launching { .. }
            | Phase::Running { .. }
            | Phase::TakingBack { .. }
            | Phase::Fallen { .. }
            | Phase::Waking { .. }
            | Phase::Terminating { .. }
            | Phase::Terminated { .. } => false,
        }
    }

    /// Takes one event in. `Ok` with no effects: already so. `Err`: refused, and nothing has changed.
    pub(crate) fn step(&mut self, now: Instant, event: Event) -> Result<Vec<Effect>, Refusal> {
        use Effect as Do;
        use Event as On;
        use Phase as In;

        let policy = &self.policy;
        let auto_resume = policy.auto_resume();
        let mut generation = self.generation;

        let (next, effects) = match (&self.phase, event) {
            // ── The end. Nothing leads back.
            (In::Terminated { forget_at, .. }, On::Tick { .. }) if *forget_at <= now => (self.phase.clone(), vec![Do::Forget]),
            (In::Terminating { reason }, On::Destroyed) => {
                (In::Terminated { reason: reason.clone(), forget_at: now + policy.keep_terminated }, vec![])
            }
            (In::Terminating { .. } | In::Terminated { .. }, On::TerminateAsked | On::Tick { .. } | On::ParkedWrite) => return Ok(vec![]),
            (In::Terminating { .. } | In::Terminated { .. }, On::Request | On::ResumeAsked | On::SuspendAsked) => {
                return Err(Refusal::Terminated);
            }
            (In::Terminating { .. } | In::Terminated { .. }, _) => return Err(Refusal::NotNow),

            // ── Towards the end, from wherever it is.
            (_, On::TerminateAsked) => end(EndReason::Asked),
            (_, On::Tick { .. }) if policy.ends_at <= now => end(EndReason::MaxDuration(policy.max_duration)),
            (In::Suspended { until: Some(until), .. } | In::Waking { until: Some(until), .. }, On::Tick { .. }) if *until <= now => {
                end(EndReason::SuspendedDuration(policy.idle.map(|idle| idle.suspended).unwrap_or_default()))
            }

            // ── The idle clock.
            (In::Running { idle_at: Some(idle_at), trouble }, On::Tick { quiet_since }) if *idle_at <= now => {
                let max_idle = policy.idle.map(|idle| idle.max_idle).unwrap_or_default();
                match quiet_since.map(|since| since + max_idle) {
                    Some(quiet_until) if quiet_until <= now => suspend(policy, SuspendCause::Idle, failures(trouble)),
                    // Bytes crossed meanwhile, or an answer is still being computed: look again when that can have been
                    // long enough ago at the earliest.
                    busy => (In::Running { idle_at: Some(busy.unwrap_or(now + max_idle)), trouble: trouble.clone() }, vec![]),
                }
            }
            (_, On::Tick { .. }) => return Ok(vec![]),

            // ── A start.
            (In::Launching { next } | In::Waking { next, .. }, On::Started) => {
                if matches!(self.phase, In::Waking { .. }) {
                    generation = generation.next();
                }
                awake(policy, *next, now)
            }
            (In::Launching { .. }, On::StartFailed { reason }) => {
                let (phase, mut effects) = end(EndReason::LaunchFailed(reason.clone()));
                effects.insert(0, Do::Fail(Refused::StartFailed { reason }));
                (phase, effects)
            }
            (In::Launching { .. }, On::HookFailed { reason }) => {
                let (phase, mut effects) = end(EndReason::HookFailed(reason.clone()));
                effects.insert(0, Do::Fail(Refused::StartFailed { reason }));
                (phase, effects)
            }
            (In::Launching { .. }, On::Exited { exit: Exit::App { code } }) => {
                let reason = EndReason::AppExited(code);
                let answer = Refused::StartFailed { reason: reason.to_string() };
                let (phase, mut effects) = end(reason);
                effects.insert(0, Do::Fail(answer));
                (phase, effects)
            }
            (In::Waking { until, failures, .. }, On::StartFailed { reason } | On::HookFailed { reason }) => {
                // The snapshot is kept: the next request tries again (design §3).
                let failures = failures.saturating_add(1);
                let trouble = Trouble { reason: reason.clone(), failures, retry_at: now + backoff(PARKED_BACKOFF, failures) };
                (In::Suspended { until: *until, trouble: Some(trouble) }, vec![Do::Fail(Refused::StartFailed { reason })])
            }
            (In::Waking { .. }, On::SnapshotDamaged { why }) => {
                let (phase, mut effects) = end(EndReason::Damaged(why.clone()));
                effects.insert(0, Do::Fail(Refused::StartFailed { reason: why }));
                (phase, effects)
            }

            // ── The outcome of a suspend.
            (In::Suspending { .. }, On::Suspended) => (asleep(policy, None, now), vec![]),
            (In::TakingBack { committed: AfterTakeBack::Wake, next, .. }, On::Suspended) => {
                let until = policy.idle.map(|idle| now + idle.suspended);
                (In::Waking { until, failures: 0, next: *next }, vec![Do::Restore])
            }
            (In::TakingBack { committed: AfterTakeBack::Sleep, .. }, On::Suspended) => {
                (asleep(policy, None, now), vec![Do::Fail(Refused::Asleep)])
            }
            (In::TakingBack { next, .. }, On::TakenBack) => awake(policy, *next, now),
            // It has undone itself without having been told to: harmless.
            (In::Suspending { .. }, On::TakenBack) => (running(policy, now), vec![]),
            (In::Suspending { .. } | In::TakingBack { .. }, On::HookFailed { reason })
                if policy.suspend_hook_failure == SuspendHookFailure::Terminate =>
            {
                end(EndReason::HookFailed(reason))
            }
            (In::Suspending { failures, .. }, On::SuspendFailed { reason }) => {
                (running_after_failure(policy, *failures, not_suspended(&reason), now), vec![])
            }
            // AWS's words stand for themselves.
            (In::Suspending { failures, .. }, On::HookFailed { reason }) => (running_after_failure(policy, *failures, reason, now), vec![]),
            (In::TakingBack { next: AfterStart::Serve, failures, .. }, On::SuspendFailed { reason }) => {
                (running_after_failure(policy, *failures, not_suspended(&reason), now), vec![Do::Release])
            }
            (In::TakingBack { next: AfterStart::Serve, failures, .. }, On::HookFailed { reason }) => {
                (running_after_failure(policy, *failures, reason, now), vec![Do::Release])
            }
            (In::TakingBack { next: AfterStart::Suspend, .. }, On::SuspendFailed { .. } | On::HookFailed { .. }) => {
                awake(policy, AfterStart::Suspend, now)
            }
            (In::Running { .. } | In::Suspending { .. } | In::TakingBack { .. }, On::Exited { exit: Exit::App { code } }) => {
                end(EndReason::AppExited(code))
            }
            (In::Running { .. } | In::Suspending { .. }, On::Exited { exit: Exit::Vmm { detail } }) => {
                (In::Fallen { detail, wake: None }, vec![Do::Inspect])
            }
            (In::TakingBack { committed: AfterTakeBack::Wake, next, .. }, On::Exited { exit: Exit::Vmm { detail } }) => {
                (In::Fallen { detail, wake: Some(*next) }, vec![Do::Inspect])
            }
            (In::TakingBack { committed: AfterTakeBack::Sleep, .. }, On::Exited { exit: Exit::Vmm { detail } }) => {
                (In::Fallen { detail, wake: None }, vec![Do::Fail(Refused::Asleep), Do::Inspect])
            }

            // ── After the death of a VMM.
            (In::Fallen { detail, .. }, On::Inspected { found: Inspection::Nothing }) => end(EndReason::Lost(detail.clone())),
            (In::Fallen { detail, wake }, On::Inspected { found: Inspection::Snapshot }) => match (policy.ends_instead_of_sleeping(), wake) {
                (Some(_), _) => end(EndReason::Lost(detail.clone())),
                (None, None) => (asleep(policy, Some(fallen_back(detail, now)), now), vec![]),
                (None, Some(next)) => {
                    let until = policy.idle.map(|idle| now + idle.suspended);
                    (In::Waking { until, failures: 0, next: *next }, vec![Do::Restore])
                }
            },

            // ── Somebody wants it awake.
            (In::Running { .. }, On::Request) => (self.phase.clone(), vec![Do::Release]),
            (In::Running { .. }, On::ResumeAsked | On::ParkedWrite) => return Ok(vec![]),
            // Whoever comes after a suspend was asked for wakes it again, if that is theirs to do; the start is under way
            // already, so the two cancel out.
            (In::Launching { .. }, On::ResumeAsked) => (In::Launching { next: AfterStart::Serve }, vec![]),
            (In::Launching { .. }, On::Request) if auto_resume => (In::Launching { next: AfterStart::Serve }, vec![]),
            (In::Launching { .. }, On::Request | On::ParkedWrite) => return Ok(vec![]),
            (In::Waking { until, failures, .. }, On::ResumeAsked) => {
                (In::Waking { until: *until, failures: *failures, next: AfterStart::Serve }, vec![])
            }
            (In::Waking { until, failures, .. }, On::Request | On::ParkedWrite) if auto_resume => {
                (In::Waking { until: *until, failures: *failures, next: AfterStart::Serve }, vec![])
            }
            (In::Waking { .. }, On::Request | On::ParkedWrite) => return Ok(vec![]),
            (In::Suspending { failures, .. }, On::ResumeAsked) => (
                In::TakingBack { committed: AfterTakeBack::Wake, next: AfterStart::Serve, failures: *failures },
                vec![Do::TakeBack],
            ),
            (In::Suspending { failures, .. }, On::Request | On::ParkedWrite) if auto_resume => (
                In::TakingBack { committed: AfterTakeBack::Wake, next: AfterStart::Serve, failures: *failures },
                vec![Do::TakeBack],
            ),
            // It is not asleep yet, and nobody asked for it to be: the traffic was there in time if the suspend can still
            // be undone. If it cannot, this microVM sleeps until it is resumed.
            (In::Suspending { cause: SuspendCause::Idle, failures }, On::Request | On::ParkedWrite) => (
                In::TakingBack { committed: AfterTakeBack::Sleep, next: AfterStart::Serve, failures: *failures },
                vec![Do::TakeBack],
            ),
            (In::Suspending { cause: SuspendCause::Asked, .. }, On::Request) => return Err(Refusal::Asleep),
            (In::Suspending { cause: SuspendCause::Asked, .. }, On::ParkedWrite) => return Ok(vec![]),
            (In::TakingBack { failures, .. }, On::ResumeAsked) => {
                (In::TakingBack { committed: AfterTakeBack::Wake, next: AfterStart::Serve, failures: *failures }, vec![])
            }
            (In::TakingBack { committed, failures, .. }, On::Request | On::ParkedWrite) if auto_resume => {
                (In::TakingBack { committed: *committed, next: AfterStart::Serve, failures: *failures }, vec![])
            }
            (In::TakingBack { .. }, On::Request | On::ParkedWrite) => return Ok(vec![]),
            (In::Fallen { detail, .. }, On::ResumeAsked) => {
                (In::Fallen { detail: detail.clone(), wake: Some(AfterStart::Serve) }, vec![])
            }
            (In::Fallen { detail, .. }, On::Request | On::ParkedWrite) if auto_resume => {
                (In::Fallen { detail: detail.clone(), wake: Some(AfterStart::Serve) }, vec![])
            }
            // A resume is on its way already; what it brings is good for this request too.
            (In::Fallen { wake: Some(_), .. }, On::Request) => return Ok(vec![]),
            (In::Fallen { .. }, On::Request) => return Err(Refusal::Asleep),
            (In::Fallen { .. }, On::ParkedWrite) => return Ok(vec![]),
            (In::Suspended { until, trouble }, On::ResumeAsked) => (
                In::Waking { until: *until, failures: failures(trouble), next: AfterStart::Serve },
                vec![Do::Restore],
            ),
            (In::Suspended { until, trouble }, On::Request | On::ParkedWrite) if auto_resume => (
                In::Waking { until: *until, failures: failures(trouble), next: AfterStart::Serve },
                vec![Do::Restore],
            ),
            (In::Suspended { .. }, On::Request) => return Err(Refusal::Asleep),
            (In::Suspended { .. }, On::ParkedWrite) => return Ok(vec![]),

            // ── The API wants it asleep.
            (In::Running { trouble, .. }, On::SuspendAsked) => suspend(policy, SuspendCause::Asked, failures(trouble)),
            (In::Suspended { .. }, On::SuspendAsked) => return Ok(vec![]),
            (In::Suspending { failures, .. }, On::SuspendAsked) => (In::Suspending { cause: SuspendCause::Asked, failures: *failures }, vec![]),
            (In::Launching { .. }, On::SuspendAsked) => (In::Launching { next: AfterStart::Suspend }, vec![]),
            (In::Waking { until, failures, .. }, On::SuspendAsked) => {
                (In::Waking { until: *until, failures: *failures, next: AfterStart::Suspend }, vec![])
            }
            (In::TakingBack { committed, failures, .. }, On::SuspendAsked) => {
                (In::TakingBack { committed: *committed, next: AfterStart::Suspend, failures: *failures }, vec![])
            }
            (In::Fallen { detail, wake }, On::SuspendAsked) => {
                // Who waits for the wake still gets it; then it sleeps.
                (In::Fallen { detail: detail.clone(), wake: wake.map(|_| AfterStart::Suspend) }, vec![])
            }

            // ── Outcomes of operations that are not in flight.
            (
                In::Launching { .. },
                On::SnapshotDamaged { .. } | On::Suspended | On::TakenBack | On::SuspendFailed { .. } | On::Exited { .. } | On::Inspected { .. } | On::Destroyed,
            )
            | (
                In::Waking { .. },
                On::Suspended | On::TakenBack | On::SuspendFailed { .. } | On::Exited { .. } | On::Inspected { .. } | On::Destroyed,
            )
            | (
                In::Running { .. },
                On::Started
                | On::StartFailed { .. }
                | On::HookFailed { .. }
                | On::SnapshotDamaged { .. }
                | On::Suspended
                | On::TakenBack
                | On::SuspendFailed { .. }
                | On::Inspected { .. }
                | On::Destroyed,
            )
            | (
                In::Suspending { .. } | In::TakingBack { .. },
                On::Started | On::StartFailed { .. } | On::SnapshotDamaged { .. } | On::Inspected { .. } | On::Destroyed,
            )
            | (
                In::Fallen { .. } | In::Suspended { .. },
                On::Started
                | On::StartFailed { .. }
                | On::HookFailed { .. }
                | On::SnapshotDamaged { .. }
                | On::Suspended
                | On::TakenBack
                | On::SuspendFailed { .. }
                | On::Exited { .. }
                | On::Destroyed,
            )
            | (In::Suspended { .. }, On::Inspected { .. }) => return Err(Refusal::NotNow),
        };
        self.phase = next;
        self.generation = generation;
        Ok(effects)
    }
}

/// Ends it. Whoever waits learns that first; the operation in flight is overtaken.
fn end(reason: EndReason) -> (Phase, Vec<Effect>) {
    (Phase::Terminating { reason }, vec![Effect::Fail(Refused::Terminated), Effect::Destroy])
}

/// Begins to sleep, or ends if sleeping is not allowed.
fn suspend(policy: &Policy, cause: SuspendCause, failures: u32) -> (Phase, Vec<Effect>) {
    match policy.ends_instead_of_sleeping() {
        Some(reason) => end(reason),
        None => (Phase::Suspending { cause, failures }, vec![Effect::Suspend]),
    }
}

/// Awake after a start or a take-back: who waits goes first, whatever follows.
fn awake(policy: &Policy, next: AfterStart, now: Instant) -> (Phase, Vec<Effect>) {
    match next {
        AfterStart::Serve => (running(policy, now), vec![Effect::Release]),
        AfterStart::Suspend => {
            let (phase, mut effects) = suspend(policy, SuspendCause::Asked, 0);
            effects.insert(0, Effect::Release);
            (phase, effects)
        }
    }
}

fn running(policy: &Policy, now: Instant) -> Phase {
    Phase::Running { idle_at: policy.idle.map(|idle| now + idle.max_idle), trouble: None }
}

/// Awake because a suspend failed. The idle clock tries again later and later; whoever asks by hand is not held up.
fn running_after_failure(policy: &Policy, failures: u32, reason: String, now: Instant) -> Phase {
    let failures = failures.saturating_add(1);
    let wait = backoff(policy.idle.map_or(LONGEST_BACKOFF, |idle| idle.max_idle), failures);
    Phase::Running {
        idle_at: policy.idle.map(|_| now + wait),
        trouble: Some(Trouble { reason, failures, retry_at: now + wait }),
    }
}

fn not_suspended(reason: &str) -> String {
    format!("could not be suspended: {reason}")
}

fn asleep(policy: &Policy, trouble: Option<Trouble>, now: Instant) -> Phase {
    Phase::Suspended { until: policy.idle.map(|idle| now + idle.suspended), trouble }
}

fn fallen_back(detail: &str, now: Instant) -> Trouble {
    Trouble { reason: format!("fell back to its last snapshot: {detail}"), failures: 0, retry_at: now }
}

fn failures(trouble: &Option<Trouble>) -> u32 {
    trouble.as_ref().map_or(0, |trouble| trouble.failures)
}

/// `first`, doubled with every failure up to [`LONGEST_BACKOFF`] (or `first`, if that is longer).
fn backoff(first: Duration, failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    first.saturating_mul(1 << doublings).min(LONGEST_BACKOFF.max(first))
}

#[cfg(test)]
mod tests;
