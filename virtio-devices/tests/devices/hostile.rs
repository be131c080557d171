//! Drivers that do not mean well: whatever they do, no device panics or stays busy, and the next driver is served.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_devices::{balloon::Balloon, device::Memory, net::Net, rng::Rng};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    block,
    rig::{BUFFERS, CEILING, HIGH, HIGH_BYTES, INDIRECT, LOW_BYTES, NEEDS_RESET, NEXT, NOTIFY, RINGS, RUNNING, Rig, Ring, STATUS, WRITE, memory, put, write_descriptor},
};

#[derive(Debug, Clone, Copy)]
enum Kind {
    Block,
    Net,
    Rng,
    Balloon,
}

const KINDS: [Kind; 4] = [Kind::Block, Kind::Net, Kind::Rng, Kind::Balloon];

impl Kind {
    fn queues(self) -> u32 {
        match self {
            Self::Block | Self::Rng => 1,
            Self::Net => 2,
            Self::Balloon => 3,
        }
    }

    fn rig(self, memory: Memory) -> Rig {
        match self {
            Self::Block => {
                let mut rig = block::rig(memory);
                let base = tempfile::tempfile().unwrap();
                base.set_len(block::DISK_BYTES).unwrap();
                block::give_disk(&mut rig, &base, &tempfile::tempfile().unwrap());
                rig
            }
            Self::Net => Rig::new(memory, |watch| {
                let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
                for len in [10, 60, 1500, 9] {
                    rustix::net::send(&wire, &vec![1; len], rustix::net::SendFlags::empty()).unwrap();
                }
                // The other end stays open for as long as the process lives.
                std::mem::forget(wire);
                Box::new(Net::new(tap, [2; 6], watch.clone()).unwrap())
            }),
            Self::Rng => Rig::new(memory, |watch| Box::new(Rng::new(watch).unwrap())),
            Self::Balloon => {
                let discard = Box::new(|address: GuestAddress, len: u64| {
                    assert!(address.0.is_multiple_of(4096) && len.is_multiple_of(4096) && len > 0);
                    let end = address.0 + len;
                    assert!(end <= LOW_BYTES as u64 || (address.0 >= HIGH && end <= HIGH + HIGH_BYTES as u64));
                    Ok(())
                });
                Rig::new(memory, |watch| Box::new(Balloon::new(discard, watch).unwrap()))
            }
        }
    }
}

/// Comes to rest, and serves a driver that behaves.
fn is_whole(rig: &mut Rig, kind: Kind) {
    // The block worker may still be at it; what it does ends by itself.
    rig.settle();
    rig.write(STATUS, 0);
    assert_eq!(rig.read(STATUS), 0);
    let memory = rig.memory.clone();
    let mut rings = rig.start(16, kind.queues());
    let (queue, buffers) = match kind {
        Kind::Block => {
            put(&memory, BUFFERS, &[&4_u32.to_le_bytes()[..], &[0; 13]].concat());
            (0, vec![(BUFFERS, 16, false), (BUFFERS + 16, 1, true)])
        }
        Kind::Net => (1, vec![(BUFFERS, 72, false)]),
        Kind::Rng => (0, vec![(BUFFERS, 16, true)]),
        Kind::Balloon => {
            put(&memory, BUFFERS, &5_u32.to_le_bytes());
            (0, vec![(BUFFERS, 4, false)])
        }
    };
    rings[queue].add(&memory, &buffers);
    rig.kick(&rings[queue]);
    rig.completion(&mut rings[queue]);
    assert_eq!(rig.read(STATUS), RUNNING);
}

#[derive(Debug, Clone)]
enum Access {
    Read { offset: u64, len: usize },
    Write { offset: u64, value: u64, len: usize },
    Turn,
    PauseResume,
    SaveRestore,
}

