//! One VMM process with one guest.

use std::{
    any::Any,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use model::{Door, Generation, MicrovmId, Port, Shape};
use parking_lot::Mutex;
use protocol::{
    agent::{Event, Reply, Request, Role},
    link::{AgentLink, LinkError},
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Backend, Image, Layers, Limits, Shared,
    egress::{Egress, Traffic},
    failed,
    process::Process,
    record,
    roles::{Follower, Granted},
    suspend, vmm_exit,
};
use crate::engine::{DialError, EngineError, Exit, GuestStream, SuspendOutcome, Usage, Vm};

/// Of the console, this much is quoted.
const CONSOLE_TAIL_BYTES: usize = 2048;
/// What the answer to a readiness question may take on top of the guest's own waiting.
const ANSWER_SLACK: Duration = Duration::from_secs(5);
/// For a guest to take credentials. A suspend waits for it.
const GRANT_LIMIT: Duration = Duration::from_secs(1);

/// Whether it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Life {
    Running,
    /// Its snapshot is committed.
    Suspended,
    Killed,
    Exited(Exit),
}

/// What it is.
pub(super) enum Kind {
    /// A guest booted for an image.
    Build { root_disk: PathBuf, shape: Shape, exposed: Vec<Port> },
    /// A clone.
    Microvm { id: MicrovmId, generation: Generation, image: Arc<Image>, layers: tokio::sync::Mutex<Layers> },
}

/// Everything of it that tasks share.
pub(super) struct Core<B: Backend> {
    pub shared: Arc<Shared<B>>,
    pub kind: Kind,
    pub dir: PathBuf,
    pub process: Process,
    pub vmm: B::Vmm,
    pub link: Arc<AgentLink>,
    pub life: watch::Sender<Life>,
    /// The link goes on in a restored microVM and is no business of this one any more; or it has gone back.
    pub handed_over: AtomicBool,
    /// Who gets the link back if this one ends before its streams have gone on.
    pub predecessor: Mutex<Option<Arc<Self>>>,
    /// One suspend or capture at a time.
    pub operation: tokio::sync::Mutex<()>,
    /// The way out of the guest, while it has one.
    pub egress: Mutex<Option<Egress>>,
    /// Its execution role, if it has one.
    role: Option<Granted>,
    /// What has crossed it.
    traffic: Arc<Traffic>,
    /// Counters as they were when they could last be had.
    last_usage: Mutex<Usage>,
}

impl<B: Backend> Core<B> {
    /// One that runs.
    pub fn new(shared: &Arc<Shared<B>>, kind: Kind, dir: PathBuf, process: Process, vmm: B::Vmm, link: Arc<AgentLink>) -> Self {
        Self {
            shared: shared.clone(),
            kind,
            dir,
            process,
            vmm,
            link,
            life: watch::Sender::new(Life::Running),
            handed_over: false.into(),
            predecessor: Mutex::default(),
            operation: tokio::sync::Mutex::new(()),
            egress: Mutex::default(),
            role: None,
            traffic: Arc::default(),
            last_usage: Mutex::default(),
        }
    }

    /// Lets the guest connect to what its policy says, from now on.
    pub fn lead_out(self, egress: model::Egress) -> Self {
        if egress == model::Egress::Internet {
            let started = Egress::start(self.link.clone(), self.shared.config.egress.clone(), self.traffic.clone());
            *self.egress.lock() = Some(started);
        }
        self
    }

    /// Tells the guest, from now on, when what its role gives is something else.
    pub fn with_role(self, role: Option<Granted>) -> Self {
        Self { role, ..self }
    }

    pub fn limits(&self) -> &Limits {
        &self.shared.config.limits
    }

    /// `false` if it had ended before.
    pub fn end(&self, how: Life) -> bool {
        self.life.send_if_modified(|life| {
            let running = *life == Life::Running;
            if running {
                *life = how;
            }
            running
        })
    }

