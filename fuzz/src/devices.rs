//! The devices of a machine, one by one.

use std::{fs::File, os::fd::OwnedFd};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, socketpair};
use virtio_devices::{
    balloon::Balloon,
    block::{Block, layers::Disk},
    device::{VirtioDevice, Watch},
    net::Net,
    rng::Rng,
    vsock::Vsock,
};

/// How many kinds there are.
pub const SLOTS: usize = 5;
/// Of the disk.
pub const DISK_BYTES: u64 = 4096;

/// A device as it waits in its slot for a restore. The kinds have the slots of the VMM.
pub fn make(slot: usize, watch: &Watch) -> Box<dyn VirtioDevice> {
    match slot {
        0 => Box::new(Block::new(DISK_BYTES, watch, || Ok(())).unwrap()),
        1 => {
            let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
            // No name is needed: the kernel gives a free one.
            bind(&listener, &SocketAddrUnix::new_unnamed()).unwrap();
            listen(&listener, 1).unwrap();
            Box::new(Vsock::new(listener, watch.clone()).unwrap())
        }
        2 => Box::new(Rng::new(watch).unwrap()),
        3 => Box::new(Balloon::new(Box::new(|_, _| Ok(())), watch).unwrap()),
        _ => {
            let (tap, _): (OwnedFd, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
            Box::new(Net::new(tap, [2; 6], watch.clone()).unwrap())
        }
    }
}

/// An empty file of the disk's length.
pub fn disk_file() -> File {
    let file = crate::file();
    file.set_len(DISK_BYTES).unwrap();
    file
}

/// A disk for the device in slot 0.
pub fn disk() -> Disk {
    Disk::layered(disk_file(), Vec::new(), crate::file()).unwrap()
}

/// Restores the device in `slot` from `state`. What was taken must be saved and restored again alike.
pub fn restore(slot: usize, state: &[u8]) {
    use crate::rig::{self, Rig};
    let new = || {
        let mut rig = Rig::new(rig::memory(), |watch| make(slot, watch));
        if let Some(block) = rig.transport.device_as::<Block>() {
            block.set_disk(disk()).unwrap();
        }
        rig
    };
    let mut rig = new();
    if rig.transport.restore(state).is_ok() {
        let saved = rig.transport.save();
        rig.transport.resume();
        rig.settle();
        let mut again = new();
        again.transport.restore(&saved).expect("what was saved can be restored");
        assert_eq!(again.transport.save(), saved);
    }
}
