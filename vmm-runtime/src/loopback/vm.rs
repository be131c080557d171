//! One loopback microVM.

use std::{
    any::Any,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Door, Generation, MicrovmId, Port, Shape};
use parking_lot::Mutex;
use tokio::{net::TcpStream, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    Booted, DIAL_LIMIT, SHELL, World, commit,
    streams::{Flow, Streams},
};
use crate::engine::{DialError, EngineError, Exit, GuestStream, SnapshotRecord, SuspendOutcome, Usage, Vm};

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// Killed, swept or captured.
    Asked,
    /// Ended by the commit of a suspend.
    Suspended,
    /// By itself.
    Unasked(Exit),
}

/// What outlives a restart of `serve`: one awake generation of one microVM.
pub(super) struct Process {
    pub generation: Generation,
    dir: PathBuf,
    booted: Option<Booted>,
    started: Instant,
    end: watch::Sender<Option<End>>,
    /// One suspend at a time.
    suspending: tokio::sync::Mutex<()>,
}

impl Process {
    pub fn new(dir: PathBuf, generation: Generation) -> Arc<Self> {
        Self::with(dir, generation, None)
    }

    pub fn booted(dir: PathBuf, root_disk: PathBuf, shape: Shape) -> Arc<Self> {
        Self::with(dir, Generation(0), Some((root_disk, shape)))
    }

    fn with(dir: PathBuf, generation: Generation, booted: Option<Booted>) -> Arc<Self> {
        let (end, suspending) = (watch::Sender::new(None), tokio::sync::Mutex::new(()));
        Arc::new(Self { generation, dir, booted, started: Instant::now(), end, suspending })
    }

    /// `false` if it had ended before.
    pub fn end(&self, how: End) -> bool {
        self.end.send_if_modified(|end| {
            let alive = end.is_none();
            if alive {
                *end = Some(how);
            }
            alive
        })
    }

    fn ended(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// Never returns on a suspend.
    async fn gone(&self) -> End {
        let mut end = self.end.subscribe();
        loop {
            match end.borrow_and_update().clone() {
                Some(End::Suspended) => break,
                Some(end) => return end,
                None => {}
            }
            if end.changed().await.is_err() {
                break;
            }
        }
        std::future::pending().await
    }
}

/// Whose business the streams are.
#[derive(Default)]
pub(super) struct Tenure {
    /// They go on in a restored microVM and are no business of this one any more.
    over: AtomicBool,
    /// Who gets them back if this one ends before they have gone on.
    before: Mutex<Option<Arc<Tenure>>>,
}

impl Tenure {
    /// The process has ended.
    fn end(&self, streams: &Streams) {
        let mut before = self.before.lock();
        if self.over.load(Ordering::Acquire) {
            return;
        }
        match before.take() {
            Some(before) => {
                streams.set(Flow::Parked);
                self.over.store(true, Ordering::Release);
                before.over.store(false, Ordering::Release);
            }
            None => streams.set(Flow::Gone),
        }
    }
}

/// One loopback microVM, or a booted guest of an image build.
pub struct LoopbackVm {
    world: Arc<World>,
    id: Option<MicrovmId>,
    process: Arc<Process>,
    streams: Arc<Streams>,
    tenure: Arc<Tenure>,
    exposed: Vec<Port>,
}

impl LoopbackVm {
    pub(super) fn new(world: Arc<World>, id: Option<MicrovmId>, process: Arc<Process>, streams: Arc<Streams>, exposed: Vec<Port>) -> Arc<Self> {
        let vm = Arc::new(Self { world, id, process, streams, tenure: Arc::default(), exposed });
        let (process, streams, tenure) = (vm.process.clone(), Arc::downgrade(&vm.streams), vm.tenure.clone());
        // Ends with the process; it holds the streams weakly, so it keeps nothing alive.
        tokio::spawn(async move {
            process.gone().await;
            if let Some(streams) = streams.upgrade() {
                tenure.end(&streams);
            }
        });
        vm
    }

    pub(super) fn booted(&self) -> Option<Booted> {
        self.process.booted.clone()
    }

    /// Hands over the streams, if they wait for a restore. They are handed over once, unless they come back.
    pub(super) fn take_parked_streams(&self) -> Option<(Arc<Streams>, Arc<Tenure>)> {
        let parked = self.process.ended() == Some(End::Suspended) && self.streams.flow() == Flow::Parked;
        (parked && !self.tenure.over.swap(true, Ordering::AcqRel)).then(|| (self.streams.clone(), self.tenure.clone()))
    }

    /// These streams came from there, and are held.
    pub(super) fn took(&self, from: Arc<Tenure>) {
        *self.tenure.before.lock() = Some(from);
    }

    /// Streams that are open now.
    pub fn open_streams(&self) -> usize {
        self.streams.open()
    }

    pub(super) fn ensure_alive(&self, step: &'static str) -> Result<(), EngineError> {
        match self.process.ended() {
            None => Ok(()),
            Some(End::Unasked(exit)) => Err(EngineError::Ended { step, exit }),
            Some(End::Asked) => Err(EngineError::Ended { step, exit: Exit::Vmm { detail: "it was killed".to_owned() } }),
            Some(End::Suspended) => Err(EngineError::Host { what: format!("{step}: the microVM is asleep") }),
        }
    }

    fn forget(&self) {
        if let Some(id) = self.id {
            let mut processes = self.world.processes.lock();
            if processes.get(&id).is_some_and(|process| Arc::ptr_eq(process, &self.process)) {
                processes.remove(&id);
            }
        }
    }

