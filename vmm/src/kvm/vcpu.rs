//! vCPU threads.
//!
//! ```text
//!            Order::Run                       pause(): immediate_exit + signal
//! waiting ──────────────► running ── exit ─► handled here ── … ── EINTR ──► waiting
//!    │ Order::Work: state is read or set          │ the guest is done, or KVM is: told once, then waiting
//!    └ Order::End ─► ended
//! ```
//!
//! Owns: the thread, its `KVM_RUN` loop and the way it is stopped. Never touches guest memory; devices are behind [`Exits`].

use std::{
    ffi::c_void,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    kvm::{KvmError, state, vm::Vm},
    machine::{Confine, ThreadKind},
};

/// A vCPU leaves the guest within microseconds; one that emulates a device does within one of its accesses.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// A signal is enough by design (see [`Kick`]); it is repeated in case one day it is not.
const SIGNAL_AGAIN: Duration = Duration::from_millis(50);

/// What a vCPU's exits go to. Entered by several vCPU threads at a time.
pub trait Exits: Send + Sync {
    /// `IN`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`. `Some`: the guest has ended itself, and how.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<String>;
    /// A read where no memory is.
    fn memory_read(&self, address: u64, data: &mut [u8]);
    /// A write where no memory is.
    fn memory_write(&self, address: u64, data: &[u8]);
    /// The vCPU will not run any more, and how it ended.
    fn stopped(&self, vcpu: u8, how: String);
    /// Reads instruction bytes for an error message; as many as are there.
    fn peek(&self, address: u64, bytes: &mut [u8]) -> usize;
}

type Work = Box<dyn FnOnce(&mut VcpuFd) + Send>;

enum Order {
    Work(Work),
    Run,
    End,
}

/// A mapping of our own of the `immediate_exit` byte of a vCPU's `kvm_run`, so that it may be set from another thread for as
/// long as this lives.
struct ImmediateExit {
    mapping: *mut c_void,
    bytes: usize,
}

// SAFETY: the mapping is owned by this value, and the only access to it is the atomic one in `flag`.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &VcpuFd, bytes: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping chosen by the kernel; the descriptor is a vCPU's and `bytes` its KVM_GET_VCPU_MMAP_SIZE.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { mapping, bytes })
    }

    fn flag(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);
        // SAFETY: the mapping is as long as a `kvm_run` and lives as long as `self`; a byte needs no alignment, and whoever else
        // has it mapped (the kernel, which reads it once) treats it as one byte.
        unsafe { AtomicU8::from_ptr(self.mapping.cast::<u8>().add(offset)) }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: made by `of` and unmapped only here.
        unsafe { libc::munmap(self.mapping, self.bytes) };
    }
}

/// What a vCPU's thread and its handle share.
struct Shared {
    vcpu: u8,
    immediate_exit: ImmediateExit,
    /// Kernel id of the thread; 0 until it runs.
    thread: AtomicI32,
    /// Whether it is, or is about to be, in the guest. Changed under the lock, so that `pause` cannot miss it.
    running: Mutex<bool>,
    stopped: Condvar,
    ended: AtomicBool,
    exits: AtomicU64,
}

impl Shared {
    /// The flag is cleared under the lock under which it is set. Otherwise a kick that comes twice could leave it set behind
    /// a vCPU that has stopped already, which would stop again as soon as it is to run, and nobody would know.
    fn set_stopped(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.immediate_exit.flag().store(0, Ordering::SeqCst);
        *running = false;
        self.stopped.notify_all();
    }

    /// Whether it is asked to stop; then it counts as stopped.
    fn stop_if_asked(&self) -> bool {
        // Looked at twice, since nearly every exit that is not asked for comes by here; asked under the lock, since it may be
        // taken back.
        let asked = || self.immediate_exit.flag().load(Ordering::SeqCst) != 0;
        if !asked() {
            return false;
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if !asked() {
            return false;
        }
        self.immediate_exit.flag().store(0, Ordering::SeqCst);
        *running = false;
        self.stopped.notify_all();
        true
    }
}

/// Sets `ended` even if the thread panics: nobody may wait for it any more.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.set_stopped();
    }
}

