//! What every engine must do, as checks that run against any of them.
//!
//! Owns: the promises of [`crate::engine`] as named checks. Knows an engine only through its trait, and a guest only
//! through the app in `examples/guest_app.rs`. A check panics with what went wrong; [`run_all`] runs all of them, says how
//! each went, and panics at the end if one failed.

mod checks;
mod files;
mod guest;

use std::{
    net::Ipv4Addr,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::FutureExt;
use model::{Generation, MicrovmId, Port, Shape, chain};

use crate::engine::{AppSpec, BootSpec, Engine, LaunchSpec, RestoreSpec, Started, Vm};

/// What the suite has to be given.
#[async_trait]
pub trait Bench: Send + Sync {
    /// An engine as after a start of `serve`. All engines of one bench share the host and its processes.
    async fn engine(&self) -> Arc<dyn Engine>;

    /// An empty directory for everything.
    fn work_dir(&self) -> &Path;

    /// Puts a root disk with the app into `to`.
    async fn root_disk(&self, to: &Path);

    /// How the app is started from that disk.
    fn app(&self) -> AppSpec;

    /// Whether there are guests, with memory, disks and clocks of their own.
    fn guests(&self) -> Guests;

    /// An address of this host where the engine lets guests connect to; it is no loopback address. Without one, what guests
    /// reach outside is not checked.
    fn outside(&self) -> Option<Ipv4Addr> {
        None
    }

    /// The size of the guests.
    fn shape(&self) -> Shape {
        SHAPE
    }
}

/// What stands behind the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// A machine of its own for each microVM.
    Real,
    /// One app on the host for all of them; what needs isolation or memory is not checked.
    Shared,
}

/// Where the app answers HTTP.
pub const HTTP: Port = Port::DEFAULT;
/// Where the app echoes.
pub const ECHO: Port = match Port::new(7000) {
    Some(port) => port,
    None => panic!("7000 is a port"),
};
/// Where nobody listens.
pub const NOBODY: Port = match Port::new(9) {
    Some(port) => port,
    None => panic!("9 is a port"),
};

/// The size of the suite's guests, unless the bench has another.
pub const SHAPE: Shape = Shape { memory_mib: 512, vcpus: 1, disk_gib: 8 };

const READY_LIMIT: Duration = Duration::from_secs(120);

/// What the checks share: one image, made by the first of them.
pub struct Suite<'a> {
    bench: &'a dyn Bench,
    engine: Arc<dyn Engine>,
    image_dir: PathBuf,
    captured_at: Instant,
}

/// A microVM under test.
pub struct Subject {
    id: MicrovmId,
    dir: PathBuf,
    vm: Arc<dyn Vm>,
    generation: Generation,
}

impl<'a> Suite<'a> {
    /// Boots the app and makes the image that every check clones.
    pub async fn prepare(bench: &'a dyn Bench) -> Self {
        let engine = bench.engine().await;
        let image_dir = bench.work_dir().join("image");
        let (dir, root_disk) = (bench.work_dir().join("build"), bench.work_dir().join("build.disk"));
        std::fs::create_dir(&dir).expect("the work directory is empty and writable");
        bench.root_disk(&root_disk).await;
        let begun = Instant::now();
        let spec = BootSpec { name: "conformance".to_owned(), dir, root_disk, shape: bench.shape(), app: bench.app() };
        let vm = engine.boot(spec).await.unwrap_or_else(|error| panic!("boot: {}", chain(&error)));
        let booted = begun.elapsed();
        let port = vm.ready(READY_LIMIT).await.unwrap_or_else(|error| panic!("ready: {}", chain(&error)));
        let ready = begun.elapsed();
        assert_eq!(port, HTTP);
        assert_eq!(guest::get(&*vm, "/count").await, "1");
        let capturing = Instant::now();
        let snapshot = engine.capture_image(vm, image_dir.clone()).await.unwrap_or_else(|error| panic!("capture: {}", chain(&error)));
        println!("boot {booted:.0?}, ready {ready:.0?}, capture {:.0?}: {snapshot:?}", capturing.elapsed());
        assert_eq!((snapshot.engine.as_str(), snapshot.shape), (engine.name(), bench.shape()));
        Self { bench, engine, image_dir, captured_at: Instant::now() }
    }