fn access() -> impl Strategy<Value = Access> {
    let register = prop::sample::select(vec![
        0x14_u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xc0, 0xfc, 0x100, 0x104, 0x13c,
    ]);
    let value = prop_oneof![
        4 => 0..16_u64,
        2 => prop::sample::select(vec![1_u64, 3, 11, 15, 64, 128, 255, 256, 0xffff, 0xffff_ffff]),
        2 => prop::sample::select(vec![0x10_0000_u64, 0x10_4000, 0x10_6000, 0xff_f000, 0x100_0000, HIGH, HIGH + HIGH_BYTES as u64 - 16]),
        1 => any::<u64>(),
    ];
    prop_oneof![
        6 => (register.clone(), value).prop_map(|(offset, value)| Access::Write { offset, value, len: 4 }),
        1 => (0..0x1100_u64, any::<u64>(), 0..9_usize).prop_map(|(offset, value, len)| Access::Write { offset, value, len }),
        1 => register.prop_map(|offset| Access::Read { offset, len: 4 }),
        1 => (any::<u64>(), 0..9_usize).prop_map(|(offset, len)| Access::Read { offset, len }),
        1 => Just(Access::Turn),
        1 => Just(Access::PauseResume),
        1 => Just(Access::SaveRestore),
    ]
}

