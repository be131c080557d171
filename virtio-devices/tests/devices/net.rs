//! The network card behind its transport; a pair of packet sockets stands for the TAP.

use std::{os::fd::OwnedFd, sync::atomic::Ordering};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use virtio_devices::net::{HOST_HEADER_BYTES, Net};

use crate::rig::{BUFFERS, NEEDS_RESET, Rig, Ring, STATUS, get, memory, put};

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

fn rig() -> (Rig, OwnedFd) {
    let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    (Rig::new(memory(), |watch| Box::new(Net::new(tap, MAC, watch.clone()).unwrap())), wire)
}

/// Puts a frame on the wire with a header that must not reach the guest.
fn transmit(wire: &OwnedFd, frame: &[u8]) -> bool {
    send(wire, &[&[9; HOST_HEADER_BYTES][..], frame].concat(), SendFlags::empty()).is_ok()
}

fn receive(wire: &OwnedFd) -> Option<Vec<u8>> {
    let mut packet = vec![0; 70_000];
    let (len, _) = recv(wire, &mut packet[..], RecvFlags::empty()).ok()?;
    assert_eq!(packet[..HOST_HEADER_BYTES], [0; HOST_HEADER_BYTES], "no offload may be asked for");
    Some(packet[HOST_HEADER_BYTES..len].to_vec())
}

fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![number as u8; 60 + (number as usize * 37) % 1400];
    frame[..4].copy_from_slice(&number.to_le_bytes());
    frame
}

/// Gives the card a receive buffer of an MTU's size.
fn offer(ring: &mut Ring, rig: &Rig, slot: u64) -> u16 {
    ring.add(&rig.memory, &[(BUFFERS + slot * 2048, 12, true), (BUFFERS + slot * 2048 + 12, 1514, true)])
}

#[test]
fn frames_go_out_whole_and_without_the_drivers_header() {
    let (mut rig, wire) = rig();
    assert_eq!(rig.config::<6>(0), MAC);
    let memory = rig.memory.clone();
    let mut rings = rig.start(64, 2);
    for number in 0..200 {
        let frame = frame(number);
        put(&memory, BUFFERS, &[0xff; 12]);
        put(&memory, BUFFERS + 12, &frame);
        let cut = frame.len() as u32 / 2;
        rings[1].add(&memory, &[(BUFFERS, 12 + cut, false), (BUFFERS + 12 + u64::from(cut), frame.len() as u32 - cut, false)]);
        rig.kick(&rings[1]);
        assert_eq!(rig.completion(&mut rings[1]).1, 0);
        assert_eq!(receive(&wire), Some(frame));
    }
    let counters = rig.transport.device_as::<Net>().unwrap().counters();
    assert_eq!(counters.sent_bytes.load(Ordering::Relaxed), (0..200).map(|n| frame(n).len() as u64).sum::<u64>());
    // Longer than any frame: dropped, answered.
    rings[1].add(&memory, &[(BUFFERS, 80_000, false)]);
    rig.kick(&rings[1]);
    rig.completion(&mut rings[1]);
    assert_eq!((receive(&wire), counters.dropped_frames.load(Ordering::Relaxed)), (None, 1));
}

/// The most that one call of the device takes. Whoever ends it there must ask for the next kick all the same.
#[test]
fn after_a_queue_full_of_frames_the_driver_is_asked_to_kick_again() {
    let (mut rig, wire) = rig();
    let memory = rig.memory.clone();
    let features = rig.offered();
    let mut rings = rig.start_with(features, 256, 2);
    rig.settle();
    put(&memory, BUFFERS + 12, &frame(1));
    for _ in 0..256 {
        rings[1].add(&memory, &[(BUFFERS, 12 + 60, false)]);
    }
    rig.kick(&rings[1]);
    rig.settle();
    assert!(receive(&wire).is_some());
    // `avail_event`: a driver kicks for the request after this one (virtio 1.2 §2.7.10).
    let asked: u16 = u16::from_le_bytes(get(&memory, rings[1].used + 4 + 256 * 8, 2).try_into().unwrap());
    assert_eq!(asked, rings[1].available_index);
}

