//! The system calls that no safe wrapper covers. The only unsafe code of the agent.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use model::Capabilities;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount},
    net::{AddressFamily, SocketFlags, SocketType},
    process::{Gid, Pid, Resource, Rlimit, Uid},
    thread::{
        CapabilitySet, LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces, remove_capability_from_bounding_set,
    },
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

/// How far a TCP socket has come (`struct tcp_info` of linux/tcp.h).
pub(crate) struct TcpProgress {
    /// As in include/net/tcp_states.h.
    pub state: u8,
    /// Of the bytes that were sent, and the SYN that was, how many the other end's kernel has taken.
    pub acked: u64,
}

/// What the kernel says of a TCP socket. Changes nothing about it, and takes no error away.
pub(crate) fn tcp_progress(socket: &impl AsFd) -> io::Result<TcpProgress> {
    /// Up to tcpi_bytes_acked, which stands at 120.
    const BYTES: usize = 128;
    let mut info = [0_u8; BYTES];
    let mut length = BYTES as libc::socklen_t;
    // SAFETY: getsockopt writes at most `length` bytes, the size of `info`, and both outlive the call.
    check(unsafe { libc::getsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut length) })?;
    let acked = info.last_chunk().filter(|_| length as usize == BYTES).ok_or(io::ErrorKind::Unsupported)?;
    Ok(TcpProgress { state: info[0], acked: u64::from_ne_bytes(*acked) })
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

