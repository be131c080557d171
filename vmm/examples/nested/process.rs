//! The outer guest's other part: the same life of a microVM, in processes of `dormouse-vmm`, jailed and under their filters, spoken
//! to as a node does. With a stream that is open all the time.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, mount, mount_move},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use vmm_protocol::control::{
    AGENT_PORT, CONTROL_SOCKET, Fault, FromVmm, MemoryUse, ParkedStream, Reply, Request, SaveKind, Saved, ToVmm, VERSION, VSOCK_SOCKET, receive, send,
};

use super::{DISK, MEMORY, memory_file, tick};

/// For each step; the whole has four minutes.
const LIMIT: Duration = Duration::from_secs(100);
const PROGRAM: &str = "/dormouse-vmm";
const DIFFERENCE: Request = Request::Save { kind: SaveKind::Difference { merge_layers: false } };

/// The root of an initramfs cannot be left by pivot_root, and that is a layer of the jail: a tmpfs takes its place.
pub fn leave_initramfs() {
    fs::create_dir_all("/new").expect("making a directory");
    mount("root", "/new", "tmpfs", MountFlags::empty(), None).expect("mounting a tmpfs");
    for name in ["dev", "proc", "sys", "run"] {
        fs::create_dir_all(format!("/new/{name}")).expect("making a directory");
    }
    for name in ["vmlinux", "inner.cpio", "dormouse-vmm"] {
        fs::copy(format!("/{name}"), format!("/new/{name}")).expect("copying a file to the new root");
    }
    for name in ["dev", "proc", "sys"] {
        mount_move(format!("/{name}"), format!("/new/{name}")).expect("moving a mount to the new root");
    }
    std::env::set_current_dir("/new").expect("entering the new root");
    mount_move("/new", "/").expect("moving the new root");
    rustix::process::chroot(".").expect("changing the root");
    std::env::set_current_dir("/").expect("entering the root");
}

