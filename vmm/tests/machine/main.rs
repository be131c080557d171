//! A whole machine with a guest of a few instructions, on whatever KVM this host has (kvm-hosts.md).

#[path = "../process/elf.rs"]
mod elf;
mod guest;

use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
};
use vmm::{
    jail::ProcessFiles,
    machine::{Boot, Machine, MachineError, Restore, SaveParts, SealedLayer, Shell, Stopped},
};
use vmm_protocol::{
    control::{Fault, MemoryUse},
    memdiff::{PAGE, Reader},
};

const MEMORY: u64 = 16 << 20;
const DISK: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

fn file(bytes: u64) -> File {
    let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

fn again(file: &File) -> File {
    file.try_clone().unwrap()
}

/// `None`, with a word, where there is no KVM at all.
fn kvm() -> Option<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() {
        eprintln!("skipped: /dev/kvm cannot be opened");
    }
    kvm.ok().map(OwnedFd::from)
}

fn try_machine(kvm: OwnedFd, memory: &File, memory_use: MemoryUse, vcpus: u8) -> Result<Machine, MachineError> {
    let dir = tempfile::tempdir().unwrap();
    let vsock = std::os::unix::net::UnixListener::bind(dir.path().join("vsock")).unwrap();
    vsock.set_nonblocking(true).unwrap();
    let process_files = ProcessFiles::open().unwrap();
    Machine::prepare(Shell {
        kvm,
        memory: again(memory),
        memory_bytes: MEMORY,
        memory_use,
        vcpus,
        disk_bytes: DISK,
        net: None,
        vsock,
        confine: Arc::new(|_| Ok(())),
        process_files,
    })
}

fn machine(memory: &File, memory_use: MemoryUse) -> Machine {
    try_machine(kvm().unwrap(), memory, memory_use, 1).unwrap()
}

fn boot(machine: &mut Machine, disk: &File) {
    let kernel = file(0);
    kernel.write_all_at(&guest::kernel(), 0).unwrap();
    machine.boot(Boot { kernel, initramfs: file(4096), disk: again(disk), cmdline: "a=b".to_owned() }).unwrap();
}

fn turn(machine: &mut Machine) -> Option<Stopped> {
    {
        let mut descriptors = [PollFd::from_borrowed_fd(machine.events(), PollFlags::IN)];
        poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 })).unwrap();
    }
    machine.dispatch()
}

/// All counts that the guest has printed, as far as they are kept.
fn counts(machine: &Machine) -> Vec<u32> {
    let console = machine.console();
    // The first line may have lost its beginning, the last may not be complete.
    let complete = console.rsplit_once('\n').map_or("", |(complete, _)| complete);
    complete.lines().filter(|line| line.len() == 8).map(|line| u32::from_str_radix(line, 16).unwrap()).collect()
}

fn until_counted(machine: &mut Machine, to: u32) -> Vec<u32> {
    let begin = Instant::now();
    loop {
        assert_eq!(turn(machine), None);
        let counts = counts(machine);
        if counts.last().is_some_and(|count| *count >= to) {
            return counts;
        }
        assert!(begin.elapsed() < LIMIT, "the guest has counted to {:?}, not to {to}", counts.last());
    }
}

/// An image of a guest that has counted to five at least.
struct Image {
    memory: File,
    disk: File,
    state: File,
    count: u32,
}

fn counter_in(memory: &File) -> u32 {
    let mut count = [0; 4];
    memory.read_exact_at(&mut count, guest::COUNTER).unwrap();
    u32::from_le_bytes(count)
}

impl Image {
    fn make() -> Self {
        let (memory, disk, state) = (file(MEMORY), file(DISK), file(0));
        let mut machine = machine(&memory, MemoryUse::Shared);
        boot(&mut machine, &disk);
        until_counted(&mut machine, 5);
        machine.pause().unwrap();
        let saved = machine.save(again(&state), SaveParts::Image, &mut || false).unwrap();
        assert_eq!((saved.memory, saved.map_crc32, saved.merged), (None, None, false));
        assert_eq!(state.metadata().unwrap().len(), saved.state_bytes);
        let count = counter_in(&memory);
        Self { memory, disk, state, count }
    }

    fn restore(&self, difference: Option<&Difference>) -> Machine {
        let mut machine = machine(&self.memory, MemoryUse::Private);
        machine.restore(self.files(difference)).unwrap();
        machine
    }

    fn files(&self, difference: Option<&Difference>) -> Restore {
        Restore {
            state: again(difference.map_or(&self.state, |difference| &difference.state)),
            difference: difference.map(|difference| again(&difference.memory)),
            disk_base: again(&self.disk),
            sealed_layers: difference.iter().map(|difference| SealedLayer { data: again(&difference.top), map: again(&difference.map) }).collect(),
            disk_top: file(0),
            streams: Vec::new(),
        }
    }

    fn save(&self, machine: &mut Machine) -> Difference {
        let difference = Difference { state: file(0), memory: file(0), map: file(0), top: file(DISK) };
        let parts = SaveParts::Difference { memory: again(&difference.memory), image_memory: again(&self.memory), disk_map: again(&difference.map), merge_layers: false };
        let saved = machine.save(again(&difference.state), parts, &mut || false).unwrap();
        assert_eq!(saved.memory.unwrap().bytes, difference.memory.metadata().unwrap().len());
        difference
    }
}