/// One descriptor, or nonsense in place of one.
#[derive(Debug, Clone, Copy)]
struct Wild {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn wild(size: u16) -> impl Strategy<Value = Wild> {
    let address = prop_oneof![
        4 => (0..0x8000_u64).prop_map(|offset| BUFFERS + offset),
        1 => (0..0x8000_u64).prop_map(|offset| RINGS + offset),
        1 => prop::sample::select(vec![0, LOW_BYTES as u64 - 16, LOW_BYTES as u64, HIGH - 1, HIGH, HIGH + HIGH_BYTES as u64 - 1, u64::MAX, u64::MAX - 15]),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![3 => prop::sample::select(vec![0_u32, 1, 4, 12, 16, 17, 32, 48, 512, 4096, 0x1_0000]), 1 => any::<u32>()];
    let flags = prop_oneof![4 => 0..4_u16, 2 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![4 => 0..size, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Wild { address, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn registers_at_random(kind in prop::sample::select(KINDS.to_vec()), accesses in prop::collection::vec(access(), 1..120), halfway in any::<bool>()) {
        let memory = memory();
        let mut rig = kind.rig(memory.clone());
        if halfway {
            rig.start(16, kind.queues());
        }
        for access in accesses {
            match access {
                Access::Read { offset, len } => rig.transport.read(offset, &mut vec![0; len]),
                Access::Write { offset, value, len } => rig.transport.write(offset, &value.to_le_bytes()[..len.min(8)]),
                Access::Turn => {
                    rig.turn(Duration::ZERO);
                }
                Access::PauseResume => {
                    rig.transport.pause();
                    rig.transport.resume();
                }
                Access::SaveRestore => {
                    rig.transport.pause();
                    let state = rig.transport.save();
                    let status = rig.read(STATUS);
                    let mut next = kind.rig(memory.clone());
                    next.transport.restore(&state).expect("what was saved can be restored");
                    prop_assert_eq!(next.read(STATUS), status);
                    next.transport.resume();
                    rig = next;
                }
            }
            let status = rig.read(STATUS);
            prop_assert!(status & 4 == 0 || status & 11 == 11, "DRIVER_OK without the steps before it");
        }
        is_whole(&mut rig, kind);
    }

    #[test]
    fn descriptors_at_random(
        kind in prop::sample::select(KINDS.to_vec()),
        table in prop::collection::vec(wild(16), 16),
        indirect in prop::collection::vec(wild(8), 8),
        headers in prop::collection::vec((0..16_u32, 0..0x5000_u64), 8),
        heads in prop::collection::vec(prop_oneof![8 => 0..16_u16, 1 => any::<u16>()], 1..20),
        jump in prop_oneof![6 => Just(None), 1 => any::<u16>().prop_map(Some)],
        pause in any::<bool>(),
    ) {
        let memory = memory();
        let mut rig = kind.rig(memory.clone());
        let mut rings = rig.start(16, kind.queues());
        for (at, (request, sector)) in headers.iter().enumerate() {
            put(&memory, BUFFERS + at as u64 * 0x1000, &[&request.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        }
        for (at, wild) in indirect.iter().enumerate() {
            write_descriptor(&memory, BUFFERS + 0x200 + at as u64 * 16, wild.address, wild.len, wild.flags, wild.next);
        }
        for ring in &mut rings {
            for (at, wild) in table.iter().enumerate() {
                // Some point at the table above.
                let (address, len) = if wild.flags & INDIRECT != 0 && wild.len < 64 { (BUFFERS + 0x200, 128) } else { (wild.address, wild.len) };
                ring.describe(&memory, at as u16, address, len, wild.flags, wild.next);
            }
            for &head in &heads {
                ring.offer(&memory, head);
            }
            if let Some(index) = jump {
                ring.publish(&memory, index);
            }
            rig.write(NOTIFY, ring.index);
        }
        if pause {
            rig.turn(Duration::ZERO);
            rig.transport.pause();
            let state = rig.transport.save();
            let mut next = kind.rig(memory.clone());
            next.transport.restore(&state).expect("what was saved can be restored");
            next.transport.resume();
            rig = next;
        }
        rig.settle();
        is_whole(&mut rig, kind);
    }
}

/// Sets up one ring of the block device and offers what `make` describes; the device must need a reset.
fn must_break(what: &str, make: impl Fn(&mut Ring, &Memory) -> u16) {
    let memory = memory();
    let mut rig = Kind::Block.rig(memory.clone());
    let mut ring = rig.start(16, 1).remove(0);
    put(&memory, BUFFERS, &[0; 4096]);
    let head = make(&mut ring, &memory);
    ring.offer(&memory, head);
    rig.kick(&ring);
    rig.until(what, |rig| rig.read(STATUS) & NEEDS_RESET != 0);
    let used: u16 = memory.read_obj(GuestAddress(ring.used + 2)).unwrap();
    assert_eq!(used, 0, "{what}: nothing may be completed");
    is_whole(&mut rig, Kind::Block);
}

#[test]
fn each_rule_of_the_ring_is_kept() {
    must_break("a head beyond the table", |_, _| 16);
    must_break("a link beyond the table", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 16, NEXT, 16);
        0
    });
    must_break("a loop", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 16, NEXT, 1);
        ring.describe(memory, 1, BUFFERS, 16, NEXT, 0);
        0
    });
    must_break("a loop of nothing", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 0, NEXT, 0);
        0
    });
    must_break("a readable buffer after a writable one", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 16, NEXT | WRITE, 1);
        ring.describe(memory, 1, BUFFERS, 16, 0, 0);
        0
    });
    for (address, len) in [(LOW_BYTES as u64 - 15, 16), (LOW_BYTES as u64, 1), (u64::MAX, 16), (HIGH + HIGH_BYTES as u64 - 1, 2), (0, u32::MAX)] {
        must_break("a buffer outside memory", |ring, memory| {
            ring.describe(memory, 0, BUFFERS, 16, NEXT, 1);
            ring.describe(memory, 1, address, len, NEXT | WRITE, 2);
            ring.describe(memory, 2, BUFFERS + 64, 1, WRITE, 0);
            0
        });
        must_break("a table outside memory", |ring, memory| {
            ring.describe(memory, 0, address, len.max(32) / 16 * 16, INDIRECT, 0);
            0
        });
    }
    for len in [0, 15, 17] {
        must_break("a table of no size", |ring, memory| {
            ring.describe(memory, 0, BUFFERS, len, INDIRECT, 0);
            0
        });
    }
    must_break("a table in a table", |ring, memory| {
        ring.describe(memory, 0, BUFFERS + 0x100, 32, INDIRECT, 0);
        write_descriptor(memory, BUFFERS + 0x100, BUFFERS + 0x200, 32, INDIRECT, 0);
        0
    });
    must_break("a table that goes on", |ring, memory| {
        ring.describe(memory, 0, BUFFERS + 0x100, 32, INDIRECT | NEXT, 1);
        0
    });
    must_break("a header that is too short", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 15, NEXT, 1);
        ring.describe(memory, 1, BUFFERS + 64, 1, WRITE, 0);
        0
    });
    must_break("no room for a status", |ring, memory| {
        ring.describe(memory, 0, BUFFERS, 16, NEXT, 1);
        ring.describe(memory, 1, BUFFERS + 64, 0, WRITE, 0);
        0
    });
}

