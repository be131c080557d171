//! A node that is broken or worse: whatever it sends, the process refuses in words and neither panics nor changes its state.

mod process;

use std::{
    fs::File,
    io::Write,
    os::fd::AsFd,
};

use process::{DISK_BYTES, Files, MEMORY_BYTES, Node, Process, guest, has_kvm, kvm, prepare, prepared};
use rustix::net::{SendFlags, SocketType};
use vmm_protocol::control::{
    CONTROL_SOCKET, Fault, FromVmm, MAX_DESCRIPTORS, MAX_MESSAGE, MemoryUse, NetSpec, ParkedStream, Reply, Request, SaveKind, VERSION,
};

/// It answers, and has not said a word about a panic.
fn assert_well(process: &mut Process, node: &mut Node) {
    node.done(Request::Cancel, &[]);
    assert!(process.is_alive());
    let log = process.log();
    assert!(!log.contains("bug") && !log.contains("panic"), "{log}");
}

fn garbage() -> Vec<Vec<u8>> {
    let mut packets = vec![
        b"{".to_vec(),
        b"null".to_vec(),
        b"[[[[[[[[".to_vec(),
        vec![b'['; MAX_MESSAGE],
        vec![0xff; 100],
        vec![b' '; MAX_MESSAGE + 1],
        vec![b' '; 3 * MAX_MESSAGE],
        br#"{"id":1}"#.to_vec(),
        br#"{"id":-1,"request":"run"}"#.to_vec(),
        br#"{"id":1e400,"request":"run"}"#.to_vec(),
        br#"{"id":18446744073709551616,"request":"run"}"#.to_vec(),
        br#"{"id":1,"request":"jump"}"#.to_vec(),
        br#"{"id":1,"request":{"boot":{"cmdline":7}}}"#.to_vec(),
        br#"{"id":1,"request":{"restore":{"difference":false,"sealed_layers":4294967296,"streams":[]}}}"#.to_vec(),
        br#"{"id":1,"request":{"save":{"kind":{"difference":{}}}}}"#.to_vec(),
        br#"{"id":1,"request":"run","more":1}"#.to_vec(),
    ];
    // A cheap generator: the same bytes in every run.
    let mut seed = 1u64;
    for length in (1..400).step_by(7) {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        };
        packets.push((0..length).map(|_| next()).collect());
    }
    packets
}

#[test]
fn garbage_is_answered_with_words() {
    let mut process = Process::start();
    let mut node = process.connect();
    for packet in garbage() {
        rustix::net::send(&node.socket, &packet, SendFlags::empty()).unwrap();
        match node.hear().unwrap() {
            (FromVmm::Reply { id: 0, reply: Reply::Failed { fault: Fault::Request, why } }, _) => assert!(why.contains("not understood"), "{why}"),
            other => panic!("{other:?} to {packet:?}"),
        }
    }
    assert_well(&mut process, &mut node);
    // An empty packet cannot be told from the end of the connection.
    rustix::net::send(&node.socket, b"", SendFlags::empty()).unwrap();
    assert!(node.hear().is_err());
    let mut node = process.connect();
    assert_well(&mut process, &mut node);
}

#[test]
fn a_node_that_talks_without_listening_is_left() {
    let mut process = Process::start();
    let node = process.connect();
    rustix::io::ioctl_fionbio(&node.socket, true).unwrap();
    // Until the process has closed the connection, or both queues are full for good.
    let text = br#"{"id":1,"request":"usage"}"#;
    process::eventually("the end of a connection that nobody reads", || match rustix::net::send(&node.socket, text, SendFlags::NOSIGNAL) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => None,
        Err(_) => Some(()),
    });
    let mut node = process.connect();
    assert_well(&mut process, &mut node);
}

#[test]
fn descriptors_in_excess_are_closed() {
    let mut process = Process::start();
    let mut node = process.connect();
    let inner = process.inner_pid();
    let open = || std::fs::read_dir(format!("/proc/{inner}/fd")).unwrap().count();
    node.done(Request::Cancel, &[]);
    let before = open();
    let null = File::open("/dev/null").unwrap();
    for count in [1, 2, MAX_DESCRIPTORS] {
        let why = node.refused(Request::Usage, &vec![null.as_fd(); count], Fault::Request);
        assert!(why.contains("no machine yet"), "{why}");
        let why = node.refused(Request::Cancel, &vec![null.as_fd(); count], Fault::Request);
        assert!(why.contains(&format!("{count} descriptors")), "{why}");
    }
    assert_eq!(open(), before);
    assert_well(&mut process, &mut node);
}

