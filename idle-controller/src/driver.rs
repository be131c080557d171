//! The one task that owns a microVM's machine.
//!
//! Owns: the order in which things are heard, the performing of effects, the durable record, the published view, the
//! gate. Never decides what may follow what: that is `machine/`. Never waits for the engine: operations run in child
//! tasks, and what they end with comes back as an event, so that a terminate is heard while one hangs.
//!
//! Each transition goes: step a copy of the machine → make the record durable → take the copy over → publish → set the
//! gate → perform the effects. Whoever reads a state can rely on finding it (or one that follows from it) after a crash.

mod outcomes;
mod saving;

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use model::{Hook, chain};
use tokio::sync::{mpsc, oneshot, watch};
use vmm_runtime::engine::{Exit, Phases, Vm};

pub(crate) use self::saving::first_view;
use self::saving::terminated_at;
use crate::{
    Refused,
    controller::{Node, Ticket},
    handle::{Ask, CLOSING, Denial, Grant, Kill, Live, MicrovmView, Seat},
    machine::{Effect, EndReason, Event, Machine, Phase, Refusal},
    metering::Meter,
    metrics::{Counted, StartOutcome, SuspendEnd},
    operations::{self, Kind, Operation, Outcome, Remains},
    registry::Record,
};

/// What the driver reads its questions from; the other ends are in the [`Seat`].
pub(crate) struct Mailboxes {
    pub(crate) asks: mpsc::Receiver<Ask>,
    pub(crate) kills: mpsc::Receiver<Kill>,
    pub(crate) view: watch::Sender<MicrovmView>,
}

pub(crate) struct Driver {
    node: Arc<Node>,
    seat: Arc<Seat>,
    mail: Mailboxes,
    machine: Machine,
    /// The newest record; on stable storage unless `unsaved_until` is set.
    record: Record,
    /// A write has failed; when to try again.
    unsaved_until: Option<Instant>,
    /// Awake, or going to sleep.
    vm: Option<Arc<dyn Vm>>,
    /// What was suspended by this process, with the streams that are parked in it.
    predecessor: Option<Arc<dyn Vm>>,
    /// The end of `vm`, listened to while it runs.
    exit: Option<BoxFuture<'static, Exit>>,
    /// Bytes on a parked stream, listened to while they would change something.
    parked: Option<BoxFuture<'static, ()>>,
    operation: Option<Operation>,
    /// Bounded by the seat's places; who left is dropped when that number is reached.
    waiting: Vec<oneshot::Sender<Result<Grant, Denial>>>,
    /// The start under way, or the take-back that may become one.
    wake: Option<Wake>,
    /// The steps of the start that has just failed, for those who waited for it.
    failed: Phases,
    /// Set while the node ends: nothing new is begun.
    draining: bool,
    counted: Counted,
    /// This microVM's place among those that the node may hold; given back when it is terminated.
    ticket: Option<Ticket>,
}

/// A start that somebody waits for, from its first cause.
struct Wake {
    asked_at: Instant,
    /// Whether this is the first start of all.
    launch: bool,
    phases: Phases,
}

impl Wake {
    /// The steps of a start that has failed, `failed` for what was being done last; they add up to the whole.
    fn failed(self, queued: Duration, now: Instant) -> Phases {
        let mut phases = self.phases;
        phases.push(("queue", queued));
        let known = phases.iter().map(|(_, took)| *took).sum();
        phases.push(("failed", now.saturating_duration_since(self.asked_at).saturating_sub(known)));
        phases
    }
}

/// The next thing to deal with.
enum Happening {
    Kill(Kill),
    Outcome(Operation, Outcome),
    Exited(Exit),
    Timer,
    ParkedWrite,
    Closing,
    Ask(Ask),
}

/// Where a driver starts.
pub(crate) struct Beginning {
    pub(crate) machine: Machine,
    pub(crate) meter: Arc<Meter>,
    pub(crate) record: Record,
    pub(crate) vm: Option<Arc<dyn Vm>>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) ticket: Option<Ticket>,
}

