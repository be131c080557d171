//! A WebSocket after its 101: bytes of the client to the guest and of the guest to the client, both at once.
//!
//! pingora carries the two ways by turns: while it waits for a client to take an answer it takes nothing from it, and while
//! it waits for a guest to take a message it takes nothing from it either. Two ends that each send before they read would
//! wait for one another for ever, though both read in the end. So once the 101 is through, the service carries the rest by
//! itself, and pingora's tasks wait for it.
//!
//! Owns: one buffer for each way, small while the way is quiet. What a ping, a sleep or a drain mean is [`super::guest_socket`]'s.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::ReadBuf;

use super::guest_socket::GuestEnd;
use crate::connection::Guarded;

/// What is read at a time: the most that a TLS record carries; of a way that was quiet, as much as most messages have.
const BUFFER: usize = 16 * 1024;
const QUIET_BUFFER: usize = 512;
/// A buffer that was filled whole becomes so many times larger.
const GROWTH: usize = 8;
/// Buffers of one way that are carried before others on the thread have their turn.
const AT_A_STRETCH: usize = 32;

/// From whom a byte came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the client.
    In,
    /// From the guest.
    Out,
}

/// Carries until one end has closed and the other has taken what came before that, or one is broken. `early` came behind
/// the client's handshake; `came` is told of every byte.
pub(crate) async fn carry(client: &Guarded, guest: &GuestEnd, early: Bytes, mut came: impl FnMut(Way, usize)) -> io::Result<()> {
    let (mut up, mut down) = (Half::new(Way::In, &early), Half::new(Way::Out, &[]));
    if !early.is_empty() {
        came(Way::In, early.len());
    }
    let result = poll_fn(|cx| {
        let up = up.poll(
            cx,
            |cx, buf| client.poll_tunnel_read(cx, buf),
            |cx, bytes| guest.poll_write(cx, bytes),
            |cx| guest.poll_flush(cx),
            &mut came,
        );
        if up.is_ready() {
            return up;
        }
        down.poll(
            cx,
            |cx, buf| guest.poll_read(cx, buf),
            |cx, bytes| client.poll_tunnel_write(cx, bytes),
            |cx| client.poll_tunnel_flush(cx),
            &mut came,
        )
    })
    .await;
    // The app reads an orderly end where one can be said at once.
    poll_fn(|cx| {
        let _ = guest.poll_shutdown(cx);
        Poll::Ready(())
    })
    .await;
    result
}

/// One way.
struct Half {
    way: Way,
    buffer: Vec<u8>,
    // Of the buffer, what is still to be written.
    from: usize,
    to: usize,
    flushed: bool,
    ended: bool,
}

impl Half {
    fn new(way: Way, first: &[u8]) -> Self {
        let mut buffer = first.to_vec();
        buffer.resize(first.len().max(QUIET_BUFFER), 0);
        Self { way, buffer, from: 0, to: first.len(), flushed: true, ended: false }
    }

    /// Ready when the end that is read has closed and the other has taken everything.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut read: impl FnMut(&mut Context<'_>, &mut ReadBuf<'_>) -> Poll<io::Result<()>>,
        mut write: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>,
        mut flush: impl FnMut(&mut Context<'_>) -> Poll<io::Result<()>>,
        came: &mut impl FnMut(Way, usize),
    ) -> Poll<io::Result<()>> {
        for _ in 0..AT_A_STRETCH {
            while self.from < self.to {
                self.flushed = false;
                match ready!(write(cx, &self.buffer[self.from..self.to]))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => self.from += written,
                }
            }
            if self.ended {
                return flush(cx);
            }
            if self.to == self.buffer.len() && self.to < BUFFER {
                self.buffer.resize((self.to * GROWTH).min(BUFFER), 0);
            }
            let mut buf = ReadBuf::new(&mut self.buffer);
            match read(cx, &mut buf) {
                Poll::Ready(result) => {
                    result?;
                    let length = buf.filled().len();
                    (self.from, self.to, self.ended) = (0, length, length == 0);
                    if length > 0 {
                        came(self.way, length);
                    }
                }
                Poll::Pending => {
                    if !self.flushed {
                        ready!(flush(cx))?;
                        self.flushed = true;
                    }
                    if self.buffer.len() > QUIET_BUFFER {
                        self.buffer = vec![0; QUIET_BUFFER];
                        (self.from, self.to) = (0, 0);
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
