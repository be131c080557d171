//! A stream that outlives its machine: a client of a guest's port stays connected while the machine is a file, and goes on to
//! the byte with the next process, wherever its bytes were when the machine went to sleep.

mod echo;
mod process;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use process::{Files, LIMIT, Node, Process, booted, eventually, prepared};
use rustix::net::SocketType;
use vmm_protocol::control::{AGENT_PORT, MemoryUse, ParkedStream, Reply, Request, SaveKind, Saved, VSOCK_SOCKET};

/// What the device lets a guest send ahead of its client on one stream (virtio-devices, vsock/muxer.rs).
const WINDOW: u64 = 256 << 10;
// The device tells of room as soon as a quarter is free. So it holds more than three quarters when the guest has no credit
// left, and more than a window is on its way in guest and device together when nothing moves any more.
const _: () = assert!(echo::ROOM >= WINDOW / 4 && echo::ROOM < WINDOW);

#[expect(clippy::explicit_write, reason = "the harness keeps what `eprintln!` writes to itself when a test passes")]
fn kvm_opens() -> bool {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        writeln!(std::io::stderr(), "SKIPPED: parked streams are not tested, because /dev/kvm cannot be opened here: {error}").unwrap();
    }
    opened.is_ok()
}

/// A client of the echo.
struct Client {
    socket: UnixStream,
    host_port: u32,
    written: u64,
    read: u64,
    /// Bytes that earlier processes put into guest memory, and took from the guest into the client's socket.
    before: (u64, u64),
}

/// The byte at this place of the stream: no piece of it looks like another.
fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// A client that has said which port it wants.
fn ask_for(process: &Process, port: u32) -> UnixStream {
    let mut socket = UnixStream::from(process.socket(VSOCK_SOCKET, SocketType::STREAM));
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.set_write_timeout(Some(LIMIT)).unwrap();
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    socket
}

impl Client {
    fn connect(process: &Process) -> Self {
        let mut socket = ask_for(process, AGENT_PORT);
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut one = [0];
            socket.read_exact(&mut one).unwrap();
            line.push(one[0]);
        }
        let line = String::from_utf8(line).unwrap();
        let host_port = line.strip_prefix("OK ").and_then(|port| port.trim_end().parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
        Self { socket, host_port, written: 0, read: 0, before: (0, 0) }
    }

    fn write(&mut self, bytes: u64) {
        let piece: Vec<u8> = (self.written..self.written + bytes).map(byte).collect();
        self.socket.write_all(&piece).unwrap();
        self.written += bytes;
    }

    fn read(&mut self, bytes: u64) {
        let mut piece = vec![0; bytes as usize];
        self.socket.read_exact(&mut piece).unwrap_or_else(|error| panic!("of {bytes} bytes after {}: {error}", self.read));
        let wrong = (self.read..).zip(&piece).find(|(at, got)| byte(*at) != **got);
        assert_eq!(wrong, None, "the first wrong byte of {bytes} from {} on", self.read);
        self.read += bytes;
    }

    /// Reads the echo of all that was written, and then of a piece more, so that no byte too many can have come either.
    fn read_all(&mut self) {
        self.read(self.written - self.read);
        self.write(1000);
        self.read(1000);
    }

    /// Bytes that have ever been put into guest memory, and that have ever been taken from the guest into the client's socket.
    fn counters(&self, node: &mut Node) -> (u64, u64) {
        match node.ask(Request::Usage, &[]) {
            Reply::Usage(usage) => (self.before.0 + usage.stream_received_bytes, self.before.1 + usage.stream_sent_bytes),
            other => panic!("{other:?}"),
        }
    }

    /// Writes without reading until bytes lie in every place that the stream goes through, and pauses the machine like that.
    fn fill_and_pause(&mut self, node: &mut Node) {
        eventually("a stream that is full", || {
            let (to_guest, from_guest) = self.counters(node);
            if to_guest == self.written {
                self.write(16 << 10);
            }
            (to_guest - from_guest > WINDOW).then_some(())
        });
        node.done(Request::Pause, &[]);
        self.write(10_000);
        let (to_guest, from_guest) = self.counters(node);
        // Neither the guest's room nor the device's window can hold so much: there is some in both.
        assert!(to_guest - from_guest > WINDOW.max(echo::ROOM));
        // In the client's socket, on the way to the guest, there is at least what the paused machine was sent.
        assert!(self.written - to_guest >= 10_000);
        // And on the way from the guest.
        assert!(from_guest > self.read + 10_000, "{from_guest} {}", self.read);
    }

    /// The machine has been saved and its process is about to end.
    fn park(&mut self, node: &mut Node) {
        self.before = self.counters(node);
    }

    fn parked(&self) -> ParkedStream {
        ParkedStream { guest_port: AGENT_PORT, host_port: self.host_port }
    }
}

