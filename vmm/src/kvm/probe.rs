//! What `/dev/kvm` of this host is good for.
//!
//! A `/dev/kvm` that opens is not enough: some machines have a KVM in software, which emulates everything that a kernel does
//! (kvm-hosts.md). A guest of two instructions tells: a thousand turns of a loop at CPL 0, after which KVM says how many
//! instructions it has emulated. Hardware emulates none of them.
//!
//! Owns: that guest, and the verdict. Never decides what is done about it.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vmm_protocol::probe::Probe;

/// Turns of the loop.
const TURNS: u64 = 1000;
/// Instructions that hardware may have emulated nevertheless, of the 2,000 or so that the guest runs.
const EMULATED: u64 = TURNS / 2;
/// Hardware takes microseconds, emulation at least 0.5 µs an instruction, so a millisecond.
const SLOW: Duration = Duration::from_micros(500);
/// For the time, if there is no counter: the quickest of so many runs, since an interrupted one says nothing.
const RUNS: usize = 5;

/// Looks at `/dev/kvm`. Takes some milliseconds.
pub fn probe() -> Probe {
    probe_at(Path::new("/dev/kvm"))
}

fn probe_at(path: &Path) -> Probe {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "the kernel has no KVM, or the modules kvm and kvm_intel or kvm_amd are not loaded",
                io::ErrorKind::PermissionDenied => "the user is not permitted to; membership in the group kvm usually is what it takes",
                _ => "the device is there but does not work",
            };
            return Probe::Missing { why: format!("{} cannot be opened ({error}): {hint}", path.display()) };
        }
    };
    let descriptor = OwnedFd::from(file);
    // SAFETY: ownership of the descriptor passes to `Kvm`; on anything but a `/dev/kvm` its ioctls fail.
    let kvm = unsafe { Kvm::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(descriptor)) };
    match kvm.get_api_version() {
        // The one version there is.
        12 => {}
        other => return Probe::Missing { why: format!("{} answers the KVM version {other}, and not 12: it is no usable KVM", path.display()) },
    }
    match run(&kvm) {
        Ok(seen) => verdict(&seen, &Host::look()),
        Err(why) => Probe::Missing { why: format!("{} opens, but a guest of two instructions does not run: {why}", path.display()) },
    }
}

/// What the guest's run showed.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Instructions that KVM emulated during one run; `None` before Linux 5.14, which does not count them.
    emulated: Option<u64>,
    /// The quickest run.
    took: Duration,
}

/// What the host says of itself. Used for words, and never alone: a flag may be hidden from a container.
#[derive(Debug, Clone, Copy)]
struct Host {
    /// `vmx` or `svm` in `/proc/cpuinfo`.
    flags: bool,
    /// `kvm_intel` or `kvm_amd` in `/sys/module`.
    module: bool,
}

impl Host {
    fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_ascii_whitespace);
        let flags = flags.any(|flag| flag == "vmx" || flag == "svm");
        let module = ["kvm_intel", "kvm_amd"].iter().any(|name| fs::metadata(format!("/sys/module/{name}")).is_ok());
        Self { flags, module }
    }

    fn words(self) -> String {
        let mut words = Vec::new();
        if !self.flags {
            words.push("the processor shows neither vmx nor svm");
        }
        if !self.module {
            words.push("neither kvm_intel nor kvm_amd is loaded");
        }
        words.iter().map(|word| format!("; {word}")).collect()
    }
}

fn verdict(seen: &Seen, host: &Host) -> Probe {
    match seen.emulated {
        Some(emulated) if emulated > EMULATED => Probe::Software {
            why: format!("KVM emulated {emulated} instructions of a guest's loop of {TURNS} turns at CPL 0, and hardware emulates none{}", host.words()),
        },
        Some(_) => Probe::Hardware,
        None if seen.took > SLOW => Probe::Software {
            why: format!("a guest's loop of {TURNS} turns at CPL 0 took {:?}, a hundred times what hardware takes{}", seen.took, host.words()),
        },
        None => Probe::Hardware,
    }
}

