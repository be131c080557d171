//! Which model-specific registers are part of a guest.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::{Doing, KvmError};

/// `IA32_TIME_STAMP_COUNTER`.
pub const TSC: u32 = 0x10;
/// `IA32_MISC_ENABLE`.
pub const MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE`.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// `IA32_TSC_DEADLINE`.
pub const TSC_DEADLINE: u32 = 0x6e0;

/// What is saved if the host's KVM has it (`KVM_GET_MSR_INDEX_LIST`). An allow list, so that a register which a new kernel
/// adds to its list is looked at before it gets into snapshots. Left out on purpose: `IA32_APICBASE` (belongs to SREGS,
/// and its order with the local APIC matters), performance counters, machine check banks, VMX and SVM capabilities (not
/// shown to guests), `IA32_MCG_CTL` (writing it fails without machine check banks).
const SAVED: [RangeInclusive<u32>; 33] = [
    TSC..=TSC,
    0x3a..=0x3b,             // FEATURE_CONTROL, TSC_ADJUST
    0x48..=0x48,             // SPEC_CTRL
    0x8b..=0x8b,             // UCODE_REV
    0xe1..=0xe1,             // UMWAIT_CONTROL
    0x10a..=0x10a,           // ARCH_CAPABILITIES
    0x122..=0x122,           // TSX_CTRL
    0x140..=0x140,           // MISC_FEATURES_ENABLES
    0x174..=0x176,           // SYSENTER_*
    0x17a..=0x17a,           // MCG_STATUS
    MISC_ENABLE..=MISC_ENABLE,
    0x1c4..=0x1c5,           // XFD, XFD_ERR
    0x1d9..=0x1d9,           // DEBUGCTL
    0x200..=0x20f,           // MTRR_PHYS*
    0x250..=0x250,           // MTRR_FIX64K
    0x258..=0x259,           // MTRR_FIX16K
    0x268..=0x26f,           // MTRR_FIX4K
    0x277..=0x277,           // PAT
    MTRR_DEF_TYPE..=MTRR_DEF_TYPE,
    0x6a0..=0x6a0,           // U_CET
    0x6a2..=0x6a2,           // S_CET
    0x6a4..=0x6a8,           // PL0_SSP … INT_SSP_TAB
    TSC_DEADLINE..=TSC_DEADLINE,
    0xda0..=0xda0,           // XSS: without it XRSTORS in the guest faults
    0x4b56_4d00..=0x4b56_4dff, // all of KVM's own: clock, steal time, asynchronous page faults
    0xc000_0080..=0xc000_0084, // EFER, STAR, LSTAR, CSTAR, SFMASK
    0xc000_0100..=0xc000_0103, // FS, GS, KERNEL_GS base, TSC_AUX
    0xc000_0104..=0xc000_0104, // TSC_RATIO
    0xc001_0015..=0xc001_0015, // HWCR
    0xc001_0140..=0xc001_0141, // OSVW
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL
    0xc001_1029..=0xc001_1029, // DE_CFG
    0x11..=0x12,             // the first, deprecated numbers of KVM's clock
];

/// The registers to save on this host.
pub fn saved(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().doing("KVM_GET_MSR_INDEX_LIST")?;
    Ok(list.as_slice().iter().copied().filter(|index| SAVED.iter().any(|range| range.contains(index))).collect())
}

/// Reads registers; those that this vCPU does not have are left out (which ones depends on its CPUID).
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let chunk: Vec<kvm_msr_entry> = left.iter().take(KVM_MAX_MSR_ENTRIES).map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&chunk).expect("at most KVM_MAX_MSR_ENTRIES, which always fits");
        // The kernel stops at the first that it does not know, and says how many it read.
        let count = vcpu.get_msrs(&mut msrs).doing("KVM_GET_MSRS")?.min(chunk.len());
        read.extend_from_slice(&msrs.as_slice()[..count]);
        let skipped = usize::from(count < chunk.len());
        left = &left[count + skipped..];
    }
    Ok(read)
}

/// Writes registers; all of them, or it is an error that names the one.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for chunk in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let msrs = Msrs::from_entries(chunk).expect("at most KVM_MAX_MSR_ENTRIES, which always fits");
        let count = vcpu.set_msrs(&msrs).doing("KVM_SET_MSRS")?;
        if let Some(refused) = chunk.get(count) {
            let (index, data) = (refused.index, refused.data);
            return Err(KvmError::BadState(format!("this host's KVM does not take the value {data:#x} for the model-specific register {index:#x}")));
        }
    }
    Ok(())
}

/// Whether a register may be in a snapshot at all.
pub fn may_be_saved(index: u32) -> bool {
    SAVED.iter().any(|range| range.contains(&index))
}
