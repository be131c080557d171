//! The saved state of a device, which a snapshot file holds.
#![no_main]

use dormouse_fuzz::rig::{self, Rig};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use virtio_devices::{
    balloon::Balloon,
    block::Block,
    device::{VirtioDevice, Watch},
    rng::Rng,
    vsock::Vsock,
};

fn make(kind: u8, watch: &Watch) -> Box<dyn VirtioDevice> {
    match kind % 4 {
        0 => Box::new(Rng::new(watch).unwrap()),
        1 => Box::new(Balloon::new(Box::new(|_, _| Ok(())), watch).unwrap()),
        2 => Box::new(Block::new(4096, watch, || Ok(())).unwrap()),
        _ => {
            let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
            // No name is needed: the kernel gives a free one.
            bind(&listener, &SocketAddrUnix::new_unnamed()).unwrap();
            listen(&listener, 1).unwrap();
            Box::new(Vsock::new(listener, watch.clone()).unwrap())
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&kind, state)) = data.split_first() else { return };
    let mut rig = Rig::new(rig::memory(), |watch| make(kind, watch));
    if rig.transport.restore(state).is_ok() {
        let saved = rig.transport.save();
        rig.transport.resume();
        rig.settle();
        let mut again = Rig::new(rig::memory(), |watch| make(kind, watch));
        again.transport.restore(&saved).expect("what was saved can be restored");
        assert_eq!(again.transport.save(), saved);
    }
});
