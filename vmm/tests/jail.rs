//! The jail, seen from outside and tried from inside.

mod process;

use std::{
    fs,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Stdio},
};

use process::{Files, Process, eventually, has_kvm, namespace, prepared, status};
use vmm::jail::{
    privileges,
    seccomp::{self, Class, Mode},
};
use vmm_protocol::control::{MemoryUse, Request};

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// What must be true of both processes once there is a machine.
fn assert_powerless(pid: u32) {
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set} of {pid}");
    }
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_ne!(status(pid, "Uid").split_ascii_whitespace().next(), Some("0"));
}

#[test]
fn a_prepared_process_can_do_nothing_and_see_nothing() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (process, _node) = prepared(&files, MemoryUse::Private);
    let (outer, inner) = (process.pid(), process.inner_pid());
    assert_powerless(outer);
    assert_powerless(inner);

    // Every thread, not only the first.
    let tasks = fs::read_dir(format!("/proc/{inner}/task")).unwrap();
    let threads: Vec<u32> = tasks.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    assert!(threads.len() >= 3, "there are a vCPU and a block thread beside the main thread: {threads:?}");
    for thread in threads {
        assert_powerless(thread);
        for kind in NAMESPACES {
            assert_ne!(namespace(thread, kind), namespace(std::process::id(), kind), "{kind} namespace");
        }
    }

    // It is the first of its kind, its root is empty, and nothing is open that was not handed over.
    assert_eq!(status(inner, "NSpid").split_ascii_whitespace().last(), Some("1"));
    assert_eq!(fs::read_dir(format!("/proc/{inner}/root")).unwrap().count(), 0);
    let interfaces = fs::read_to_string(format!("/proc/{inner}/net/dev")).unwrap();
    assert!(interfaces.lines().skip(2).all(|line| line.trim_start().starts_with("lo:")), "{interfaces}");
    let limits = fs::read_to_string(format!("/proc/{inner}/limits")).unwrap();
    assert!(limits.lines().any(|line| line.split_ascii_whitespace().eq(["Max", "core", "file", "size", "0", "0", "bytes"])), "{limits}");
    for descriptor in fs::read_dir(format!("/proc/{inner}/fd")).unwrap() {
        let descriptor = descriptor.unwrap();
        let target = fs::read_link(descriptor.path()).unwrap().display().to_string();
        let known = ["anon_inode:", "socket:", "/proc/", "/dev/kvm", "/dev/null", "/log", "/memory"];
        assert!(known.iter().any(|known| target.contains(known)), "{:?} is {target}", descriptor.file_name());
    }
    assert!(process.log().contains("layers=identity,user,mount,pid,network,ipc,uts,cgroup,root,landlock"), "{}", process.log());
}

#[test]
fn what_the_parent_left_open_is_closed() {
    let (left_open, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&left_open, rustix::io::FdFlags::empty()).unwrap();
    let process = Process::start();
    let _node = process.connect();
    let inner = process.inner_pid();
    eventually("the jail", || process.log().contains("in its jail").then_some(()));
    let sockets = fs::read_dir(format!("/proc/{inner}/fd")).unwrap().filter(|entry| {
        fs::read_link(entry.as_ref().unwrap().path()).unwrap().to_str().unwrap().starts_with("socket:")
    });
    // The two listeners; and the connection, if it has been taken.
    assert!(sockets.count() <= 3);
}

#[test]
fn an_ordinary_user_gets_the_same_jail() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let process = start_wrapped(&["--require", "all"], |command| {
        // The build directory may be closed to others.
        let dir = std::path::PathBuf::from(command.get_args().nth(1).unwrap());
        let program = dir.join("dormouse-vmm");
        // By a program of its own: a copy of ours would still be open for writing in whatever other tests fork meanwhile.
        assert!(Command::new("cp").arg(command.get_program()).arg(&program).status().unwrap().success());
        std::os::unix::fs::chown(&dir, Some(65_534), Some(65_534)).unwrap();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        *command = Command::new(program);
        command.args(arguments).gid(65_534).uid(65_534);
    });
    let mut node = process.connect();
    node.done(Request::Cancel, &[]);
    assert_eq!(status(process.inner_pid(), "CapEff"), "0000000000000000");
    assert!(process.log().contains("layers=identity,user,mount,pid,network,ipc,uts,cgroup,root,landlock"), "{}", process.log());
    node.done(Request::Quit, &[]);
    let (status, log) = process.ended();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn a_refused_layer_is_told_and_ends_the_process_only_if_it_is_required() {
    // In a user namespace that may make no further ones, nothing else is refused.
    let refuse = |command: &mut Command| {
        let (program, arguments) = (command.get_program().to_owned(), command.get_args().map(ToOwned::to_owned).collect::<Vec<_>>());
        let mut wrapped = Command::new("unshare");
        wrapped.args(["--user", "--map-root-user", "--", "sh", "-c", "echo 0 >/proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\""]);
        wrapped.arg(program).args(arguments);
        *command = wrapped;
    };
    let process = start_wrapped(&[], refuse);
    let mut node = process.connect();
    node.done(Request::Cancel, &[]);
    let log = process.log();
    assert!(log.contains("layer=user") && log.contains("layers=mount,pid,network,ipc,uts,cgroup,root,landlock"), "{log}");

    let (status, log) = start_wrapped(&["--require", "user"], refuse).ended();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("the required layer \"user\""), "{log}");
}