struct Vmm {
    child: Child,
    dir: String,
    control: OwnedFd,
    next: u64,
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "never seen: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Vmm {
    fn start(name: &str, memory: &File, memory_use: MemoryUse, vcpus: u8) -> Self {
        let dir = format!("/run/{name}");
        fs::create_dir_all(&dir).expect("making a directory");
        let log = File::create(format!("{dir}/log")).expect("making a log");
        let mut command = Command::new(PROGRAM);
        command.args(["--dir", &dir, "--name", &format!("dormouse:{dir}"), "--require", "all"]);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().expect("duplicating")).stderr(log).spawn().expect("starting the VMM");
        let address = SocketAddrUnix::new(format!("{dir}/{CONTROL_SOCKET}")).expect("a short name");
        let control = eventually("the control socket", || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("making a socket");
            rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(LIMIT)).expect("a time limit");
            connect(&socket, &address).is_ok().then_some(socket)
        });
        let mut vmm = Self { child, dir, control, next: 1 };
        let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").expect("opening /dev/kvm");
        let request = Request::Prepare { version: VERSION, vcpus, memory_bytes: MEMORY, memory: memory_use, disk_bytes: DISK, net: None };
        vmm.done(request, &[kvm.as_fd(), memory.as_fd()]);
        for (pid, of) in [(vmm.child.id(), "PARENT"), (vmm.inner(), "VMM")] {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("reading its status");
            let lines: Vec<_> = status.lines().filter(|line| ["CapEff", "NoNewPrivs", "Seccomp:"].iter().any(|key| line.starts_with(key))).collect();
            assert_eq!(lines, ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"], "{of}");
        }
        vmm
    }

    fn inner(&self) -> u32 {
        let pid = self.child.id();
        eventually("its child", || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.split_whitespace().next()?.parse().ok())
    }

    fn log(&self) -> String {
        fs::read_to_string(format!("{}/log", self.dir)).unwrap_or_default()
    }

    fn say(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> u64 {
        self.next += 1;
        send(&self.control, &ToVmm { id: self.next, request }, descriptors).expect("asking the VMM");
        self.next
    }

    fn answer(&mut self, wanted: u64) -> (Reply, Vec<OwnedFd>) {
        match receive(&self.control) {
            Ok((FromVmm::Reply { id, reply }, descriptors)) if id == wanted => (reply, descriptors),
            other => panic!("{other:?}; {}its log: {}", self.threads(), self.log()),
        }
    }

    /// What its threads do, for a VMM that does not answer.
    fn threads(&self) -> String {
        let pid = self.inner();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let read = |task: &fs::DirEntry, file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default().trim().to_owned();
        tasks.map(|task| format!("{} in {} ({}); ", read(&task, "comm"), read(&task, "wchan"), read(&task, "syscall"))).collect()
    }

    fn ask(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        let id = self.say(request, descriptors);
        self.answer(id)
    }

    fn done(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Vec<(String, u64)> {
        let name = format!("{request:?}");
        match self.ask(request, descriptors) {
            (Reply::Done { phases_us }, _) => phases_us,
            other => panic!("{name}: {other:?}; its log: {}", self.log()),
        }
    }

    fn until(&mut self, what: &str, wanted: impl Fn(u64) -> bool) -> u64 {
        let mut last = String::new();
        let found = eventually_or(|| match self.ask(Request::Console, &[]).0 {
            Reply::Console { text } => {
                let found = text.lines().rev().skip(usize::from(!text.ends_with('\n'))).find_map(tick).filter(|n| wanted(*n));
                last = text;
                found
            }
            other => panic!("{other:?}"),
        });
        found.unwrap_or_else(|| panic!("the inner guest did not get to {what}; it said {last}"))
    }

    fn save(&mut self, memory: &File) -> (Difference, Saved, Vec<OwnedFd>) {
        let files = Difference { state: memory_file(0), memory: memory_file(0), map: memory_file(0) };
        match self.ask(DIFFERENCE, &[files.state.as_fd(), files.memory.as_fd(), memory.as_fd(), files.map.as_fd()]) {
            (Reply::Saved(saved), streams) => (files, saved, streams),
            other => panic!("{other:?}; its log: {}", self.log()),
        }
    }

    fn quit(mut self) {
        self.done(Request::Quit, &[]);
        let status = self.child.wait().expect("waiting for the VMM");
        assert!(status.success(), "{status}; its log: {}", self.log());
        println!("OUTER LOG {}", self.log().replace('\n', " | "));
    }

    /// A stream to the guest's echo.
    fn dial(&mut self) -> UnixStream {
        let dialled = eventually_or(|| {
            let mut stream = UnixStream::connect(format!("{}/{VSOCK_SOCKET}", self.dir)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
            stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).ok()?;
            let mut line = Vec::new();
            while line.last() != Some(&b'\n') {
                let mut byte = [0];
                stream.read_exact(&mut byte).ok()?;
                line.push(byte[0]);
            }
            line.starts_with(b"OK ").then_some(stream)
        });
        dialled.unwrap_or_else(|| {
            let console = self.ask(Request::Console, &[]).0;
            panic!("the guest's port does not answer; {console:?}; its log: {}", self.log())
        })
    }
}

fn eventually_or<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        let found = look();
        if found.is_some() || begin.elapsed() > LIMIT {
            return found;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct Difference {
    state: File,
    memory: File,
    map: File,
}

fn echo(stream: &mut UnixStream, text: &[u8]) {
    stream.write_all(text).expect("writing to the guest");
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).expect("reading from the guest");
    assert_eq!(back, text, "the echo");
}

/// Writes before the restore wait in the stream; answers come afterwards.
fn restore(
    vmm: &mut Vmm,
    disk: &File,
    state: &File,
    difference: Option<&File>,
    layer: Option<(&File, &File)>,
    top: &File,
    streams: &[(ParkedStream, OwnedFd)],
) {
    let mut descriptors = vec![state.as_fd()];
    descriptors.extend(difference.map(AsFd::as_fd));
    descriptors.push(disk.as_fd());
    if let Some((data, map)) = layer {
        descriptors.extend([data.as_fd(), map.as_fd()]);
    }
    descriptors.push(top.as_fd());
    descriptors.extend(streams.iter().map(|(_, stream)| stream.as_fd()));
    let streams = streams.iter().map(|(stream, _)| stream.clone()).collect();
    let request = Request::Restore { difference: difference.is_some(), sealed_layers: u32::from(layer.is_some()), streams };
    println!("OUTER RESTORE {:?}", vmm.done(request, &descriptors));
}

pub fn outer(vcpus: u8) {
    leave_initramfs();
    println!("OUTER UP, KVM {}", vmm::kvm::probe::probe().to_json());
    let (memory, disk) = (memory_file(MEMORY), memory_file(DISK));
    let open = |path| File::open(path).expect("opening a file to boot");

    let mut first = Vmm::start("first", &memory, MemoryUse::Shared, vcpus);
    let boot = Request::Boot { cmdline: "console=ttyS0 quiet panic=-1 inner".to_owned() };
    println!("OUTER BOOT {:?}", first.done(boot, &[open("/vmlinux").as_fd(), open("/inner.cpio").as_fd(), disk.as_fd()]));
    println!("OUTER TICKS {}", first.until("its tenth tick", |n| n >= 10));
    echo(&mut first.dial(), b"from the first");
    first.done(Request::Pause, &[]);
    let before = first.until("a tick", |_| true);
    let state = memory_file(0);
    match first.ask(Request::Save { kind: SaveKind::Image }, &[state.as_fd()]).0 {
        Reply::Saved(saved) => println!("OUTER SAVED {:?}", saved.phases_us),
        other => panic!("{other:?}; its log: {}", first.log()),
    }
    first.quit();

    // A clone, with a stream that stays open.
    let mut second = Vmm::start("second", &memory, MemoryUse::Private, vcpus);
    let top = memory_file(0);
    restore(&mut second, &disk, &state, None, None, &top, &[]);
    second.done(Request::Run, &[]);
    let after = second.until("a tick after its restore", |_| true);
    assert!((before..=before + 20).contains(&after), "the count went from {before} to {after}");
    let mut stream = second.dial();
    echo(&mut stream, b"from the second");
    println!("OUTER ECHO");
    second.until("five more ticks", |n| n >= before + 5);

    // A save that is cancelled, then one that is taken back, then one that counts.
    second.done(Request::Pause, &[]);
    let files = [memory_file(0), memory_file(0), memory_file(0)];
    let save = second.say(DIFFERENCE, &[files[0].as_fd(), files[1].as_fd(), memory.as_fd(), files[2].as_fd()]);
    let cancel = second.say(Request::Cancel, &[]);
    match second.answer(save).0 {
        Reply::Failed { fault: Fault::Cancelled, why } => println!("OUTER CANCELLED {why}"),
        Reply::Saved(_) => println!("OUTER CANCELLED too late"),
        other => panic!("{other:?}"),
    }
    second.answer(cancel);
    second.done(Request::Run, &[]);
    echo(&mut stream, b"after a cancelled save");
    second.done(Request::Pause, &[]);
    second.save(&memory);
    second.done(Request::Run, &[]);
    echo(&mut stream, b"after a save that was taken back");
    second.done(Request::Pause, &[]);
    let before = second.until("a tick", |_| true);
    let (difference, saved, ends) = second.save(&memory);
    println!("OUTER SUSPENDED {:?} {:?} {:?}", saved.memory, saved.streams, saved.phases_us);
    let parked: Vec<_> = saved.streams.into_iter().zip(ends).collect();
    assert_eq!(parked.len(), 1, "one stream is open");
    second.quit();

    // It wakes; the client has written meanwhile.
    stream.write_all(b"while it slept").expect("writing to a parked stream");
    let mut third = Vmm::start("third", &memory, MemoryUse::Private, vcpus);
    restore(&mut third, &disk, &difference.state, Some(&difference.memory), Some((&top, &difference.map)), &memory_file(0), &parked);
    drop(parked);
    third.done(Request::Run, &[]);
    let mut back = [0; 14];
    stream.read_exact(&mut back).expect("the answer to what was written while it slept");
    assert_eq!(&back, b"while it slept");
    let after = third.until("a tick after its second restore", |_| true);
    assert!((before..=before + 20).contains(&after), "the count went from {before} to {after}");
    echo(&mut stream, &[b'x'; 100_000]);
    third.until("five more ticks", |n| n >= before + 5);
    third.done(Request::Pause, &[]);
    third.save(&memory);
    println!("OUTER USAGE {:?}", third.ask(Request::Usage, &[]).0);
    third.quit();
    println!("OUTER DONE");
}