// The guest: 64-bit code at CPL 0, as a kernel is. Its memory is four pages.
const PML4: u64 = 0x0000;
const PDPT: u64 = 0x1000;
const PD: u64 = 0x2000;
const CODE: u64 = 0x3000;
const MEMORY: usize = 0x4000;
/// `dec ecx; jnz .-2; hlt`
const PROGRAM: [u8; 5] = [0xff, 0xc9, 0x75, 0xfc, 0xf4];

fn run(kvm: &Kvm) -> Result<Seen, String> {
    let step = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let memory = Pages::new().map_err(|error| format!("memory for it: {error}"))?;
    // One entry each, present and writable, down to a page of 2 MiB at 0: all processors with long mode have those.
    memory.write(PML4, &(PDPT | 0b11).to_le_bytes());
    memory.write(PDPT, &(PD | 0b11).to_le_bytes());
    memory.write(PD, &0b1000_0011u64.to_le_bytes());
    memory.write(CODE, &PROGRAM);
    let vm = kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: MEMORY as u64, userspace_addr: memory.address() };
    // SAFETY: the pages are mapped for as long as `memory` lives, which is dropped after `vm` and `vcpu`: it was made first.
    unsafe { vm.set_user_memory_region(region) }.map_err(step("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(step("KVM_CREATE_VCPU"))?;
    // What the guest may use is what KVM supports; without it, long mode is refused.
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(step("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(step("KVM_SET_CPUID2"))?;
    long_mode(&vcpu).map_err(step("entering long mode"))?;
    let counter = Counter::of(&vcpu, "insn_emulation");
    let mut seen = Seen { emulated: None, took: Duration::MAX };
    for _ in 0..RUNS {
        let mut regs = vcpu.get_regs().map_err(step("KVM_GET_REGS"))?;
        (regs.rip, regs.rcx, regs.rflags) = (CODE, TURNS, 0b10);
        vcpu.set_regs(&regs).map_err(step("KVM_SET_REGS"))?;
        let before = counter.as_ref().and_then(Counter::read);
        let began = Instant::now();
        match vcpu.run().map_err(step("KVM_RUN"))? {
            VcpuExit::Hlt => {}
            other => return Err(format!("it ended with {other:?} and not with HLT")),
        }
        seen.took = seen.took.min(began.elapsed());
        let after = counter.as_ref().and_then(Counter::read);
        let emulated = before.zip(after).map(|(before, after)| after.wrapping_sub(before));
        // The least: a stray exit may add some.
        seen.emulated = match (seen.emulated, emulated) {
            (Some(least), Some(now)) => Some(least.min(now)),
            (least, now) => least.or(now),
        };
    }
    Ok(seen)
}

fn long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    sregs.cs = kvm_segment { type_: 0b1011, l: 1, selector: 8, ..flat };
    let data = kvm_segment { type_: 0b0011, db: 1, selector: 16, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4;
    // PAE.
    sregs.cr4 = 1 << 5;
    // PG, ET and PE.
    sregs.cr0 = 1 << 31 | 1 << 4 | 1;
    // LMA and LME.
    sregs.efer = 1 << 10 | 1 << 8;
    vcpu.set_sregs(&sregs)
}

/// The guest's memory.
struct Pages(*mut u8);

impl Pages {
    fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping, wherever there is room.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), MEMORY, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(at.cast())) }
    }

    fn address(&self) -> u64 {
        self.0 as u64
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        assert!(at + bytes.len() <= MEMORY, "the constants above are within it");
        // SAFETY: the range was checked to be within the mapping, and the guest, which may write there, does not run yet.
        unsafe { self.0.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it is the mapping that `new` made, and nothing refers to it: the machine is gone (see `run`).
        unsafe { libc::munmap(self.0.cast(), MEMORY) };
    }
}

