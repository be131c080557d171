//! Streams of one loopback microVM: TCP connections with a tap that is shut while the microVM sleeps.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    net::TcpStream,
    sync::watch,
};

use crate::engine::ByteStream;

/// What a parked stream takes from its client before it pushes back.
const WINDOW_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Flowing,
    Parked,
    /// Awake again; only connections made since are flowing.
    Held,
    Gone,
}

/// The streams of one microVM over all its generations.
#[derive(Debug)]
pub(super) struct Streams {
    flow: watch::Sender<Flow>,
    /// How often streams were held: a connection that was made since the last time is not.
    holds: AtomicUsize,
    /// Bytes that clients wrote and that wait for the microVM.
    queued: watch::Sender<usize>,
    open: AtomicUsize,
}

impl Streams {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { flow: watch::Sender::new(Flow::Flowing), holds: AtomicUsize::new(0), queued: watch::Sender::new(0), open: AtomicUsize::new(0) })
    }

    /// Once gone, always gone.
    pub fn set(&self, to: Flow) {
        self.flow.send_if_modified(|flow| {
            let changes = *flow != Flow::Gone && *flow != to;
            if changes {
                if to == Flow::Held {
                    self.holds.fetch_add(1, Ordering::AcqRel);
                }
                *flow = to;
            }
            changes
        });
    }

    pub fn flow(&self) -> Flow {
        *self.flow.borrow()
    }

    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns when the streams are parked and a client has written to one.
    pub async fn parked_write(&self) {
        let (mut flow, mut queued) = (self.flow.subscribe(), self.queued.subscribe());
        loop {
            if *flow.borrow_and_update() == Flow::Parked && *queued.borrow_and_update() > 0 {
                return;
            }
            // Both senders live in `self`, so neither can end.
            tokio::select! {
                _ = flow.changed() => {}
                _ = queued.changed() => {}
            }
        }
    }

    /// Of a connection that was made after so many holds.
    async fn flowing(&self, made_after: usize) -> io::Result<()> {
        let mut flow = self.flow.subscribe();
        let is_held = || made_after != self.holds.load(Ordering::Acquire);
        match flow.wait_for(|flow| *flow != Flow::Parked && !(*flow == Flow::Held && is_held())).await.map(|flow| *flow) {
            Ok(Flow::Flowing | Flow::Held) => Ok(()),
            _ => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    async fn gone(&self) {
        let mut flow = self.flow.subscribe();
        let _ = flow.wait_for(|flow| *flow == Flow::Gone).await;
    }

    /// The client's end of a connection. The task in between ends with either end or with the microVM.
    pub fn connect(self: &Arc<Self>, upstream: TcpStream) -> Stream {
        let (client, inner) = tokio::io::duplex(WINDOW_BYTES);
        let reset = Arc::new(AtomicBool::new(false));
        let made_after = self.holds.load(Ordering::Acquire);
        self.open.fetch_add(1, Ordering::Relaxed);
        let (streams, was_reset) = (self.clone(), reset.clone());
        tokio::spawn(async move {
            // How it ended is told to the client by the stream itself.
            let _ = streams.pump(inner, upstream, made_after, &was_reset).await;
            streams.open.fetch_sub(1, Ordering::Relaxed);
        });
        Stream { io: client, reset }
    }

    async fn pump(&self, client: DuplexStream, mut upstream: TcpStream, made_after: usize, reset: &AtomicBool) -> io::Result<()> {
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_guest, mut to_guest) = upstream.split();
        let up = async {
            let mut chunk = vec![0; 16 * 1024];
            loop {
                let n = from_client.read(&mut chunk).await?;
                if n == 0 {
                    self.flowing(made_after).await?;
                    return to_guest.shutdown().await;
                }
                let _queued = Queued::new(self, n);
                self.flowing(made_after).await?;
                to_guest.write_all(&chunk[..n]).await?;
            }
        };
        let down = async {
            let mut chunk = vec![0; 16 * 1024];
            loop {
                let n = from_guest.read(&mut chunk).await?;
                self.flowing(made_after).await?;
                if n == 0 {
                    return to_client.shutdown().await;
                }
                to_client.write_all(&chunk[..n]).await?;
            }
        };
        let outcome = tokio::select! {
            both = async { tokio::try_join!(up, down) } => both.map(|_| ()),
            () = self.gone() => Err(io::ErrorKind::ConnectionReset.into()),
        };
        // Set before the halves drop, so that the client never takes the reset for an orderly end.
        reset.store(outcome.is_err(), Ordering::Release);
        outcome
    }
}

/// Counts bytes as waiting, for as long as it lives.
struct Queued<'a> {
    streams: &'a Streams,
    bytes: usize,
}

impl<'a> Queued<'a> {
    fn new(streams: &'a Streams, bytes: usize) -> Self {
        streams.queued.send_modify(|queued| *queued += bytes);
        Self { streams, bytes }
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.streams.queued.send_modify(|queued| *queued -= self.bytes);
    }
}

/// The client's end.
pub(super) struct Stream {
    io: DuplexStream,
    reset: Arc<AtomicBool>,
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        let ended = matches!(polled, Poll::Ready(Ok(()))) && buf.filled().len() == before && buf.remaining() > 0;
        if ended && self.reset.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        polled
    }
}

impl ByteStream for Stream {}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
