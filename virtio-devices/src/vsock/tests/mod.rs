//! The device between a guest that keeps the rules (or does not) and real clients.

mod guest;
mod hostile;
mod park;
mod streams;

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{Timespec, epoll};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::device::{INTERRUPT_USED, Resources, VirtioDevice, Watch};
use guest::{Guest, Key};

/// A ceiling for everything.
const LIMIT: Duration = Duration::from_secs(60);

/// A machine with nothing but the device.
struct World {
    dir: tempfile::TempDir,
    epoll: Arc<OwnedFd>,
    device: Vsock,
    /// Counts devices.
    number: u32,
    interrupt: Interrupt,
    guest: Guest,
}

impl World {
    fn new() -> Self {
        Self::with_queues(256)
    }

    fn with_queues(size: u16) -> Self {
        Self::with_guest(Guest::new(size).with_event_idx(true))
    }

    fn with_guest(guest: Guest) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let device = Self::device(&dir, &epoll, 0);
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut world = Self { dir, epoll, device, number: 0, interrupt, guest };
        world.guest.listening.insert(1024);
        world
    }

    fn device(dir: &tempfile::TempDir, epoll: &Arc<OwnedFd>, number: u32) -> Vsock {
        let listener = UnixListener::bind(dir.path().join(format!("vsock{number}"))).unwrap();
        Vsock::new(listener.into(), Watch::new(epoll.clone(), number)).unwrap()
    }

    fn activate(&mut self) {
        let queues = self.guest.queues();
        self.activate_with(queues);
        self.guest.refill(usize::MAX);
    }

    fn activate_with(&mut self, queues: Vec<Queue>) {
        let memory = self.guest.memory.clone();
        self.device.activate(Resources { memory, queues, features: 0, interrupt: self.interrupt.clone() });
    }

    fn running() -> Self {
        let mut world = Self::new();
        world.activate();
        world
    }

    fn socket_path(&self) -> PathBuf {
        self.dir.path().join(format!("vsock{}", self.number))
    }

    /// What the event loop does once. Answers whether there was anything.
    fn turn(&mut self) -> bool {
        self.turn_within(Duration::ZERO)
    }

    fn turn_within(&mut self, wait: Duration) -> bool {
        let mut any = false;
        for (queue, kicked) in [(RX, std::mem::take(&mut self.guest.kick_rx)), (TX, std::mem::take(&mut self.guest.kick_tx))] {
            if kicked {
                any = true;
                assert!(self.device.ready(queue as u32), "the device has stopped");
            }
        }
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&wait)).unwrap();
        for event in &events[..count] {
            any = true;
            assert!(self.device.ready(Watch::decode(event.data.u64()).1), "the device has stopped");
        }
        any
    }

    /// The guest's interrupt handler: it looks only when it was told to.
    fn handle_interrupt(&mut self) -> bool {
        let status = self.interrupt.status();
        self.interrupt.acknowledge(status);
        if status & INTERRUPT_USED == 0 {
            return false;
        }
        let received = self.guest.receive();
        self.guest.transmit();
        received
    }

    /// One step of everybody; the guest reads and writes what it can.
    fn step(&mut self) -> bool {
        let turned = self.turn();
        let handled = self.handle_interrupt();
        self.guest.refill(usize::MAX);
        self.guest.push_all();
        turned | handled | self.guest.kick_rx | self.guest.kick_tx
    }

    /// Runs until nothing happens.
    fn settle(&mut self) {
        let since = Instant::now();
        while self.step() {
            assert!(since.elapsed() < LIMIT, "it never settles");
        }
    }

    /// Runs until it is so.
    fn until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        while !reached(self) {
            if !self.step() {
                self.turn_within(Duration::from_millis(20));
            }
            assert!(since.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        }
    }

    /// A client that has said its line.
    fn dial(&self, port: u32) -> Client {
        let mut client = self.mute();
        client.write_all(format!("CONNECT {port}\n").as_bytes());
        client
    }

    fn mute(&self) -> Client {
        let stream = UnixStream::connect(self.socket_path()).unwrap();
        stream.set_nonblocking(true).unwrap();
        Client { stream, heard: Vec::new(), ended: false }
    }

    /// A client that is connected, and the guest's socket.
    fn connect(&mut self, port: u32) -> (Client, Key) {
        let mut client = self.dial(port);
        let mut host_port = None;
        self.until("OK", |_| {
            host_port = client.ok();
            host_port.is_some()
        });
        let key = (port, host_port.unwrap());
        assert!(self.guest.sockets.contains_key(&key));
        (client, key)
    }

    /// The machine sleeps and another process wakes it with those streams that `keep` wants.
    fn park(&mut self, keep: impl Fn(&ParkedStream) -> bool) {
        let (queues, state, streams) = self.fall_asleep();
        let streams = streams.into_iter().filter(keep).map(|it| (it.guest_port, it.host_port, it.socket)).collect();
        self.wake_up(queues, &state, streams);
    }

    /// The old device is gone afterwards.
    fn fall_asleep(&mut self) -> (Vec<Queue>, Vec<u8>, Vec<ParkedStream>) {
        let queues = self.device.pause();
        let streams = self.device.take_streams().unwrap();
        let state = self.device.save();
        self.number += 1;
        // Another process has an epoll of its own.
        self.epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        self.device = Self::device(&self.dir, &self.epoll, self.number);
        (queues, state, streams)
    }

    fn wake_up(&mut self, queues: Vec<Queue>, state: &[u8], streams: Vec<(u32, u32, OwnedFd)>) {
        self.device.restore(state).unwrap();
        self.device.give_streams(streams);
        self.activate_with(queues);
        self.device.resume();
    }
}

/// A client's socket, which does not wait.
struct Client {
    stream: UnixStream,
    heard: Vec<u8>,
    ended: bool,
}

impl Client {
    fn write_all(&mut self, bytes: &[u8]) {
        assert_eq!(self.write(bytes), bytes.len());
    }

    /// How much of it the socket takes.
    fn write(&mut self, bytes: &[u8]) -> usize {
        match self.stream.write(bytes) {
            Ok(written) => written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => panic!("{error}"),
        }
    }

    /// Reads at most so much into `heard`; answers whether anything came.
    fn read(&mut self, at_most: usize) -> bool {
        let mut bytes = vec![0; at_most];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.ended = true,
            Ok(read) => self.heard.extend_from_slice(&bytes[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.ended = true,
            Err(error) => panic!("{error}"),
        }
        true
    }

    fn read_all(&mut self) {
        while !self.ended && self.read(64 * 1024) {}
    }

    /// The host port of the `OK`, once it is there. Reads nothing behind it.
    fn ok(&mut self) -> Option<u32> {
        while !self.ended && self.heard.last() != Some(&b'\n') && self.read(1) {}
        assert!(!self.ended, "refused");
        let line = String::from_utf8(std::mem::take(&mut self.heard)).unwrap();
        if !line.ends_with('\n') {
            self.heard = line.into_bytes();
            return None;
        }
        Some(line.strip_prefix("OK ").unwrap().trim_end().parse().unwrap())
    }
}

/// Bytes that tell where they are from and where they belong.
fn pattern(seed: u32, at: usize) -> u8 {
    let mixed = (at as u32 ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    (mixed >> 16) as u8
}

fn patterned(seed: u32, range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|at| pattern(seed, at)).collect()
}

/// Fails at the first byte that is wrong.
fn assert_pattern(seed: u32, bytes: &[u8]) {
    if let Some(at) = (0..bytes.len()).find(|at| bytes[*at] != pattern(seed, *at)) {
        panic!("byte {at} of {} is wrong", bytes.len());
    }
}