    async fn write_snapshot(&self, cancel: &CancellationToken) -> Result<Option<SnapshotRecord>, EngineError> {
        let begun = Instant::now();
        tokio::select! {
            // A suspend that may go on and is cancelled is taken back.
            biased;
            () = cancel.cancelled() => return Ok(None),
            _ = self.process.gone() => {}
            () = self.world.suspend_gate.pass() => {}
        }
        self.ensure_alive("suspend")?;
        if let Some(error) = self.world.fail_suspends.lock().pop_front() {
            if let EngineError::Ended { exit, .. } = &error {
                self.forget();
                self.process.end(End::Unasked(exit.clone()));
            }
            return Err(error);
        }
        let mut record = SnapshotRecord { generation: self.process.generation, memory_bytes: 4096, disk_bytes: 0, phases: Vec::new() };
        commit(&self.process.dir, record.clone())?;
        record.phases = vec![("loopback", begun.elapsed())];
        Ok(Some(record))
    }
}

#[async_trait]
impl Vm for LoopbackVm {
    async fn dial(&self, port: Port) -> Result<GuestStream, DialError> {
        self.world.count(|counts| counts.dials += 1);
        let begun = Instant::now();
        let connect = async {
            self.world.dial_gate.pass().await;
            let address = self.world.ports.borrow().get(&port).copied().ok_or(io::ErrorKind::ConnectionRefused)?;
            TcpStream::connect(address).await
        };
        let connected = tokio::select! {
            connected = tokio::time::timeout(DIAL_LIMIT, connect) => connected,
            _ = self.process.gone() => return Err(DialError::Gone),
        };
        match (self.process.ended(), self.streams.flow()) {
            (None, Flow::Flowing | Flow::Held) => {}
            (None | Some(End::Suspended), _) => return Err(DialError::Asleep),
            (Some(_), _) => return Err(DialError::Gone),
        }
        match connected {
            Ok(Ok(stream)) => {
                // Small writes of tests and protocols alike must not wait for an ACK.
                let _ = stream.set_nodelay(true);
                Ok(Box::pin(self.streams.connect(stream)))
            }
            Ok(Err(_)) => Err(DialError::Refused { port }),
            Err(_) => Err(DialError::Timeout { door: Door::Port(port), limit: begun.elapsed() }),
        }
    }

    /// Whatever a test has put at [`SHELL`].
    async fn dial_shell(&self) -> Result<GuestStream, DialError> {
        match self.dial(SHELL).await {
            Err(DialError::Refused { .. }) => Err(DialError::NoShell),
            other => other,
        }
    }

    async fn ready(&self, limit: Duration) -> Result<Port, EngineError> {
        let mut ports = self.world.ports.subscribe();
        let found = async {
            loop {
                let port = {
                    let ports = ports.borrow_and_update();
                    let mut listening = ports.keys().copied().filter(|port| self.exposed.is_empty() || self.exposed.contains(port));
                    listening.next()
                };
                match port {
                    Some(port) => return port,
                    // The sender lives in the world, which this keeps alive.
                    None => _ = ports.changed().await,
                }
            }
        };
        tokio::select! {
            found = tokio::time::timeout(limit, found) => {
                found.map_err(|_| EngineError::GuestTimeout { step: "listen on a port", limit, detail: String::new() })
            }
            _ = self.process.gone() => self.ensure_alive("waiting for the app").and(Err(EngineError::Host { what: "wait for a microVM that is gone".to_owned() })),
        }
    }

    async fn suspend(&self, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
        self.world.count(|counts| counts.suspends += 1);
        let _one = self.process.suspending.lock().await;
        self.ensure_alive("suspend")?;
        self.streams.set(Flow::Parked);
        let mut undo = Unpark { streams: Some(&self.streams) };
        match self.write_snapshot(&cancel).await {
            Ok(Some(record)) => {
                undo.streams = None;
                self.forget();
                self.process.end(End::Suspended);
                self.world.committed_gate.pass().await;
                Ok(SuspendOutcome::Suspended(record))
            }
            Ok(None) => {
                self.world.count(|counts| counts.taken_back += 1);
                Ok(SuspendOutcome::TakenBack)
            }
            Err(error) => Err(error),
        }
    }

    fn release_streams(&self) {
        self.tenure.before.lock().take();
        if self.process.ended().is_none() && self.streams.flow() == Flow::Held {
            self.streams.set(Flow::Flowing);
        }
    }

    async fn parked_write(&self) {
        self.streams.parked_write().await;
        if self.tenure.over.load(Ordering::Acquire) {
            std::future::pending().await
        }
    }

    async fn kill(&self) {
        self.forget();
        let was_alive = self.process.end(End::Asked);
        if was_alive {
            self.world.count(|counts| counts.kills += 1);
        }
        self.tenure.end(&self.streams);
    }

    async fn exited(&self) -> Exit {
        match self.process.gone().await {
            End::Unasked(exit) => exit,
            End::Asked | End::Suspended => std::future::pending().await,
        }
    }

    async fn usage(&self) -> Usage {
        Usage { cpu_micros: u64::try_from(self.process.started.elapsed().as_micros()).unwrap_or(u64::MAX), private_bytes: 4096, ..Usage::default() }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Holds the streams, which are parked no longer, when a suspend does not reach its commit, also when its future is dropped.
struct Unpark<'a> {
    streams: Option<&'a Streams>,
}

impl Drop for Unpark<'_> {
    fn drop(&mut self) {
        if let Some(streams) = self.streams {
            streams.set(Flow::Held);
        }
    }
}