struct Difference {
    state: File,
    memory: File,
    map: File,
    /// Nothing is written to the disk, so an empty layer stands for the one that was there.
    top: File,
}

impl Difference {
    fn pages(&self) -> BTreeSet<u64> {
        let mut source = &self.memory;
        let reader = Reader::open(&mut source, MEMORY / PAGE as u64).unwrap();
        reader.runs().iter().flat_map(|run| u64::from(run.first)..u64::from(run.first) + u64::from(run.pages)).collect()
    }

    fn page(&self, wanted: u64) -> Vec<u8> {
        let mut source = &self.memory;
        let mut found = Vec::new();
        Reader::open(&mut source, MEMORY / PAGE as u64)
            .unwrap()
            .apply(|offset, bytes| {
                for (page, content) in (offset / PAGE as u64..).zip(bytes.chunks(PAGE)) {
                    if page == wanted {
                        found = content.to_vec();
                    }
                }
                Ok(())
            })
            .unwrap();
        found
    }
}

#[test]
fn a_guest_boots_is_paused_goes_on_and_turns_itself_off_by_its_button() {
    if kvm().is_none() {
        return;
    }
    let (memory, disk) = (file(MEMORY), file(DISK));
    let mut machine = machine(&memory, MemoryUse::Shared);
    assert_eq!(machine.run().unwrap_err().fault, Fault::Request);
    boot(&mut machine, &disk);
    let before = until_counted(&mut machine, 3);
    assert_eq!(before[..3], [1, 2, 3]);
    for _ in 0..20 {
        machine.pause().unwrap();
        // Paused means paused: nothing moves, and nothing is lost.
        let count = counter_in(&memory);
        assert_eq!(turn(&mut machine), None);
        assert_eq!(counter_in(&memory), count);
        machine.run().unwrap();
    }
    let counts = until_counted(&mut machine, before[before.len() - 1] + 3);
    assert!(counts.windows(2).all(|pair| pair[1] == pair[0] + 1), "{counts:?}");
    let usage = machine.usage();
    assert!(usage.exits > 20 && usage.vcpu_us > 0 && usage.peak_resident_bytes > 0, "{usage:?}");

    machine.power_button();
    let begin = Instant::now();
    let stopped = loop {
        if let Some(stopped) = turn(&mut machine) {
            break stopped;
        }
        assert!(begin.elapsed() < LIMIT);
    };
    assert_eq!(stopped.how, "the guest turned itself off");
    assert_eq!(turn(&mut machine), None);
    assert_eq!(machine.run().unwrap_err().fault, Fault::Request);
}

#[test]
fn clones_go_on_where_the_image_was_and_do_not_see_each_other() {
    if kvm().is_none() {
        return;
    }
    let image = Image::make();
    let (mut one, mut other) = (image.restore(None), image.restore(None));
    // Restored, but not run: nothing has happened.
    assert_eq!(turn(&mut one), None);
    assert!(one.console().is_empty());
    one.run().unwrap();
    until_counted(&mut one, image.count + 20);
    other.run().unwrap();
    let counts = until_counted(&mut other, image.count + 2);
    // The image may have been taken in the middle of a line, of a count that was made already.
    let first = image.count..=image.count + 1;
    assert!(first.contains(&counts[0]), "{} after {}", counts[0], image.count);
    assert_eq!(counter_in(&image.memory), image.count, "a clone wrote into the image");
}

