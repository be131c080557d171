//! The life of a microVM under its filters, with guests of a few instructions: booted, saved as an image, cloned, saved as a
//! difference, restored from it. The real kernel's turn comes in the nested run.

mod process;

use std::{fs::File, os::fd::AsFd};

use process::{DISK_BYTES, Files, MEMORY_BYTES, Node, booted, eventually, guest, has_kvm, killed_by, kvm, prepared};
use vmm_protocol::control::{Event, Fault, FromVmm, MemoryUse, Reply, Request, SaveKind, Usage, VERSION};

const DIFFERENCE: Request = Request::Save { kind: SaveKind::Difference { merge_layers: false } };

fn usage(node: &mut Node) -> Usage {
    match node.ask(Request::Usage, &[]) {
        Reply::Usage(usage) => usage,
        other => panic!("{other:?}"),
    }
}

/// Boots a counting guest and saves it as an image.
fn image(files: &Files) -> (process::Process, Node) {
    let (process, mut node) = booted(files, &guest::counts());
    eventually("the guest's word", || node.console().contains("up").then_some(()));
    node.done(Request::Pause, &[]);
    let saved = node.saved(Request::Save { kind: SaveKind::Image }, &[files.empty("state").as_fd()]);
    assert_eq!(files.bytes("state").len() as u64, saved.state_bytes);
    assert_eq!(saved.memory, None);
    (process, node)
}

fn counter(memory: &[u8]) -> u32 {
    let at = guest::COUNTER as usize;
    u32::from_le_bytes(memory[at..at + 4].try_into().unwrap())
}

fn restore(node: &mut Node, files: &Files, difference: Option<&File>, state: &File, layers: &[(File, File)], top: &str) {
    let (base, top) = (files.read("disk"), files.empty(top));
    let mut descriptors = vec![state.as_fd()];
    descriptors.extend(difference.map(AsFd::as_fd));
    descriptors.push(base.as_fd());
    for (data, map) in layers {
        descriptors.extend([data.as_fd(), map.as_fd()]);
    }
    descriptors.push(top.as_fd());
    let request = Request::Restore { difference: difference.is_some(), sealed_layers: layers.len() as u32, streams: Vec::new() };
    node.done(request, &descriptors);
}

/// Saves a difference under a name.
fn save(node: &mut Node, files: &Files, name: &str) -> vmm_protocol::control::Saved {
    let (state, memory, map) = (files.empty(&format!("{name}-state")), files.empty(&format!("{name}-memory")), files.empty(&format!("{name}-map")));
    node.saved(DIFFERENCE, &[state.as_fd(), memory.as_fd(), files.read("memory").as_fd(), map.as_fd()])
}

#[test]
fn a_microvm_is_born_sleeps_and_wakes_under_its_filters() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (process, mut node) = image(&files);
    node.done(Request::Quit, &[]);
    let (status, log) = process.ended();
    assert_eq!(status.code(), Some(0), "{log}");
    let of_image = counter(&files.bytes("memory"));
    let disk = files.bytes("disk");

    // A clone runs on from where the image stood, and leaves the image as it is.
    let (process, mut node) = prepared(&files, MemoryUse::Private);
    restore(&mut node, &files, None, &files.read("state"), &[], "top-1");
    node.done(Request::Run, &[]);
    let before = usage(&mut node);
    eventually("CPU time of the guest", || (usage(&mut node).vcpu_us > before.vcpu_us + 5_000).then_some(()));
    node.done(Request::Pause, &[]);
    let saved = save(&mut node, &files, "first");
    let memory = saved.memory.unwrap();
    assert!(memory.data_pages >= 1 && memory.data_pages < 16, "{memory:?}");
    assert_eq!(files.bytes("first-memory").len() as u64, memory.bytes);
    assert_eq!(counter(&files.bytes("memory")), of_image);

    // A suspend taken back, and another: it goes on in between.
    node.done(Request::Run, &[]);
    node.done(Request::Pause, &[]);
    save(&mut node, &files, "second");
    // Cancel comes too late, and harms nothing.
    node.done(Request::Cancel, &[]);
    node.done(Request::Quit, &[]);
    assert_eq!(process.ended().0.code(), Some(0));

    // A third process wakes it from the difference, with the first one's disk layer under a new one.
    let (process, mut node) = prepared(&files, MemoryUse::Private);
    let layer = (files.read("top-1"), files.read("second-map"));
    restore(&mut node, &files, Some(&files.read("second-memory")), &files.read("second-state"), &[layer], "top-2");
    let woken = usage(&mut node);
    node.done(Request::Run, &[]);
    eventually("CPU time of the guest", || (usage(&mut node).vcpu_us > woken.vcpu_us + 1_000).then_some(()));
    node.done(Request::Pause, &[]);
    save(&mut node, &files, "third");
    assert_eq!(files.bytes("disk"), disk);
    node.done(Request::Quit, &[]);
    let (status, log) = process.ended();
    assert_eq!((status.code(), killed_by(status)), (Some(0), None), "{log}");
    assert_eq!(disk.len() as u64, DISK_BYTES);
}

