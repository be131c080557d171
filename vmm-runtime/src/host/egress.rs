//! The way out of a microVM: connections that its guest agent asks for, made by the node.
//!
//! There is no network between guests and the host. The agent catches what the app connects to and says where to on a stream
//! that waits ready (`protocol/src/egress.rs`); here it is decided whether the guest may go there, and connected. So a guest
//! reaches what this node can reach by TCP and what [`policy`] allows, never a listener of the node or another guest, and
//! nothing of the host has to be set up for it.
//!
//! Owns: the streams that wait, connections while they last, the questions for names. While a microVM is being suspended nothing is
//! written to it, for that would wake it; with the commit its connections end, and the app reads a reset when it wakes.

mod gate;
mod names;
pub mod policy;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use model::Door;
use protocol::{
    egress::{Answer, HEADER_BYTES, Wanted},
    link::{AgentLink, LinkError, MuxStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use self::gate::{Gate, Gated};
pub use self::policy::EgressPolicy;

/// Streams that wait for a guest's next connection: one is made as one is taken, a round trip later.
const READY: usize = 4;
/// Connections of a microVM at a time, with those that wait. The agent has the same bound.
const MAX_CONNECTIONS: usize = 512;
/// For the agent to take a stream.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// After a stream that could not be opened.
const PAUSE: Duration = Duration::from_millis(500);
/// For a connection to come about. An app's own patience is mostly longer.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// Bytes that went out and came in.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// The way out of one microVM. It ends with its drop.
pub(super) struct Egress {
    gate: Arc<Gate>,
    _tasks: JoinSet<()>,
}

/// Nothing is written to the guest while it lives.
pub(super) struct Paused(Option<Arc<Gate>>);

impl Paused {
    /// Nothing will be any more: the connections are about to end, and none may use the moment.
    pub fn for_good(mut self) {
        self.0 = None;
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Some(gate) = &self.0 {
            gate.open();
        }
    }
}

impl Egress {
    /// Serves what the agent at the other end of `link` asks for.
    pub fn start(link: Arc<AgentLink>, policy: Arc<EgressPolicy>, traffic: Arc<Traffic>) -> Self {
        let (gate, mut tasks) = (Arc::new(Gate::default()), JoinSet::new());
        tasks.spawn(keep_ready(link, gate.clone(), Host { policy, traffic }));
        Self { gate, _tasks: tasks }
    }

    /// For a microVM that is about to be suspended.
    pub fn pause(egress: Option<&Self>) -> Paused {
        Paused(egress.map(|egress| {
            egress.gate.shut();
            egress.gate.clone()
        }))
    }
}

/// Who connects.
#[derive(Clone)]
struct Host {
    policy: Arc<EgressPolicy>,
    traffic: Arc<Traffic>,
}

async fn keep_ready(link: Arc<AgentLink>, gate: Arc<Gate>, host: Host) {
    let (ready, places) = (Arc::new(Semaphore::new(READY)), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    let mut tasks = JoinSet::new();
    loop {
        // Nobody closes them.
        let Ok(waits) = ready.clone().acquire_owned().await else { return };
        let Ok(place) = places.clone().acquire_owned().await else { return };
        gate.opened().await;
        match link.open(Door::Egress, OPEN_LIMIT).await {
            Ok(stream) => {
                while tasks.try_join_next().is_some() {}
                let (stream, host) = (Gated::new(stream, gate.clone()), host.clone());
                tasks.spawn(async move {
                    // How a guest's connection ends is the guest's business.
                    let _ = host.serve(stream, waits).await;
                    drop(place);
                });
            }
            Err(error) => {
                if !matches!(error, LinkError::Closed) {
                    tracing::debug!(%error, "a guest takes no stream for its connections");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

impl Host {
    async fn serve(&self, mut stream: Gated<MuxStream>, waits: OwnedSemaphorePermit) -> io::Result<()> {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).await?;
        drop(waits);
        match Wanted::from_bytes(&header).ok_or(io::ErrorKind::InvalidData)? {
            Wanted::Names => {
                stream.write_u8(Answer::Open as u8).await?;
                names::serve(&mut stream, &self.policy.name_servers).await?;
                stream.shutdown().await
            }
            Wanted::Tcp(address) if !self.policy.allows(address.ip()) => refuse(stream, Answer::Forbidden).await,
            Wanted::Tcp(address) => match connect(address).await {
                Ok(outside) => self.carry(stream, outside).await,
                Err(_) => refuse(stream, Answer::Failed).await,
            },
        }
    }

    async fn carry(&self, mut stream: Gated<MuxStream>, mut outside: TcpStream) -> io::Result<()> {
        stream.write_u8(Answer::Open as u8).await?;
        let mut counted = Counted { io: &mut outside, traffic: &self.traffic };
        let carried = tokio::io::copy_bidirectional(&mut stream, &mut counted).await;
        if carried.is_err() {
            // Not an orderly end, on either side: the guest's stream is reset by its drop.
            let _ = outside.set_zero_linger();
        }
        carried.map(|_| ())
    }
}

async fn refuse(mut stream: Gated<MuxStream>, answer: Answer) -> io::Result<()> {
    stream.write_u8(answer as u8).await?;
    stream.shutdown().await
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let outside = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(address)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    outside.set_nodelay(true)?;
    Ok(outside)
}

/// Counts what crosses it.
struct Counted<'a> {
    io: &'a mut TcpStream,
    traffic: &'a Traffic,
}

mod counted {
    use std::{
        io,
        pin::Pin,
        sync::atomic::Ordering,
        task::{Context, Poll, ready},
    };

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::Counted;

    impl AsyncRead for Counted<'_> {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            ready!(Pin::new(&mut *self.io).poll_read(cx, buf))?;
            self.traffic.received.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Counted<'_> {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let written = ready!(Pin::new(&mut *self.io).poll_write(cx, buf))?;
            self.traffic.sent.fetch_add(written as u64, Ordering::Relaxed);
            Poll::Ready(Ok(written))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut *self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut *self.io).poll_shutdown(cx)
        }
    }
}

impl Traffic {
    /// Sent and received.
    pub fn bytes(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}
