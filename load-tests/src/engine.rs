//! An engine as `serve` uses it, with a real guest: Debian's kernel, our agent, the app of the conformance suite.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use model::{Generation, MicrovmId, Port, Shape};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use vmm_protocol::memdiff::{Kind, Reader};
use vmm_runtime::{
    engine::{AppSpec, BootSpec, Engine, LaunchSpec, Phases, RestoreSpec, Started, SuspendOutcome, Vm},
    guest_kit::{self, GuestKit},
    kvm::{KvmConfig, KvmEngine},
    qemu::{Accel, DEFAULT_LOG_BYTES, HostConfig, Limits, PoolConfig, QemuConfig, QemuEngine},
};

use crate::{
    MUSL,
    figures::{self, Figures, micros},
};

const SHAPE: Shape = Shape { memory_mib: 512, vcpus: 1, disk_gib: 8 };
const DISK_BYTES: u64 = 1 << 30;
/// Far more than anything takes.
const LIMIT: Duration = Duration::from_secs(120);

/// What guests are made from.
pub struct Guests {
    pub kernel_dir: PathBuf,
    pub agent: PathBuf,
    pub dir: PathBuf,
}

impl Guests {
    fn host(&self, name: &str) -> Result<HostConfig> {
        let GuestKit { kernel, initrd, fingerprint } = guest_kit::assemble(&self.kernel_dir, &self.agent, &self.dir.join(name).join("kit"))?;
        let pool = PoolConfig { per_image: 2, total: 4 };
        Ok(HostConfig { kernel, initrd, guest_fingerprint: fingerprint, run_dir: self.dir.join(name).join("run"), pool, limits: Limits::default(), egress: Default::default(), roles: None, log_bytes: DEFAULT_LOG_BYTES })
    }

    pub async fn qemu(&self) -> Result<QemuEngine> {
        Ok(QemuEngine::new(QemuConfig { qemu: "qemu-system-x86_64".into(), accel: Accel::Tcg, host: self.host("qemu")? }).await?)
    }

    pub async fn kvm(&self, vmm: &Path) -> Result<KvmEngine> {
        Ok(KvmEngine::new(KvmConfig::new(vmm.to_owned(), self.host("kvm")?)).await?)
    }

    /// A root disk with the app.
    fn root_disk(&self, to: &Path) -> Result<()> {
        let tree = self.dir.join("tree");
        fs::create_dir_all(tree.join("tmp"))?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm-runtime/examples/guest_app.rs");
        let mut compiler = Command::new("rustc");
        compiler.args(["--edition=2024", "--target", MUSL, "-Copt-level=2", "-Cstrip=symbols", "-o"]).arg(tree.join("app")).arg(source);
        ensure!(compiler.status().context("running rustc")?.success(), "the app does not compile");
        fs::File::create(to)?.set_len(DISK_BYTES)?;
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal", "-d"]).arg(&tree).arg(to).status().context("running mkfs.ext4")?;
        ensure!(made.success(), "mkfs.ext4 failed");
        Ok(())
    }
}

