//! The block device behind its transport.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Mutex, atomic::Ordering},
};

use virtio_devices::{
    block::{Block, layers::Disk},
    device::Memory,
};

use crate::rig::{BUFFERS, HIGH, NEEDS_RESET, RUNNING, Rig, Ring, STATUS, get, memory, put};

pub const DISK_BYTES: u64 = 8 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What is in a status byte before the device writes it.
const UNTOUCHED: u8 = 0xee;

pub fn rig(memory: Memory) -> Rig {
    Rig::new(memory, |watch| Box::new(Block::new(DISK_BYTES, watch, || Ok(())).unwrap()))
}

pub fn base() -> File {
    let base = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512) as u8 ^ (at / 4096 % 7) as u8).collect();
    base.write_all_at(&content, 0).unwrap();
    base
}

pub fn give_disk(rig: &mut Rig, base: &File, top: &File) {
    let disk = Disk::layered(base.try_clone().unwrap(), Vec::new(), top.try_clone().unwrap()).unwrap();
    block(rig).set_disk(disk).unwrap();
}

pub fn block(rig: &mut Rig) -> &mut Block {
    rig.transport.device_as().unwrap()
}

/// Where request `slot` has its buffers.
fn slot(slot: u64) -> u64 {
    BUFFERS + slot * 0x2_0000
}

/// Header at the slot, status at +16, data at +0x1000.
fn ask(ring: &mut Ring, memory: &Memory, at: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
    put(memory, at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[UNTOUCHED]].concat());
    let mut buffers = vec![(at, 16, false)];
    buffers.extend_from_slice(data);
    buffers.push((at + 16, 1, true));
    ring.add(memory, &buffers)
}

fn status(memory: &Memory, at: u64) -> u8 {
    get(memory, at + 16, 1)[0]
}

/// One request from beginning to end: its status and the length in the used ring.
fn run(rig: &mut Rig, ring: &mut Ring, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    let memory = rig.memory.clone();
    let head = ask(ring, &memory, slot(0), kind, sector, data);
    rig.kick(ring);
    let (done, len) = rig.completion(ring);
    assert_eq!(done, head);
    (status(&memory, slot(0)), len)
}

