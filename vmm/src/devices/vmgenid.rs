//! The VMGenID: 128 random bits in a page of guest memory. A guest that finds other bits there than before knows that it is a
//! copy (Microsoft, "Virtual Machine Generation ID"; kernel: drivers/virt/vmgenid.c).

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::layout;

/// Writes new bits. The notice to the guest is [`crate::devices::power::EVENT_GENERATION`], after this.
pub fn renew(memory: &GuestMemoryMmap) -> io::Result<()> {
    let mut id = [0u8; 16];
    let filled = rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())?;
    // The kernel gives up to 256 bytes at once or not at all.
    debug_assert_eq!(filled, id.len());
    memory.write_slice(&id, GuestAddress(layout::VMGENID)).map_err(io::Error::other)
}
