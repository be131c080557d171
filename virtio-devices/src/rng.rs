//! The entropy device (virtio 1.2 §5.4): fills the driver's buffers with bytes of the host's random number generator.
//!
//! Owns nothing but its queue. Never gives one request more than [`MAX_REQUEST_BYTES`], however large its buffers are, and
//! never stays in one call longer than a queue's worth of requests: other devices share the event loop.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::{virtio_ids::VIRTIO_ID_RNG, virtio_ring::VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use crate::{
    bell::Bell,
    chain::{self, Broken, Buffers},
    device::{BadState, FIRST_OWN_TOKEN, Memory, Resources, VirtioDevice, Watch},
};

/// A driver asks for 64 bytes or so at a time; the rest of a larger buffer is left as it is, which it must expect (§5.4.6.1).
pub const MAX_REQUEST_BYTES: u64 = 64 * 1024;

const NAME: &str = "rng";
const QUEUE_SIZE: u16 = 64;
const PIECE_BYTES: usize = 4096;
/// Look at the queues without a kick.
const RESUMED_TOKEN: u32 = FIRST_OWN_TOKEN;

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    active: Option<Resources>,
    resumed: Bell,
}

impl Rng {
    /// A device that no driver uses yet.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(watch: &Watch) -> io::Result<Self> {
        Ok(Self { active: None, resumed: Bell::new(watch, RESUMED_TOKEN)? })
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let Some(Resources { memory, queues, interrupt, .. }) = &mut self.active else { return Ok(()) };
        let Some(queue) = queues.first_mut() else { return Ok(()) };
        // No more than there can have been when the kick was read; what came later has a kick of its own.
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = chain::next(queue, memory)? else { return Ok(()) };
            if chain.writable.is_empty() {
                chain::put_back(queue);
                return Err(Broken::Layout);
            }
            let filled = fill(&chain.writable, memory).inspect_err(|_| chain::put_back(queue))?;
            chain::complete(queue, memory, chain.head, filled)?;
            chain::notify(queue, memory, interrupt)?;
        }
        Ok(())
    }
}

/// Fills buffers up to the ceiling; answers how many bytes were filled.
fn fill(buffers: &Buffers, memory: &Memory) -> Result<u32, Broken> {
    let wanted = buffers.len().min(MAX_REQUEST_BYTES) as usize;
    let mut done = 0;
    while done < wanted {
        let mut piece = [0; PIECE_BYTES];
        let piece = &mut piece[..(wanted - done).min(PIECE_BYTES)];
        // Once the host's generator is seeded, which it was long before a VMM ran, this neither fails nor waits; an answer
        // that is shorter because of a signal only makes the guest's shorter.
        let Ok(got) = getrandom(&mut *piece, GetRandomFlags::empty()) else { break };
        buffers.write(memory, done as u64, &piece[..got])?;
        done += got;
        if got == 0 {
            break;
        }
    }
    // Fits: MAX_REQUEST_BYTES.
    Ok(done as u32)
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, resources: Resources) {
        self.active = Some(resources);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn ready(&mut self, _token: u32) -> bool {
        let served = self.serve();
        if let Err(broken) = served {
            tracing::warn!(%broken, "the guest's rng driver broke the rules of its queue");
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
        Vec::new()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        if state.is_empty() { Ok(()) } else { Err(BadState { device: NAME, why: "something is in it, and it has none".to_owned() }) }
    }
}