#[test]
fn reads_writes_and_the_rest() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    assert_eq!(u64::from_le_bytes(rig.config(0)), DISK_BYTES / 512);
    assert_eq!(u32::from_le_bytes(rig.config(12)), 254);
    let (base, top) = (base(), tempfile::tempfile().unwrap());
    give_disk(&mut rig, &base, &top);
    let mut ring = rig.start(256, 1).remove(0);
    let data = slot(0) + 0x1000;

    // Half a megabyte into the second region of memory, in odd pieces: more than goes at a time.
    let pieces = [(HIGH + 3, 1000, true), (data, 0, true), (HIGH + 0x1000, 0x8_0000 - 1000, true)];
    assert_eq!(run(&mut rig, &mut ring, IN, 1000, &pieces), (OK, 0x8_0001));
    let mut expected = vec![0; 0x8_0000];
    base.read_exact_at(&mut expected, 512_000).unwrap();
    assert!([get(&memory, HIGH + 3, 1000), get(&memory, HIGH + 0x1000, 0x8_0000 - 1000)].concat() == expected);

    put(&memory, data, &[0x5a; 1024]);
    assert_eq!(run(&mut rig, &mut ring, OUT, 1001, &[(data, 600, false), (data + 600, 424, false)]), (OK, 1));
    assert_eq!(run(&mut rig, &mut ring, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(run(&mut rig, &mut ring, IN, 1000, &[(data, 2048, true)]), (OK, 2049));
    expected[512..1536].fill(0x5a);
    assert_eq!(get(&memory, data, 2048), expected[..2048]);
    let mut below = [0; 1024];
    base.read_exact_at(&mut below, 1001 * 512).unwrap();
    assert_ne!(below, [0x5a; 1024], "the base is never written");

    assert_eq!(run(&mut rig, &mut ring, GET_ID, 0, &[(data, 20, true)]), (OK, 21));
    assert_eq!(get(&memory, data, 20), *b"dormouse\0\0\0\0\0\0\0\0\0\0\0\0");

    for (kind, flags) in [(WRITE_ZEROES, 0_u32), (WRITE_ZEROES, 1), (DISCARD, 0)] {
        put(&memory, data + 0x2000, &[0x77; 8192]);
        assert_eq!(run(&mut rig, &mut ring, OUT, 16, &[(data + 0x2000, 8192, false)]), (OK, 1));
        let ranges = [&16_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &flags.to_le_bytes(), &24_u64.to_le_bytes(), &8_u32.to_le_bytes(), &flags.to_le_bytes()];
        put(&memory, data, &ranges.concat());
        assert_eq!(run(&mut rig, &mut ring, kind, 0, &[(data, 32, false)]), (OK, 1));
        assert_eq!(run(&mut rig, &mut ring, IN, 16, &[(data, 8192, true)]), (OK, 8193));
        assert!(get(&memory, data, 8192).iter().all(|&byte| byte == 0));
    }

    let counters = block(&mut rig).counters();
    assert_eq!(counters.read_bytes.load(Ordering::Relaxed), 0x8_0000 + 2048 + 3 * 8192);
    assert_eq!(counters.written_bytes.load(Ordering::Relaxed), 1024 + 3 * 8192 + 8192);
    assert_eq!(rig.read(STATUS), RUNNING);
}

#[test]
fn a_request_that_makes_no_sense_is_answered_and_the_next_is_heard() {
    let mut rig = rig(memory());
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    let mut ring = rig.start(16, 1).remove(0);
    let data = slot(0) + 0x1000;
    let end = DISK_BYTES / 512;
    for (kind, sector, len) in [(IN, end, 512), (IN, end - 1, 1024), (IN, u64::MAX, 512), (IN, u64::MAX / 512, 512), (IN, 0, 511)] {
        assert_eq!(run(&mut rig, &mut ring, kind, sector, &[(data, len, true)]), (IOERR, 0));
    }
    for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (0, 513)] {
        assert_eq!(run(&mut rig, &mut ring, OUT, sector, &[(data, len, false)]), (IOERR, 0));
    }
    assert_eq!(run(&mut rig, &mut ring, 77, 0, &[]), (UNSUPP, 0));
    for (sector, sectors, flags, answer) in [(0, 1 << 22, 0, IOERR), (end, 1, 0, IOERR), (u64::MAX, 8, 0, IOERR), (0, 8, 1, UNSUPP), (0, 8, 2, UNSUPP)] {
        put(&rig.memory.clone(), data, &[&u64::to_le_bytes(sector)[..], &u32::to_le_bytes(sectors), &u32::to_le_bytes(flags)].concat());
        assert_eq!(run(&mut rig, &mut ring, DISCARD, 0, &[(data, 16, false)]), (answer, 0));
    }
    for len in [0, 15, 33 * 16] {
        assert_eq!(run(&mut rig, &mut ring, DISCARD, 0, &[(data, len, false)]), (IOERR, 0));
    }
    assert_eq!(run(&mut rig, &mut ring, IN, end - 1, &[(data, 512, true)]), (OK, 513));
    // A read of nothing is done, and so is one whose data have no room.
    assert_eq!(run(&mut rig, &mut ring, IN, 0, &[]), (OK, 1));
    assert_eq!(rig.read(STATUS), RUNNING);
}

#[test]
fn indirect_tables_work_and_one_longer_than_the_queue_too() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    let base = base();
    give_disk(&mut rig, &base, &tempfile::tempfile().unwrap());
    let mut ring = rig.start(16, 1).remove(0);
    put(&memory, slot(0), &[&IN.to_le_bytes()[..], &[0; 4], &3_u64.to_le_bytes(), &[UNTOUCHED]].concat());
    let mut buffers = vec![(slot(0), 16, false)];
    buffers.extend((0..64).map(|index| (slot(1) + index * 1024, 512, true)));
    buffers.push((slot(0) + 16, 1, true));
    ring.add_indirect(&memory, slot(3), &buffers);
    rig.kick(&ring);
    assert_eq!(rig.completion(&mut ring).1, 64 * 512 + 1);
    let mut expected = vec![0; 64 * 512];
    base.read_exact_at(&mut expected, 3 * 512).unwrap();
    let got: Vec<u8> = (0..64).flat_map(|index| get(&memory, slot(1) + index * 1024, 512)).collect();
    assert!(got == expected);
}

