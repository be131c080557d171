//! The socket device (virtio 1.2 §5.10): byte streams between clients on the host and ports of the guest.
//!
//! ```text
//! client ─ unix socket ─► Clients ─ CONNECT 1024 ─► Muxer ─ REQUEST ─► queue rx ─► guest
//!        ◄─ OK <host port> ─────────────────────── Connection ◄─ RESPONSE ─ queue tx ─┘
//! ```
//!
//! Owns: the three queues and what they carry. The guest has CID 3, the host 2. Only the host connects: what the guest asks
//! for is refused, so the number of streams is the host's to choose. Streams only (`SOCK_STREAM`). No threads: everything
//! happens in the event loop, a bounded piece at a time.
//!
//! # Sleep
//!
//! A stream outlives its machine. Paused, [`Vsock::take_streams`] gives duplicates of the clients' sockets and `save` all
//! that is not in them or in guest memory: credit, who has shut down what, and bytes from the guest that a client has not
//! taken. A device made from that with `restore` and [`Vsock::give_streams`] goes on to the byte; bytes that clients write
//! meanwhile lie in their sockets. Clients that have not yet said which port they want are not kept and read end of file.
//!
//! A saved stream whose socket does not come back is reset with RST, each by itself. The event TRANSPORT_RESET is never
//! sent, not even when no stream is kept: Linux answers it by failing every connected socket, at a time of its own
//! choosing, so that a stream opened right after the restore may die with them unless the device holds back all packets
//! until the driver has returned the event's buffer. A RST is exact, needs no such round trip on the way to the first byte,
//! and lets the guest's program read what it had been sent; and there is no stream in the guest that the saved state does
//! not know. Queue event is therefore never used.

mod clients;
mod connection;
mod muxer;
mod packet;
mod saved;
#[cfg(test)]
mod tests;

use std::{io, os::fd::OwnedFd};

use tracing::warn;
use virtio_bindings::{virtio_ids::VIRTIO_ID_VSOCK, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::Queue;

use crate::{
    bell::Bell,
    chain::{self, Broken},
    device::{self, BadState, Interrupt, Memory, Resources, VirtioDevice, Watch},
};
use muxer::{AGAIN_TOKEN, Muxer, WINDOW};
use packet::{HEADER_BYTES, Header};

/// The guest's context id.
pub const GUEST_CID: u64 = 3;
/// The host's context id (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

const RX: usize = 0;
const TX: usize = 1;
/// Queues rx, tx, event. Linux wants at least 8 of the last; two descriptors make a packet.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// Packets and rounds of one turn in the event loop. More is for the next turn, after the others had theirs.
const TURN: usize = 512;

/// An open stream of a paused machine; see [`Vsock::take_streams`].
#[derive(Debug)]
pub struct ParkedStream {
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Port on the host's side; no two streams of a guest share it.
    pub host_port: u32,
    /// Duplicate of the client's socket.
    pub socket: OwnedFd,
}

/// Counters; they only grow while the device lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamBytes {
    /// Bytes of the guest's that clients have taken.
    pub from_guest: u64,
    /// Bytes of clients that were put into guest memory.
    pub to_guest: u64,
}

/// The device. See the module.
#[derive(Debug)]
pub struct Vsock {
    muxer: Muxer,
    /// Rung when a turn ends before the work does.
    again: Bell,
    active: Option<Active>,
    paused: bool,
    /// Whether the muxer works. It is started and stopped by the event loop alone: vCPU threads, which activate and reset the
    /// device, may not use the system calls for it.
    started: bool,
    /// A header and the longest payload.
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Active {
    memory: Memory,
    /// All three.
    queues: Vec<Queue>,
    interrupt: Interrupt,
}

impl Vsock {
    /// A device that takes clients from `listener`, a listening `SOCK_STREAM` Unix socket. Everything that needs a system
    /// call of its own is made here. Later the event loop uses accept4, recvfrom, sendto, shutdown, poll, epoll_ctl,
    /// fcntl(F_DUPFD_CLOEXEC), read, write and close for it, and vCPU threads write and close.
    ///
    /// Errors: the host is out of descriptors, or `listener` is no socket.
    pub fn new(listener: OwnedFd, watch: Watch) -> io::Result<Self> {
        Ok(Self {
            again: Bell::new(&watch, AGAIN_TOKEN)?,
            muxer: Muxer::new(listener, watch)?,
            active: None,
            paused: false,
            started: false,
            scratch: vec![0; HEADER_BYTES + WINDOW as usize],
        })
    }

    /// Bytes that went through.
    pub fn bytes(&self) -> StreamBytes {
        StreamBytes { from_guest: self.muxer.bytes_from_guest, to_guest: self.muxer.bytes_to_guest }
    }

    /// Every stream of the paused device with a duplicate of its client's socket, in the order of host ports. The device
    /// keeps its own: it may `resume` as if nothing had happened. Also streams that are not open yet (the client waits for
    /// `OK`) or not open any more (it still gets what the guest had sent): they go on all the same.
    ///
    /// Errors: the host is out of descriptors.
    pub fn take_streams(&self) -> io::Result<Vec<ParkedStream>> {
        self.muxer.take_streams()
    }