#[test]
fn a_chain_has_1024_buffers_at_most() {
    for (buffers, broken) in [(1024, 0), (1025, NEEDS_RESET)] {
        let memory = memory();
        let mut rig = Kind::Rng.rig(memory.clone());
        let mut ring = rig.start(16, 1).remove(0);
        // No length or a byte, it is all the same.
        let parts: Vec<_> = (0..buffers).map(|at| (BUFFERS + at, (at % 2) as u32, true)).collect();
        ring.add_indirect(&memory, 0x40_0000, &parts);
        rig.kick(&ring);
        rig.settle();
        assert_eq!(rig.read(STATUS) & NEEDS_RESET, broken, "{buffers}");
        is_whole(&mut rig, Kind::Rng);
    }
}

/// A device may be saved between the moment its worker sees the broken rule and the moment the driver is told.
#[test]
fn a_broken_ring_is_still_broken_after_a_restore() {
    for turns in 0..4 {
        let memory = memory();
        let mut rig = Kind::Block.rig(memory.clone());
        let mut ring = rig.start(16, 1).remove(0);
        ring.offer(&memory, 16);
        rig.kick(&ring);
        for _ in 0..turns {
            rig.turn(Duration::from_millis(1));
        }
        rig.transport.pause();
        let state = rig.transport.save();
        let mut next = Kind::Block.rig(memory.clone());
        next.transport.restore(&state).unwrap();
        next.transport.resume();
        next.until("the device to need a reset", |rig| rig.read(STATUS) & NEEDS_RESET != 0);
        is_whole(&mut next, Kind::Block);
    }
}

#[test]
fn more_heads_than_places_are_noticed() {
    for kind in KINDS {
        let memory = memory();
        let mut rig = kind.rig(memory.clone());
        let rings = rig.start(16, kind.queues());
        rings[0].publish(&memory, 17);
        rig.kick(&rings[0]);
        rig.until("the device to need a reset", |rig| rig.read(STATUS) & NEEDS_RESET != 0);
        is_whole(&mut rig, kind);
    }
}

/// A guest that offers faster than the device takes must not keep the event loop, or a pause, waiting.
#[test]
fn a_guest_that_never_stops_does_not_starve_a_pause() {
    for kind in KINDS {
        let memory = memory();
        let mut rig = kind.rig(memory.clone());
        let mut rings = rig.start(16, kind.queues());
        put(&memory, BUFFERS, &[&4_u32.to_le_bytes()[..], &[0; 28]].concat());
        let queue = if matches!(kind, Kind::Net) { 1 } else { 0 };
        let ring = &mut rings[queue];
        match kind {
            Kind::Block => {
                ring.describe(&memory, 0, BUFFERS, 16, NEXT, 1);
                ring.describe(&memory, 1, BUFFERS + 0x1000, 1, WRITE, 0);
            }
            Kind::Rng => ring.describe(&memory, 0, BUFFERS, 64, WRITE, 0),
            Kind::Net | Kind::Balloon => ring.describe(&memory, 0, BUFFERS, 28, 0, 0),
        }
        for place in 0..16 {
            memory.write_obj(0_u16, GuestAddress(ring.available + 4 + place * 2)).unwrap();
        }
        let stop = std::sync::atomic::AtomicBool::new(false);
        let (available, used) = (ring.available, ring.used);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let used: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
                    memory.store(used.wrapping_add(16), GuestAddress(available + 2), Ordering::Release).unwrap();
                }
            });
            let served: u16 = 2000;
            let deadline = Instant::now() + CEILING;
            loop {
                rig.write(NOTIFY, queue as u32);
                rig.turn(Duration::from_millis(10));
                let used: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
                if used >= served || Instant::now() > deadline || rig.read(STATUS) != RUNNING {
                    break;
                }
            }
            let before = Instant::now();
            rig.transport.pause();
            let paused_for = before.elapsed();
            let at_pause: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
            rig.turn(Duration::from_millis(20));
            let later: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(rig.read(STATUS), RUNNING, "{kind:?}");
            assert!(at_pause >= served, "{kind:?} served {at_pause}");
            assert_eq!(at_pause, later, "{kind:?} went on while paused");
            assert!(paused_for < Duration::from_secs(5), "{kind:?} took {paused_for:?} to pause");
        });
    }
}
