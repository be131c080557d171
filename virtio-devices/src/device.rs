//! What a device is to the transport, and what a device is given.
//!
//! Threads: a device is behind one mutex. It is entered by vCPU threads (register accesses, activation, reset) and by the
//! VMM's event loop ([`VirtioDevice::ready`]). A device that needs a thread of its own makes it when it is constructed,
//! never later: threads made after the jail would have the wrong filter.

use std::{
    any::Any,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::event::epoll;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Guest memory, shared by everything that reads or writes it.
pub type Memory = Arc<GuestMemoryMmap>;

/// Bit of `InterruptStatus`: a buffer was used (virtio 1.2 §4.2.2).
pub const INTERRUPT_USED: u32 = 1;
/// Bit of `InterruptStatus`: the configuration changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// A device's interrupt line.
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// `line` is an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), line: Arc::new(line) }
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED);
    }

    /// Tells the driver that the configuration changed, or that the device needs a reset.
    pub fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // An eventfd refuses only when its counter is full, and then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    /// What the driver reads as `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver's `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the status of a restored machine, and raises the line again if anything is unacknowledged: an edge that was
    /// raised but not delivered when the machine was saved would be lost.
    pub fn restore(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
        if status != 0 {
            let _ = self.line.write(1);
        }
    }
}

/// The descriptor of an eventfd, for [`Watch`]: `EventFd` itself only knows the raw number.
#[expect(unsafe_code, reason = "`EventFd` has no `AsFd`")]
pub fn descriptor_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and is borrowed for as long as the result, so it stays open; it is not -1, since
    // an `EventFd` is only made of what eventfd(2) returned or its maker vouched for.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// What [`VirtioDevice::read_config`] does for a device whose configuration space is `config`.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// How a device asks the event loop to call [`VirtioDevice::ready`]. Cheap to clone; usable from any thread.
#[derive(Debug, Clone)]
pub struct Watch {
    epoll: Arc<rustix::fd::OwnedFd>,
    device: u32,
}

impl Watch {
    /// Registrations of the device with this number go into `epoll`.
    pub fn new(epoll: Arc<rustix::fd::OwnedFd>, device: u32) -> Self {
        Self { epoll, device }
    }

    fn data(&self, token: u32) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.device) << 32 | u64::from(token))
    }

    /// Which device and which token an event of the epoll is for.
    pub fn decode(data: u64) -> (u32, u32) {
        ((data >> 32) as u32, data as u32)
    }

    /// Starts watching. The descriptor must be removed before it is closed if it has duplicates elsewhere.
    pub fn add(&self, descriptor: impl AsFd, token: u32, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, self.data(token), interest)?)
    }

    /// Changes what is watched for.
    pub fn change(&self, descriptor: impl AsFd, token: u32, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, descriptor, self.data(token), interest)?)
    }

    /// Ends watching.
    pub fn remove(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, descriptor)?)
    }
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Resources {
    /// Guest memory.
    pub memory: Memory,
    /// The queues, in order. Those that are `ready()` are valid (the transport has checked them against guest memory); a
    /// driver may leave out a queue that it does not want, and that one is not `ready()` and must not be used.
    pub queues: Vec<Queue>,
    /// Features that were offered and taken.
    pub features: u64,
    /// The line.
    pub interrupt: Interrupt,
}

/// Token of [`VirtioDevice::ready`] for the kick of queue `n` is `n`; a device's own tokens begin here.
pub const FIRST_OWN_TOKEN: u32 = 16;

/// Why a device cannot be what its saved state says.
#[derive(Debug, thiserror::Error)]
#[error("the saved state of the {device} device cannot be used: {why}")]
pub struct BadState {
    /// Which device.
    pub device: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// A virtio device.
///
/// Life: made → (`activate` → … → `reset`)*; between `activate` and `reset` it may be `pause`d and `resume`d. A restored
/// device is made, `restore`d, `activate`d with the saved queues (unless no driver used it), and is then paused until `resume`.
pub trait VirtioDevice: Any + Send {
    /// For logs and errors: `block`, `vsock`, …
    fn name(&self) -> &'static str;

    /// Device type (virtio 1.2 §5).
    fn kind(&self) -> u32;

    /// Features offered, without those of the transport (`VIRTIO_F_VERSION_1` is added there).
    fn features(&self) -> u64;

    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space; what lies beyond it reads as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space; a device without writable fields ignores it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set `DRIVER_OK`. The device may use queues from here on (unless it is paused).
    fn activate(&mut self, resources: Resources);

    /// The driver has reset the device. When this returns, nothing of the device touches guest memory, and no descriptor of
    /// the previous driver's is ever completed.
    fn reset(&mut self);

    /// Something that is watched is ready: queue `token` was kicked (the kick is read already), or a descriptor of the
    /// device's own. Not called while paused. `false`: the driver broke the rules, the device has stopped using its queues,
    /// and the transport sets `DEVICE_NEEDS_RESET`.
    #[must_use]
    fn ready(&mut self, token: u32) -> bool;

    /// The vCPUs are stopped. When this returns, nothing is in flight and nothing touches guest memory until `resume`;
    /// work that was not begun stays in the queues. Answers the queues as they are now.
    fn pause(&mut self) -> Vec<Queue>;

    /// Goes on after a `pause` or a restore, and looks at every queue, since a kick may have been lost with the old process.
    fn resume(&mut self);

    /// State that is neither in guest memory nor in the queues; the device is paused.
    fn save(&mut self) -> Vec<u8>;

    /// Takes what `save` gave, before `activate`.
    fn restore(&mut self, state: &[u8]) -> Result<(), BadState>;
}
