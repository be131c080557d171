//! A guest's driver and sockets, written from the specification and not from the device: it keeps the rules, and panics
//! when the device does not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    device::Memory,
    vsock::{
        GUEST_CID, HOST_CID,
        packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op},
    },
};

pub const MEMORY_BYTES: usize = 16 << 20;
/// Descriptors of one buffer.
const PER_SLOT: u16 = 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One split queue, from the driver's side; slot `n` owns descriptors `2n` and `2n + 1`.
pub struct Ring {
    memory: Memory,
    base: u64,
    size: u16,
    next_avail: u16,
    seen_used: u16,
    pub free: Vec<u16>,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
}

impl Ring {
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, next_avail: 0, seen_used: 0, free: (0..size / PER_SLOT).rev().collect(), event_idx: false }
    }

    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some(self.avail() as u32), None);
        queue.set_used_ring_address(Some(self.used() as u32), None);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    pub fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn offer(&mut self, head: u16) {
        let at = self.avail() + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail);
    }

    pub fn set_avail_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.avail() + 2)).unwrap();
    }

    /// Offers a slot as a header and, if it is not 0 bytes long, a payload.
    fn offer_slot(&mut self, slot: u16, header: u64, payload: (u64, u32), flags: u16) {
        let head = slot * PER_SLOT;
        if payload.1 > 0 {
            self.describe(head, header, HEADER_BYTES as u32, flags | NEXT, head + 1);
            self.describe(head + 1, payload.0, payload.1, flags, 0);
        } else {
            self.describe(head, header, HEADER_BYTES as u32, flags, 0);
        }
        self.offer(head);
    }

    /// The next buffer that the device has used: its slot, and how much was written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if index == self.seen_used {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16 / PER_SLOT, len))
    }

    /// Whether the device wants to be kicked for the buffer that was offered last.
    pub fn wants_kick(&self) -> bool {
        if self.event_idx {
            let event: u16 = self.memory.read_obj(GuestAddress(self.used() + 4 + 8 * u64::from(self.size))).unwrap();
            return event == self.next_avail.wrapping_sub(1);
        }
        self.memory.read_obj::<u16>(GuestAddress(self.used())).unwrap() & 1 == 0
    }

    /// Asks for an interrupt when the next buffer is used. Answers whether one has been already.
    pub fn arm(&self) -> bool {
        self.memory.write_obj(self.seen_used, GuestAddress(self.avail() + 4 + 2 * u64::from(self.size))).unwrap();
        self.memory.read_obj::<u16>(GuestAddress(self.used() + 2)).unwrap() != self.seen_used
    }
}

/// One socket of the guest.
#[derive(Debug, Default)]
pub struct Socket {
    pub open: bool,
    /// Heard RST, or answered it.
    pub dead: bool,
    /// Everything that has come.
    pub received: Vec<u8>,
    /// How much of it the program has read.
    pub read: usize,
    /// To be sent when there is credit.
    pub to_send: VecDeque<u8>,
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
    /// What the host's side does no more, as SHUTDOWN flags.
    pub host_done: u32,
    pub asked_for_credit: u32,
}

pub type Key = (u32, u32);

/// See the module. Keys are (guest port, host port).
pub struct Guest {
    pub memory: Memory,
    pub rx: Ring,
    pub tx: Ring,
    pub event: Ring,
    pub sockets: BTreeMap<Key, Socket>,
    pub listening: BTreeSet<u32>,
    /// Receive buffer of every socket.
    pub window: u32,
    /// Payload of a receive buffer and of a packet.
    pub rx_payload: u32,
    pub tx_payload: usize,
    outgoing: VecDeque<(Header, Vec<u8>)>,
    pub resets_heard: Vec<Key>,
    /// Whether a queue is to be kicked.
    pub kick_rx: bool,
    pub kick_tx: bool,
}

const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x80_0000;
const SLOT_BYTES: u64 = 0x8000;

impl Guest {
    pub fn new(queue_size: u16) -> Self {
        let memory: Memory = std::sync::Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
        let ring = |number: u64, size| Ring::new(&memory, 0x1_0000 * number, size);
        Self {
            rx: ring(1, queue_size),
            tx: ring(2, queue_size),
            event: ring(3, 64),
            memory: memory.clone(),
            sockets: BTreeMap::new(),
            listening: BTreeSet::new(),
            window: 256 * 1024,
            rx_payload: 4096,
            tx_payload: 16 * 1024,
            outgoing: VecDeque::new(),
            resets_heard: Vec::new(),
            kick_rx: false,
            kick_tx: false,
        }
    }

    pub fn with_event_idx(mut self, event_idx: bool) -> Self {
        for ring in [&mut self.rx, &mut self.tx, &mut self.event] {
            ring.event_idx = event_idx;
        }
        self
    }

    pub fn queues(&self) -> Vec<Queue> {
        vec![self.rx.queue(), self.tx.queue(), self.event.queue()]
    }

    /// Offers all receive buffers, or as many as `at_most`.
    pub fn refill(&mut self, at_most: usize) {
        for _ in 0..at_most {
            let Some(slot) = self.rx.free.pop() else { break };
            let at = RX_BUFFERS + SLOT_BYTES * u64::from(slot);
            self.rx.offer_slot(slot, at, (at + 0x1000, self.rx_payload), WRITE);
            self.kick_rx |= self.rx.wants_kick();
        }
    }

