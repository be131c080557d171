//! What each class of threads may call, and why. What is not here ends the process.
//!
//! Notable absences: `execve`, `fork` and `clone` (threads are made before the filters), `open` in all its forms, `socket`,
//! `connect`, `bind`, `kill`, `ptrace`, `mount`, `setuid`, `prctl`, `io_uring_*`, `bpf`, `userfaultfd`, and memory that can be executed.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq, SeccompCondition, SeccompRule,
};

use super::{Class, ioctls};

/// One argument's condition: its position, the bits that are looked at, and what they must be.
type Condition = (u8, u64, u64);

const ALL_BITS: u64 = u64::MAX;

#[derive(Default)]
struct Rules(BTreeMap<i64, Vec<SeccompRule>>);

impl Rules {
    /// With whatever arguments.
    fn allow(&mut self, call: i64) {
        let former = self.0.insert(call, Vec::new());
        debug_assert!(former.is_none(), "call {call} is listed twice");
    }

    /// With arguments that meet all conditions; one call may have several such rules, any of which will do.
    ///
    /// Only the lower half of an argument is compared where the mask has no upper half: the kernel reads an `int` there, and
    /// its upper half may hold anything.
    fn allow_if(&mut self, call: i64, conditions: &[Condition]) -> Result<(), BackendError> {
        let conditions = conditions
            .iter()
            .map(|&(argument, mask, value)| match mask {
                ALL_BITS => SeccompCondition::new(argument, Qword, Eq, value),
                INT => SeccompCondition::new(argument, Dword, Eq, value),
                _ => SeccompCondition::new(argument, Dword, MaskedEq(mask), value),
            })
            .collect::<Result<_, _>>()?;
        let rule = SeccompRule::new(conditions)?;
        let rules = self.0.entry(call).or_default();
        rules.push(rule);
        Ok(())
    }

    fn allow_ioctl(&mut self, request: u32) -> Result<(), BackendError> {
        self.allow_if(libc::SYS_ioctl, &[(1, INT, u64::from(request))])
    }
}

/// Mask of an argument that the kernel reads as an `int`.
const INT: u64 = u32::MAX as u64;

/// The list of a class.
pub fn of(class: Class) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules = Rules::default();
    match class {
        Class::Main => {
            every_thread(&mut rules)?;
            main(&mut rules)?;
        }
        Class::Vcpu => {
            every_thread(&mut rules)?;
            vcpu(&mut rules)?;
        }
        Class::Block => {
            every_thread(&mut rules)?;
            block(&mut rules)?;
        }
        Class::Supervisor => supervisor(&mut rules),
    }
    Ok(rules.0)
}

/// What Rust's and C's run-time libraries do in any thread.
fn every_thread(rules: &mut Rules) -> Result<(), BackendError> {
    // Locks, condition variables, waiting for another thread.
    rules.allow(libc::SYS_futex);
    // A lock that is about to be free.
    rules.allow(libc::SYS_sched_yield);
    // Eventfds, and for the main thread streams, files and the TAP device; on standard error, the log.
    rules.allow(libc::SYS_read);
    rules.allow(libc::SYS_write);
    // Dropping what was handed over.
    rules.allow(libc::SYS_close);
    // A debug build looks whether a descriptor that it closes is open.
    rules.allow_if(libc::SYS_fcntl, &[(1, INT, libc::F_GETFD as u64)])?;
    // The allocator: growing, shrinking, giving back. Nothing of it may ever be executed.
    rules.allow(libc::SYS_brk);
    rules.allow(libc::SYS_munmap);
    rules.allow(libc::SYS_madvise);
    rules.allow_if(libc::SYS_mprotect, &[(2, libc::PROT_EXEC as u64, 0)])?;
    // Growing a large block, wherever there is room; not onto another mapping.
    rules.allow_if(libc::SYS_mremap, &[(3, libc::MREMAP_FIXED as u64, 0)])?;
    // Times of day and of threads, where the kernel cannot answer without a call (always for a thread's CPU time).
    rules.allow(libc::SYS_clock_gettime);
    // Seeds of hash tables; entropy for the guest.
    rules.allow(libc::SYS_getrandom);
    // A thread or the process ends; before, the thread's signal stack goes and signals are held off.
    rules.allow(libc::SYS_exit);
    rules.allow(libc::SYS_exit_group);
    rules.allow(libc::SYS_sigaltstack);
    rules.allow(libc::SYS_rt_sigprocmask);
    // The way back from the handler of the signal that stops a vCPU.
    rules.allow(libc::SYS_rt_sigreturn);
    // A wait that a stop of the whole process (SIGSTOP, the freezer) interrupted.
    rules.allow(libc::SYS_restart_syscall);
    Ok(())
}

