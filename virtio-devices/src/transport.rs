//! The register window of one virtio-mmio device (virtio 1.2 §4.2), version 2.
//!
//! Owns: the registers and their status machine, the device behind them, its interrupt line and one kick per queue. The
//! driver walks the machine in one direction; what is not its turn is ignored, as the specification allows:
//!
//! ```text
//! 0 ─ ACKNOWLEDGE ─► DRIVER ── features ──► FEATURES_OK ── queues ──► DRIVER_OK ── kicks ─┐
//! ▲                                                                                       │
//! └────────── 0 written: the device is reset ◄── DEVICE_NEEDS_RESET ◄── a broken rule ────┘
//! ```
//!
//! Never lets the driver choose a queue that is not there, a size above the device's or a ring outside guest memory, and
//! never changes a queue that is ready: what `activate` gets was checked when it became ready and has not changed since.

use std::{any::Any, io};

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
        VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{BadState, FIRST_OWN_TOKEN, Interrupt, Memory, Resources, VirtioDevice, Watch, descriptor_of};

/// Length of the window in guest physical memory, in bytes.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Offset of `QueueNotify`: an ioeventfd here with the queue's number as 32-bit datamatch is that queue's kick.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Saved state of one device is shorter (that of vsock is the longest, since it holds what clients have not taken yet);
/// longer is refused unread.
pub const MAX_STATE_BYTES: usize = 20 * 1024 * 1024;

/// Configuration space begins here.
const CONFIG: u64 = 0x100;
/// As much of it as is watched for changes. The longest of ours, block's, has 60 bytes.
const WATCHED_CONFIG_BYTES: usize = 64;
/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
/// Version 1 is the legacy interface, which this is not.
const VERSION: u32 = 2;
/// "DMSE". Drivers match on the device, not on this.
const VENDOR: u32 = 0x4553_4d44;
const ALL_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_NEEDS_RESET
    | VIRTIO_CONFIG_S_FAILED;

/// A queue as its driver describes it, and where the device has got to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
}

impl QueueRegisters {
    fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// The queue for the device to use; `None` if its size is none, or a ring is misaligned or not in guest memory.
    fn queue(&self, max_size: u16, event_idx: bool, memory: &Memory) -> Option<Queue> {
        let state = QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        if !self.ready {
            // The device is told of it and never looks inside; what the driver left in its registers is not checked.
            return Queue::new(max_size).ok();
        }
        let queue = Queue::try_from(state).ok()?;
        // `is_valid` says nothing of address 0, which the crate takes for "not set" later on.
        (self.available != 0 && queue.is_valid(memory.as_ref())).then_some(queue)
    }
}

/// What [`MmioTransport::save`] writes.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    kind: u32,
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    config_generation: u32,
    interrupt: u32,
    queues: Vec<QueueRegisters>,
    device: Vec<u8>,
}