    async fn launch(&self) -> Subject {
        self.launch_with(&*self.engine).await
    }

    async fn launch_with(&self, engine: &dyn Engine) -> Subject {
        self.launch_as(engine, self.launch_spec()).await
    }

    async fn launch_as(&self, engine: &dyn Engine, spec: LaunchSpec) -> Subject {
        let (id, dir) = (spec.id, spec.dir.clone());
        let started = engine.launch(spec).await.unwrap_or_else(|error| panic!("launch: {}", chain(&error)));
        print_phases("launch", &started);
        Subject { id, dir, vm: started.vm, generation: Generation(0) }
    }

    fn launch_spec(&self) -> LaunchSpec {
        let id = MicrovmId::random();
        let dir = self.bench.work_dir().join(id.to_string());
        std::fs::create_dir(&dir).expect("the work directory is writable");
        LaunchSpec { id, dir, image_dir: self.image_dir.clone(), identity: [("AWS_REGION".to_owned(), "here".to_owned())].into(), egress: Default::default() }
    }

    /// A restore that goes on with the streams of the microVM that was suspended.
    fn restore_spec(&self, subject: &Subject) -> RestoreSpec {
        RestoreSpec {
            id: subject.id,
            dir: subject.dir.clone(),
            image_dir: self.image_dir.clone(),
            generation: subject.generation.next(),
            predecessor: Some(subject.vm.clone()),
            identity: Default::default(),
            egress: Default::default(),
        }
    }

    /// A restore whose streams do not go on yet; the subject is as it was.
    async fn restore_held(&self, subject: &Subject) -> Arc<dyn Vm> {
        let started = self.engine.restore(self.restore_spec(subject)).await.unwrap_or_else(|error| panic!("restore: {}", chain(&error)));
        print_phases("restore", &started);
        started.vm
    }

    async fn restore(&self, subject: &mut Subject) {
        let spec = self.restore_spec(subject);
        let started = self.engine.restore(spec).await.unwrap_or_else(|error| panic!("restore: {}", chain(&error)));
        print_phases("restore", &started);
        started.vm.release_streams();
        subject.generation = subject.generation.next();
        subject.vm = started.vm;
    }
}

fn print_phases(what: &str, started: &Started) {
    let total: Duration = started.phases.iter().map(|(_, time)| *time).sum();
    let phases: Vec<String> = started.phases.iter().map(|(name, time)| format!("{name} {time:.1?}")).collect();
    println!("    {what} {total:.1?}: {}", phases.join(", "));
}

/// Runs every check that fits the bench.
///
/// # Panics
/// If a check fails, after all of them have run.
pub async fn run_all(bench: &dyn Bench) {
    let suite = Suite::prepare(bench).await;
    let mut failed = Vec::new();
    let only = std::env::var("CONFORMANCE_ONLY").unwrap_or_default();
    // For faults that do not show every time.
    let times = std::env::var("CONFORMANCE_TIMES").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    for (name, needs, check) in std::iter::repeat_n(checks::ALL, times).flatten() {
        if (*needs == Guests::Real && bench.guests() == Guests::Shared) || !name.contains(&only) {
            continue;
        }
        println!("{name} …");
        let begun = Instant::now();
        let outcome = AssertUnwindSafe(check(&suite)).catch_unwind().await;
        println!("{} {name} ({:.1?})", if outcome.is_ok() { "ok  " } else { "FAIL" }, begun.elapsed());
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    suite.engine.close().await;
    assert!(failed.is_empty(), "failed: {failed:?}");
}
