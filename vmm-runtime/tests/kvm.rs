//! The kvm engine keeps its promises, with real guests on hardware virtualisation: Debian's kernel, our agent, an app.
//!
//! Needs `dormouse-vmm` built for `x86_64-unknown-linux-musl` (or `$DORMOUSE_VMM`), a `/dev/kvm` with hardware behind it, and
//! what is in `support/mod.rs`; without that it says so and checks nothing. `tests/nested.rs` runs it where there is no such
//! `/dev/kvm`. `CONFORMANCE_ONLY=<part of a name>` runs some of the checks.

mod support;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use model::Generation;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    conformance::{self, Bench, ECHO, Suite},
    engine::{AppSpec, DialError, Engine, EngineError, Exit, RestoreSpec, SuspendOutcome},
    kvm::{KvmConfig, KvmEngine, KvmVm, Limits, PoolConfig, Probe, probe, process::Process},
};

use crate::support::{Guests, SweepAtEnd};

struct KvmBench {
    guests: Guests,
    vmm: PathBuf,
}

impl KvmBench {
    async fn find() -> Option<Self> {
        let vmm = support::path_or("DORMOUSE_VMM", || support::musl_dir("release").join("dormouse-vmm"));
        let why = match probe(&vmm).await {
            Ok(Probe::Hardware) => return Some(Self { guests: Guests::find("kvm")?, vmm }),
            Ok(Probe::Software { why } | Probe::Missing { why }) => why,
            Err(error) => error.to_string(),
        };
        eprintln!("SKIPPED: the kvm engine is not tested here: {why}");
        None
    }

    async fn start(&self) -> KvmEngine {
        let config = KvmConfig {
            vmm: self.vmm.clone(),
            kernel: self.guests.kit.kernel.clone(),
            initrd: self.guests.kit.initrd.clone(),
            guest_fingerprint: self.guests.kit.fingerprint.clone(),
            run_dir: self.work_dir().join("run"),
            pool: PoolConfig { per_image: 1, total: 4 },
            limits: Limits::default(),
        };
        KvmEngine::new(config).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

#[async_trait]
impl Bench for KvmBench {
    async fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.start().await)
    }

    fn work_dir(&self) -> &Path {
        self.guests.dir.path()
    }

    async fn root_disk(&self, to: &Path) {
        self.guests.root_disk(to);
    }

    fn app(&self) -> AppSpec {
        support::app()
    }

    fn guests(&self) -> conformance::Guests {
        conformance::Guests::Real
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kvm_engine_conforms() {
    let Some(bench) = KvmBench::find().await else { return };
    let _sweep = SweepAtEnd(bench.work_dir().join("run"));
    conformance::run_all(&bench).await;
    let left = Process::find_all(&bench.work_dir().join("run")).unwrap();
    assert!(left.is_empty(), "processes were left behind: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_dies_is_told_and_costs_nothing_that_was_saved() {
    let Some(bench) = KvmBench::find().await else { return };
    let _sweep = SweepAtEnd(bench.work_dir().join("run"));
    let _suite = Suite::prepare(&bench).await;
    let engine = bench.start().await;
    let spec = bench.guests.microvm();
    let (id, dir, image_dir) = (spec.id, spec.dir.clone(), spec.image_dir.clone());
    let vm = engine.launch(spec).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let mut stream = vm.dial(ECHO).await.unwrap();
    stream.write_all(b"before").await.unwrap();
    stream.read_exact(&mut [0; 6]).await.unwrap();
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Ok(SuspendOutcome::Suspended(_))));

    let restored = RestoreSpec { id, dir: dir.clone(), image_dir, generation: Generation(1), predecessor: None, identity: Default::default() };
    let vm = engine.restore(restored.clone()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let pid = vm.as_any().downcast_ref::<KvmVm>().unwrap().pid();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    assert!(matches!(vm.exited().await, Exit::Vmm { .. }));
    assert!(matches!(vm.dial(ECHO).await.map(|_| ()), Err(DialError::Gone)));
    assert!(matches!(vm.suspend(CancellationToken::new()).await, Err(EngineError::Ended { .. })));
    vm.kill().await;

    assert_eq!(engine.committed(dir).await.unwrap().unwrap().generation, Generation(0));
    let vm = engine.restore(RestoreSpec { generation: Generation(2), ..restored }).await.unwrap_or_else(|error| panic!("{error}")).vm;
    let usage = vm.usage().await;
    assert!(usage.exits > 0 && usage.stream_sent_bytes > 0 && usage.peak_bytes > 0, "{usage:?}");
    vm.kill().await;
    engine.close().await;
}
