//! A client's connection as pingora sees it: TLS over a [`Socket`], guarded against slow and oversized headers.
//!
//! pingora's HTTP/1.1 reader has no deadline for a whole header (its issue #447), takes a megabyte of it, and answers
//! some requests before any hook of ours has seen them. [`Guarded`] sits between the two: while a header is awaited it
//! keeps the deadline, counts, and replaces what pingora says by a row of our own table.

use std::{
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID, UniqueIDType,
    http::ServerSession,
    raw_connect::ProxyDigest,
    tls::{SslDigest, TlsStream},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, Sleep},
};

use crate::{Limits, access_log::{AccessLog, Entry}, drain::Traffic, framing::HeaderLimits, h2_frames::PREFACE_LENGTH, h2_refusals::Outgoing, headers::new_request_id, meter::HeaderMeter, metrics::{DrainCut, Metrics, Protocol}, reply::Reason, socket::Socket};

/// After the last answer on a connection that is closed with input unread: what still comes is read and thrown away until
/// nothing has come for this long, so that the close does not reach the client as a reset that overtakes the answer. A
/// client in the middle of an upload goes on for a while before it looks.
const LINGER: Duration = Duration::from_secs(2);
/// The most that takes in all. What a client cannot send in this time it has to look up from to read the answer.
const LINGER_IN_ALL: Duration = Duration::from_secs(30);
/// The frame that every connection of HTTP/2 begins with, and one that ends it before any stream: ENHANCE_YOUR_CALM
/// (RFC 9113 §§6.5, 6.8, 7), to be followed by the reason.
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
const GOAWAY_FIXED: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 0xb];
/// The longest header of an answer that waits for the answer's first bytes.
const MAX_HELD: usize = 8 * 1024;
/// What is shorter waits, over HTTP/2, for what else is to be said at the same moment. As long as the buffer that its frames
/// gather in (third_party/PATCHES.md).
const SMALL: usize = 2 * 1024;

/// Writes until nothing is left.
fn poll_send(left: &mut Vec<u8>, mut write: impl FnMut(&[u8]) -> Poll<io::Result<usize>>) -> Poll<io::Result<()>> {
    while !left.is_empty() {
        let written = ready!(write(left))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        left.drain(..written);
    }
    // A connection that idles keeps no buffer.
    *left = Vec::new();
    Poll::Ready(Ok(()))
}

