//! The file of device state: everything of a paused machine that is neither memory nor disk.
//!
//! Owns: its form ([`format`]) and which sections there are. Never holds guest memory; never says what a section means to
//! the device that wrote it.

pub mod format;

/// How many vCPUs, how much memory, which devices: what the machine must be like that takes this state.
pub const SHAPE: u32 = tag(b"SHPE");
/// State of one vCPU; one section for each, in order.
pub const VCPU: u32 = tag(b"VCPU");
/// Interrupt controllers, timer, clock.
pub const VM: u32 = tag(b"KVM ");
/// Serial port, RTC, ACPI events.
pub const LEGACY: u32 = tag(b"LGCY");
/// A virtio device; the last byte is its slot.
pub const VIRTIO: u32 = tag(b"VIO\0");

const fn tag(name: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*name)
}

/// Section of the virtio device in `slot`.
pub fn virtio(slot: usize) -> u32 {
    VIRTIO | (slot as u32 & 0xff) << 24
}
