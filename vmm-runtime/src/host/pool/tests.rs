use std::time::Duration;

use async_trait::async_trait;
use model::Shape;
use tokio::net::UnixStream;

use super::*;
use crate::{
    engine::{ImageSnapshot, Usage},
    host::{DEFAULT_LOG_BYTES, HostConfig, Limits, Load, ProcessEngine, Save, SavedParts, Stopwatch},
    snapshot::manifest::{FORMAT, Fingerprint, ImageManifest, Part},
};

/// Processes that only sleep.
#[derive(Default)]
struct Fake {
    /// How many were connected to.
    connected: std::sync::atomic::AtomicUsize,
}

/// Checksum of an image whose second process cannot be connected to.
const ONE_WORKS: u32 = 77;

fn fingerprint() -> Fingerprint {
    Fingerprint { engine: "fake".into(), vmm: "1".into(), machine: "a".into(), cpu: "b".into() }
}

#[async_trait]
impl Backend for Fake {
    const NAME: &'static str = "fake";
    const LAYER_FILES: &'static [&'static str] = &["layer"];
    type Vmm = ();

    fn fingerprint(&self, _: Shape) -> Fingerprint {
        fingerprint()
    }
    fn program(&self) -> (&Path, &'static str) {
        (Path::new("sleep"), "it is everywhere")
    }
    const JOINS_CGROUP: bool = false;
    const OTHER_TASKS: u32 = 1;
    fn overhead_bytes(&self, _: Shape) -> u64 {
        16 << 20
    }
    fn arguments(&self, _: &Path, _: &Role, _: Option<&Path>) -> Vec<String> {
        vec!["60".to_owned()]
    }
    async fn connect(&self, _: &Process, role: &Role) -> Result<(), EngineError> {
        let before = self.connected.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        match role {
            Role::Clone(image) if image.crc32 == ONE_WORKS && before > 0 => Err(EngineError::Host { what: "no more".to_owned() }),
            _ => Ok(()),
        }
    }
    async fn reconnect(&self, _: &Process, _: &Image) -> Result<(), EngineError> {
        unimplemented!()
    }
    async fn agent(&self, _: &Process, _: &()) -> io::Result<UnixStream> {
        unimplemented!()
    }
    async fn load(&self, _: &Process, _: &(), _: Load<'_, Self>, _: &mut Stopwatch) -> Result<(), EngineError> {
        unimplemented!()
    }
    async fn run(&self, _: &Process, _: &()) -> Result<(), EngineError> {
        unimplemented!()
    }
    async fn pause(&self, _: &Process, _: &()) -> Result<(), EngineError> {
        unimplemented!()
    }
    async fn save_image(&self, _: &Process, _: &(), _: &Path) -> Result<Part, EngineError> {
        unimplemented!()
    }
    async fn save_difference(&self, _: &Process, _: &(), _: Save<'_>, _: &mut Stopwatch) -> Result<Option<SavedParts>, EngineError> {
        unimplemented!()
    }
    async fn stopped(&self, _: &()) -> String {
        unimplemented!()
    }
    async fn console(&self, _: &()) -> String {
        unimplemented!()
    }
    async fn usage(&self, _: &Process, _: &()) -> Option<Usage> {
        unimplemented!()
    }
}

fn engine(run_dir: &Path, pool: PoolConfig) -> ProcessEngine<Fake> {
    let nowhere = PathBuf::new();
    let config = HostConfig {
        kernel: nowhere.clone(),
        initrd: nowhere,
        guest_fingerprint: String::new(),
        run_dir: run_dir.to_owned(),
        pool,
        egress: Default::default(),
        roles: None,
        limits: Limits::default(),
        log_bytes: DEFAULT_LOG_BYTES,
    };
    ProcessEngine::over(Fake::default(), config).unwrap()
}

fn image(dir: &str, crc32: u32) -> Arc<Image> {
    let shape = Shape { memory_mib: 512, vcpus: 1, disk_gib: 8 };
    let part = |file: &str| Part { file: file.to_owned(), bytes: 0, crc32: None };
    let manifest = ImageManifest {
        format: FORMAT,
        fingerprint: fingerprint(),
        guest: String::new(),
        snapshot: ImageSnapshot { engine: "fake".into(), shape, memory_bytes: 0, disk_bytes: 0 },
        exposed: Vec::new(),
        state: part("state"),
        memory: part("memory"),
        disk: part("disk"),
    };
    Arc::new(Image { dir: dir.into(), manifest, crc32 })
}

