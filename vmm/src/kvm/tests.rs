//! The ioctl layer by itself, with guests of a dozen instructions. Skipped, with a word, where there is no `/dev/kvm`.

use std::{
    arch::global_asm,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use proptest::prelude::*;
use vmm_protocol::control::MemoryUse;

use super::{
    KvmError, dirty,
    state::{VcpuState, VmState},
    vcpu::{Exits, Vcpu},
    vm::Vm,
};
use crate::{
    arch::boot::{self, Entry},
    kvm::cpuid,
    memory::{GuestRam, PAGE, dirty::DirtyPages},
};

const MEMORY: u64 = 8 << 20;
const CODE: u64 = 0x10_0000;
/// Page numbers that the guest writes to, and a zero.
const LIST: u64 = 0x11_0000;
/// Pages that the guest may write to: beyond code and list.
const PAGES: std::ops::Range<u32> = 0x120..(MEMORY / PAGE) as u32;
const DONE: u16 = 0x77;
const LIMIT: Duration = Duration::from_secs(30);

// Writes to each page of the list, and says that it is done.
global_asm!(
    ".code32",
    ".pushsection .rodata.page_writer, \"a\"",
    ".global page_writer_begin",
    "page_writer_begin:",
    "    mov esi, 0x110000",
    "2:  mov eax, [esi]",
    "    add esi, 4",
    "    test eax, eax",
    "    jz 3f",
    "    shl eax, 12",
    "    mov [eax], eax",
    "    jmp 2b",
    "3:  mov al, 1",
    "    out 0x77, al",
    "4:  jmp 4b",
    ".global page_writer_end",
    "page_writer_end:",
    ".popsection",
    ".code64",
);

unsafe extern "C" {
    static page_writer_begin: u8;
    static page_writer_end: u8;
}

fn page_writer() -> &'static [u8] {
    let (begin, end) = (&raw const page_writer_begin, &raw const page_writer_end);
    // SAFETY: labels around the bytes above, in this order and in one section of this program, which never changes.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

/// Hears of everything.
struct Ears {
    heard: Mutex<mpsc::Sender<String>>,
}

impl Exits for Ears {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn port_write(&self, port: u16, data: &[u8]) -> Option<String> {
        (port == DONE).then(|| format!("done {data:?}"))
    }
    fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(address as u8);
    }
    fn memory_write(&self, _: u64, _: &[u8]) {}
    fn stopped(&self, _: u8, how: String) {
        let _ = self.heard.lock().unwrap().send(how);
    }
    fn peek(&self, _: u64, bytes: &mut [u8]) -> usize {
        bytes.fill(0xcc);
        2
    }
}

/// Fields are dropped in this order.
struct Rig {
    vcpu: Vcpu,
    heard: mpsc::Receiver<String>,
    vm: Arc<Vm>,
    ram: GuestRam,
}

fn kvm() -> Option<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() {
        eprintln!("skipped: /dev/kvm cannot be opened");
    }
    kvm.ok().map(OwnedFd::from)
}

fn image(code: &[u8], list: &[u32]) -> File {
    let image = tempfile::tempfile().unwrap();
    image.set_len(MEMORY).unwrap();
    image.write_all_at(code, CODE).unwrap();
    let list: Vec<u8> = list.iter().chain(&[0]).flat_map(|page| page.to_le_bytes()).collect();
    image.write_all_at(&list, LIST).unwrap();
    image
}

fn rig(kvm: OwnedFd, image: File) -> Rig {
    let ram = GuestRam::map(image, MEMORY, MemoryUse::Private).unwrap();
    let vm = Arc::new(Vm::new(kvm, &ram).unwrap());
    let (sender, heard) = mpsc::channel();
    let vcpu = Vcpu::new(&vm, 0, Arc::new(Ears { heard: Mutex::new(sender) }), &(Arc::new(|_| Ok(())) as crate::machine::Confine)).unwrap();
    Rig { vcpu, heard, vm, ram }
}

