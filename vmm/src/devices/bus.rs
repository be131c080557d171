//! Which device answers which port and address.

use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

use virtio_devices::{device::Memory, transport::MmioTransport};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::layout::{self, VIRTIO_SLOTS},
    devices::{power::Power, power, rtc, rtc::Rtc, serial::Console},
    kvm::vcpu::Exits,
};

/// Keyboard controller: the only thing that it can do here is to reset the machine (`reboot=k`).
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// What a port without a device reads as.
const FLOATING: u8 = 0xff;

/// All devices of a machine.
pub struct Bus {
    /// Serial port.
    pub console: Mutex<Console>,
    /// Clock.
    pub rtc: Mutex<Rtc>,
    /// Power and ACPI events.
    pub power: Power,
    /// Virtio devices, by slot.
    pub virtio: [Option<Mutex<MmioTransport>>; VIRTIO_SLOTS],
    memory: Memory,
    stops: Mutex<mpsc::Sender<String>>,
    stopped: EventFd,
}

/// A lock whose holder panicked is taken all the same: the panic ends the process soon (see the crate's root), and until then
/// no second panic helps.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// `stops` hears how the guest ended, and `stopped` counts up then.
    pub fn new(console: Console, power: Power, virtio: [Option<Mutex<MmioTransport>>; VIRTIO_SLOTS], memory: Memory, stops: mpsc::Sender<String>, stopped: EventFd) -> Self {
        Self { console: Mutex::new(console), rtc: Mutex::new(Rtc::default()), power, virtio, memory, stops: Mutex::new(stops), stopped }
    }

    fn window(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let inside = address.checked_sub(layout::VIRTIO)?;
        let device = self.virtio.get(usize::try_from(inside / 0x1000).ok()?)?.as_ref()?;
        Some((device, inside % 0x1000))
    }
}

impl Exits for Bus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(FLOATING);
        // String instructions give several units at once; ours are bytes.
        for byte in data {
            *byte = match port {
                layout::COM1..=0x3ff => lock(&self.console).read((port - layout::COM1) as u8),
                rtc::DATA_PORT => lock(&self.rtc).read(),
                layout::SLEEP_STATUS => 0,
                layout::ACPI_EVENTS => self.power.take(),
                // Nothing to read, room to write.
                I8042_COMMAND => 0,
                _ => FLOATING,
            };
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<String> {
        for byte in data {
            match (port, *byte) {
                (layout::COM1..=0x3ff, byte) => lock(&self.console).write((port - layout::COM1) as u8, byte),
                (rtc::INDEX_PORT, byte) => lock(&self.rtc).select(byte),
                (rtc::DATA_PORT, byte) => lock(&self.rtc).write(byte),
                (layout::SLEEP_CONTROL, byte) if Power::turns_off(byte) => return Some("the guest turned itself off".to_owned()),
                (layout::RESET, power::RESET_VALUE) | (I8042_COMMAND, I8042_RESET) => return Some("the guest reset itself".to_owned()),
                _ => {}
            }
        }
        None
    }

    fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(FLOATING);
        if let Some((device, offset)) = self.window(address) {
            lock(device).read(offset, data);
        }
    }

    fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(address) {
            lock(device).write(offset, data);
        }
    }

    fn stopped(&self, _vcpu: u8, how: String) {
        // Nobody listens once the machine is being dropped.
        let _ = lock(&self.stops).send(how);
        let _ = self.stopped.write(1);
    }

    fn peek(&self, address: u64, bytes: &mut [u8]) -> usize {
        self.memory.read(bytes, GuestAddress(address)).unwrap_or(0)
    }
}
