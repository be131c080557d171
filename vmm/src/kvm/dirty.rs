//! KVM's own dirty log: the other way to learn which pages a guest has written.
//!
//! Only tests use it, to hold the page tables against ([`crate::memory::dirty`]), which need no logging and cost the guest
//! nothing. It sees what vCPUs write, not what this process writes, so it could not replace them.

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    kvm::{Doing, KvmError, vm::Vm},
    memory::GuestRam,
};

/// Starts the log; pages written before are not in it.
pub fn start(vm: &Vm, memory: &GuestRam) -> Result<(), KvmError> {
    vm.set_memory(memory, KVM_MEM_LOG_DIRTY_PAGES)
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
