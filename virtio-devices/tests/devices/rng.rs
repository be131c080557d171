//! The entropy device behind its transport.

use virtio_devices::rng::{MAX_REQUEST_BYTES, Rng};

use crate::rig::{BUFFERS, NEEDS_RESET, Rig, STATUS, get, memory};

fn rig() -> Rig {
    Rig::new(memory(), |watch| Box::new(Rng::new(watch).unwrap()))
}

#[test]
fn buffers_are_filled() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let mut ring = rig.start(8, 1).remove(0);
    ring.add(&memory, &[(BUFFERS, 100, true), (BUFFERS + 4096, 5000, true)]);
    rig.kick(&ring);
    assert_eq!(rig.completion(&mut ring).1, 5100);
    let (a, b) = (get(&memory, BUFFERS, 101), get(&memory, BUFFERS + 4096, 5001));
    // 64 zero bytes in a row are not random.
    assert!(a[..100].windows(64).chain(b[..5000].windows(64)).all(|part| part.iter().any(|&byte| byte != 0)));
    assert_eq!((a[100], b[5000]), (0, 0));
}

#[test]
fn a_greedy_request_gets_64_kib() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let mut ring = rig.start(8, 1).remove(0);
    ring.add(&memory, &[(BUFFERS, 4 << 20, true), (BUFFERS, 4 << 20, true)]);
    rig.kick(&ring);
    assert_eq!(u64::from(rig.completion(&mut ring).1), MAX_REQUEST_BYTES);
    assert_eq!(get(&memory, BUFFERS + MAX_REQUEST_BYTES, 4096), [0; 4096]);
}

#[test]
fn a_request_to_write_is_broken() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let mut ring = rig.start(8, 1).remove(0);
    ring.add(&memory, &[(BUFFERS, 100, false)]);
    rig.kick(&ring);
    rig.settle();
    assert_ne!(rig.read(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn what_waited_is_answered_after_a_restore() {
    let mut rig = rig();
    let memory = rig.memory.clone();
    let mut ring = rig.start(8, 1).remove(0);
    rig.transport.pause();
    ring.add(&memory, &[(BUFFERS, 16, true)]);
    rig.kick(&ring);
    rig.settle();
    let state = rig.transport.save();
    let mut next = Rig::new(memory, |watch| Box::new(Rng::new(watch).unwrap()));
    next.transport.restore(&state).unwrap();
    next.settle();
    assert_eq!(ring.used(&next.memory), None);
    next.transport.resume();
    assert_eq!(next.completion(&mut ring).1, 16);
}