    pub fn ensure_running(&self, step: &'static str) -> Result<(), EngineError> {
        match &*self.life.borrow() {
            Life::Running => Ok(()),
            Life::Suspended => Err(EngineError::Host { what: format!("{step}: the microVM is asleep") }),
            Life::Killed => Err(EngineError::Ended { step, exit: Exit::Vmm { detail: "it was killed".to_owned() } }),
            Life::Exited(exit) => Err(EngineError::Ended { step, exit: exit.clone() }),
        }
    }

    /// After a broken exchange, which is most often the first sign of an end that is about to be told properly.
    async fn ensure_still_running(&self, step: &'static str) -> Result<(), EngineError> {
        let _ = tokio::time::timeout(ANSWER_SLACK, self.over()).await;
        self.ensure_running(step)
    }

    /// Ends the process and waits until nothing of it can touch a file, then forgets it.
    pub async fn end_process(&self) {
        let limit = self.limits().kill;
        self.process.kill(limit).await;
        if tokio::time::timeout(limit, self.shared.backend.gone(&self.vmm)).await.is_err() {
            tracing::error!(pid = self.process.pid(), ?limit, "what a killed VMM process has started does not end");
        }
        self.forget_process();
    }

    /// The link is no business of this process any more: its streams end, or are parked again where they came from if they
    /// have not moved here.
    fn let_go_of_link(&self) {
        if self.handed_over.load(Ordering::Acquire) {
            return;
        }
        let before = self.predecessor.lock().take();
        match before {
            Some(before) if self.link.park_again() => {
                self.handed_over.store(true, Ordering::Release);
                before.handed_over.store(false, Ordering::Release);
            }
            _ => self.link.close(),
        }
    }

    /// The newest lines of the serial console, or nothing.
    pub async fn console_tail(&self) -> String {
        console_tail(&self.shared.backend, &self.vmm).await
    }

    /// Freezes the app and silences the channel.
    pub async fn quiesce(&self) -> Result<(), EngineError> {
        let limit = self.limits().quiesce;
        match self.link.quiesce(limit).await {
            Ok(()) => Ok(()),
            Err(LinkError::Timeout(_)) => {
                let detail = self.console_tail().await;
                Err(EngineError::GuestTimeout { step: "freeze the app", limit, detail })
            }
            Err(error) => {
                self.ensure_still_running("freezing the app").await?;
                Err(failed("freezing the app", error))
            }
        }
    }

    /// Forgets the process. For when it has ended.
    fn forget_process(&self) {
        // A later generation may have its own record there by now.
        let ours = record::of_microvm(&self.dir).ok().flatten().is_some_and(|record| record.identity == *self.process.identity());
        if ours {
            record::remove(&self.dir);
        }
        self.process.remove_dir();
    }

    /// Tells the guest what its role gives whenever that has changed. Never returns.
    async fn follow_role(&self) {
        let (Some(role), Some(file)) = (&self.role, &self.shared.config.roles) else { return std::future::pending().await };
        let mut follower = Follower::new(role, file);
        loop {
            let role = follower.news().await;
            if self.grant(&role).await {
                follower.told(role);
            }
        }
    }

    /// Whether the guest knows now what its role gives. Not while a suspend is under way: the wake tells it.
    async fn grant(&self, role: &Role) -> bool {
        let Ok(_operation) = self.operation.try_lock() else { return false };
        if *self.life.borrow() != Life::Running {
            return false;
        }
        match self.link.call(Request::Role(role.clone()), GRANT_LIMIT).await {
            Ok(Reply::Done) => true,
            // The reply and the error hold no secret.
            other => {
                tracing::warn!(dir = %self.dir.display(), ?other, "a guest could not be told the new credentials of its role; it is tried again");
                false
            }
        }
    }

    /// Returns when it does not run any more, for whatever reason.
    async fn over(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.life.subscribe().wait_for(|life| *life != Life::Running).await;
    }