#[test]
fn requests_that_come_before_the_disk_wait_for_it() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    let mut ring = rig.start(256, 1).remove(0);
    ask(&mut ring, &memory, slot(0), FLUSH, 0, &[]);
    rig.kick(&ring);
    rig.settle();
    assert_eq!(ring.used(&memory), None);
    assert!(block(&mut rig).seal(None).is_err(), "nothing is sealed while the device runs");
    let small = tempfile::tempfile().unwrap();
    small.set_len(512).unwrap();
    let refused = block(&mut rig).set_disk(Disk::raw(small).unwrap()).unwrap_err();
    assert_eq!(refused.to_string(), format!("the disk has 512 bytes, and the device was prepared for {DISK_BYTES}"));
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    rig.completion(&mut ring);
    assert_eq!(status(&memory, slot(0)), OK);
}

#[test]
fn a_reset_forgets_what_was_asked_for_and_the_next_driver_is_served() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    let mut old = rig.start(256, 1).remove(0);
    ask(&mut old, &memory, slot(0), FLUSH, 0, &[]);
    rig.kick(&old);
    rig.settle();
    rig.write(STATUS, 0);
    let mut ring = rig.start(128, 1).remove(0);
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    assert_eq!(run(&mut rig, &mut ring, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(ring.used(&memory), None, "the old driver's request was completed");
}

#[test]
fn a_broken_ring_needs_a_reset_and_is_whole_after_it() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    let mut ring = rig.start(16, 1).remove(0);
    // A request without room for a status cannot be answered.
    put(&memory, slot(0), &[0; 16]);
    ring.add(&memory, &[(slot(0), 16, false)]);
    rig.kick(&ring);
    rig.until("the device to need a reset", |rig| rig.read(STATUS) & NEEDS_RESET != 0);
    assert_eq!(rig.read(0x60) & 2, 2, "the driver is told by a configuration interrupt");
    rig.kick(&ring);
    rig.settle();
    let mut ring = rig.start(16, 1).remove(0);
    assert_eq!(run(&mut rig, &mut ring, FLUSH, 0, &[]), (OK, 1));
}

