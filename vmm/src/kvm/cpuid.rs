//! What a vCPU says it is.
//!
//! One package, one core per vCPU, one thread per core: the simplest machine that is true enough for every guest, whatever
//! the host looks like.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::kvm::{Doing, KvmError, vm::Abilities};

/// "KVMKVMKVM" and the paravirtual features follow here.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub const MONITOR: u32 = 1 << 3;
    pub const VMX: u32 = 1 << 5;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// Leaf 8000_0001, ECX.
mod leaf_ext1_ecx {
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const SVM: u32 = 1 << 2;
    pub const TOPOEXT: u32 = 1 << 22;
}

/// Everything that the host's KVM can show a guest, less what is not in our snapshots.
pub fn supported(kvm: &Kvm, abilities: &Abilities) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let found = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).doing("KVM_GET_SUPPORTED_CPUID")?;
    let mut entries = found.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                // Nested state is not saved, so there must be none. MONITOR/MWAIT would exit for ever.
                entry.ecx &= !(leaf1_ecx::MONITOR | leaf1_ecx::VMX | leaf1_ecx::TSC_DEADLINE);
                entry.ecx |= leaf1_ecx::HYPERVISOR;
                // KVM leaves the bit to us (kernel: Documentation/virt/kvm/api.rst, KVM_CAP_TSC_DEADLINE_TIMER). Without the
                // timer a guest calibrates its APIC against the PIT, which ours never looks at.
                if abilities.tsc_deadline {
                    entry.ecx |= leaf1_ecx::TSC_DEADLINE;
                }
            }
            // No performance counters: their registers are not saved.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // No SGX.
            0x12 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x7 if entry.index == 0 => {
                entry.ebx &= !(1 << 2);
                entry.ecx &= !(1 << 30);
            }
            0x8000_0001 => entry.ecx &= !(leaf_ext1_ecx::SVM | leaf_ext1_ecx::TOPOEXT | leaf_ext1_ecx::CMP_LEGACY),
            // SVM's own leaf, and memory encryption.
            0x8000_000a | 0x8000_001f => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    // AMD's extended topology goes with the TOPOEXT bit; without both, leaves 1 and 8000_0008 count.
    entries.retain(|entry| !matches!(entry.function, 0x8000_001d | 0x8000_001e | 0x1f | 0xb));
    if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        for index in 0..2 {
            entries.push(kvm_cpuid_entry2 { function: 0xb, index, flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..Default::default() });
        }
    }
    if !entries.iter().any(|entry| entry.function == KVM_FEATURES) {
        return Err(KvmError::Lacks("paravirtual features (CPUID leaf 4000_0001)"));
    }
    Ok(entries)
}

/// Adds what differs between vCPUs and what depends on their number.
pub fn of_vcpu(supported: &[kvm_cpuid_entry2], vcpu: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let (id, count) = (u32::from(vcpu), u32::from(vcpus));
    // Bits of an APIC id that number the cores.
    let core_bits = count.next_power_of_two().trailing_zeros();
    // "AuthenticAMD", "HygonGenuine": the first four letters are in EBX.
    let amd = supported.iter().any(|entry| entry.function == 0 && matches!(&entry.ebx.to_le_bytes(), b"Auth" | b"Hygo"));
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (1, _) => {
                // EBX: APIC id, logical processors, CLFLUSH size (kept), brand (kept).
                entry.ebx = (entry.ebx & 0x0000_ffff) | id << 24 | count.next_power_of_two() << 16;
                // HTT: "there is more than one logical processor in this package".
                entry.edx = (entry.edx & !(1 << 28)) | u32::from(count > 1) << 28;
            }
            // Intel's caches: cores in the package; first level caches are each core's own, the last level is shared.
            (4, _) if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { count.next_power_of_two() - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (count.next_power_of_two() - 1) << 26;
            }
            (0xb, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id),
            (0xb, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (core_bits, count, 1 | 2 << 8, id),
            // AMD: leaf 1 counts cores, not threads.
            (0x8000_0001, _) if amd => entry.ecx |= if count > 1 { leaf_ext1_ecx::CMP_LEGACY } else { 0 },
            // AMD: cores less one, and how many bits of the APIC id number them.
            (0x8000_0008, _) if amd => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (count - 1),
            _ => {}
        }
    }
    entries
}