    fn header(&self, key: Key, op: u16) -> Header {
        let socket = self.sockets.get(&key);
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: key.0,
            dst_port: key.1,
            kind: STREAM,
            op,
            buf_alloc: self.window,
            fwd_cnt: socket.map_or(0, |socket| socket.read as u32),
            ..Header::default()
        }
    }

    pub fn say(&mut self, key: Key, op: u16, flags: u32) {
        let header = Header { flags, ..self.header(key, op) };
        self.send_raw(header, Vec::new());
    }

    /// Any packet at all.
    pub fn send_raw(&mut self, header: Header, payload: Vec<u8>) {
        self.outgoing.push_back((header, payload));
        self.transmit();
    }

    /// Moves what waits into queue tx, as far as it goes.
    pub fn transmit(&mut self) {
        loop {
            while let Some((slot, _)) = self.tx.take_used() {
                self.tx.free.push(slot);
            }
            if !self.tx.arm() {
                break;
            }
        }
        while !self.outgoing.is_empty() {
            let Some(slot) = self.tx.free.pop() else { break };
            let (header, payload) = self.outgoing.pop_front().unwrap();
            let at = TX_BUFFERS + SLOT_BYTES * u64::from(slot);
            self.memory.write_slice(&header.bytes(), GuestAddress(at)).unwrap();
            self.memory.write_slice(&payload, GuestAddress(at + 0x1000)).unwrap();
            self.tx.offer_slot(slot, at, (at + 0x1000, payload.len() as u32), 0);
            self.kick_tx |= self.tx.wants_kick();
        }
    }

    /// Sends what the device has room for.
    pub fn push(&mut self, key: Key) {
        loop {
            let socket = self.sockets.get_mut(&key).unwrap();
            let room = (socket.peer_window - socket.sent.wrapping_sub(socket.peer_forwarded)) as usize;
            let len = room.min(socket.to_send.len()).min(self.tx_payload);
            if len == 0 || !socket.open || socket.dead || self.outgoing.len() > 8 {
                break;
            }
            let payload: Vec<u8> = socket.to_send.drain(..len).collect();
            socket.sent = socket.sent.wrapping_add(len as u32);
            let header = Header { len: len as u32, ..self.header(key, op::RW) };
            self.send_raw(header, payload);
        }
    }

    pub fn push_all(&mut self) {
        let keys: Vec<_> = self.sockets.keys().copied().collect();
        for key in keys {
            self.push(key);
        }
    }

    /// The program reads; the device hears of the room.
    pub fn read(&mut self, key: Key, at_most: usize) -> usize {
        let socket = self.sockets.get_mut(&key).unwrap();
        let len = at_most.min(socket.received.len() - socket.read);
        socket.read += len;
        let dead = socket.dead;
        if len > 0 && !dead {
            self.say(key, op::CREDIT_UPDATE, 0);
        }
        len
    }

    /// Looks at what has come. Answers whether anything had.
    pub fn receive(&mut self) -> bool {
        let mut any = false;
        loop {
            any |= self.receive_used();
            if !self.rx.arm() {
                return any;
            }
        }
    }

    fn receive_used(&mut self) -> bool {
        let mut any = false;
        while let Some((slot, len)) = self.rx.take_used() {
            any = true;
            let at = RX_BUFFERS + SLOT_BYTES * u64::from(slot);
            let mut bytes = [0; HEADER_BYTES];
            self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            let header = Header::parse(&bytes);
            assert_eq!(len as usize, HEADER_BYTES + header.len as usize, "{header:?}");
            let mut payload = vec![0; header.len as usize];
            self.memory.read_slice(&mut payload, GuestAddress(at + 0x1000)).unwrap();
            self.rx.free.push(slot);
            self.packet(header, payload);
        }
        any
    }

    fn packet(&mut self, header: Header, payload: Vec<u8>) {
        assert_eq!((header.dst_cid, header.src_cid, header.kind), (GUEST_CID, HOST_CID, STREAM), "{header:?}");
        let key = (header.dst_port, header.src_port);
        assert!(payload.is_empty() || header.op == op::RW, "{header:?}");
        if header.op == op::REQUEST {
            assert!(!self.sockets.contains_key(&key), "the pair is in use: {key:?}");
            let known = self.listening.contains(&key.0);
            if known {
                let socket = Socket { open: true, peer_window: header.buf_alloc, peer_forwarded: header.fwd_cnt, ..Socket::default() };
                self.sockets.insert(key, socket);
            }
            self.say(key, if known { op::RESPONSE } else { op::RST }, 0);
            return;
        }
        if header.op == op::RST {
            self.resets_heard.push(key);
            if let Some(socket) = self.sockets.get_mut(&key) {
                socket.dead = true;
            }
            return;
        }
        let window = self.window;
        let Some(socket) = self.sockets.get_mut(&key) else { panic!("for no socket: {header:?}") };
        if socket.dead {
            return;
        }
        socket.peer_window = header.buf_alloc;
        socket.peer_forwarded = header.fwd_cnt;
        assert!(socket.sent.wrapping_sub(header.fwd_cnt) <= socket.peer_window, "the device has forwarded what was not sent");
        match header.op {
            op::RW => {
                assert_eq!(socket.host_done & SHUTDOWN_SEND, 0, "data after its end");
                assert!(!payload.is_empty());
                socket.received.extend_from_slice(&payload);
                assert!(socket.received.len() - socket.read <= window as usize, "more than the guest has room for");
            }
            op::SHUTDOWN => {
                assert_eq!(socket.host_done & header.flags, socket.host_done, "taken back");
                socket.host_done |= header.flags;
                // As Linux does, when its program has read all.
                if socket.host_done == SHUTDOWN_SEND | SHUTDOWN_RECEIVE && socket.read == socket.received.len() {
                    socket.dead = true;
                    self.say(key, op::RST, 0);
                }
            }
            op::CREDIT_REQUEST => {
                socket.asked_for_credit += 1;
                self.say(key, op::CREDIT_UPDATE, 0);
            }
            op::CREDIT_UPDATE => {}
            _ => panic!("{header:?}"),
        }
    }
}
