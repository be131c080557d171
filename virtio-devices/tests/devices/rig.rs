//! A driver as Linux has it, and the event loop around one device: what the VMM does, in one thread.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
};
use virtio_devices::{
    device::{Interrupt, Memory, VirtioDevice, Watch, descriptor_of},
    transport::MmioTransport,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Nothing here takes nearly as long, even on a busy machine.
pub const CEILING: Duration = Duration::from_secs(20);

pub const STATUS: u64 = 0x70;
pub const NOTIFY: u64 = 0x50;
pub const FAILED: u32 = 128;
pub const NEEDS_RESET: u32 = 64;
pub const RUNNING: u32 = 15;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Rings live here, one page-aligned megabyte for all queues; what is above is for buffers.
pub const RINGS: u64 = 0x10_0000;
pub const BUFFERS: u64 = 0x20_0000;
/// 16 MiB from 0, and 4 MiB more after a hole.
pub const LOW_BYTES: usize = 16 << 20;
pub const HIGH: u64 = 1 << 30;
pub const HIGH_BYTES: usize = 4 << 20;

pub fn memory() -> Memory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LOW_BYTES), (GuestAddress(HIGH), HIGH_BYTES)]).unwrap())
}

/// One device in its window, and the event loop.
pub struct Rig {
    pub memory: Memory,
    pub transport: MmioTransport,
    pub line: EventFd,
    epoll: Arc<OwnedFd>,
}

const DEVICE: u32 = 7;
const LINE: u64 = u64::MAX;

impl Rig {
    pub fn new(memory: Memory, make: impl FnOnce(&Watch) -> Box<dyn VirtioDevice>) -> Self {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let watch = Watch::new(epoll.clone(), DEVICE);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        epoll::add(&epoll, descriptor_of(&line), epoll::EventData::new_u64(LINE), epoll::EventFlags::IN).unwrap();
        let device = make(&watch);
        let transport = MmioTransport::new(device, memory.clone(), Interrupt::new(line.try_clone().unwrap()), watch).unwrap();
        Self { memory, transport, line, epoll }
    }

