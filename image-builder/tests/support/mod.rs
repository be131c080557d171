//! A catalog with the real buildah and the real base image, above an engine without guests that remembers what it was told.

use std::{
    collections::BTreeMap,
    future::Future,
    io::{Cursor, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use image_builder::{Artifact, BuildRequest, BuildState, BuilderConfig, Catalog, ImageRecord};
use model::{Generation, ImageName, ImageVersion, MemorySize, MicrovmId, Port};
use tokio::sync::{Semaphore, watch};
use vmm_runtime::{
    engine::{BootSpec, Engine, EngineError, Exit, ImageSnapshot, LaunchSpec, RestoreSpec, SnapshotRecord, Started, Vm},
    loopback::LoopbackEngine,
};

/// Longer than any of these builds takes on a busy machine.
pub const CEILING: Duration = Duration::from_secs(300);

/// Says why real builds cannot run here, if they cannot.
pub fn can_build() -> bool {
    let missing: Vec<&str> = ["buildah", "mmdebstrap", "mkfs.ext4", "unshare"]
        .into_iter()
        .filter(|program| !Command::new("sh").args(["-c", "command -v \"$0\" >/dev/null", program]).status().is_ok_and(|status| status.success()))
        .collect();
    let root = std::fs::metadata("/proc/self").is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0);
    if missing.is_empty() && root {
        return true;
    }
    // Past the test harness, which shows what a passing test says to nobody.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: real image builds need root and {missing:?}; run `make setup` as root\n"));
    false
}

/// Where `make setup` puts it, so that the tests do not make another one.
pub fn base_dir() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    cache.unwrap_or_else(|| "/var/cache".into()).join("dormouse/base")
}

/// The loopback engine, with its boots remembered, held, or failed.
#[derive(Clone)]
pub struct RecordingEngine {
    pub inner: LoopbackEngine,
    pub boots: watch::Sender<Vec<BootSpec>>,
    /// A boot takes one of these; none are given while a test holds boots.
    pub permits: Arc<Semaphore>,
    /// The next boot ends so, after the app printed this.
    pub fail_boot: Arc<Mutex<Option<(i32, &'static str)>>>,
    under_way: Arc<AtomicUsize>,
    pub most_under_way: Arc<AtomicUsize>,
}

impl RecordingEngine {
    pub fn new() -> Self {
        Self {
            inner: LoopbackEngine::new(),
            boots: watch::Sender::new(Vec::new()),
            permits: Arc::new(Semaphore::new(1000)),
            fail_boot: Arc::default(),
            under_way: Arc::default(),
            most_under_way: Arc::default(),
        }
    }

    /// What the last boot was told.
    pub fn last_boot(&self) -> BootSpec {
        self.boots.borrow().last().cloned().expect("something was booted")
    }
}

#[async_trait]
impl Engine for RecordingEngine {
    fn name(&self) -> &'static str {
        "recording"
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, EngineError> {
        assert_eq!(std::fs::read_dir(&spec.dir).unwrap().count(), 0, "the directory of a boot exists and is empty");
        assert!(spec.root_disk.is_absolute() && spec.root_disk.is_file());
        // Counted before it is told: a test that has heard of it may let it go on.
        let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way.fetch_max(now, Ordering::SeqCst);
        self.boots.send_modify(|boots| boots.push(spec.clone()));
        self.permits.acquire().await.unwrap().forget();
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        if let Some((code, printed)) = self.fail_boot.lock().unwrap().take() {
            std::fs::create_dir(spec.dir.join("log")).unwrap();
            std::fs::write(spec.dir.join("log/app.log"), printed).unwrap();
            return Err(EngineError::Ended { step: "boot", exit: Exit::App { code } });
        }
        self.inner.boot(spec).await
    }

    async fn capture_image(&self, vm: Arc<dyn Vm>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
        assert!(!into.exists(), "a snapshot goes where nothing is");
        self.inner.capture_image(vm, into).await
    }

