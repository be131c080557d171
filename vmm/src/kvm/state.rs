//! The state of vCPUs and of the machine in the kernel: what is read at a save, what is set at a restore, and in which order.
//!
//! The orders are those of vmm.md §2.2 and §2.3; the reason of each step stands beside it. The numbers in errors are the
//! kernel's; the structures are KVM's own, kept as bytes.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, CpuId, Xsave, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_device_attr, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{
    Doing, KvmError,
    msr::{self, TSC, TSC_DEADLINE},
    vm::{Abilities, Vm},
};

/// A clock that differs by more than this can be told from the guest's (250 ppm, what NTP can slew: kernel, `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// One vCPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    /// The XSAVE area; as long as the host's was.
    pub(crate) xsave: Vec<u8>,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug_regs: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    /// 0: the host does not say.
    pub(crate) tsc_khz: u32,
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) events: kvm_vcpu_events,
}

/// The machine around the vCPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    pub(crate) pit: kvm_pit_state2,
    pub(crate) clock: kvm_clock_data,
    pub(crate) pic_master: kvm_irqchip,
    pub(crate) pic_slave: kvm_irqchip,
    pub(crate) ioapic: kvm_irqchip,
}

fn read_xsave(vcpu: &VcpuFd, abilities: &Abilities) -> Result<Vec<u8>, KvmError> {
    let words: Vec<u32> = if abilities.xsave2 {
        let mut xsave = Xsave::new(abilities.xsave_bytes.saturating_sub(4096).div_ceil(4)).map_err(|_| KvmError::BadState("the XSAVE area is too long".to_owned()))?;
        // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 of the machine says, and that is what was allocated: the
        // fixed 4096 bytes and the rest as extra words.
        unsafe { vcpu.get_xsave2(&mut xsave) }.doing("KVM_GET_XSAVE2")?;
        xsave.as_fam_struct_ref().xsave.region.iter().chain(xsave.as_slice()).copied().collect()
    } else {
        vcpu.get_xsave().doing("KVM_GET_XSAVE")?.region.to_vec()
    };
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

fn write_xsave(vcpu: &VcpuFd, abilities: &Abilities, bytes: &[u8]) -> Result<(), KvmError> {
    // The kernel reads as many bytes as this host has, whatever was saved: what a shorter area lacks is zero, "initial state".
    let words_here = abilities.xsave_bytes.div_ceil(4);
    if bytes.len() < 4096 || bytes.len().div_ceil(4) > words_here {
        return Err(KvmError::BadState(format!("the snapshot has {} bytes of extended processor state, and this host's area has {}", bytes.len(), abilities.xsave_bytes)));
    }
    let mut words = bytes.chunks(4).map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)));
    let mut xsave = Xsave::new(words_here - 1024).map_err(|_| KvmError::BadState("the XSAVE area is too long".to_owned()))?;
    {
        // SAFETY: the length of the flexible array, which is what must not change, is not touched.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        for (to, from) in fixed.xsave.region.iter_mut().zip(&mut words) {
            *to = from;
        }
    }
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(&mut words) {
        *to = from;
    }
    // SAFETY: the kernel reads `abilities.xsave_bytes`, which is what was allocated.
    unsafe { vcpu.set_xsave2(&xsave) }.doing("KVM_SET_XSAVE")
}