/// Memory for the allocator, and for nothing else: no file, no given address, not executable.
fn anonymous_memory(rules: &mut Rules) -> Result<(), BackendError> {
    let flags = (libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
    rules.allow_if(libc::SYS_mmap, &[(2, libc::PROT_EXEC as u64, 0), (3, flags, libc::MAP_ANONYMOUS as u64)])
}

fn vcpu(rules: &mut Rules) -> Result<(), BackendError> {
    anonymous_memory(rules)?;
    // What the thread is for.
    rules.allow_ioctl(ioctls::KVM_RUN)?;
    // A driver's access to its device runs here: at a reset the event loop stops watching what the device had.
    rules.allow(libc::SYS_epoll_ctl);
    // A save and a restore have each vCPU's state handled by its own thread.
    for &request in ioctls::VCPU_STATE {
        rules.allow_ioctl(request)?;
    }
    Ok(())
}

fn block(rules: &mut Rules) -> Result<(), BackendError> {
    anonymous_memory(rules)?;
    // Blocks of the disk. The files were handed in open.
    rules.allow(libc::SYS_pread64);
    rules.allow(libc::SYS_pwrite64);
    // A flush of the guest's, where it is made durable at once (after a boot).
    rules.allow(libc::SYS_fdatasync);
    // The guest's discard and write-zeroes: holes and zeros in the top layer.
    rules.allow(libc::SYS_fallocate);
    Ok(())
}

fn main(rules: &mut Rules) -> Result<(), BackendError> {
    // The event loop.
    rules.allow(libc::SYS_epoll_pwait);
    rules.allow(libc::SYS_epoll_ctl);
    // Whether the node, or a client of a stream, is still there, without taking anything from it.
    rules.allow(libc::SYS_ppoll);

    // The node and the clients of the vsock muxer: connections to the two sockets that were bound at the start.
    rules.allow_if(libc::SYS_accept4, &[(3, libc::SOCK_CLOEXEC as u64, libc::SOCK_CLOEXEC as u64)])?;
    // Control messages with descriptors. Landlock keeps an address in it from meaning anything.
    rules.allow(libc::SYS_sendmsg);
    rules.allow(libc::SYS_recvmsg);
    // Streams; never to or from an address.
    rules.allow_if(libc::SYS_sendto, &[(4, ALL_BITS, 0)])?;
    rules.allow_if(libc::SYS_recvfrom, &[(4, ALL_BITS, 0)])?;
    // The guest closes one direction of a stream.
    rules.allow(libc::SYS_shutdown);
    // Several pieces of guest memory at once, to or from a stream or the TAP device.
    rules.allow(libc::SYS_readv);
    rules.allow(libc::SYS_writev);

    // A second descriptor of the same file, for the node or another owner in this process.
    rules.allow_if(libc::SYS_fcntl, &[(1, INT, libc::F_DUPFD_CLOEXEC as u64)])?;
    // musl says close-on-exec of it once more, for kernels that forget.
    rules.allow_if(libc::SYS_fcntl, &[(1, INT, libc::F_SETFD as u64), (2, INT, libc::FD_CLOEXEC as u64)])?;

    // Guest memory: a difference's pages laid over it at their address, zeros for ballooned pages; files for reading. Nothing
    // that can be executed.
    rules.allow_if(libc::SYS_mmap, &[(2, libc::PROT_EXEC as u64, 0)])?;
    // Snapshot files: read, written, measured, synced; the counters of /proc/self/status.
    rules.allow(libc::SYS_pread64);
    rules.allow(libc::SYS_pwrite64);
    rules.allow(libc::SYS_lseek);
    rules.allow(libc::SYS_fstat);
    // How the standard library asks for a file's length: of a descriptor, with an empty name.
    rules.allow_if(libc::SYS_statx, &[(2, libc::AT_EMPTY_PATH as u64, libc::AT_EMPTY_PATH as u64)])?;
    rules.allow(libc::SYS_ftruncate);
    rules.allow(libc::SYS_fsync);
    rules.allow(libc::SYS_fdatasync);
    // Pages that the guest gives back become a hole in its memory file (after a boot).
    rules.allow(libc::SYS_fallocate);

    // Stops a vCPU: one signal, and the pid namespace and Landlock leave nobody else to send it to.
    for signal in STOP_SIGNALS {
        rules.allow_if(libc::SYS_tgkill, &[(2, INT, signal)])?;
    }
    // Which process that vCPU's thread is of: this one.
    rules.allow(libc::SYS_getpid);

    // Which pages of the guest are its own.
    rules.allow_ioctl(ioctls::PAGEMAP_SCAN)?;
    // State of the machine around the vCPUs.
    for &request in ioctls::VM_STATE {
        rules.allow_ioctl(request)?;
    }
    Ok(())
}

/// The first real-time signal as musl (35) and glibc (34) number it.
const STOP_SIGNALS: [u64; 2] = [34, 35];

fn supervisor(rules: &mut Rules) {
    // What it is there for.
    rules.allow(libc::SYS_wait4);
    // One line about how the child ended.
    rules.allow(libc::SYS_write);
    rules.allow(libc::SYS_exit_group);
    // A wait that a stop of the process interrupted.
    rules.allow(libc::SYS_restart_syscall);
    rules.allow(libc::SYS_rt_sigreturn);
    // The line is put together on the heap.
    rules.allow(libc::SYS_brk);
    rules.allow_if(libc::SYS_mmap, &[(2, libc::PROT_EXEC as u64, 0), (3, libc::MAP_ANONYMOUS as u64, libc::MAP_ANONYMOUS as u64)])
        .expect("the argument numbers are within the six that there are");
    rules.allow(libc::SYS_munmap);
}
