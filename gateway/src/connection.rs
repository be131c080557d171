//! A client's connection as pingora sees it: TLS over a socket that can be watched from beside, guarded against slow and
//! oversized headers.
//!
//! pingora's HTTP/1.1 reader has no deadline for a whole header (its issue #447), takes a megabyte of it, and answers
//! some requests before any hook of ours has seen them. [`Guarded`] sits between the two: while a header is awaited it
//! keeps the deadline, counts, and replaces what pingora says by a row of our own table.

use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID, UniqueIDType,
    l4::socket::SocketAddr as PingoraAddr,
    raw_connect::ProxyDigest,
    tls::{SslDigest, TlsStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use crate::{Limits, access_log::{AccessLog, Entry}, drain::Traffic, framing::HeaderLimits, meter::HeaderMeter, metrics::{Metrics, Protocol}, reply::Reason};

/// After the last answer on a connection that is closed with input unread: this much is read and thrown away, so that
/// the close does not reach the client as a reset that overtakes the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// A client's socket, shared with those who watch for its end.
#[derive(Clone)]
pub(crate) struct Socket {
    tcp: Arc<TcpStream>,
    digest: Arc<SocketDigest>,
}

impl Socket {
    /// Takes over an accepted connection.
    pub fn new(tcp: TcpStream, peer: SocketAddr) -> Self {
        let digest = SocketDigest::from_raw_fd(tcp.as_raw_fd());
        // Set now: pingora would ask the descriptor when it is needed, which may by then be another connection's.
        let _ = digest.peer_addr.set(Some(PingoraAddr::Inet(peer)));
        Self { tcp: Arc::new(tcp), digest: Arc::new(digest) }
    }

    /// The client's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        match self.digest.peer_addr() {
            Some(PingoraAddr::Inet(address)) => Some(*address),
            Some(PingoraAddr::Unix(_)) | None => None,
        }
    }

    /// Ends when the client has closed its side or the connection is broken. Takes no byte out of the socket.
    pub async fn closed_by_client(&self) -> io::Result<()> {
        use std::os::fd::AsFd as _;
        // A descriptor of its own: the readiness of the first one belongs to the connection's reader, and an epoll
        // instance takes each descriptor only once.
        let watched = TcpStream::from_std(self.tcp.as_fd().try_clone_to_owned()?.into())?;
        loop {
            let ready = watched.ready(Interest::READABLE).await?;
            if ready.is_read_closed() {
                return Ok(());
            }
            // Forgets that there are bytes, without reading them; the next ones, or the end, make it ready again.
            let _ = watched.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
        }
    }

    /// Reads and throws away; ready at the end of the stream or after `budget` bytes.
    fn poll_drain(&self, cx: &mut Context<'_>, budget: &mut usize) -> Poll<()> {
        let mut waste = [0; 4096];
        while *budget > 0 {
            match ready!(self.tcp.poll_read_ready(cx)).and_then(|()| self.tcp.try_read(&mut waste)) {
                Ok(0) => break,
                Ok(read) => *budget = budget.saturating_sub(read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        Poll::Ready(())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.tcp).finish()
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            match self.tcp.try_read(buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.tcp.poll_write_ready(cx))?;
            match self.tcp.try_write_vectored(bufs) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.tcp, rustix::net::Shutdown::Write).map_err(Into::into))
    }
}