/// Registers that hold feature bits: a guest that has seen one there may use it.
const FEATURES: [(u32, u32, [bool; 4]); 8] = [
    (0x1, 0, [false, false, true, true]),
    (0x6, 0, [true, false, false, false]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0008, 0, [false, true, false, false]),
];

/// Whether a guest that was saved with `saved` can go on where `here` is supported: the same vendor and model, and every
/// feature that it may have found is there.
pub fn check_host(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let leaf = |entries: &[kvm_cpuid_entry2], function, index| entries.iter().find(|entry| entry.function == function && entry.index == index).copied().unwrap_or_default();
    let vendor = |entries| {
        let entry = leaf(entries, 0, 0);
        [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes).concat()
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (vendor_saved, vendor_here) = (vendor(saved), vendor(here));
    let (model_saved, model_here) = (leaf(saved, 1, 0).eax, leaf(here, 1, 0).eax);
    if (&vendor_saved, model_saved) != (&vendor_here, model_here) {
        let (vendor_saved, vendor_here) = (text(vendor_saved), text(vendor_here));
        return Err(KvmError::BadState(format!(
            "the snapshot was taken on another processor ({vendor_saved} {model_saved:#x}) than this host's ({vendor_here} {model_here:#x}); restore it on a host with the same one"
        )));
    }
    for (function, index, registers) in FEATURES {
        let (before, now) = (leaf(saved, function, index), leaf(here, function, index));
        let pairs = [(before.eax, now.eax), (before.ebx, now.ebx), (before.ecx, now.ecx), (before.edx, now.edx)];
        for ((before, now), name) in pairs.into_iter().zip(["EAX", "EBX", "ECX", "EDX"]).zip(registers).filter_map(|(pair, counts)| counts.then_some(pair)) {
            // HTT and CMP_LEGACY are ours to set, by the number of vCPUs.
            let own = match (function, name) {
                (1, "EDX") => 1 << 28,
                (0x8000_0001, "ECX") => leaf_ext1_ecx::CMP_LEGACY,
                _ => 0,
            };
            let missing = before & !now & !own;
            if missing != 0 {
                return Err(KvmError::BadState(format!(
                    "the guest may use processor features that this host lacks (CPUID leaf {function:#x}.{index} {name}, bits {missing:#x}); restore it on a host that has them"
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn each_vcpu_knows_its_number_and_how_many_there_are() {
        let amd = entry(0, 0, [0xd, u32::from_le_bytes(*b"Auth"), 0, 0]);
        let supported = [entry(1, 0, [0x800f12, 0x0102_0800, 0, 1 << 28]), entry(0xb, 0, [9; 4]), entry(0xb, 1, [9; 4]), entry(0x8000_0008, 0, [0x3030, 0, 0x700f, 0]), amd];
        let third = of_vcpu(&supported, 2, 3);
        assert_eq!(third[0].ebx, 2 << 24 | 4 << 16 | 0x0800);
        assert_eq!(third[0].edx, 1 << 28);
        assert_eq!((third[2].eax, third[2].ebx, third[2].edx), (2, 3, 2));
        assert_eq!(third[3].ecx, 0x2002);
        let only = of_vcpu(&supported, 0, 1);
        assert_eq!((only[0].ebx, only[0].edx), (1 << 16 | 0x0800, 0));
    }

    #[test]
    fn another_processor_and_a_missing_feature_are_named() {
        let vendor = entry(0, 0, [0xd, 1, 2, 3]);
        let saved = [vendor, entry(1, 0, [7, 0, 0b111, 0])];
        assert!(check_host(&saved, &[vendor, entry(1, 0, [7, 0, 0b1111, 0])]).is_ok());
        let error = check_host(&saved, &[vendor, entry(1, 0, [7, 0, 0b101, 0])]).unwrap_err();
        assert!(error.is_bad_state() && error.to_string().contains("ECX, bits 0x2"), "{error}");
        assert!(check_host(&saved, &[vendor, entry(1, 0, [8, 0, 0b111, 0])]).unwrap_err().to_string().contains("another processor"));
    }
}
