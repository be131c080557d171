//! The small devices, all of whose work is done in the event loop.
#![no_main]

use std::os::fd::OwnedFd;

use dormouse_fuzz::{
    Input, Subject,
    rig::{BUFFERS, HIGH, HIGH_BYTES, LOW_BYTES, Rig, Ring, put},
    run,
};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use virtio_devices::{balloon::Balloon, device::Memory, net::Net, rng::Rng};
use vm_memory::GuestAddress;

struct Small {
    kind: u8,
    wire: Option<OwnedFd>,
}

impl Subject for Small {
    fn queues(&self) -> u32 {
        [1, 3, 2][usize::from(self.kind)]
    }

    fn rig(&mut self, memory: Memory) -> Rig {
        match self.kind {
            0 => Rig::new(memory, |watch| Box::new(Rng::new(watch).unwrap())),
            1 => {
                let discard = Box::new(|address: GuestAddress, len: u64| {
                    assert!(address.0 % 4096 == 0 && len % 4096 == 0 && len > 0);
                    let end = address.0 + len;
                    assert!(end <= LOW_BYTES as u64 || (address.0 >= HIGH && end <= HIGH + HIGH_BYTES as u64));
                    Ok(())
                });
                Rig::new(memory, |watch| Box::new(Balloon::new(discard, watch).unwrap()))
            }
            _ => {
                let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
                self.wire = Some(wire);
                Rig::new(memory, |watch| Box::new(Net::new(tap, [2; 6], watch.clone()).unwrap()))
            }
        }
    }

    fn own(&mut self, rig: &mut Rig, _rings: &mut [Ring], input: &mut Input<'_>) {
        if let Some(wire) = &self.wire {
            match input.u8() % 8 {
                0 => {
                    while recv(wire, &mut [0_u8; 64], RecvFlags::empty()).is_ok_and(|(len, _)| len != 0) {}
                }
                1 => self.wire = None,
                _ => {
                    let frame = vec![1; usize::from(input.u16() % 3000)];
                    let _ = send(wire, &frame, SendFlags::NOSIGNAL);
                }
            }
        } else if let Some(balloon) = rig.transport.device_as::<Balloon>() {
            balloon.set_target(input.u32());
        }
    }

    fn behave(&mut self, rig: &mut Rig, rings: &mut [Ring]) -> Option<usize> {
        let (queue, buffer) = [(0, (BUFFERS, 16, true)), (0, (BUFFERS, 4, false)), (1, (BUFFERS, 72, false))][usize::from(self.kind)];
        put(&rig.memory, BUFFERS, &[0; 72]);
        rings[queue].add(&rig.memory, &[buffer]);
        rig.kick(&rings[queue]);
        Some(queue)
    }
}

fuzz_target!(|data: &[u8]| {
    if let Some((&kind, data)) = data.split_first() {
        run(&mut Small { kind: kind % 3, wire: None }, data);
    }
});
