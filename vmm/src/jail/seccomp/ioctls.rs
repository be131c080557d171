//! Numbers of the ioctls that are permitted after the machine has been made.
//!
//! `linux/kvm.h` says how each is built; a number holds direction, size and type, so a call with another structure has
//! another number and is forbidden.

use kvm_bindings as kvm;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC` of asm-generic/ioctl.h.
const fn number(direction: u32, kind: u8, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (kind as u32) << 8 | number
}

const fn kvm_io(nr: u32) -> u32 {
    number(NONE, KVM, nr, 0)
}

const fn kvm_w<T>(nr: u32) -> u32 {
    number(WRITE, KVM, nr, size_of::<T>())
}

const fn kvm_r<T>(nr: u32) -> u32 {
    number(READ, KVM, nr, size_of::<T>())
}

const fn kvm_wr<T>(nr: u32) -> u32 {
    number(READ | WRITE, KVM, nr, size_of::<T>())
}

/// `KVMIO`.
const KVM: u8 = 0xae;

/// Runs the guest until it needs this process: vCPU threads only.
pub const KVM_RUN: u32 = kvm_io(0x80);

/// State of one vCPU, read by a save and written by a restore, on the vCPU's own thread. The descriptors are of one vCPU or
/// its machine; nothing here makes a machine, a vCPU or a memory slot.
pub const VCPU_STATE: &[u32] = &[
    // Registers: read by a save and for the report of a guest that cannot go on; written by boot and restore.
    kvm_r::<kvm::kvm_regs>(0x81),
    kvm_w::<kvm::kvm_regs>(0x82),
    // Segments, control registers, APIC base.
    kvm_r::<kvm::kvm_sregs>(0x83),
    kvm_w::<kvm::kvm_sregs>(0x84),
    // Model specific registers.
    kvm_wr::<kvm::kvm_msrs>(0x88),
    kvm_w::<kvm::kvm_msrs>(0x89),
    // Where the instruction is that KVM cannot do, for the report of a guest that ended by it.
    kvm_wr::<kvm::kvm_translation>(0x85),
    // Local APIC.
    kvm_r::<kvm::kvm_lapic_state>(0x8e),
    kvm_w::<kvm::kvm_lapic_state>(0x8f),
    // What the guest's CPUID instruction answers.
    kvm_w::<kvm::kvm_cpuid2>(0x90),
    // Whether a vCPU runs, waits for its start, or is halted.
    kvm_r::<kvm::kvm_mp_state>(0x98),
    kvm_w::<kvm::kvm_mp_state>(0x99),
    // Pending exceptions and interrupts.
    kvm_r::<kvm::kvm_vcpu_events>(0x9f),
    kvm_w::<kvm::kvm_vcpu_events>(0xa0),
    // Debug registers.
    kvm_r::<kvm::kvm_debugregs>(0xa1),
    kvm_w::<kvm::kvm_debugregs>(0xa2),
    // Frequency of the time stamp counter.
    kvm_io(0xa2),
    kvm_io(0xa3),
    // Vector state: XSAVE, and XSAVE2 for the larger one.
    kvm_r::<kvm::kvm_xsave>(0xa4),
    kvm_w::<kvm::kvm_xsave>(0xa5),
    kvm_r::<kvm::kvm_xsave>(0xcf),
    // Which vector state is enabled.
    kvm_r::<kvm::kvm_xcrs>(0xa6),
    kvm_w::<kvm::kvm_xcrs>(0xa7),
    // Offset of the guest's time stamp counter: the same for all vCPUs.
    kvm_w::<kvm::kvm_device_attr>(0xe1),
    kvm_w::<kvm::kvm_device_attr>(0xe2),
    // Tells a guest's clock that it was paused.
    kvm_io(0xad),
];

/// State of the virtual machine, and what save and restore ask of it. Main thread only.
pub const VM_STATE: &[u32] = &[
    // Interrupt controllers.
    kvm_wr::<kvm::kvm_irqchip>(0x62),
    kvm_r::<kvm::kvm_irqchip>(0x63),
    // Timer.
    kvm_r::<kvm::kvm_pit_state2>(0x9f),
    kvm_w::<kvm::kvm_pit_state2>(0xa0),
    // The guest's clock.
    kvm_w::<kvm::kvm_clock_data>(0x7b),
    kvm_r::<kvm::kvm_clock_data>(0x7c),
];

/// `PAGEMAP_SCAN` on `/proc/self/pagemap`: which pages of the guest differ from its image.
pub const PAGEMAP_SCAN: u32 = number(READ | WRITE, b'f', 16, 96);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_kernels() {
        // Read off `linux/kvm.h` with a C compiler.
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(kvm_r::<kvm::kvm_regs>(0x81), 0x8090_ae81);
        assert_eq!(kvm_w::<kvm::kvm_sregs>(0x84), 0x4138_ae84);
        assert_eq!(kvm_wr::<kvm::kvm_msrs>(0x88), 0xc008_ae88);
        assert_eq!(kvm_r::<kvm::kvm_lapic_state>(0x8e), 0x8400_ae8e);
        assert_eq!(kvm_w::<kvm::kvm_cpuid2>(0x90), 0x4008_ae90);
        assert_eq!(kvm_r::<kvm::kvm_vcpu_events>(0x9f), 0x8040_ae9f);
        assert_eq!(kvm_w::<kvm::kvm_debugregs>(0xa2), 0x4080_aea2);
        assert_eq!(kvm_r::<kvm::kvm_xsave>(0xa4), 0x9000_aea4);
        assert_eq!(kvm_wr::<kvm::kvm_irqchip>(0x62), 0xc208_ae62);
        assert_eq!(kvm_r::<kvm::kvm_irqchip>(0x63), 0x8208_ae63);
        assert_eq!(kvm_r::<kvm::kvm_pit_state2>(0x9f), 0x8070_ae9f);
        assert_eq!(kvm_w::<kvm::kvm_clock_data>(0x7b), 0x4030_ae7b);
        assert_eq!(kvm_wr::<kvm::kvm_translation>(0x85), 0xc018_ae85);
        assert_eq!(kvm_w::<kvm::kvm_device_attr>(0xe1), 0x4018_aee1);
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
    }
}
