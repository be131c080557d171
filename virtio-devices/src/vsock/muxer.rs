//! All streams of one guest: who is connected, who has something to tell the guest, who comes in, who is out of time.
//!
//! Owns: the table of streams by host port, the host's port numbers, the resets for streams that do not exist. Knows
//! nothing of queues: packets come and go as a header and bytes. Everything here has a ceiling.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use rustix::{
    event::epoll::EventFlags,
    net::Shutdown,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    GUEST_CID, HOST_CID, ParkedStream,
    clients::{Clients, MAX_CLIENTS},
    connection::{Connection, Phase},
    packet::{Header, STREAM, op},
};
use crate::device::{FIRST_OWN_TOKEN, Watch};

/// Streams at a time.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Resets that wait for room in the guest's queue. When they are as many, nothing more is taken from the guest until it
/// makes room (virtio 1.2 §5.10.6.2 asks for a limit like this on both sides).
pub(super) const MAX_ORPHANS: usize = 256;
/// What the guest may send ahead on one stream. Linux sends pieces of 64 KiB.
pub(super) const WINDOW: u32 = 256 * 1024;
/// Streams with the full window at a time; the others get [`SMALL_WINDOW`]. All windows together are less than 16 MiB,
/// which also bounds the saved state.
const LARGE_WINDOWS: usize = 32;
const SMALL_WINDOW: u32 = 8 * 1024;
/// What is saved must be loaded again: all windows full, and less than 128 bytes for each stream and each reset.
const _: () = assert!(
    LARGE_WINDOWS * WINDOW as usize + (MAX_CONNECTIONS - LARGE_WINDOWS) * SMALL_WINDOW as usize + 128 * (MAX_CONNECTIONS + MAX_ORPHANS)
        < crate::transport::MAX_STATE_BYTES
);
/// Host ports, used in turn so that one is free for long before it is used again. They are the tokens of the streams'
/// sockets, and are far from all other tokens.
pub(super) const HOST_PORTS: Range<u32> = 1 << 30..1 << 31;

/// How exactly deadlines are kept.
const TICK_SECS: i64 = 1;

const LISTENER_TOKEN: u32 = FIRST_OWN_TOKEN;
const TIMER_TOKEN: u32 = FIRST_OWN_TOKEN + 1;
/// Of the device: there is more to do.
pub(super) const AGAIN_TOKEN: u32 = FIRST_OWN_TOKEN + 2;
const FIRST_CLIENT_TOKEN: u32 = FIRST_OWN_TOKEN + 3;

/// A reset for a packet that belongs to no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Orphan {
    /// Whom the guest wanted to reach; it may be somebody that does not exist.
    cid: u64,
    host_port: u32,
    guest_port: u32,
    /// Socket type, as the guest said it.
    kind: u16,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Muxer {
    watch: Watch,
    clients: Clients,
    connections: BTreeMap<u32, Connection>,
    /// Host ports of streams that may have something to tell the guest, in turn; each once.
    talkers: VecDeque<u32>,
    orphans: VecDeque<Orphan>,
    next_host_port: u32,
    /// Runs out every [`TICK_SECS`] seconds, armed once and for good: the event loop may read it, but not set it. Linux lets
    /// it rest after it has run out until it is read, so that a device without deadlines wakes nobody.
    timer: OwnedFd,
    /// Whether the timer was read since it last ran out.
    ticking: bool,
    /// Bytes from the guest that clients took, and bytes from clients that the guest took.
    pub bytes_from_guest: u64,
    pub bytes_to_guest: u64,
    /// Smaller in tests.
    #[cfg(test)]
    pub window: u32,
}