/// One vCPU with its thread. Dropping it ends the thread.
pub struct Vcpu {
    shared: Arc<Shared>,
    orders: mpsc::Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

/// The signal that takes a vCPU out of the guest.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore_kick(_: libc::c_int) {}

/// Installs the handler of the kick signal: it does nothing, but a signal without a handler would end the process. Once per
/// process is enough; more do no harm.
fn install_kick_handler() -> io::Result<()> {
    // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore_kick as extern "C" fn(libc::c_int) as usize;
    // Other system calls of a vCPU thread go on; KVM_RUN gives EINTR regardless, since it never asks to be restarted.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the action is complete, and its handler calls nothing, so it is safe in any thread at any time.
    if unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn host(doing: &'static str) -> impl Fn(io::Error) -> KvmError {
    move |source| KvmError::Ioctl { doing, detail: String::new(), source }
}

impl Vcpu {
    /// Makes the vCPU and its thread, which is confined and waits when this returns.
    pub fn new(vm: &Arc<Vm>, vcpu: u8, exits: Arc<dyn Exits>, confine: &Confine) -> Result<Self, KvmError> {
        install_kick_handler().map_err(host("installing a signal handler"))?;
        let fd = vm.fd().create_vcpu(u64::from(vcpu)).map_err(|error| host("KVM_CREATE_VCPU")(io::Error::from_raw_os_error(error.errno())))?;
        let immediate_exit = ImmediateExit::of(&fd, vm.fd().run_size()).map_err(host("mapping a vCPU's run structure"))?;
        let shared = Arc::new(Shared {
            vcpu,
            immediate_exit,
            thread: AtomicI32::new(0),
            running: Mutex::new(false),
            stopped: Condvar::new(),
            ended: AtomicBool::new(false),
            exits: AtomicU64::new(0),
        });
        let (orders, inbox) = mpsc::channel();
        let (started, start) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{vcpu}"))
            .spawn({
                let (shared, vm, confine) = (shared.clone(), vm.clone(), confine.clone());
                move || {
                    let _end = EndGuard(shared.clone());
                    // SAFETY: gettid has no arguments and cannot fail.
                    shared.thread.store(unsafe { libc::gettid() }, Ordering::SeqCst);
                    let confined = confine(ThreadKind::Vcpu);
                    let ok = confined.is_ok();
                    let _ = started.send(confined);
                    if ok {
                        Thread { fd, vm, shared, exits, inbox }.live();
                    }
                }
            })
            .map_err(host("making a vCPU thread"))?;
        start.recv().map_err(|_| KvmError::ThreadGone)?.map_err(host("confining a vCPU thread"))?;
        Ok(Self { shared, orders, thread: Some(thread) })
    }

    /// Runs `work` on the vCPU's thread, which must be waiting, and gives its answer.
    pub fn with<T: Send + 'static>(&self, work: impl FnOnce(&mut VcpuFd) -> T + Send + 'static) -> Result<T, KvmError> {
        let (answer, answered) = mpsc::channel();
        let work: Work = Box::new(move |fd| {
            let _ = answer.send(work(fd));
        });
        self.orders.send(Order::Work(work)).map_err(|_| KvmError::ThreadGone)?;
        answered.recv().map_err(|_| KvmError::ThreadGone)
    }

    /// Lets it run. One that was asked to stop, and has not yet, goes on.
    pub fn run(&self) -> Result<(), KvmError> {
        let mut running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            self.shared.immediate_exit.flag().store(0, Ordering::SeqCst);
        } else {
            self.orders.send(Order::Run).map_err(|_| KvmError::ThreadGone)?;
            *running = true;
        }
        Ok(())
    }

