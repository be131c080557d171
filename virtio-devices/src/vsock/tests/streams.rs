//! Connecting, bytes, ends, ceilings.

use super::*;
use crate::vsock::{
    clients::MAX_CLIENTS,
    muxer::{MAX_CONNECTIONS, MAX_ORPHANS},
    packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op},
};

#[test]
fn the_configuration_is_the_guest_s_cid_and_nothing_beyond() {
    let world = World::new();
    let mut data = [0xff; 12];
    world.device.read_config(0, &mut data);
    assert_eq!(data, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut data = [0xff; 4];
    world.device.read_config(u64::MAX - 1, &mut data);
    assert_eq!(data, [0; 4]);
    assert_eq!((world.device.kind(), world.device.name()), (VIRTIO_ID_VSOCK, "vsock"));
}

#[test]
fn a_client_connects_or_is_refused() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    client.write_all(b"hello");
    world.settle();
    assert_eq!(world.guest.sockets[&key].received, b"hello");
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(b"hi");
    world.settle();
    client.read_all();
    assert_eq!(client.heard, b"hi");
    assert_eq!(world.device.bytes(), StreamBytes { from_guest: 2, to_guest: 5 });

    let mut refused = world.dial(9);
    world.until("the refusal", |_| {
        refused.read_all();
        refused.ended
    });
    assert!(refused.heard.is_empty());
    let (_, other) = world.connect(1024);
    assert!(other.1 > key.1);
}

#[test]
fn a_client_that_came_before_the_driver_waits_for_it() {
    let mut world = World::new();
    let mut early = world.dial(1024);
    assert!(!world.turn());
    world.activate();
    world.until("OK", |_| early.ok().is_some());
}

#[test]
fn a_line_may_come_in_pieces_and_data_may_follow_at_once() {
    let mut world = World::running();
    let mut slow = world.mute();
    for piece in ["CON", "NECT 10", "24"] {
        slow.write_all(piece.as_bytes());
        world.settle();
        assert_eq!(world.device.muxer.thinking_clients(), 1);
    }
    slow.write_all(b"\nearly data");
    world.until("OK", |_| slow.ok().is_some());
    world.settle();
    assert_eq!(world.guest.sockets.values().next().unwrap().received, b"early data");
}

#[test]
fn what_is_no_line_is_refused() {
    let mut world = World::running();
    for line in ["HELLO\n", "CONNECT 99999999999\n", "CONNECT 00000000000000000000000001024\n"] {
        let mut client = world.mute();
        client.write_all(line.as_bytes());
        world.until("the refusal", |_| {
            client.read_all();
            client.ended
        });
    }
    assert!(world.guest.sockets.is_empty());
    assert_eq!(world.device.muxer.thinking_clients(), 0);
}

#[test]
fn thinking_clients_are_bounded_and_the_next_get_their_turn() {
    let mut world = World::running();
    let mut thinking: Vec<_> = (0..MAX_CLIENTS).map(|_| world.mute()).collect();
    world.settle();
    assert_eq!(world.device.muxer.thinking_clients(), MAX_CLIENTS);
    let mut next = world.dial(1024);
    world.settle();
    assert!(!next.read(1), "there is no room yet");
    // One decides, one leaves.
    thinking.pop().unwrap().write_all(b"CONNECT 9\n");
    drop(thinking.pop());
    world.until("OK", |_| next.ok().is_some());
}

#[test]
fn a_client_that_thinks_too_long_is_refused() {
    let mut world = World::running();
    let mut client = world.mute();
    client.write_all(b"CONN");
    world.settle();
    // The timer runs out unheard meanwhile; patience begins anew afterwards.
    world.device.pause();
    assert!(world.turn_within(LIMIT));
    world.device.resume();
    let since = Instant::now();
    world.until("the refusal", |_| {
        client.read_all();
        client.ended
    });
    assert!(since.elapsed() >= clients::CONNECT_LIMIT - Duration::from_millis(100));
    assert_eq!(world.device.muxer.thinking_clients(), 0);
}

