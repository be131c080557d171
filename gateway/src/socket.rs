//! A client's TCP connection: shared with those who watch for its end, given up if its client takes nothing or vanishes.
//!
//! Owns: the socket's options, and how reading and writing wait for the kernel. Never looks at what is said on it, but for
//! [`Tickets`].

use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::config::EdgeLimits;
use async_trait::async_trait;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID, UniqueIDType,
    l4::socket::SocketAddr as PingoraAddr,
    raw_connect::ProxyDigest,
};
use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use crate::tickets::{HandshakeEnd, Tickets};

/// A client's socket, shared with those who watch for its end.
pub(crate) struct Socket {
    tcp: Arc<TcpStream>,
    digest: Arc<SocketDigest>,
    // How long the client may take nothing of what is written, and since when it has not.
    patience: Duration,
    stall: Option<Pin<Box<Sleep>>>,
    // Of the handle that TLS is spoken through.
    tickets: Option<Tickets>,
}

impl Clone for Socket {
    fn clone(&self) -> Self {
        Self { tcp: self.tcp.clone(), digest: self.digest.clone(), patience: self.patience, stall: None, tickets: None }
    }
}

impl Socket {
    /// Takes over an accepted connection.
    pub fn new(tcp: TcpStream, peer: SocketAddr, limits: &EdgeLimits) -> Self {
        // A socket that does not take an option works without it.
        let _ = tcp.set_nodelay(true);
        let _ = watch_for_vanishing(&tcp, limits.vanished_deadline);
        let digest = SocketDigest::from_raw_fd(tcp.as_raw_fd());
        // Set now: pingora would ask the descriptor when it is needed, which may by then be another connection's.
        let _ = digest.peer_addr.set(Some(PingoraAddr::Inet(peer)));
        Self { tcp: Arc::new(tcp), digest: Arc::new(digest), patience: limits.write_deadline, stall: None, tickets: None }
    }

    /// A handle to speak TLS through, which keeps session tickets back, and who is told when the handshake is over.
    pub fn for_tls(&self) -> (Self, HandshakeEnd) {
        let (tickets, end) = Tickets::new();
        (Self { tickets: Some(tickets), ..self.clone() }, end)
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

    /// Reads and throws away; ready at the end of the stream. Says in `came` whether there was anything.
    pub fn poll_drain(&self, cx: &mut Context<'_>, came: &mut bool) -> Poll<()> {
        let mut waste = [0; 16 * 1024];
        loop {
            match ready!(self.tcp.poll_read_ready(cx)).and_then(|()| self.tcp.try_read(&mut waste)) {
                Ok(0) => return Poll::Ready(()),
                Ok(_) => *came = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(()),
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            match self.tcp.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return self.poll_stalled(cx).map(Err),
            }
            // Of one piece the kernel makes less ado.
            let written = if let [only] = bufs { self.tcp.try_write(only) } else { self.tcp.try_write_vectored(bufs) };
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    self.stall = None;
                    return Poll::Ready(result);
                }
            }
        }
    }

    /// The same while tickets are held back or may have to be.
    fn poll_send_with_tickets(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if self.tickets.as_mut().is_some_and(|tickets| tickets.hold(bufs)) {
            // The acknowledgement of its Finished, which they would have taken along. A client that sends no small segment before
            // it has it (Nagle's algorithm) would send its first request 40 ms late (tcp(7), TCP_QUICKACK). Where it cannot be
            // asked for, that is what happens.
            let _ = rustix::net::sockopt::set_tcp_quickack(&*self.tcp, true);
            return Poll::Ready(Ok(length));
        }
        while let Some(held) = self.tickets.as_mut().and_then(Tickets::take) {
            let pieces: Vec<_> = std::iter::once(IoSlice::new(&held)).chain(bufs.iter().copied()).collect();
            let sent = self.poll_send(cx, &pieces);
            let taken = if let Poll::Ready(Ok(taken)) = sent { taken } else { 0 };
            if taken > held.len() {
                return Poll::Ready(Ok(taken - held.len()));
            }
            self.tickets.iter_mut().for_each(|tickets| tickets.put_back(&held[taken..]));
            ready!(sent)?;
        }
        let written = ready!(self.poll_send(cx, bufs))?;
        self.tickets = self.tickets.take().and_then(|tickets| tickets.after(written, length));
        Poll::Ready(Ok(written))
    }

    /// Whether the client has taken nothing for too long. To be asked only while something is to be written.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let stall = self.stall.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.patience)));
        stall.as_mut().poll(cx).map(|()| io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing of what is sent to it"))
    }
}

/// Lets the kernel find out that the client's host is gone: a connection on which nothing is sent, such as a silent
/// WebSocket, would otherwise stay for ever. Probes begin after half the time; a connection whose probes or data are not
/// acknowledged for `deadline` is broken (tcp(7), TCP_USER_TIMEOUT).
fn watch_for_vanishing(tcp: &TcpStream, deadline: Duration) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_tcp_keepidle(tcp, deadline / 2)?;
    sockopt::set_tcp_keepintvl(tcp, (deadline / 8).max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepcnt(tcp, 4)?;
    sockopt::set_tcp_user_timeout(tcp, u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX))?;
    sockopt::set_socket_keepalive(tcp, true)
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.tcp).finish()
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            let (fits, mut read) = (room.len(), None);
            let outcome = self.tcp.try_io(Interest::READABLE, || {
                let length = rustix::net::recv(&*self.tcp, room, RecvFlags::empty())?.0;
                read = Some(length);
                // Less than there was room for: that was all of it. Said as WouldBlock, so that the next read waits for the
                // kernel's word instead of asking in vain. (Zero is the end, which stays readable.)
                if length > 0 && length < fits { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match (read, outcome) {
                (Some(length), _) => {
                    buf.advance(length);
                    self.tickets.iter_mut().for_each(Tickets::heard);
                    return Poll::Ready(Ok(()));
                }
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                (None, outcome) => return Poll::Ready(outcome),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.tickets.is_some() { self.poll_send_with_tickets(cx, bufs) } else { self.poll_send(cx, bufs) }
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

#[cfg(test)]
mod tests {
    use rustix::net::sockopt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_kernel_watches_for_clients_that_vanish() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, peer) = listener.accept().await.unwrap();
        let limits = EdgeLimits { vanished_deadline: Duration::from_secs(80), ..::config::Config::defaults().edge.limits };
        let tcp = Socket::new(tcp, peer, &limits).tcp;
        assert!(sockopt::socket_keepalive(&tcp).unwrap() && sockopt::tcp_nodelay(&tcp).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&tcp).unwrap(), 80_000);
        // Four unanswered probes, ten seconds apart, after forty seconds of silence.
        let probes = (sockopt::tcp_keepidle(&tcp).unwrap(), sockopt::tcp_keepintvl(&tcp).unwrap(), sockopt::tcp_keepcnt(&tcp).unwrap());
        assert_eq!(probes, (Duration::from_secs(40), Duration::from_secs(10), 4));
    }
}