/// Requests are under way all the time while the device is paused, saved and restored elsewhere, again and again: each is
/// completed exactly once, and what was written is there.
#[test]
fn requests_under_way_survive_a_restore_exactly_once() {
    let memory = memory();
    let (base, top) = (base(), tempfile::tempfile().unwrap());
    let mut rig = rig(memory.clone());
    give_disk(&mut rig, &base, &top);
    let mut ring = rig.start(64, 1).remove(0);
    let mut sealed: Vec<(File, File)> = Vec::new();
    let mut top = top;
    let slots = 16;
    let mut writes = 0_u64;
    let done = Mutex::new(vec![0_u32; slots as usize]);
    let mut by_head = std::collections::HashMap::new();
    for round in 0..12_u64 {
        for at in 0..slots {
            let data = slot(at) + 0x1000;
            put(&memory, data, &[(round + 1) as u8; 0x1_0000]);
            let head = ask(&mut ring, &memory, slot(at), OUT, at * 1024, &[(data, 0x1_0000, false)]);
            assert!(by_head.insert(head, at).is_none());
            writes += 1;
        }
        rig.kick(&ring);
        // Some rounds are caught before the worker has begun, some in the middle.
        for _ in 0..round % 4 {
            rig.turn(std::time::Duration::from_millis(1));
        }
        rig.transport.pause();
        let seen = ring.clone().used(&memory);
        let state = rig.transport.save();
        let map = tempfile::tempfile().unwrap();
        block(&mut rig).seal(Some(&map)).unwrap();
        assert_eq!(ring.clone().used(&memory), seen, "a paused device does not touch its queue");

        // The saved machine goes on in another process.
        sealed.push((top, map));
        top = tempfile::tempfile().unwrap();
        let mut next = self::rig(memory.clone());
        next.transport.restore(&state).unwrap();
        let again = |(data, map): &(File, File)| (data.try_clone().unwrap(), map.try_clone().unwrap());
        let disk = Disk::layered(base.try_clone().unwrap(), sealed.iter().map(again).collect(), top.try_clone().unwrap()).unwrap();
        block(&mut next).set_disk(disk).unwrap();
        next.settle();
        assert_eq!(ring.clone().used(&memory), seen, "a restored device waits until it is resumed");
        assert_eq!(next.transport.save(), state, "saved again at once it is the same");
        next.transport.resume();
        rig = next;
        while ring.under_way() > 0 {
            let (head, len) = rig.completion(&mut ring);
            let at = by_head.remove(&head).expect("it was asked for once and not answered yet");
            assert_eq!((status(&memory, slot(at)), len), (OK, 1));
            done.lock().unwrap()[at as usize] += 1;
        }
    }
    assert_eq!(done.lock().unwrap().iter().map(|&n| u64::from(n)).sum::<u64>(), writes);
    for at in 0..slots {
        assert_eq!(run(&mut rig, &mut ring, IN, at * 1024, &[(slot(0) + 0x1000, 0x1_0000, true)]), (OK, 0x1_0001));
        assert!(get(&memory, slot(0) + 0x1000, 0x1_0000).iter().all(|&byte| byte == 12), "the last write to slot {at}");
    }
}

#[test]
fn a_pause_that_is_taken_back_leaves_no_trace() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    let mut ring = rig.start(64, 1).remove(0);
    for round in 0..20 {
        for at in 0..8 {
            ask(&mut ring, &memory, slot(at), IN, at, &[(slot(at) + 0x1000, 0x1_0000, true)]);
        }
        rig.kick(&ring);
        if round % 2 == 0 {
            rig.settle();
        }
        rig.transport.pause();
        rig.settle();
        rig.transport.resume();
        for _ in 0..8 {
            rig.completion(&mut ring);
        }
        assert_eq!(ring.under_way(), 0);
    }
}

/// A request of many pieces is stopped between two of them, goes back into the queue and is done from the beginning later.
#[test]
fn a_long_request_is_abandoned_by_a_pause_and_completed_once() {
    let memory = memory();
    let mut rig = rig(memory.clone());
    give_disk(&mut rig, &base(), &tempfile::tempfile().unwrap());
    let mut ring = rig.start(64, 1).remove(0);
    let (long, mut interrupted) = (4 << 20, 0);
    for round in 0..40_u8 {
        put(&memory, HIGH, &vec![round; long as usize]);
        ask(&mut ring, &memory, slot(0), OUT, 0, &[(HIGH, long, false)]);
        rig.kick(&ring);
        rig.settle();
        for _ in 0..3 {
            rig.transport.pause();
            if ring.under_way() == 1 && ring.clone().used(&memory).is_none() {
                interrupted += 1;
            }
            rig.transport.resume();
            rig.settle();
        }
        assert_eq!(rig.completion(&mut ring).1, 1);
        assert_eq!(status(&memory, slot(0)), OK);
        put(&memory, HIGH, &vec![0xff; long as usize]);
        assert_eq!(run(&mut rig, &mut ring, IN, 0, &[(HIGH, long, true)]), (OK, long + 1));
        assert!(get(&memory, HIGH, long as usize).iter().all(|&byte| byte == round));
        assert_eq!(ring.used(&memory), None);
    }
    assert!(interrupted > 0, "no pause came in the middle of a request");
    let written = block(&mut rig).counters().written_bytes.load(Ordering::Relaxed);
    assert_eq!(written, 40 * u64::from(long), "a request counts once");
}
