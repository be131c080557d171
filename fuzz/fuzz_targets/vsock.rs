//! The socket device between a hostile guest and clients of all kinds.
#![no_main]

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use dormouse_fuzz::{
    Input, Subject,
    rig::{BUFFERS, Rig, Ring, get, put},
    run,
};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv, send, shutdown, socket_with,
};
use virtio_devices::{
    device::Memory,
    vsock::{GUEST_CID, HOST_CID, Vsock},
};

const MOST_CLIENTS: usize = 8;
/// Receive buffers; packets of the guest's are above.
const RX_BYTES: u32 = 4096;

static NAMES: AtomicU64 = AtomicU64::new(0);

struct Streams {
    address: SocketAddrUnix,
    clients: VecDeque<OwnedFd>,
    /// Ports of the last packet from the device: the host's, the guest's.
    seen: (u32, u32),
}

impl Streams {
    fn new() -> Self {
        let name = format!("dormouse-fuzz-{}-{}", std::process::id(), NAMES.fetch_add(1, Ordering::Relaxed));
        Self { address: SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap(), clients: VecDeque::new(), seen: (0, 1024) }
    }

    fn socket() -> OwnedFd {
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap()
    }

    /// A packet from the guest.
    fn packet(&mut self, rig: &mut Rig, ring: &mut Ring, input: &mut Input<'_>) {
        let (host_port, guest_port) = if input.u8() % 8 == 0 { (input.u32(), input.u32()) } else { self.seen };
        let op = u16::from(input.u8() % 9);
        let len = if input.u8() % 8 == 0 { input.u32() } else { u32::from(input.u16() % 5000) };
        let len = if op == 5 { len } else { len * u32::from(input.u8() % 16 == 0) };
        let (source, destination) = if input.u8() % 16 == 0 { (input.u64(), input.u64()) } else { (GUEST_CID, HOST_CID) };
        let kind = if input.u8() % 16 == 0 { input.u16() } else { 1 };
        let (flags, window, forwarded) = (u32::from(input.u8() % 5), if input.u8() % 4 == 0 { input.u32() } else { 0x1_0000 }, u32::from(input.u16()));
        let mut header = Vec::new();
        header.extend_from_slice(&source.to_le_bytes());
        header.extend_from_slice(&destination.to_le_bytes());
        for word in [guest_port, host_port, len] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header.extend_from_slice(&kind.to_le_bytes());
        header.extend_from_slice(&op.to_le_bytes());
        for word in [flags, window, forwarded] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        let at = BUFFERS + 0x2_0000;
        put(&rig.memory, at, &header);
        let room = if input.u8() % 16 == 0 { input.u16().into() } else { len.min(0x8000) };
        let first = u16::from(input.u8()) % ring.size;
        let second = (first + 1) % ring.size;
        ring.describe(&rig.memory, first, at, 44, if room == 0 { 0 } else { 1 }, second);
        if room != 0 {
            ring.describe(&rig.memory, second, at + 0x1000, room, 0, 0);
        }
        ring.offer(&rig.memory, first);
        rig.kick(ring);
    }

    /// Puts a receive buffer in place.
    fn offer(rig: &mut Rig, ring: &mut Ring, slot: u64) {
        let at = slot as u16 % ring.size;
        ring.describe(&rig.memory, at, BUFFERS + slot * u64::from(RX_BYTES), RX_BYTES, 2, 0);
        ring.offer(&rig.memory, at);
        rig.kick(ring);
    }

    /// A client and a guest that agree, so that what follows happens on an open stream.
    fn open(&mut self, rig: &mut Rig, rings: &mut [Ring]) {
        let client = Self::socket();
        if self.clients.len() >= MOST_CLIENTS || connect(&client, &self.address).is_err() {
            return;
        }
        let _ = send(&client, b"CONNECT 1024\n", SendFlags::NOSIGNAL);
        self.clients.push_back(client);
        put(&rig.memory, BUFFERS, &[0; 44]);
        Self::offer(rig, &mut rings[0], 0);
        for _ in 0..4 {
            rig.turn(std::time::Duration::ZERO);
        }
        self.look(rig);
        // Ports as they are, RESPONSE, all else as a driver has it.
        self.packet(rig, &mut rings[1], &mut Input(&[1, 2, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0]));
        for _ in 0..2 {
            rig.turn(std::time::Duration::ZERO);
        }
    }

