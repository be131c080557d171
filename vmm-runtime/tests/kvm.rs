//! The kvm engine keeps its promises, with real guests on hardware virtualisation: Debian's kernel, our agent, an app.
//!
//! Needs `dormouse-vmm` built for `x86_64-unknown-linux-musl` (or `$DORMOUSE_VMM`), a `/dev/kvm` with hardware behind it, and
//! what is in `support/mod.rs`; without that it says so and checks nothing. `tests/nested.rs` runs it where there is no such
//! `/dev/kvm`. `CONFORMANCE_ONLY=<part of a name>` runs some of the checks.

mod support;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Capabilities, Generation};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tokio_util::sync::CancellationToken;
use vmm_protocol::control::VSOCK_SOCKET;
use vmm_runtime::{
    conformance::{ECHO, HTTP, Suite},
    engine::{DialError, Engine, EngineError, Exit, GuestStream, LaunchSpec, RestoreSpec, SuspendOutcome, Vm},
    kvm::{GUEST_ADDRESS, HOST_ADDRESS, HostConfig, KvmConfig, KvmEngine, KvmVm, Network, Probe, probe, process::Process},
};

use crate::support::{GuestBench, Guests, Start};

struct Kvm {
    net: bool,
    vmm: PathBuf,
}

#[async_trait]
impl Start for Kvm {
    type Started = KvmEngine;

