//! Init of two guests: of the outer one, which QEMU runs and in which KVM is hardware to us, and of the inner one, which our
//! machine runs there. What it prints is what `tests/nested.rs` looks for.
//!
//! ```text
//! QEMU (TCG, an AMD processor with SVM) ─► Debian's kernel ─► this, as "outer" ─► Machine ─► Debian's kernel ─► this, as "inner"
//! ```
//! The inner guest counts and echoes what comes over vsock; the outer one saves it, restores it from its image, saves the
//! difference and restores that, and each time the count and the stream must go on.

#[path = "nested/process.rs"]
mod process;

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    mount::{MountFlags, mount},
    system::{RebootCommand, finit_module, reboot},
};
use vmm::{
    jail::ProcessFiles,
    machine::{Boot, Machine, Restore, SaveParts, Shell, Stopped},
};
use vmm_protocol::control::{AGENT_PORT, MemoryUse};

const MEMORY: u64 = 256 << 20;
const DISK: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn main() {
    let _ = fs::create_dir_all("/proc");
    mount("proc", "/proc", "proc", MountFlags::empty(), None).expect("mounting /proc");
    let arguments = fs::read_to_string("/proc/cmdline").expect("reading the kernel's arguments");
    let _ = fs::create_dir_all("/sys");
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).expect("mounting /sys");
    let _ = fs::create_dir_all("/dev");
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None).expect("mounting /dev");
    load_modules();
    if arguments.contains("inner") {
        inner();
    } else {
        let vcpus = arguments.split_whitespace().find_map(|word| word.strip_prefix("vcpus=")).and_then(|count| count.parse().ok()).unwrap_or(1);
        // As this program's own machine, or in processes of the VMM.
        let run = if arguments.contains("process") { process::outer } else { outer };
        if let Err(panic) = std::panic::catch_unwind(|| run(vcpus)) {
            println!("OUTER FAILED {:?}", panic.downcast_ref::<String>());
        }
    }
    power_off();
}

fn power_off() -> ! {
    let _ = std::io::stdout().flush();
    // Lets the serial console drain.
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}

fn load_modules() {
    for name in fs::read_to_string("/modules/order").unwrap_or_default().lines() {
        let module = File::open(format!("/modules/{name}")).expect("opening a module");
        if let Err(error) = finit_module(&module, c"", 0) {
            println!("module {name}: {error}");
        }
    }
}

/// Counts, and proves that memory, disk and clocks go on.
fn inner() -> ! {
    std::thread::spawn(|| println!("INNER ECHO {:?}", echo()));
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("INNER UP after {} s", uptime.split(' ').next().unwrap_or("?"));
    let mut devices: Vec<String> = fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten().map(|entry| {
        let read = |what: &str| fs::read_to_string(entry.path().join(what)).unwrap_or_default().trim().to_owned();
        let driver = fs::read_link(entry.path().join("driver")).ok().and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        format!("{}={}", read("device"), driver.unwrap_or_else(|| "none".to_owned()))
    }).collect();
    devices.sort();
    println!("INNER DEVICES {}", devices.join(" "));
    println!("INNER CPUS {}", fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default().trim());
    println!("INNER RESETS BY {}", fs::read_to_string("/sys/kernel/reboot/type").unwrap_or_default().trim());
    println!("INNER CLOCK {}", fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap_or_default().trim());
    let mut random = [0u8; 16];
    let entropy = File::open("/dev/hwrng").and_then(|mut file| file.read_exact(&mut random));
    println!("INNER HWRNG {:?}", entropy.map(|()| random != [0; 16]).map_err(|error| error.to_string()));
    let mut disk = fs::OpenOptions::new().read(true).write(true).open("/dev/vda").ok();
    let mut pages = vec![0u8; 8 << 20];
    for n in 0u64.. {
        // Each round writes one page of memory and one block of the disk, and checks all of them so far.
        let at = (n as usize % 2048) * 4096;
        pages[at..at + 8].copy_from_slice(&(n + 1).to_le_bytes());
        let whole = (0..=n.min(2047)).all(|k| pages[k as usize * 4096..k as usize * 4096 + 8] != [0; 8]);
        let on_disk = disk.as_mut().map(|disk| {
            let mut block = [0u8; 4096];
            block[..8].copy_from_slice(&n.to_le_bytes());
            let write = disk.seek(SeekFrom::Start(n % 4096 * 4096)).and_then(|_| disk.write_all(&block)).and_then(|()| disk.sync_data());
            let read = disk.seek(SeekFrom::Start(n / 2 % 4096 * 4096)).and_then(|_| disk.read_exact(&mut block));
            write.and(read).is_ok_and(|()| block[..8] == (n / 2).to_le_bytes())
        });
        println!("TICK {n} memory={whole} disk={on_disk:?} acpi={:?}", acpi_events());
        std::thread::sleep(Duration::from_millis(50));
    }
    unreachable!("2^64 rounds");
}