    async fn launch(&self, spec: LaunchSpec) -> Result<Started, EngineError> {
        self.inner.launch(spec).await
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Started, EngineError> {
        self.inner.restore(spec).await
    }

    async fn adopt(&self, id: MicrovmId, dir: PathBuf, image_dir: PathBuf, generation: Generation) -> Result<Option<Arc<dyn Vm>>, EngineError> {
        self.inner.adopt(id, dir, image_dir, generation).await
    }

    async fn committed(&self, dir: PathBuf) -> Result<Option<SnapshotRecord>, EngineError> {
        self.inner.committed(dir).await
    }

    async fn warm(&self, image_dir: PathBuf) {
        self.inner.warm(image_dir).await
    }

    async fn sweep(&self, keep: &[MicrovmId]) -> Result<(), EngineError> {
        self.inner.sweep(keep).await
    }

    async fn close(&self) {
        self.inner.close().await
    }
}

/// A node's catalog in a directory of its own.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub engine: RecordingEngine,
    pub catalog: Catalog,
}

pub fn config(dir: &Path) -> BuilderConfig {
    BuilderConfig {
        dir: dir.join("images"),
        base_dir: base_dir(),
        max_concurrent_builds: 2,
        max_unfinished_builds: 10,
        max_images: 100,
        max_versions: 50,
        ready_timeout: Duration::from_secs(30),
        build_timeout: CEILING,
        size_seen: Default::default(),
        network: Default::default(),
        egress: Default::default(),
    }
}

impl Bench {
    pub async fn new() -> Self {
        let (dir, engine) = (tempfile::tempdir().unwrap(), RecordingEngine::new());
        // The app "listens" from the beginning, on the port that most of these images expose.
        engine.inner.listen(port(8080), "127.0.0.1:9".parse().unwrap());
        let catalog = Catalog::open(config(dir.path()), Arc::new(engine.clone())).await.unwrap();
        Self { dir, engine, catalog }
    }

    /// Builds an image of these files to its end.
    pub async fn build(&self, name: &str, files: &[(&str, &str)]) -> ImageRecord {
        let path = self.dir.path().join(format!("{name}.zip"));
        std::fs::write(&path, zip(files)).unwrap();
        self.build_artifact(name, Artifact::Zip(path)).await
    }

    pub async fn build_artifact(&self, name: &str, artifact: Artifact) -> ImageRecord {
        let record = self.catalog.create(request(name, artifact)).await.unwrap().versions.remove(0);
        within(self.catalog.finished(&record.name, record.version)).await.unwrap()
    }

    /// Builds what must fail, and returns code and message.
    pub async fn failure(&self, name: &str, files: &[(&str, &str)]) -> (String, String) {
        let record = self.build(name, files).await;
        assert_eq!(record.state, BuildState::Failed);
        let failure = record.failure.unwrap();
        (failure.code, failure.message)
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.catalog.build_log(&image(name), ImageVersion::FIRST)).unwrap()
    }

    /// A file of the finished image's disk, read with debugfs as a guest would see it.
    pub fn on_disk(&self, name: &str, command: &str) -> String {
        let disk = self.catalog.snapshot_dir(&image(name), ImageVersion::FIRST).join("disk.raw");
        let output = Command::new("/usr/sbin/debugfs").args(["-R", command]).arg(disk).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Nothing of a build is left: no workspace, no mount, no process.
    pub fn assert_clean(&self) {
        let work = self.dir.path().join("images/.work");
        let left: Vec<_> = std::fs::read_dir(&work).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "something is mounted");
        assert_eq!(processes_of(self.dir.path()), Vec::<String>::new());
    }
}

/// Command lines of all processes that name `dir`.
pub fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(dir)).collect()
}

pub fn request(name: &str, artifact: Artifact) -> BuildRequest {
    BuildRequest {
        tags: Default::default(),
        name: image(name),
        artifact,
        memory: MemorySize::from_mib(512).unwrap(),
        environment: BTreeMap::from([("FROM_REQUEST".to_owned(), "yes".to_owned()), ("OVERRIDDEN".to_owned(), "by the request".to_owned())]),
        rights: Default::default(),
        hooks: None,
        request: serde_json::json!({"description": "kept as it is"}),
    }
}

pub fn image(name: &str) -> ImageName {
    name.parse().unwrap()
}

pub fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

pub fn zip(files: &[(&str, &str)]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, text) in files {
        writer.start_file(*name, zip::write::SimpleFileOptions::default().unix_permissions(0o644)).unwrap();
        writer.write_all(text.as_bytes()).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(CEILING, future).await.expect("it takes longer than anything here may take")
}
