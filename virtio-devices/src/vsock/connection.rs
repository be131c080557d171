//! One stream between a host client's socket and a guest's vsock port: what each side has said, credit, and the bytes
//! that the client has not taken yet.
//!
//! A primer (virtio 1.2 §5.10.6). The side that connects sends REQUEST and gets RESPONSE or RST. Each packet tells how large
//! its sender's receive buffer is (`buf_alloc`) and how many bytes have ever left it (`fwd_cnt`); what the other side may
//! have under way is the difference, so that nobody ever has to drop a byte. SHUTDOWN says that its sender will send no
//! more, or receive no more, or both; both are answered by RST, which ends the stream for good.
//!
//! Bytes for the guest are read from the socket straight into a buffer of the guest's, never more than its credit allows:
//! nothing of them is ever kept here. Bytes from the guest go to the socket at once, and what the client does not take
//! waits in `backlog`, which is bounded by what we announced. So a slow client stalls its own stream and no other.
//!
//! A socket is watched edge-triggered: an edge makes the stream try both directions until the socket says "not now".

use std::{
    collections::VecDeque,
    num::Wrapping,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};
use serde::{Deserialize, Serialize};

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// A guest that has not answered a REQUEST by then does not: its network stack does it, not its program.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long the guest may keep a stream that the client has closed. Linux waits as long for a RST.
const CLOSE_LIMIT: Duration = Duration::from_secs(8);

/// How far the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// REQUEST is still to be sent.
    Request,
    /// REQUEST is with the guest.
    Requested,
    /// Bytes flow.
    Open,
    /// RST is still to be sent.
    Reset,
    /// For the guest it is over; the client still gets what the guest had sent before.
    Over,
}

/// What one side does no more. Never taken back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Done {
    /// It sends nothing more.
    pub sends: bool,
    /// It receives nothing more.
    pub receives: bool,
}

impl Done {
    const BOTH: Self = Self { sends: true, receives: true };

    fn flags(self) -> u32 {
        (u32::from(self.receives) * SHUTDOWN_RECEIVE) | (u32::from(self.sends) * SHUTDOWN_SEND)
    }
}

/// What of a stream is saved; the bytes of the backlog follow after all streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedConnection {
    pub guest_port: u32,
    pub host_port: u32,
    pub phase: Phase,
    pub window: u32,
    pub forwarded: u32,
    pub told_forwarded: u32,
    pub update_due: bool,
    pub backlog_bytes: u32,
    pub peer_window: u32,
    pub peer_forwarded: u32,
    pub sent: u32,
    pub credit_asked: bool,
    pub guest_done: Done,
    pub host_done: Done,
    pub told_done: Done,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    pub guest_port: u32,
    pub host_port: u32,
    phase: Phase,
    /// The client. `None` only in a restored stream that has not been given its descriptor.
    socket: Option<OwnedFd>,
    /// Whether the event loop watches the socket.
    pub watched: bool,
    /// Whether the muxer has this stream among those that have something to tell the guest.
    pub queued: bool,
    /// When the stream is reset if nothing happens.
    pub deadline: Option<Instant>,

    /// Guest to host: the most that `backlog` may hold, announced as `buf_alloc`.
    window: u32,
    /// Bytes that have left `backlog`, ever: our `fwd_cnt`.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told_forwarded: Wrapping<u32>,
    update_due: bool,
    backlog: VecDeque<u8>,
    /// Whether the socket may take bytes.
    writable: bool,

    /// Host to guest: the guest's `buf_alloc` and `fwd_cnt`.
    peer_window: u32,
    peer_forwarded: Wrapping<u32>,
    /// Bytes sent to the guest, ever.
    sent: Wrapping<u32>,
    /// CREDIT_REQUEST was sent and has not been answered with credit.
    credit_asked: bool,
    /// Whether the socket may have bytes.
    readable: bool,

    guest_done: Done,
    host_done: Done,
    /// What of `host_done` the guest knows.
    told_done: Done,
}

