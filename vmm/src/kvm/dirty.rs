//! KVM's own dirty log: the other way to learn which pages a guest has written.
//!
//! The memory difference is made from the process's page tables ([`crate::memory::difference`]), which need no logging and cost
//! the guest nothing. This is what remains if a host turns out to need it (vmm.md §8.4), and what tests hold the first way
//! against. It sees what vCPUs write, not what this process writes.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    kvm::{Doing, KvmError, vm::Vm},
    memory::GuestRam,
};

/// Starts the log; pages written before are not in it.
pub fn start(vm: &Vm, memory: &GuestRam) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.memory().iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
        };
        // SAFETY: as in `Vm::new`; only the flags of an existing slot change.
        unsafe { vm.fd().set_user_memory_region(region) }.doing("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

/// Pages written since the last call, as indices into the memory file. They count as clean afterwards.
pub fn take(vm: &Vm, memory: &GuestRam) -> Result<Vec<u64>, KvmError> {
    let (mut pages, mut first) = (Vec::new(), 0);
    for (slot, region) in (0..).zip(memory.memory().iter()) {
        let log = vm.fd().get_dirty_log(slot, region.len() as usize).doing("KVM_GET_DIRTY_LOG")?;
        for (word, bits) in (0..).zip(log) {
            pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + word * 64 + bit));
        }
        first += region.len() / vmm_protocol::memdiff::PAGE as u64;
    }
    Ok(pages)
}
