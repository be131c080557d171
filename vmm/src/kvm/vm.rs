//! The machine as KVM has it: memory slots, interrupt controllers, timer, event descriptors.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::layout,
    kvm::{Doing, KvmError, cpuid, msr},
    memory::GuestRam,
};

/// Linux 4.18 and later have all of these on x86; each is used without an alternative.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "kicks by eventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::ImmediateExit, "a way to stop a vCPU (KVM_CAP_IMMEDIATE_EXIT)"),
    (Cap::VcpuEvents, "the state of pending exceptions (KVM_CAP_VCPU_EVENTS)"),
    (Cap::AdjustClock, "the state of its clock (KVM_CAP_ADJUST_CLOCK)"),
];

/// What a host's KVM can do beyond what every host's can.
#[derive(Debug, Clone, Copy)]
pub struct Abilities {
    /// Bytes of a vCPU's XSAVE area; 4096 without `KVM_CAP_XSAVE2`.
    pub xsave_bytes: usize,
    /// Whether `KVM_GET_XSAVE2` is there.
    pub xsave2: bool,
    /// Whether a guest's TSC can tick at another rate than the host's.
    pub tsc_control: bool,
    /// Whether guests may be told that their local APIC has a TSC deadline timer.
    pub tsc_deadline: bool,
    /// Whether a pause can be told to the guest's clock.
    pub kvmclock_ctrl: bool,
}

/// The machine in the kernel. All vCPUs must be made before any state is set.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    abilities: Abilities,
    cpuid: Vec<kvm_bindings::kvm_cpuid_entry2>,
    msrs: Vec<u32>,
}

impl Vm {
    /// Makes a machine with memory and interrupt controllers but without vCPUs.
    pub fn new(kvm: OwnedFd, memory: &GuestRam) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned, and its ownership passes to `Kvm` here. If it is no `/dev/kvm`, its ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        if kvm.get_api_version() != 12 {
            return Err(KvmError::Lacks("the stable API, version 12 (is the descriptor /dev/kvm?)"));
        }
        for (cap, what) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(what));
            }
        }
        // `create_vm` of the crate tries again after EINTR, which KVM_CREATE_VM may give for any signal.
        let fd = kvm.create_vm().doing("KVM_CREATE_VM")?;
        let xsave2 = fd.check_extension_int(Cap::Xsave2);
        let abilities = Abilities {
            xsave_bytes: usize::try_from(xsave2).unwrap_or(0).max(4096),
            xsave2: xsave2 > 0,
            tsc_control: kvm.check_extension(Cap::TscControl),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
        };
        let cpuid = cpuid::supported(&kvm, &abilities)?;
        let msrs = msr::saved(&kvm)?;

        // Three pages for Intel's real mode emulation, and one for its page table there; any place without memory will do.
        fd.set_identity_map_address(layout::IDENTITY_MAP).doing("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.set_tss_address(layout::TSS as usize).doing("KVM_SET_TSS_ADDR")?;
        // The irqchip must be there before vCPUs, or they get no local APIC in the kernel; the PIT needs the irqchip.
        fd.create_irq_chip().doing("KVM_CREATE_IRQCHIP")?;
        // The speaker port (0x61) then answers in the kernel, too.
        fd.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).doing("KVM_CREATE_PIT2")?;
        let made = Self { fd, abilities, cpuid, msrs };
        made.set_memory(memory, 0)?;
        Ok(made)
    }

    /// Makes guest memory the machine's, with these flags for each region; again, to change the flags.
    pub fn set_memory(&self, memory: &GuestRam, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.memory().iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags,
            };
            // SAFETY: the address range is a mapping that lives as long as the guest memory does, whose owner (`Machine`) drops
            // this machine first; a guest may write anything to it, which is why it is only accessed by volatile access.
            unsafe { self.fd.set_user_memory_region(region) }.doing("KVM_SET_USER_MEMORY_REGION")?;
        }
        Ok(())
    }

    /// The ioctls of the machine.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// What this host's KVM can do.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// What a vCPU of this host may claim to be; without what differs between vCPUs.
    pub fn cpuid(&self) -> &[kvm_bindings::kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Model-specific registers that belong into a snapshot.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Writing to `line` raises interrupt `gsi` once (an edge).
    pub fn attach_interrupt(&self, line: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(line, gsi).doing("KVM_IRQFD")
    }

    /// A 32-bit write of `value` to `address` counts up `kick` without an exit.
    pub fn attach_kick(&self, kick: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd.register_ioevent(kick, &IoEventAddress::Mmio(address), value).doing("KVM_IOEVENTFD")
    }
}