impl VcpuState {
    /// Reads a vCPU that does not run. `cpuid` is what it was given: what `KVM_GET_CPUID2` answers holds bits of the moment
    /// (OSXSAVE, APIC), and with a KVM in software features of the processor underneath.
    pub fn read(vcpu: &VcpuFd, vm: &Vm, cpuid: Vec<kvm_cpuid_entry2>) -> Result<Self, KvmError> {
        // First: reading it lets the local APIC take an INIT or SIPI that is pending, which changes registers.
        let mp_state = vcpu.get_mp_state().doing("KVM_GET_MP_STATE")?;
        let regs = vcpu.get_regs().doing("KVM_GET_REGS")?;
        let sregs = vcpu.get_sregs().doing("KVM_GET_SREGS")?;
        let xsave = read_xsave(vcpu, &vm.abilities())?;
        let xcrs = vcpu.get_xcrs().doing("KVM_GET_XCRS")?;
        let debug_regs = vcpu.get_debug_regs().doing("KVM_GET_DEBUGREGS")?;
        let lapic = vcpu.get_lapic().doing("KVM_GET_LAPIC")?;
        // A host with an unstable TSC does not say how fast it is; then nothing is compared at the restore either.
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let mut msrs = msr::read(vcpu, vm.msrs())?;
        // A deadline that passed while the vCPU was stopped reads as 0, "disarmed", though its interrupt may not have been
        // delivered yet. A deadline that is due at once costs a guest one spurious timer interrupt; a lost one hangs it.
        let tsc = msrs.iter().find(|entry| entry.index == TSC).map_or(0, |entry| entry.data);
        for entry in &mut msrs {
            if entry.index == TSC_DEADLINE && entry.data == 0 {
                entry.data = tsc;
            }
        }
        // Last: everything above may still turn what is pending into what is injected.
        let events = vcpu.get_vcpu_events().doing("KVM_GET_VCPU_EVENTS")?;
        Ok(Self { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, cpuid, msrs, events })
    }

    /// Makes a fresh vCPU this one. All vCPUs of the machine exist, and guest memory is in place.
    pub fn write(&self, vcpu: &VcpuFd, vm: &Vm) -> Result<(), KvmError> {
        let abilities = vm.abilities();
        self.match_tsc(vcpu, &abilities)?;
        // Before everything: what other registers may hold depends on it, since Linux 6.13 even which can be read.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| KvmError::BadState("the snapshot has too many CPUID entries".to_owned()))?;
        vcpu.set_cpuid2(&cpuid).doing("KVM_SET_CPUID2")?;
        // Whether the vCPU waits for SIPI, is halted or runs; the local APIC below must find it so.
        vcpu.set_mp_state(self.mp_state).doing("KVM_SET_MP_STATE")?;
        // Clears pending exceptions, so it comes long before the events.
        vcpu.set_regs(&self.regs).doing("KVM_SET_REGS")?;
        // Holds the base and mode of the local APIC, which decide how LAPIC below is understood.
        vcpu.set_sregs(&self.sregs).doing("KVM_SET_SREGS")?;
        write_xsave(vcpu, &abilities, &self.xsave)?;
        // A processor without XSAVE has none, and then the call is an error.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).doing("KVM_SET_XCRS")?;
        }
        vcpu.set_debug_regs(&self.debug_regs).doing("KVM_SET_DEBUGREGS")?;
        // Sets the timer's mode and clears its deadline: a deadline that was set before would be lost, and one that is set
        // while the timer is in another mode is silently ignored. So: after SREGS, before MSRs.
        vcpu.set_lapic(&self.lapic).doing("KVM_SET_LAPIC")?;
        let (deadline, others): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(|entry| entry.index == TSC_DEADLINE);
        if let Some(foreign) = others.iter().find(|entry| !msr::may_be_saved(entry.index)) {
            return Err(KvmError::BadState(format!("the snapshot sets the model-specific register {:#x}, which is not part of a guest", foreign.index)));
        }
        msr::write(vcpu, &others)?;
        // In a call of its own after the TSC: it is an instant on that clock.
        msr::write(vcpu, &deadline)?;
        // After SET_REGS (see there), and after everything that might inject.
        vcpu.set_vcpu_events(&self.events).doing("KVM_SET_VCPU_EVENTS")?;
        told_of_pause(vcpu, &abilities);
        Ok(())
    }

    fn match_tsc(&self, vcpu: &VcpuFd, abilities: &Abilities) -> Result<(), KvmError> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        let (saved, host) = (u64::from(self.tsc_khz), u64::from(here));
        if saved == 0 || host == 0 || saved.abs_diff(host) * 1_000_000 <= host * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !abilities.tsc_control {
            return Err(KvmError::BadState(format!(
                "the guest's clock ticks at {saved} kHz and this host's at {host} kHz, and its processor cannot scale it; restore it on a host with the same clock"
            )));
        }
        vcpu.set_tsc_khz(self.tsc_khz).doing("KVM_SET_TSC_KHZ")
    }
}

