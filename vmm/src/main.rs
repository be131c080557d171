//! `dormouse-vmm`: arguments, sockets, jail, event loop.
//!
//! The process is two: the one that the node started, which waits and knows nothing, and its child, which is the VMM.

#![deny(unsafe_code)]

use std::{
    ffi::OsString,
    fs,
    io::{self, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    process::ExitCode,
};

use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::{chdir, umask},
};
use vmm::{
    arguments::{self, Cgroup, Command, Serve},
    control::{Parts, Server},
    jail::{self, ProcessFiles, Report, descriptors, namespaces, privileges, seccomp, supervisor},
    kvm::probe,
    log,
};
use vmm_protocol::control::{CONTROL_SOCKET, VSOCK_SOCKET};

/// Connections that may wait for `accept`. On `control` one is served at a time; on `vsock` the node dials in bursts.
const CONTROL_BACKLOG: i32 = 4;
const VSOCK_BACKLOG: i32 = 128;
/// Of a command line that makes no sense (`EX_USAGE`).
const EXIT_USAGE: u8 = 64;
/// Of a panic, as everywhere in Rust.
const EXIT_PANIC: i32 = 101;

fn main() -> ExitCode {
    match arguments::parse(std::env::args_os().skip(1).collect::<Vec<OsString>>()) {
        Ok(Command::Help) => {
            print!("{}", arguments::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("dormouse-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Command::Probe) => {
            println!("{}", probe::probe().to_json());
            ExitCode::SUCCESS
        }
        Ok(Command::Serve(serve)) => match run(&serve) {
            // Nothing is unwound: the kernel is faster, and what matters is synced already.
            Ok(()) => supervisor::exit(0),
            Err(error) => {
                log::line(&format!("error: {error:#}"));
                supervisor::exit(1)
            }
        },
        Err(why) => {
            // If it cannot be written, the exit code still says it.
            let _ = write!(io::stderr(), "dormouse-vmm: {why}\n\n{}", arguments::USAGE);
            ExitCode::from(EXIT_USAGE)
        }
    }
}

#[expect(unsafe_code, reason = "closing what was inherited, which nobody but main can vouch for")]
fn run(serve: &Serve) -> Result<(), Failure> {
    log::to_stderr();
    std::panic::set_hook(Box::new(|panic| {
        // Any thread's: a machine with a dead thread is no machine. Not `abort`, whose signal the first process of a pid
        // namespace ignores.
        log::line(&format!("error: the VMM has a bug and ends: {panic}"));
        supervisor::exit(EXIT_PANIC);
    }));
    let kept = match serve.cgroup {
        Some(Cgroup::Descriptor(descriptor)) => Some(descriptor),
        _ => None,
    };
    // SAFETY: the first thing that is done; nothing has opened a descriptor yet.
    unsafe { descriptors::close_others(kept)? };
    descriptors::silence_stdin()?;
    join(serve.cgroup.as_ref())?;

    // Sockets are made for the user that started us, and nobody else.
    umask(Mode::RWXG | Mode::RWXO);
    // A socket address holds 108 bytes, and the directory's name may be longer.
    chdir(&serve.dir).map_err(|error| failure(format!("entering {}", serve.dir.display()), error))?;
    let control = bound(CONTROL_SOCKET, SocketType::SEQPACKET, CONTROL_BACKLOG)?;
    let vsock = bound(VSOCK_SOCKET, SocketType::STREAM, VSOCK_BACKLOG)?;

    // Finds the kernel's clock page, once for the process; later that would be a forbidden call.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let mut report = Report::default();
    let (uid, gid) = serve.user(std::process::id());
    privileges::become_user(uid, gid, &mut report)?;
    namespaces::unshare(&mut report)?;
    seccomp::set_mode(serve.seccomp);
    let parent = supervisor::fork()?;

    // The child. Its own files of /proc, before the root goes.
    let process_files = ProcessFiles::open().map_err(|error| failure("opening files of /proc/self", error))?;
    jail::enter(&mut report)?;
    parent.bind()?;
    report.tell(&serve.required)?;
    let parts = Parts { vsock: vsock.into(), process_files, confine: seccomp::confine() };
    let server = Server::new(control, parts).map_err(|error| failure("making the event loop", error))?;
    server.serve().map_err(|error| failure("the event loop", error))
}

/// What could not be done at the start, and the kernel's reason.
type Failure = Box<dyn std::error::Error>;

fn failure(doing: impl std::fmt::Display, error: impl std::fmt::Display) -> Failure {
    format!("{doing} failed: {error}").into()
}

#[expect(unsafe_code, reason = "see `run`")]
fn join(cgroup: Option<&Cgroup>) -> Result<(), Failure> {
    let dir = match cgroup {
        None => return Ok(()),
        Some(Cgroup::Path(path)) => path.clone(),
        Some(Cgroup::Descriptor(number)) => PathBuf::from(format!("/proc/self/fd/{number}")),
    };
    // 0 is whoever writes it.
    let procs = dir.join("cgroup.procs");
    // Opened, not created: a name that is no cgroup's is an error.
    let opened = fs::OpenOptions::new().write(true).open(&procs);
    opened.and_then(|mut file| file.write_all(b"0")).map_err(|error| failure(format!("joining the cgroup at {}", procs.display()), error))?;
    // SAFETY: the number was the node's and nothing here owns it; the file above is closed.
    unsafe { descriptors::close_others(None)? };
    Ok(())
}

/// A listening socket in the working directory. It does not wait.
fn bound(name: &str, kind: SocketType, backlog: i32) -> Result<OwnedFd, Failure> {
    let made = || -> rustix::io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        bind(&socket, &SocketAddrUnix::new(name)?)?;
        listen(&socket, backlog)?;
        Ok(socket)
    };
    made().map_err(|error| failure(format!("making the socket {name:?}"), error))
}
