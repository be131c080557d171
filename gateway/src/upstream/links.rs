//! Guest streams as pingora keeps them between requests.
//!
//! Owns: the record of every stream that pingora holds for HTTP, what each leads to, and the end of those that idle.
//! pingora knows a stream by a number; for these it is a negative one of ours (third_party/PATCHES.md), so that no
//! descriptor is spent and no byte takes a detour through the kernel. The record is asked each time a pooled connection
//! is used again: pingora's pool key is a 64-bit hash without a check for equality, and a collision would hand one
//! tenant's connection to another (cases.md 32).

use std::{
    fmt,
    future::poll_fn,
    io,
    os::fd::RawFd,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use dashmap::DashMap;
use model::{Generation, MicrovmId, Port};
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID, UniqueIDType,
    l4::virt::{VirtualSockOpt, VirtualSocket},
    raw_connect::ProxyDigest,
};
use prometheus::IntGauge;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmm_runtime::engine::GuestStream;

use super::{h2_headers, transport::Transport};
use crate::{Limits, drain::Drain, metrics::Open};

/// How often idle streams are looked at. One that its guest has closed is found at its next use in any case.
const SWEEP: Duration = Duration::from_secs(1);
/// How long a guest may take to say whether its app has seen a request, after the end of a stream: a round trip to an agent that
/// is busy.
const VERDICT: Duration = Duration::from_secs(2);
/// The numbers of streams begin here and go down: -1 is pingora's for a stream without a number.
const FIRST: RawFd = -2;

/// What is spoken with an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1.1 that may become a WebSocket; never reused.
    WebSocket,
    /// The same with the guest agent, which has a shell behind it.
    Shell,
}

impl Speaks {
    /// Whether a connection of it is one request's alone, and a tunnel after its 101.
    pub fn is_tunnel(self) -> bool {
        matches!(self, Self::WebSocket | Self::Shell)
    }
}

/// What a connection leads to. Two connections may stand in for one another only if all of it is equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    /// The microVM.
    pub microvm: MicrovmId,
    /// The guest port.
    pub port: Port,
    /// The restore it belongs to; a connection of an older one is dead (design §4 rule 5).
    pub generation: Generation,
    /// The protocol.
    pub speaks: Speaks,
    /// What it is spoken over.
    pub transport: Transport,
}

/// Tells whether the microVM that a stream leads to sleeps, so that bytes for it would wake it.
pub(crate) type Asleep = Box<dyn Fn() -> bool + Send + Sync>;

/// One stream.
pub(crate) struct Link {
    /// Where it leads.
    pub target: Target,
    asleep: Asleep,
    // Guards the stream against its two users, pingora and the sweep; held for one poll.
    state: Mutex<State>,
    oversized: AtomicBool,
}

struct State {
    /// `None` once it is cut.
    guest: Option<(GuestStream, Open)>,
    /// Who waits in pingora, to be woken by a cut.
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Whether there are bytes for the guest that it does not take.
    full: bool,
    /// Of HTTP/1.1, those that pingora has written and the guest has not taken.
    left: Vec<u8>,
    /// Counts the requests that have used it.
    uses: u64,
    /// Bytes that the guest stream had taken when the last of them began.
    before: u64,
    /// Requests that use it now.
    in_use: u32,
    /// Since when no request uses it. While it is set nobody polls but the sweep.
    idle_since: Option<Instant>,
}