#[test]
fn every_request_out_of_order_is_refused_and_changes_nothing() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let mut process = Process::start();
    let mut node = process.connect();
    let file = files.both("disk");
    let some = |count: usize| vec![file.as_fd(); count];
    let later = [
        (Request::Boot { cmdline: String::new() }, 3),
        (Request::Restore { difference: false, sealed_layers: 0, streams: Vec::new() }, 3),
        (Request::Run, 0),
        (Request::Pause, 0),
        (Request::Save { kind: SaveKind::Image }, 1),
        (Request::Save { kind: SaveKind::Difference { merge_layers: true } }, 4),
    ];
    for (request, count) in later.iter().cloned().chain([(Request::Usage, 0), (Request::Console, 0)]) {
        let why = node.refused(request, &some(count), Fault::Request);
        assert!(why.contains("Prepare comes first"), "{why}");
    }
    node.done(prepare(MemoryUse::Shared), &[kvm().as_fd(), files.both("memory").as_fd()]);
    for (request, count) in &later[2..] {
        let why = node.refused(request.clone(), &some(*count), Fault::Request);
        assert!(why.contains("Boot or Restore comes first"), "{why}");
    }
    let why = node.refused(prepare(MemoryUse::Shared), &[kvm().as_fd(), file.as_fd()], Fault::Request);
    assert!(why.contains("one machine in its life"), "{why}");

    let kernel = files.filled("kernel", &guest::counts());
    let boot = Request::Boot { cmdline: String::new() };
    node.done(boot.clone(), &[kernel.as_fd(), kernel.as_fd(), file.as_fd()]);
    let why = node.refused(boot, &[kernel.as_fd(), kernel.as_fd(), file.as_fd()], Fault::Request);
    assert!(why.contains("the guest runs"), "{why}");
    let why = node.refused(Request::Save { kind: SaveKind::Image }, &[files.empty("s").as_fd()], Fault::Request);
    assert!(why.contains("Pause comes first"), "{why}");
    // Twice is as good as once.
    for request in [Request::Run, Request::Pause, Request::Pause, Request::Run] {
        node.done(request, &[]);
    }
    assert_well(&mut process, &mut node);
}

/// Version, vCPUs, bytes of memory, bytes of disk.
type Numbers = (u32, u8, u64, u64);

#[test]
fn what_a_machine_cannot_be_made_of_is_refused_before_anything_is_used() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let mut process = Process::start();
    let mut node = process.connect();
    let (kvm, memory) = (kvm(), files.both("memory"));
    let good = |change: fn(&mut Numbers)| {
        let mut numbers: Numbers = (VERSION, 1, MEMORY_BYTES, DISK_BYTES);
        change(&mut numbers);
        let (version, vcpus, memory_bytes, disk_bytes) = numbers;
        Request::Prepare { version, vcpus, memory_bytes, memory: MemoryUse::Private, disk_bytes, net: None }
    };
    let both = [kvm.as_fd(), memory.as_fd()];
    for (request, part) in [
        (good(|n| n.0 += 1), "version 2"),
        (good(|n| n.1 = 0), "not 0"),
        (good(|n| n.1 = 17), "not 17"),
        (good(|n| n.2 = 0), "0 bytes of memory"),
        (good(|n| n.2 += 4096), "multiple of 2 MiB"),
        (good(|n| n.2 = u64::MAX << 21), "1 TiB"),
        (good(|n| n.2 *= 2), "the memory file has"),
        (good(|n| n.3 = 0), "0 bytes of disk"),
        (good(|n| n.3 += 1), "multiple of 4 KiB"),
        (good(|n| n.3 = u64::MAX << 12), "64 TiB"),
    ] {
        let why = node.refused(request, &both, Fault::Request);
        assert!(why.contains(part), "{why}");
    }
    for descriptors in [&[][..], &both[..1], &[both[0], both[1], both[0]][..]] {
        let why = node.refused(prepare(MemoryUse::Private), descriptors, Fault::Request);
        assert!(why.contains("takes 2"), "{why}");
    }
    let net = Request::Prepare {
        version: VERSION,
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
        memory: MemoryUse::Private,
        disk_bytes: DISK_BYTES,
        net: Some(NetSpec { mac: [2, 0, 0, 0, 0, 1] }),
    };
    let why = node.refused(net, &both, Fault::Request);
    assert!(why.contains("takes 3"), "{why}");
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let directory = File::open("/").unwrap();
    for no_file in [reader.as_fd(), directory.as_fd(), node.socket.try_clone().unwrap().as_fd(), kvm.as_fd()] {
        let why = node.refused(prepare(MemoryUse::Private), &[kvm.as_fd(), no_file], Fault::Request);
        assert!(why.contains("not a regular file"), "{why}");
    }
    // After all that, it still is as new.
    node.done(prepare(MemoryUse::Private), &both);
    assert_well(&mut process, &mut node);
}

