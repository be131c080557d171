//! The system calls that no safe wrapper covers. The only unsafe code of the agent.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    net::{AddressFamily, SocketFlags, SocketType},
    process::{Gid, Pid, Resource, Rlimit, Uid},
    thread::{LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Ends the guest.
pub(crate) fn power_off() -> ! {
    loop {
        // Fails only without the privilege, which PID 1 of the machine has. The kernel panics if PID 1 returns.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}

/// Sets the loopback interface up; the kernel gives it 127.0.0.1 and ::1.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all zeros is a valid ifreq: it consists of integers and byte arrays, and a null pointer in its union.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is, and it outlives the call; its name ends with a NUL.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })
}

/// Mixes `entropy` in, counts every bit of it, and makes the kernel draw a new key from it at once.
pub(crate) fn reseed(entropy: &[u8; 64]) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h with its buffer.
    #[repr(C)]
    struct PoolInfo {
        entropy_count_bits: libc::c_int,
        buf_size_bytes: libc::c_int,
        buf: [u8; 64],
    }
    /// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)`; the same on x86_64 and aarch64.
    const RNDADDENTROPY: u32 = 0x4008_5203;
    const RNDRESEEDCRNG: u32 = 0x5207;

    let random = std::fs::File::open("/dev/urandom")?;
    let pool = PoolInfo { entropy_count_bits: 512, buf_size_bytes: 64, buf: *entropy };
    // SAFETY: RNDADDENTROPY reads two ints and then buf_size_bytes bytes; `pool` has exactly that layout (repr(C), no
    // padding) and outlives the call.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &pool) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) })
}

/// A descriptor whose readability the runtime watches.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and names the same description for as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// A descriptor whose readiness for both directions the runtime watches.
pub(crate) fn watch_both(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and names the same description for as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) }?)
}

const VSOCK_ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn vsock_address() -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid sockaddr_vm: it consists of integers and byte arrays.
    unsafe { std::mem::zeroed() }
}

/// A socket that listens on a vsock port of this guest and does not block.
pub(crate) fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let mut address = vsock_address();
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    // SAFETY: bind reads VSOCK_ADDRESS_BYTES bytes, the size of `address`, which outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_BYTES) })?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// The next connection of such a socket, which does not block either, and the context id that it comes from.
pub(crate) fn accept_vsock(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let mut address = vsock_address();
    let mut address_bytes = VSOCK_ADDRESS_BYTES;
    // SAFETY: accept4 writes at most `address_bytes` bytes, the size of `address`, and both outlive the call.
    let accepted = unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &mut address_bytes, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)
    };
    check(accepted)?;
    // SAFETY: accept4 has just made the descriptor, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(accepted) };
    if address_bytes < VSOCK_ADDRESS_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((socket, address.svm_cid))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a process becomes.
pub(crate) enum Role {
    /// The app: PID 1 of a PID namespace, with mounts and a view of the cgroups of its own.
    App {
        stdin: OwnedFd,
        /// Becomes stdout and stderr.
        output: OwnedFd,
    },
    /// The leader of a session on a terminal, in the app's namespaces.
    Shell {
        /// A pidfd of the app.
        app: OwnedFd,
        terminal: OwnedFd,
    },
}

/// Everything the process needs, made before it is born: between birth and exec it must not allocate.
pub(crate) struct Launch {
    pub role: Role,
    /// Programs to try, in order.
    pub candidates: Vec<CString>,
    pub argv: Vec<CString>,
    /// `KEY=value`.
    pub env: Vec<CString>,
    pub workdir: CString,
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
    /// Closed by the exec; gets a [`Failure`] if there is none.
    pub failure: OwnedFd,
    pub cgroup: OwnedFd,
    pub nofile: Rlimit,
}

/// What a process that could not become the app was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Namespaces = 1,
    Limits,
    Workdir,
    User,
    Exec,
}

/// Five bytes through the failure pipe: a [`Step`] and an errno.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failure {
    pub step: Step,
    pub errno: i32,
}

impl Failure {
    pub const BYTES: usize = 5;

    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (&step, errno) = bytes.split_first()?;
        let step = [Step::Namespaces, Step::Limits, Step::Workdir, Step::User, Step::Exec].into_iter().find(|known| *known as u8 == step)?;
        Some(Self { step, errno: i32::from_ne_bytes(errno.try_into().ok()?) })
    }

    fn bytes(self) -> [u8; Self::BYTES] {
        let [a, b, c, d] = self.errno.to_ne_bytes();
        [self.step as u8, a, b, c, d]
    }
}

/// Starts a process, born in its cgroup and in its PID namespace.
pub(crate) fn launch(launch: &Launch) -> io::Result<Pid> {
    let flags = match &launch.role {
        Role::App { .. } => libc::CLONE_NEWPID | libc::CLONE_NEWNS,
        Role::Shell { app, .. } => {
            // From here on children of this thread are born in the app's PID namespace; it stays where it is itself.
            let own = std::fs::File::open("/proc/self/ns/pid")?;
            move_into_thread_name_spaces(app.as_fd(), ThreadNameSpaceType::PROCESS_ID)?;
            let pid = clone(launch, 0);
            move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
            return pid;
        }
    };
    clone(launch, flags)
}

