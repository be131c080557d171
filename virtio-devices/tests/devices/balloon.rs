//! The balloon behind its transport.

use std::sync::{Arc, Mutex, atomic::Ordering};

use virtio_devices::balloon::Balloon;
use vm_memory::GuestAddress;

use crate::rig::{BUFFERS, HIGH, HIGH_BYTES, LOW_BYTES, NEEDS_RESET, Rig, STATUS, memory, put};

type Discarded = Arc<Mutex<Vec<(u64, u64)>>>;

fn rig() -> (Rig, Discarded) {
    let discarded = Discarded::default();
    let into = discarded.clone();
    let discard = Box::new(move |address: GuestAddress, len| {
        into.lock().unwrap().push((address.0, len));
        if address.0 == 0 { Err(std::io::Error::other("not this one")) } else { Ok(()) }
    });
    (Rig::new(memory(), |watch| Box::new(Balloon::new(discard, watch).unwrap())), discarded)
}

fn list(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn pages_of_an_inflate_request_are_discarded_in_runs() {
    let (mut rig, discarded) = rig();
    let memory = rig.memory.clone();
    let mut rings = rig.start(16, 3);
    let high = (HIGH >> 12) as u32;
    put(&memory, BUFFERS, &list(&[20, 21, 22, 40, 39, 38, 0, high, high + 1]));
    rings[0].add(&memory, &[(BUFFERS, 20, false), (BUFFERS + 20, 16, false)]);
    rig.kick(&rings[0]);
    assert_eq!(rig.completion(&mut rings[0]).1, 0);
    assert_eq!(*discarded.lock().unwrap(), [(20 << 12, 3 << 12), (38 << 12, 3 << 12), (0, 1 << 12), (HIGH, 2 << 12)]);
    let counters = rig.transport.device_as::<Balloon>().unwrap().counters();
    assert_eq!((counters.discarded_bytes.load(Ordering::Relaxed), counters.failed_bytes.load(Ordering::Relaxed)), (8 << 12, 1 << 12));

    // Deflating needs nothing of the host.
    rings[1].add(&memory, &[(BUFFERS, 36, false)]);
    rig.kick(&rings[1]);
    rig.completion(&mut rings[1]);
    assert_eq!(discarded.lock().unwrap().len(), 4);
}

#[test]
fn reported_pages_are_discarded_whole() {
    let (mut rig, discarded) = rig();
    let memory = rig.memory.clone();
    let mut rings = rig.start(16, 3);
    rings[2].add(&memory, &[(0x20_0000, 0x20_0000, true), (0x60_0100, 0x2000, true), (0x70_0100, 0x200, true)]);
    rig.kick(&rings[2]);
    rig.completion(&mut rings[2]);
    assert_eq!(*discarded.lock().unwrap(), [(0x20_0000, 0x20_0000), (0x60_1000, 0x1000)]);
}

#[test]
fn a_guest_that_gives_back_single_pages_does_not_keep_the_event_loop() {
    let (mut rig, discarded) = rig();
    let memory = rig.memory.clone();
    let mut rings = rig.start(16, 3);
    rig.settle();
    let pages: Vec<u32> = (0..400).map(|page| 0x200 + page * 2).collect();
    put(&memory, BUFFERS, &list(&pages));
    for _ in 0..16 {
        rings[0].add(&memory, &[(BUFFERS, pages.len() as u32 * 4, false)]);
    }
    rig.transport.write(0x50, &0_u32.to_le_bytes());
    let mut turns = 0;
    while discarded.lock().unwrap().len() < 16 * pages.len() {
        let before = discarded.lock().unwrap().len();
        rig.turn(std::time::Duration::from_secs(60));
        let after = discarded.lock().unwrap().len();
        assert!(after - before <= 1200, "{} in one turn", after - before);
        turns += u32::from(after > before);
    }
    assert!(turns >= 5);
    for _ in 0..16 {
        rig.completion(&mut rings[0]);
    }
}

#[test]
fn a_page_that_the_guest_has_not_is_refused() {
    for page in [(LOW_BYTES >> 12) as u32, ((HIGH + HIGH_BYTES as u64) >> 12) as u32, u32::MAX] {
        let (mut rig, discarded) = rig();
        let memory = rig.memory.clone();
        let mut rings = rig.start(16, 3);
        put(&memory, BUFFERS, &list(&[page]));
        rings[0].add(&memory, &[(BUFFERS, 4, false)]);
        rig.kick(&rings[0]);
        rig.settle();
        assert_ne!(rig.read(STATUS) & NEEDS_RESET, 0);
        assert!(discarded.lock().unwrap().is_empty());
    }
}

#[test]
fn the_target_is_announced_and_lives_on() {
    let (mut rig, _) = rig();
    rig.start(16, 2);
    let generation = rig.read(0xfc);
    rig.transport.device_as::<Balloon>().unwrap().set_target(1000);
    assert_eq!(rig.read(0x60), 2);
    assert_ne!(rig.read(0xfc), generation, "the driver can tell that the configuration is another one");
    assert_eq!(rig.read(0xfc), rig.read(0xfc));
    assert_eq!(u32::from_le_bytes(rig.config(0)), 1000);
    rig.transport.write(0x104, &400_u32.to_le_bytes());
    rig.transport.write(0x100, &5_u32.to_le_bytes());
    let state = rig.transport.save();
    let (mut next, _) = self::rig();
    next.transport.restore(&state).unwrap();
    next.transport.resume();
    assert_eq!((u32::from_le_bytes(next.config(0)), u32::from_le_bytes(next.config(4))), (1000, 400));
    assert_eq!(next.line.read().unwrap(), 1, "the interrupt that nobody acknowledged is raised again");
}
