//! The memory balloon (virtio 1.2 §5.5): the guest gives pages back to the host, as asked for or because they are free.
//!
//! Owns: the target size and the walk over the driver's page lists. Never touches a mapping: what giving a page back means
//! depends on how guest memory is mapped (a hole in the file, or anonymous pages over a private mapping; `MADV_DONTNEED` on
//! a private mapping would bring the image's page back), so the VMM hands in a [`Discard`].
//!
//! After a discard the range reads as zeros. The driver has said that it does not need the content, so nothing depends on
//! whether a discard was carried out: one that fails is counted and otherwise ignored.

use std::{
    cell::Cell,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use virtio_bindings::{virtio_ids::VIRTIO_ID_BALLOON, virtio_ring::VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::{
    bell::Bell,
    chain::{self, Broken, Chain},
    device::{self, BadState, FIRST_OWN_TOKEN, Interrupt, Memory, Resources, VirtioDevice, Watch},
};

/// Makes a range of guest memory zeros and gives its pages to the host. Address and length are multiples of [`PAGE_BYTES`]
/// and inside guest memory, but may span regions.
pub type Discard = Box<dyn Fn(GuestAddress, u64) -> io::Result<()> + Send>;

/// Unit of the balloon, whatever the guest's page size (§5.5.6).
pub const PAGE_BYTES: u64 = 4096;

const NAME: &str = "balloon";
/// Feature bits (§5.5.3); the bindings have none for the balloon.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
const QUEUE_SIZE: u16 = 128;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The statistics and hinting queues are not offered, and drivers number those that are there without gaps.
const REPORTING: usize = 2;
/// Pages of one inflate request that count. Linux lists 256 at a time.
const MAX_PAGES: u64 = 4096;
/// Discards of one turn in the event loop, each of which takes some microseconds; a request that is begun is finished. More are
/// for the next turn, after the others had theirs: a guest that gives back single pages, over and over, must not keep the
/// event loop from its node.
const TURN: u32 = 1024;
/// Look at the queues without a kick.
const RESUMED_TOKEN: u32 = FIRST_OWN_TOKEN;

/// What the guest gave back. Only grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that were discarded.
    pub discarded_bytes: AtomicU64,
    /// Bytes that could not be.
    pub failed_bytes: AtomicU64,
}

/// The balloon.
pub struct Balloon {
    active: Option<Resources>,
    /// For a change of the target while the driver is there.
    interrupt: Option<Interrupt>,
    discard: Discard,
    counters: Arc<Counters>,
    resumed: Bell,
    /// Discards that are left of this turn.
    left: Cell<u32>,
    /// Size that the host wants, in pages.
    target: u32,
    /// Size that the driver says it has, in pages. Only ever shown back.
    actual: u32,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon").field("target", &self.target).field("actual", &self.actual).finish_non_exhaustive()
    }
}