    /// Asks it to stop, without waiting. From here on it does not enter the guest again.
    pub fn ask_to_stop(&self) {
        let running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            self.kick();
        }
    }

    /// The flag is set before the signal is sent. If the thread is in the guest, the signal takes it out. If it is elsewhere,
    /// its next KVM_RUN finds the flag and returns at once, after it has finished the access that the last exit was for:
    /// without that, registers and memory of a half-done access would be saved.
    fn kick(&self) {
        self.shared.immediate_exit.flag().store(1, Ordering::SeqCst);
        let thread = self.shared.thread.load(Ordering::SeqCst);
        if !self.shared.ended.load(Ordering::SeqCst) {
            // SAFETY: a system call without pointers. Our own thread group bounds whom it may reach, and the signal has a handler.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }

    /// Waits until it has stopped. Guest state is consistent then.
    pub fn wait_stopped(&self) -> Result<(), KvmError> {
        let begin = Instant::now();
        let mut running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running {
            if begin.elapsed() > STOP_LIMIT {
                return Err(KvmError::NotStopped { vcpu: self.shared.vcpu, limit_ms: STOP_LIMIT.as_millis() as u64 });
            }
            let (again, timeout) = self.shared.stopped.wait_timeout(running, SIGNAL_AGAIN).unwrap_or_else(PoisonError::into_inner);
            running = again;
            if timeout.timed_out() && *running {
                self.kick();
            }
        }
        Ok(())
    }

    /// Exits so far.
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// CPU time of the thread.
    pub fn cpu_time(&self) -> Duration {
        let thread = self.shared.thread.load(Ordering::SeqCst);
        // The clock of a thread, by its id (kernel: include/linux/posix-timers_types.h): its complement, shifted by 3, then
        // "per thread" (4) and "scheduler time" (2).
        let clock = (!thread << 3) | 6;
        // SAFETY: all-zero is a valid `timespec`.
        let mut time: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: `time` is valid for writing; a clock that does not exist is an error.
        if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
            return Duration::ZERO;
        }
        Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.ask_to_stop();
        let _ = self.orders.send(Order::End);
        // After `stop` failed the thread hangs in a device; ending the process is what is left then, so do not wait for ever.
        if self.wait_stopped().is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

enum Phase {
    Waiting,
    Running,
    Ended,
}

/// The thread's side.
struct Thread {
    fd: VcpuFd,
    vm: Arc<Vm>,
    shared: Arc<Shared>,
    exits: Arc<dyn Exits>,
    inbox: mpsc::Receiver<Order>,
}

impl Thread {
    fn live(mut self) {
        let mut phase = Phase::Waiting;
        loop {
            phase = match phase {
                Phase::Waiting => self.wait(),
                Phase::Running => self.run(),
                Phase::Ended => return,
            }
        }
    }

    fn wait(&mut self) -> Phase {
        match self.inbox.recv() {
            Ok(Order::Work(work)) => {
                work(&mut self.fd);
                Phase::Waiting
            }
            Ok(Order::Run) => {
                state::told_of_pause(&self.fd, &self.vm.abilities());
                Phase::Running
            }
            Ok(Order::End) | Err(_) => Phase::Ended,
        }
    }

    /// One entry into the guest, and what comes of it.
    fn run(&mut self) -> Phase {
        let ended = match self.fd.run() {
            Ok(exit) => {
                self.shared.exits.fetch_add(1, Ordering::Relaxed);
                match exit {
                    VcpuExit::IoIn(port, data) => {
                        self.exits.port_read(port, data);
                        None
                    }
                    VcpuExit::IoOut(port, data) => self.exits.port_write(port, data),
                    VcpuExit::MmioRead(address, data) => {
                        self.exits.memory_read(address, data);
                        None
                    }
                    VcpuExit::MmioWrite(address, data) => {
                        self.exits.memory_write(address, data);
                        None
                    }
                    VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => None,
                    VcpuExit::Shutdown => Some(self.describe("the guest reset itself by a triple fault")),
                    VcpuExit::SystemEvent(kind, _) => Some(format!("the guest raised system event {kind}")),
                    VcpuExit::FailEntry(reason, cpu) => Some(self.describe(&format!("the processor refused to enter the guest (reason {reason:#x}, processor {cpu})"))),
                    VcpuExit::InternalError => {
                        let suberror = self.suberror();
                        Some(self.describe(&format!("KVM cannot run the guest's code (exit 17, suberror {suberror}); the host may lack hardware virtualisation")))
                    }
                    other => {
                        let what = format!("KVM gave an exit that is not handled: {other:?}");
                        Some(self.describe(&what))
                    }
                }
            }
            Err(error) => match error.errno() {
                // The only way to `Waiting`: an entry that was refused. What the exit before it was for is finished by then.
                libc::EINTR | libc::EAGAIN => {
                    if self.shared.stop_if_asked() {
                        return Phase::Waiting;
                    }
                    None
                }
                errno => {
                    let error = io::Error::from_raw_os_error(errno);
                    Some(self.describe(&format!("KVM_RUN failed: {error}")))
                }
            },
        };
        match ended {
            None => Phase::Running,
            Some(how) => {
                self.exits.stopped(self.shared.vcpu, how);
                self.shared.set_stopped();
                Phase::Waiting
            }
        }
    }

    fn suberror(&mut self) -> u32 {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this part of the union.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// Adds where the guest was.
    fn describe(&self, what: &str) -> String {
        let Ok(regs) = self.fd.get_regs() else { return what.to_owned() };
        let code = self
            .fd
            .translate_gva(regs.rip)
            .ok()
            .filter(|translation| translation.valid != 0)
            .map(|translation| {
                let mut bytes = [0; 15];
                let count = self.exits.peek(translation.physical_address, &mut bytes);
                bytes[..count].iter().map(|byte| format!(" {byte:02x}")).collect::<String>()
            })
            .unwrap_or_default();
        format!("{what} (vCPU {}, RIP {:#x}, code{code})", self.shared.vcpu, regs.rip)
    }
}