#[test]
fn a_kvm_that_is_none_is_the_hosts_fault_and_leaves_a_process_that_can_only_quit() {
    let files = Files::new();
    let mut process = Process::start();
    let mut node = process.connect();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    node.refused(prepare(MemoryUse::Private), &[null.as_fd(), files.read("memory").as_fd()], Fault::Host);
    let why = node.refused(Request::Console, &[], Fault::Request);
    assert!(why.contains("only Quit is left"), "{why}");
    assert_well(&mut process, &mut node);
    node.done(Request::Quit, &[]);
    assert_eq!(process.ended().0.code(), Some(0));
}

#[test]
fn kernels_that_are_none_are_refused() {
    if !has_kvm() {
        return;
    }
    let whole = guest::counts();
    let mut far = whole.clone();
    // The address at which the code is to be loaded.
    far[64 + 24..64 + 32].fill(0x7f);
    let mut long = whole.clone();
    // Its length in the file and in memory.
    long[64 + 32..64 + 48].fill(0x7f);
    let mut many = whole.clone();
    // Number of program headers.
    many[56..58].fill(0xff);
    let kernels = [Vec::new(), vec![0; 4096], b"MZ".repeat(4096), whole[..100].to_vec(), whole[..300].to_vec(), far, long, many];
    for (index, kernel) in kernels.iter().enumerate() {
        let files = Files::new();
        let (mut process, mut node) = prepared(&files, MemoryUse::Shared);
        let (kernel, initramfs) = (files.filled("kernel", kernel), files.filled("initramfs", b""));
        let boot = |cmdline: &str| Request::Boot { cmdline: cmdline.to_owned() };
        let disk = files.both("disk");
        let descriptors = [kernel.as_fd(), initramfs.as_fd(), disk.as_fd()];
        for cmdline in ["a\0b", "ü", &"x".repeat(4000)] {
            let why = node.refused(boot(cmdline), &descriptors, Fault::Request);
            assert!(why.contains("printable ASCII"), "{why}");
        }
        match node.ask(boot("quiet"), &descriptors) {
            Reply::Failed { why, .. } => assert!(!why.is_empty()),
            other => panic!("kernel {index}: {other:?}"),
        }
        assert_well(&mut process, &mut node);
    }
}