#[test]
fn a_client_that_leaves_before_the_answer_is_reset_in_the_guest() {
    let mut world = World::running();
    let client = world.dial(1024);
    // The request is under way.
    for _ in 0..4 {
        world.turn();
    }
    drop(client);
    world.settle();
    assert!(world.guest.sockets.values().all(|socket| socket.dead) && !world.guest.resets_heard.is_empty());
    assert_eq!(world.device.muxer.connections().count(), 0);
}

#[test]
fn streams_are_bounded() {
    let mut world = World::running();
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(world.connect(1024));
    }
    let windows: usize = world.device.muxer.connections().map(|connection| connection.window() as usize).sum();
    assert!(windows <= 16 << 20, "{windows}");
    let mut refused = world.dial(1024);
    world.until("the refusal", |_| {
        refused.read_all();
        refused.ended
    });
    drop(clients.pop());
    world.settle();
    world.connect(1024);
}

/// Megabytes both ways at once.
fn echo(window_here: u32, window_there: u32, rx_payload: u32, queue_size: u16, total: usize) {
    let mut world = World::with_queues(queue_size);
    world.device.muxer.window = window_here;
    world.guest.window = window_there;
    world.guest.rx_payload = rx_payload;
    world.activate();
    let (mut client, key) = world.connect(1024);
    let mut written = 0;
    let mut echoed = 0;
    world.until("the echo", |world| {
        if written < total {
            let end = total.min(written + 10_000);
            written += client.write(&patterned(7, written..end));
        }
        let socket = world.guest.sockets.get_mut(&key).unwrap();
        let fresh = socket.received[echoed..].to_vec();
        socket.to_send.extend(&fresh);
        echoed += fresh.len();
        world.guest.read(key, usize::MAX);
        client.read_all();
        client.heard.len() == total
    });
    assert_pattern(7, &client.heard);
    assert_eq!(world.device.bytes(), StreamBytes { from_guest: total as u64, to_guest: total as u64 });
}

#[test]
fn megabytes_are_echoed_with_plenty_of_credit() {
    echo(WINDOW, 256 * 1024, 4096, 256, 8 << 20);
}

#[test]
fn megabytes_are_echoed_with_hardly_any_credit() {
    echo(1000, 777, 4096, 256, 2 << 20);
    echo(1, 1, 4096, 16, 2000);
}

#[test]
fn megabytes_are_echoed_through_tiny_queues_and_buffers() {
    echo(WINDOW, 256 * 1024, 100, 4, 1 << 20);
}

#[test]
fn credit_is_asked_for_once_while_the_guest_does_not_read() {
    let mut world = World::running();
    world.guest.window = 5000;
    let (mut client, key) = world.connect(1024);
    client.write_all(&patterned(1, 0..20_000));
    world.settle();
    let socket = &world.guest.sockets[&key];
    assert_eq!((socket.received.len(), socket.asked_for_credit), (5000, 1));
    world.guest.read(key, 1000);
    world.settle();
    let socket = &world.guest.sockets[&key];
    assert_eq!((socket.received.len(), socket.asked_for_credit), (6000, 2));
}

#[test]
fn the_guest_is_answered_when_it_asks_for_credit() {
    let mut world = World::running();
    let (_client, key) = world.connect(1024);
    let before = world.guest.rx.free.len();
    world.guest.say(key, op::CREDIT_REQUEST, 0);
    world.turn();
    assert!(world.handle_interrupt());
    assert_eq!(world.guest.rx.free.len(), before + 1);
}