/// One of the numbers that KVM keeps of a vCPU (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`).
struct Counter {
    file: fs::File,
    at: u64,
}

const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// Of `struct kvm_stats_header`: six u32.
const HEADER: usize = 24;
/// Of `struct kvm_stats_desc` before the name: flags u32, exponent s16, size u16, offset u32, bucket size u32.
const DESCRIPTOR: usize = 16;
/// The kernel has some dozens; a header that says more is not believed.
const MAX_COUNTERS: u32 = 1024;

impl Counter {
    fn of(vcpu: &VcpuFd, name: &str) -> Option<Self> {
        // SAFETY: the ioctl takes no argument; its answer is a new descriptor or -1.
        let descriptor = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD as _) };
        if descriptor < 0 {
            return None;
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        let file = unsafe { fs::File::from_raw_fd(descriptor) };
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let field = |index: usize| u32::from_ne_bytes(header[index * 4..index * 4 + 4].try_into().expect("four bytes"));
        let (name_bytes, count, descriptors, data) = (field(1), field(2), field(4), field(5));
        if count > MAX_COUNTERS || name_bytes > 256 {
            return None;
        }
        let bytes = DESCRIPTOR + name_bytes as usize;
        let mut descriptor = vec![0; bytes];
        for index in 0..u64::from(count) {
            file.read_exact_at(&mut descriptor, u64::from(descriptors) + index * bytes as u64).ok()?;
            let found = descriptor[DESCRIPTOR..].split(|byte| *byte == 0).next()?;
            if found == name.as_bytes() {
                let offset = u32::from_ne_bytes(descriptor[8..12].try_into().expect("four bytes"));
                return Some(Self { file, at: u64::from(data) + u64::from(offset) });
            }
        }
        None
    }

    fn read(&self) -> Option<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.at).ok()?;
        Some(u64::from_ne_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: Host = Host { flags: true, module: true };
    const SOFT: Host = Host { flags: false, module: false };

    #[test]
    fn the_counter_decides_and_the_time_only_without_it() {
        let seen = |emulated, micros| Seen { emulated, took: Duration::from_micros(micros) };
        assert_eq!(verdict(&seen(Some(3), 4000), &BARE), Probe::Hardware);
        assert_eq!(verdict(&seen(None, 40), &BARE), Probe::Hardware);
        let Probe::Software { why } = verdict(&seen(Some(2001), 1), &SOFT) else { panic!() };
        assert!(why.contains("2001 instructions") && why.contains("vmx") && why.contains("kvm_amd"), "{why}");
        let Probe::Software { why } = verdict(&seen(None, 1500), &BARE) else { panic!() };
        assert!(why.contains("1.5ms") && !why.contains("vmx"), "{why}");
        // A hidden flag alone condemns nothing.
        assert_eq!(verdict(&seen(Some(0), 40), &SOFT), Probe::Hardware);
    }

    #[test]
    fn what_is_no_kvm_is_missing_and_why() {
        let Probe::Missing { why } = probe_at(Path::new("/dev/no-kvm")) else { panic!() };
        assert!(why.contains("/dev/no-kvm") && why.contains("modules"), "{why}");
        let Probe::Missing { why } = probe_at(Path::new("/dev/null")) else { panic!() };
        assert!(why.contains("not 12"), "{why}");
    }

    #[test]
    fn the_verdict_of_this_host_fits_what_it_says_of_itself() {
        let host = Host::look();
        let found = probe();
        println!("{}", found.to_json());
        match (&found, host.flags || host.module) {
            // Nothing that KVM could run a guest on, but a device: software. The development machines are such.
            (Probe::Software { why }, false) => assert!(why.contains("emulated") || why.contains("took"), "{why}"),
            (Probe::Hardware, true) => {}
            (Probe::Missing { why }, _) => assert!(!Path::new("/dev/kvm").exists() || !why.is_empty()),
            (found, says) => panic!("{found:?}, but the host says hardware: {says}"),
        }
    }
}