/// Makes one IPv4 address, or every one, one of this machine's, or not any more: `ip route replace local 0.0.0.0/0 dev lo`.
pub(crate) fn route_to_loopback(only: Option<Ipv4Addr>, on: bool) -> io::Result<()> {
    // linux/rtnetlink.h: a header, a struct rtmsg, and one attribute, all in the machine's byte order.
    const RTM_NEWROUTE: u16 = 24;
    const RTM_DELROUTE: u16 = 25;
    const REQUEST_ACK: u16 = 0x1 | 0x4;
    const CREATE_REPLACE: u16 = 0x400 | 0x100;
    const RT_TABLE_LOCAL: u8 = 255;
    const RTPROT_STATIC: u8 = 4;
    const RT_SCOPE_HOST: u8 = 254;
    const RTN_LOCAL: u8 = 2;
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const NLMSG_ERROR: u16 = 2;
    /// Of the loopback interface, in every network namespace.
    const LOOPBACK: u32 = 1;
    let (kind, flags) = if on { (RTM_NEWROUTE, REQUEST_ACK | CREATE_REPLACE) } else { (RTM_DELROUTE, REQUEST_ACK) };
    let (length, prefix_bits) = if only.is_some() { (44_u32, 32) } else { (36, 0) };
    let mut message = Vec::with_capacity(44);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([libc::AF_INET as u8, prefix_bits, 0, 0, RT_TABLE_LOCAL, RTPROT_STATIC, RT_SCOPE_HOST, RTN_LOCAL]);
    message.extend([0; 4]);
    message.extend(8_u16.to_ne_bytes());
    message.extend(RTA_OIF.to_ne_bytes());
    message.extend(LOOPBACK.to_ne_bytes());
    if let Some(address) = only {
        message.extend(8_u16.to_ne_bytes());
        message.extend(RTA_DST.to_ne_bytes());
        message.extend(address.octets());
    }
    // NETLINK_ROUTE is the protocol 0.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::send(&socket, &message, rustix::net::SendFlags::empty())?;
    let mut answer = [0; 256];
    let (read, _) = rustix::net::recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty())?;
    let answer = &answer[..read];
    let word = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    if answer.get(4..6) != Some(&NLMSG_ERROR.to_ne_bytes()) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match word(16) {
        Some(0) => Ok(()),
        Some(error) if !on && -error == libc::ESRCH => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Leads every TCP connection over IPv4 to one listener, whatever its port, but for those to 127.0.0.0/8. Ends with its drop.
pub(crate) struct SkLookup {
    _link: OwnedFd,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    op: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl SkLookup {
    /// For this network namespace.
    pub fn attach(listener: &std::net::TcpListener) -> io::Result<Self> {
        /// linux/bpf.h: commands, and what is made.
        const MAP_CREATE: libc::c_int = 0;
        const MAP_UPDATE_ELEM: libc::c_int = 2;
        const PROG_LOAD: libc::c_int = 5;
        const LINK_CREATE: libc::c_int = 28;
        const MAP_TYPE_SOCKMAP: u32 = 15;
        const PROG_TYPE_SK_LOOKUP: u32 = 30;
        const ATTACH_SK_LOOKUP: u32 = 36;

        #[repr(C)]
        struct CreateMap {
            kind: u32,
            key_bytes: u32,
            value_bytes: u32,
            entries: u32,
            flags: u32,
        }
        let map = bpf(MAP_CREATE, &CreateMap { kind: MAP_TYPE_SOCKMAP, key_bytes: 4, value_bytes: 8, entries: 1, flags: 0 })?;
        let map = owned(map);

        #[repr(C)]
        struct LoadProgram {
            kind: u32,
            instructions: u32,
            code: u64,
            license: u64,
            log_level: u32,
            log_bytes: u32,
            log: u64,
            kernel: u32,
            flags: u32,
            name: [u8; 16],
            interface: u32,
            attach_kind: u32,
        }
        let code = lookup_program(map.as_raw_fd());
        let load = LoadProgram {
            kind: PROG_TYPE_SK_LOOKUP,
            instructions: code.len() as u32,
            code: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_bytes: 0,
            log: 0,
            kernel: 0,
            flags: 0,
            name: *b"egress\0\0\0\0\0\0\0\0\0\0",
            interface: 0,
            attach_kind: ATTACH_SK_LOOKUP,
        };
        let program = owned(bpf(PROG_LOAD, &load)?);

        #[repr(C)]
        struct Update {
            map: u32,
            _padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let (key, value) = (0_u32, listener.as_raw_fd() as u64);
        bpf(MAP_UPDATE_ELEM, &Update { map: map.as_raw_fd() as u32, _padding: 0, key: (&raw const key) as u64, value: (&raw const value) as u64, flags: 0 })?;

        #[repr(C)]
        struct CreateLink {
            program: u32,
            target: u32,
            attach_kind: u32,
            flags: u32,
        }
        let namespace = std::fs::File::open("/proc/self/ns/net")?;
        let link = CreateLink { program: program.as_raw_fd() as u32, target: namespace.as_raw_fd() as u32, attach_kind: ATTACH_SK_LOOKUP, flags: 0 };
        Ok(Self { _link: owned(bpf(LINK_CREATE, &link)?) })
    }
}

/// bpf(2). Every attribute type here is plain numbers without padding that is not named; those that are addresses lead to what
/// the caller keeps for the call.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads size_of::<T>() bytes at the pointer, and what the attributes point to; the only memory it would
    // write is a log, and none is asked for.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: bpf(2) has just made the descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The program. In C:
///
/// ```text
/// if (ctx->family == AF_INET && ctx->protocol == IPPROTO_TCP && first octet of ctx->local_ip4 != 127) {
///     sk = bpf_map_lookup_elem(&map, &0);
///     if (sk) { bpf_sk_assign(ctx, sk, 0); bpf_sk_release(sk); }
/// }
/// return SK_PASS;
/// ```
fn lookup_program(map: libc::c_int) -> Vec<Instruction> {
    // Classes, modes and operations of linux/bpf.h and linux/bpf_common.h, as far as used.
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x62;
    const LOAD_MAP: u8 = 0x18;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const AND: u8 = 0x57;
    const UNLESS_EQUAL: u8 = 0x55;
    const IF_EQUAL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const FROM_MAP_FD: u8 = 1;
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const SK_PASS: i32 = 1;
    // Of struct bpf_sk_lookup.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    let new = |op, destination: u8, source: u8, offset, immediate| Instruction { op, registers: destination | source << 4, offset, immediate };
    /// Stands for the way to the end until it is known.
    const TO_THE_END: i16 = i16::MAX;
    let mut program = vec![
        new(MOVE, 6, 1, 0, 0),
        new(LOAD_WORD, 2, 6, FAMILY, 0),
        new(UNLESS_EQUAL, 2, 0, TO_THE_END, libc::AF_INET),
        new(LOAD_WORD, 2, 6, PROTOCOL, 0),
        new(UNLESS_EQUAL, 2, 0, TO_THE_END, libc::IPPROTO_TCP),
        // In the order of the network: the first octet is the lowest.
        new(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        new(AND, 2, 0, 0, 0xff),
        new(IF_EQUAL, 2, 0, TO_THE_END, 127),
        new(STORE_WORD, 10, 0, -4, 0),
        new(LOAD_MAP, 1, FROM_MAP_FD, 0, map),
        new(0, 0, 0, 0, 0),
        new(MOVE, 2, 10, 0, 0),
        new(ADD, 2, 0, 0, -4),
        new(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        new(IF_EQUAL, 0, 0, TO_THE_END, 0),
        new(MOVE, 7, 0, 0, 0),
        new(MOVE, 1, 6, 0, 0),
        new(MOVE, 2, 7, 0, 0),
        new(SET, 3, 0, 0, 0),
        new(CALL, 0, 0, 0, SK_ASSIGN),
        new(MOVE, 1, 7, 0, 0),
        new(CALL, 0, 0, 0, SK_RELEASE),
        new(SET, 0, 0, 0, SK_PASS),
        new(EXIT, 0, 0, 0, 0),
    ];
    let end = program.len() as i16 - 2;
    for (at, instruction) in (0..).zip(&mut program) {
        if instruction.offset == TO_THE_END {
            instruction.offset = end - at - 1;
        }
    }
    program
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
    pub capabilities: Capabilities,
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
        Role::App { .. } => namespaces(launch.capabilities),
        Role::Shell { app, .. } => move_into_thread_name_spaces(app.as_fd(), ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::CONTROL_GROUP),
    }
    .map_err(at(Step::Namespaces))?;
    limits(launch).map_err(at(Step::Limits))?;
    // Before the user is changed, as in Docker: the directory may be closed to the user.
    rustix::process::chdir(launch.workdir.as_c_str()).map_err(at(Step::Workdir))?;
    user(launch).map_err(at(Step::User))?;
    Err(Failure { step: Step::Exec, errno: exec(&launch.candidates, argv, env) })
}

fn namespaces(capabilities: Capabilities) -> rustix::io::Result<()> {
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
    mount(c"cgroup2", c"/sys/fs/cgroup", c"cgroup2", flags, None)?;
    match capabilities {
        Capabilities::All => Ok(()),
        // As Docker has it: a root without the capabilities could still write there what its files' modes allow.
        Capabilities::Usual => mount_remount(c"/sys/fs/cgroup", flags | MountFlags::BIND | MountFlags::RDONLY, c""),
    }
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

/// What root may do (capabilities(7)): the fourteen of Docker's default, `a80425fb`.
const USUAL: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::SETFCAP);

/// Gives up for ever what is not given. What remains becomes root's by the exec, which looks at this set.
fn bound(capabilities: Capabilities) -> rustix::io::Result<()> {
    if capabilities == Capabilities::All {
        return Ok(());
    }
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if USUAL.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn user(launch: &Launch) -> rustix::io::Result<()> {
    bound(launch.capabilities)?;
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