    /// Gives streams of the restored, not yet resumed device their sockets: (guest port, host port, socket). A socket that
    /// belongs to no stream is closed. A stream that gets none is reset when the device resumes.
    pub fn give_streams(&mut self, streams: Vec<(u32, u32, OwnedFd)>) {
        self.muxer.give_streams(streams);
    }
}

impl Active {
    /// Moves packets both ways until nothing moves or the turn is over. Answers whether there is more to do.
    fn exchange(&mut self, muxer: &mut Muxer, scratch: &mut [u8]) -> Result<bool, Broken> {
        let mut left = TURN;
        let (mut rx_used, mut tx_used) = (false, false);
        // Kicks are of no use while the queues are looked at anyway.
        chain::ignore(&mut self.queues[RX], &self.memory)?;
        chain::ignore(&mut self.queues[TX], &self.memory)?;
        let more = loop {
            let delivered = self.deliver(muxer, scratch, &mut left)?;
            let collected = self.collect(muxer, scratch, &mut left)?;
            rx_used |= delivered;
            tx_used |= collected;
            left = left.saturating_sub(1);
            if left == 0 {
                break true;
            }
            if delivered || collected {
                continue;
            }
            // What has come since the last look is not announced by a kick.
            let tx = muxer.takes_more() && chain::listen(&mut self.queues[TX], &self.memory)?;
            let rx = muxer.has_news() && chain::listen(&mut self.queues[RX], &self.memory)?;
            if !tx && !rx {
                break false;
            }
        };
        for (queue, used) in [(RX, rx_used), (TX, tx_used)] {
            if used {
                chain::notify(&mut self.queues[queue], &self.memory, &self.interrupt)?;
            }
        }
        Ok(more)
    }

    /// Fills buffers of the guest's while there is something to tell it. Answers whether any was used.
    fn deliver(&mut self, muxer: &mut Muxer, scratch: &mut [u8], left: &mut usize) -> Result<bool, Broken> {
        let Self { memory, queues, .. } = self;
        let queue = &mut queues[RX];
        let mut used = false;
        while *left > 0 && muxer.has_news() {
            let Some(buffer) = chain::next(queue, memory)? else { break };
            let room = usize::try_from(buffer.writable.len()).unwrap_or(usize::MAX).min(scratch.len());
            // Every packet must fit, or the guest would never hear of what does not.
            if room <= HEADER_BYTES || !buffer.readable.is_empty() {
                return Err(Broken::Layout);
            }
            let Some(header) = muxer.next_packet(&mut scratch[HEADER_BYTES..room]) else {
                chain::put_back(queue);
                break;
            };
            let len = HEADER_BYTES + header.len as usize;
            scratch[..HEADER_BYTES].copy_from_slice(&header.bytes());
            // Cannot fail where bytes of a client's would be lost: the buffer was checked to be in guest memory.
            buffer.writable.write(memory, 0, &scratch[..len])?;
            chain::complete(queue, memory, buffer.head, len as u32)?;
            used = true;
            *left -= 1;
        }
        Ok(used)
    }

    /// Takes packets of the guest's. Answers whether any buffer was used.
    fn collect(&mut self, muxer: &mut Muxer, scratch: &mut [u8], left: &mut usize) -> Result<bool, Broken> {
        let Self { memory, queues, .. } = self;
        let queue = &mut queues[TX];
        let mut used = false;
        while *left > 0 && muxer.takes_more() {
            let Some(buffer) = chain::next(queue, memory)? else { break };
            if !buffer.writable.is_empty() {
                return Err(Broken::Layout);
            }
            // What is too short for a header is no packet, and nobody could be told.
            if let Some(room) = buffer.readable.len().checked_sub(HEADER_BYTES as u64) {
                let mut bytes = [0; HEADER_BYTES];
                buffer.readable.read(memory, 0, &mut bytes)?;
                let header = Header::parse(&bytes);
                let payload = if u64::from(header.len) <= room && header.len <= WINDOW {
                    let payload = &mut scratch[..header.len as usize];
                    buffer.readable.read(memory, HEADER_BYTES as u64, payload)?;
                    Some(&*payload)
                } else {
                    None
                };
                muxer.take_packet(&header, payload);
            }
            chain::complete(queue, memory, buffer.head, 0)?;
            used = true;
            *left -= 1;
        }
        Ok(used)
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    /// None of the device type's own: without any, streams are meant (§5.10.3).
    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `guest_cid`, a little-endian u64.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        device::read_config(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, resources: Resources) {
        let Resources { memory, queues, interrupt, .. } = resources;
        self.active = (queues.len() == QUEUE_SIZES.len()).then_some(Active { memory, queues, interrupt });
        if !self.paused {
            self.again.ring();
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.started = false;
        self.muxer.forget_all();
    }

    fn ready(&mut self, token: u32) -> bool {
        let Self { active: Some(active), paused: false, .. } = self else { return true };
        if !self.started {
            self.started = true;
            self.muxer.start();
        }
        self.muxer.ready(token);
        match active.exchange(&mut self.muxer, &mut self.scratch) {
            Ok(more) => {
                if more {
                    self.again.ring();
                }
                true
            }
            Err(broken) => {
                warn!(%broken, "the guest's vsock driver broke the rules of its queues");
                self.muxer.end_all();
                self.active = None;
                self.started = false;
                false
            }
        }
    }

    fn pause(&mut self) -> Vec<Queue> {
        self.paused = true;
        self.active.iter().flat_map(|active| &active.queues).map(chain::copy).collect()
    }

    fn resume(&mut self) {
        self.paused = false;
        // Edges may have been lost, deadlines may have passed, and sockets may be new: all is begun again.
        self.started = false;
        self.again.ring();
    }

    fn save(&mut self) -> Vec<u8> {
        let muxer = &self.muxer;
        saved::save(muxer.next_host_port(), muxer.orphans(), muxer.connections())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        let (saved, connections) = saved::restore(state).map_err(|why| BadState { device: "vsock", why })?;
        self.muxer.restore(saved.next_host_port, saved.orphans, connections);
        self.paused = true;
        self.started = false;
        Ok(())
    }
}