/// How often the ACPI event device has interrupted: each new VMGenID does.
fn acpi_events() -> Option<u64> {
    let interrupts = fs::read_to_string("/proc/interrupts").ok()?;
    let line = interrupts.lines().find(|line| line.contains("ACPI:Ged"))?;
    Some(line.split_whitespace().skip(1).map_while(|count| count.parse::<u64>().ok()).sum())
}

/// Answers what comes to the agent's vsock port, every byte with itself.
fn echo() -> std::io::Result<()> {
    let done = |result: libc::c_int| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: a system call without pointers; the new descriptor is owned right away.
    let listener = unsafe { OwnedFd::from_raw_fd(done(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0))?) };
    // SAFETY: all-zero is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as u16, libc::VMADDR_CID_ANY, AGENT_PORT);
    // SAFETY: the address is valid and as long as said.
    done(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    rustix::net::listen(&listener, 8)?;
    println!("INNER VSOCK listens");
    loop {
        let mut stream = File::from(rustix::net::accept(&listener)?);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                // Two words are orders.
                let _ = match &bytes[..length] {
                    b"turn off" => reboot(RebootCommand::PowerOff),
                    b"reset" => reboot(RebootCommand::Restart),
                    _ => Ok(()),
                };
                if stream.write_all(&bytes[..length]).is_err() {
                    break;
                }
            }
            println!("INNER STREAM ended");
        });
    }
}

fn memory_file(bytes: u64) -> File {
    let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).expect("making a memory file"));
    file.set_len(bytes).expect("sizing a file");
    file
}

fn copy_of(file: &File) -> File {
    file.try_clone().expect("duplicating a descriptor")
}

fn dial() -> UnixStream {
    let client = UnixStream::connect("/vsock").expect("connecting to the vsock socket");
    client.set_nonblocking(true).expect("making a stream not wait");
    client
}

fn machine(memory: &File, memory_use: MemoryUse, vcpus: u8) -> Machine {
    let socket = "/vsock";
    let _ = fs::remove_file(socket);
    let vsock = UnixListener::bind(socket).expect("binding the vsock socket");
    vsock.set_nonblocking(true).expect("making the socket not wait");
    let kvm: OwnedFd = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").expect("opening /dev/kvm").into();
    let shell = Shell {
        kvm,
        memory: copy_of(memory),
        memory_bytes: MEMORY,
        memory_use,
        vcpus,
        disk_bytes: DISK,
        net: None,
        vsock,
        confine: Arc::new(|_| Ok(())),
        process_files: ProcessFiles::open().expect("opening files of /proc"),
    };
    let machine = Machine::prepare(shell).expect("preparing a machine");
    // Everything that the inner guest prints is seen outside, too.
    machine.copy_console(std::os::fd::AsFd::as_fd(&std::io::stdout()).try_clone_to_owned().expect("duplicating stdout"));
    machine
}

/// Runs the event loop until the guest has printed a line that `wanted` takes something of.
fn until<T>(machine: &mut Machine, what: &str, wanted: impl Fn(&str) -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        {
            let mut descriptors = [PollFd::from_borrowed_fd(machine.events(), PollFlags::IN)];
            let _ = poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
        }
        if let Some(Stopped { how }) = machine.dispatch() {
            panic!("the inner guest stopped while waiting for {what}: {how}");
        }
        let console = machine.console();
        if let Some(found) = console.lines().rev().skip(usize::from(!console.ends_with('\n'))).find_map(&wanted) {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "the inner guest did not get to {what}");
    }
}

/// Sends an order, and runs the event loop until the guest has stopped.
fn order(machine: &mut Machine, stream: &mut UnixStream, word: &str) -> String {
    stream.write_all(word.as_bytes()).expect("writing into a stream");
    let begin = Instant::now();
    loop {
        if let Some(Stopped { how }) = machine.dispatch() {
            return how;
        }
        assert!(begin.elapsed() < LIMIT, "the inner guest does not obey {word:?}");
        std::thread::yield_now();
    }
}

/// Sends a word into a stream and runs the event loop until `answer` has come out of it.
fn ask(machine: &mut Machine, stream: &mut UnixStream, word: &str, answer: &str) {
    let begin = Instant::now();
    stream.write_all(word.as_bytes()).expect("writing into a stream");
    let (mut heard, mut bytes) = (String::new(), [0; 256]);
    while !heard.starts_with(answer) || (answer == "OK" && !heard.ends_with('\n')) {
        machine.dispatch();
        match stream.read(&mut bytes) {
            Ok(0) => panic!("the stream has ended after {:?} instead of answering {word:?}", begin.elapsed()),
            Ok(count) => heard.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(error) => panic!("reading from a stream: {error}"),
        }
        assert!(begin.elapsed() < LIMIT, "{word:?} was answered with {heard:?}");
    }
    println!("OUTER STREAM {:?} -> {:?} in {:?}", word.trim(), heard.trim(), begin.elapsed());
}

fn tick(line: &str) -> Option<u64> {
    let rest = line.trim().strip_prefix("TICK ")?;
    assert!(rest.contains("memory=true") && !rest.contains("disk=Some(false)"), "the inner guest has lost something: {line}");
    rest.split(' ').next()?.parse().ok()
}