fn start(rig: &Rig) {
    let identity = cpuid::of_vcpu(rig.vm.cpuid(), 0, 1);
    rig.vcpu.with(move |fd| boot::start(fd, &identity, Some(Entry { address: CODE }))).unwrap().unwrap();
}

fn run(rig: &Rig) -> String {
    rig.vcpu.run().unwrap();
    let how = rig.heard.recv_timeout(LIMIT).expect("the guest has neither ended nor failed");
    rig.vcpu.wait_stopped().unwrap();
    how
}

#[test]
fn what_is_no_kvm_is_refused_with_a_reason() {
    let ram = GuestRam::map(image(&[], &[]), MEMORY, MemoryUse::Private).unwrap();
    let error = Vm::new(File::open("/dev/null").unwrap().into(), &ram).unwrap_err();
    assert!(matches!(error, KvmError::Lacks(_)) && error.to_string().contains("/dev/kvm"), "{error}");
}

#[test]
fn a_triple_fault_is_told_with_the_place_where_it_was() {
    let Some(kvm) = kvm() else { return };
    // `lidt [zeros]`, `ud2`: an exception without a single handler.
    let rig = rig(kvm, image(&[0x0f, 0x01, 0x1d, 0, 0, 0x13, 0, 0x0f, 0x0b], &[]));
    start(&rig);
    let how = run(&rig);
    assert!(how.contains("RIP 0x100"), "{how}");
}

#[test]
fn every_part_of_the_state_can_be_read_and_set() {
    let Some(kvm) = kvm() else { return };
    let image = image(page_writer(), &[]);
    let one = rig(kvm, image.try_clone().unwrap());
    start(&one);
    assert_eq!(run(&one), "done [1]");
    let identity = cpuid::of_vcpu(one.vm.cpuid(), 0, 1);
    let read = |rig: &Rig| {
        let (vm, identity) = (rig.vm.clone(), identity.clone());
        let vcpu = rig.vcpu.with(move |fd| VcpuState::read(fd, &vm, identity)).unwrap().unwrap();
        (vcpu, VmState::read(&rig.vm).unwrap())
    };
    let (vcpu, machine) = read(&one);
    assert!(vcpu.msrs.len() > 10 && vcpu.xsave.len() >= 4096);
    assert_ne!(machine.clock.clock, 0);

    let other = rig(self::kvm().unwrap(), image);
    {
        let (vm, vcpu) = (other.vm.clone(), vcpu.clone());
        other.vcpu.with(move |fd| vcpu.write(fd, &vm)).unwrap().unwrap();
    }
    machine.write(&other.vm).unwrap();
    let (vcpu_there, machine_there) = read(&other);
    assert_eq!(vcpu_there.regs, vcpu.regs);
    assert_eq!(vcpu_there.sregs, vcpu.sregs);
    assert!(vcpu_there.xsave == vcpu.xsave);
    assert!(vcpu_there.lapic.regs == vcpu.lapic.regs);
    // Clocks go on from where they were: they do not begin anew, and do not jump by the time of day.
    assert!(machine_there.clock.clock >= machine.clock.clock && machine_there.clock.clock - machine.clock.clock < 60_000_000_000);
    assert_eq!(machine_there.pit.channels.map(|channel| channel.mode), machine.pit.channels.map(|channel| channel.mode));
    for (there, here) in vcpu_there.msrs.iter().zip(&vcpu.msrs) {
        assert_eq!(there.index, here.index);
        // Clocks tick on: TSC and the deadline on it.
        if !matches!(here.index, super::msr::TSC | super::msr::TSC_DEADLINE) {
            assert_eq!(there.data, here.data, "register {:#x}", here.index);
        }
    }
}

