//! Streams outlive their machine: to the byte, at any instant.

use proptest::prelude::*;

use super::*;
use crate::vsock::{
    muxer::HOST_PORTS,
    packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op},
};

#[test]
fn a_stream_goes_on_in_another_process() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    let (queues, state, streams) = world.fall_asleep();
    assert_eq!(streams.iter().map(|it| (it.guest_port, it.host_port)).collect::<Vec<_>>(), [key]);
    client.write_all(b"while you slept");
    world.wake_up(queues, &state, streams.into_iter().map(|it| (it.guest_port, it.host_port, it.socket)).collect());
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(b"good morning");
    world.settle();
    client.read_all();
    assert_eq!(client.heard, b"good morning");
    assert_eq!(world.guest.sockets[&key].received, b"while you slept");
    // New ones do not take the number of an old one.
    let (_, next) = world.connect(1024);
    assert_eq!(next.1, key.1 + 1);
    assert!(world.guest.resets_heard.is_empty());
}

#[test]
fn what_many_slow_clients_have_not_taken_can_be_loaded_again() {
    let mut world = World::running();
    let clients: Vec<_> = (0..24).map(|_| world.connect(1024)).collect();
    for (_, key) in &clients {
        world.guest.sockets.get_mut(key).unwrap().to_send.extend(patterned(1, 0..1 << 20));
    }
    world.settle();
    let (_, state, _) = world.fall_asleep();
    assert!(state.len() > 5 << 20, "{} bytes show nothing", state.len());
    assert!(state.len() + 4096 < crate::transport::MAX_STATE_BYTES);
}

#[test]
fn a_suspend_that_is_taken_back_changes_nothing() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    let mut thinking = world.mute();
    world.settle();
    world.device.pause();
    let streams = world.device.take_streams().unwrap();
    world.device.save();
    client.write_all(b"still there?");
    thinking.write_all(b"CONNECT 1024\n");
    // Edges that come now are lost.
    assert!(world.turn());
    world.device.resume();
    drop(streams);
    world.until("OK", |_| thinking.ok().is_some());
    world.settle();
    assert_eq!(world.guest.sockets[&key].received, b"still there?");
    world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    world.settle();
    client.read_all();
    assert!(client.ended);
}

#[test]
fn a_closed_stream_is_closed_even_if_a_duplicate_lies_somewhere() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    world.device.pause();
    let _forgotten = world.device.take_streams().unwrap();
    world.device.resume();
    world.guest.say(key, op::RST, 0);
    world.settle();
    client.read_all();
    assert!(client.ended);
}

#[test]
fn lost_streams_are_reset_each_by_itself() {
    let mut world = World::running();
    let (mut kept, kept_key) = world.connect(1024);
    let (mut lost, lost_key) = world.connect(1024);
    world.guest.sockets.get_mut(&lost_key).unwrap().to_send.extend(patterned(1, 0..1 << 20));
    world.settle();
    lost.write_all(b"never read");
    world.park(|stream| stream.host_port == kept_key.1);
    world.settle();
    assert_eq!(world.guest.resets_heard, [lost_key]);
    lost.read_all();
    assert!(lost.ended);
    kept.write_all(b"goes on");
    world.settle();
    assert_eq!(world.guest.sockets[&kept_key].received, b"goes on");
    // None kept: no other way.
    world.park(|_| false);
    world.settle();
    assert_eq!(world.guest.resets_heard, [lost_key, kept_key]);
    assert_eq!(world.device.muxer.connections().count(), 0);
    world.connect(1024);
}

#[test]
fn of_a_hundred_streams_those_that_are_handed_over_go_on_and_the_rest_is_reset() {
    let mut world = World::running();
    let mut clients: Vec<_> = (0..100).map(|_| world.connect(1024)).collect();
    let first_lost = clients[60].1.1;
    world.park(|stream| stream.host_port < first_lost);
    world.settle();
    assert_eq!(world.guest.resets_heard, clients[60..].iter().map(|(_, key)| *key).collect::<Vec<_>>());
    assert_eq!(world.device.muxer.connections().count(), 60);
    for (client, _) in &mut clients[..60] {
        client.write_all(b"still here");
    }
    world.settle();
    for (_, key) in &clients[..60] {
        assert_eq!(world.guest.sockets[key].received, b"still here");
    }
    for (client, _) in &mut clients[60..] {
        client.read_all();
        assert!(client.ended);
    }
}

