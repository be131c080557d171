//! A program of a hostile driver, read from the fuzzer's bytes and carried out on one device.

#![allow(missing_docs, reason = "a fuzz harness; the rig is that of the tests")]

#[path = "../../virtio-devices/tests/devices/rig.rs"]
pub mod rig;

pub mod channel;
pub mod devices;

use std::{fs::File, io::Read as _, time::Duration};

use rig::{BUFFERS, HIGH, HIGH_BYTES, LOW_BYTES, RINGS, RUNNING, Rig, Ring, STATUS};
use virtio_devices::device::Memory;
use vm_memory::{Bytes, GuestAddress};

/// The bytes that are left. What is beyond their end is zeros.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        // A slice never fails and answers what it has.
        let _ = self.0.read(&mut bytes);
        bytes
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = usize::from(self.u8()).min(most).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken.to_vec()
    }

    /// An address that is likely to mean something.
    pub fn address(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => self.u64(),
            1 => RINGS + u64::from(self.u16()),
            2 => [0, LOW_BYTES as u64 - 16, LOW_BYTES as u64, HIGH, HIGH + HIGH_BYTES as u64 - 1, u64::MAX][usize::from(self.u8() % 6)],
            _ => BUFFERS + u64::from(self.u16()),
        }
    }
}

/// What is special about one kind of device.
pub trait Subject {
    fn queues(&self) -> u32;
    /// A new one, over this memory.
    fn rig(&mut self, memory: Memory) -> Rig;
    /// An operation of its own.
    fn own(&mut self, rig: &mut Rig, rings: &mut [Ring], input: &mut Input<'_>);
    /// The device was saved and made again.
    fn moved(&mut self, _old: &mut Rig, _new: &mut Rig) {}
    /// A request of a driver that behaves; it must be completed on this queue, unless the device has nothing to complete.
    fn behave(&mut self, rig: &mut Rig, rings: &mut [Ring]) -> Option<usize>;
}

const REGISTERS: [u64; 20] =
    [0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc, 0x100, 0x104];

/// Carries out the program in `data`.
pub fn run(subject: &mut impl Subject, data: &[u8]) {
    let mut input = Input(data);
    let memory = rig::memory();
    let mut rig = subject.rig(memory.clone());
    let queues = subject.queues();
    let size = [16, 4, 64, 1][usize::from(input.u8() % 4)];
    let started = input.u8();
    let mut rings: Vec<_> = if started % 8 != 0 {
        let features = rig.offered() & if started & 16 != 0 { !(1 << 29) } else { !0 };
        rig.start_with(features, size, queues)
    } else {
        (0..queues).map(|index| Ring::new(&memory, index, size, false)).collect()
    };
    let mut steps = 0;
    while !input.is_empty() && steps < 400 {
        steps += 1;
        let queue = |byte: u8| usize::from(byte) % queues as usize;
        match input.u8() % 16 {
            0 => {
                let register = REGISTERS[usize::from(input.u8()) % REGISTERS.len()];
                let value = input.u32();
                rig.write(register, value);
            }
            1 => {
                let (offset, value, len) = (u64::from(input.u16()), input.u64(), usize::from(input.u8() % 9));
                rig.transport.write(offset, &value.to_le_bytes()[..len]);
            }
            2 => {
                let offset = u64::from(input.u16());
                let len = usize::from(input.u8() % 17);
                rig.transport.read(offset, &mut vec![0; len]);
            }
            3 => {
                let (address, bytes) = (RINGS + u64::from(input.u16()), input.bytes(64));
                let _ = memory.write_slice(&bytes, GuestAddress(address));
            }
            4 => {
                let (address, bytes) = (BUFFERS + u64::from(input.u16()), input.bytes(255));
                let _ = memory.write_slice(&bytes, GuestAddress(address));
            }
            5 | 6 => {
                let ring = &rings[queue(input.u8())];
                let (at, address) = (input.u8(), input.address());
                let len = if input.u8() % 4 == 0 { input.u32() } else { u32::from(input.u16() % 0x2000) };
                let (flags, next) = (u16::from(input.u8() % 9), u16::from(input.u8()));
                ring.describe(&memory, u16::from(at) % ring.size, address, len, flags, next % (ring.size + 1));
            }
            7 | 8 => {
                let ring = &mut rings[queue(input.u8())];
                let head = input.u8();
                ring.offer(&memory, if head == 255 { input.u16() } else { u16::from(head) % ring.size });
                rig.kick(ring);
            }
            9 => {
                let ring = &rings[queue(input.u8())];
                ring.publish(&memory, input.u16());
                rig.kick(ring);
            }
            10 => {
                rig.turn(Duration::ZERO);
            }
            11 => {
                rig.transport.pause();
                if input.u8() % 2 == 0 {
                    rig.turn(Duration::ZERO);
                }
                rig.transport.resume();
            }
            12 => {
                rig.transport.pause();
                let state = rig.transport.save();
                let mut next = subject.rig(memory.clone());
                next.transport.restore(&state).expect("what was saved can be restored");
                subject.moved(&mut rig, &mut next);
                next.transport.resume();
                rig = next;
            }
            _ => subject.own(&mut rig, &mut rings, &mut input),
        }
    }
    rig.settle();
    let mut rings = rig.start(16, queues);
    if let Some(queue) = subject.behave(&mut rig, &mut rings) {
        rig.completion(&mut rings[queue]);
    }
    rig.settle();
    assert_eq!(rig.read(STATUS), RUNNING, "a driver that behaves is served");
}

/// A file in memory.
pub fn file() -> File {
    rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("the fuzzer has descriptors to spare").into()
}