impl Driver {
    pub(crate) fn new(node: Arc<Node>, seat: Arc<Seat>, mail: Mailboxes, beginning: Beginning) -> (Self, Vec<Effect>) {
        let Beginning { machine, meter: _, record, vm, effects, ticket } = beginning;
        let counted = node.metrics.in_state(machine.phase().public());
        let mut driver = Self {
            node,
            seat,
            mail,
            machine,
            record,
            unsaved_until: None,
            vm: None,
            predecessor: None,
            exit: None,
            parked: None,
            operation: None,
            waiting: Vec::new(),
            wake: None,
            failed: Vec::new(),
            draining: false,
            counted,
            ticket,
        };
        if matches!(driver.machine.phase(), Phase::Launching { .. }) {
            driver.wake = Some(Wake { asked_at: driver.node.clock.now(), launch: true, phases: Vec::new() });
        }
        if let Some(vm) = vm {
            driver.now_runs(vm);
        }
        (driver, effects)
    }

    /// Drives until the microVM is forgotten or the node ends.
    pub(crate) async fn run(mut self, effects: Vec<Effect>) {
        self.set_gate();
        self.perform(effects).await;
        while !(self.draining && self.machine.phase().is_settled()) {
            match self.next().await {
                Happening::Kill(reply) => {
                    // Refused only if it has ended already, which is what was asked for.
                    let _ = self.apply(Event::TerminateAsked).await;
                    let _ = reply.send(());
                }
                Happening::Outcome(operation, outcome) => self.ended(operation, outcome).await,
                Happening::Exited(exit) => self.feed(Event::Exited { exit }).await,
                Happening::Timer => {
                    if self.on_timer().await == Life::Forgotten {
                        return;
                    }
                }
                Happening::ParkedWrite => {
                    self.parked = None;
                    self.feed(Event::ParkedWrite).await;
                }
                Happening::Closing => self.drain(),
                Happening::Ask(ask) => {
                    // What has expired is not woken any more, even if this question came before the timer was heard.
                    if self.is_due() && self.on_timer().await == Life::Forgotten {
                        return;
                    }
                    self.answer(ask).await;
                }
            }
        }
        self.checkpoint().await;
    }

    /// The next thing to deal with. The order is on purpose. First what ends a microVM: nobody may be let through to one
    /// that is condemned or dead. Then the outcome of what is in flight, then time, so that what has expired is not
    /// woken. Requests come last: they find the newest state.
    ///
    /// Cancel-safe: every arm is a channel's `recv`, a token, a fresh timer or a future that lives in `self`.
    async fn next(&mut self) -> Happening {
        let now = self.node.clock.now();
        let running = matches!(self.machine.phase(), Phase::Running { .. });
        let heeds_parked = !self.draining && self.machine.heeds_parked_writes(now);
        if heeds_parked && self.parked.is_none() {
            let sleeper = self.vm.as_ref().or(self.predecessor.as_ref()).cloned();
            self.parked = sleeper.map(|vm| async move { vm.parked_write().await }.boxed());
        }
        // A request whose answer was not finished when its microVM was put to sleep is waiting for it like one that has
        // just come.
        let answer_owed = heeds_parked && matches!(self.machine.phase(), Phase::Suspended { .. }) && self.seat.activity.holds() > 0;
        // In terms of our own clock, so that a timer that is early by it (a test's clock stands still) is armed again for
        // what is left, and does not spin.
        let timer = self.deadline(now).map(|at| at.saturating_duration_since(now));
        tokio::select! {
            biased;
            Some(reply) = self.mail.kills.recv() => Happening::Kill(reply),
            (operation, outcome) = finished(&mut self.operation) => Happening::Outcome(operation, outcome),
            exit = maybe(&mut self.exit), if running => { self.exit = None; Happening::Exited(exit) }
            () = tokio::time::sleep(timer.unwrap_or_default()), if timer.is_some() => Happening::Timer,
            () = std::future::ready(()), if answer_owed => Happening::ParkedWrite,
            () = maybe(&mut self.parked), if heeds_parked => Happening::ParkedWrite,
            () = self.node.closing.cancelled(), if !self.draining => Happening::Closing,
            Some(ask) = self.mail.asks.recv(), if !self.draining => Happening::Ask(ask),
        }
    }