impl Connection {
    /// For a client that wants to be connected to `guest_port`.
    pub fn new(guest_port: u32, host_port: u32, window: u32, socket: OwnedFd) -> Self {
        let saved = SavedConnection {
            guest_port,
            host_port,
            phase: Phase::Request,
            window,
            forwarded: 0,
            told_forwarded: 0,
            update_due: false,
            backlog_bytes: 0,
            peer_window: 0,
            peer_forwarded: 0,
            sent: 0,
            credit_asked: false,
            guest_done: Done::default(),
            host_done: Done::default(),
            told_done: Done::default(),
        };
        Self { socket: Some(socket), ..Self::restore(&saved, VecDeque::new()) }
    }

    /// A saved stream, without its socket. The caller has checked the lengths.
    pub fn restore(saved: &SavedConnection, backlog: VecDeque<u8>) -> Self {
        Self {
            guest_port: saved.guest_port,
            host_port: saved.host_port,
            phase: saved.phase,
            socket: None,
            watched: false,
            queued: false,
            deadline: None,
            window: saved.window,
            forwarded: Wrapping(saved.forwarded),
            told_forwarded: Wrapping(saved.told_forwarded),
            update_due: saved.update_due,
            backlog,
            writable: true,
            peer_window: saved.peer_window,
            peer_forwarded: Wrapping(saved.peer_forwarded),
            sent: Wrapping(saved.sent),
            credit_asked: saved.credit_asked,
            readable: true,
            guest_done: saved.guest_done,
            host_done: saved.host_done,
            told_done: saved.told_done,
        }
    }

    /// What to save, and the backlog.
    pub fn save(&self) -> (SavedConnection, &VecDeque<u8>) {
        let saved = SavedConnection {
            guest_port: self.guest_port,
            host_port: self.host_port,
            phase: self.phase,
            window: self.window,
            forwarded: self.forwarded.0,
            told_forwarded: self.told_forwarded.0,
            update_due: self.update_due,
            backlog_bytes: self.backlog.len() as u32,
            peer_window: self.peer_window,
            peer_forwarded: self.peer_forwarded.0,
            sent: self.sent.0,
            credit_asked: self.credit_asked,
            guest_done: self.guest_done,
            host_done: self.host_done,
            told_done: self.told_done,
        };
        (saved, &self.backlog)
    }

    /// The client's socket.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Gives a restored stream its socket.
    pub fn attach(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn window(&self) -> u32 {
        self.window
    }

    #[cfg(test)]
    pub fn backlog_bytes(&self) -> usize {
        self.backlog.len()
    }

    /// Goes on after a pause or a restore: what happened to the socket meanwhile is not known, and time begins again.
    pub fn resume(&mut self, now: Instant) {
        (self.readable, self.writable) = (true, true);
        self.deadline = match self.phase {
            Phase::Requested => Some(now + REQUEST_LIMIT),
            Phase::Open if self.told_done == Done::BOTH => Some(now + CLOSE_LIMIT),
            _ => None,
        };
        if self.socket.is_none() {
            // Its client is lost.
            self.abort();
        }
    }

    /// Ends it at once; the guest hears RST unless it never heard of the stream or knows that it is over.
    pub fn abort(&mut self) {
        self.drop_backlog();
        self.deadline = None;
        self.phase = match self.phase {
            Phase::Request | Phase::Over => Phase::Over,
            Phase::Requested | Phase::Open | Phase::Reset => Phase::Reset,
        };
    }

    /// Whether nothing is left to do: the caller closes the socket and forgets the stream.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Over && self.backlog.is_empty()
    }

    fn drop_backlog(&mut self) {
        self.forwarded += self.backlog.len() as u32;
        self.backlog = VecDeque::new();
    }

    /// The event loop has seen an edge. Answers bytes that went to the client.
    pub fn socket_ready(&mut self) -> u64 {
        (self.readable, self.writable) = (true, true);
        let flushed = self.flush();
        match self.phase {
            // Nobody waits for the answer any more.
            Phase::Request | Phase::Requested if self.hung_up() => self.abort(),
            // Otherwise the end of file, or a write that fails, tells.
            Phase::Open if (self.host_done.sends || self.guest_done.receives) && self.hung_up() => self.client_left(),
            _ => {}
        }
        flushed
    }