#[test]
fn a_client_may_end_its_half() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    client.write_all(&patterned(3, 0..50_000));
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    world.settle();
    let socket = world.guest.sockets.get_mut(&key).unwrap();
    assert_eq!((socket.received.len(), socket.host_done), (50_000, SHUTDOWN_SEND));
    assert_pattern(3, &socket.received);
    // The other half goes on.
    socket.to_send.extend(patterned(4, 0..300_000));
    world.until("the answer", |_| {
        client.read_all();
        client.heard.len() == 300_000
    });
    assert_pattern(4, &client.heard);
    // And is ended by the guest.
    world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    world.settle();
    client.read_all();
    assert!(client.ended);
    assert_eq!(world.guest.resets_heard, [key]);
    assert_eq!(world.device.muxer.connections().count(), 0);
}

#[test]
fn the_guest_may_end_its_half() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(patterned(5, 0..200_000));
    world.until("sent", |world| world.guest.sockets[&key].to_send.is_empty());
    world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND);
    world.until("the end", |_| {
        client.read_all();
        client.ended
    });
    assert_eq!(client.heard.len(), 200_000);
    assert_pattern(5, &client.heard);
    // The other half goes on.
    client.write_all(&patterned(6, 0..100_000));
    world.settle();
    assert_pattern(6, &world.guest.sockets[&key].received);
    assert_eq!(world.guest.sockets[&key].received.len(), 100_000);
    drop(client);
    world.settle();
    assert_eq!(world.guest.sockets[&key].host_done, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    world.guest.say(key, op::RST, 0);
    world.settle();
    assert_eq!(world.device.muxer.connections().count(), 0);
}

#[test]
fn a_guest_that_reads_no_more_makes_the_client_s_writes_fail() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    world.guest.say(key, op::SHUTDOWN, SHUTDOWN_RECEIVE);
    world.settle();
    assert_eq!(client.stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(b"still here");
    world.settle();
    client.read_all();
    assert_eq!(client.heard, b"still here");
    // It leaves; nobody can read its end of file any more, and the guest hears of it all the same.
    drop(client);
    world.settle();
    assert_eq!(world.guest.sockets[&key].host_done, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
}

#[test]
fn a_client_that_reads_no_more_is_told_to_the_guest() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    client.stream.shutdown(std::net::Shutdown::Read).unwrap();
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(b"for nobody");
    world.settle();
    assert_eq!(world.guest.sockets[&key].host_done, SHUTDOWN_RECEIVE);
    client.write_all(b"still here");
    world.settle();
    assert_eq!(world.guest.sockets[&key].received, b"still here");
}

#[test]
fn a_client_that_closes_with_bytes_under_way_still_delivers_them() {
    let mut world = World::running();
    world.guest.window = 1000;
    let (mut client, key) = world.connect(1024);
    client.write_all(&patterned(8, 0..20_000));
    drop(client);
    world.until("everything", |world| {
        world.guest.read(key, usize::MAX);
        world.guest.sockets[&key].host_done == SHUTDOWN_SEND | SHUTDOWN_RECEIVE
    });
    let socket = &world.guest.sockets[&key];
    assert_eq!(socket.received.len(), 20_000);
    assert_pattern(8, &socket.received);
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_client() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    let total = 450_000;
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(patterned(9, 0..total));
    world.until("sent", |world| world.guest.sockets[&key].to_send.is_empty());
    assert!(world.device.muxer.connections().next().unwrap().backlog_bytes() > 0, "the socket holds less");
    world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    world.settle();
    assert_eq!(world.guest.resets_heard, [key]);
    world.until("everything", |_| {
        client.read(10_000);
        client.ended
    });
    assert_eq!(client.heard.len(), total);
    assert_pattern(9, &client.heard);
    assert_eq!(world.device.muxer.connections().count(), 0);
}

