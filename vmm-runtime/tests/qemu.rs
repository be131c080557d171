//! The qemu engine keeps its promises, with real guests: Debian's kernel, our agent, an app.
//!
//! Needs a kernel package unpacked in `$DORMOUSE_KERNEL_DIR` (default `~/.cache/dormouse/kernel`), and the guest agent built
//! for `x86_64-unknown-linux-musl` in release mode (or `$DORMOUSE_GUEST_AGENT`). Without them it says so and checks nothing.
//! `CONFORMANCE_ONLY=<part of a name>` runs some of the checks.

mod support;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{Generation, MicrovmId};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use vmm_runtime::{
    conformance::{self, Bench, ECHO, Guests, HTTP},
    engine::{AppSpec, DialError, Engine, EngineError, Exit, LaunchSpec, RestoreSpec, SuspendOutcome, Vm},
    guest_kit::{self, GuestKit},
    qemu::{Accel, Limits, PoolConfig, QemuConfig, QemuEngine, QemuVm},
};

const DISK_BYTES: u64 = 1 << 30;

struct QemuBench {
    kit: GuestKit,
    dir: tempfile::TempDir,
    pool: PoolConfig,
    limits: Limits,
}

impl QemuBench {
    /// `None` with a sentence on stderr: something that only setup can provide is missing.
    fn find() -> Option<Self> {
        let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::INFO).try_init();
        let home = PathBuf::from(env::var_os("HOME")?);
        let kernel_dir = env::var_os("DORMOUSE_KERNEL_DIR").map_or_else(|| home.join(".cache/dormouse/kernel"), PathBuf::from);
        let agent = env::var_os("DORMOUSE_GUEST_AGENT").map_or_else(
            || {
                let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
                let target = env::var_os("CARGO_TARGET_DIR").map_or(default, PathBuf::from);
                target.join("x86_64-unknown-linux-musl/release/guest-agent")
            },
            PathBuf::from,
        );
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        match guest_kit::assemble(&kernel_dir, &agent, &dir.path().join("kit")) {
            Ok(kit) => Some(Self { kit, dir, pool: PoolConfig { per_image: 1, total: 4 }, limits: Limits::default() }),
            Err(error) => {
                eprintln!("SKIPPED: the qemu engine is not tested: {error} ({})", std::error::Error::source(&error).map_or_else(String::new, ToString::to_string));
                None
            }
        }
    }

    async fn start(&self) -> QemuEngine {
        let config = QemuConfig {
            qemu: "qemu-system-x86_64".into(),
            accel: Accel::Tcg,
            kernel: self.kit.kernel.clone(),
            initrd: self.kit.initrd.clone(),
            guest_fingerprint: self.kit.fingerprint.clone(),
            run_dir: self.dir.path().join("run"),
            pool: self.pool,
            limits: self.limits,
        };
        QemuEngine::new(config).await.unwrap_or_else(|error| panic!("{error}"))
    }

    fn microvm(&self) -> LaunchSpec {
        let id = MicrovmId::random();
        let dir = self.dir.path().join(id.to_string());
        fs::create_dir(&dir).unwrap();
        LaunchSpec { id, dir, image_dir: self.dir.path().join("image"), identity: Default::default() }
    }
}

#[async_trait]
impl Bench for QemuBench {
    async fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.start().await)
    }

    fn work_dir(&self) -> &Path {
        self.dir.path()
    }

    async fn root_disk(&self, to: &Path) {
        let tree = self.dir.path().join("tree");
        fs::create_dir_all(tree.join("tmp")).unwrap();
        fs::rename(support::guest_app(self.dir.path()), tree.join("app")).unwrap();
        fs::File::create(to).unwrap().set_len(DISK_BYTES).unwrap();
        let output = Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal", "-d"]).arg(&tree).arg(to).output().expect("mkfs.ext4 is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn app(&self) -> AppSpec {
        let env = [("PATH", "/bin"), ("HOME", "/root")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        AppSpec { argv: vec!["/app".into()], env, workdir: "/".into(), user: String::new(), exposed: vec![HTTP] }
    }

    fn guests(&self) -> Guests {
        Guests::Real
    }
}

/// Ends every process of the bench, also when a check has panicked.
struct SweepAtEnd<'a>(&'a QemuBench);

impl Drop for SweepAtEnd<'_> {
    fn drop(&mut self) {
        // Within the test's runtime; what is only signalled here is gone soon after.
        for process in vmm_runtime::qemu::process::Process::find_all(&self.0.dir.path().join("run")).unwrap() {
            process.signal_kill();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_engine_conforms() {
    let Some(bench) = QemuBench::find() else { return };
    let _sweep = SweepAtEnd(&bench);
    conformance::run_all(&bench).await;
    let left = vmm_runtime::qemu::process::Process::find_all(&bench.dir.path().join("run")).unwrap();
    assert!(left.is_empty(), "processes were left behind: {left:?}");
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
    let Some(mut bench) = QemuBench::find() else { return };
    bench.limits = Limits { quiesce: Duration::from_secs(1), command: Duration::from_secs(1), dial: Duration::from_secs(1), ..Limits::default() };
    let _sweep = SweepAtEnd(&bench);
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
    let spec = |generation| RestoreSpec { id, dir: dir.clone(), image_dir: image_dir.clone(), generation: Generation(generation), predecessor: None, identity: Default::default() };
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
    let run_dir = bench.dir.path().join("run");
    for process in vmm_runtime::qemu::process::Process::find_all(&run_dir).unwrap() {
        process.kill(Duration::from_secs(5)).await;
    }
    let vm = engine.launch(bench.microvm()).await.unwrap_or_else(|error| panic!("{error}")).vm;
    assert_eq!(get(&vm, "/count").await, "2");
    vm.kill().await;
    engine.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_panics_is_quoted() {
    let Some(mut bench) = QemuBench::find() else { return };
    bench.kit.initrd = bench.dir.path().join("no-initrd");
    fs::write(&bench.kit.initrd, b"garbage").unwrap();
    bench.limits.boot = Duration::from_secs(30);
    let _sweep = SweepAtEnd(&bench);
    let engine = bench.start().await;
    let (dir, root_disk) = (bench.dir.path().join("build"), bench.dir.path().join("disk"));
    fs::create_dir(&dir).unwrap();
    bench.root_disk(&root_disk).await;
    let spec = vmm_runtime::engine::BootSpec { name: "panic".into(), dir, root_disk, shape: conformance::SHAPE, app: bench.app() };
    let error = engine.boot(spec).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("panic"), "{error}");
}
