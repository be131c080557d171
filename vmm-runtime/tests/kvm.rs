//! The kvm engine keeps its promises, with real guests on hardware virtualisation: Debian's kernel, our agent, an app.
//!
//! Needs `dormouse-vmm` built for `x86_64-unknown-linux-musl` (or `$DORMOUSE_VMM`), a `/dev/kvm` with hardware behind it, and
//! what is in `support/mod.rs`; without that it says so and checks nothing. `tests/nested.rs` runs it where there is no such
//! `/dev/kvm`. `CONFORMANCE_ONLY=<part of a name>` runs some of the checks.

mod support;

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use model::Generation;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    conformance::{ECHO, Suite},
    engine::{DialError, Engine, EngineError, Exit, GuestStream, RestoreSpec, SuspendOutcome, Vm},
    kvm::{HostConfig, KvmConfig, KvmEngine, KvmVm, Probe, probe},
};

use crate::support::{GuestBench, Guests, Start};

struct Kvm {
    vmm: PathBuf,
}

#[async_trait]
impl Start for Kvm {
    type Started = KvmEngine;

    async fn start(&self, host: HostConfig) -> KvmEngine {
        KvmEngine::new(KvmConfig { vmm: self.vmm.clone(), host }).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

async fn bench() -> Option<GuestBench<Kvm>> {
    let vmm = support::path_or("DORMOUSE_VMM", || support::built("dormouse-vmm"));
    let why = match probe(&vmm).await {
        Ok(Probe::Hardware) => return Some(GuestBench::new(Guests::find("kvm")?, Kvm { vmm })),
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
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_to_the_agent_survives_a_sleep_and_a_dead_vmm_costs_nothing_that_was_saved() {
    let Some(bench) = bench().await else { return };
    let _sweep = bench.sweep_at_end();
    let _suite = Suite::prepare(&bench).await;
    let engine = bench.start().await;
    let spec = bench.microvm();
    let (id, dir, image_dir) = (spec.id, spec.dir.clone(), spec.image_dir.clone());
    let vm = engine.launch(spec).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let mut stream = vm.dial(ECHO).await.unwrap();
    assert!(!kept_its_channel(&vm));
    let restored = RestoreSpec { id, dir: dir.clone(), image_dir, generation: Generation(1), predecessor: Some(vm.clone()), identity: Default::default() };
    echo(&mut stream, b"before").await;
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));
    let vm = engine.restore(restored.clone()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    echo(&mut stream, b"after").await;
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
    engine.close().await;
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