fn clone(launch: &Launch, namespaces: libc::c_int) -> io::Result<Pid> {
    let argv = pointers(&launch.argv);
    let env = pointers(&launch.env);
    let args = CloneArgs {
        flags: namespaces as u64 | CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: launch.cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: `args` has the layout and size of the kernel's clone_args and outlives the call. Without CLONE_VM and with
    // no stack this is a fork: the child goes on here in a copy of this address space. The agent has one thread, so no
    // lock is held by a thread that the child lacks; besides, the child allocates nothing and ends in exec or _exit.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<CloneArgs>()) };
    match pid {
        0 => {
            let Err(failure) = become_program(launch, &argv, &env);
            let _ = rustix::io::write(&launch.failure, &failure.bytes());
            // SAFETY: ends this process without running anything of the parent's.
            unsafe { libc::_exit(127) }
        }
        pid if pid > 0 => Ok(Pid::from_raw(pid as i32).expect("a positive number is a process id")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct clone_args` of linux/sched.h, version 2 (Linux 5.7).
#[derive(Default)]
#[repr(C)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Runs in the new process: system calls only, no allocation.
fn become_program(launch: &Launch, argv: &[*const libc::c_char], env: &[*const libc::c_char]) -> Result<Infallible, Failure> {
    let at = |step| move |error: rustix::io::Errno| Failure { step, errno: error.raw_os_error() };
    match &launch.role {
        Role::App { .. } => namespaces(),
        Role::Shell { app, .. } => move_into_thread_name_spaces(app.as_fd(), ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::CONTROL_GROUP),
    }
    .map_err(at(Step::Namespaces))?;
    limits(launch).map_err(at(Step::Limits))?;
    // Before the user is changed, as in Docker: the directory may be closed to the user.
    rustix::process::chdir(launch.workdir.as_c_str()).map_err(at(Step::Workdir))?;
    user(launch).map_err(at(Step::User))?;
    Err(Failure { step: Step::Exec, errno: exec(&launch.candidates, argv, env) })
}

fn namespaces() -> rustix::io::Result<()> {
    // In the app's cgroup already, so that this cgroup becomes the root the app sees; it cannot leave what it cannot name.
    // SAFETY: CLONE_NEWCGROUP changes what this process sees of the cgroups; nothing in this process depends on it.
    if unsafe { libc::unshare(libc::CLONE_NEWCGROUP) } < 0 {
        return Err(last_errno());
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount(c"proc", c"/proc", c"proc", flags, None)?;
    // The kernel refuses the same file system twice in one place.
    unmount(c"/sys/fs/cgroup", UnmountFlags::DETACH)?;
    mount(c"cgroup2", c"/sys/fs/cgroup", c"cgroup2", flags, None)
}

fn limits(launch: &Launch) -> rustix::io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::setrlimit(Resource::Nofile, launch.nofile)?;
    // The agent's own protection from the OOM killer is inherited; the app has none.
    let score = rustix::fs::open(c"/proc/self/oom_score_adj", rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    rustix::io::write(&score, b"0")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let standard = match &launch.role {
        Role::App { stdin, output } => [stdin, output, output],
        Role::Shell { terminal, .. } => {
            rustix::process::ioctl_tiocsctty(terminal)?;
            [terminal, terminal, terminal]
        }
    };
    for (from, to) in standard.into_iter().zip(0..) {
        // SAFETY: both are numbers of this process's own descriptors; 0, 1 and 2 are the console, which the app does not get.
        if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
            return Err(last_errno());
        }
    }
    // SAFETY: restores the default action of SIGPIPE, which Rust's runtime ignores and exec would pass on; all zeros is a
    // valid sigset_t, the empty set.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
    Ok(())
}

fn user(launch: &Launch) -> rustix::io::Result<()> {
    // "Thread" is right: it is the plain system call, and this process has one thread.
    rustix::thread::set_thread_groups(&launch.groups)?;
    rustix::thread::set_thread_res_gid(launch.gid, launch.gid, launch.gid)?;
    rustix::thread::set_thread_res_uid(launch.uid, launch.uid, launch.uid)
}

/// Tries each candidate; answers why the last one that exists (or any) could not be run.
fn exec(candidates: &[CString], argv: &[*const libc::c_char], env: &[*const libc::c_char]) -> i32 {
    let mut worst = libc::ENOENT;
    for candidate in candidates {
        let candidate: &CStr = candidate;
        // SAFETY: the path and every string of the two null-terminated arrays live in the parent's `Launch`, of which this
        // process has a copy until the call succeeds.
        unsafe { libc::execve(candidate.as_ptr(), argv.as_ptr(), env.as_ptr()) };
        match last_errno().raw_os_error() {
            libc::ENOENT | libc::ENOTDIR => {}
            errno => worst = errno,
        }
    }
    worst
}

fn last_errno() -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)
}