#[test]
fn frames_wait_on_the_wire_while_the_driver_has_no_buffers() {
    let (mut rig, wire) = rig();
    let mut rings = rig.start(16, 2);
    let (mut sent, mut received) = (0, 0);
    // As many as the wire holds, and nobody to take them: the event loop must come to rest.
    while transmit(&wire, &frame(sent)) {
        sent += 1;
    }
    assert!(sent > 20, "the wire holds only {sent} frames");
    rig.settle();
    while received < sent {
        for slot in 0..u64::from((sent - received).min(7)) {
            offer(&mut rings[0], &rig, slot);
        }
        rig.kick(&rings[0]);
        while rings[0].under_way() > 0 {
            let head = rig.completion(&mut rings[0]);
            let expected = frame(received);
            // Completions come in the order in which the buffers were offered, which is that of their slots.
            let slot = u64::from(received % 7);
            assert_eq!(head.1 as usize, 12 + expected.len());
            let got = get(&rig.memory, BUFFERS + slot * 2048, head.1 as usize);
            assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(got[12..], expected);
            received += 1;
        }
        rig.settle();
    }
    let counters = rig.transport.device_as::<Net>().unwrap().counters();
    assert_eq!(counters.received_bytes.load(Ordering::Relaxed), (0..sent).map(|n| frame(n).len() as u64).sum::<u64>());
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_its_buffer_used_for_the_next() {
    let (mut rig, wire) = rig();
    let mut rings = rig.start(16, 2);
    offer(&mut rings[0], &rig, 0);
    rig.kick(&rings[0]);
    assert!(transmit(&wire, &[1; 1515]) && transmit(&wire, &[2; 1514]));
    assert_eq!(rig.completion(&mut rings[0]).1, 12 + 1514);
    assert_eq!(get(&rig.memory, BUFFERS + 12, 4), [2; 4]);
}

#[test]
fn a_paused_card_takes_nothing_and_a_restored_one_goes_on() {
    let (mut rig, wire) = rig();
    let mut rings = rig.start(16, 2);
    offer(&mut rings[0], &rig, 0);
    rig.kick(&rings[0]);
    rig.settle();
    rig.transport.pause();
    assert!(transmit(&wire, &frame(1)));
    put(&rig.memory, BUFFERS + 8192, &[3; 100]);
    rings[1].add(&rig.memory, &[(BUFFERS + 8192, 100, false)]);
    rig.kick(&rings[1]);
    rig.settle();
    assert_eq!((rings[0].used(&rig.memory), receive(&wire)), (None, None));
    let state = rig.transport.save();

    let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    let mut next = Rig::new(rig.memory.clone(), |watch| Box::new(Net::new(tap, MAC, watch.clone()).unwrap()));
    next.transport.restore(&state).unwrap();
    assert!(transmit(&wire, &frame(2)));
    next.settle();
    assert_eq!((rings[0].used(&next.memory), receive(&wire)), (None, None));
    next.transport.resume();
    assert_eq!(next.completion(&mut rings[0]).1 as usize, 12 + frame(2).len());
    next.completion(&mut rings[1]);
    assert_eq!(receive(&wire), Some(vec![3; 88]));
}

#[test]
fn buffers_in_the_wrong_direction_are_broken() {
    for (queue, writable) in [(0, false), (1, true)] {
        let (mut rig, wire) = rig();
        let mut rings = rig.start(16, 2);
        assert!(transmit(&wire, &frame(0)));
        rings[queue].add(&rig.memory, &[(BUFFERS, 2000, writable)]);
        rig.kick(&rings[queue]);
        rig.settle();
        assert_ne!(rig.read(STATUS) & NEEDS_RESET, 0);
        assert!(transmit(&wire, &frame(0)));
        rig.settle();
    }
}

#[test]
fn a_wire_that_is_gone_does_not_keep_the_event_loop_awake_for_ever() {
    let (mut rig, wire) = rig();
    let mut rings = rig.start(16, 2);
    drop(wire);
    offer(&mut rings[0], &rig, 0);
    rig.kick(&rings[0]);
    for _ in 0..50 {
        rig.turn(std::time::Duration::ZERO);
    }
    rig.settle();
}