/// Tells the guest's clock that the vCPU was stopped, so that its watchdogs do not take the gap for a lock-up. To be called
/// before a vCPU goes on.
pub fn told_of_pause(vcpu: &VcpuFd, abilities: &Abilities) {
    if abilities.kvmclock_ctrl {
        // EINVAL: the guest does not use this clock, and then there is nothing to tell.
        let _ = vcpu.kvmclock_ctrl();
    }
}

/// An ioctl on an attribute of a vCPU. `value` is what is read or written: an eight-byte number.
fn tsc_attribute(vcpu: &VcpuFd, ioctl: u64, value: &mut u64) -> std::io::Result<()> {
    let attribute = kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr: (&raw mut *value) as u64, flags: 0 };
    // SAFETY: the descriptor is a vCPU's; the three ioctls read `attribute`, and at most read or write the eight bytes at its
    // `addr`, which is the length of this attribute. Both outlive the call and are borrowed for it.
    let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(vcpu), ioctl as _, &raw const attribute) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// `_IOW(KVMIO, 0xe1 …, struct kvm_device_attr)`; the crate has them for devices and, on another architecture, for vCPUs.
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;
/// See [`KVM_SET_DEVICE_ATTR`].
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_aee2;

/// Offset of this vCPU's TSC from the host's; `None` where KVM has no such attribute.
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    tsc_attribute(vcpu, KVM_GET_DEVICE_ATTR, &mut offset).ok()?;
    Some(offset)
}

/// Gives a vCPU the TSC offset of another, so that the guest's TSCs agree to the tick.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    tsc_attribute(vcpu, KVM_SET_DEVICE_ATTR, &mut offset).map_err(|source| KvmError::Ioctl { doing: "KVM_SET_DEVICE_ATTR", detail: ": the TSC offset".to_owned(), source })
}

impl VmState {
    /// Reads the machine, after its vCPUs.
    pub fn read(vm: &Vm) -> Result<Self, KvmError> {
        let pit = vm.fd().get_pit2().doing("KVM_GET_PIT2")?;
        let clock = vm.fd().get_clock().doing("KVM_GET_CLOCK")?;
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.fd().get_irqchip(&mut chip).doing("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        Ok(Self { pit, clock, pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?, pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?, ioapic: chip(KVM_IRQCHIP_IOAPIC)? })
    }

    /// Sets the machine, after its vCPUs.
    pub fn write(&self, vm: &Vm) -> Result<(), KvmError> {
        // Before the interrupt controllers: starting its timer may raise a line, whose saved state then wins.
        vm.fd().set_pit2(&self.pit).doing("KVM_SET_PIT2")?;
        let mut clock = self.clock;
        // With KVM_CLOCK_REALTIME, the kernel would add the time since the save to the guest's monotonic clock (Linux >= 5.16).
        // To the guest, no time passes while it sleeps; the agent sets its wall clock.
        clock.flags = 0;
        vm.fd().set_clock(&clock).doing("KVM_SET_CLOCK")?;
        // The order matters little, but the IOAPIC is last: setting it delivers what is pending in it to local APICs, which
        // are in place by now.
        for (chip, id) in [(&self.pic_master, KVM_IRQCHIP_PIC_MASTER), (&self.pic_slave, KVM_IRQCHIP_PIC_SLAVE), (&self.ioapic, KVM_IRQCHIP_IOAPIC)] {
            if chip.chip_id != id {
                return Err(KvmError::BadState("the snapshot's interrupt controllers are mixed up".to_owned()));
            }
            vm.fd().set_irqchip(chip).doing("KVM_SET_IRQCHIP")?;
        }
        Ok(())
    }
}
