//! A loopback engine whose streams have their first bytes at hand when they are dialled: the guest that is always faster
//! than the gateway, which pingora issue #946 needs to show itself. Or whose streams never come. Or whose app closes a
//! connection just when it is used again. Or whose app says something at the very moment that a test chooses.

use std::{
    any::Any,
    io::Cursor,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use model::{Generation, MicrovmId, Port};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    engine::{
        BootSpec, ByteStream, DialError, Engine, EngineError, Exit, GuestStream, ImageSnapshot, LaunchSpec, RestoreSpec, SnapshotRecord, Started,
        SuspendOutcome, Usage, Vm,
    },
    loopback::LoopbackEngine,
};

pub struct EagerEngine(pub LoopbackEngine, pub Dials);

/// How dials go.
#[derive(Clone)]
pub enum Dials {
    /// The app's first bytes are at hand.
    Eager,
    /// None returns once `silent` is set; those that were begun and those that were given up are counted.
    Silent { silent: Arc<AtomicBool>, begun: Arc<AtomicUsize>, given_up: Arc<AtomicUsize> },
    /// Once `closes` is set, the next write to a stream that was written to before crosses the app's close. Whether the guest
    /// is certain that nobody has seen what was written is `certain`. The gateway reads the end once it has written `late` bytes
    /// more.
    Closing { closes: Arc<AtomicBool>, certain: bool, late: u64 },
    /// What is put into the queue comes from the app as well.
    Prompted(Arc<Prompt>),
}

/// What an app is made to say, and what it is told.
pub struct Prompt {
    pub says: UnboundedSender<Vec<u8>>,
    /// How much of it was read.
    pub said: AtomicUsize,
    /// All bytes that were written to its streams.
    pub told: Mutex<Vec<u8>>,
    queue: Mutex<UnboundedReceiver<Vec<u8>>>,
}

impl Prompt {
    pub fn new() -> Arc<Self> {
        let (says, queue) = mpsc::unbounded_channel();
        Arc::new(Self { says, said: AtomicUsize::new(0), told: Mutex::default(), queue: Mutex::new(queue) })
    }
}

/// A stream of a prompted app.
struct Prompted {
    rest: GuestStream,
    prompt: Arc<Prompt>,
}

impl ByteStream for Prompted {}

impl AsyncRead for Prompted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let prompted = self.prompt.queue.lock().unwrap().poll_recv(cx);
        if let Poll::Ready(Some(bytes)) = prompted {
            self.prompt.said.fetch_add(1, Ordering::SeqCst);
            buf.put_slice(&bytes);
            return Poll::Ready(Ok(()));
        }
        self.rest.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Prompted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let taken = std::task::ready!(self.rest.as_mut().poll_write(cx, buf))?;
        self.prompt.told.lock().unwrap().extend_from_slice(&buf[..taken]);
        Poll::Ready(Ok(taken))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_shutdown(cx)
    }
}

/// A stream that its app closes just when it is used again.
struct Closing {
    rest: GuestStream,
    closes: Arc<AtomicBool>,
    certain: bool,
    late: u64,
    written: u64,
    closed_at: Option<u64>,
}

impl ByteStream for Closing {
    fn written(&self) -> u64 {
        self.written
    }
    fn poll_untouched(&mut self, _: &mut Context<'_>, from: u64) -> Poll<bool> {
        Poll::Ready(self.certain && self.closed_at.is_some_and(|at| at <= from))
    }
}

impl AsyncRead for Closing {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.closed_at {
            None => self.rest.as_mut().poll_read(cx, buf),
            Some(at) if self.written < at + self.late => Poll::Pending,
            Some(_) => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Closing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        if self.closed_at.is_none() && self.written > 0 && self.closes.swap(false, Ordering::SeqCst) {
            self.closed_at = Some(self.written);
        }
        let taken = if self.closed_at.is_some() { Ok(buf.len()) } else { std::task::ready!(self.rest.as_mut().poll_write(cx, buf)) };
        self.written += *taken.as_ref().unwrap_or(&0) as u64;
        Poll::Ready(taken)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_shutdown(cx)
    }
}