fn start_wrapped(arguments: &[&str], wrap: impl FnOnce(&mut Command)) -> Process {
    Process::start_with(arguments, |command| {
        let log = fs::File::create(std::path::Path::new(&command.get_args().nth(1).unwrap().to_owned()).join("log")).unwrap();
        wrap(command);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    })
}

#[test]
fn the_jailed_process_ends_with_the_one_that_the_node_knows() {
    let process = Process::start();
    let mut node = process.connect();
    node.done(Request::Cancel, &[]);
    let inner = process.inner_pid();
    drop(process);
    // The end of the connection says that it holds nothing any more.
    assert!(node.hear().is_err());
    eventually("the end of the jailed process", || match fs::read_to_string(format!("/proc/{inner}/stat")) {
        Ok(text) => text.contains(") Z ").then_some(()),
        Err(_) => Some(()),
    });
}

#[test]
fn a_cgroup_is_joined_or_the_process_ends() {
    let (status, log) = Process::start_with(&["--cgroup", "/nowhere"], |_| {}).ended();
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("joining the cgroup at /nowhere/cgroup.procs failed"), "{log}");

    let root = std::path::Path::new("/sys/fs/cgroup/unified");
    let root = if root.is_dir() { root } else { std::path::Path::new("/sys/fs/cgroup") };
    let ours = root.join(format!("dormouse-test-{}", std::process::id()));
    if fs::create_dir(&ours).is_err() || !ours.join("cgroup.procs").exists() {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: no cgroup v2 directory can be made here\n"));
        return;
    }
    let by_descriptor = fs::File::open(&ours).unwrap();
    rustix::io::fcntl_setfd(&by_descriptor, rustix::io::FdFlags::empty()).unwrap();
    for named in [ours.to_str().unwrap().to_owned(), format!("fd:{}", std::os::fd::AsRawFd::as_raw_fd(&by_descriptor))] {
        let process = Process::start_with(&["--cgroup", &named], |_| {});
        process.connect().done(Request::Cancel, &[]);
        let members = fs::read_to_string(ours.join("cgroup.procs")).unwrap();
        let members: Vec<u32> = members.lines().map(|line| line.parse().unwrap()).collect();
        assert!(members.contains(&process.pid()) && members.contains(&process.inner_pid()), "{named}: {members:?}");
        for descriptor in fs::read_dir(format!("/proc/{}/fd", process.inner_pid())).unwrap() {
            let target = fs::read_link(descriptor.unwrap().path()).unwrap();
            assert!(!target.starts_with(root), "the directory of the cgroup is closed again: {}", target.display());
        }
    }
    drop(by_descriptor);
    eventually("an empty cgroup", || fs::remove_dir(&ours).ok());
}

// A forbidden call dies. The test starts itself again as a child that installs the filter of a class and makes one call.

type Call = (&'static str, fn());
/// A call and the classes in question.
type CallOf = (&'static str, fn(), &'static [Class]);

/// What an attacker would want, each allowed to nobody.
const FORBIDDEN: [Call; 14] = [
    ("execve", || {
        Command::new("/bin/true").exec_now();
    }),
    ("fork", || raw(libc::SYS_fork, [0; 6])),
    ("open", || raw(libc::SYS_openat, [libc::AT_FDCWD as u64, c"/etc/passwd".as_ptr() as u64, 0, 0, 0, 0])),
    ("socket", || raw(libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0])),
    ("connect", || raw(libc::SYS_connect, [0; 6])),
    ("ptrace", || raw(libc::SYS_ptrace, [0; 6])),
    ("mount", || raw(libc::SYS_mount, [0; 6])),
    ("kill", || raw(libc::SYS_kill, [1, 9, 0, 0, 0, 0])),
    ("prctl", || raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0])),
    ("process_vm_writev", || raw(libc::SYS_process_vm_writev, [1, 0, 0, 0, 0, 0])),
    ("mmap of executable memory", || {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        raw(libc::SYS_mmap, [0, 4096, prot as u64, flags as u64, u64::MAX, 0]);
    }),
    ("mprotect to executable", || raw(libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC as u64, 0, 0, 0])),
    ("ioctl KVM_CREATE_VM", || raw(libc::SYS_ioctl, [0, 0xae01, 0, 0, 0, 0])),
    ("ioctl TIOCSTI", || raw(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0])),
];

