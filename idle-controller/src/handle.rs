//! What others hold of a microVM: a way to ask its driver, and a way past the driver while it is awake.
//!
//! Owns: the request path. Never changes a phase: it enters the gate of [`Activity`], or puts a question in the driver's
//! mailbox and waits. A caller that leaves gives up its place at once, wherever it was.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use model::{Clock, EndpointId, Generation, IdlePolicy, ImageName, ImageVersion, MicrovmId, MicrovmState, Port, Usage};
use prometheus::IntGauge;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use vmm_runtime::engine::{DialError, GuestStream, Phases, Vm};

use crate::{
    activity::{Activity, Hold},
    metering::Meter,
    metrics::Counted,
};

/// All that is publicly known of a microVM at one instant.
#[derive(Debug, Clone)]
pub struct MicrovmView {
    /// Its id.
    pub id: MicrovmId,
    /// The first label of its hostname.
    pub endpoint: EndpointId,
    /// What the API shows.
    pub state: MicrovmState,
    /// Why it is as it is, in AWS's words where there are some (aws-behaviour §3.5); `None` while healthy.
    pub state_reason: Option<String>,
    /// The image.
    pub image: ImageName,
    /// Its version.
    pub version: ImageVersion,
    /// When it sleeps.
    pub idle: Option<IdlePolicy>,
    /// See [`crate::RunSpec::max_duration`].
    pub max_duration: Duration,
    /// Wall time of the RunMicrovm call.
    pub started_at: SystemTime,
    /// Wall time of the end.
    pub terminated_at: Option<SystemTime>,
    /// Restores so far.
    pub generation: Generation,
    /// See [`crate::RunSpec::request`].
    pub request: serde_json::Value,
}

/// Why something asked of a microVM was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is asleep and its policy says that traffic does not wake it.
    #[error("the microVM is suspended and its idle policy does not wake it on traffic")]
    Asleep,
    /// It is being ended or has ended.
    #[error("the microVM has been terminated")]
    Terminated,
    /// Waking or launching failed; it is SUSPENDED again (a wake) or TERMINATED (a launch).
    #[error("the microVM could not be started: {reason}")]
    StartFailed {
        /// For people.
        reason: String,
    },
    /// Not awake before the caller's deadline. The wake itself goes on.
    #[error("the microVM was not awake within {waited:?}")]
    TimedOut {
        /// How long the caller waited.
        waited: Duration,
    },
    /// Too many wait for it already, or the node is full.
    #[error("too many requests wait for this microVM")]
    Busy,
    /// A suspend was asked for and could not be done; the microVM runs on.
    #[error("the microVM could not be suspended: {reason}")]
    SuspendFailed {
        /// For people.
        reason: String,
    },
}

/// What callers read who come while the node ends.
pub(crate) const CLOSING: &str = "this node is shutting down";

/// A question to the driver.
pub(crate) enum Ask {
    /// Awake, please; I wait.
    Awake(oneshot::Sender<Result<Grant, Denial>>),
    /// The API's SuspendMicrovm.
    Suspend(oneshot::Sender<Result<(), Refused>>),
    /// The API's ResumeMicrovm.
    Resume(oneshot::Sender<Result<(), Refused>>),
}

/// The API's TerminateMicrovm, on a way of its own; answered when it is on stable storage.
pub(crate) type Kill = oneshot::Sender<()>;

/// The driver's yes to one who waited. Holds the microVM from the instant it is given, so that it cannot fall asleep
/// between the answer and the caller's next step; if the caller has left, dropping it undoes that.
pub(crate) struct Grant {
    pub(crate) hold: Hold,
    pub(crate) live: Arc<Live>,
    /// The steps of the wake.
    pub(crate) phases: Option<Arc<Phases>>,
}

/// The driver's no to one who waited.
#[derive(Debug)]
pub(crate) struct Denial {
    pub(crate) refused: Refused,
    /// The steps of a wake that failed.
    pub(crate) phases: Phases,
}

impl From<Refused> for Denial {
    fn from(refused: Refused) -> Self {
        Self { refused, phases: Vec::new() }
    }
}

/// One generation of a running microVM.
pub(crate) struct Live {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) generation: Generation,
}