/// How far the close of a connection has come.
struct Closing {
    // Our own answer to a header that never became a request, as far as it is not sent yet.
    farewell: Vec<u8>,
    tls: TlsEnd,
    // Whoever does not take the answer in time does not get it.
    deadline: Pin<Box<Sleep>>,
    // The deadline is put off while something comes, but not beyond this.
    latest: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TlsEnd {
    Due,
    Sent,
}

/// What the guard needs of the gateway.
#[derive(Clone)]
pub(crate) struct GuardSettings {
    /// The limits in force.
    pub limits: Limits,
    /// Where early refusals are counted.
    pub metrics: Arc<Metrics>,
    /// Where they are said.
    pub log: AccessLog,
}

impl GuardSettings {
    /// Counts and logs what was refused before it became a request. Returns the id that it has in the log.
    fn refused(&self, client: &Socket, protocol: Protocol, status: Option<u16>, reason: Reason) -> String {
        let request_id = new_request_id();
        self.metrics.refusal(reason);
        self.metrics.request(protocol, status);
        self.log.say(&Entry { protocol, status, ..Entry::unparsed(&request_id, client.peer(), reason) });
        request_id
    }
}

/// A stream that can be polled through a shared reference too. The lock is taken there only, and never contended: a
/// connection has one task.
struct Shared<S>(Mutex<S>);

impl<S: Unpin> Shared<S> {
    fn with<T>(&self, poll: impl FnOnce(Pin<&mut S>) -> T) -> T {
        poll(Pin::new(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn get(&mut self) -> Pin<&mut S> {
        Pin::new(self.0.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Shared<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get().poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Shared<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get().poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.get().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.with(|stream| stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get().poll_shutdown(cx)
    }
}

/// A client's connection after its TLS handshake.
pub(crate) struct Guarded {
    tls: Shared<TlsStream<Socket>>,
    alpn: Option<ALPN>,
    ssl: Option<Arc<SslDigest>>,
    socket: Socket,
    settings: GuardSettings,
    traffic: Arc<Traffic>,
    // The same for pingora, which asks anew for each request.
    proxy_digest: Option<Arc<ProxyDigest>>,
    // Even: a header is awaited. Odd: a request is under way. The service counts it up, through a shared reference.
    turn: AtomicU32,
    // The turn that `meter` and `deadline` belong to.
    metered_turn: u32,
    meter: HeaderMeter,
    // Bytes were read since the last header's end.
    body_came: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    // Of HTTP/2: how much of the preface has not come. pingora has no deadline for it; for what follows it has.
    preface_left: usize,
    // Of HTTP/2: what goes out, for what is refused below us.
    outgoing: Option<Box<Outgoing>>,
    // Why the header awaited in this turn, or the whole connection, is refused.
    refused: Option<(u32, Reason)>,
    // Whether the next small piece is held back, and what is: the begin of an answer goes out in one piece with what follows.
    hold_next: AtomicBool,
    held: Mutex<Vec<u8>>,
    // Whether what is to be written has waited for its turn (`poll_gather`).
    gathered: bool,
    // The client has not taken all that it was sent, or cannot: at the close there is nothing to wait for.
    owed: bool,
    closing: Option<Closing>,
}

impl Guarded {
    /// Guards a connection. HTTP/2 brings its own limits; once its preface has come it is only passed through.
    pub fn new(tls: TlsStream<Socket>, socket: Socket, settings: GuardSettings, traffic: Arc<Traffic>) -> Self {
        let multiplexed = matches!(tls.selected_alpn_proto(), Some(ALPN::H2));
        let turn = u32::from(multiplexed);
        let limits = settings.limits.load();
        let meter = HeaderMeter::new(HeaderLimits::of(&limits));
        let deadline = Some(Box::pin(tokio::time::sleep(limits.header_deadline)));
        drop(limits);
        let (alpn, ssl) = (tls.selected_alpn_proto(), tls.get_ssl_digest());
        let proxy_digest = traffic.digest();
        let preface_left = if multiplexed { PREFACE_LENGTH } else { 0 };
        Self { tls: Shared(Mutex::new(tls)), alpn, ssl, socket, settings, traffic, proxy_digest, turn: AtomicU32::new(turn), metered_turn: turn, meter, body_came: false, deadline, preface_left, outgoing: multiplexed.then(Box::default), refused: None, hold_next: AtomicBool::new(false), held: Mutex::default(), gathered: false, owed: false, closing: None }
    }

    /// The connection under a pingora session, if it is HTTP/1.1.
    pub fn of(session: &pingora_proxy::Session) -> Option<&Self> {
        Self::under(session.as_downstream())
    }

    /// The same.
    pub fn under(session: &ServerSession) -> Option<&Self> {
        (**session.stream()?).as_any().downcast_ref()
    }

    /// The client's socket.
    pub fn socket(&self) -> Socket {
        self.socket.clone()
    }

    /// A header was read whole; its request is under way. Why it is refused, if what was seen of it is reason enough.
    pub fn begin_request(&self) -> Option<Reason> {
        let turn = self.header_turn()?;
        self.turn.fetch_add(1, Ordering::Relaxed);
        self.refused_in(turn)
    }

    /// The request is answered; the next header is awaited.
    pub fn end_request(&self) {
        if !self.turn.load(Ordering::Relaxed).is_multiple_of(2) {
            self.turn.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Holds what is written next until something follows it or [`Guarded::poll_release`] is called: an answer's header, which
    /// would otherwise be a TLS record, a segment and a wake of the client by itself.
    pub fn hold_next(&self) {
        self.hold_next.store(true, Ordering::Relaxed);
    }

    /// Sends what is held, if anything is.
    pub fn poll_release(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        ready!(self.tls.with(|mut tls| poll_send(&mut held, |bytes| tls.as_mut().poll_write(cx, bytes))))?;
        Poll::Ready(Ok(()))
    }

    /// The client's next bytes, for a tunnel: past pingora, while that waits for the tunnel's end.
    pub fn poll_tunnel_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.tls.with(|tls| tls.poll_read(cx, buf))
    }

    /// Bytes for the client of a tunnel.
    pub fn poll_tunnel_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.tls.with(|tls| tls.poll_write(cx, bytes))
    }

    /// Until they are on their way.
    pub fn poll_tunnel_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tls.with(|tls| tls.poll_flush(cx))
    }

    /// The turn, if a header is awaited in it.
    fn header_turn(&self) -> Option<u32> {
        Some(self.turn.load(Ordering::Relaxed)).filter(|turn| turn.is_multiple_of(2))
    }

    /// Whether some of a header has come, and not all of it.
    fn header_has_begun(&self) -> bool {
        self.header_turn() == Some(self.metered_turn) && self.meter.has_begun()
    }

    /// Tells the client why its connection is not served, and ends it.
    pub async fn turn_away(mut self, reason: Reason) {
        if let Some(turn) = self.header_turn() {
            // Some clients take an answer that comes before their request for a fault.
            let mut waste = [0; 4096];
            while !self.meter.has_ended() && self.read(&mut waste).await.is_ok_and(|read| read > 0) {}
            self.refused = Some((turn, reason));
        } else {
            self.refused = Some((self.metered_turn, reason));
        }
        let _ = AsyncWriteExt::shutdown(&mut self).await;
    }

    /// Sends what is held together with the begin of `buf`; ready with how much of `buf` was taken once nothing is held.
    fn poll_write_with_held(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        while !held.is_empty() {
            let written = ready!(Pin::new(&mut self.tls).poll_write_vectored(cx, &[IoSlice::new(held), IoSlice::new(buf)]))?;
            let of_held = written.min(held.len());
            held.drain(..of_held);
            if held.is_empty() {
                *held = Vec::new();
            }
            if written > of_held {
                return Poll::Ready(Ok(written - of_held));
            }
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    /// Lets those who are ready to run say what they have to say before a small piece of HTTP/2 is written: the answers of
    /// several streams then are one TLS record, one segment and one wake of the client, not one for each.
    fn poll_gather(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<()> {
        let multiplexed = self.header_turn().is_none() && self.alpn == Some(ALPN::H2);
        if !multiplexed || length >= SMALL || std::mem::replace(&mut self.gathered, true) {
            return Poll::Ready(());
        }
        // Behind all tasks that are ready, not before them: a task that wakes itself while it runs is the last in the queue.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn noted<T>(&mut self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.owed = !matches!(outcome, Poll::Ready(Ok(_)));
        outcome
    }

    fn poll_preface(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the preface of HTTP/2 took too long")));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tls).poll_read(cx, buf))?;
        self.preface_left = self.preface_left.saturating_sub(buf.filled().len() - before);
        if self.preface_left == 0 {
            self.deadline = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Counts and logs what the HTTP/2 layer refuses by these bytes.
    fn look_at(&mut self, bytes: &[u8]) {
        let Self { outgoing: Some(outgoing), settings, socket, .. } = self else { return };
        outgoing.pass(bytes, |reason| drop(settings.refused(socket, Protocol::Http2, None, reason)));
    }

    fn refused_in(&self, turn: u32) -> Option<Reason> {
        self.refused.filter(|(refused_turn, _)| *refused_turn == turn).map(|(_, reason)| reason)
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guarded").field(&self.socket).finish()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.traffic.may_end() && !this.owed && !this.header_has_begun() {
            if this.traffic.is_cut() {
                this.settings.metrics.drain_cut(DrainCut::Silent, 1);
            }
            // The client reads the end of TLS and of the stream, and pingora that the client is gone. If the client does
            // not take even this much, it does without.
            let _ = Pin::new(&mut this.tls).poll_shutdown(cx)?;
            return Poll::Ready(Ok(()));
        }
        let Some(turn) = this.header_turn() else {
            if this.preface_left > 0 {
                return this.poll_preface(cx, buf);
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.tls).poll_read(cx, buf))?;
            this.body_came |= buf.filled().len() > before;
            return Poll::Ready(Ok(()));
        };
        if turn != this.metered_turn {
            // A new header. Until its first byte only the keepalive timeout runs, which pingora keeps.
            this.metered_turn = turn;
            let limits = HeaderLimits::of(&this.settings.limits.load());
            // Where a body ends is pingora's to know: with its last bytes it may have taken the first of this header.
            let taken = std::mem::take(&mut this.body_came) || this.meter.was_followed();
            this.meter = if taken { HeaderMeter::in_the_middle(limits) } else { HeaderMeter::new(limits) };
            this.deadline = None;
        }
        if this.refused_in(turn).is_some() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the request header is refused")));
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            // Of whom nothing has come is not told anything: it would read the answer as that to its next request.
            if this.meter.has_begun() {
                this.refused = Some((turn, Reason::HeaderTimeout));
            }
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the request header took too long")));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.tls).poll_read(cx, buf))?;
        // The bytes are handed on in any case: pingora closes without an answer if the very first read fails. If they
        // complete the header, the rules for whole requests refuse it; if not, the next read fails.
        if let Err(reason) = this.meter.feed(&buf.filled()[before..]) {
            this.refused = Some((turn, reason));
        }
        if this.meter.has_begun() && this.deadline.is_none() {
            this.deadline = Some(Box::pin(tokio::time::sleep_until(Instant::now() + this.settings.limits.load().header_deadline)));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // What is answered while a header is awaited is pingora's own: the header could not be parsed. Our answer follows in
        // `shutdown`, which pingora calls next.
        if let Some(turn) = self.header_turn()
            && buf.starts_with(b"HTTP/1.1 ")
        {
            if self.refused_in(turn).is_none() {
                self.refused = Some((turn, Reason::MalformedRequest));
            }
            return Poll::Ready(Ok(buf.len()));
        }
        if std::mem::take(self.hold_next.get_mut()) && buf.len() <= MAX_HELD {
            self.held.get_mut().unwrap_or_else(PoisonError::into_inner).extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        let written = self.poll_write_with_held(cx, buf);
        if let Poll::Ready(Ok(written)) = written {
            self.look_at(&buf[..written]);
        }
        self.noted(written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_release(cx))?;
        ready!(self.poll_gather(cx, bufs.iter().map(|buf| buf.len()).sum()));
        let written = Pin::new(&mut self.tls).poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(mut written)) = written {
            for buf in bufs {
                let taken = written.min(buf.len());
                self.look_at(&buf[..taken]);
                written -= taken;
            }
        }
        self.noted(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.held.get_mut().unwrap_or_else(PoisonError::into_inner).is_empty() {
            let released = self.poll_release(cx);
            ready!(self.noted(released))?;
        }
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        self.gathered &= flushed.is_pending();
        self.noted(flushed)
    }

    /// Sends what is still to be said, then the end of TLS and of the stream, then waits for the client to have taken it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.is_none() {
            if this.owed {
                return Poll::Ready(Ok(()));
            }
            let farewell = this.farewell();
            let latest = Instant::now() + LINGER_IN_ALL;
            this.closing = Some(Closing { farewell, tls: TlsEnd::Due, deadline: Box::pin(tokio::time::sleep(LINGER)), latest });
        }
        let closing = this.closing.as_mut().expect("set above");
        if closing.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        ready!(poll_send(this.held.get_mut().unwrap_or_else(PoisonError::into_inner), |bytes| Pin::new(&mut this.tls).poll_write(cx, bytes)))?;
        ready!(poll_send(&mut closing.farewell, |bytes| Pin::new(&mut this.tls).poll_write(cx, bytes)))?;
        if closing.tls == TlsEnd::Due {
            ready!(Pin::new(&mut this.tls).poll_shutdown(cx))?;
            closing.tls = TlsEnd::Sent;
        }
        let mut came = false;
        let ended = this.socket.poll_drain(cx, &mut came);
        if came && ended.is_pending() {
            closing.deadline.as_mut().reset(closing.latest.min(Instant::now() + LINGER));
            if closing.deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
        }
        ended.map(Ok)
    }
}

impl Guarded {
    /// The answer to a header that never became a request, or to a connection that is not served; empty if there is none
    /// to give.
    fn farewell(&self) -> Vec<u8> {
        let Some(reason) = self.refused_in(self.turn.load(Ordering::Relaxed)) else { return Vec::new() };
        let reply = reason.reply();
        let multiplexed = self.header_turn().is_none();
        let (protocol, status) = if multiplexed { (Protocol::Http2, None) } else { (Protocol::Http1, Some(reply.status.as_u16())) };
        let request_id = self.settings.refused(&self.socket, protocol, status, reason);
        if !multiplexed {
            return reply.wire(&request_id);
        }
        let length = u8::try_from(GOAWAY_FIXED.len() + reply.word.len()).expect("a word of the table is short");
        [&EMPTY_SETTINGS[..], &[0, 0, length, 7, 0, 0, 0, 0, 0], &GOAWAY_FIXED, reply.word.as_bytes()].concat()
    }
}

#[async_trait]
impl Shutdown for Guarded {
    async fn shutdown(&mut self) {
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl UniqueID for Guarded {
    fn id(&self) -> UniqueIDType {
        self.socket.id()
    }
}

impl Ssl for Guarded {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.ssl.clone()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.alpn.clone()
    }
}

impl Peek for Guarded {}

impl GetTimingDigest for Guarded {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Guarded {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.proxy_digest.clone()
    }
}

impl GetSocketDigest for Guarded {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.socket.get_socket_digest()
    }
}