/// One virtio-mmio device: register window, device, interrupt, kicks. Behind one mutex of its owner's.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    /// As written; may be no queue.
    queue_select: u32,
    /// One for each queue of the device. While the device is active and not paused, `next_*` are the device's business.
    queues: Vec<QueueRegisters>,
    config_generation: u32,
    /// Configuration space when the driver last read its generation.
    config_seen: [u8; WATCHED_CONFIG_BYTES],
    /// Between `activate` and `reset` of the device.
    active: bool,
    /// Between `pause` (or `restore`) and `resume`.
    paused: bool,
    /// Between `restore` and `resume`: the device waits for `resume`, whether it is active or not.
    restored: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.name())
            .field("status", &self.status)
            .field("active", &self.active)
            .field("paused", &self.paused)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind a window whose registers are as after a reset. Makes one kick per queue and adds it to `watch`
    /// with the queue's number as token; the owner of the epoll hands such events to [`MmioTransport::ready`].
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, interrupt: Interrupt, watch: Watch) -> io::Result<Self> {
        let kicks = (0..device.queue_sizes().len()).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<Vec<_>>>()?;
        for (token, kick) in (0..FIRST_OWN_TOKEN).zip(&kicks) {
            watch.add(descriptor_of(kick), token, EventFlags::IN)?;
        }
        let queues = Self::fresh_queues(device.as_ref());
        let mut transport = Self {
            device,
            memory,
            interrupt,
            kicks,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            config_generation: 0,
            config_seen: [0; WATCHED_CONFIG_BYTES],
            active: false,
            paused: false,
            restored: false,
        };
        transport.device.read_config(0, &mut transport.config_seen);
        Ok(transport)
    }

    /// One kick per queue, in order, for `KVM_IOEVENTFD` at [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// For logs and errors: `block`, `vsock`, …
    pub fn name(&self) -> &'static str {
        self.device.name()
    }

    /// The device behind the window.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// The device behind the window, if it is a `D`: for what only that kind of device can do (a disk to set, counters).
    pub fn device_as<D: VirtioDevice>(&mut self) -> Option<&mut D> {
        let device: &mut dyn Any = self.device.as_mut();
        device.downcast_mut()
    }

    /// The driver reads at `offset` of the window. Registers are 32 bits wide and read as zeros otherwise; configuration
    /// space takes any width.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(within) = offset.checked_sub(CONFIG) {
            if within.checked_add(data.len() as u64).is_some_and(|end| end <= WINDOW_BYTES - CONFIG) {
                self.device.read_config(within, data);
            }
        } else if offset.is_multiple_of(4) && data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    /// The driver writes at `offset` of the window. What is not for it to write, or not now, is ignored. A write that makes
    /// the status 0 resets the device and returns when the device has let go of guest memory.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(within) = offset.checked_sub(CONFIG) {
            // Before DRIVER there is nobody who could know what the fields mean (§3.1.1).
            if self.has(VIRTIO_CONFIG_S_DRIVER) && within.checked_add(data.len() as u64).is_some_and(|end| end <= WINDOW_BYTES - CONFIG) {
                self.device.write_config(within, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }

    /// Something of this device in the epoll is ready. Reads the kick if it is one. Swallows what comes while the device is
    /// paused or not in use: `resume` and `activate` look at every queue.
    pub fn ready(&mut self, token: u32) {
        if let Some(kick) = self.kicks.get(token as usize) {
            // Fails only if it was read already, and then the event was an old one.
            let _ = kick.read();
        }
        if self.paused || !self.in_use() {
            return;
        }
        if !self.device.ready(token) {
            tracing::warn!(device = self.device.name(), "the guest's driver broke the rules of its queue and must reset the device");
            self.need_reset();
        }
    }

    /// The vCPUs are stopped. When this returns, nothing of the device is in flight and nothing touches guest memory until
    /// [`MmioTransport::resume`]. Harmless if it is paused.
    pub fn pause(&mut self) {
        if self.paused {
            return;
        }
        self.paused = true;
        if self.active {
            self.keep_paused();
        }
    }

    /// Goes on after a pause or a restore. Harmless if it is not paused.
    pub fn resume(&mut self) {
        if !self.paused {
            return;
        }
        self.paused = false;
        if self.active || self.restored {
            self.device.resume();
        }
        self.restored = false;
    }

    /// Everything of the device and its window that is not in guest memory. The device must be paused; it is if it is not.
    pub fn save(&mut self) -> Vec<u8> {
        self.pause();
        let saved = Saved {
            kind: self.device.kind(),
            status: self.status,
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            config_generation: self.config_generation,
            interrupt: self.interrupt.status(),
            queues: self.queues.clone(),
            device: self.device.save(),
        };
        postcard::to_allocvec(&saved).expect("integers and byte vectors go into a growing buffer: nothing in it can fail")
    }

    /// Takes what [`MmioTransport::save`] gave into a window that no driver has touched. It is paused afterwards. If an
    /// interrupt was not acknowledged, the line is raised: call this after the interrupt controller is restored.
    ///
    /// # Errors
    /// The bytes are no state of such a device, or the queues in them do not fit this guest memory. The window is as new
    /// then, but the device itself may hold part of the state and must not be used.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        let device = self.device.name();
        let bad = |why: &str| BadState { device, why: why.to_owned() };
        if self.status != 0 || self.active {
            return Err(bad("a driver uses the device already"));
        }
        if state.len() > MAX_STATE_BYTES {
            return Err(bad("it is too long"));
        }
        let (saved, rest): (Saved, _) = postcard::take_from_bytes(state).map_err(|error| bad(&format!("it is malformed ({error})")))?;
        if !rest.is_empty() {
            return Err(bad("something follows it"));
        }
        if saved.kind != self.device.kind() {
            return Err(bad(&format!("it is that of a device of type {}, not {}", saved.kind, self.device.kind())));
        }
        if saved.status & !ALL_STATUS != 0 || !status_is_reachable(saved.status) {
            return Err(bad(&format!("no driver can have brought it to status {:#x}", saved.status)));
        }
        // Until FEATURES_OK the driver may have written anything.
        if saved.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && saved.driver_features & !self.offered_features() != 0 {
            return Err(bad(&format!("it uses features {:#x}, and only {:#x} are offered", saved.driver_features, self.offered_features())));
        }
        if saved.queues.len() != self.queues.len() {
            return Err(bad(&format!("it has {} queues instead of {}", saved.queues.len(), self.queues.len())));
        }
        let event_idx = saved.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(saved.queues.len());
        for (index, (queue, &max_size)) in saved.queues.iter().zip(self.device.queue_sizes()).enumerate() {
            let checked = queue.queue(max_size, event_idx, &self.memory);
            queues.push(checked.ok_or_else(|| bad(&format!("its queue {index} does not fit guest memory or the device")))?);
        }
        self.device.restore(&saved.device)?;
        self.status = saved.status;
        self.driver_features = saved.driver_features;
        self.device_features_select = saved.device_features_select;
        self.driver_features_select = saved.driver_features_select;
        self.queue_select = saved.queue_select;
        self.config_generation = saved.config_generation;
        self.queues = saved.queues;
        self.paused = true;
        self.restored = true;
        if self.in_use() {
            self.activate_with(queues);
        }
        self.interrupt.restore(saved.interrupt);
        Ok(())
    }

    fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
        // `QueueNum` is the driver's to write; until then it is the largest, as a driver that forgets it would expect.
        device.queue_sizes().iter().map(|&size| QueueRegisters { size, ..QueueRegisters::default() }).collect()
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    /// The driver may use queues, and so may the device.
    fn in_use(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK) && self.status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) == 0
    }

    /// It is the driver's turn to describe its queues (§3.1.1 step 7).
    fn takes_queues(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK)
            && self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) == 0
    }

    fn selected_queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.kind(),
            0x00c => VENDOR,
            0x010 => match self.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            // 0 says that there is no such queue.
            0x034 => usize::try_from(self.queue_select).ok().and_then(|index| self.device.queue_sizes().get(index)).copied().unwrap_or(0).into(),
            0x044 => self.selected_queue().is_some_and(|queue| queue.ready).into(),
            0x060 => self.interrupt.status(),
            0x070 => self.status,
            // Shared memory regions: length and base of one that does not exist are all ones (§4.2.2).
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => self.generation(),
            _ => 0,
        }
    }

    /// Configuration as a whole has changed if it is not what it was when the driver last asked, which is all that a driver
    /// can tell: it reads the generation, the fields, and the generation again (§2.5.1).
    fn generation(&mut self) -> u32 {
        let mut now = [0; WATCHED_CONFIG_BYTES];
        self.device.read_config(0, &mut now);
        if now != self.config_seen {
            self.config_seen = now;
            self.config_generation = self.config_generation.wrapping_add(1);
        }
        self.config_generation
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_select = value,
            0x020 => self.write_features(value),
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x044 => self.write_queue_ready(value),
            0x038 | 0x080 | 0x084 | 0x090 | 0x094 | 0x0a0 | 0x0a4 => self.write_queue(offset, value),
            QUEUE_NOTIFY => {
                if let Some(kick) = usize::try_from(value).ok().and_then(|queue| self.kicks.get(queue)) {
                    // Refused only if the counter is full, and then the kick is there already.
                    let _ = kick.write(1);
                }
            }
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.write_status(value),
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if !self.takes_queues() {
            return;
        }
        let Some(index) = usize::try_from(self.queue_select).ok().filter(|&index| index < self.queues.len()) else { return };
        let max_size = self.device.queue_sizes().get(index).copied().unwrap_or(0);
        let queue = &mut self.queues[index];
        // A ready queue was checked, and must stay what was checked.
        if queue.ready {
            return;
        }
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0x038 => {
                if let Some(size) = u16::try_from(value).ok().filter(|&size| size.is_power_of_two() && size <= max_size) {
                    queue.size = size;
                }
            }
            0x080 => low(&mut queue.descriptors),
            0x084 => high(&mut queue.descriptors),
            0x090 => low(&mut queue.available),
            0x094 => high(&mut queue.available),
            0x0a0 => low(&mut queue.used),
            0x0a4 => high(&mut queue.used),
            _ => {}
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        if !self.takes_queues() {
            return;
        }
        let Some(index) = usize::try_from(self.queue_select).ok().filter(|&index| index < self.queues.len()) else { return };
        let max_size = self.device.queue_sizes().get(index).copied().unwrap_or(0);
        let candidate = QueueRegisters { ready: value & 1 == 1, ..self.queues[index] };
        if candidate.queue(max_size, false, &self.memory).is_some() {
            self.queues[index] = candidate;
        } else {
            tracing::warn!(device = self.device.name(), queue = index, "the guest's driver set up a queue that is not in its memory");
            self.need_reset();
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits are set one after the other and never cleared but by a reset (§2.1); NEEDS_RESET is the device's to set.
        let added = value & !self.status & ALL_STATUS & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.status & !VIRTIO_CONFIG_S_NEEDS_RESET & !value != 0 {
            return;
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            self.stop();
            tracing::warn!(device = self.device.name(), "the guest's driver gave up on the device");
            return;
        }
        if added & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if added & VIRTIO_CONFIG_S_DRIVER != 0 && self.has(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            self.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        // The driver reads FEATURES_OK back: it stays clear if it took what was not offered, or would speak the legacy dialect.
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.has(VIRTIO_CONFIG_S_DRIVER)
            && self.driver_features & !self.offered_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
        {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.takes_queues() {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.activate();
        }
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (queue, &max_size) in self.queues.iter().zip(self.device.queue_sizes()) {
            // Checked when it became ready, and guest memory has no holes punched into its layout since.
            let Some(queue) = queue.queue(max_size, event_idx, &self.memory) else { return self.need_reset() };
            queues.push(queue);
        }
        self.activate_with(queues);
        if self.paused {
            self.keep_paused();
        }
        // A driver that kicked before DRIVER_OK broke §3.1.1, but the kick may also have been swallowed a moment ago.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
    }

    fn activate_with(&mut self, queues: Vec<Queue>) {
        self.active = true;
        self.device.activate(Resources {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
        });
    }

    fn keep_paused(&mut self) {
        let queues = self.device.pause();
        debug_assert_eq!(queues.len(), self.queues.len(), "a device gives back the queues that it got");
        for (registers, queue) in self.queues.iter_mut().zip(&queues) {
            // A queue that the driver left out keeps what is in its registers; the device only had a stand-in.
            if registers.ready {
                *registers = QueueRegisters::of(queue);
            }
        }
    }

    /// Takes guest memory from the device.
    fn stop(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
    }

    /// The driver broke a rule. The device is stopped here and now, not when the driver gets round to the reset: until then
    /// nothing of it may wake the event loop.
    fn need_reset(&mut self) {
        self.stop();
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        // §2.1.2: only a driver that runs is told.
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupt.config_changed();
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues = Self::fresh_queues(self.device.as_ref());
        self.interrupt.acknowledge(u32::MAX);
    }
}

/// Whether each step that was taken comes after those it needs.
fn status_is_reachable(status: u32) -> bool {
    [
        (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_ACKNOWLEDGE),
        (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER),
        (VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK),
    ]
    .into_iter()
    .all(|(step, needs)| status & step == 0 || status & needs != 0)
}