#[test]
fn a_vcpu_stops_wherever_it_is_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    // `inc ecx; jmp -3`: never exits by itself.
    let rig = rig(kvm, image(&[0x41, 0xeb, 0xfd], &[]));
    start(&rig);
    let mut before = 0;
    for _ in 0..50 {
        rig.vcpu.run().unwrap();
        rig.vcpu.ask_to_stop();
        rig.vcpu.wait_stopped().unwrap();
        let now = rig.vcpu.with(|fd| fd.get_regs().unwrap().rcx).unwrap();
        assert!(now >= before);
        assert_eq!(rig.vcpu.with(|fd| fd.get_regs().unwrap().rcx).unwrap(), now);
        before = now;
    }
}

/// `out 0x78, al` for ever; where it goes, somebody may be slow.
const TALKER: [u8; 4] = [0xe6, 0x78, 0xeb, 0xfc];

/// Takes its time for the first access, until it is told.
struct Slow {
    entered: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Exits for Slow {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) -> Option<String> {
        let _ = self.entered.lock().unwrap().send(());
        let _ = self.go_on.lock().unwrap().recv();
        None
    }
    fn memory_read(&self, _: u64, _: &mut [u8]) {}
    fn memory_write(&self, _: u64, _: &[u8]) {}
    fn stopped(&self, _: u8, _: String) {}
    fn peek(&self, _: u64, _: &mut [u8]) -> usize {
        0
    }
}

#[test]
fn a_stop_that_is_not_waited_for_is_taken_back_by_run() {
    let Some(kvm) = kvm() else { return };
    let ram = GuestRam::map(image(&TALKER, &[]), MEMORY, MemoryUse::Private).unwrap();
    let vm = Arc::new(Vm::new(kvm, &ram).unwrap());
    let ((entered, enters), (go_on, told)) = (mpsc::channel(), mpsc::channel());
    let slow = Slow { entered: Mutex::new(entered), go_on: Mutex::new(told) };
    let vcpu = Vcpu::new(&vm, 0, Arc::new(slow), &(Arc::new(|_| Ok(())) as crate::machine::Confine)).unwrap();
    let identity = cpuid::of_vcpu(vm.cpuid(), 0, 1);
    vcpu.with(move |fd| boot::start(fd, &identity, Some(Entry { address: CODE }))).unwrap().unwrap();
    vcpu.run().unwrap();
    enters.recv_timeout(LIMIT).expect("the guest's first access");
    // It is in a device that does not come back; the pause is given up.
    vcpu.ask_to_stop();
    vcpu.run().unwrap();
    for _ in 0..3 {
        go_on.send(()).unwrap();
        enters.recv_timeout(LIMIT).expect("the guest goes on");
    }
    // Now all accesses are quick.
    drop(go_on);
    vcpu.ask_to_stop();
    vcpu.wait_stopped().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn page_tables_and_dirty_log_agree_on_what_the_guest_has_written(pages in proptest::collection::btree_set(PAGES, 1..300)) {
        let Some(kvm) = kvm() else { return Ok(()) };
        let list: Vec<u32> = pages.iter().copied().collect();
        let rig = rig(kvm, image(page_writer(), &list));
        start(&rig);
        dirty::start(&rig.vm, &rig.ram).unwrap();
        prop_assert_eq!(run(&rig), "done [1]");
        let logged = dirty::take(&rig.vm, &rig.ram).unwrap();
        let way = rig.ram.find_way(File::open("/proc/self/pagemap").ok());
        let by_page_tables = matches!(way, DirtyPages::PageTables { .. });
        prop_assert!(by_page_tables);
        let private: Vec<u64> = rig.ram.candidates(&way).unwrap().into_iter().flatten().collect();
        let written: Vec<u64> = pages.iter().map(|page| u64::from(*page)).collect();
        prop_assert_eq!(&logged, &written);
        prop_assert_eq!(&private, &written);
        prop_assert!(dirty::take(&rig.vm, &rig.ram).unwrap().is_empty());
    }
}
