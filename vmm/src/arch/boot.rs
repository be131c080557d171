//! Puts a kernel into guest memory and a vCPU at its start (PVH: xen, docs/misc/pvh.pandoc; a 32-bit entry with paging off).

use std::io::Cursor;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::{
    Elf, KernelLoader,
    elf::{
        PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    arch::{acpi, kernel, layout},
    kvm::{Doing, KvmError, msr},
    memory::PAGE,
};

const START_MAGIC: u32 = 0x336e_c578;
/// Types of memory, as in ACPI's address map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_TABLES: u32 = 3;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be used.
    #[error("the kernel cannot be used: {0}")]
    Kernel(String),
    /// Something is too large.
    #[error("the guest's memory of {memory_bytes} bytes has no room for {what}")]
    NoRoom {
        /// What.
        what: &'static str,
        /// How much memory there is.
        memory_bytes: u64,
    },
    /// The kernel arguments are not what a kernel takes.
    #[error("the kernel arguments {0}")]
    Cmdline(String),
}

/// Where the boot processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Physical address.
    pub address: u64,
}

/// Loads kernel, initramfs, arguments, ACPI tables and PVH structures.
pub fn load(memory: &GuestMemoryMmap, memory_bytes: u64, kernel: &[u8], initramfs: &[u8], cmdline: &str, tables: &acpi::Machine) -> Result<Entry, BootError> {
    let no_room = |what| BootError::NoRoom { what, memory_bytes };
    let unpacked;
    let vmlinux = if kernel::is_elf(kernel) {
        kernel
    } else {
        unpacked = kernel::extract_vmlinux(kernel).map_err(|error| BootError::Kernel(error.to_string()))?;
        &unpacked
    };
    let loaded = Elf::load(memory, None, &mut Cursor::new(vmlinux), Some(GuestAddress(layout::HIGH_RAM))).map_err(|error| BootError::Kernel(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::Kernel("it has no PVH entry (CONFIG_PVH)".to_owned()));
    };

    // As high as it goes below the hole: the kernel unpacks upwards from where it is.
    let low_ram = memory_bytes.min(layout::HOLE);
    let initramfs_at = low_ram.checked_sub(initramfs.len() as u64).map(|at| at / PAGE * PAGE).filter(|at| *at > loaded.kernel_end).ok_or_else(|| no_room("kernel and initramfs"))?;
    memory.write_slice(initramfs, GuestAddress(initramfs_at)).map_err(|_| no_room("the initramfs"))?;

    if !cmdline.is_ascii() || cmdline.contains('\0') {
        return Err(BootError::Cmdline("hold something else than ASCII".to_owned()));
    }
    let most = layout::CMDLINE_BYTES - 1;
    if cmdline.len() > most {
        return Err(BootError::Cmdline(format!("have {} bytes; the kernel takes {most}", cmdline.len())));
    }
    let write = |bytes: &[u8], at: u64| memory.write_slice(bytes, GuestAddress(at)).map_err(|_| no_room("boot structures"));
    write(&[cmdline.as_bytes(), &[0]].concat(), layout::CMDLINE)?;

    write(&reset_code(), layout::RESET_VECTOR)?;
    let rsdp = acpi::write(memory, tables).ok_or_else(|| no_room("ACPI tables"))?;

    let modules = [hvm_modlist_entry { paddr: initramfs_at, size: initramfs.len() as u64, cmdline_paddr: 0, reserved: 0 }];
    let map = memory_map(memory_bytes);
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: layout::MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let put = |result: Result<(), vm_memory::GuestMemoryError>| result.map_err(|_| no_room("boot structures"));
    put(memory.write_obj(info, GuestAddress(layout::START_INFO)))?;
    put(memory.write_obj(modules[0], GuestAddress(layout::MODULES)))?;
    for (index, entry) in (0..).zip(map) {
        put(memory.write_obj(entry, GuestAddress(layout::MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64)))?;
    }
    Ok(Entry { address: entry.0 })
}

/// All the firmware that there is, in 16-bit code. With hardware-reduced ACPI, Linux restarts by EFI, which is not there, and then
/// by the BIOS: that is, by a jump to where a BIOS would be. Without code there, a vCPU would spin through zeros for ever.
fn reset_code() -> [u8; 9] {
    let [low, high] = layout::RESET.to_le_bytes();
    [
        0xb0, crate::devices::power::RESET_VALUE, // mov al, RESET_VALUE
        0xba, low, high,                          // mov dx, RESET
        0xee,                                     // out dx, al
        0xf4,                                     // hlt
        0xeb, 0xfd,                               // jmp to the hlt
    ]
}

fn memory_map(memory_bytes: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, end: u64, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, RAM),
        entry(layout::VMGENID, layout::VMGENID + PAGE, RESERVED),
        entry(layout::ACPI, layout::FIRMWARE, ACPI_TABLES),
        entry(layout::FIRMWARE, layout::HIGH_RAM, RESERVED),
        entry(layout::HIGH_RAM, memory_bytes.min(layout::HOLE), RAM),
    ];
    if let Some((address, bytes)) = layout::ram(memory_bytes).get(1) {
        map.push(entry(*address, address + bytes, RAM));
    }
    map
}

/// Gives a fresh vCPU its identity, and the boot processor its start. The others wait for the kernel to start them, which KVM
/// does by itself.
pub fn start(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2], entry: Option<Entry>) -> Result<(), KvmError> {
    let cpuid = CpuId::from_entries(cpuid).map_err(|_| KvmError::Lacks("a CPUID of sane length"))?;
    vcpu.set_cpuid2(&cpuid).doing("KVM_SET_CPUID2")?;
    let msrs = [
        // Fast string operations, which firmware turns on.
        kvm_msr_entry { index: msr::MISC_ENABLE, data: 1, ..Default::default() },
        // MTRRs on, memory is write-back: without it a kernel takes all memory for uncached.
        kvm_msr_entry { index: msr::MTRR_DEF_TYPE, data: 1 << 11 | 6, ..Default::default() },
    ];
    for entry in msrs {
        // MISC_ENABLE is Intel's; on AMD some kernels refuse it, and nothing is lost.
        let _ = msr::write(vcpu, &[entry]);
    }
    let Some(entry) = entry else { return Ok(()) };
    let mut sregs = vcpu.get_sregs().doing("KVM_GET_SREGS")?;
    // Flat 32-bit segments in the hidden registers; the kernel loads its own descriptor table before it loads a selector.
    let code = kvm_segment { base: 0, limit: u32::MAX, selector: 0x8, type_: 0xb, present: 1, dpl: 0, db: 1, s: 1, l: 0, g: 1, avl: 0, unusable: 0, padding: 0 };
    let data = kvm_segment { selector: 0x10, type_: 0x3, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: 0x18, limit: 0x67, type_: 0xb, s: 0, db: 0, g: 0, ..code };
    sregs.cr0 = 1 | 1 << 4; // PE, ET
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).doing("KVM_SET_SREGS")?;
    let regs = kvm_bindings::kvm_regs { rip: entry.address, rbx: layout::START_INFO, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).doing("KVM_SET_REGS")
}