/// What the driver and all handles of one microVM share.
pub(crate) struct Seat {
    pub(crate) id: MicrovmId,
    pub(crate) endpoint: EndpointId,
    pub(crate) activity: Arc<Activity>,
    /// What it uses.
    pub(crate) meter: Arc<Meter>,
    /// Set by the driver before it opens the gate.
    pub(crate) live: ArcSwapOption<Live>,
    pub(crate) view: watch::Receiver<MicrovmView>,
    pub(crate) asks: mpsc::Sender<Ask>,
    pub(crate) kills: mpsc::Sender<Kill>,
    /// One permit per request that may wait.
    pub(crate) places: Semaphore,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) requests_waiting: IntGauge,
}

/// One microVM. Cheap to clone; outlives the microVM harmlessly.
#[derive(Clone)]
pub struct MicrovmHandle {
    seat: Arc<Seat>,
}

impl fmt::Debug for MicrovmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MicrovmHandle").field(&self.seat.id).finish()
    }
}

impl MicrovmHandle {
    pub(crate) fn new(seat: Arc<Seat>) -> Self {
        Self { seat }
    }

    /// Its id.
    pub fn id(&self) -> MicrovmId {
        self.seat.id
    }

    /// What it has used until now.
    pub fn usage(&self) -> Usage {
        self.seat.meter.usage(self.seat.clock.now())
    }

    pub(crate) fn metered(&self) -> (MicrovmId, Arc<Meter>, Option<Arc<Live>>) {
        (self.seat.id, Arc::clone(&self.seat.meter), self.seat.live.load_full())
    }

    pub(crate) fn endpoint(&self) -> EndpointId {
        self.seat.endpoint
    }

    /// The state of things now.
    pub fn view(&self) -> MicrovmView {
        self.seat.view.borrow().clone()
    }

    /// Of the same, what the API shows.
    pub fn state(&self) -> MicrovmState {
        self.seat.view.borrow().state
    }

    /// For the request path, where the microVM is awake. Wakes nobody and waits for nothing.
    pub fn awake_already(&self) -> Option<Awake> {
        let seat = &self.seat;
        let hold = seat.activity.enter()?;
        let live = seat.live.load_full()?;
        Some(Awake { hold, live, meter: Arc::clone(&seat.meter), woke: None })
    }

    /// For the request path: awake already, or woken now (one wake for all who ask; design §4 rule 2). Dropping the
    /// future gives up the caller's place and does not cancel the wake.
    pub async fn awake(&self, deadline: Instant) -> Result<Awake, Refused> {
        self.awake_or_why(deadline).await.map_err(|unwoken| unwoken.refused)
    }

    /// The same, and how the wake went for one who waited in vain.
    pub async fn awake_or_why(&self, deadline: Instant) -> Result<Awake, Unwoken> {
        if let Some(awake) = self.awake_already() {
            return Ok(awake);
        }
        let seat = &self.seat;
        // Freed when this future ends or is dropped: a client that leaves frees its place at once.
        let _place = seat.places.try_acquire().map_err(|_| Unwoken::at_once(Refused::Busy))?;
        let _counted = Counted::new(&seat.requests_waiting);
        let began = seat.clock.now();
        let (reply, answer) = oneshot::channel();
        seat.asks.try_send(Ask::Awake(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Unwoken::at_once(Refused::Busy),
            mpsc::error::TrySendError::Closed(_) => Unwoken::at_once(self.nobody_drives()),
        })?;
        let answer = tokio::time::timeout(deadline.saturating_duration_since(began), answer).await;
        let waited = seat.clock.now().saturating_duration_since(began);
        let answer = answer.map_err(|_| Refused::TimedOut { waited }.into());
        let answer = answer.and_then(|answer| answer.unwrap_or_else(|_| Err(self.nobody_drives().into())));
        let grant = answer.map_err(|Denial { refused, phases }| Unwoken { refused, report: WakeReport { waited, phases } })?;
        let woke = grant.phases.map(|phases| WakeReport { waited, phases: Phases::clone(&phases) });
        Ok(Awake { hold: grant.hold, live: grant.live, meter: Arc::clone(&seat.meter), woke })
    }

    /// Asked for by the API. `Ok` when it is accepted; the state goes through SUSPENDING.
    pub async fn suspend(&self) -> Result<(), Refused> {
        self.ask(Ask::Suspend).await.unwrap_or_else(|| match self.nobody_drives() {
            Refused::Terminated => Err(Refused::Terminated),
            _ => Err(Refused::SuspendFailed { reason: CLOSING.to_owned() }),
        })
    }

    /// Asked for by the API, whatever the policy says of traffic.
    pub async fn resume(&self) -> Result<(), Refused> {
        self.ask(Ask::Resume).await.unwrap_or_else(|| Err(self.nobody_drives()))
    }