    /// Waits for an end that nobody asked for, and says so; or for one that somebody asked for.
    async fn watch(&self) {
        let exit = tokio::select! {
            // An end that was asked for comes first; the app's own word goes before what its end does to the VMM.
            biased;
            () = self.over() => return,
            Event::AppExited { code } = self.link.event() => Exit::App { code },
            () = self.process.ended() => vmm_exit(&self.process, "the VMM ended"),
            how = self.shared.backend.stopped(&self.vmm) => Exit::Vmm { detail: format!("{how}{}", self.console_tail().await) },
            () = self.link.lost() => {
                // Usually the first sign of a dead process.
                match tokio::time::timeout(Duration::from_secs(1), self.process.ended()).await {
                    Ok(()) => vmm_exit(&self.process, "the VMM ended"),
                    Err(_) => Exit::Vmm { detail: format!("the channel to the guest agent broke{}", self.console_tail().await) },
                }
            }
        };
        let vmm_is_useless = matches!(exit, Exit::Vmm { .. });
        if self.end(Life::Exited(exit.clone())) {
            *self.egress.lock() = None;
            tracing::info!(dir = %self.dir.display(), ?exit, "a microVM ended by itself");
            if vmm_is_useless {
                self.let_go_of_link();
                self.end_process().await;
            }
        }
    }
}

/// The newest lines of the serial console as the detail of an error: empty, or `: ` and the lines.
pub(super) async fn console_tail<B: Backend>(backend: &B, vmm: &B::Vmm) -> String {
    let text = backend.console(vmm).await;
    let mut from = text.len().saturating_sub(CONSOLE_TAIL_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    let lines: Vec<String> = text[from..].lines().map(|line| line.trim().escape_debug().to_string()).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { String::new() } else { format!(": {}", lines.join(" | ")) }
}

/// A microVM in a process of its own. Dropping it leaves the process running, to be adopted.
pub struct ProcessVm<B: Backend> {
    core: Arc<Core<B>>,
    /// Ends the watching.
    _watching: DropGuard,
}

impl<B: Backend> ProcessVm<B> {
    pub(super) fn new(core: Core<B>) -> Arc<Self> {
        let core = Arc::new(core);
        let stop = CancellationToken::new();
        let (watched, stopped) = (core.clone(), stop.clone());
        // Ends with the life it watches, or with this handle.
        tokio::spawn(async move {
            tokio::select! {
                () = watched.watch() => {}
                () = watched.follow_role() => {}
                () = stopped.cancelled() => {}
            }
        });
        Arc::new(Self { core, _watching: stop.drop_guard() })
    }

    pub(super) fn core(&self) -> &Arc<Core<B>> {
        &self.core
    }

    /// The connection to the VMM.
    pub(crate) fn vmm(&self) -> &B::Vmm {
        &self.core.vmm
    }

    /// Number of the VMM process.
    pub fn pid(&self) -> i32 {
        self.core.process.pid()
    }

    /// Streams that are open.
    pub fn open_streams(&self) -> usize {
        self.core.link.streams()
    }

    /// `CLOCK_REALTIME` in the guest, in nanoseconds since the epoch; also shows that its agent answers.
    pub async fn guest_realtime_ns(&self) -> Result<u64, EngineError> {
        match self.core.link.call(Request::Stats, self.core.limits().command).await {
            Ok(Reply::Stats { realtime_ns, .. }) => Ok(realtime_ns),
            Ok(other) => Err(failed("asking the agent for its counters", format!("it answered {other:?}"))),
            Err(error) => Err(failed("asking the agent for its counters", error)),
        }
    }

    async fn open(&self, door: Door) -> Result<GuestStream, DialError> {
        match &*self.core.life.borrow() {
            Life::Running => {}
            Life::Suspended => return Err(DialError::Asleep),
            Life::Killed | Life::Exited(_) => return Err(DialError::Gone),
        }
        let limit = self.core.limits().dial;
        match self.core.link.open(door, limit).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(error) => Err(self.not_open(door, limit, &error)),
        }
    }

    fn not_open(&self, door: Door, limit: Duration, error: &LinkError) -> DialError {
        match (&*self.core.life.borrow(), error) {
            (Life::Killed | Life::Exited(_), _) => DialError::Gone,
            (Life::Suspended, _) => DialError::Asleep,
            (Life::Running, LinkError::Refused(port)) => DialError::Refused { port: *port },
            (Life::Running, LinkError::NoShell | LinkError::NoEgress) => DialError::NoShell,
            (Life::Running, LinkError::Timeout(_)) => DialError::Timeout { door, limit },
            // Freezing has begun, or the process is dying; the controller finds out which when it asks again.
            (Life::Running, LinkError::Closed) => DialError::Asleep,
            (Life::Running, LinkError::Protocol(_) | LinkError::Agent(_)) => {
                tracing::warn!(dir = %self.core.dir.display(), %error, "a stream to a guest could not be opened");
                DialError::Timeout { door, limit }
            }
        }
    }
}