/// What it is; whether there is a difference, how many layers and which streams; names of the files.
type Restore = (&'static str, bool, u32, Vec<ParkedStream>, &'static [&'static str]);

#[test]
fn snapshots_that_are_none_are_refused_and_nothing_of_them_runs() {
    if !has_kvm() {
        return;
    }
    // A true state to cut and bend.
    let files = Files::new();
    let (_process, mut node) = process::booted(&files, &guest::counts());
    node.done(Request::Pause, &[]);
    node.saved(Request::Save { kind: SaveKind::Image }, &[files.empty("state").as_fd()]);
    let state = files.bytes("state");
    let mut states = vec![Vec::new(), vec![0; 64], vec![0xff; 4096], state[..state.len() - 1].to_vec(), state[..20].to_vec(), [&state[..], b"more"].concat()];
    for at in (0..state.len()).step_by(state.len() / 12) {
        let mut bent = state.clone();
        bent[at] ^= 0x40;
        states.push(bent);
    }
    for (index, bytes) in states.iter().enumerate() {
        let (mut process, mut node) = prepared(&files, MemoryUse::Private);
        let (bad, base, top) = (files.filled("bad", bytes), files.read("disk"), files.empty("top"));
        let request = Request::Restore { difference: false, sealed_layers: 0, streams: Vec::new() };
        let why = node.refused(request, &[bad.as_fd(), base.as_fd(), top.as_fd()], Fault::Snapshot);
        assert!(!why.is_empty(), "state {index}");
        let why = node.refused(Request::Run, &[], Fault::Request);
        assert!(why.contains("only Quit is left"), "{why}");
        assert_well(&mut process, &mut node);
    }
    // Right state, wrong company.
    let stream = ParkedStream { guest_port: 1024, host_port: 77 };
    let cases: [Restore; 6] = [
        ("a difference of nothing", true, 0, Vec::new(), &["state", "nothing", "disk", "top"]),
        ("a difference that is a disk", true, 0, Vec::new(), &["state", "disk", "disk", "top"]),
        ("a base that is too short", false, 0, Vec::new(), &["state", "nothing", "top"]),
        ("a layer without a map", false, 1, Vec::new(), &["state", "disk", "disk", "nothing", "top"]),
        ("a map of noise", false, 1, Vec::new(), &["state", "disk", "disk", "noise", "top"]),
        ("a stream that is a file", false, 0, vec![stream], &["state", "disk", "top", "nothing"]),
    ];
    files.filled("nothing", b"");
    files.filled("noise", &[7; 5000]);
    for (what, difference, sealed_layers, streams, names) in cases {
        let (mut process, mut node) = prepared(&files, MemoryUse::Private);
        files.empty("top");
        let opened: Vec<File> = names.iter().map(|name| if *name == "top" { files.both(name) } else { files.read(name) }).collect();
        let descriptors: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
        let reply = node.ask(Request::Restore { difference, sealed_layers, streams: streams.clone() }, &descriptors);
        // A stream that the guest does not know is dropped, everything else is refused.
        assert_eq!(matches!(reply, Reply::Failed { .. }), streams.is_empty(), "{what}: {reply:?}");
        assert_well(&mut process, &mut node);
    }
}

#[test]
fn files_to_save_into_that_cannot_be_are_refused_and_the_guest_goes_on() {
    if !has_kvm() {
        return;
    }
    let files = Files::new();
    let (mut process, mut node) = process::booted(&files, &guest::counts());
    node.done(Request::Pause, &[]);
    let image = Request::Save { kind: SaveKind::Image };
    let why = node.refused(image.clone(), &[files.read("disk").as_fd()], Fault::Request);
    assert!(why.contains("should be empty"), "{why}");
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let why = node.refused(image.clone(), &[reader.as_fd()], Fault::Request);
    assert!(why.contains("not a regular file"), "{why}");
    // Empty, but not to be written.
    files.empty("closed").flush().unwrap();
    node.refused(image.clone(), &[files.read("closed").as_fd()], Fault::Host);
    // A difference of memory that is shared with its file does not exist.
    let difference = Request::Save { kind: SaveKind::Difference { merge_layers: false } };
    let (state, memory, map) = (files.empty("s"), files.empty("m"), files.empty("d"));
    match node.ask(difference, &[state.as_fd(), memory.as_fd(), files.read("memory").as_fd(), map.as_fd()]) {
        Reply::Failed { .. } => {}
        other => panic!("{other:?}"),
    }
    node.saved(image, &[files.empty("state").as_fd()]);
    node.done(Request::Run, &[]);
    assert_well(&mut process, &mut node);
}

#[test]
fn streams_instead_of_packets_find_nobody() {
    let mut process = Process::start();
    // Another type of socket cannot connect at all.
    let address = rustix::net::SocketAddrUnix::new(process.dir.path().join(CONTROL_SOCKET)).unwrap();
    let mut node = process.connect();
    let stream = rustix::net::socket(rustix::net::AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    assert!(rustix::net::connect(&stream, &address).is_err());
    assert_well(&mut process, &mut node);
}