fn outer(vcpus: u8) {
    println!("OUTER UP, KVM {:?}", vmm::kvm::probe::probe());
    let memory = memory_file(MEMORY);
    let disk = memory_file(DISK);
    let open = |path| File::open(path).expect("opening a file to boot");
    let begin = Instant::now();
    let mut first = machine(&memory, MemoryUse::Shared, vcpus);
    let phases = first
        .boot(Boot { kernel: open("/vmlinux"), initramfs: open("/inner.cpio"), disk: copy_of(&disk), cmdline: "console=ttyS0 panic=-1 inner".to_owned() })
        .expect("booting");
    println!("OUTER BOOT {phases:?}");
    let ticks = until(&mut first, "its tenth tick", |line| tick(line).filter(|n| *n >= 10));
    println!("OUTER TICKS {ticks} after {:?}", begin.elapsed());
    let mut client = dial();
    ask(&mut first, &mut client, &format!("CONNECT {AGENT_PORT}\n"), "OK");
    ask(&mut first, &mut client, "first", "first");
    let begin = Instant::now();
    first.pause().expect("pausing");
    println!("OUTER PAUSED {:?}", begin.elapsed());
    let before = until(&mut first, "a tick", tick);
    let state = memory_file(0);
    let saved = first.save(copy_of(&state), SaveParts::Image, &mut || false).expect("saving an image");
    println!("OUTER SAVED {} bytes {:?}", saved.state_bytes, saved.phases);
    println!("OUTER USAGE {:?}", first.usage());
    drop(first);

    // A clone of the image, and a second one, which must find the same.
    let mut difference = None;
    for clone in 0..2 {
        let begin = Instant::now();
        let mut second = machine(&memory, MemoryUse::Private, vcpus);
        let top = memory_file(0);
        let restore = Restore { state: copy_of(&state), difference: None, disk_base: copy_of(&disk), sealed_layers: Vec::new(), disk_top: copy_of(&top), streams: Vec::new() };
        let phases = second.restore(restore).expect("restoring an image");
        second.run().expect("running");
        let after = until(&mut second, "a tick after its restore", tick);
        println!("OUTER RESTORED {clone} tick {before} -> {after} in {:?} {phases:?}", begin.elapsed());
        assert!((before..=before + 2).contains(&after), "the count went from {before} to {after}");
        until(&mut second, "five more ticks", |line| tick(line).filter(|n| *n >= before + 5));
        let mut client = dial();
        ask(&mut second, &mut client, &format!("CONNECT {AGENT_PORT}\n"), "OK");
        ask(&mut second, &mut client, "second", "second");
        second.pause().expect("pausing");
        let before = until(&mut second, "a tick", tick);
        let (state, memory_difference, map) = (memory_file(0), memory_file(0), memory_file(0));
        let parts = SaveParts::Difference { memory: copy_of(&memory_difference), image_memory: copy_of(&memory), disk_map: copy_of(&map), merge_layers: false };
        let saved = second.save(copy_of(&state), parts, &mut || false).expect("saving a difference");
        println!("OUTER SUSPENDED {clone} {:?} {:?} {:?}", saved.memory, saved.map_crc32, saved.phases);
        if clone == 0 {
            // Taken back: it goes on as if nothing had happened.
            second.run().expect("running on");
            ask(&mut second, &mut client, "taken back", "taken back");
            until(&mut second, "a tick after a suspend that was taken back", |line| tick(line).filter(|n| *n > before + 1));
        }
        if clone == 0 {
            println!("OUTER STOPPED {}", order(&mut second, &mut client, "reset"));
            continue;
        }
        // Said while it sleeps, heard when it wakes.
        client.write_all(b"third").expect("writing to a sleeping guest");
        difference = Some((state, memory_difference, top, map, before, saved.streams, client));
    }

    let (state, memory_difference, data, map, before, streams, mut client) = difference.expect("two clones were made");
    let begin = Instant::now();
    let mut third = machine(&memory, MemoryUse::Private, vcpus);
    let restore = Restore {
        state,
        difference: Some(memory_difference),
        disk_base: disk,
        sealed_layers: vec![vmm::machine::SealedLayer { data, map }],
        disk_top: memory_file(0),
        streams,
    };
    let phases = third.restore(restore).expect("restoring a difference");
    third.run().expect("running");
    let after = until(&mut third, "a tick after its second restore", tick);
    println!("OUTER RESUMED tick {before} -> {after} in {:?} {phases:?}", begin.elapsed());
    assert!((before..=before + 2).contains(&after), "the count went from {before} to {after}");
    ask(&mut third, &mut client, "", "third");
    ask(&mut third, &mut client, "fourth", "fourth");
    until(&mut third, "five more ticks", |line| tick(line).filter(|n| *n >= before + 5));
    println!("OUTER USAGE {:?}", third.usage());
    println!("OUTER STOPPED {}", order(&mut third, &mut client, "turn off"));
    println!("OUTER DONE");
}