#[async_trait]
impl Shutdown for Socket {
    async fn shutdown(&mut self) {
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl UniqueID for Socket {
    fn id(&self) -> UniqueIDType {
        self.tcp.as_raw_fd()
    }
}

impl Ssl for Socket {}
impl Peek for Socket {}

impl GetTimingDigest for Socket {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Socket {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Socket {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(self.digest.clone())
    }
}

/// How far the close of a connection has come.
struct Closing {
    // Our own answer to a header that never became a request, as far as it is not sent yet.
    farewell: Vec<u8>,
    tls: TlsEnd,
    // Bytes that may still be thrown away.
    budget: usize,
    // Whoever does not take the answer in time does not get it.
    deadline: Pin<Box<Sleep>>,
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
    // The client has not yet taken what it was sent.
    write_waits: bool,
    // Even: a header is awaited. Odd: a request is under way. The service counts it up, through a shared reference.
    turn: AtomicU32,
    // The turn that `meter` and `deadline` belong to.
    metered_turn: u32,
    meter: HeaderMeter,
    deadline: Option<Pin<Box<Sleep>>>,
    // Why the header awaited in this turn is refused.
    refused: Option<(u32, Reason)>,
    closing: Option<Closing>,
}

impl Guarded {
    /// Guards a connection. HTTP/2 brings its own limits and is only passed through.
    pub fn new(tls: TlsStream<Socket>, socket: Socket, settings: GuardSettings, traffic: Arc<Traffic>) -> Self {
        let multiplexed = matches!(tls.selected_alpn_proto(), Some(ALPN::H2));
        let turn = u32::from(multiplexed);
        let limits = settings.limits.load();
        let meter = HeaderMeter::new(HeaderLimits::of(&limits));
        let deadline = (!multiplexed).then(|| Box::pin(tokio::time::sleep(limits.header_deadline)));
        drop(limits);
        let (alpn, ssl) = (tls.selected_alpn_proto(), tls.get_ssl_digest());
        Self { tls: Shared(Mutex::new(tls)), alpn, ssl, socket, settings, traffic, write_waits: false, turn: AtomicU32::new(turn), metered_turn: turn, meter, deadline, refused: None, closing: None }
    }

    /// The connection under a pingora session, if it is HTTP/1.1.
    pub fn of(session: &pingora_proxy::Session) -> Option<&Self> {
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
        if this.traffic.may_end() && !this.write_waits && !this.header_has_begun() {
            // The client reads the end of TLS and of the stream, and pingora that the client is gone. If the client does
            // not take even this much, it does without.
            let _ = Pin::new(&mut this.tls).poll_shutdown(cx)?;
            return Poll::Ready(Ok(()));
        }
        let Some(turn) = this.header_turn() else {
            return Pin::new(&mut this.tls).poll_read(cx, buf);
        };
        if turn != this.metered_turn {
            // A new header. Until its first byte only the keepalive timeout runs, which pingora keeps.
            this.metered_turn = turn;
            this.meter = HeaderMeter::new(HeaderLimits::of(&this.settings.limits.load()));
            this.deadline = None;
        }
        if this.refused_in(turn).is_some() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the request header is refused")));
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
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
        let written = Pin::new(&mut self.tls).poll_write(cx, buf);
        self.write_waits = written.is_pending();
        written
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tls).poll_write_vectored(cx, bufs);
        self.write_waits = written.is_pending();
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        self.write_waits = flushed.is_pending();
        flushed
    }

    /// Sends what is still to be said, then the end of TLS and of the stream, then waits for the client to have taken it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.is_none() {
            let farewell = this.farewell();
            this.closing =
                Some(Closing { farewell, tls: TlsEnd::Due, budget: LINGER_BYTES, deadline: Box::pin(tokio::time::sleep(LINGER)) });
        }
        let closing = this.closing.as_mut().expect("set above");
        if closing.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        while !closing.farewell.is_empty() {
            let written = ready!(Pin::new(&mut this.tls).poll_write(cx, &closing.farewell))?;
            closing.farewell.drain(..written);
        }
        if closing.tls == TlsEnd::Due {
            ready!(Pin::new(&mut this.tls).poll_shutdown(cx))?;
            closing.tls = TlsEnd::Sent;
        }
        this.socket.poll_drain(cx, &mut closing.budget).map(Ok)
    }
}

impl Guarded {
    /// The answer to a header that never became a request; empty if there is none to give.
    fn farewell(&self) -> Vec<u8> {
        let Some(reason) = self.header_turn().and_then(|turn| self.refused_in(turn)) else { return Vec::new() };
        let request_id = uuid::Uuid::new_v4().to_string();
        let reply = reason.reply();
        self.settings.metrics.refusal(reason);
        self.settings.metrics.request(Protocol::Http1, Some(reply.status.as_u16()));
        self.settings.log.say(&Entry::unparsed(&request_id, self.socket.peer(), reason));
        reply.wire(&request_id)
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
        self.traffic.digest()
    }
}

impl GetSocketDigest for Guarded {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.socket.get_socket_digest()
    }
}