struct EagerVm(Arc<dyn Vm>, Dials);

struct GivenUp(Arc<AtomicUsize>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl EagerEngine {
    fn eager(&self, started: Started) -> Started {
        Started { vm: Arc::new(EagerVm(started.vm, self.1.clone())), ..started }
    }
}

/// What was read already, then the rest.
struct Prefetched {
    first: Cursor<Vec<u8>>,
    rest: GuestStream,
}

impl ByteStream for Prefetched {}

impl AsyncRead for Prefetched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.first.position() < self.first.get_ref().len() as u64 {
            return Pin::new(&mut self.first).poll_read(cx, buf);
        }
        self.rest.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Prefetched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        self.rest.as_mut().poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.rest.as_mut().poll_shutdown(cx)
    }
}

#[async_trait]
impl Vm for EagerVm {
    async fn dial(&self, port: Port) -> Result<GuestStream, DialError> {
        if let Dials::Silent { silent, begun, given_up } = &self.1 {
            if silent.load(Ordering::SeqCst) {
                let _given_up = GivenUp(given_up.clone());
                begun.fetch_add(1, Ordering::SeqCst);
                return std::future::pending().await;
            }
            return self.0.dial(port).await;
        }
        if let Dials::Closing { closes, certain, late } = &self.1 {
            let rest = self.0.dial(port).await?;
            return Ok(Box::pin(Closing { rest, closes: closes.clone(), certain: *certain, late: *late, written: 0, closed_at: None }));
        }
        if let Dials::Prompted(prompt) = &self.1 {
            return Ok(Box::pin(Prompted { rest: self.0.dial(port).await?, prompt: prompt.clone() }));
        }
        let mut rest = self.0.dial(port).await?;
        let mut first = vec![0; 4096];
        let length = rest.read(&mut first).await.map_err(|_| DialError::Gone)?;
        first.truncate(length);
        Ok(Box::pin(Prefetched { first: Cursor::new(first), rest }))
    }
    async fn dial_shell(&self) -> Result<GuestStream, DialError> {
        self.0.dial_shell().await
    }
    async fn ready(&self, limit: Duration) -> Result<Port, EngineError> {
        self.0.ready(limit).await
    }
    async fn suspend(&self, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
        self.0.suspend(cancel).await
    }
    fn release_streams(&self) {
        self.0.release_streams();
    }
    async fn parked_write(&self) {
        self.0.parked_write().await;
    }
    async fn kill(&self) {
        self.0.kill().await;
    }
    async fn exited(&self) -> Exit {
        self.0.exited().await
    }
    async fn usage(&self) -> Usage {
        self.0.usage().await
    }
    fn as_any(&self) -> &dyn Any {
        self.0.as_any()
    }
}

#[async_trait]
impl Engine for EagerEngine {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        self.0.boot(spec).await
    }
    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        self.0.capture_image(vm, into).await
    }
    async fn launch(&self, spec: LaunchSpec) -> Result<Started, EngineError> {
        self.0.launch(spec).await.map(|started| self.eager(started))
    }
    async fn restore(&self, spec: RestoreSpec) -> Result<Started, EngineError> {
        self.0.restore(spec).await.map(|started| self.eager(started))
    }
    async fn adopt(&self, id: MicrovmId, dir: PathBuf, image_dir: PathBuf, generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError> {
        self.0.adopt(id, dir, image_dir, generation).await
    }
    async fn committed(&self, dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError> {
        self.0.committed(dir).await
    }
    async fn warm(&self, image_dir: PathBuf) {
        self.0.warm(image_dir).await;
    }
    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError> {
        self.0.sweep(keep).await
    }
    async fn close(&self) {
        self.0.close().await;
    }
}
