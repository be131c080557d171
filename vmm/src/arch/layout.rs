//! Guest physical memory.
//!
//! ```text
//! 0            RAM (boot structures in the first MiB, kernel from 16 MiB, initramfs at the top)
//! 9_f000       reserved: one page with the VMGenID
//! a_0000       nothing (a PC has video memory here)
//! e_0000       ACPI tables
//! f_f000       reserved: the processor's first instructions after a reset
//! 10_0000      RAM, up to 3 GiB
//! c000_0000    no RAM: virtio windows from d000_0000, IOAPIC, local APICs, KVM's own pages
//! 1_0000_0000  the rest of RAM
//! ```

/// End of the RAM below the hole, if there is that much.
pub const HOLE: u64 = 0xc000_0000;
/// RAM goes on here.
pub const ABOVE_HOLE: u64 = 1 << 32;

/// First byte that is no RAM in the first MiB.
pub const LOW_RAM_END: u64 = 0x9_f000;
/// One page with the VMGenID.
pub const VMGENID: u64 = 0x9_f000;
/// Room for ACPI tables, up to [`FIRMWARE`].
pub const ACPI: u64 = 0xe_0000;
/// A page of "firmware".
pub const FIRMWARE: u64 = 0xf_f000;
/// Where a processor begins after a reset, and where a kernel that restarts "by the BIOS" jumps to, in real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// RAM from here on.
pub const HIGH_RAM: u64 = 0x10_0000;

/// `struct hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// Its list of modules: the initramfs.
pub const MODULES: u64 = 0x6100;
/// Its map of memory.
pub const MEMORY_MAP: u64 = 0x7000;
/// Kernel arguments.
pub const CMDLINE: u64 = 0x2_0000;
/// As many bytes as the kernel takes, with the terminating zero (kernel: arch/x86, COMMAND_LINE_SIZE).
pub const CMDLINE_BYTES: usize = 2048;

/// Window of the first virtio device; 4 KiB for each.
pub const VIRTIO: u64 = 0xd000_0000;
/// Interrupt of the first virtio device.
pub const VIRTIO_GSI: u32 = 5;
/// Devices in fixed places; an absent one leaves a hole, so that a device's address never depends on the others.
pub const VIRTIO_SLOTS: usize = 5;

/// IOAPIC, where every PC has it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs, where every PC has them.
pub const LAPIC: u32 = 0xfee0_0000;
/// KVM's page table for Intel's real mode emulation.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's task state segment for the same, three pages.
pub const TSS: u64 = 0xfffb_d000;

/// First serial port, and its interrupt.
pub const COM1: u16 = 0x3f8;
/// See [`COM1`].
pub const COM1_GSI: u32 = 4;
/// Interrupt of ACPI events: power button and a new VMGenID.
pub const ACPI_GSI: u32 = 10;
/// Ports of [`crate::devices::power`]: sleep control, sleep status, reset, events.
pub const SLEEP_CONTROL: u16 = 0x600;
/// See [`SLEEP_CONTROL`].
pub const SLEEP_STATUS: u16 = 0x601;
/// See [`SLEEP_CONTROL`].
pub const RESET: u16 = 0x602;
/// See [`SLEEP_CONTROL`].
pub const ACPI_EVENTS: u16 = 0x604;

/// Address and length of the pieces of RAM, in the order in which the memory file holds them.
pub fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let below = bytes.min(HOLE);
    let above = bytes - below;
    let mut pieces = vec![(0, below)];
    if above > 0 {
        pieces.push((ABOVE_HOLE, above));
    }
    pieces
}

/// Address of the window of virtio device `slot`.
pub fn virtio_window(slot: usize) -> u64 {
    VIRTIO + slot as u64 * 0x1000
}

/// Interrupt of virtio device `slot`.
pub fn virtio_gsi(slot: usize) -> u32 {
    VIRTIO_GSI + slot as u32
}
