//! The block device (virtio 1.2 §5.2): one queue, one disk, one worker thread that does all I/O.
//!
//! Owns: the worker, and the hand-over of queue and disk to it. The worker is made with the device, before the jail, and
//! waits for both: a VMM process of the pool has a device long before it has a disk. Never does I/O on a vCPU thread.
//!
//! One lock, [`State`], and nothing else is locked under it. While the worker is busy it holds queue and disk itself and not
//! the lock, so a kick never waits for the disk. Who wants the device to stand still sets `hold` and waits until the worker
//! has given both back; a long request is then abandoned between two pieces and stays in the queue.

pub mod layers;
pub mod map;
mod request;

use std::{
    fs::File,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::Queue;

use self::{
    layers::{Disk, DiskError, Merged, SECTOR_BYTES},
    map::BLOCK_BYTES,
    request::{Context, Outcome},
};
use crate::{
    bell::Bell,
    chain::{self, Broken},
    device::{self, BadState, FIRST_OWN_TOKEN, Interrupt, Memory, Resources, VirtioDevice, Watch},
};

const NAME: &str = "block";
const QUEUE_SIZE: u16 = 256;
/// Data buffers of one request: the rest of the queue is header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const CONFIG_BYTES: usize = 60;
/// The worker has found the ring broken.
const BROKEN_TOKEN: u32 = FIRST_OWN_TOKEN;

/// What the guest did with its disk. Only grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written, zeros that were written out included.
    pub written_bytes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
}

/// What the driver gave.
#[derive(Debug)]
struct Work {
    memory: Memory,
    queue: Queue,
    interrupt: Interrupt,
}

#[derive(Debug, Default)]
struct State {
    /// The worker shall end.
    quit: bool,
    /// The worker shall begin nothing: the device is paused, or about to be reset.
    held: bool,
    /// There may be something in the queue.
    kicked: bool,
    /// The driver broke the rules; nothing of the queue is used until a reset.
    broken: bool,
    /// The worker has `work` and `disk`, which are `None` meanwhile.
    busy: bool,
    work: Option<Work>,
    disk: Option<Disk>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Anything in `state` changed.
    changed: Condvar,
    /// As `State::held`, for a look in the middle of a request.
    hold: AtomicBool,
    counters: Arc<Counters>,
    bell: Bell,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of the worker ends the process; one elsewhere under this lock does too, or left the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the worker give everything back and begin nothing.
    fn hold(&self) -> MutexGuard<'_, State> {
        self.hold.store(true, Ordering::Relaxed);
        let mut state = self.state();
        state.held = true;
        while state.busy {
            state = self.wait(state);
        }
        state
    }

    /// Lets the worker look at the queue.
    fn release(&self, mut state: MutexGuard<'_, State>) {
        self.hold.store(false, Ordering::Relaxed);
        state.held = false;
        state.kicked = true;
        drop(state);
        self.changed.notify_all();
    }
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
    disk_bytes: u64,
    config: [u8; CONFIG_BYTES],
    /// Between `pause` (or `restore`) and `resume`.
    paused: bool,
}