    fn look(&mut self, rig: &Rig) {
        for slot in 0..4 {
            let header = get(&rig.memory, BUFFERS + slot * u64::from(RX_BYTES), 32);
            let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            if word(16) != 0 {
                self.seen = (word(16), word(20));
            }
        }
    }
}

impl Subject for Streams {
    fn queues(&self) -> u32 {
        3
    }

    fn rig(&mut self, memory: Memory) -> Rig {
        // A new device listens where the old one did; its name is free once the old one is gone, and it need not be the same.
        *self = Self { clients: std::mem::take(&mut self.clients), seen: self.seen, ..Self::new() };
        let listener = Self::socket();
        bind(&listener, &self.address).unwrap();
        listen(&listener, 16).unwrap();
        Rig::new(memory, |watch| Box::new(Vsock::new(listener, watch.clone()).unwrap()))
    }

    fn own(&mut self, rig: &mut Rig, rings: &mut [Ring], input: &mut Input<'_>) {
        match input.u8() % 12 {
            0 => self.open(rig, rings),
            1 => {
                let client = Self::socket();
                if self.clients.len() < MOST_CLIENTS && connect(&client, &self.address).is_ok() {
                    let _ = send(&client, b"CONNECT 1024\n", SendFlags::NOSIGNAL);
                    self.clients.push_back(client);
                }
            }
            2 => {
                let client = Self::socket();
                if self.clients.len() < MOST_CLIENTS && connect(&client, &self.address).is_ok() {
                    let _ = send(&client, &input.bytes(64), SendFlags::NOSIGNAL);
                    self.clients.push_back(client);
                }
            }
            3 => {
                let bytes = vec![b'x'; usize::from(input.u16())];
                if let Some(client) = self.clients.back() {
                    let _ = send(client, &bytes, SendFlags::NOSIGNAL);
                }
            }
            4 => {
                if let Some(client) = self.clients.back() {
                    let _ = recv(client, &mut [0_u8; 4096], RecvFlags::empty());
                }
            }
            5 => {
                if let Some(client) = self.clients.front() {
                    let _ = shutdown(client, if input.u8() % 2 == 0 { Shutdown::Write } else { Shutdown::Both });
                }
            }
            6 => {
                self.clients.pop_front();
            }
            7 => {
                let slot = u64::from(input.u8() % 4);
                Self::offer(rig, &mut rings[0], slot);
            }
            _ => {
                rig.turn(std::time::Duration::ZERO);
                self.look(rig);
                self.packet(rig, &mut rings[1], input);
            }
        }
    }

    fn moved(&mut self, old: &mut Rig, new: &mut Rig) {
        let streams = old.transport.device_as::<Vsock>().unwrap().take_streams().unwrap();
        // Every third does not come back.
        let streams = streams.into_iter().enumerate().filter(|(index, _)| index % 3 != 2);
        let streams = streams.map(|(_, stream)| (stream.guest_port, stream.host_port, stream.socket)).collect();
        new.transport.device_as::<Vsock>().unwrap().give_streams(streams);
    }

    fn behave(&mut self, rig: &mut Rig, rings: &mut [Ring]) -> Option<usize> {
        // A credit update for a connection that is not there is answered, so the packet at least is taken.
        put(&rig.memory, BUFFERS, &[0; 44]);
        rings[1].add(&rig.memory, &[(BUFFERS, 44, false)]);
        rig.kick(&rings[1]);
        Some(1)
    }
}

fuzz_target!(|data: &[u8]| run(&mut Streams::new(), data));
