//! PID 1 of the outer guest of `tests/nested.rs`: mounts, loads modules, runs `/bin/conformance`, says how it ended, powers
//! off. One file without crates, so that the compiler alone builds it.

use std::{
    ffi::{CString, c_char, c_int, c_long, c_ulong, c_void},
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

// SAFETY: declarations of libc, which the standard library links statically for musl.
unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn chroot(path: *const c_char) -> c_int;
    fn reboot(how: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_int, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
}

const SYS_FINIT_MODULE: c_long = 313;
const MS_MOVE: c_ulong = 8192;
const SIOCSIFFLAGS: c_int = 0x8914;
const IFF_UP: u8 = 1;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const DISK: &str = "/dev/vda";
const ROOT: &str = "/newroot";
const TRACING: &str = "/sys/kernel/tracing";
/// How many of the last lines of KVM's trace are shown.
const TRACE_LINES: usize = 400;

fn check(result: c_long, doing: &str) {
    if result < 0 {
        panic!("{doing}: {}", io::Error::last_os_error());
    }
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn mount_on(source: &str, target: &str, kind: &str, flags: c_ulong) {
    let (source, target_c, kind) = (c(source), c(target), c(kind));
    // SAFETY: three strings that live through the call; no data.
    let result = unsafe { mount(source.as_ptr(), target_c.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    check(result.into(), &format!("mounting {target}"));
}

/// Loads the modules that `order` in the directory lists.
fn load(dir: &str) {
    for name in fs::read_to_string(format!("{dir}/order")).unwrap().lines() {
        let file = File::open(format!("{dir}/{name}")).unwrap();
        // SAFETY: an open descriptor, an empty string, no flags.
        let result = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
        check(result, &format!("loading {name}"));
    }
}

/// Switches the loopback interface on (netdevice(7)); a fresh kernel has it off.
fn loopback_up() {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // A `struct ifreq`: a name of 16 bytes, then a union, here of flags.
    let mut what = [0_u8; 40];
    what[..2].copy_from_slice(b"lo");
    what[16] = IFF_UP;
    // SAFETY: it reads a `struct ifreq` at the pointer, which has the length of the array.
    check(unsafe { ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, what.as_mut_ptr()) }.into(), "switching the loopback interface on");
}

/// KVM writes down what its guests do, in memory, until one of them ends by a triple fault (SVM's exit 0x7f): after that
/// the vCPU is reset, and nothing else tells what led to it. A kernel that cannot runs the checks without.
fn trace_until_triple_fault() -> std::io::Result<()> {
    mount_on("tracefs", TRACING, "tracefs", 0);
    fs::write(format!("{TRACING}/buffer_size_kb"), "4096")?;
    fs::write(format!("{TRACING}/events/kvm/kvm_exit/trigger"), "traceoff if exit_reason == 0x7f")?;
    fs::write(format!("{TRACING}/events/kvm/enable"), "1")
}

/// Shows the trace, if a triple fault has stopped it.
fn show_trace() {
    let stopped = fs::read_to_string(format!("{TRACING}/tracing_on")).is_ok_and(|on| on.trim() == "0");
    let Some(trace) = fs::read_to_string(format!("{TRACING}/trace")).ok().filter(|_| stopped) else { return };
    let lines: Vec<&str> = trace.lines().collect();
    for line in &lines[lines.len().saturating_sub(TRACE_LINES)..] {
        println!("KVM-TRACE {line}");
    }
}

fn run() -> i32 {
    for (source, target, kind) in [("proc", "/proc", "proc"), ("sysfs", "/sys", "sysfs"), ("devtmpfs", "/dev", "devtmpfs")] {
        mount_on(source, target, kind, 0);
    }
    load("/modules");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !Path::new(DISK).exists() {
        assert!(Instant::now() < deadline, "there is no {DISK}");
        std::thread::yield_now();
    }
    mount_on(DISK, ROOT, "ext4", 0);
    for (source, target, kind) in [("proc", "proc", "proc"), ("sysfs", "sys", "sysfs"), ("devtmpfs", "dev", "devtmpfs")] {
        mount_on(source, &format!("{ROOT}/{target}"), kind, 0);
    }
    mount_on("cgroup2", &format!("{ROOT}/sys/fs/cgroup"), "cgroup2", 0);
    load(&format!("{ROOT}/modules"));
    // Moved and not only entered: a process in a mere chroot may make no user namespace, and the jail wants one.
    std::env::set_current_dir(ROOT).unwrap();
    mount_on(".", "/", "", MS_MOVE);
    // SAFETY: a string that lives through the call.
    check(unsafe { chroot(c(".").as_ptr()) }.into(), "changing the root");
    std::env::set_current_dir("/").unwrap();

    loopback_up();
    if let Err(error) = trace_until_triple_fault() {
        println!("KVM is not traced: {error}");
    }
    let child = Command::new("/bin/conformance")
        .args(["--nocapture", "--test-threads=1"])
        // From the kernel's command line.
        .args(std::env::var("NESTED_TEST"))
        .env("DORMOUSE_VMM", "/bin/dormouse-vmm")
        .env("DORMOUSE_PREBUILT", "/prebuilt")
        // The machine is known, and what is missing here is a fault.
        .env("DORMOUSE_JAIL_COMPLETE", "1")
        .env("RUST_BACKTRACE", "0")
        .spawn()
        .unwrap();
    let wanted = i32::try_from(child.id()).unwrap();
    // Orphans come here, too.
    loop {
        let mut status = 0;
        // SAFETY: `status` may be written through the call.
        let ended = unsafe { waitpid(-1, &mut status, 0) };
        check(ended.into(), "waiting");
        if ended == wanted {
            show_trace();
            // The code, or 128 and the signal.
            return if status & 0x7f == 0 { status >> 8 & 0xff } else { 128 + (status & 0x7f) };
        }
    }
}

fn main() {
    let code = std::panic::catch_unwind(run).unwrap_or(255);
    println!("NESTED-EXIT {code}");
    // SAFETY: it takes a number. File systems are of no further use.
    unsafe { reboot(RB_POWER_OFF) };
}