    /// Asked for by the API. Harmless if it has ended.
    pub async fn terminate(&self) -> Result<(), Refused> {
        let (reply, answer) = oneshot::channel();
        if self.seat.kills.send(reply).await.is_ok() && answer.await.is_ok() {
            return Ok(());
        }
        match self.nobody_drives() {
            Refused::Terminated => Ok(()),
            // The node ends, and the microVM runs on for the next start.
            _ => Err(Refused::Busy),
        }
    }

    /// Returns when `done` says so of a view (with that view), or when the microVM is terminated. When the controller
    /// closes before either, returns the last view.
    pub async fn wait_until(&self, done: impl Fn(&MicrovmView) -> bool + Send) -> MicrovmView {
        let mut views = self.seat.view.clone();
        let found = views.wait_for(move |view| view.state == MicrovmState::Terminated || done(view)).await.map(|view| view.clone());
        found.unwrap_or_else(|_closed| self.view())
    }

    /// `None`: nobody is there to answer.
    async fn ask(&self, ask: impl FnOnce(oneshot::Sender<Result<(), Refused>>) -> Ask) -> Option<Result<(), Refused>> {
        let (reply, answer) = oneshot::channel();
        self.seat.asks.send(ask(reply)).await.ok()?;
        answer.await.ok()
    }

    /// What it means that the driver has gone: its microVM has, or the node is going.
    fn nobody_drives(&self) -> Refused {
        match self.state() {
            MicrovmState::Terminating | MicrovmState::Terminated => Refused::Terminated,
            MicrovmState::Pending | MicrovmState::Running | MicrovmState::Suspending | MicrovmState::Suspended => {
                Refused::StartFailed { reason: CLOSING.to_owned() }
            }
        }
    }
}

/// How a wake went, for the one who had to wait for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WakeReport {
    /// How long this caller waited.
    pub waited: Duration,
    /// The steps of the wake, which began when its first caller came: `take-back` (waiting for a suspend that was under
    /// way), `queue` (for a start slot), the engine's own, `hook` (the app's answer to `/run` or `/resume`), `record` (making the
    /// new state durable).
    pub phases: Phases,
}

/// Why a caller got no [`Awake`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwoken {
    /// The reason.
    pub refused: Refused,
    /// What it waited, and for what: of a wake that failed the same steps as of one that succeeded, and `failed` for the rest.
    pub report: WakeReport,
}

impl Unwoken {
    fn at_once(refused: Refused) -> Self {
        Self { refused, report: WakeReport { waited: Duration::ZERO, phases: Vec::new() } }
    }
}

/// Leave to talk to an awake microVM, and the promise that its idle clock cannot fire meanwhile: a *hold*. While it is
/// held in [`Awake::computing`] mode (the start), the microVM counts as busy (design §3: a request whose answer is still
/// being computed is activity); after [`Awake::streaming`] only [`Awake::touch`] counts.
pub struct Awake {
    hold: Hold,
    live: Arc<Live>,
    meter: Arc<Meter>,
    woke: Option<WakeReport>,
}

impl fmt::Debug for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Awake").field("generation", &self.live.generation).field("woke", &self.woke).finish_non_exhaustive()
    }
}

impl Awake {
    /// The restore it belongs to.
    pub fn generation(&self) -> Generation {
        self.live.generation
    }

    /// `Some` if this caller waited for a launch or a wake.
    pub fn woke(&self) -> Option<&WakeReport> {
        self.woke.as_ref()
    }

    /// A stream to a port of the guest.
    pub async fn dial(&self, port: Port) -> Result<GuestStream, DialError> {
        Ok(self.meter.counting(self.live.vm.dial(port).await?))
    }

    /// A stream to a new shell of the guest agent's.
    pub async fn dial_shell(&self) -> Result<GuestStream, DialError> {
        Ok(self.meter.counting(self.live.vm.dial_shell().await?))
    }

    /// Whether bytes for the guest would have to wait for a wake (and would cause one).
    pub fn is_asleep(&self) -> bool {
        self.hold.is_shut_out()
    }

    /// Bytes crossed the endpoint: one atomic store.
    pub fn touch(&self) {
        self.hold.touch();
    }

    /// The answer has begun: from now on only bytes count as activity.
    pub fn streaming(&self) {
        self.hold.streaming();
    }

    /// The opposite, for a connection that carries one request after another.
    pub fn computing(&self) {
        self.hold.computing();
    }
}