impl Link {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it at once: the guest reads an end, pingora an error.
    pub fn cut(&self) {
        let mut state = self.state();
        let guest = state.guest.take();
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        if let Some((guest, _open)) = guest {
            self.finish(guest);
        }
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// Whether there are bytes for the guest that it does not take.
    pub fn is_full(&self) -> bool {
        self.state().full
    }

    /// Until the guest has taken something; [`Link::is_full`] says whether there is more. An error is said once.
    pub fn poll_taken(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        let state = &mut *state;
        let Some((guest, _)) = &mut state.guest else {
            (state.full, state.left) = (false, Vec::new());
            return Poll::Ready(Err(cut()));
        };
        let taken = if state.left.is_empty() {
            guest.as_mut().poll_flush(cx)
        } else {
            match guest.as_mut().poll_write(cx, &state.left) {
                Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    state.left.drain(..written);
                    // It is still to be flushed.
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Pending => Poll::Pending,
            }
        };
        state.full = taken.is_pending();
        if taken.is_pending() {
            keep(&mut state.writer, cx);
        } else {
            state.left = Vec::new();
        }
        taken
    }

    /// Takes it for one request; `None` if it has just been cut.
    pub fn take_up(self: &Arc<Self>) -> Option<Use> {
        let mut state = self.state();
        state.before = state.guest.as_ref()?.0.written();
        state.idle_since = None;
        state.uses += 1;
        state.in_use += 1;
        let number = state.uses;
        drop(state);
        Some(Use { link: self.clone(), number })
    }

    /// Takes it for the next request; `None` if it has been cut, or if its guest has closed it or spoken on it unasked.
    pub fn take_up_idle(self: &Arc<Self>) -> Option<Use> {
        let mut byte = [0];
        // No waker of anybody's is lost: nobody waits for it while it idles.
        let said = self.state().guest.as_mut()?.0.as_mut().poll_read(&mut Context::from_waker(Waker::noop()), &mut ReadBuf::new(&mut byte));
        if said.is_pending() { self.take_up() } else { None }
    }

    /// Whether it leads nowhere any more.
    pub fn has_ended(&self) -> bool {
        self.state().guest.is_none()
    }

    /// Says the end in order, if that can be said at once. A sleeper is not woken for it (TLS has a word of its own for the
    /// end): it reads the end when it wakes.
    fn finish(&self, mut guest: GuestStream) {
        if !(self.asleep)() {
            let _ = guest.as_mut().poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// Takes the stream out if it idles and is of no use any more: for too long, closed by its guest, or spoken on unasked.
    fn take_spent(&self, keepalive: Duration) -> Option<(GuestStream, Open)> {
        let mut state = self.state();
        let since = state.idle_since?;
        let (guest, _) = state.guest.as_mut()?;
        // No waker of pingora's is lost: none is there while it idles.
        let mut byte = [0];
        let said = guest.as_mut().poll_read(&mut Context::from_waker(Waker::noop()), &mut ReadBuf::new(&mut byte));
        if said.is_ready() || since.elapsed() > keepalive { state.guest.take() } else { None }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("target", &self.target).finish_non_exhaustive()
    }
}

/// A link in the hands of one request; it idles from the drop on.
#[derive(Debug)]
pub(crate) struct Use {
    link: Arc<Link>,
    number: u64,
}

impl Use {
    /// Whether it was ended because the guest sent too large a header.
    pub fn is_oversized(&self) -> bool {
        self.link.oversized.load(Ordering::Acquire)
    }

    /// After the app has ended the stream or broken it off: whether it is certain that it has seen nothing of this request.
    pub async fn is_untouched(&self) -> bool {
        let verdict = poll_fn(|cx| {
            let mut state = self.link.state();
            keep(&mut state.reader, cx);
            let before = state.before;
            match &mut state.guest {
                Some((guest, _)) => guest.poll_untouched(cx, before),
                None => Poll::Ready(false),
            }
        });
        tokio::time::timeout(VERDICT, verdict).await.unwrap_or(false)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut state = self.link.state();
        state.in_use -= 1;
        // A connection of HTTP/2 is read all the time by a task of its own, which also ends it when it idles.
        if self.link.target.speaks != Speaks::Http1 {
            return;
        }
        // pingora gives a connection back before its request is quite over; the next one may have it already.
        if state.uses == self.number {
            state.idle_since = Some(Instant::now());
        }
    }
}

/// pingora's pool, which compares 64-bit hashes only, has taken one target's connection for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeadsElsewhere;

/// All streams of one gateway.
#[derive(Debug)]
pub(crate) struct Links {
    by_number: DashMap<RawFd, Arc<Link>>,
    next: AtomicI32,
    limits: Limits,
    tasks: TaskTracker,
    ended: CancellationToken,
    drain: Drain,
    open: IntGauge,
}

impl Links {
    /// None yet.
    pub fn new(limits: Limits, open: IntGauge) -> Self {
        Self { by_number: DashMap::new(), next: AtomicI32::new(FIRST), limits, tasks: TaskTracker::new(), ended: CancellationToken::new(), drain: Drain::default(), open }
    }

    /// Whether the gateway drains.
    pub fn drain(&self) -> &Drain {
        &self.drain
    }

    /// Counts a stream to a guest as open while the guard lives.
    pub fn count_open(&self) -> Open {
        Open::new(&self.open)
    }

    /// The link behind a stream of pingora's that was asked for as `wanted`; `None` if it has just ended.
    pub fn leading_to(&self, wanted: Target, number: RawFd) -> Result<Option<Arc<Link>>, LeadsElsewhere> {
        match self.by_number.get(&number).map(|link| link.clone()) {
            Some(link) if link.target != wanted => Err(LeadsElsewhere),
            link => Ok(link),
        }
    }

    /// Makes a guest stream one that pingora can keep. Dropping it closes the guest's end.
    pub fn tie(self: &Arc<Self>, target: Target, guest: GuestStream, asleep: Asleep) -> Tied {
        let state = State { guest: Some((guest, self.count_open())), reader: None, writer: None, full: false, left: Vec::new(), uses: 0, before: 0, in_use: 0, idle_since: None };
        let link = Arc::new(Link { target, asleep, state: Mutex::new(state), oversized: AtomicBool::new(false) });
        let number = self.number(&link);
        if self.ended.is_cancelled() {
            link.cut();
        }
        Tied { link, number, links: self.clone() }
    }

    /// A number that no other stream has.
    fn number(&self, link: &Arc<Link>) -> RawFd {
        loop {
            // After two thousand million streams they begin anew.
            let number = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| Some(if next == RawFd::MIN { FIRST } else { next - 1 }));
            let (Ok(number) | Err(number)) = number;
            if let dashmap::Entry::Vacant(vacant) = self.by_number.entry(number) {
                vacant.insert(link.clone());
                return number;
            }
        }
    }

    /// Runs something beside a connection; it ends with the gateway.
    pub fn watch(&self, watch: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = watch => {}
                () = ended.cancelled() => {}
            }
        })
    }

    /// Ends idle streams from now on, until the gateway ends; `then` is called after each look.
    pub fn start_sweeping(self: &Arc<Self>, then: impl Fn() + Send + 'static) {
        let links = Arc::downgrade(self);
        self.watch(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(links) = links.upgrade() else { return };
                links.sweep();
                then();
            }
        });
    }

    fn sweep(&self) {
        // Dropped after the look, without a lock: what pingora still holds of them ends at its next use or eviction.
        let keepalive = self.limits.load().upstream_keepalive;
        let spent: Vec<_> = self.by_number.iter().filter_map(|link| Some((link.clone(), link.take_spent(keepalive)?))).collect();
        spent.into_iter().for_each(|(link, (guest, _open))| link.finish(guest));
    }

    /// Ends every stream.
    pub async fn close(&self) {
        self.ended.cancel();
        let all: Vec<_> = self.by_number.iter().map(|entry| entry.value().clone()).collect();
        all.iter().for_each(|link| link.cut());
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// The gateway's end of a stream, in the hands of one of pingora's HTTP sessions or of a pool.
#[derive(Debug)]
pub(crate) struct Tied {
    link: Arc<Link>,
    number: RawFd,
    links: Arc<Links>,
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the gateway has cut this stream")
}

/// Keeps the waker of whoever waits, without a clone where it is the same one as before.
fn keep(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

impl Tied {
    /// Its record.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    fn poll_write_side<T>(&self, cx: &mut Context<'_>, poll: impl FnOnce(Pin<&mut GuestStream>, &mut Context<'_>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let mut state = self.link.state();
        // What a connection without a request has to say (HTTP/2 says good-bye) is not worth a wake.
        if state.in_use == 0 && state.uses > 0 && state.guest.is_some() && (self.link.asleep)() {
            drop(state);
            self.link.cut();
            return Poll::Ready(Err(cut()));
        }
        let Some((guest, _)) = &mut state.guest else { return Poll::Ready(Err(cut())) };
        let written = poll(Pin::new(guest), cx);
        state.full = written.is_pending();
        if written.is_pending() {
            keep(&mut state.writer, cx);
        }
        written
    }

    /// Of HTTP/1.1: takes all that is written, for [`Link::poll_taken`] to pass on, so that a guest which takes nothing does not
    /// keep its own answer from being read. Whoever writes asks that first, and so keeps one piece of a body here at most.
    fn poll_write_all(&self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // Of one piece the kernel makes less ado.
        let write = |guest: Pin<&mut GuestStream>, cx: &mut Context<'_>| match bufs {
            [only] => guest.poll_write(cx, only),
            bufs => guest.poll_write_vectored(cx, bufs),
        };
        let written = if self.link.state().left.is_empty() { self.poll_write_side(cx, write) } else { Poll::Pending };
        if written.is_ready() {
            return written;
        }
        let mut state = self.link.state();
        bufs.iter().for_each(|buf| state.left.extend_from_slice(buf));
        Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn keeps_the_rest(&self) -> bool {
        self.link.target.speaks == Speaks::Http1
    }
}

impl AsyncRead for Tied {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.link.state();
        let Some((guest, _)) = &mut state.guest else { return Poll::Ready(Err(cut())) };
        let read = guest.as_mut().poll_read(cx, buf);
        match &read {
            Poll::Pending => keep(&mut state.reader, cx),
            Poll::Ready(Err(error)) if h2_headers::is_excess(error) => self.link.oversized.store(true, Ordering::Release),
            Poll::Ready(_) => {}
        }
        read
    }
}