/// Saves a paused machine; answers the host ends of its streams too.
fn save(node: &mut Node, files: &Files, name: &str, kind: SaveKind) -> (Saved, Vec<OwnedFd>) {
    let new = |part: &str| files.empty(&format!("{name}-{part}"));
    let mut descriptors = vec![new("state")];
    if kind != SaveKind::Image {
        descriptors.extend([new("memory"), files.read("memory"), new("map")]);
    }
    let id = node.say(Request::Save { kind }, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    match node.answer(id) {
        (Reply::Saved(saved), sockets) => (saved, sockets),
        (other, _) => panic!("{other:?}"),
    }
}

/// A new process with the machine that was saved as `name`, which goes on with a disk layer of its own; `layers` are those
/// that it had, by the names of their data and of the saves that wrote their maps.
fn woken(files: &Files, name: &str, layers: &[(&str, &str)], top: &str, streams: Vec<(ParkedStream, OwnedFd)>) -> (Process, Node) {
    let (process, mut node) = prepared(files, MemoryUse::Private);
    let difference = !layers.is_empty();
    let mut descriptors = vec![files.read(&format!("{name}-state"))];
    if difference {
        descriptors.push(files.read(&format!("{name}-memory")));
    }
    descriptors.push(files.read("disk"));
    for (data, save) in layers {
        descriptors.extend([files.read(data), files.read(&format!("{save}-map"))]);
    }
    descriptors.push(files.empty(top));
    let (streams, sockets): (Vec<_>, Vec<_>) = streams.into_iter().unzip();
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).chain(sockets.iter().map(AsFd::as_fd)).collect();
    node.done(Request::Restore { difference, sealed_layers: layers.len() as u32, streams }, &descriptors);
    node.done(Request::Run, &[]);
    (process, node)
}

fn quit(process: Process, mut node: Node) {
    node.done(Request::Quit, &[]);
    let (status, log) = process.ended();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn a_stream_sleeps_with_its_machine_and_goes_on_to_the_byte() {
    if !kvm_opens() {
        return;
    }
    const DIFFERENCE: SaveKind = SaveKind::Difference { merge_layers: false };
    let files = Files::new();
    let (process, mut node) = booted(&files, &echo::kernel());
    let mut client = Client::connect(&process);
    client.write(5000);
    client.read_all();
    // Nobody listens there.
    assert_eq!(ask_for(&process, AGENT_PORT + 1).read(&mut [0]).unwrap(), 0);

    // An image, with a full stream.
    client.fill_and_pause(&mut node);
    let (saved, sockets) = save(&mut node, &files, "image", SaveKind::Image);
    assert_eq!(saved.streams, [client.parked()]);
    assert_eq!(sockets.len(), 1);
    client.park(&mut node);
    quit(process, node);
    // The machine is a file: the client notices nothing.
    client.write(7000);
    client.read(3000);

    // A clone takes the stream over. It is filled again, and a suspend is taken back.
    let (process, mut node) = woken(&files, "image", &[], "top-1", saved.streams.into_iter().zip(sockets).collect());
    client.read(client.written - client.read - 1000);
    client.fill_and_pause(&mut node);
    drop(save(&mut node, &files, "taken-back", DIFFERENCE));
    client.write(3000);
    node.done(Request::Run, &[]);
    client.read(client.written - client.read - 2000);
    client.fill_and_pause(&mut node);
    let (saved, sockets) = save(&mut node, &files, "first", DIFFERENCE);
    assert_eq!(saved.streams, [client.parked()]);
    client.park(&mut node);
    quit(process, node);
    client.write(8000);

    // And so does a third process, with the difference.
    let (process, mut node) = woken(&files, "first", &[("top-1", "first")], "top-2", saved.streams.into_iter().zip(sockets).collect());
    client.read_all();
    assert_eq!(node.console().trim_end(), "", "the guest has noticed something");

    // The fourth gets the machine, and not its stream.
    client.fill_and_pause(&mut node);
    let (saved, sockets) = save(&mut node, &files, "second", DIFFERENCE);
    assert_eq!(saved.streams, [client.parked()]);
    client.park(&mut node);
    quit(process, node);
    drop(sockets);
    // What had come as far as the client's socket is there, and then it ends.
    client.read(client.before.1 - client.read);
    match client.socket.read(&mut [0]) {
        Ok(0) => {}
        // Unix sockets say so when the other end was closed with bytes unread.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
    let (process, mut node) = woken(&files, "second", &[("top-1", "first"), ("top-2", "second")], "top-3", Vec::new());
    eventually("the reset in the guest", || node.console().contains('R').then_some(()));
    // The guest is well, and nothing of the old stream is in a new one.
    let mut client = Client::connect(&process);
    client.write(2000);
    client.read_all();
    drop(client);
    eventually("the end in the guest", || node.console().contains('S').then_some(()));
    assert_eq!(node.console().trim_end(), "RCS");
    quit(process, node);
}