    /// Waits for events up to `timeout` and does with them what the VMM does; answers how many there were.
    pub fn turn(&mut self, timeout: Duration) -> usize {
        let mut events = Vec::with_capacity(16);
        let timeout = Timespec::try_from(timeout).unwrap();
        match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
            // A signal, such as a fuzzer's alarm.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("{error}"),
        }
        for event in &events {
            if event.data.u64() == LINE {
                // The interrupt handler runs.
                let _ = self.line.read();
            } else {
                let (device, token) = Watch::decode(event.data.u64());
                assert_eq!(device, DEVICE);
                self.transport.ready(token);
            }
        }
        events.len()
    }

    /// Turns until nothing is left to do at once.
    pub fn settle(&mut self) {
        let deadline = Instant::now() + CEILING;
        while self.turn(Duration::ZERO) != 0 {
            assert!(Instant::now() < deadline, "the event loop does not come to rest");
        }
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + CEILING;
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}; status {:#x}", self.read(STATUS));
            self.turn(left.min(Duration::from_millis(100)));
        }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | u64::from(self.read(0x10)) << 32
    }

    /// Steps up to FEATURES_OK, as `virtio_dev_probe` does.
    pub fn negotiate(&mut self, features: u64) {
        assert_eq!((self.read(0), self.read(4)), (0x7472_6976, 2));
        self.write(STATUS, 0);
        assert_eq!(self.read(STATUS), 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 11);
        assert_eq!(self.read(STATUS), 11, "the device must take its own features");
    }

    /// Describes a queue, as `vm_setup_vq` does.
    pub fn set_up(&mut self, queue: &Ring) {
        self.write(0x30, queue.index);
        assert_eq!(self.read(0x44), 0, "a queue that was not set up is not ready");
        assert!(u32::from(queue.size) <= self.read(0x34));
        self.write(0x38, queue.size.into());
        for (register, address) in [(0x80, queue.descriptors), (0x90, queue.available), (0xa0, queue.used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// A driver with all features and all queues of this size.
    pub fn start(&mut self, size: u16, n_queues: u32) -> Vec<Ring> {
        let offered = self.offered();
        self.start_with(offered, size, n_queues)
    }

    pub fn start_with(&mut self, features: u64, size: u16, n_queues: u32) -> Vec<Ring> {
        self.negotiate(features);
        let rings: Vec<_> = (0..n_queues).map(|index| Ring::new(&self.memory, index, size, features & 1 << 29 != 0)).collect();
        for ring in &rings {
            self.set_up(ring);
            assert_eq!(self.read(0x44), 1);
        }
        self.write(STATUS, RUNNING);
        assert_eq!(self.read(STATUS), RUNNING);
        rings
    }

    pub fn kick(&mut self, ring: &Ring) {
        self.write(NOTIFY, ring.index);
    }

    /// The next completion: head and length.
    pub fn completion(&mut self, ring: &mut Ring) -> (u16, u32) {
        let mut found = None;
        self.until("a completion", |rig| {
            found = ring.used(&rig.memory);
            found.is_some()
        });
        found.unwrap()
    }
}

/// The driver's side of one queue.
#[derive(Debug, Clone)]
pub struct Ring {
    pub index: u32,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub free: Vec<u16>,
    pub chains: Vec<Vec<u16>>,
    pub available_index: u16,
    pub used_seen: u16,
    pub event_idx: bool,
}

impl Ring {
    pub fn new(memory: &Memory, index: u32, size: u16, event_idx: bool) -> Self {
        let base = RINGS + u64::from(index) * 0x8000;
        let zeros = vec![0; 0x8000];
        memory.write_slice(&zeros, GuestAddress(base)).unwrap();
        Self {
            index,
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x6000,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            available_index: 0,
            used_seen: 0,
            event_idx,
        }
    }

    pub fn describe(&self, memory: &Memory, at: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(memory, self.descriptors + u64::from(at) * 16, address, len, flags, next);
    }

    /// Makes `head` available, whatever it is.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let place = self.available + 4 + u64::from(self.available_index % self.size) * 2;
        memory.write_obj(head, GuestAddress(place)).unwrap();
        self.available_index = self.available_index.wrapping_add(1);
        self.publish(memory, self.available_index);
    }

    pub fn publish(&self, memory: &Memory, index: u16) {
        memory.store(index, GuestAddress(self.available + 2), std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Makes a request of these buffers (address, length, whether the device writes it) available; answers its head.
    pub fn add(&mut self, memory: &Memory, buffers: &[(u64, u32, bool)]) -> u16 {
        let places: Vec<_> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (index, (&place, &(address, len, writable))) in places.iter().zip(buffers).enumerate() {
            let next = places.get(index + 1).copied();
            let flags = if writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.describe(memory, place, address, len, flags, next.unwrap_or(0));
        }
        let head = places[0];
        self.chains[usize::from(head)] = places;
        self.offer(memory, head);
        head
    }

    /// As `add`, through a table at `table`.
    pub fn add_indirect(&mut self, memory: &Memory, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        for (index, &(address, len, writable)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = if writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            write_descriptor(memory, table + index as u64 * 16, address, len, flags, index as u16 + 1);
        }
        let head = self.free.pop().unwrap();
        self.describe(memory, head, table, buffers.len() as u32 * 16, INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.offer(memory, head);
        head
    }

    /// Takes the next completion, as `virtqueue_get_buf` does.
    pub fn used(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let index: u16 = memory.load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::Acquire).unwrap();
        if index == self.used_seen {
            if self.event_idx {
                memory.write_obj(self.used_seen, GuestAddress(self.available + 4 + u64::from(self.size) * 2)).unwrap();
            }
            return None;
        }
        let place = self.used + 4 + u64::from(self.used_seen % self.size) * 8;
        let id: u32 = memory.read_obj(GuestAddress(place)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(place + 4)).unwrap();
        self.used_seen = self.used_seen.wrapping_add(1);
        let head = u16::try_from(id).unwrap();
        let places = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!places.is_empty(), "request {head} was completed though it is not under way");
        self.free.extend(places.into_iter().rev());
        Some((head, len))
    }

    /// How many requests are not completed.
    pub fn under_way(&self) -> usize {
        self.chains.iter().filter(|places| !places.is_empty()).count()
    }
}

pub fn write_descriptor(memory: &Memory, place: u64, address: u64, len: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(place)).unwrap();
    memory.write_obj(len, GuestAddress(place + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(place + 12)).unwrap();
    memory.write_obj(next, GuestAddress(place + 14)).unwrap();
}

pub fn put(memory: &Memory, address: u64, data: &[u8]) {
    memory.write_slice(data, GuestAddress(address)).unwrap();
}

pub fn get(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    memory.read_slice(&mut data, GuestAddress(address)).unwrap();
    data
}
