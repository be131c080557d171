//! The registers and the status machine.

use virtio_devices::{block::Block, rng::Rng};

use crate::rig::{FAILED, HIGH, HIGH_BYTES, LOW_BYTES, NEEDS_RESET, RUNNING, Rig, Ring, STATUS, memory};

fn rig() -> Rig {
    Rig::new(memory(), |watch| Box::new(Rng::new(watch).unwrap()))
}

#[test]
fn identity_and_what_is_not_there() {
    let mut rig = rig();
    assert_eq!([0, 4, 8].map(|offset| rig.read(offset)), [0x7472_6976, 2, 4]);
    assert_eq!(rig.offered() >> 32, 1);
    rig.write(0x14, 2);
    assert_eq!(rig.read(0x10), 0);
    for shm in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(rig.read(shm), u32::MAX);
    }
    // Other widths, odd offsets, beyond the window.
    for (offset, len) in [(0, 1), (0, 8), (2, 4), (0xffc, 8), (0x1000, 4), (u64::MAX, 4), (0x100, 0)] {
        let mut data = vec![0xaa; len];
        rig.transport.read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0));
        rig.transport.write(offset, &vec![0xff; len]);
    }
    assert_eq!(rig.read(STATUS), 0);
}

#[test]
fn steps_out_of_turn_are_ignored() {
    let mut rig = rig();
    for skipped in [2, 8, 4, 10, 14] {
        rig.write(STATUS, skipped);
        assert_eq!(rig.read(STATUS), 0);
    }
    rig.write(STATUS, 1);
    rig.write(0x20, 1 << 28);
    rig.write(STATUS, 3);
    rig.write(STATUS, 11);
    assert_eq!(rig.read(STATUS), 3, "features without VERSION_1 are refused");
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x24, 0);
    rig.write(0x20, 1 << 3);
    rig.write(STATUS, 11);
    assert_eq!(rig.read(STATUS), 3, "features that were not offered are refused");
    rig.write(0x20, 1 << 28);
    rig.write(STATUS, 11);
    assert_eq!(rig.read(STATUS), 11);
    rig.write(STATUS, 3);
    assert_eq!(rig.read(STATUS), 11, "only a reset clears bits");
    rig.write(STATUS, RUNNING | NEEDS_RESET);
    assert_eq!(rig.read(STATUS), RUNNING, "the driver cannot ask itself for a reset");
    rig.write(STATUS, RUNNING | FAILED);
    assert_eq!(rig.read(STATUS), RUNNING | FAILED);
    rig.write(STATUS, 0);
    assert_eq!(rig.read(STATUS), 0);
}

#[test]
fn a_queue_is_taken_only_when_it_is_its_turn_and_only_if_it_is_in_memory() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let ring = Ring::new(&memory, 0, 64, false);
    rig.set_up(&ring);
    assert_eq!(rig.read(0x44), 0, "nothing is set up before the features are agreed on");

    let offered = rig.offered();
    let end = HIGH + HIGH_BYTES as u64;
    let bad = [
        Ring { descriptors: LOW_BYTES as u64 - 512, ..ring.clone() },
        Ring { available: LOW_BYTES as u64, ..ring.clone() },
        Ring { used: end - 64, ..ring.clone() },
        Ring { used: u64::MAX - 3, ..ring.clone() },
        Ring { descriptors: 8, ..ring.clone() },
        Ring { available: 0x1001, ..ring.clone() },
        Ring { available: 0, ..ring.clone() },
        Ring { used: 0x1002, ..ring.clone() },
    ];
    for ring in bad {
        rig.negotiate(offered);
        rig.set_up(&ring);
        assert_eq!((rig.read(0x44), rig.read(STATUS)), (0, 11 | NEEDS_RESET), "{ring:?}");
        rig.write(STATUS, RUNNING | NEEDS_RESET);
        assert_eq!(rig.read(STATUS), 11 | NEEDS_RESET);
    }

    rig.negotiate(offered);
    rig.write(0x30, 1);
    assert_eq!((rig.read(0x34), rig.read(0x44)), (0, 0), "there is no second queue");
    rig.write(0x44, 1);
    rig.write(0x38, 8);
    rig.write(0x30, u32::MAX);
    assert_eq!((rig.read(0x34), rig.read(0x44)), (0, 0));
    rig.write(0x44, 1);
    rig.write(0x30, 0);
    for size in [0, 3, 65, 128, 65536 + 8] {
        rig.write(0x38, size);
    }
    rig.set_up(&ring);
    assert_eq!((rig.read(0x44), rig.read(STATUS)), (1, 11), "sizes that are none are ignored");
    rig.write(0x80, 0xdead_beef);
    rig.write(STATUS, RUNNING);
    assert_eq!(rig.read(STATUS), RUNNING);
    rig.write(0x44, 0);
    assert_eq!(rig.read(0x44), 1, "a queue that is in use stays as it is");
    rig.write(STATUS, 0);
    assert_eq!(rig.read(0x44), 0);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let mut ring = rig.start(8, 1).remove(0);
    ring.add(&memory, &[(0x1000, 8, true)]);
    rig.kick(&ring);
    rig.settle();
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 2);
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 1);
    assert_eq!(rig.read(0x60), 0);
    ring.add(&memory, &[(0x1000, 8, true)]);
    rig.kick(&ring);
    rig.settle();
    rig.write(STATUS, 0);
    assert_eq!(rig.read(0x60), 0, "a reset takes back what was raised");
}

#[test]
fn a_window_that_no_driver_has_touched_survives_a_restore() {
    let mut rig = rig();
    rig.write(STATUS, 1);
    rig.write(0x30, 99);
    let state = rig.transport.save();
    let mut next = self::rig();
    next.transport.restore(&state).unwrap();
    next.transport.resume();
    assert_eq!(next.read(STATUS), 1);
    let mut ring = next.start(8, 1).remove(0);
    ring.add(&next.memory, &[(0x1000, 8, true)]);
    next.kick(&ring);
    next.completion(&mut ring);
}

#[test]
fn a_state_that_cannot_be_is_refused_with_a_sentence() {
    let mut rig = rig();
    rig.start(8, 1);
    let state = rig.transport.save();
    let refuse = |state: &[u8]| self::rig().transport.restore(state).unwrap_err().to_string();
    for end in 0..state.len() {
        assert!(refuse(&state[..end]).starts_with("the saved state of the rng device cannot be used: it is malformed"));
    }
    assert!(refuse(&[&state[..], &[0]].concat()).ends_with("something follows it"));
    let mut other = Rig::new(memory(), |watch| Box::new(Block::new(4096, watch, || Ok(())).unwrap()));
    let why = other.transport.restore(&state).unwrap_err().to_string();
    assert_eq!(why, "the saved state of the block device cannot be used: it is that of a device of type 4, not 2");
    assert!(rig.transport.restore(&state).unwrap_err().to_string().ends_with("a driver uses the device already"));

    // Every byte of it changed: refused or taken, and then the device does no more than a driver could have made it do.
    for at in 0..state.len() {
        for bit in 0..8 {
            let mut wrong = state.clone();
            wrong[at] ^= 1 << bit;
            let mut next = self::rig();
            if next.transport.restore(&wrong).is_ok() {
                next.transport.resume();
                next.settle();
                next.transport.save();
            }
        }
    }
}
