//! A guest stream as pingora's socket, for WebSockets: connections that are never reused. pingora reads no further than
//! the header of a 101; the rest is carried by [`super::tunnel`] over the stream's other handle, [`GuestEnd`].
//!
//! It also answers the pings of a client whose microVM is asleep (design §4 rule 5). They would otherwise be parked bytes
//! that wake it, and a client that keeps its connection open would keep its microVM awake. While the microVM is awake every
//! byte passes unchanged in both directions.
//!
//! A frame that the guest has begun counts as an answer that is being computed, until it is whole.
//!
//! And it takes leave: when the gateway drains, the client reads Close 1001 between two frames. Its answer goes on to the
//! app, which so learns of it as well (a sleeping microVM is not woken for that), and the tunnel ends with the app's end of
//! it or after [`MOMENT`].

use std::{
    collections::VecDeque,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use idle_controller::Awake;
use pingora_core::protocols::l4::virt::{VirtualSockOpt, VirtualSocket};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use vmm_runtime::engine::GuestStream;

use super::frames::{self, Ping, Scanner};
use crate::{drain::{Drain, MOMENT}, metrics::Open};

/// Pongs that wait for the client to read; a client that does not read gets no more of them.
const MAX_PONG_BYTES: usize = 4096;
/// Of an answer's status line, as much as holds its status.
const STATUS_LINE: usize = "HTTP/1.1 101".len();
const HEADER_END: &[u8; 4] = b"\r\n\r\n";
/// Close, unmasked as a server's, with status 1001 "going away" (RFC 6455 §5.5.1, §7.4.1).
const GOING_AWAY: [u8; 4] = [0x88, 2, 0x03, 0xE9];

/// The stream as pingora has it. It is closed when this and every [`GuestEnd`] are gone.
pub(crate) struct GuestSocket {
    end: GuestEnd,
}

/// The stream as the tunnel has it.
#[derive(Clone)]
pub(crate) struct GuestEnd {
    // Locked for one poll at a time, all of them in the task of one request.
    tunnel: Arc<Mutex<Tunnel>>,
}

struct Tunnel {
    stream: GuestStream,
    _open: Open,
    awake: Arc<Awake>,
    first_read: FirstRead,
    to_guest: Direction,
    from_guest: Direction,
    /// What came of the guest in one piece with the header of its 101.
    early: Vec<u8>,
    /// A ping that is being taken from the client, as far as it has come.
    ping: Vec<u8>,
    /// What began like a ping and goes to the guest before anything else.
    held_back: Vec<u8>,
    /// What is to be said to the client between two frames of the guest's.
    pongs: VecDeque<u8>,
    reader: Option<Waker>,
    /// The guest has said a part of a frame and owes the rest.
    owes: bool,
    leave: Leave,
}

/// How far the leave-taking of a drain has come.
enum Leave {
    /// The gateway goes on, or the guest is in the middle of a frame.
    NotYet { drain: Drain, begins: Pin<Box<WaitForCancellationFutureOwned>> },
    /// The client has been sent this much of [`GOING_AWAY`].
    Saying(usize),
    /// Until the app ends the tunnel, or this is over.
    Said(Pin<Box<Sleep>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstRead {
    Ahead,
    Yielded,
}

/// What a direction carries.
enum Direction {
    /// The header of the handshake.
    Header(HeaderScan),
    /// Frames.
    Frames(Scanner),
    /// Something else: the handshake was refused.
    Opaque,
}

/// Follows the header of the handshake.
struct HeaderScan {
    side: Side,
    /// Its first bytes, up to [`STATUS_LINE`].
    start: Vec<u8>,
    /// Bytes of [`HEADER_END`] that were the last to pass.
    matched: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Request,
    Answer,
}

impl Direction {
    fn header(side: Side) -> Self {
        Self::Header(HeaderScan { side, start: Vec::with_capacity(STATUS_LINE), matched: 0 })
    }

    /// These bytes pass.
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self {
                Self::Opaque => return,
                Self::Frames(scanner) => return scanner.pass(bytes),
                Self::Header(header) => {
                    let Some(taken) = header.pass(bytes) else { return };
                    *self = header.next();
                    bytes = &bytes[taken..];
                }
            }
        }
    }

    /// How many of these bytes pass in the header, if it ends in them and frames follow.
    fn pass_header(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Self::Header(header) = self {
            let Some(taken) = header.pass(&bytes[at..]) else { break };
            *self = header.next();
            at += taken;
        }
        if self.frames().is_some() { at } else { bytes.len() }
    }

    fn frames(&self) -> Option<&Scanner> {
        match self {
            Self::Frames(scanner) => Some(scanner),
            Self::Header(_) | Self::Opaque => None,
        }
    }
}

impl HeaderScan {
    /// How many of these bytes the header takes, if it ends in them.
    fn pass(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, &byte) in bytes.iter().enumerate() {
            if self.start.len() < STATUS_LINE {
                self.start.push(byte);
            }
            self.matched = match self.matched {
                matched if byte == HEADER_END[matched] => matched + 1,
                _ => usize::from(byte == HEADER_END[0]),
            };
            if self.matched == HEADER_END.len() {
                return Some(at + 1);
            }
        }
        None
    }

    /// What follows it.
    fn next(&self) -> Direction {
        let status = self.start.get(STATUS_LINE - 3..).unwrap_or_default();
        match (self.side, status) {
            // If the app refuses, nothing follows.
            (Side::Request, _) | (Side::Answer, b"101") => Direction::Frames(Scanner::default()),
            // An interim answer; the real one is still to come.
            (Side::Answer, [b'1', ..]) => Direction::header(Side::Answer),
            (Side::Answer, _) => Direction::Opaque,
        }
    }
}

