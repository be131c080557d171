//! The network card (virtio 1.2 §5.1): one pair of queues over a TAP device that is handed in.
//!
//! Owns: the TAP descriptor and the two queues. Never parses a frame, and never trusts the driver's header: no offload is
//! offered, so what goes to the TAP is a header of zeros. Frames from the TAP wait there while the driver has no buffers:
//! the descriptor is then not watched, and the kernel's own queue drops what is too much.
//!
//! The TAP must have been made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with the length of the header as it is by
//! default ([`HOST_HEADER_BYTES`]).


use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    event::epoll::EventFlags,
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::VIRTIO_NET_F_MAC,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::Queue;

use crate::{
    bell::Bell,
    chain::{self, Broken},
    device::{self, BadState, FIRST_OWN_TOKEN, Resources, VirtioDevice, Watch},
};

/// `struct virtio_net_hdr` as a TAP has it unless told otherwise: without the number of buffers.
pub const HOST_HEADER_BYTES: usize = 10;

const NAME: &str = "net";
/// The driver's header has the number of buffers always (§5.1.6).
const GUEST_HEADER_BYTES: usize = 12;
/// Of a frame without offloads: the largest MTU that a TAP can have, Ethernet header, one VLAN tag.
const MAX_FRAME_BYTES: usize = 65535 + 14 + 4;
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// The TAP has a frame.
const TAP_TOKEN: u32 = FIRST_OWN_TOKEN;
/// There was more than one call may do.
const MORE_TOKEN: u32 = FIRST_OWN_TOKEN + 1;

/// What went through the card. Only grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of frames from the guest.
    pub sent_bytes: AtomicU64,
    /// Bytes of frames to the guest.
    pub received_bytes: AtomicU64,
    /// Frames, in either direction, that the other side did not take.
    pub dropped_frames: AtomicU64,
}

/// Whether the TAP is in the epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watching {
    /// No: the device is not in use, is paused, or the driver has no buffers.
    No,
    Yes,
}

/// The network card.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    config: [u8; 6],
    active: Option<Resources>,
    watch: Watch,
    watching: Watching,
    more: Bell,
    counters: Arc<Counters>,
    /// Between `pause` (or `restore`) and `resume`.
    paused: bool,
    /// One frame with its header as the driver sees it.
    frame: Vec<u8>,
}

impl Net {
    /// A card with this address on `tap`, which is made non-blocking.
    ///
    /// # Errors
    /// `tap` cannot be watched, or the host has no more descriptors.
    pub fn new(tap: OwnedFd, mac: [u8; 6], watch: Watch) -> io::Result<Self> {
        fcntl_setfl(&tap, fcntl_getfl(&tap)? | OFlags::NONBLOCK)?;
        Ok(Self {
            tap,
            config: mac,
            active: None,
            more: Bell::new(&watch, MORE_TOKEN)?,
            watch,
            watching: Watching::No,
            counters: Arc::default(),
            paused: false,
            frame: vec![0; GUEST_HEADER_BYTES + MAX_FRAME_BYTES],
        })
    }

