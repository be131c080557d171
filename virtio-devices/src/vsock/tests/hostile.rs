//! A guest that wants to do harm.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vsock::{
    muxer::{MAX_CONNECTIONS, MAX_ORPHANS},
    packet::op,
};

#[derive(Debug, Clone)]
enum Attack {
    /// A packet that is nearly right.
    Packet { header: Header, payload: usize, known: Option<usize> },
    /// Descriptors that point anywhere.
    Chain { queue: usize, descriptors: Vec<(u16, u64, u32, u16, u16)>, head: u16 },
    /// An index that jumps.
    Index { queue: usize, index: u16 },
    /// Anything, anywhere in its own memory.
    Scribble { at: u64, value: u64 },
    ClientWrites { bytes: usize },
    Refill,
    EventLoop,
    Park,
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0_u32), Just(1), Just(44), Just(4096), Just(WINDOW), Just(u32::MAX), any::<u32>(), 0..300_000_u32]
}

fn header() -> impl Strategy<Value = Header> {
    let cid = || prop_oneof![8 => Just(0_u64), 1 => any::<u64>()];
    (cid(), cid(), number(), number(), number(), prop_oneof![8 => Just(1_u16), 1 => any::<u16>()], 0..10_u16, number(), number(), number()).prop_map(
        |(src, dst, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt)| Header {
            src_cid: if src == 0 { GUEST_CID } else { src },
            dst_cid: if dst == 0 { HOST_CID } else { dst },
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

fn attack() -> impl Strategy<Value = Attack> {
    let address = || prop_oneof![0..guest::MEMORY_BYTES as u64, any::<u64>(), Just(u64::MAX - 8)];
    let descriptor = || (0..256_u16, address(), number(), 0..8_u16, prop_oneof![0..256_u16, any::<u16>()]);
    prop_oneof![
        20 => (header(), 0..40_000_usize, prop::option::weighted(0.8, 0..4_usize))
            .prop_map(|(header, payload, known)| Attack::Packet { header, payload, known }),
        3 => (0..2_usize, prop::collection::vec(descriptor(), 1..8), 0..300_u16)
            .prop_map(|(queue, descriptors, head)| Attack::Chain { queue, descriptors, head }),
        1 => (0..2_usize, any::<u16>()).prop_map(|(queue, index)| Attack::Index { queue, index }),
        1 => (0..guest::MEMORY_BYTES as u64 - 8, any::<u64>()).prop_map(|(at, value)| Attack::Scribble { at, value }),
        4 => (1..100_000_usize).prop_map(|bytes| Attack::ClientWrites { bytes }),
        4 => Just(Attack::Refill),
        12 => Just(Attack::EventLoop),
        1 => Just(Attack::Park),
    ]
}

struct Siege {
    world: World,
    clients: Vec<(Client, Key)>,
    stopped: bool,
}

impl Siege {
    fn begin() -> Self {
        let mut world = World::running();
        let clients = (0..4).map(|_| world.connect(1024)).collect();
        Self { world, clients, stopped: false }
    }

    fn ready(&mut self, token: u32) {
        if !self.world.device.ready(token) {
            self.stopped = true;
        }
    }

    fn event_loop(&mut self) {
        self.ready(RX as u32);
        self.ready(TX as u32);
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
        let count = epoll::wait(&self.world.epoll, &mut events[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        for event in &events[..count] {
            self.ready(Watch::decode(event.data.u64()).1);
        }
    }

    fn perform(&mut self, attack: Attack) {
        let guest = &mut self.world.guest;
        match attack {
            Attack::Packet { mut header, payload, known } => {
                if let Some(known) = known {
                    (header.src_port, header.dst_port) = self.clients[known].1;
                }
                // Half of them tell their true length.
                if header.len % 2 == 0 {
                    header.len = payload as u32;
                }
                let fits = payload.min(0x7000);
                guest.transmit();
                guest.send_raw(header, vec![0x5a; fits]);
            }
            Attack::Chain { queue, descriptors, head } => {
                let ring = if queue == 0 { &mut guest.rx } else { &mut guest.tx };
                for (index, address, len, flags, next) in descriptors {
                    ring.describe(index, address, len, flags, next);
                }
                ring.offer(head);
            }
            Attack::Index { queue, index } => if queue == 0 { &guest.rx } else { &guest.tx }.set_avail_index(index),
            Attack::Scribble { at, value } => guest.memory.write_obj(value, GuestAddress(at)).unwrap(),
            Attack::ClientWrites { bytes } => {
                for (client, _) in &mut self.clients {
                    let _ = client.stream.write(&vec![1; bytes]);
                }
            }
            Attack::Refill => {
                while let Some((slot, _)) = guest.rx.take_used() {
                    if slot < 128 && !guest.rx.free.contains(&slot) {
                        guest.rx.free.push(slot);
                    }
                }
                guest.refill(usize::MAX);
            }
            Attack::EventLoop => self.event_loop(),
            Attack::Park => self.world.park(|stream| stream.host_port % 4 != 0),
        }
    }

    /// Nothing is larger than it may be.
    fn check(&self) {
        let muxer = &self.world.device.muxer;
        assert!(muxer.orphans().len() <= MAX_ORPHANS);
        assert!(muxer.connections().count() <= MAX_CONNECTIONS);
        for connection in muxer.connections() {
            assert!(connection.backlog_bytes() <= connection.window() as usize);
            assert!(connection.window() <= WINDOW);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn nothing_panics_and_nothing_grows(attacks in prop::collection::vec(attack(), 1..100)) {
        let mut siege = Siege::begin();
        for attack in attacks {
            siege.perform(attack);
            siege.check();
        }
        siege.event_loop();
        siege.check();
        // Whatever it did, a reset makes the device as new.
        siege.world.device.reset();
        siege.world.guest = Guest::new(256).with_event_idx(true);
        siege.world.guest.listening.insert(1024);
        siege.world.activate();
        siege.world.connect(1024);
    }
}

#[test]
fn a_turn_takes_no_more_than_its_share() {
    let mut world = World::running();
    let (mut client, key) = world.connect(1024);
    for _ in 0..10 {
        world.guest.say(key, op::CREDIT_UPDATE, 0);
    }
    let mut scratch = vec![0; HEADER_BYTES + WINDOW as usize];
    let Vsock { active, muxer, .. } = &mut world.device;
    let active = active.as_mut().unwrap();
    let mut left = 3;
    assert!(active.collect(muxer, &mut scratch, &mut left).unwrap());
    assert_eq!(left, 0);
    assert!(!active.collect(muxer, &mut scratch, &mut left).unwrap(), "the turn is over");
    left = TURN;
    assert!(active.collect(muxer, &mut scratch, &mut left).unwrap());
    assert_eq!(left, TURN - 7);

    // The other way round: twenty packets' worth.
    client.write_all(&vec![0; 20 * 4096]);
    muxer.ready(key.1);
    let mut left = 5;
    assert!(active.deliver(muxer, &mut scratch, &mut left).unwrap());
    assert_eq!((left, muxer.has_news()), (0, true));
    world.device.again.ring();
    world.settle();
    assert_eq!(world.guest.sockets[&key].received.len(), 20 * 4096);
}