/// Waits until the pool holds what it should.
async fn until(pool: &Pool<Fake>, wanted: impl Fn(&[PathBuf]) -> bool) -> Vec<PathBuf> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let dirs = pool.dirs();
        if wanted(&dirs) {
            return dirs;
        }
        assert!(Instant::now() < deadline, "the pool holds {dirs:?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_process_serves_the_image_that_it_was_started_for_and_no_later_one() {
    let run_dir = tempfile::tempdir().unwrap();
    let engine = engine(run_dir.path(), PoolConfig { per_image: 2, total: 4 });
    let pool = &engine.shared.pool;
    pool.refill(&image("/image", 1));
    let old = until(pool, |dirs| dirs.len() == 2).await;
    assert!(pool.take(&image("/image", 2)).is_none() && pool.take(&image("/other", 1)).is_none());

    // Another image has come to the same place: what was ready for the old one is ended.
    pool.refill(&image("/image", 2));
    until(pool, |dirs| dirs.len() == 2 && dirs.iter().all(|dir| !old.contains(dir))).await;
    assert!(old.iter().all(|dir| !dir.exists()));
    assert!(pool.take(&image("/image", 1)).is_none());
    let ready = pool.take(&image("/image", 2)).unwrap();
    assert!(ready.process.is_alive());
    ready.end(&engine.shared).await;
    pool.close().await;
    assert!(pool.dirs().is_empty() && run_dir.path().read_dir().unwrap().next().is_none());
}

#[tokio::test]
async fn an_image_that_is_forgotten_has_no_process_left() {
    let run_dir = tempfile::tempdir().unwrap();
    let engine = engine(run_dir.path(), PoolConfig { per_image: 1, total: 4 });
    let pool = &engine.shared.pool;
    for image in [image("/gone", 1), image("/stays", 2)] {
        pool.refill(&image);
        until(pool, |_| pool.state.lock().shelves.get(&image.dir).is_some_and(|shelf| shelf.ready.len() == 1)).await;
    }
    crate::engine::Engine::forget(&engine, "/gone".into()).await;
    assert!(pool.take(&image("/gone", 1)).is_none());
    assert_eq!(pool.dirs().len(), 1);
    assert_eq!(run_dir.path().read_dir().unwrap().count(), 1);
    pool.close().await;
}

#[tokio::test]
async fn a_process_that_cannot_be_made_ready_leaves_no_other_behind() {
    let run_dir = tempfile::tempdir().unwrap();
    let engine = engine(run_dir.path(), PoolConfig { per_image: 2, total: 4 });
    let pool = &engine.shared.pool;
    pool.refill(&image("/image", ONE_WORKS));
    until(pool, |_| engine.shared.backend.connected.load(std::sync::atomic::Ordering::SeqCst) == 2).await;
    until(pool, |dirs| dirs.is_empty()).await;
    let _refilled = pool.refilling.lock().await;
    assert!(run_dir.path().read_dir().unwrap().next().is_none());
}

#[tokio::test]
async fn the_image_that_was_not_used_for_the_longest_time_gives_up_its_process() {
    let run_dir = tempfile::tempdir().unwrap();
    let engine = engine(run_dir.path(), PoolConfig { per_image: 1, total: 2 });
    let pool = &engine.shared.pool;
    let images = [image("/a", 1), image("/b", 2), image("/c", 3)];
    for (index, image) in images.iter().enumerate() {
        pool.refill(image);
        until(pool, |_| pool.state.lock().shelves.get(&image.dir).is_some_and(|shelf| shelf.ready.len() == 1)).await;
        assert_eq!(pool.dirs().len(), (index + 1).min(2));
    }
    assert!(pool.take(&images[0]).is_none());
    for image in &images[1..] {
        pool.take(image).unwrap().end(&engine.shared).await;
    }
    pool.close().await;
}