#[test]
fn resets_wait_through_a_sleep_for_room_in_the_queue() {
    let mut world = World::new();
    let queues = world.guest.queues();
    world.activate_with(queues);
    world.guest.say((7, 8), op::REQUEST, 0);
    while world.turn() {}
    world.park(|_| true);
    world.settle();
    assert_eq!(world.guest.resets_heard, [(7, 8)]);
}

#[test]
fn a_driver_that_comes_after_the_restore_finds_a_fresh_device() {
    let mut world = World::new();
    let state = world.device.save();
    world.number += 1;
    world.device = World::device(&world.dir, &world.epoll, world.number);
    world.device.restore(&state).unwrap();
    // As the transport does, whether there is a driver or not.
    world.device.resume();
    world.activate();
    world.connect(1024);
}

#[test]
fn a_saved_state_that_is_wrong_is_refused_with_a_sentence() {
    let mut world = World::running();
    let (_first, _) = world.connect(1024);
    let (_second, key) = world.connect(1024);
    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(patterned(1, 0..1 << 20));
    world.settle();
    world.device.pause();
    let state = world.device.save();
    let mut fresh = World::device(&world.dir, &world.epoll, 9);
    let long = [&state[..], b"x"].concat();
    for (what, wrong) in [("empty", &[][..]), ("short", &state[..state.len() - 1]), ("very short", &state[..20]), ("long", &long)] {
        let error = fresh.restore(wrong).expect_err(what);
        assert!(error.to_string().starts_with("the saved state of the vsock device cannot be used: "), "{error}");
    }
    fresh.restore(&state).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever lies in the file, nothing panics, then or later.
    #[test]
    fn damaged_state_is_refused_or_harmless(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut world = World::running();
        let mut clients = [world.connect(1024), world.connect(1024)];
        world.guest.sockets.get_mut(&clients[0].1).unwrap().to_send.extend(patterned(1, 0..400_000));
        world.settle();
        clients[1].0.write_all(b"more");
        let queues = world.device.pause();
        let mut state = world.device.save();
        let streams = world.device.take_streams().unwrap();
        // The record, not the bytes of the streams.
        let record = state.len().min(100);
        for (at, value) in edits {
            state[at.index(record)] = value;
        }
        world.number += 1;
        world.epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        world.device = World::device(&world.dir, &world.epoll, world.number);
        if world.device.restore(&state).is_ok() {
            world.device.give_streams(streams.into_iter().map(|it| (it.guest_port, it.host_port, it.socket)).collect());
            world.activate_with(queues);
            world.device.resume();
            for _ in 0..50 {
                // The guest of this test expects a device in its senses; the device alone is looked at here.
                let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
                let count = epoll::wait(&world.epoll, &mut events[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
                for event in &events[..count] {
                    let _ = world.device.ready(Watch::decode(event.data.u64()).1);
                }
                let _ = world.device.ready(TX as u32);
                let _ = world.device.ready(RX as u32);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    ClientWrites { stream: usize, bytes: usize },
    ClientReads { stream: usize, bytes: usize },
    GuestWrites { stream: usize, bytes: usize },
    GuestReads { stream: usize, bytes: usize },
    GuestLooks,
    GuestRefills { buffers: usize },
    EventLoop,
    ClientEnds { stream: usize },
    GuestEnds { stream: usize },
    Connect,
    Park { give_late: bool },
    TakeBack,
}

fn step() -> impl Strategy<Value = Step> {
    let stream = || 0..3_usize;
    let bytes = || prop_oneof![1..10_usize, 1..5000_usize, 1..400_000_usize];
    prop_oneof![
        6 => (stream(), bytes()).prop_map(|(stream, bytes)| Step::ClientWrites { stream, bytes }),
        6 => (stream(), bytes()).prop_map(|(stream, bytes)| Step::ClientReads { stream, bytes }),
        6 => (stream(), bytes()).prop_map(|(stream, bytes)| Step::GuestWrites { stream, bytes }),
        6 => (stream(), bytes()).prop_map(|(stream, bytes)| Step::GuestReads { stream, bytes }),
        8 => Just(Step::GuestLooks),
        6 => (1..20_usize).prop_map(|buffers| Step::GuestRefills { buffers }),
        10 => Just(Step::EventLoop),
        1 => stream().prop_map(|stream| Step::ClientEnds { stream }),
        1 => stream().prop_map(|stream| Step::GuestEnds { stream }),
        1 => Just(Step::Connect),
        6 => any::<bool>().prop_map(|give_late| Step::Park { give_late }),
        1 => Just(Step::TakeBack),
    ]
}

struct Stream {
    client: Client,
    /// Once the client has heard OK.
    key: Option<Key>,
    seed: u32,
    client_wrote: usize,
    guest_wrote: usize,
    client_ended: bool,
    guest_ended: bool,
}

struct Flood {
    world: World,
    streams: Vec<Stream>,
}

impl Flood {
    fn new(window_here: u32, window_there: u32, rx_payload: u32, queue_size: u16, event_idx: bool) -> Self {
        let mut world = World::with_guest(Guest::new(queue_size).with_event_idx(event_idx));
        world.device.muxer.window = window_here;
        world.guest.window = window_there;
        world.guest.rx_payload = rx_payload;
        let queues = world.guest.queues();
        world.activate_with(queues);
        Self { world, streams: Vec::new() }
    }

    fn connect(&mut self) {
        if self.streams.len() < 3 {
            let seed = 2 * self.streams.len() as u32;
            let client = self.world.dial(1024);
            self.streams.push(Stream { client, key: None, seed, client_wrote: 0, guest_wrote: 0, client_ended: false, guest_ended: false });
        }
    }

    /// The stream, if it is open as far as its client knows.
    fn open(&mut self, stream: usize) -> Option<(&mut World, &mut Stream, Key)> {
        let stream = self.streams.get_mut(stream)?;
        if stream.key.is_none() {
            stream.key = stream.client.ok().map(|host_port| (1024, host_port));
        }
        let key = stream.key?;
        Some((&mut self.world, stream, key))
    }

    fn perform(&mut self, step: &Step) {
        match *step {
            Step::ClientWrites { stream, bytes } => {
                if let Some((_, stream, _)) = self.open(stream)
                    && !stream.client_ended
                {
                    let range = stream.client_wrote..stream.client_wrote + bytes;
                    stream.client_wrote += stream.client.write(&patterned(stream.seed, range));
                }
            }
            Step::ClientReads { stream, bytes } => {
                if let Some((_, stream, _)) = self.open(stream) {
                    stream.client.read(bytes);
                }
            }
            Step::GuestWrites { stream, bytes } => {
                if let Some((world, stream, key)) = self.open(stream)
                    && !stream.guest_ended
                {
                    let range = stream.guest_wrote..stream.guest_wrote + bytes;
                    stream.guest_wrote += bytes;
                    world.guest.sockets.get_mut(&key).unwrap().to_send.extend(patterned(stream.seed + 1, range));
                    world.guest.push(key);
                }
            }
            Step::GuestReads { stream, bytes } => {
                if let Some((world, _, key)) = self.open(stream) {
                    world.guest.read(key, bytes);
                }
            }
            Step::GuestLooks => {
                self.world.handle_interrupt();
                self.world.guest.push_all();
                self.end_emptied();
            }
            Step::GuestRefills { buffers } => self.world.guest.refill(buffers),
            Step::EventLoop => {
                self.world.turn();
            }
            Step::ClientEnds { stream } => {
                if let Some((_, stream, _)) = self.open(stream)
                    && !stream.client_ended
                {
                    stream.client_ended = true;
                    stream.client.stream.shutdown(std::net::Shutdown::Write).unwrap();
                }
            }
            Step::GuestEnds { stream } => {
                if let Some((_, stream, _)) = self.open(stream) {
                    stream.guest_ended = true;
                }
                self.end_emptied();
            }
            Step::Connect => self.connect(),
            Step::Park { give_late } => self.park(give_late),
            Step::TakeBack => {
                self.world.device.pause();
                self.world.device.save();
                drop(self.world.device.take_streams().unwrap());
                self.world.device.resume();
            }
        }
    }

    /// The guest's program says SHUTDOWN after its last byte, once.
    fn end_emptied(&mut self) {
        for stream in &mut self.streams {
            if let (true, Some(key)) = (stream.guest_ended, stream.key)
                && self.world.guest.sockets[&key].to_send.is_empty()
                && self.world.guest.sockets[&key].open
            {
                self.world.guest.sockets.get_mut(&key).unwrap().open = false;
                self.world.guest.say(key, op::SHUTDOWN, SHUTDOWN_SEND);
            }
        }
    }

    fn park(&mut self, give_late: bool) {
        // Who has only just come has to come again; that is another test's matter.
        while ((self.world.device.muxer.next_host_port() - HOST_PORTS.start) as usize) < self.streams.len() {
            assert!(self.world.turn(), "a client is not heard");
        }
        let window = self.world.device.muxer.window;
        let (queues, state, streams) = self.world.fall_asleep();
        let streams = streams.into_iter().map(|it| (it.guest_port, it.host_port, it.socket)).collect();
        let world = &mut self.world;
        world.device.muxer.window = window;
        world.device.restore(&state).unwrap();
        // Both orders are allowed.
        if give_late {
            world.activate_with(queues);
            world.device.give_streams(streams);
        } else {
            world.device.give_streams(streams);
            world.activate_with(queues);
        }
        world.device.resume();
    }

    /// Everything arrives, and nothing else.
    fn finish(mut self) {
        // Everybody is in this thread: when nothing happens for so many looks, nothing will.
        let mut idle = 0;
        loop {
            let done = (0..self.streams.len()).all(|index| {
                let Some((world, stream, key)) = self.open(index) else { return false };
                stream.client.read_all();
                world.guest.read(key, usize::MAX);
                let socket = &world.guest.sockets[&key];
                socket.received.len() == stream.client_wrote
                    && stream.client.heard.len() == stream.guest_wrote
                    && stream.client.ended == stream.guest_ended
                    && (socket.host_done & SHUTDOWN_SEND != 0) == stream.client_ended
            });
            if done {
                break;
            }
            let busy = self.world.step() || self.world.turn_within(Duration::from_millis(5));
            idle = if busy { 0 } else { idle + 1 };
            self.end_emptied();
            if idle > 40 {
                for stream in &self.streams {
                    let Stream { client, key, client_wrote, guest_wrote, client_ended, guest_ended, .. } = stream;
                    let socket = key.map(|key| &self.world.guest.sockets[&key]);
                    let counts = socket.map(|socket| (socket.received.len(), socket.to_send.len(), socket.host_done));
                    eprintln!("client: {} of {guest_wrote}, ended {} of {guest_ended}", client.heard.len(), client.ended);
                    eprintln!("guest: {counts:?} of {client_wrote}, ended {client_ended}");
                }
                panic!("bytes are missing: {:?}", self.world.device.muxer);
            }
        }
        // On a slow machine a stream that both sides have ended may have been cleared away already; no other.
        let ended = |key: &Key| self.streams.iter().any(|it| it.key == Some(*key) && it.client_ended && it.guest_ended);
        assert!(self.world.guest.resets_heard.iter().all(ended), "{:?}", self.world.guest.resets_heard);
        for stream in &self.streams {
            assert_pattern(stream.seed, &self.world.guest.sockets[&stream.key.unwrap()].received);
            assert_pattern(stream.seed + 1, &stream.client.heard);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Sleep in the middle of a flood, with bytes in every stage: in clients' sockets, in the backlog, in both queues, in
    /// the guest.
    #[test]
    fn not_a_byte_is_lost_or_doubled(
        steps in prop::collection::vec(step(), 1..120),
        window_here in prop_oneof![Just(WINDOW), 1..5000_u32],
        window_there in prop_oneof![Just(256 * 1024_u32), 1..5000_u32],
        rx_payload in prop_oneof![Just(4096_u32), 50..500_u32],
        queue_size in prop_oneof![Just(256_u16), Just(8)],
        event_idx in any::<bool>(),
    ) {
        let mut flood = Flood::new(window_here, window_there, rx_payload, queue_size, event_idx);
        flood.connect();
        flood.connect();
        for step in &steps {
            flood.perform(step);
        }
        flood.finish();
    }
}