impl AsyncWrite for Tied {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.keeps_the_rest() {
            return self.poll_write_all(cx, &[io::IoSlice::new(buf)]);
        }
        self.poll_write_side(cx, |guest, cx| guest.poll_write(cx, buf))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.keeps_the_rest() {
            return self.poll_write_all(cx, bufs);
        }
        self.poll_write_side(cx, |guest, cx| guest.poll_write_vectored(cx, bufs))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.keeps_the_rest() && self.link.is_full() {
            return Poll::Ready(Ok(()));
        }
        let flushed = self.poll_write_side(cx, |guest, cx| guest.poll_flush(cx));
        if self.keeps_the_rest() && flushed.is_pending() { Poll::Ready(Ok(())) } else { flushed }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_side(cx, |guest, cx| guest.poll_shutdown(cx))
    }
}

impl VirtualSocket for Tied {
    fn id(&self) -> RawFd {
        self.number
    }

    fn set_socket_option(&self, _option: VirtualSockOpt) -> io::Result<()> {
        Ok(())
    }
}

// What pingora wants of a connection besides its bytes, and uses for logs and for sockets of its own.
impl UniqueID for Tied {
    fn id(&self) -> UniqueIDType {
        self.number
    }
}

#[async_trait]
impl Shutdown for Tied {
    async fn shutdown(&mut self) {
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl Ssl for Tied {}
impl Peek for Tied {}

impl GetTimingDigest for Tied {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Tied {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Tied {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}

impl Drop for Tied {
    fn drop(&mut self) {
        self.links.by_number.remove(&self.number);
        self.link.cut();
    }
}

#[cfg(test)]
mod tests {
    use config::{Config, EdgeLimits};
    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;

    fn links(change: impl FnOnce(&mut EdgeLimits)) -> Arc<Links> {
        let mut limits = Config::defaults().edge.limits;
        change(&mut limits);
        Arc::new(Links::new(Limits::new(limits), IntGauge::new("open", "open").unwrap()))
    }

    fn target(port: u16) -> Target {
        Target { microvm: MicrovmId::random(), port: Port::new(port).unwrap(), generation: Generation(1), speaks: Speaks::Http1, transport: Transport::Plain }
    }

    fn tied(links: &Arc<Links>, target: Target) -> (Tied, DuplexStream) {
        let (guest, app) = tokio::io::duplex(1024);
        (links.tie(target, Box::pin(guest), Box::new(|| false)), app)
    }

    #[tokio::test]
    async fn a_sleeper_is_not_woken_by_what_nobody_asked_for() {
        let links = links(|_| {});
        let (guest, mut app) = tokio::io::duplex(1024);
        let asleep = Arc::new(AtomicBool::new(false));
        let sleeps = asleep.clone();
        let mut pingoras = links.tie(Target { speaks: Speaks::Http2, ..target(1) }, Box::pin(guest), Box::new(move || sleeps.load(Ordering::SeqCst)));
        // The beginning of a connection, before its first request.
        pingoras.write_all(b"begin").await.unwrap();
        let link = links.by_number.get(&VirtualSocket::id(&pingoras)).unwrap().clone();
        let request = link.take_up().unwrap();
        asleep.store(true, Ordering::SeqCst);
        // A request is worth a wake.
        pingoras.write_all(b"asked").await.unwrap();
        drop(request);
        assert_eq!(pingoras.write_all(b"good-bye").await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        let mut read = String::new();
        app.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "beginasked");
    }

    #[tokio::test]
    async fn bytes_and_ends_cross_both_ways() {
        let links = links(|_| {});
        let (mut pingoras, mut app) = tied(&links, target(1));
        pingoras.write_all(b"ping").await.unwrap();
        let mut four = [0; 4];
        app.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"ping");

        // The guest closes first: pingora reads the end, and can still send.
        app.write_all(b"bye").await.unwrap();
        AsyncWriteExt::shutdown(&mut app).await.unwrap();
        let mut text = String::new();
        pingoras.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "bye");
        pingoras.write_all(b"late").await.unwrap();
        app.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"late");

        // pingora closes: the guest reads the end, and nothing is left of it.
        drop(pingoras);
        assert_eq!(app.read(&mut four).await.unwrap(), 0);
        assert!(links.by_number.is_empty());
        assert_eq!(links.open.get(), 0);
    }

    #[tokio::test]
    async fn each_number_leads_to_its_own_stream() {
        let links = links(|_| {});
        let mut all: Vec<_> = (1..=50).map(|port| (port, tied(&links, target(port)))).collect();
        for (port, (pingoras, app)) in &mut all {
            assert!(VirtualSocket::id(pingoras) < -1);
            assert_eq!(links.by_number.get(&VirtualSocket::id(pingoras)).unwrap().clone().target.port.get(), *port);
            app.write_all(&port.to_be_bytes()).await.unwrap();
            let mut read = [0; 2];
            pingoras.read_exact(&mut read).await.unwrap();
            assert_eq!(u16::from_be_bytes(read), *port);
        }
        // The numbers begin anew where they end, and those in use are left out.
        links.next.store(RawFd::MIN, Ordering::Relaxed);
        let (last, (next, _)) = (tied(&links, target(51)), tied(&links, target(52)));
        assert_eq!((VirtualSocket::id(&last.0), VirtualSocket::id(&next)), (RawFd::MIN, FIRST - 50));
    }

    #[tokio::test]
    async fn a_collision_of_pool_keys_is_found_out() {
        let links = links(|_| {});
        let (a, b) = (target(1), target(1));
        let (pingoras, _app) = tied(&links, a);
        assert!(links.leading_to(a, VirtualSocket::id(&pingoras)).unwrap().is_some());
        let others = [
            b,
            Target { port: Port::new(2).unwrap(), ..a },
            Target { generation: Generation(2), ..a },
            Target { speaks: Speaks::Http2, ..a },
            Target { transport: Transport::Tls { h2: false }, ..a },
        ];
        for other in others {
            assert_eq!(links.leading_to(other, VirtualSocket::id(&pingoras)).err(), Some(LeadsElsewhere), "{other:?}");
        }
        let number = VirtualSocket::id(&pingoras);
        drop(pingoras);
        assert!(links.leading_to(b, number).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_cut_link_ends_for_both_sides_and_wakes_who_waits() {
        let links = links(|_| {});
        let (mut pingoras, mut app) = tied(&links, target(1));
        let link = links.by_number.get(&VirtualSocket::id(&pingoras)).unwrap().clone();
        let waiting = tokio::spawn(async move { pingoras.read(&mut [0; 1]).await });
        tokio::task::yield_now().await;
        link.cut();
        assert_eq!(waiting.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(app.read(&mut [0; 1]).await.unwrap(), 0);
        assert!(link.take_up().is_none());
    }

    #[tokio::test]
    async fn an_idle_link_ends_when_it_is_of_no_use() {
        let links = links(|limits| limits.upstream_keepalive = Duration::ZERO);
        let (pingoras, mut app) = tied(&links, target(1));
        let link = links.by_number.get(&VirtualSocket::id(&pingoras)).unwrap().clone();
        let (first, second) = (link.take_up().unwrap(), link.take_up().unwrap());
        // The request before gives it up after the next one has it.
        drop(first);
        links.sweep();
        assert_eq!(links.open.get(), 1, "it was in use");
        drop(second);
        links.sweep();
        assert_eq!(links.open.get(), 0);
        assert_eq!(app.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_idle_link_that_its_guest_ends_or_speaks_on_is_ended() {
        let links = links(|_| {});
        for spoken in [&b""[..], b"unasked"] {
            let (pingoras, mut app) = tied(&links, target(1));
            drop(links.by_number.get(&VirtualSocket::id(&pingoras)).unwrap().clone().take_up());
            links.sweep();
            assert_eq!(links.open.get(), 1, "it idles for a moment only");
            app.write_all(spoken).await.unwrap();
            AsyncWriteExt::shutdown(&mut app).await.unwrap();
            links.sweep();
            assert_eq!(links.open.get(), 0);
        }
    }

    #[tokio::test]
    async fn all_end_with_the_gateway() {
        let links = links(|_| {});
        let (mut before, _app) = tied(&links, target(1));
        links.close().await;
        let (mut after, _app) = tied(&links, target(1));
        for end in [&mut before, &mut after] {
            assert!(end.read(&mut [0; 1]).await.is_err());
        }
        assert_eq!(links.open.get(), 0);
    }
}