    /// Counters, also of a device that is in use.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn watch_tap(&mut self, wanted: Watching) {
        if self.watching == wanted {
            return;
        }
        let done = match wanted {
            Watching::Yes => self.watch.add(&self.tap, TAP_TOKEN, EventFlags::IN),
            Watching::No => self.watch.remove(self.tap.as_fd()),
        };
        match done {
            Ok(()) => self.watching = wanted,
            // Kernel memory is short. The next kick tries again.
            Err(error) => tracing::warn!(%error, "the network card's TAP device could not be watched"),
        }
    }

    /// Frames from the TAP into the driver's buffers, until one of both has no more.
    fn receive(&mut self) -> Result<(), Broken> {
        let Some(Resources { memory, queues, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let queue = &mut queues[RX];
        let mut watching = Watching::Yes;
        for _ in 0..QUEUE_SIZE {
            let chain = match chain::next(queue, memory)? {
                Some(chain) => chain,
                // A buffer that came just now is not kicked for, so look once more.
                None if chain::listen(queue, memory)? => continue,
                None => {
                    watching = Watching::No;
                    break;
                }
            };
            if !chain.readable.is_empty() || chain.writable.len() < GUEST_HEADER_BYTES as u64 {
                chain::put_back(queue);
                return Err(Broken::Layout);
            }
            let (header, body) = self.frame.split_at_mut(GUEST_HEADER_BYTES);
            let parts = &mut [IoSliceMut::new(&mut header[..HOST_HEADER_BYTES]), IoSliceMut::new(body)];
            let len = match rustix::io::retry_on_intr(|| rustix::io::readv(&self.tap, parts)) {
                Ok(0) => {
                    chain::put_back(queue);
                    watching = Watching::No;
                    break;
                }
                Ok(got) if got < HOST_HEADER_BYTES => {
                    chain::put_back(queue);
                    continue;
                }
                Ok(got) => got - HOST_HEADER_BYTES,
                Err(error) => {
                    chain::put_back(queue);
                    // Anything but "nothing there" is for good, and would keep the event loop awake: the TAP device was
                    // taken away. A kick tries again.
                    if error != Errno::AGAIN {
                        watching = Watching::No;
                    }
                    break;
                }
            };
            // §5.1.6.4.1: one buffer, and without offloads all else is 0.
            header.fill(0);
            header[HOST_HEADER_BYTES] = 1;
            let whole = GUEST_HEADER_BYTES + len;
            if whole as u64 > chain.writable.len() {
                // Larger than the driver's MTU. The buffer is still good for the next one.
                chain::put_back(queue);
                self.counters.dropped_frames.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            chain.writable.write(memory, 0, &self.frame[..whole])?;
            chain::complete(queue, memory, chain.head, whole as u32)?;
            self.counters.received_bytes.fetch_add(len as u64, Ordering::Relaxed);
        }
        chain::notify(queue, memory, interrupt)?;
        // Level-triggered: what is left in the TAP brings the event loop back.
        self.watch_tap(watching);
        Ok(())
    }

    /// Frames from the driver into the TAP.
    fn send(&mut self) -> Result<(), Broken> {
        let Some(Resources { memory, queues, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let queue = &mut queues[TX];
        for _ in 0..QUEUE_SIZE {
            let chain = match chain::next(queue, memory)? {
                Some(chain) => chain,
                None if chain::listen(queue, memory)? => continue,
                None => break,
            };
            if !chain.writable.is_empty() || chain.readable.len() < GUEST_HEADER_BYTES as u64 {
                chain::put_back(queue);
                return Err(Broken::Layout);
            }
            let len = chain.readable.len() - GUEST_HEADER_BYTES as u64;
            let sent = if len <= MAX_FRAME_BYTES as u64 {
                let frame = &mut self.frame[..len as usize];
                chain.readable.read(memory, GUEST_HEADER_BYTES as u64, frame)?;
                let parts = &[IoSlice::new(&[0; HOST_HEADER_BYTES]), IoSlice::new(frame)];
                // Full, down, or a frame that the kernel does not like: gone, as on a real wire.
                rustix::io::retry_on_intr(|| rustix::io::writev(&self.tap, parts)).is_ok()
            } else {
                false
            };
            if sent {
                self.counters.sent_bytes.fetch_add(len, Ordering::Relaxed);
            } else {
                self.counters.dropped_frames.fetch_add(1, Ordering::Relaxed);
            }
            chain::complete(queue, memory, chain.head, 0)?;
        }
        chain::notify(queue, memory, interrupt)?;
        // Asked for anew, since the call may have ended at its limit with a queue that happens to be empty just now: nobody would
        // kick for what comes next.
        if chain::listen(queue, memory)? {
            self.more.ring();
        }
        Ok(())
    }

    fn serve(&mut self, token: u32) -> Result<(), Broken> {
        match token {
            TAP_TOKEN => self.receive(),
            _ if token == RX as u32 => self.receive(),
            _ if token == TX as u32 => self.send(),
            _ => {
                self.send()?;
                self.receive()
            }
        }
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        device::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, resources: Resources) {
        self.active = (resources.queues.len() == 2).then_some(resources);
        if !self.paused {
            self.more.ring();
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.watch_tap(Watching::No);
    }

    fn ready(&mut self, token: u32) -> bool {
        let served = self.serve(token);
        if let Err(broken) = served {
            tracing::warn!(%broken, "the guest's network driver broke the rules of its queues");
            self.watch_tap(Watching::No);
        }
        served.is_ok()
    }

    fn pause(&mut self) -> Vec<Queue> {
        self.paused = true;
        self.watch_tap(Watching::No);
        self.active.iter().flat_map(|active| &active.queues).map(chain::copy).collect()
    }

    fn resume(&mut self) {
        self.paused = false;
        self.more.ring();
    }

    fn save(&mut self) -> Vec<u8> {
        // The address is not in it: a clone may have another, and says so in its configuration space.
        Vec::new()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        if !state.is_empty() {
            return Err(BadState { device: NAME, why: "something is in it, and it has none".to_owned() });
        }
        self.paused = true;
        Ok(())
    }
}