impl Tunnel {
    /// Passes bytes to the guest, except for the pings of a client whose microVM is asleep.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !matches!(self.leave, Leave::NotYet { .. }) && self.awake.is_asleep() {
            // The answer to our Close, perhaps what was sent before it was read. Nobody is woken to hear a goodbye.
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(self.poll_send_held_back(cx))?;
        if !self.ping.is_empty() {
            return Poll::Ready(Ok(self.take_ping(bytes)));
        }
        let passed = match (self.to_guest.frames(), self.from_guest.frames()) {
            // In the middle of the guest's frame there is no place for an answer of ours.
            (Some(scanner), Some(from)) if from.at_boundary() && self.awake.is_asleep() => scanner.before_ping(bytes),
            _ => bytes.len(),
        };
        if passed == 0 && !bytes.is_empty() {
            return Poll::Ready(Ok(self.take_ping(bytes)));
        }
        let written = ready!(self.stream.as_mut().poll_write(cx, &bytes[..passed]))?;
        self.to_guest.pass(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    /// `bytes` go on with a ping, or begin one; answers how many of them were taken.
    fn take_ping(&mut self, bytes: &[u8]) -> usize {
        for (taken, &byte) in (1..).zip(bytes) {
            self.ping.push(byte);
            match frames::answer(&self.ping) {
                Ping::Incomplete => {}
                Ping::Pong(pong) => {
                    self.ping.clear();
                    if self.pongs.len() + pong.len() <= MAX_PONG_BYTES {
                        self.pongs.extend(pong);
                        self.reader.take().into_iter().for_each(Waker::wake);
                    }
                    return taken;
                }
                Ping::NotOne => {
                    self.held_back = std::mem::take(&mut self.ping);
                    return taken;
                }
            }
        }
        bytes.len()
    }

    fn poll_send_held_back(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held_back.is_empty() {
            let written = ready!(self.stream.as_mut().poll_write(cx, &self.held_back))?;
            self.to_guest.pass(&self.held_back[..written]);
            self.held_back.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    /// What pingora reads: everything, but nothing behind the header of a 101.
    fn poll_read_header(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first_read == FirstRead::Ahead {
            // pingora issue #946: if the 101 is read before the end of the (empty) request body has gone through its
            // other task, the tunnel is torn down. Yielding once lets the body go first.
            self.first_read = FirstRead::Yielded;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.from_guest.frames().is_some() {
            // The tunnel is under way, in this same task, and pingora ends with it.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(self.stream.as_mut().poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        let passed = self.from_guest.pass_header(came);
        self.early.extend_from_slice(&came[passed..]);
        buf.set_filled(before + passed);
        Poll::Ready(Ok(()))
    }

    /// What the client reads after the 101.
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let said = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early[..said]);
            self.from_guest.pass(&self.early[..said]);
            self.early.drain(..said);
            self.note_debt();
            return Poll::Ready(Ok(()));
        }
        if !self.pongs.is_empty() && self.from_guest.frames().is_some_and(Scanner::at_boundary) {
            let said = self.pongs.len().min(buf.remaining());
            buf.put_slice(&self.pongs.make_contiguous()[..said]);
            self.pongs.drain(..said);
            return Poll::Ready(Ok(()));
        }
        if let Some(ended) = self.poll_leave(cx, buf) {
            return ended;
        }
        let before = buf.filled().len();
        match self.stream.as_mut().poll_read(cx, buf) {
            Poll::Ready(read) => {
                self.from_guest.pass(&buf.filled()[before..]);
                self.note_debt();
                Poll::Ready(read)
            }
            Poll::Pending => {
                self.reader = Some(cx.waker().clone());
                // If the guest is in the middle of a frame, the rest of it comes first, and then the next read.
                if let Leave::NotYet { begins, .. } = &mut self.leave
                    && self.from_guest.frames().is_some_and(Scanner::at_boundary)
                    && begins.as_mut().poll(cx).is_ready()
                {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        }
    }

    /// A frame that the guest has begun is an answer being computed until it is whole: a microVM that is told to sleep in the
    /// middle of it is woken for the rest, which the client waits for.
    fn note_debt(&mut self) {
        let owes = self.from_guest.frames().is_some_and(|scanner| !scanner.at_boundary());
        if owes != self.owes {
            self.owes = owes;
            if owes { self.awake.computing() } else { self.awake.streaming() }
        }
    }

    /// What the client reads while the gateway drains; `None` as long as the guest has the word.
    fn poll_leave(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Option<Poll<io::Result<()>>> {
        loop {
            match &mut self.leave {
                Leave::NotYet { drain, .. } => {
                    if !drain.has_begun() || !self.from_guest.frames().is_some_and(Scanner::at_boundary) {
                        return None;
                    }
                    self.leave = Leave::Saying(0);
                }
                Leave::Saying(said) if *said < GOING_AWAY.len() => {
                    let more = buf.remaining().min(GOING_AWAY.len() - *said);
                    buf.put_slice(&GOING_AWAY[*said..*said + more]);
                    *said += more;
                    return Some(Poll::Ready(Ok(())));
                }
                Leave::Saying(_) => self.leave = Leave::Said(Box::pin(tokio::time::sleep(MOMENT))),
                Leave::Said(end) => {
                    // Nothing may follow a Close; what the app still says goes nowhere.
                    let mut waste = [0; 4096];
                    let mut waste = ReadBuf::new(&mut waste);
                    return Some(match self.stream.as_mut().poll_read(cx, &mut waste) {
                        Poll::Ready(Ok(())) if !waste.filled().is_empty() => continue,
                        Poll::Ready(_) => Poll::Ready(Ok(())),
                        Poll::Pending => end.as_mut().poll(cx).map(Ok),
                    });
                }
            }
        }
    }
}

impl GuestSocket {
    /// Wraps a stream and counts it as open.
    pub fn new(stream: GuestStream, awake: Arc<Awake>, drain: &Drain, open: Open) -> Self {
        let tunnel = Tunnel {
            stream,
            _open: open,
            awake,
            first_read: FirstRead::Ahead,
            to_guest: Direction::header(Side::Request),
            from_guest: Direction::header(Side::Answer),
            early: Vec::new(),
            ping: Vec::new(),
            held_back: Vec::new(),
            pongs: VecDeque::new(),
            reader: None,
            owes: false,
            leave: Leave::NotYet { drain: drain.clone(), begins: Box::pin(drain.begins_owned()) },
        };
        Self { end: GuestEnd { tunnel: Arc::new(Mutex::new(tunnel)) } }
    }

    /// The other handle.
    pub fn end(&self) -> GuestEnd {
        self.end.clone()
    }
}

impl GuestEnd {
    /// The next bytes for the client.
    pub fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.tunnel().poll_read(cx, buf)
    }

    /// Passes bytes of the client.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.tunnel().poll_write(cx, bytes)
    }

    /// Until the guest's side has taken them.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut tunnel = self.tunnel();
        ready!(tunnel.poll_send_held_back(cx))?;
        tunnel.stream.as_mut().poll_flush(cx)
    }

    /// Nothing more will come of the client.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tunnel().stream.as_mut().poll_shutdown(cx)
    }

    fn tunnel(&self) -> MutexGuard<'_, Tunnel> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for GuestSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestSocket")
    }
}

impl AsyncRead for GuestSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.end.tunnel().poll_read_header(cx, buf)
    }
}

impl AsyncWrite for GuestSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.end.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end.poll_shutdown(cx)
    }
}

impl VirtualSocket for GuestSocket {
    fn set_socket_option(&self, _option: VirtualSockOpt) -> io::Result<()> {
        Ok(())
    }
}