#[test]
fn a_difference_is_what_was_written_and_a_guest_goes_on_from_it_again_and_again() {
    if kvm().is_none() {
        return;
    }
    let image = Image::make();
    let mut difference: Option<Difference> = None;
    let (mut reached, mut pages) = (image.count, BTreeSet::new());
    for _ in 0..4 {
        let mut machine = image.restore(difference.as_ref());
        machine.run().unwrap();
        until_counted(&mut machine, reached + 7);
        machine.pause().unwrap();
        // A save that is cancelled leaves the guest as it is.
        let parts = SaveParts::Difference { memory: file(0), image_memory: again(&image.memory), disk_map: file(0), merge_layers: false };
        assert_eq!(machine.save(file(0), parts, &mut || true).err().map(|error| error.fault), Some(Fault::Cancelled));
        let saved = image.save(&mut machine);
        let counter = saved.page(guest::COUNTER / PAGE as u64);
        let now = u32::from_le_bytes(counter[..4].try_into().unwrap());
        assert!(now >= reached + 7);
        let ring = |count: u32| guest::RING / PAGE as u64 + u64::from(count) % guest::RING_PAGES;
        let exactly: BTreeSet<u64> = (image.count + 1..=now).map(ring).collect();
        let mut found = saved.pages();
        // The image may have been taken when its last count was made, and not yet in the ring.
        found.remove(&ring(image.count));
        // The new VMGenID is ours, and the last page of the ring may not have been written yet.
        assert!(found.remove(&(vmm::arch::layout::VMGENID / PAGE as u64)));
        assert!(found.remove(&(guest::COUNTER / PAGE as u64)));
        let missing: Vec<_> = exactly.difference(&found).copied().collect();
        assert!(found.is_subset(&exactly) && missing.len() <= 1, "found {found:?}, should be {exactly:?}");
        assert!(pages.is_subset(&found), "pages of the difference before were not carried over");
        (reached, pages, difference) = (now, found, Some(saved));
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_with_a_reason() {
    if kvm().is_none() {
        return;
    }
    let image = Image::make();
    let refused = |vcpus: u8, state: &[u8]| {
        let mut machine = try_machine(kvm().unwrap(), &image.memory, MemoryUse::Private, vcpus).unwrap();
        let changed = file(0);
        changed.write_all_at(state, 0).unwrap();
        let error = machine.restore(Restore { state: changed, ..image.files(None) }).unwrap_err();
        assert_eq!(machine.run().unwrap_err().fault, Fault::Request, "a spoilt machine must not run");
        error
    };
    let mut good = vec![0; image.state.metadata().unwrap().len() as usize];
    image.state.read_exact_at(&mut good, 0).unwrap();
    let error = refused(2, &good);
    assert!(error.fault == Fault::Snapshot && error.why.contains("another machine"), "{error}");
    for at in [0, 20, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let error = refused(1, &bad);
        assert!(error.fault == Fault::Snapshot && error.why.contains("damaged"), "{at}: {error}");
    }
    assert_eq!(refused(1, &[]).fault, Fault::Snapshot);
}

/// Values that the checksums vouch for and no guest ever had: KVM and we may take or refuse them, but never fall over.
#[test]
fn a_forged_state_does_no_harm() {
    if kvm().is_none() {
        return;
    }
    use vmm::snapshot::format::{Sections, Writer};
    let image = Image::make();
    let mut good = vec![0; image.state.metadata().unwrap().len() as usize];
    image.state.read_exact_at(&mut good, 0).unwrap();
    let sections = Sections::parse(&good).unwrap();
    let count = sections.iter().count();
    // A fixed sequence (xorshift), so that a failure can be repeated.
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    };
    let (mut taken, mut refused) = (0, 0);
    for round in 0..80 {
        let mut writer = Writer::default();
        for (index, section) in sections.iter().enumerate() {
            let mut content = section.content.to_vec();
            if index == round % count {
                match next(4) {
                    0 => content.truncate(next(content.len())),
                    _ => {
                        for _ in 0..=next(6) {
                            let at = next(content.len());
                            content[at] = next(256) as u8;
                        }
                    }
                }
            }
            writer.section(section.tag, section.version, &content);
        }
        let forged = file(0);
        forged.write_all_at(&writer.finish(), 0).unwrap();
        let mut machine = machine(&image.memory, MemoryUse::Private);
        match machine.restore(Restore { state: forged, ..image.files(None) }) {
            Err(_) => refused += 1,
            Ok(_) => {
                taken += 1;
                machine.run().unwrap();
                for _ in 0..3 {
                    if turn(&mut machine).is_some() {
                        break;
                    }
                }
                machine.pause().unwrap();
            }
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
}

#[test]
fn several_vcpus_stop_together() {
    if kvm().is_none() {
        return;
    }
    let (memory, disk) = (file(MEMORY), file(DISK));
    let mut machine = try_machine(kvm().unwrap(), &memory, MemoryUse::Shared, 4).unwrap();
    boot(&mut machine, &disk);
    until_counted(&mut machine, 3);
    machine.pause().unwrap();
    let state = file(0);
    machine.save(again(&state), SaveParts::Image, &mut || false).unwrap();
    drop(machine);
    let mut clone = try_machine(kvm().unwrap(), &memory, MemoryUse::Private, 4).unwrap();
    clone.restore(Restore { state, difference: None, disk_base: disk, sealed_layers: Vec::new(), disk_top: file(0), streams: Vec::new() }).unwrap();
    clone.run().unwrap();
    let before = counter_in(&memory);
    until_counted(&mut clone, before + 3);
}

/// Not a test: `cargo test --release -p vmm --test machine -- --ignored --nocapture` prints what a restore takes.
#[test]
#[ignore = "prints times"]
fn time_of_a_restore() {
    if kvm().is_none() {
        return;
    }
    let image = Image::make();
    let mut times: Vec<(Duration, Duration, Duration, vmm::machine::Phases)> = (0..51)
        .map(|_| {
            let begin = Instant::now();
            let mut machine = machine(&image.memory, MemoryUse::Private);
            let prepared = begin.elapsed();
            let phases = machine.restore(image.files(None)).unwrap();
            let restored = begin.elapsed();
            machine.run().unwrap();
            until_counted(&mut machine, image.count + 1);
            (begin.elapsed(), prepared, restored, phases)
        })
        .collect();
    times.sort();
    let (answered, prepared, restored, phases) = &times[times.len() / 2];
    println!("median: prepared {prepared:?}, restored {restored:?}, first line {answered:?}; {phases:?}");
}