#[test]
fn a_slow_client_stalls_nobody_else() {
    let mut world = World::running();
    let (slow, slow_key) = world.connect(1024);
    let (mut quick, quick_key) = world.connect(1024);
    for key in [slow_key, quick_key] {
        world.guest.sockets.get_mut(&key).unwrap().to_send.extend(patterned(1, 0..4 << 20));
    }
    world.until("the quick one", |_| {
        quick.read_all();
        quick.heard.len() == 4 << 20
    });
    assert_pattern(1, &quick.heard);
    let held = world.device.muxer.connections().map(|connection| connection.backlog_bytes()).max().unwrap();
    assert!((1..=WINDOW as usize).contains(&held), "{held}");
    assert!(world.guest.sockets[&slow_key].to_send.len() > 3 << 20);
    drop(slow);
    world.until("the reset", |world| world.guest.sockets[&slow_key].host_done == SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
}

#[test]
fn a_guest_that_does_not_read_stalls_nobody_else() {
    let mut world = World::running();
    world.guest.window = 10_000;
    let (mut stalled, stalled_key) = world.connect(1024);
    let (mut other, other_key) = world.connect(1024);
    stalled.write(&patterned(1, 0..100_000));
    other.write_all(&patterned(2, 0..100_000));
    world.until("the other", |world| {
        world.guest.read(other_key, usize::MAX);
        world.guest.sockets[&other_key].received.len() == 100_000
    });
    assert_eq!(world.guest.sockets[&stalled_key].received.len(), 10_000);
}

#[test]
fn nothing_is_lost_while_the_guest_offers_no_buffers() {
    let mut world = World::new();
    let queues = world.guest.queues();
    world.activate_with(queues);
    let mut client = world.dial(1024);
    client.write_all(b"patience");
    while world.turn() {}
    assert!(world.guest.sockets.is_empty());
    world.guest.refill(1);
    world.until("OK", |_| client.ok().is_some());
    world.settle();
    assert_eq!(world.guest.sockets.values().next().unwrap().received, b"patience");
}

#[test]
fn streams_that_the_guest_asks_for_are_refused() {
    let mut world = World::running();
    world.guest.say((50_000, 80), op::REQUEST, 0);
    world.settle();
    assert_eq!(world.guest.resets_heard, [(50_000, 80)]);
    // A pair that exists is no better, and does not survive it.
    let (mut client, key) = world.connect(1024);
    world.guest.say(key, op::REQUEST, 0);
    world.settle();
    assert_eq!(world.guest.resets_heard[1..], [key]);
    client.read_all();
    assert!(client.ended);
}

#[test]
fn breaking_the_protocol_resets_that_stream_only() {
    let mut world = World::running();
    world.device.muxer.window = 1000;
    let (mut good, good_key) = world.connect(1024);
    type Wrong = fn(&mut World, Key);
    let wrong: [(&str, Wrong); 7] = [
        ("no such op", |world, key| world.guest.say(key, 99, 0)),
        ("op 0", |world, key| world.guest.say(key, 0, 0)),
        ("a second response", |world, key| world.guest.say(key, op::RESPONSE, 0)),
        ("more than its buffer", |world, key| {
            let header = Header { len: 5, ..raw(key, op::RW) };
            world.guest.send_raw(header, b"four".to_vec());
        }),
        ("more than any buffer", |world, key| {
            let header = Header { len: u32::MAX, ..raw(key, op::RW) };
            world.guest.send_raw(header, b"four".to_vec());
        }),
        ("more than the window", |world, key| {
            let header = Header { len: 1001, ..raw(key, op::RW) };
            world.guest.send_raw(header, vec![0; 1001]);
        }),
        ("data after the end", |world, key| {
            world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND);
            let header = Header { len: 1, ..raw(key, op::RW) };
            world.guest.send_raw(header, vec![0]);
        }),
    ];
    for (what, wrong) in wrong {
        let (mut client, key) = world.connect(1024);
        world.guest.resets_heard.clear();
        wrong(&mut world, key);
        world.settle();
        assert_eq!(world.guest.resets_heard, [key], "{what}");
        client.read_all();
        assert!(client.ended, "{what}");
    }
    good.write_all(b"unharmed");
    world.settle();
    assert_eq!(world.guest.sockets[&good_key].received, b"unharmed");
}