#[test]
fn the_largest_machine_fits_into_the_limits() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let process = process::Process::start();
    let mut node = process.connect();
    let request = Request::Prepare { version: VERSION, vcpus: 16, memory_bytes: MEMORY_BYTES, memory: MemoryUse::Shared, disk_bytes: DISK_BYTES, net: None };
    node.done(request, &[kvm().as_fd(), files.both("memory").as_fd()]);
    let (kernel, initramfs) = (files.filled("kernel", &guest::counts()), files.filled("initramfs", b""));
    node.done(Request::Boot { cmdline: String::new() }, &[kernel.as_fd(), initramfs.as_fd(), files.both("disk").as_fd()]);
    eventually("the guest's word", || node.console().contains("up").then_some(()));
    node.done(Request::Pause, &[]);
    node.saved(Request::Save { kind: SaveKind::Image }, &[files.empty("state").as_fd()]);
    node.done(Request::Quit, &[]);
    assert_eq!(process.ended().0.code(), Some(0));
}

#[test]
fn a_save_is_cancelled_between_two_pieces_and_the_machine_goes_on() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (_booted, mut node) = image(&files);
    node.done(Request::Quit, &[]);
    let (process, mut node) = prepared(&files, MemoryUse::Private);
    restore(&mut node, &files, None, &files.read("state"), &[], "top");
    node.done(Request::Run, &[]);
    node.done(Request::Pause, &[]);
    // Both packets are there before the process has read the first, so the save hears of its end at its first question.
    let inner = process.inner_pid() as i32;
    let signal = |signal| {
        // SAFETY: the process is this test's own.
        assert_eq!(unsafe { libc::kill(inner, signal) }, 0);
    };
    signal(libc::SIGSTOP);
    let (state, memory, map) = (files.empty("s"), files.empty("m"), files.empty("d"));
    let save = node.say(DIFFERENCE, &[state.as_fd(), memory.as_fd(), files.read("memory").as_fd(), map.as_fd()]);
    let cancel = node.say(Request::Cancel, &[]);
    let late = node.say(Request::Run, &[]);
    signal(libc::SIGCONT);
    match node.answer(save).0 {
        Reply::Failed { fault: Fault::Cancelled, .. } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(node.answer(cancel).0, Reply::Done { phases_us: Vec::new() });
    // What was asked meanwhile is answered too, in order.
    assert!(matches!(node.answer(late).0, Reply::Done { .. }));
    node.done(Request::Pause, &[]);
    self::save(&mut node, &files, "again");
}

/// A process with a paused clone, that does not run: what is sent to it is all there before it reads the first.
fn stopped(files: &Files) -> (process::Process, Node) {
    let (_booted, mut node) = image(files);
    node.done(Request::Quit, &[]);
    let (process, mut node) = prepared(files, MemoryUse::Private);
    restore(&mut node, files, None, &files.read("state"), &[], "top");
    node.done(Request::Run, &[]);
    node.done(Request::Pause, &[]);
    signal(&process, libc::SIGSTOP);
    (process, node)
}

