//! The qemu engine keeps its promises, with real guests: Debian's kernel, our agent, an app.
//!
//! What it needs is in `support/mod.rs`; without that it says so and checks nothing. `CONFORMANCE_ONLY=<part of a name>`
//! runs some of the checks.

mod support;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Generation, Shape};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    conformance::{self, Bench, ECHO, HTTP},
    engine::{DialError, Engine, EngineError, Exit, RestoreSpec, SuspendOutcome, Vm},
    qemu::{Accel, HostConfig, Limits, QemuConfig, QemuEngine, QemuVm, process::Process},
};

use crate::support::{GuestBench, Guests, Start};

struct Qemu;

#[async_trait]
impl Start for Qemu {
    type Started = QemuEngine;

    async fn start(&self, host: HostConfig) -> QemuEngine {
        let config = QemuConfig { qemu: "qemu-system-x86_64".into(), accel: Accel::Tcg, host };
        QemuEngine::new(config).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

fn bench() -> Option<GuestBench<Qemu>> {
    Some(GuestBench::new(Guests::find("qemu")?, Qemu))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_engine_conforms() {
    let Some(bench) = bench() else { return };
    bench.conforms().await;
}

/// As the guests of images that are twice the least size and more.
#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_engine_conforms_with_several_processors() {
    let Some(mut bench) = bench() else { return };
    bench.shape = Shape { memory_mib: 4096, vcpus: 2, ..conformance::SHAPE };
    bench.conforms().await;
}

fn pid(vm: &Arc<dyn Vm>) -> Pid {
    Pid::from_raw(vm.as_any().downcast_ref::<QemuVm>().unwrap().pid()).unwrap()
}

async fn get(vm: &Arc<dyn Vm>, path: &str) -> String {
    let mut stream = vm.dial(HTTP).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_misbehaves_hangs_nothing() {
    let Some(mut bench) = bench() else { return };
    bench.limits = Limits { quiesce: Duration::from_secs(1), command: Duration::from_secs(1), dial: Duration::from_secs(1), ..Limits::default() };
    let _sweep = bench.sweep_at_end();
    let _suite = conformance::Suite::prepare(&bench).await;
    let engine = bench.start().await;

    // A guest that does not answer: nothing hangs, and it goes on once it can.
    let spec = bench.microvm();
    let (id, dir, image_dir) = (spec.id, spec.dir.clone(), spec.image_dir.clone());
    let vm = engine.launch(spec).await.unwrap_or_else(|error| panic!("{error}")).vm;
    kill_process(pid(&vm), Signal::STOP).unwrap();
    let begun = Instant::now();
    let suspended = vm.suspend(CancellationToken::new()).await;
    assert!(matches!(suspended, Err(EngineError::GuestTimeout { .. })), "{suspended:?}");
    assert!(matches!(vm.dial(ECHO).await.map(|_| ()), Err(DialError::Timeout { .. })));
    assert!(begun.elapsed() < Duration::from_secs(10));
    kill_process(pid(&vm), Signal::CONT).unwrap();
    assert_eq!(get(&vm, "/count").await, "2");
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));

    // A QEMU that dies: told with its reason, and the snapshot is as it was.
    let spec = |generation| RestoreSpec { id, dir: dir.clone(), image_dir: image_dir.clone(), generation: Generation(generation), predecessor: None, identity: Default::default(), egress: Default::default() };
    let vm = engine.restore(spec(1)).await.unwrap_or_else(|error| panic!("{error}")).vm;
    assert_eq!(get(&vm, "/count").await, "3");
    kill_process(pid(&vm), Signal::KILL).unwrap();
    assert!(matches!(vm.exited().await, Exit::Vmm { .. }));
    assert!(matches!(vm.dial(ECHO).await.map(|_| ()), Err(DialError::Gone)));
    vm.kill().await;
    assert_eq!(engine.committed(dir.clone()).await.unwrap().unwrap().generation, Generation(0));
    let vm = engine.restore(spec(2)).await.unwrap_or_else(|error| panic!("{error}")).vm;
    assert_eq!(get(&vm, "/count").await, "3");

    // A QEMU that dies in the middle of a suspend.
    for delay_ms in [0, 5, 15, 30] {
        let spec = bench.microvm();
        let vm = engine.launch(spec).await.unwrap_or_else(|error| panic!("{error}")).vm;
        let killing = async {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            // Gone already, if the suspend was faster.
            let _ = kill_process(pid(&vm), Signal::KILL);
        };
        match tokio::join!(vm.suspend(CancellationToken::new()), killing).0 {
            Ok(SuspendOutcome::Suspended(_)) | Err(EngineError::Ended { .. }) => {}
            other => panic!("{other:?}"),
        }
        vm.kill().await;
    }
    vm.kill().await;

    // A ready process that has died is not used.
    engine.warm(image_dir.clone()).await;
    for process in Process::find_all(&bench.run_dir()).unwrap() {
        process.kill(Duration::from_secs(5)).await;
    }
    let vm = engine.launch(bench.microvm()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    assert_eq!(get(&vm, "/count").await, "2");
    vm.kill().await;
    engine.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_panics_is_quoted() {
    let Some(mut bench) = bench() else { return };
    bench.guests.kit.initrd = bench.work_dir().join("no-initrd");
    fs::write(&bench.guests.kit.initrd, b"garbage").unwrap();
    bench.limits.boot = Duration::from_secs(30);
    let _sweep = bench.sweep_at_end();
    let engine = bench.start().await;
    let (dir, root_disk) = (bench.work_dir().join("build"), bench.work_dir().join("disk"));
    fs::create_dir(&dir).unwrap();
    bench.root_disk(&root_disk).await;
    let spec = vmm_runtime::engine::BootSpec { name: "panic".into(), dir, root_disk, shape: conformance::SHAPE, app: bench.app() };
    let error = engine.boot(spec).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("panic"), "{error}");
}