impl Block {
    /// A device whose disk has `disk_bytes` and comes later, by [`Block::set_disk`]. Makes the worker thread, which calls `confine`
    /// before anything else; that is done when this returns.
    ///
    /// # Errors
    /// No disk can have this length, the host has no more threads or descriptors, or `confine` failed.
    pub fn new(disk_bytes: u64, watch: &Watch, confine: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        if disk_bytes == 0 || !disk_bytes.is_multiple_of(SECTOR_BYTES) || disk_bytes > map::MAX_DISK_BYTES {
            return Err(io::Error::other(DiskError::Length(disk_bytes)));
        }
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            hold: AtomicBool::new(false),
            counters: Arc::default(),
            bell: Bell::new(watch, BROKEN_TOKEN)?,
        });
        let (started, start) = mpsc::channel();
        let worker = thread::Builder::new().name("block".to_owned()).spawn({
            let shared = shared.clone();
            move || {
                let confined = confine();
                let go = confined.is_ok();
                // Whoever waits for it is in this function.
                let _ = started.send(confined);
                if go {
                    work(&shared);
                }
            }
        })?;
        start.recv().map_err(|_| io::Error::other("the worker thread of the block device ended at its start"))??;
        Ok(Self { shared, worker: Some(worker), disk_bytes, config: config(disk_bytes), paused: false })
    }

    /// Gives the device its disk. Requests that came before wait for it.
    ///
    /// # Errors
    /// It is not of the length that the device was made for; or there is a disk already and a request uses it.
    pub fn set_disk(&mut self, disk: Disk) -> Result<(), DiskError> {
        if disk.bytes() != self.disk_bytes {
            return Err(DiskError::Other { found: disk.bytes(), expected: self.disk_bytes });
        }
        let mut state = self.shared.state();
        while state.busy {
            state = self.shared.wait(state);
        }
        state.disk = Some(disk);
        state.kicked = true;
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Counters, also of a device that is in use.
    pub fn counters(&self) -> Arc<Counters> {
        self.shared.counters.clone()
    }

    /// See [`Disk::seal`]; the device must be paused.
    pub fn seal(&mut self, map: Option<&File>) -> io::Result<Option<u32>> {
        self.at_rest(|disk| disk.seal(map))
    }

    /// See [`Disk::merge`]; the device must be paused.
    pub fn merge(&mut self, cancelled: &mut dyn FnMut() -> bool) -> io::Result<Merged> {
        self.at_rest(|disk| disk.merge(cancelled))
    }

    /// How many sealed layers the disk has; the device must be paused.
    pub fn sealed_layers(&mut self) -> io::Result<usize> {
        self.at_rest(|disk| Ok(disk.sealed_layers()))
    }

    fn at_rest<T>(&mut self, what: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.shared.state();
        // Without a driver nothing is in flight, and there is nothing to pause (the transport does not).
        if !self.paused && (state.busy || state.work.is_some()) {
            return Err(io::Error::other("the block device must be paused for this"));
        }
        match &mut state.disk {
            Some(disk) => what(disk),
            None => Err(io::Error::other("the block device has no disk yet")),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = self.shared.hold();
        state.quit = true;
        drop(state);
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has ended the process.
            let _ = worker.join();
        }
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        device::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, resources: Resources) {
        let Resources { memory, queues, features: _, interrupt } = resources;
        let Some(queue) = queues.into_iter().next() else { return };
        let mut state = self.shared.state();
        state.work = Some(Work { memory, queue, interrupt });
        state.broken = false;
        state.kicked = true;
        drop(state);
        self.shared.changed.notify_all();
    }

    fn reset(&mut self) {
        let mut state = self.shared.hold();
        state.work = None;
        state.broken = false;
        if !self.paused {
            self.shared.release(state);
        }
    }

    fn ready(&mut self, _token: u32) -> bool {
        let mut state = self.shared.state();
        state.kicked = true;
        let broken = state.broken;
        drop(state);
        self.shared.changed.notify_all();
        !broken
    }

    fn pause(&mut self) -> Vec<Queue> {
        self.paused = true;
        let state = self.shared.hold();
        state.work.iter().map(|work| chain::copy(&work.queue)).collect()
    }

    fn resume(&mut self) {
        self.paused = false;
        self.shared.release(self.shared.state());
    }

    fn save(&mut self) -> Vec<u8> {
        // Everything else is in the queue and in the disk's own files.
        self.disk_bytes.to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        let bytes = <[u8; 8]>::try_from(state).map(u64::from_le_bytes);
        if bytes.ok() != Some(self.disk_bytes) {
            return Err(BadState { device: NAME, why: format!("it is not that of a disk of {} bytes", self.disk_bytes) });
        }
        self.paused = true;
        drop(self.shared.hold());
        Ok(())
    }
}

/// `struct virtio_blk_config` (§5.2.4).
fn config(disk_bytes: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
    put(0, &(disk_bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    put(36, &request::MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &request::MAX_RANGES.to_le_bytes());
    put(44, &((BLOCK_BYTES / SECTOR_BYTES) as u32).to_le_bytes());
    put(48, &request::MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &request::MAX_RANGES.to_le_bytes());
    put(56, &[1]); // A write of zeroes may give room back.
    config
}

/// The worker would leave everyone waiting if it panicked; a VMM in which something panicked ends.
struct EndOfProcess;

impl Drop for EndOfProcess {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

fn work(shared: &Shared) {
    let _end = EndOfProcess;
    let mut buffer = vec![0; request::PIECE_BYTES];
    let mut state = shared.state();
    loop {
        if state.quit {
            return;
        }
        let may_begin = state.kicked && !state.held && !state.broken;
        let (mut work, mut disk) = match (may_begin, state.work.take(), state.disk.take()) {
            (true, Some(work), Some(disk)) => (work, disk),
            (_, work, disk) => {
                (state.work, state.disk) = (work, disk);
                state = shared.wait(state);
                continue;
            }
        };
        state.kicked = false;
        state.busy = true;
        drop(state);

        let served = serve(shared, &mut work, &mut disk, &mut buffer);

        state = shared.state();
        (state.work, state.disk) = (Some(work), Some(disk));
        state.busy = false;
        if let Err(broken) = served {
            tracing::warn!(%broken, "the guest's block driver broke the rules of its queue");
            state.broken = true;
            shared.bell.ring();
        }
        shared.changed.notify_all();
    }
}

/// Carries out requests until there are none, or until it shall stop.
fn serve(shared: &Shared, work: &mut Work, disk: &mut Disk, buffer: &mut [u8]) -> Result<(), Broken> {
    let Work { memory, queue, interrupt } = work;
    let mut context = Context { memory: &*memory, disk, buffer, counters: &shared.counters, hold: &shared.hold };
    loop {
        chain::ignore(queue, memory)?;
        loop {
            // `resume` makes the worker look again.
            if shared.hold.load(Ordering::Relaxed) {
                return Ok(());
            }
            let Some(chain) = chain::next(queue, memory)? else { break };
            match context.execute(&chain).inspect_err(|_| chain::put_back(queue))? {
                Outcome::Done(written) => chain::complete(queue, memory, chain.head, written)?,
                Outcome::Abandoned => {
                    chain::put_back(queue);
                    return Ok(());
                }
            }
            chain::notify(queue, memory, interrupt)?;
        }
        if !chain::listen(queue, memory)? {
            return Ok(());
        }
    }
}