impl<B: Backend> Drop for ProcessVm<B> {
    fn drop(&mut self) {
        // The channel's tasks would keep it connected, and whoever adopts the process could not connect.
        self.core.let_go_of_link();
    }
}

#[async_trait]
impl<B: Backend> Vm for ProcessVm<B> {
    async fn dial(&self, port: Port) -> Result<GuestStream, DialError> {
        self.open(Door::Port(port)).await
    }

    async fn dial_shell(&self) -> Result<GuestStream, DialError> {
        self.open(Door::Shell).await
    }

    async fn ready(&self, limit: Duration) -> Result<Port, EngineError> {
        const STEP: &str = "waiting for the app to listen";
        self.core.ensure_running(STEP)?;
        let exposed = match &self.core.kind {
            Kind::Build { exposed, .. } => exposed.clone(),
            Kind::Microvm { image, .. } => image.manifest.exposed.clone(),
        };
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let reply = tokio::select! {
            biased;
            () = self.core.over() => {
                self.core.ensure_running(STEP)?;
                return Err(EngineError::Host { what: format!("{STEP}: the microVM's life is unclear") });
            }
            reply = self.core.link.call(Request::AwaitReady { exposed, limit_ms }, limit.saturating_add(ANSWER_SLACK)) => reply,
        };
        match reply {
            Ok(Reply::Ready(port)) => Ok(port),
            Ok(Reply::NotReady) | Err(LinkError::Timeout(_)) => {
                let detail = self.core.console_tail().await;
                Err(EngineError::GuestTimeout { step: "listen on a port", limit, detail })
            }
            Ok(other) => Err(failed(STEP, format!("the guest agent answered {other:?}"))),
            Err(error) => {
                self.core.ensure_still_running(STEP).await?;
                Err(failed(STEP, error))
            }
        }
    }

    async fn suspend(&self, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
        // A caller that gives up takes the suspend back; it never leaves it half done.
        let cancel = cancel.child_token();
        let _given_up = cancel.clone().drop_guard();
        let core = self.core.clone();
        match tokio::spawn(suspend::suspend(core, cancel)).await {
            Ok(outcome) => outcome,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(failed("suspending", error)),
            },
        }
    }

    fn release_streams(&self) {
        if *self.core.life.borrow() == Life::Running {
            self.core.predecessor.lock().take();
            self.core.link.release_streams();
        }
    }

    async fn parked_write(&self) {
        self.core.link.parked_write().await;
        if self.core.handed_over.load(Ordering::Acquire) {
            std::future::pending().await
        }
    }

    async fn kill(&self) {
        *self.core.egress.lock() = None;
        let had_process = self.core.end(Life::Killed) || matches!(*self.core.life.borrow(), Life::Exited(_));
        if had_process {
            self.core.end_process().await;
        }
        self.core.let_go_of_link();
    }

    async fn exited(&self) -> Exit {
        self.core.over().await;
        let life = self.core.life.borrow().clone();
        match life {
            Life::Exited(exit) => exit,
            _ => std::future::pending().await,
        }
    }

    async fn usage(&self) -> Usage {
        let now = self.core.shared.backend.usage(&self.core.process, &self.core.vmm).await;
        let (sent, received) = self.core.traffic.bytes();
        let now = now.map(|now| Usage { net_sent_bytes: now.net_sent_bytes + sent, net_received_bytes: now.net_received_bytes + received, ..now });
        let mut last = self.core.last_usage.lock();
        if let Some(now) = now {
            *last = Usage { cpu_micros: now.cpu_micros.max(last.cpu_micros), ..now };
        }
        *last
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