fn app() -> AppSpec {
    let env = [("PATH", "/bin"), ("HOME", "/root")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    AppSpec { argv: vec!["/app".into()], env, workdir: "/".into(), user: String::new(), exposed: vec![Port::DEFAULT], rights: Default::default() }
}

async fn get(vm: &dyn Vm, path: &str) -> Result<String> {
    let answer = async {
        let mut stream = vm.dial(Port::DEFAULT).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: guest\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(LIMIT, answer).await.context("the app does not answer")??;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => bail!("the app answered {answer:?}"),
    }
}

fn named(phases: &Phases) -> figures::Phases {
    phases.iter().map(|(name, took)| ((*name).to_owned(), micros(*took))).collect()
}

/// One microVM of the image.
struct Microvm {
    id: MicrovmId,
    dir: PathBuf,
    image_dir: PathBuf,
    generation: Generation,
    vm: Arc<dyn Vm>,
}

impl Microvm {
    async fn launch(engine: &dyn Engine, image_dir: &Path, dir: &Path) -> Result<(Self, Phases)> {
        let id = MicrovmId::random();
        let dir = dir.join(id.to_string());
        fs::create_dir(&dir)?;
        let spec = LaunchSpec { id, dir: dir.clone(), image_dir: image_dir.to_owned(), identity: BTreeMap::new(), egress: Default::default() };
        let Started { vm, phases, .. } = engine.launch(spec).await?;
        Ok((Self { id, dir, image_dir: image_dir.to_owned(), generation: Generation(0), vm }, phases))
    }

    async fn suspend(&self) -> Result<(Phases, u64)> {
        match self.vm.suspend(CancellationToken::new()).await? {
            SuspendOutcome::Suspended(record) => Ok((record.phases, record.memory_bytes)),
            SuspendOutcome::TakenBack => bail!("the suspend was taken back, which nobody asked for"),
        }
    }

    async fn restore(&mut self, engine: &dyn Engine) -> Result<Phases> {
        self.generation = Generation(self.generation.0 + 1);
        let spec = RestoreSpec {
            id: self.id,
            dir: self.dir.clone(),
            image_dir: self.image_dir.clone(),
            generation: self.generation,
            predecessor: Some(self.vm.clone()),
            identity: BTreeMap::new(),
            egress: Default::default(),
        };
        let Started { vm, phases, .. } = engine.restore(spec).await?;
        vm.release_streams();
        self.vm = vm;
        Ok(phases)
    }

    async fn end(self) -> Result<()> {
        self.vm.kill().await;
        Ok(fs::remove_dir_all(&self.dir)?)
    }
}

/// Gives the pool the time that it has between two wakes on a machine with something to spare. There is nothing to wait for:
/// the pool shows itself to nobody, and a restore that did start a process says so by the name of its first phase.
async fn refilled() {
    tokio::time::sleep(Duration::from_millis(400)).await;
}

/// In how many pieces the newest memory difference is, and how much of it is in pieces that our VMM maps (others are copied).
fn runs(microvm: &Path) -> Result<String> {
    let newest = fs::read_dir(microvm)?.filter_map(|entry| Some(entry.ok()?.path().join("memory.diff"))).filter(|path| path.exists());
    let newest = newest.max_by_key(|path| fs::metadata(path).and_then(|found| found.modified()).ok()).context("there is no memory difference")?;
    let reader = Reader::open(fs::File::open(newest)?, u64::from(SHAPE.memory_mib) * 256)?;
    let of = |kind| reader.runs().iter().filter(move |run| run.kind == kind);
    let pages = |long: u32| of(Kind::Data).filter(|run| run.pages >= long).map(|run| u64::from(run.pages)).sum::<u64>();
    let (all, long) = (pages(1), pages(8));
    let (n_runs, n_long, zeros) = (of(Kind::Data).count(), of(Kind::Data).filter(|run| run.pages >= 8).count(), of(Kind::Zero).count());
    Ok(format!("{all} pages in {n_runs} runs, {long} of them in {n_long} runs of 8 pages or more; and {zeros} runs of zeros"))
}

/// Everything of one engine.
pub async fn measure(engine: &dyn Engine, guests: &Guests, figures: &mut Figures, rounds: usize, suspends: usize, clones: usize) -> Result<()> {
    let subject = &format!("{} engine, Debian guest", engine.name());
    figures.note(format!(
        "`{subject}`: Debian's kernel, our agent and an app, 512 MiB and one vCPU{}; from the call of restore to its return, when the agent has \
         answered; `first answer` is to the end of the first HTTP request after it. Two ready processes per image.",
        if engine.name() == "qemu" { ", instructions translated by TCG (no KVM)" } else { "" }
    ));
    let dir = guests.dir.join(engine.name());
    let image_dir = dir.join("image");
    let (build, root_disk) = (dir.join("build"), dir.join("build.disk"));
    fs::create_dir(&build)?;
    guests.root_disk(&root_disk)?;
    let vm = engine.boot(BootSpec { name: "load-test".to_owned(), dir: build, root_disk, shape: SHAPE, app: app() }).await?;
    vm.ready(LIMIT).await?;
    get(&*vm, "/count").await?;
    engine.capture_image(vm, image_dir.clone()).await?;
    engine.warm(image_dir.clone()).await;
    let measured = restores(engine, &image_dir, &dir, subject, figures, rounds, suspends, clones).await;
    engine.close().await;
    measured
}

#[expect(clippy::too_many_arguments, reason = "one caller")]
async fn restores(
    engine: &dyn Engine,
    image_dir: &Path,
    dir: &Path,
    subject: &str,
    figures: &mut Figures,
    rounds: usize,
    suspends: usize,
    clones: usize,
) -> Result<()> {
    refilled().await;
    let (mut microvm, _) = Microvm::launch(engine, image_dir, dir).await?;
    for round in 0..=rounds {
        get(&*microvm.vm, "/count").await?;
        microvm.suspend().await?;
        refilled().await;
        let began = Instant::now();
        let phases = microvm.restore(engine).await?;
        let restored = micros(began.elapsed());
        get(&*microvm.vm, "/count").await?;
        let answered = micros(began.elapsed());
        // The first one warms the page cache.
        if round > 0 {
            let mut phases = named(&phases);
            figures.round(subject, "restore of a suspended microVM", None, phases.clone(), restored)?;
            phases.push(("first answer".to_owned(), answered - restored));
            figures.round(subject, "the same, to the first answer", None, phases, answered)?;
        }
    }
    for mib in [0, 1, 4, 16, 30, 64, 128] {
        let mut said = String::new();
        for _ in 0..suspends {
            get(&*microvm.vm, &format!("/fill/{mib}")).await?;
            let began = Instant::now();
            let (phases, memory_bytes) = microvm.suspend().await?;
            let total_us = micros(began.elapsed());
            figures.round(subject, &format!("suspend {mib} MiB"), Some(memory_bytes as f64 / f64::from(1 << 20)), named(&phases), total_us)?;
            said = runs(&microvm.dir)?;
            refilled().await;
            microvm.restore(engine).await?;
        }
        figures.note(format!("`{subject}`: the app has filled {mib} MiB anew; the difference has {said}."));
    }
    microvm.end().await?;

    let mut awake = Vec::new();
    for _ in 0..clones {
        let (microvm, _) = Microvm::launch(engine, image_dir, dir).await?;
        figures.memory(subject, "clone, just launched", microvm.vm.usage().await.private_bytes >> 10)?;
        get(&*microvm.vm, "/count").await?;
        awake.push(microvm);
    }
    for microvm in &awake {
        figures.memory(subject, "clone, idle after its first request", microvm.vm.usage().await.private_bytes >> 10)?;
    }
    for microvm in awake {
        microvm.end().await?;
    }
    Ok(())
}