/// What one class is allowed and others are not.
const FOREIGN: [CallOf; 6] = [
    ("recvmsg", || raw(libc::SYS_recvmsg, [u64::MAX, 0, 0, 0, 0, 0]), &[Class::Vcpu, Class::Block, Class::Supervisor]),
    ("pread64", || raw(libc::SYS_pread64, [u64::MAX, 0, 0, 0, 0, 0]), &[Class::Vcpu, Class::Supervisor]),
    ("ioctl KVM_RUN", || raw(libc::SYS_ioctl, [u64::MAX, 0xae80, 0, 0, 0, 0]), &[Class::Main, Class::Block, Class::Supervisor]),
    ("mmap at an address", || raw(libc::SYS_mmap, [0x1000_0000, 4096, 3, 0x32, u64::MAX, 0]), &[Class::Vcpu, Class::Block]),
    ("sendto an address", || raw(libc::SYS_sendto, [u64::MAX, 0, 0, 0, 1, 16]), &[Class::Main, Class::Vcpu, Class::Block, Class::Supervisor]),
    ("tgkill with SIGKILL", || raw(libc::SYS_tgkill, [1, 1, 9, 0, 0, 0]), &[Class::Main, Class::Vcpu, Class::Block, Class::Supervisor]),
];

/// What a class needs: it returns (with an error, of an absurd descriptor) instead of ending the process.
const PERMITTED: [CallOf; 5] = [
    ("nothing at all", || {}, &Class::ALL),
    ("recvmsg", || raw(libc::SYS_recvmsg, [u64::MAX, 0, 0, 0, 0, 0]), &[Class::Main]),
    ("pwrite64", || raw(libc::SYS_pwrite64, [u64::MAX, 0, 0, 0, 0, 0]), &[Class::Main, Class::Block]),
    ("ioctl KVM_RUN", || raw(libc::SYS_ioctl, [u64::MAX, 0xae80, 0, 0, 0, 0]), &[Class::Vcpu]),
    ("wait4", || raw(libc::SYS_wait4, [0, 0, 0, 0, 0, 0]), &[Class::Supervisor]),
];

trait ExecNow {
    fn exec_now(&mut self);
}

impl ExecNow for Command {
    fn exec_now(&mut self) {
        let _ = self.exec();
    }
}

fn raw(call: i64, a: [u64; 6]) {
    // SAFETY: the child that makes it does nothing afterwards but end; null pointers make the kernel answer EFAULT.
    unsafe { libc::syscall(call, a[0], a[1], a[2], a[3], a[4], a[5]) };
}

const CLASS: &str = "DORMOUSE_TEST_CLASS";
const CALL: &str = "DORMOUSE_TEST_CALL";

/// Not a test: the child of the tests below.
#[test]
#[ignore = "the child of other tests"]
fn child_under_a_filter() {
    let (Ok(class), Ok(call)) = (std::env::var(CLASS), std::env::var(CALL)) else { return };
    let class = Class::ALL.into_iter().find(|known| format!("{known:?}") == class).unwrap();
    let calls = FORBIDDEN.iter().map(|(name, call)| (*name, *call)).chain(FOREIGN.iter().chain(&PERMITTED).map(|(name, call, _)| (*name, *call)));
    let (_, call) = calls.into_iter().find(|(name, _)| *name == call).unwrap();
    privileges::limit(false).unwrap();
    seccomp::set_mode(Mode::Kill);
    seccomp::install(class).unwrap();
    call();
    vmm::jail::supervisor::exit(42);
}

fn outcome(class: Class, call: &str) -> std::process::ExitStatus {
    let arguments = ["--exact", "child_under_a_filter", "--ignored", "--nocapture", "--test-threads=1"];
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments).env(CLASS, format!("{class:?}")).env(CALL, call).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap()
}

#[test]
fn a_forbidden_call_ends_the_process_whatever_the_thread() {
    for class in Class::ALL {
        for (call, _) in FORBIDDEN {
            assert_eq!(outcome(class, call).signal(), Some(libc::SIGSYS), "{call} in {class:?}");
        }
    }
}

#[test]
fn each_class_has_its_own_calls() {
    for (call, _, classes) in FOREIGN {
        for &class in classes {
            assert_eq!(outcome(class, call).signal(), Some(libc::SIGSYS), "{call} in {class:?}");
        }
    }
    for (call, _, classes) in PERMITTED {
        for &class in classes {
            assert_eq!(outcome(class, call).code(), Some(42), "{call} in {class:?}");
        }
    }
}