    async fn start(&self, host: HostConfig) -> KvmEngine {
        KvmEngine::new(KvmConfig { net: self.net, ..KvmConfig::new(self.vmm.clone(), host) }).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

async fn bench() -> Option<GuestBench<Kvm>> {
    let vmm = support::path_or("DORMOUSE_VMM", || support::built("dormouse-vmm"));
    let why = match probe(&vmm).await {
        Ok(Probe::Hardware) => return Some(GuestBench::new(Guests::find("kvm")?, Kvm { vmm, net: false })),
        Ok(Probe::Software { why } | Probe::Missing { why }) => why,
        Err(error) => error.to_string(),
    };
    // Past the test harness, which shows what a passing test says to nobody.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: the kvm engine is not tested here: {why}\n"));
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kvm_engine_conforms() {
    let Some(bench) = bench().await else { return };
    bench.conforms().await;
    no_cgroup_is_left();
}

/// Of one image, whose build is most of the time that this takes on emulated hardware.
#[tokio::test(flavor = "multi_thread")]
async fn microvms_keep_their_streams_and_have_limits_users_and_networks_of_their_own() {
    let Some(mut bench) = bench().await else { return };
    bench.start.net = match Network::make() {
        Ok(_) => true,
        Err(error) if complete() => panic!("{error}"),
        Err(error) => {
            eprintln!("SKIPPED: networks of guests are not tested: {error}");
            false
        }
    };
    // The app brings its own network card up.
    bench.rights.capabilities = Capabilities::All;
    let _sweep = bench.sweep_at_end();
    let _suite = Suite::prepare(&bench).await;
    let engine = bench.start().await;
    the_connection_to_the_agent_survives_a_sleep_and_a_dead_vmm_costs_nothing_that_was_saved(&bench, &engine).await;
    each_microvm_has_limits_a_user_and_a_network_of_its_own(&bench, &engine).await;
    engine.close().await;
    bench.leaves_nothing().await;
    no_cgroup_is_left();
}

/// Of all processes that there were.
fn no_cgroup_is_left() {
    if complete() {
        let left: Vec<_> = fs::read_dir("/sys/fs/cgroup/dormouse").unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Whether the host is known to have all that the jail can use.
fn complete() -> bool {
    std::env::var_os("DORMOUSE_JAIL_COMPLETE").is_some()
}

async fn the_connection_to_the_agent_survives_a_sleep_and_a_dead_vmm_costs_nothing_that_was_saved(bench: &GuestBench<Kvm>, engine: &KvmEngine) {
    let spec = bench.microvm();
    let (id, dir, image_dir) = (spec.id, spec.dir.clone(), spec.image_dir.clone());
    let vm = engine.launch(spec).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let mut stream = vm.dial(ECHO).await.unwrap();
    assert!(!kept_its_channel(&vm));
    let restored = RestoreSpec { id, dir: dir.clone(), image_dir, generation: Generation(1), predecessor: Some(vm.clone()), identity: Default::default(), egress: Default::default() };
    echo(&mut stream, b"before").await;
    // More streams than a save can hand over, to somebody else than the agent.
    get(&vm, "vsock-echo/5000").await;
    let pid = vm.as_any().downcast_ref::<KvmVm>().unwrap().pid();
    let process_dir = Process::find_all(&bench.run_dir()).unwrap().into_iter().find(|process| process.pid() == pid).unwrap().dir().to_owned();
    let mut others = Vec::new();
    for _ in 0..100 {
        others.push(vsock(&process_dir, 5000).await);
    }
    assert_eq!(get(&vm, "vsock-open").await, "100");
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));
    let vm = engine.restore(restored.clone()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    vm.release_streams();
    echo(&mut stream, b"after").await;
    // All are at their end, on both sides: none hangs.
    for other in &mut others {
        assert_eq!(other.read(&mut [0; 1]).await.unwrap_or(0), 0);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while get(&vm, "vsock-open").await != "0" {
        assert!(Instant::now() < deadline, "the guest was not told of all resets");
    }
    assert!(kept_its_channel(&vm));
    let usage = vm.usage().await;
    assert!(usage.exits > 0 && usage.stream_sent_bytes > 0 && usage.peak_bytes > 0, "{usage:?}");

    assert!(matches!(vm.suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));
    let restored = RestoreSpec { generation: Generation(2), predecessor: None, ..restored };
    let vm = engine.restore(restored.clone()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    assert!(!kept_its_channel(&vm));
    let pid = vm.as_any().downcast_ref::<KvmVm>().unwrap().pid();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    assert!(matches!(vm.exited().await, Exit::Vmm { .. }));
    assert!(matches!(vm.dial(ECHO).await.map(|_| ()), Err(DialError::Gone)));
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Err(EngineError::Ended { .. })));
    vm.kill().await;

    assert_eq!(engine.committed(dir).await.unwrap().unwrap().generation, Generation(1));
    let vm = engine.restore(RestoreSpec { generation: Generation(3), ..restored }).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let mut stream = vm.dial(ECHO).await.unwrap();
    echo(&mut stream, b"again").await;
    vm.kill().await;
}

/// What a VMM process may take and who it is, and the network of its guest: all are its own.
async fn each_microvm_has_limits_a_user_and_a_network_of_its_own(bench: &GuestBench<Kvm>, engine: &KvmEngine) {
    let specs = [bench.microvm(), bench.microvm()];
    let mut vms = Vec::new();
    for spec in &specs {
        vms.push(engine.launch(spec.clone()).await.unwrap_or_else(|error| panic!("{error}")).vm);
    }

    // The network: the same addresses in both, and nothing of one in the other.
    for (index, vm) in vms.iter().enumerate().filter(|_| bench.start.net) {
        let host = network_echo(vm, format!("host {index} heard "));
        get(vm, &format!("network-up/{GUEST_ADDRESS}")).await;
        assert_eq!(get(vm, &format!("ask-network/{host}/me")).await, format!("host {index} heard me"));
        let usage = vm.usage().await;
        assert!(usage.net_sent_bytes > 0 && usage.net_received_bytes > 0, "{usage:?}");
    }
    let LaunchSpec { id, dir, image_dir, .. } = specs[0].clone();
    assert!(matches!(vms[0].suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));
    let restored = RestoreSpec { id, dir, image_dir, generation: Generation(1), predecessor: Some(vms[0].clone()), identity: Default::default(), egress: Default::default() };
    vms[0] = engine.restore(restored).await.unwrap_or_else(|error| panic!("{error}")).vm;
    if bench.start.net {
        let host = network_echo(&vms[0], "after the sleep ".to_owned());
        assert_eq!(get(&vms[0], &format!("ask-network/{host}/me")).await, "after the sleep me");
    }

    // The limits.
    let pids: Vec<i32> = vms.iter().map(|vm| vm.as_any().downcast_ref::<KvmVm>().unwrap().pid()).collect();
    let processes = Process::find_all(&bench.run_dir()).unwrap();
    let dir_of = |pid: &i32| processes.iter().find(|process| process.pid() == *pid).unwrap().dir().to_owned();
    let Some(cgroups) = pids.iter().map(|pid| fs::read_link(dir_of(pid).join("cgroup")).ok()).collect::<Option<Vec<_>>>() else {
        assert!(!complete(), "there are no cgroups");
        eprintln!("SKIPPED: limits of VMM processes are not tested: there is no cgroup v2 with the controllers");
        return;
    };
    for (cgroup, pid) in cgroups.iter().zip(&pids) {
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap();
        let guest = 512 << 20;
        let most: u64 = read("memory.max").trim().parse().unwrap();
        assert!((guest..guest + (512 << 20)).contains(&most), "{most}");
        assert_ne!(read("pids.max").trim(), "max");
        assert!(read("cpu.max").ends_with(" 100000\n") && !read("cpu.max").starts_with("max"), "{}", read("cpu.max"));
        // The process that the node knows, and the VMM within: one user, which is nobody else's.
        let mut members: Vec<i32> = read("cgroup.procs").lines().map(|line| line.parse().unwrap()).collect();
        // KVM's own worker is the kernel's, which has no command line.
        members.retain(|member| !fs::read(format!("/proc/{member}/cmdline")).unwrap().is_empty());
        assert!(members.len() == 2 && members.contains(pid), "{members:?}");
        for member in members {
            let status = fs::read_to_string(format!("/proc/{member}/status")).unwrap();
            let user = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap().split_ascii_whitespace().next().unwrap().to_owned();
            assert_eq!(user.parse::<i64>().unwrap(), 2_000_000_000 + i64::from(*pid));
        }
    }

    // Who takes more than that dies alone.
    fs::write(cgroups[0].join("memory.max"), (64_u64 << 20).to_string()).unwrap();
    let greedy = vms[0].clone();
    let filling = tokio::spawn(async move {
        let mut stream = greedy.dial(HTTP).await.unwrap();
        stream.write_all(b"GET /fill/100 HTTP/1.1\r\n\r\n").await.unwrap();
        // Kept open for as long as the guest is at it.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let exit = tokio::time::timeout(Duration::from_secs(60), vms[0].exited()).await.expect("it goes on, with more memory than it may have");
    assert!(matches!(&exit, Exit::Vmm { .. }), "{exit:?}");
    filling.abort();
    let mut stream = vms[1].dial(ECHO).await.unwrap();
    echo(&mut stream, b"alive").await;
    for vm in &vms {
        vm.kill().await;
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while cgroups.iter().any(|cgroup| cgroup.exists()) {
        assert!(Instant::now() < deadline, "the cgroups of ended processes stay");
        tokio::task::yield_now().await;
    }
}

/// Answers datagrams in the guest's network, each with a greeting before it; says where.
fn network_echo(vm: &Arc<dyn Vm>, greeting: String) -> SocketAddr {
    let network = vm.as_any().downcast_ref::<KvmVm>().unwrap().network().expect("it was asked for").as_fd().try_clone_to_owned().unwrap();
    let (bound, address) = mpsc::channel();
    // A thread of its own: it stays in that network. Ends with the test.
    std::thread::spawn(move || {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let socket = UdpSocket::bind((HOST_ADDRESS, 0)).unwrap();
        bound.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let answer = [greeting.as_bytes(), &buffer[..length]].concat();
            if from.ip() == GUEST_ADDRESS && socket.send_to(&answer, from).is_err() {
                return;
            }
        }
    });
    address.recv().unwrap()
}

/// The body of the app's answer.
async fn get(vm: &Arc<dyn Vm>, path: &str) -> String {
    let mut stream = vm.dial(HTTP).await.unwrap();
    stream.write_all(format!("GET /{path} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    body.to_owned()
}

/// A stream to a vsock port of the guest that echoes.
async fn vsock(process_dir: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(process_dir.join(VSOCK_SOCKET)).await.unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
    while stream.read_u8().await.unwrap() != b'\n' {}
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    stream
}

fn kept_its_channel(vm: &Arc<dyn Vm>) -> bool {
    vm.as_any().downcast_ref::<KvmVm>().unwrap().kept_its_channel()
}

async fn echo(stream: &mut GuestStream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, bytes);
}
