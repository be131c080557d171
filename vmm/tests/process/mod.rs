//! A `dormouse-vmm` process as a node sees it, for tests: started, spoken to over its control socket, looked at in `/proc`.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod elf;
pub mod guest;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use tempfile::TempDir;
use vmm_protocol::control::{CONTROL_SOCKET, Fault, FromVmm, MemoryUse, PacketError, Reply, Request, Saved, ToVmm, VERSION, receive, send};

/// Far more than anything here takes; a test that reaches it fails.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `look` answers; fails with `what` at the ceiling.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "never seen: {what}");
        std::thread::yield_now();
    }
}

/// A running process. Dropping it kills it.
pub struct Process {
    child: Child,
    pub dir: TempDir,
    /// See `examples/syscalls.rs`.
    tracer: Option<Child>,
}

/// Attaches strace to the jailed process, if the environment says where the trace is to go.
fn trace(inner: impl FnOnce() -> u32) -> Option<Child> {
    let dir = PathBuf::from(std::env::var_os("DORMOUSE_TRACE")?);
    fs::create_dir_all(&dir).unwrap();
    let pid = inner().to_string();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-n", "--decode-pids=comm", "-e", "raw=all", "-o"]).arg(dir.join(&pid)).args(["-p", &pid]).stderr(Stdio::piped());
    let mut strace = strace.spawn().expect("strace is installed");
    // Its first word is that it has attached.
    let mut said = [0; 1];
    strace.stderr.as_mut().unwrap().read_exact(&mut said).expect("strace may attach");
    Some(strace)
}

impl Process {
    pub fn start() -> Self {
        Self::start_with(&[], |_| {})
    }

    pub fn start_with(arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let program = std::env::var_os("DORMOUSE_VMM").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_dormouse-vmm")), PathBuf::from);
        let mut command = Command::new(program);
        command.arg("--dir").arg(dir.path()).arg("--name").arg(format!("dormouse:{}", dir.path().display())).args(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        prepare(&mut command);
        let mut process = Self { child: command.spawn().unwrap(), dir, tracer: None };
        process.tracer = trace(|| {
            eventually("the jail", || process.log().contains("in its jail").then_some(()));
            process.inner_pid()
        });
        process
    }

    /// The process that was started; it waits for the other.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The jailed one.
    pub fn inner_pid(&self) -> u32 {
        let pid = self.pid();
        eventually("the child of the process", || {
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.split_ascii_whitespace().next()?.parse().ok()
        })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn socket(&self, name: &str, kind: SocketType) -> OwnedFd {
        let address = SocketAddrUnix::new(self.dir.path().join(name)).unwrap();
        eventually("a socket that takes connections", || {
            let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
            connect(&socket, &address).is_ok().then_some(socket)
        })
    }

    pub fn connect(&self) -> Node {
        let socket = self.socket(CONTROL_SOCKET, SocketType::SEQPACKET);
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT)).unwrap();
        Node { socket, next: 1, events: Vec::new() }
    }

    /// Waits until it has ended, and says how and with which log.
    pub fn ended(mut self) -> (ExitStatus, String) {
        let status = eventually("the end of the process", || self.child.try_wait().unwrap());
        let log = self.log();
        (status, log)
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(tracer) = &mut self.tracer {
            let _ = tracer.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of the process:\n{}", self.log());
        }
    }
}

/// The node's end of the control connection.
pub struct Node {
    pub socket: OwnedFd,
    next: u64,
    /// Heard while waiting for an answer.
    pub events: Vec<FromVmm>,
}

impl Node {
    /// Asks without waiting; answers the id.
    pub fn say(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next;
        self.next += 1;
        send(&self.socket, &ToVmm { id, request }, descriptors).unwrap();
        id
    }

    pub fn hear(&mut self) -> Result<(FromVmm, Vec<OwnedFd>), PacketError> {
        receive(&self.socket)
    }

    /// The answer to `id`.
    pub fn answer(&mut self, id: u64) -> (Reply, Vec<OwnedFd>) {
        loop {
            match self.hear().unwrap() {
                (FromVmm::Reply { id: of, reply }, descriptors) if of == id => return (reply, descriptors),
                (other, _) => self.events.push(other),
            }
        }
    }