fn raw(key: Key, op: u16) -> Header {
    let (src_port, dst_port) = key;
    Header { src_cid: GUEST_CID, dst_cid: HOST_CID, src_port, dst_port, kind: STREAM, op, buf_alloc: 4096, ..Header::default() }
}

#[test]
fn who_lies_about_itself_is_ignored_and_who_is_not_there_is_reset() {
    let mut world = World::running();
    let (_client, key) = world.connect(1024);
    let lie = Header { src_cid: 4, ..raw(key, op::SHUTDOWN) };
    world.guest.send_raw(lie, Vec::new());
    world.settle();
    assert!(world.guest.resets_heard.is_empty());
    // The driver's check in `Guest::packet` is for answers of the host's own; these have to be read by hand.
    for wrong in [Header { dst_cid: 77, ..raw((5, 6), op::REQUEST) }, Header { kind: 2, ..raw((5, 6), op::REQUEST) }] {
        world.guest.send_raw(wrong, Vec::new());
        world.turn();
        let mut scratch = [0; HEADER_BYTES];
        let (slot, len) = world.guest.rx.take_used().unwrap();
        assert_eq!(len as usize, HEADER_BYTES);
        world.guest.rx.free.push(slot);
        vm_memory::Bytes::read_slice(&*world.guest.memory, &mut scratch, vm_memory::GuestAddress(0x10_0000 + 0x8000 * u64::from(slot))).unwrap();
        let answer = Header::parse(&scratch);
        assert_eq!((answer.op, answer.src_cid, answer.kind), (op::RST, wrong.dst_cid, wrong.kind));
        assert_eq!((answer.src_port, answer.dst_port), (6, 5));
    }
}

#[test]
fn resets_are_not_answered_and_unanswered_ones_are_bounded() {
    let mut world = World::new();
    let queues = world.guest.queues();
    world.activate_with(queues);
    world.guest.say((5, 6), op::RST, 0);
    while world.turn() {}
    assert!(world.device.muxer.orphans().is_empty());
    for port in 0..2 * MAX_ORPHANS as u32 {
        world.guest.say((port, 6), op::REQUEST, 0);
        world.turn();
        world.handle_interrupt();
    }
    assert_eq!(world.device.muxer.orphans().len(), MAX_ORPHANS);
    // And then everything goes on.
    world.settle();
    assert_eq!(world.guest.resets_heard.len(), 2 * MAX_ORPHANS);
}

#[test]
fn a_driver_s_reset_ends_every_stream() {
    let mut world = World::running();
    let (mut client, _) = world.connect(1024);
    let mut thinking = world.mute();
    world.settle();
    world.device.reset();
    for client in [&mut client, &mut thinking] {
        client.read_all();
        assert!(client.ended);
    }
    world.guest = Guest::new(256).with_event_idx(true);
    world.guest.listening.insert(1024);
    world.activate();
    world.connect(1024);
}

#[test]
fn a_broken_driver_stops_the_device_until_it_resets_it() {
    let mut world = World::running();
    let (mut client, _) = world.connect(1024);
    world.guest.tx.set_avail_index(20_000);
    assert!(!world.device.ready(TX as u32));
    client.read_all();
    assert!(client.ended);
    world.device.reset();
    world.guest = Guest::new(256).with_event_idx(true);
    world.guest.listening.insert(1024);
    world.activate();
    world.connect(1024);
}

#[test]
fn an_unanswered_request_gives_up() {
    let mut world = World::running();
    let mut client = world.dial(1024);
    // The guest never looks.
    let since = Instant::now();
    while !client.ended {
        world.turn_within(Duration::from_millis(50));
        client.read_all();
        assert!(since.elapsed() < LIMIT);
    }
    world.settle();
    assert!(world.guest.sockets.values().all(|socket| socket.dead) && !world.guest.resets_heard.is_empty());
    assert_eq!(world.device.muxer.connections().count(), 0);
}