impl Muxer {
    /// Makes what needs a system call that is not allowed later.
    pub fn new(listener: OwnedFd, watch: Watch) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let tick = Timespec { tv_sec: TICK_SECS, tv_nsec: 0 };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: tick, it_value: tick })?;
        watch.add(&timer, TIMER_TOKEN, EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            clients: Clients::new(listener, watch.clone(), LISTENER_TOKEN, FIRST_CLIENT_TOKEN),
            watch,
            connections: BTreeMap::new(),
            talkers: VecDeque::new(),
            orphans: VecDeque::new(),
            next_host_port: HOST_PORTS.start,
            timer,
            ticking: false,
            bytes_from_guest: 0,
            bytes_to_guest: 0,
            #[cfg(test)]
            window: WINDOW,
        })
    }

    /// Begins, or goes on after a pause or a restore.
    pub fn start(&mut self) {
        let now = Instant::now();
        self.clients.resume(now);
        if let Err(error) = self.clients.listen() {
            warn!(%error, "watching the vsock listener failed; no client can connect");
        }
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for port in ports {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.resume(now);
            if !connection.watched
                && let Some(socket) = connection.socket()
            {
                if let Err(error) = self.watch.add(socket, port, Self::stream_interest()) {
                    warn!(%error, "watching a vsock stream failed; it is reset");
                    connection.abort();
                } else {
                    connection.watched = true;
                }
            }
            self.settle(port);
        }
        // It may have run out unheard.
        self.ticking = false;
        self.tick_if_needed();
    }

    fn stream_interest() -> EventFlags {
        EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
    }

    /// Ends every stream; clients read end of file. Those to come wait until [`Muxer::start`].
    pub fn end_all(&mut self) {
        self.clients.close();
        for connection in self.connections.values() {
            connection.shut(Shutdown::Both);
        }
        self.forget_all();
    }

    /// As [`Muxer::end_all`], with no other system call than close: a socket of which a duplicate lies somewhere (the node
    /// still has it after a suspend that was taken back) is closed when that one is. The epoll forgets a closed socket, or
    /// tells of one that nobody knows.
    pub fn forget_all(&mut self) {
        self.clients.forget();
        self.talkers.clear();
        self.orphans.clear();
        self.connections.clear();
    }

    /// Something that is watched is ready.
    pub fn ready(&mut self, token: u32) {
        let now = Instant::now();
        match token {
            LISTENER_TOKEN => self.clients.listener_ready(),
            TIMER_TOKEN => {
                self.ticking = false;
                self.sweep(now);
                self.tick_if_needed();
            }
            port if HOST_PORTS.contains(&port) => {
                // An edge may be left over from a stream that has ended.
                if let Some(connection) = self.connections.get_mut(&port) {
                    self.bytes_from_guest += connection.socket_ready();
                    self.settle(port);
                }
            }
            client => {
                if (FIRST_CLIENT_TOKEN..FIRST_CLIENT_TOKEN + MAX_CLIENTS as u32).contains(&client)
                    && let Some((port, socket)) = self.clients.client_ready(client)
                {
                    self.connect(port, socket);
                }
            }
        }
        self.accept(now);
    }

    /// Lets in who waits, as far as there is room.
    fn accept(&mut self, now: Instant) {
        let mut said = Vec::new();
        if self.clients.accept(now, |port, socket| said.push((port, socket))) {
            self.tick();
        }
        for (port, socket) in said {
            self.connect(port, socket);
        }
    }

    /// A client wants this port. Dropping its socket refuses it.
    fn connect(&mut self, guest_port: u32, socket: OwnedFd) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let host_port = self.free_host_port();
        if let Err(error) = self.watch.add(&socket, host_port, Self::stream_interest()) {
            warn!(%error, "watching a vsock client failed; it is refused");
            return;
        }
        let mut connection = Connection::new(guest_port, host_port, self.window(), socket);
        connection.watched = true;
        self.connections.insert(host_port, connection);
        self.settle(host_port);
    }

    fn window(&self) -> u32 {
        #[cfg(test)]
        if self.window != WINDOW {
            return self.window;
        }
        let large = self.connections.values().filter(|connection| connection.window() > SMALL_WINDOW).count();
        if large < LARGE_WINDOWS { WINDOW } else { SMALL_WINDOW }
    }

    /// Ends: there are far fewer streams than ports.
    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = if port + 1 < HOST_PORTS.end { port + 1 } else { HOST_PORTS.start };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// After anything happened to a stream.
    fn settle(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if connection.is_finished() {
            if let Some(connection) = self.connections.remove(&port) {
                close(&self.watch, connection);
            }
            return;
        }
        if !connection.queued && connection.has_news() {
            connection.queued = true;
            self.talkers.push_back(port);
        }
        if connection.deadline.is_some() {
            self.tick();
        }
    }

    /// Takes a packet of the guest's; `payload` is `None` if it is longer than its buffer or than any window.
    pub fn take_packet(&mut self, header: &Header, payload: Option<&[u8]>) {
        if header.src_cid != GUEST_CID {
            // It lies about who it is; an answer could reach nobody.
            return;
        }
        let known = header.dst_cid == HOST_CID && header.kind == STREAM;
        let connection = self
            .connections
            .get_mut(&header.dst_port)
            .filter(|connection| known && connection.guest_port == header.src_port && connection.phase() != Phase::Over);
        if let Some(connection) = connection {
            self.bytes_from_guest += connection.take_packet(header, payload);
            self.settle(header.dst_port);
        } else if header.op != op::RST {
            // Also how a stream that the guest asks for is refused.
            self.orphans.push_back(Orphan { cid: header.dst_cid, host_port: header.dst_port, guest_port: header.src_port, kind: header.kind });
        }
    }

    /// Whether the guest's packets may be taken.
    pub fn takes_more(&self) -> bool {
        self.orphans.len() < MAX_ORPHANS
    }

    /// Whether [`Muxer::next_packet`] is worth a try.
    pub fn has_news(&self) -> bool {
        !self.orphans.is_empty() || !self.talkers.is_empty()
    }

    /// The next packet for the guest, if there is one; its data, at most `into.len()` bytes, is put into `into`.
    pub fn next_packet(&mut self, into: &mut [u8]) -> Option<Header> {
        if let Some(orphan) = self.orphans.pop_front() {
            let Orphan { cid, host_port, guest_port, kind } = orphan;
            let (src_port, dst_port) = (host_port, guest_port);
            return Some(Header { src_cid: cid, dst_cid: GUEST_CID, src_port, dst_port, kind, op: op::RST, ..Header::default() });
        }
        let now = Instant::now();
        while let Some(port) = self.talkers.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.queued = false;
            let packet = connection.next_packet(into, now);
            // If it has more to say, it queues behind the others.
            self.settle(port);
            if let Some(header) = packet {
                self.bytes_to_guest += u64::from(header.len);
                return Some(Header { src_cid: HOST_CID, dst_cid: GUEST_CID, kind: STREAM, ..header });
            }
        }
        None
    }

    /// Ends what is out of time.
    fn sweep(&mut self, now: Instant) {
        self.clients.sweep(now);
        let is_late = |connection: &&Connection| connection.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<u32> = self.connections.values().filter(is_late).map(|connection| connection.host_port).collect();
        for port in late {
            if let Some(connection) = self.connections.get_mut(&port) {
                connection.abort();
                // The client of a REQUEST that nobody answers need not wait until the guest makes room for the reset.
                connection.shut(Shutdown::Both);
                self.settle(port);
            }
        }
    }

    fn tick_if_needed(&mut self) {
        if self.clients.have_deadlines() || self.connections.values().any(|connection| connection.deadline.is_some()) {
            self.tick();
        }
    }

    /// Has the event loop hear the timer once more.
    fn tick(&mut self) {
        if !self.ticking {
            // Nothing to read: it has not run out yet, and will be heard all the same.
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            self.ticking = true;
        }
    }

    /// Duplicates of the clients' sockets. See [`super::Vsock::take_streams`].
    pub fn take_streams(&self) -> io::Result<Vec<ParkedStream>> {
        let mut streams = Vec::with_capacity(self.connections.len());
        for connection in self.connections.values() {
            if let Some(socket) = connection.socket() {
                let socket = rustix::io::fcntl_dupfd_cloexec(socket, 3)?;
                streams.push(ParkedStream { guest_port: connection.guest_port, host_port: connection.host_port, socket });
            }
        }
        Ok(streams)
    }

    /// Gives restored streams their sockets. See [`super::Vsock::give_streams`].
    pub fn give_streams(&mut self, streams: Vec<(u32, u32, OwnedFd)>) {
        for (guest_port, host_port, socket) in streams {
            let wanted = self.connections.get_mut(&host_port).filter(|it| it.guest_port == guest_port && it.socket().is_none());
            if let Some(connection) = wanted {
                connection.attach(socket);
            }
        }
    }

    /// For the saved state.
    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    pub fn orphans(&self) -> Vec<Orphan> {
        self.orphans.iter().copied().collect()
    }

    pub fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.connections.values()
    }

    /// Takes the place of whatever there was.
    pub fn restore(&mut self, next_host_port: u32, orphans: Vec<Orphan>, connections: Vec<Connection>) {
        self.end_all();
        self.next_host_port = next_host_port;
        self.orphans = orphans.into();
        self.connections = connections.into_iter().map(|connection| (connection.host_port, connection)).collect();
    }

    #[cfg(test)]
    pub fn thinking_clients(&self) -> usize {
        self.clients.thinking()
    }
}

/// Closes a stream's socket for good: the client sees it even if a duplicate of the descriptor lies somewhere.
fn close(watch: &Watch, connection: Connection) {
    if let Some(socket) = connection.socket() {
        if connection.watched {
            // It fails only if the epoll itself is gone.
            let _ = watch.remove(socket.as_fd());
        }
        connection.shut(Shutdown::Both);
    }
}