    pub fn ask(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Reply {
        let id = self.say(request, descriptors);
        self.answer(id).0
    }

    pub fn done(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) {
        let name = format!("{request:?}");
        match self.ask(request, descriptors) {
            Reply::Done { .. } => {}
            other => panic!("{name}: {other:?}"),
        }
    }

    pub fn saved(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Saved {
        match self.ask(request, descriptors) {
            Reply::Saved(saved) => saved,
            other => panic!("{other:?}"),
        }
    }

    /// The sentence of a refusal.
    pub fn refused(&mut self, request: Request, descriptors: &[BorrowedFd<'_>], wanted: Fault) -> String {
        let name = format!("{request:?}");
        match self.ask(request, descriptors) {
            Reply::Failed { fault, why } if fault == wanted => why,
            other => panic!("{name}: {other:?}"),
        }
    }

    pub fn console(&mut self) -> String {
        match self.ask(Request::Console, &[]) {
            Reply::Console { text } => text,
            other => panic!("{other:?}"),
        }
    }
}

/// Files of one machine.
pub struct Files {
    pub dir: TempDir,
}

pub const MEMORY_BYTES: u64 = 32 << 20;
pub const DISK_BYTES: u64 = 1 << 20;

impl Files {
    pub fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.sized("memory", MEMORY_BYTES);
        files.sized("disk", DISK_BYTES);
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new file of that length.
    pub fn sized(&self, name: &str, bytes: u64) -> File {
        let file = self.empty(name);
        file.set_len(bytes).unwrap();
        file
    }

    /// A new empty file, to read and write.
    pub fn empty(&self, name: &str) -> File {
        File::options().read(true).write(true).create(true).truncate(true).open(self.path(name)).unwrap()
    }

    pub fn filled(&self, name: &str, bytes: &[u8]) -> File {
        self.empty(name).write_all(bytes).unwrap();
        self.read(name)
    }

    pub fn read(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }

    pub fn both(&self, name: &str) -> File {
        File::options().read(true).write(true).open(self.path(name)).unwrap()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.read(name).read_to_end(&mut bytes).unwrap();
        bytes
    }
}

pub fn kvm() -> File {
    File::options().read(true).write(true).open("/dev/kvm").unwrap()
}

/// Says so, loudly, where it cannot be used.
pub fn has_kvm() -> bool {
    let has = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !has {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: /dev/kvm cannot be opened here\n"));
    }
    has
}

pub fn prepare(memory: MemoryUse) -> Request {
    Request::Prepare { version: VERSION, vcpus: 1, memory_bytes: MEMORY_BYTES, memory, disk_bytes: DISK_BYTES, net: None }
}

/// A process with a machine in it.
pub fn prepared(files: &Files, memory: MemoryUse) -> (Process, Node) {
    prepared_with(&[], files, memory)
}

pub fn prepared_with(arguments: &[&str], files: &Files, memory: MemoryUse) -> (Process, Node) {
    let process = Process::start_with(arguments, |_| {});
    let mut node = process.connect();
    let file = match memory {
        MemoryUse::Shared => files.both("memory"),
        MemoryUse::Private => files.read("memory"),
    };
    node.done(prepare(memory), &[kvm().as_fd(), file.as_fd()]);
    (process, node)
}

/// A process whose guest was booted from `kernel`, and runs.
pub fn booted(files: &Files, kernel: &[u8]) -> (Process, Node) {
    let (process, mut node) = prepared(files, MemoryUse::Shared);
    let (kernel, initramfs) = (files.filled("kernel", kernel), files.filled("initramfs", b"nothing"));
    node.done(Request::Boot { cmdline: "quiet".to_owned() }, &[kernel.as_fd(), initramfs.as_fd(), files.both("disk").as_fd()]);
    (process, node)
}

/// A line of `/proc/<pid>/status`.
pub fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

pub fn namespace(pid: u32, kind: &str) -> PathBuf {
    fs::read_link(Path::new("/proc").join(pid.to_string()).join("ns").join(kind)).unwrap()
}

pub fn killed_by(status: ExitStatus) -> Option<i32> {
    // The process that was started ends with 128 + signal when the other was killed.
    status.signal().or_else(|| status.code().filter(|code| *code > 128).map(|code| code - 128))
}