impl Balloon {
    /// An empty balloon that gives pages back by `discard`.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(discard: Discard, watch: &Watch) -> io::Result<Self> {
        let resumed = Bell::new(watch, RESUMED_TOKEN)?;
        Ok(Self { active: None, interrupt: None, discard, counters: Arc::default(), resumed, left: Cell::new(TURN), target: 0, actual: 0 })
    }

    /// Asks the driver to make the balloon this large, in [`PAGE_BYTES`]. It does so in its own time.
    pub fn set_target(&mut self, pages: u32) {
        self.target = pages;
        if let Some(interrupt) = &self.interrupt {
            interrupt.config_changed();
        }
    }

    /// Counters, also of a device that is in use.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn discard(&self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        self.left.set(self.left.get().saturating_sub(1));
        let bytes = end - start;
        let counter = match (self.discard)(GuestAddress(start), bytes) {
            Ok(()) => &self.counters.discarded_bytes,
            Err(error) => {
                tracing::debug!(%error, start, bytes, "memory that the guest gave back could not be discarded");
                &self.counters.failed_bytes
            }
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An inflate request: a list of page numbers. Neighbours are discarded together.
    fn inflate(&self, chain: &Chain, memory: &Memory) -> Result<(), Broken> {
        let pages = (chain.readable.len() / 4).min(MAX_PAGES);
        let mut list = vec![0; pages as usize * 4];
        chain.readable.read(memory, 0, &mut list)?;
        let (mut start, mut end) = (0, 0);
        for page in list.as_chunks::<4>().0 {
            let address = u64::from(u32::from_le_bytes(*page)) * PAGE_BYTES;
            if !memory.check_range(GuestAddress(address), PAGE_BYTES as usize, Permissions::Write) {
                return Err(Broken::Address);
            }
            if start < end && address == end {
                end += PAGE_BYTES;
            } else if start < end && address + PAGE_BYTES == start {
                // Linux takes pages from the top of a free block downwards.
                start = address;
            } else {
                self.discard(start, end);
                (start, end) = (address, address + PAGE_BYTES);
            }
        }
        self.discard(start, end);
        Ok(())
    }

    /// A report of free pages: the buffers themselves. Pages that are only partly in one are kept.
    fn report(&self, chain: &Chain) {
        for part in chain.writable.parts() {
            let end = part.address.0 + u64::from(part.len);
            self.discard(part.address.0.next_multiple_of(PAGE_BYTES), end / PAGE_BYTES * PAGE_BYTES);
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let Some(mut active) = self.active.take() else { return Ok(()) };
        self.left.set(TURN);
        let served = (0..active.queues.len()).try_for_each(|index| self.serve_queue(&mut active, index));
        self.active = Some(active);
        if self.left.get() == 0 {
            self.resumed.ring();
        }
        served
    }

    fn serve_queue(&self, active: &mut Resources, index: usize) -> Result<(), Broken> {
        let Resources { memory, queues, interrupt, .. } = active;
        let queue = &mut queues[index];
        // No more than there can have been when the kick was read; what came later has a kick of its own.
        for _ in 0..QUEUE_SIZE {
            if self.left.get() == 0 {
                return Ok(());
            }
            let Some(chain) = chain::next(queue, memory)? else { return Ok(()) };
            match index {
                INFLATE => self.inflate(&chain, memory).inspect_err(|_| chain::put_back(queue))?,
                REPORTING => self.report(&chain),
                // A page taken back is there when it is touched.
                _ => debug_assert_eq!(index, DEFLATE),
            }
            chain::complete(queue, memory, chain.head, 0)?;
            chain::notify(queue, memory, interrupt)?;
        }
        Ok(())
    }

    /// `struct virtio_balloon_config` (§5.5.4), as far as the features that are offered go.
    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..].copy_from_slice(&self.actual.to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        device::read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual`, and only as a whole, is the driver's.
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, resources: Resources) {
        self.interrupt = Some(resources.interrupt.clone());
        self.active = Some(resources);
    }

    fn reset(&mut self) {
        self.active = None;
        self.interrupt = None;
        self.actual = 0;
    }

    fn ready(&mut self, _token: u32) -> bool {
        let served = self.serve();
        if let Err(broken) = served {
            tracing::warn!(%broken, "the guest's balloon driver broke the rules of its queues");
        }
        served.is_ok()
    }

    fn pause(&mut self) -> Vec<Queue> {
        self.active.iter().flat_map(|active| &active.queues).map(chain::copy).collect()
    }

    fn resume(&mut self) {
        // In the event loop, where a broken ring can be reported.
        self.resumed.ring();
    }

    fn save(&mut self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        let Some((target, actual)) = state.split_first_chunk::<4>() else {
            return Err(BadState { device: NAME, why: "it is too short".to_owned() });
        };
        let actual = <[u8; 4]>::try_from(actual).map_err(|_| BadState { device: NAME, why: "it has not 8 bytes".to_owned() })?;
        (self.target, self.actual) = (u32::from_le_bytes(*target), u32::from_le_bytes(actual));
        Ok(())
    }
}