    /// When the timer fires. While the node ends only a failed write is tried again.
    fn deadline(&self, now: Instant) -> Option<Instant> {
        let lifecycle = if self.draining { None } else { self.machine.deadline(now) };
        lifecycle.into_iter().chain(self.unsaved_until).min()
    }

    fn is_due(&self) -> bool {
        let now = self.node.clock.now();
        self.deadline(now).is_some_and(|at| at <= now)
    }

    /// Takes one event in, all the way.
    async fn apply(&mut self, event: Event) -> Result<(), Refusal> {
        let now = self.node.clock.now();
        let mut machine = self.machine.clone();
        let cause = event.name();
        let effects = machine.step(now, event)?;
        // A failed write here is tried again later and does not hold anything up: whatever this event did, the files and
        // processes are there to show it to the next start. (Starts are the exception, see `started`.)
        self.save(&machine).await.unwrap_or_else(|error| self.save_later(&error));
        self.enter(machine, cause, &Vec::new(), effects).await;
        Ok(())
    }

    /// For events that nobody waits for an answer to.
    async fn feed(&mut self, event: Event) {
        let name = event.name();
        if let Err(refusal) = self.apply(event).await {
            tracing::debug!(microvm.id = %self.seat.id, event = name, phase = self.machine.phase().name(), %refusal, "an event came too late");
        }
    }

    fn now_runs(&mut self, vm: Arc<dyn Vm>) {
        let watched = Arc::clone(&vm);
        self.exit = Some(async move { watched.exited().await }.boxed());
        self.parked = None;
        self.vm = Some(vm);
    }

    /// The new state becomes the state: published, gated, acted upon.
    async fn enter(&mut self, machine: Machine, cause: &'static str, phases: &Phases, effects: Vec<Effect>) {
        let before = std::mem::replace(&mut self.machine, machine);
        let (from, to) = (before.phase(), self.machine.phase());
        if from.name() != to.name() {
            tracing::info!(
                microvm.id = %self.seat.id, from = from.name(), to = to.name(), cause, generation = %self.machine.generation(),
                reason = to.reason(), ?phases, "microVM transition"
            );
            self.counted = self.node.metrics.in_state(to.public());
        }
        let awaited = matches!(
            to,
            Phase::Launching { .. } | Phase::TakingBack { .. } | Phase::Waking { .. } | Phase::Fallen { wake: Some(_), .. }
        );
        if awaited && self.wake.is_none() {
            self.wake = Some(Wake { asked_at: self.node.clock.now(), launch: false, phases: Vec::new() });
        }
        if matches!(to, Phase::Terminated { .. }) {
            self.ticket = None;
        }
        self.publish();
        self.set_gate();
        self.perform(effects).await;
        if !awaited {
            // Told to those who waited for it by now; what comes next is another story.
            self.wake = None;
        }
    }

    fn publish(&self) {
        let (state, reason) = (self.machine.phase().public(), self.machine.phase().reason());
        let (generation, terminated_at) = (self.machine.generation(), terminated_at(&self.record));
        self.mail.view.send_if_modified(|view| {
            let changed = view.state != state || view.state_reason != reason || view.generation != generation || view.terminated_at != terminated_at;
            (view.state, view.state_reason, view.generation, view.terminated_at) = (state, reason, generation, terminated_at);
            changed
        });
    }

    /// Open exactly while it runs. Closed before anything that ends its running is begun.
    fn set_gate(&mut self) {
        match (self.machine.phase(), &self.vm) {
            (Phase::Running { .. }, Some(vm)) => {
                let generation = self.machine.generation();
                if self.seat.live.load().as_ref().is_none_or(|live| !Arc::ptr_eq(&live.vm, vm)) {
                    self.seat.live.store(Some(Arc::new(Live { vm: Arc::clone(vm), generation })));
                }
                vm.release_streams();
                self.seat.activity.open();
            }
            _ => self.seat.activity.close(),
        }
    }