fn signal(process: &process::Process, signal: i32) {
    // SAFETY: the process is this test's own.
    assert_eq!(unsafe { libc::kill(process.inner_pid() as i32, signal) }, 0);
}

/// Begins a save; answers its id.
fn say_save(node: &mut Node, files: &Files) -> u64 {
    let (state, memory, map) = (files.empty("s"), files.empty("m"), files.empty("d"));
    node.say(DIFFERENCE, &[state.as_fd(), memory.as_fd(), files.read("memory").as_fd(), map.as_fd()])
}

#[test]
fn a_save_hears_of_its_end_whatever_else_is_asked_meanwhile() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (process, mut node) = stopped(&files);
    let save = say_save(&mut node, &files);
    let asked: Vec<u64> = (0..20).map(|_| node.say(Request::Usage, &[])).collect();
    let cancel = node.say(Request::Cancel, &[]);
    signal(&process, libc::SIGCONT);
    let mut replies = std::collections::BTreeMap::new();
    while replies.len() < asked.len() + 2 {
        match node.hear().unwrap() {
            (FromVmm::Reply { id, reply }, _) => assert!(replies.insert(id, reply).is_none()),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(replies[&save], Reply::Failed { fault: Fault::Cancelled, .. }), "{:?}", replies[&save]);
    assert!(matches!(replies[&cancel], Reply::Done { .. }));
    let told = asked.iter().filter(|id| matches!(replies[id], Reply::Usage(_))).count();
    let refused = asked.iter().filter(|id| matches!(&replies[id], Reply::Failed { fault: Fault::Request, why } if why.contains("too many"))).count();
    assert_eq!((told, refused), (16, 4));
    node.done(Request::Quit, &[]);
}

#[test]
fn the_end_of_the_process_does_not_wait_for_a_save() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (process, mut node) = stopped(&files);
    let save = say_save(&mut node, &files);
    let quit = node.say(Request::Quit, &[]);
    signal(&process, libc::SIGCONT);
    assert!(matches!(node.answer(save).0, Reply::Failed { fault: Fault::Cancelled, .. }));
    assert!(matches!(node.answer(quit).0, Reply::Done { .. }));
    assert_eq!(process.ended().0.code(), Some(0));
}

#[test]
fn a_node_that_goes_and_comes_back_finds_the_machine_as_it_was() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (process, node) = booted(&files, &guest::counts());
    drop(node);
    let mut node = process.connect();
    eventually("exits of a guest that goes on meanwhile", || (usage(&mut node).exits > 0).then_some(()));
    // A second one at the same time is told so and turned away.
    let mut second = process.connect();
    match second.hear() {
        Ok((FromVmm::Reply { id: 0, reply: Reply::Failed { fault: Fault::Request, why } }, _)) => assert!(why.contains("another node"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(second.hear().is_err());
    node.done(Request::Pause, &[]);
    // A last word before the end of a connection is heard.
    node.say(Request::Quit, &[]);
    drop(node);
    assert_eq!(process.ended().0.code(), Some(0));
}

#[test]
fn the_end_of_a_guest_is_told_to_every_node_that_comes() {
    if !has_kvm() {
        return;
    }
    for (kernel, words) in [(guest::resets(), "reset"), (guest::faults(), "triple fault")] {
        let files = Files::new();
        let (process, mut node) = booted(&files, &kernel);
        let stopped = |node: &mut Node| match node.events.pop().map_or_else(|| node.hear().map(|(message, _)| message), Ok).unwrap() {
            FromVmm::Event(Event::GuestStopped { how }) => assert!(how.contains(words), "{how}"),
            other => panic!("{other:?}"),
        };
        stopped(&mut node);
        let why = node.refused(Request::Run, &[], Fault::Request);
        assert!(why.contains("the guest has ended"), "{why}");
        drop(node);
        let mut node = process.connect();
        stopped(&mut node);
        node.console();
        node.done(Request::Quit, &[]);
        assert_eq!(process.ended().0.code(), Some(0));
    }
}