    fn hung_up(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let mut polled = [PollFd::new(socket, PollFlags::empty())];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    fn client_left(&mut self) {
        self.host_done = Done::BOTH;
        self.drop_backlog();
    }

    /// Takes a packet of the guest's for this stream; `payload` is `None` if the packet is longer than its buffer or than
    /// any window. Answers bytes that went to the client. Breaking the protocol resets the stream.
    pub fn take_packet(&mut self, header: &Header, payload: Option<&[u8]>) -> u64 {
        if header.op == op::RST {
            // What the guest sent before still goes to the client, as after a close in the guest whose program has ended.
            self.phase = Phase::Over;
            self.deadline = None;
            return 0;
        }
        if matches!(self.phase, Phase::Reset | Phase::Over) {
            return 0;
        }
        self.peer_window = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        match (self.phase, header.op, payload) {
            (Phase::Requested, op::RESPONSE, _) => self.accepted(),
            (Phase::Open, op::RW, Some(payload)) if !self.guest_done.sends && payload.len() <= self.room() => return self.deliver(payload),
            (Phase::Open, op::CREDIT_UPDATE, _) => {}
            (Phase::Open, op::CREDIT_REQUEST, _) => self.update_due = true,
            (Phase::Open, op::SHUTDOWN, _) => self.guest_shuts_down(header.flags),
            _ => self.abort(),
        }
        0
    }

    /// Bytes that the guest may send now.
    fn room(&self) -> usize {
        self.window as usize - self.backlog.len()
    }

    fn accepted(&mut self) {
        self.phase = Phase::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.host_port);
        // The first bytes on this socket, and its buffer is larger: it takes all, or its client is gone.
        if Self::try_send(self.socket.as_ref(), line.as_bytes()) != Ok(line.len()) {
            self.abort();
        }
    }

    fn guest_shuts_down(&mut self, flags: u32) {
        self.guest_done.receives |= flags & SHUTDOWN_RECEIVE != 0;
        self.guest_done.sends |= flags & SHUTDOWN_SEND != 0;
        if self.guest_done == Done::BOTH {
            // Answered at once; the backlog needs no guest.
            self.phase = Phase::Reset;
            self.deadline = None;
            return;
        }
        if self.guest_done.receives {
            // The client's writes fail from here on.
            self.shut(Shutdown::Read);
        }
        self.pass_on_end();
    }

    /// The client reads end of file once it has everything.
    fn pass_on_end(&self) {
        if self.guest_done.sends && self.backlog.is_empty() {
            self.shut(Shutdown::Write);
        }
    }