    async fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            let node = Arc::clone(&self.node);
            let record = self.record.clone();
            match effect {
                Effect::Launch => self.begin(Kind::Launch, |cancel| operations::launch(node, record, cancel).boxed()),
                Effect::Restore => {
                    let predecessor = self.predecessor.clone();
                    self.begin(Kind::Restore, |cancel| operations::restore(node, record, predecessor, cancel).boxed());
                }
                Effect::Suspend => {
                    let vm = self.vm.clone().expect("the machine suspends only what runs, and what runs has a VM");
                    let (meter, clock, generation) = (Arc::clone(&self.seat.meter), Arc::clone(&node.clock), self.machine.generation());
                    let sample = move |counted| meter.sample(generation, counted, clock.now());
                    self.begin(Kind::Suspend, |cancel| operations::suspend(node, record, vm, sample, cancel).boxed());
                }
                Effect::TakeBack => {
                    if let Some(operation) = &self.operation {
                        operation.cancel.cancel();
                    }
                }
                Effect::TellAwake => {
                    let vm = self.vm.clone().expect("the machine tells only what was adopted, and what was adopted has a VM");
                    self.begin(Kind::Suspend, |_| operations::tell_awake(record, vm).boxed());
                }
                Effect::Inspect => {
                    let fallen = self.vm.clone();
                    self.begin(Kind::Inspect, |_| operations::inspect(node, record, fallen).boxed());
                }
                Effect::Destroy => self.destroy(),
                Effect::Release => self.release(),
                Effect::Fail(refused) => self.fail(&refused),
                Effect::Forget => self.forget().await,
            }
        }
    }

    fn begin(&mut self, kind: Kind, work: impl FnOnce(tokio_util::sync::CancellationToken) -> BoxFuture<'static, Outcome>) {
        self.operation = Some(Operation::spawn(kind, self.node.clock.now(), work));
    }

    /// Overtakes what is in flight.
    fn destroy(&mut self) {
        let overtaken = self.operation.take();
        match overtaken.as_ref().map(|operation| operation.kind) {
            Some(Kind::Launch) => self.node.metrics.launch_ended(StartOutcome::Terminated),
            Some(Kind::Restore) => self.node.metrics.wake_ended(StartOutcome::Terminated),
            Some(Kind::Suspend) => self.node.metrics.suspend_ended(SuspendEnd::Ended),
            Some(Kind::Inspect | Kind::Destroy) | None => {}
        }
        let remains = match self.machine.phase() {
            Phase::Terminating { reason: EndReason::Damaged(_) } => Remains::Damaged,
            _ => Remains::Logs,
        };
        // An app that ended by itself is not told, nor one that never agreed to run.
        let farewell = match self.machine.phase() {
            Phase::Terminating { reason: EndReason::AppExited(_) | EndReason::Lost(_) | EndReason::Damaged(_) | EndReason::LaunchFailed(_) } => None,
            _ => self.record.hooks.filter(|hooks| self.vm.is_some() && hooks.timeout(Hook::Terminate).is_some()),
        };
        (self.exit, self.parked) = (None, None);
        self.seat.meter.ended(self.node.clock.now());
        let vms = self.vm.take().into_iter().chain(self.predecessor.take()).collect();
        self.seat.live.store(None);
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        self.begin(Kind::Destroy, |_| operations::destroy(node, record, overtaken, vms, farewell, remains).boxed());
    }

    /// Lets everyone through who waits.
    fn release(&mut self) {
        let vm = self.vm.as_ref().expect("the machine releases only into what runs, and what runs has a VM");
        vm.release_streams();
        let live = Arc::new(Live { vm: Arc::clone(vm), generation: self.machine.generation() });
        let phases = self.wake.as_ref().map(|wake| Arc::new(wake.phases.clone()));
        for waiter in self.waiting.drain(..) {
            let hold = self.seat.activity.admit();
            // One who has left drops the hold again.
            let _ = waiter.send(Ok(Grant { hold, live: Arc::clone(&live), phases: phases.clone() }));
        }
    }

    /// Answers everyone who waits.
    fn fail(&mut self, refused: &Refused) {
        let phases = std::mem::take(&mut self.failed);
        for waiter in self.waiting.drain(..) {
            let _ = waiter.send(Err(Denial { refused: refused.clone(), phases: phases.clone() }));
        }
    }

    async fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Awake(reply) => {
                if reply.is_closed() {
                    // The client has left before it was heard: it wakes nobody.
                    return;
                }
                if self.waiting.len() >= self.node.config.max_waiting_per_microvm {
                    self.waiting.retain(|waiter| !waiter.is_closed());
                }
                self.waiting.push(reply);
                if let Err(refusal) = self.apply(Event::Request).await
                    && let Some(reply) = self.waiting.pop()
                {
                    let _ = reply.send(Err(refused(refusal).into()));
                }
            }
            Ask::Suspend(reply) => {
                let outcome = self.apply(Event::SuspendAsked).await.map_err(refused);
                let _ = reply.send(outcome);
            }
            Ask::Resume(reply) => {
                let outcome = self.apply(Event::ResumeAsked).await.map_err(refused);
                let _ = reply.send(outcome);
            }
        }
    }

    async fn on_timer(&mut self) -> Life {
        let now = self.node.clock.now();
        if self.unsaved_until.is_some_and(|at| at <= now) {
            self.record = Self::record_of(&self.node, &self.record, &self.machine);
            match self.node.store.put(&self.record, &self.metered()).await {
                Ok(()) => self.unsaved_until = None,
                Err(error) => self.save_later(&error),
            }
        }
        if self.draining || self.machine.deadline(now).is_none_or(|at| at > now) {
            return Life::GoesOn;
        }
        let max_idle = self.machine.policy().idle.map(|idle| idle.max_idle).unwrap_or_default();
        let quiet_since = match self.machine.phase() {
            // The look and the close are one step: who comes now asks us, and we answer after this.
            Phase::Running { idle_at: Some(idle_at), .. } if *idle_at <= now => self.seat.activity.close_if_quiet(now, max_idle).or_else(|| {
                // What left or came this instant counts as activity of this instant.
                self.seat.activity.quiet_since().filter(|since| *since + max_idle > now)
            }),
            _ => None,
        };
        self.feed(Event::Tick { quiet_since }).await;
        match self.machine.phase() {
            Phase::Terminated { forget_at, .. } if *forget_at <= now => Life::Forgotten,
            _ => Life::GoesOn,
        }
    }

    /// The end of the record and of what is left of the directory; in this order, so that no directory is ever without.
    async fn forget(&mut self) {
        let dir = self.node.microvm_dir(self.seat.id);
        if let Err(error) = operations::remove_dir(&dir).await {
            tracing::warn!(microvm.id = %self.seat.id, dir = %dir.display(), error = chain(&error), "what was left of a microVM could not be removed");
        }
        if let Err(error) = self.node.store.delete(self.seat.id, &self.record.image).await {
            // It is found again, and forgotten again, at the next start.
            self.note_save_failure(&error);
        }
        self.node.forget(self.seat.id, self.seat.endpoint, &self.record.image);
    }

    /// The node ends. Who waits in the mailbox is sent away; who waits for an operation still gets its outcome.
    fn drain(&mut self) {
        self.draining = true;
        self.mail.asks.close();
        while let Ok(ask) = self.mail.asks.try_recv() {
            let reason = CLOSING.to_owned();
            match ask {
                Ask::Awake(reply) => drop(reply.send(Err(Refused::StartFailed { reason }.into()))),
                Ask::Suspend(reply) => drop(reply.send(Err(Refused::SuspendFailed { reason }))),
                Ask::Resume(reply) => drop(reply.send(Err(Refused::StartFailed { reason }))),
            }
        }
    }

}

/// Whether there is anything left to drive.
#[derive(PartialEq, Eq)]
enum Life {
    GoesOn,
    Forgotten,
}

/// The machine's no, in the words of the API.
fn refused(refusal: Refusal) -> Refused {
    match refusal {
        Refusal::Asleep => Refused::Asleep,
        Refusal::Terminated => Refused::Terminated,
        // Only outcomes are ever "not now", and nobody asks for those.
        Refusal::NotNow => Refused::Busy,
    }
}

/// The operation with its outcome, once it has one; never, without an operation. Takes it out only when it is done, so
/// that dropping this future loses nothing.
async fn finished(operation: &mut Option<Operation>) -> (Operation, Outcome) {
    let Some(running) = operation else { return std::future::pending().await };
    let kind = running.kind;
    let outcome = (&mut running.task).await.unwrap_or_else(|error| Operation::panicked(kind, error));
    match operation.take() {
        Some(done) => (done, outcome),
        None => std::future::pending().await,
    }
}

/// Like the future, or never.
async fn maybe<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