    /// Shuts down the socket itself, whatever duplicates of the descriptor there are.
    pub fn shut(&self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // It fails only on a socket that is not connected any more.
            let _ = shutdown(socket, how);
        }
    }

    /// Bytes for the client, within [`Connection::room`].
    fn deliver(&mut self, mut bytes: &[u8]) -> u64 {
        let mut taken = 0;
        while !bytes.is_empty() && self.backlog.is_empty() && self.writable && !self.host_done.receives {
            let sent = self.send(bytes);
            bytes = &bytes[sent..];
            taken += sent as u64;
        }
        if self.host_done.receives {
            // The guest sent them before it heard.
            self.forwarded += bytes.len() as u32;
        } else {
            self.backlog.extend(bytes);
        }
        self.consider_update();
        taken
    }

    /// Offers the backlog to the client; answers what it took.
    pub fn flush(&mut self) -> u64 {
        let mut taken = 0;
        while !self.backlog.is_empty() && self.writable {
            let sent = {
                let (front, _) = self.backlog.as_slices();
                let socket = self.socket.as_ref();
                Self::try_send(socket, front)
            };
            let sent = self.sent_to_client(sent);
            // Nothing, if the client left: the backlog is gone then.
            self.backlog.drain(..sent.min(self.backlog.len()));
            taken += sent as u64;
        }
        if taken > 0 {
            if self.backlog.is_empty() {
                self.backlog = VecDeque::new();
                self.pass_on_end();
            }
            self.consider_update();
        }
        taken
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        let sent = Self::try_send(self.socket.as_ref(), bytes);
        self.sent_to_client(sent)
    }

    fn try_send(socket: Option<&OwnedFd>, bytes: &[u8]) -> Result<usize, Errno> {
        let socket = socket.ok_or(Errno::NOTCONN)?;
        rustix::io::retry_on_intr(|| send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
    }

    fn sent_to_client(&mut self, outcome: Result<usize, Errno>) -> usize {
        match outcome {
            Ok(sent) => {
                self.forwarded += sent as u32;
                sent
            }
            Err(Errno::AGAIN) => {
                self.writable = false;
                0
            }
            Err(_) => {
                // It reads no more. Whether it still writes, its end of file tells.
                self.host_done.receives = true;
                self.drop_backlog();
                0
            }
        }
    }

    /// The guest is told of room when a quarter of the window is free that it does not know of: before it stalls, and
    /// not for every packet.
    fn consider_update(&mut self) {
        let untold = (self.forwarded - self.told_forwarded).0;
        self.update_due |= untold > 0 && untold >= self.window / 4 && !self.guest_done.sends;
    }

    /// Bytes that the guest has room for. A guest that says nonsense gets nothing.
    fn credit(&self) -> usize {
        self.peer_window.saturating_sub((self.sent - self.peer_forwarded).0) as usize
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_done.sends && !self.guest_done.receives
    }

    /// Whether [`Connection::next_packet`] is worth a try.
    pub fn has_news(&self) -> bool {
        match self.phase {
            Phase::Request | Phase::Reset => true,
            Phase::Requested | Phase::Over => false,
            Phase::Open => {
                self.update_due || self.host_done != self.told_done || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
            }
        }
    }

    /// The next packet for the guest, if there is one; at most `into.len()` bytes of data are put into `into`. The caller
    /// fills in the CIDs.
    pub fn next_packet(&mut self, into: &mut [u8], now: Instant) -> Option<Header> {
        let (op, flags, len) = self.next(into, now)?;
        self.told_forwarded = self.forwarded;
        self.update_due = false;
        Some(Header {
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            op,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        })
    }

    fn next(&mut self, into: &mut [u8], now: Instant) -> Option<(u16, u32, u32)> {
        match self.phase {
            Phase::Request => {
                self.phase = Phase::Requested;
                self.deadline = Some(now + REQUEST_LIMIT);
                return Some((op::REQUEST, 0, 0));
            }
            Phase::Reset => {
                self.phase = Phase::Over;
                return Some((op::RST, 0, 0));
            }
            Phase::Requested | Phase::Over => return None,
            Phase::Open => {}
        }
        if self.may_read() && self.host_done == self.told_done {
            match self.credit() {
                0 if self.credit_asked => {}
                0 => {
                    self.credit_asked = true;
                    return Some((op::CREDIT_REQUEST, 0, 0));
                }
                credit => {
                    let wanted = credit.min(into.len());
                    let read = self.read(&mut into[..wanted]);
                    if read > 0 {
                        self.sent += read;
                        return Some((op::RW, 0, read));
                    }
                }
            }
        }
        if self.host_done != self.told_done {
            self.told_done = self.host_done;
            if self.told_done == Done::BOTH {
                self.deadline = Some(now + CLOSE_LIMIT);
            }
            return Some((op::SHUTDOWN, self.told_done.flags(), 0));
        }
        self.update_due.then_some((op::CREDIT_UPDATE, 0, 0))
    }

    /// Reads from the client; 0: nothing now, or nothing more (noted in `host_done`).
    fn read(&mut self, into: &mut [u8]) -> u32 {
        let Some(socket) = &self.socket else {
            self.readable = false;
            return 0;
        };
        match rustix::io::retry_on_intr(|| recv(socket, &mut *into, RecvFlags::DONTWAIT)) {
            Ok((read @ 1.., _)) => read as u32,
            Ok(_) => {
                self.host_done.sends = true;
                if self.hung_up() {
                    self.client_left();
                }
                0
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                0
            }
            Err(_) => {
                self.client_left();
                0
            }
        }
    }
}
