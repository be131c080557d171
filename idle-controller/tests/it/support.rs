//! One node in a temporary directory, and its clock.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use idle_controller::{Awake, Controller, ControllerConfig, MicrovmHandle, MicrovmView, Refused, RunSpec};
use model::{Clock, IdlePolicy, ImageVersion, MicrovmState};
use vmm_runtime::loopback::LoopbackEngine;

pub const SEC: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const HOUR: Duration = Duration::from_secs(3600);
/// Longer than anything takes in driven time; ends a test that would hang.
pub const CEILING: Duration = Duration::from_secs(20 * 3600);
/// The same for tests in real time.
pub const REAL_CEILING: Duration = Duration::from_secs(60);

/// Tokio's time, which tests can pause, and a wall clock that tests can set.
pub struct TestClock {
    start: tokio::time::Instant,
    wall: Mutex<SystemTime>,
}

impl TestClock {
    fn new() -> Arc<Self> {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Arc::new(Self { start: tokio::time::Instant::now(), wall: Mutex::new(wall) })
    }

    pub fn wall_jumps_forward(&self, by: Duration) {
        *self.wall.lock().unwrap() += by;
    }

    pub fn wall_jumps_back(&self, by: Duration) {
        *self.wall.lock().unwrap() -= by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
    fn wall(&self) -> SystemTime {
        *self.wall.lock().unwrap() + self.start.elapsed()
    }
}

pub struct Node {
    pub dir: tempfile::TempDir,
    pub engine: LoopbackEngine,
    pub clock: Arc<TestClock>,
    pub config: ControllerConfig,
    pub metrics: prometheus::Registry,
    controller: Option<Controller>,
}

impl Node {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ControllerConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = ControllerConfig {
            dir: dir.path().to_owned(),
            max_concurrent_starts: 64,
            max_waiting_per_microvm: 1000,
            keep_terminated: 24 * HOUR,
            max_microvms: 100,
            suspend_hook_failure: Default::default(),
        };
        change(&mut config);
        let (engine, clock) = (LoopbackEngine::new(), TestClock::new());
        let mut node = Self { dir, engine, clock, config, metrics: prometheus::Registry::new(), controller: None };
        node.open().await;
        node
    }

    pub async fn open(&mut self) {
        self.metrics = prometheus::Registry::new();
        let controller =
            Controller::open(self.config.clone(), Arc::new(self.engine.clone()), self.clock.clone(), &self.metrics).await.unwrap();
        self.controller = Some(controller);
    }

    pub fn controller(&self) -> &Controller {
        self.controller.as_ref().unwrap()
    }

    /// An orderly end of `serve`.
    pub async fn close(&mut self) {
        let controller = self.controller.take().unwrap();
        controller.close().await;
    }

    /// The end of `serve` at this very instant.
    pub fn crash(&mut self) {
        self.controller = None;
    }

    pub async fn run(&self, spec: RunSpec) -> MicrovmHandle {
        let view = self.controller().run(spec).await.unwrap();
        self.controller().find(view.id).unwrap()
    }

    /// A microVM that runs, with nobody talking to it.
    pub async fn running(&self, spec: RunSpec) -> MicrovmHandle {
        let handle = self.run(spec).await;
        reaches(&handle, MicrovmState::Running).await;
        handle
    }

    /// A microVM that sleeps.
    pub async fn suspended(&self, spec: RunSpec) -> MicrovmHandle {
        self.suspended_within(CEILING, spec).await
    }

    /// Asks for the sleep right away instead of waiting for RUNNING: with a short idle time that state may come and go
    /// unseen.
    pub async fn suspended_within(&self, ceiling: Duration, spec: RunSpec) -> MicrovmHandle {
        let handle = self.run(spec).await;
        handle.suspend().await.unwrap();
        reaches_within(ceiling, &handle, MicrovmState::Suspended).await;
        handle
    }

    /// The same microVM after a restart.
    pub fn again(&self, before: &MicrovmHandle) -> MicrovmHandle {
        self.controller().find(before.id()).expect("a microVM is lost")
    }

    pub fn microvm_dir(&self, handle: &MicrovmHandle) -> PathBuf {
        self.dir.path().join("microvms").join(handle.id().to_string())
    }

    pub fn files(&self, handle: &MicrovmHandle) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.microvm_dir(handle)) else { return vec!["no directory".to_owned()] };
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A metric's value; of a histogram, its count.
    pub fn metric(&self, name: &str, label: Option<&str>) -> f64 {
        let families = self.metrics.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("no metric {name}"));
        let metrics = family.get_metric().iter();
        let mut wanted = metrics.filter(|metric| label.is_none_or(|label| metric.get_label().iter().any(|pair| pair.value() == label)));
        let metric = wanted.next().unwrap_or_else(|| panic!("no {name} with {label:?}"));
        match family.get_field_type() {
            prometheus::proto::MetricType::HISTOGRAM => metric.get_histogram().get_sample_count() as f64,
            prometheus::proto::MetricType::GAUGE => metric.get_gauge().get_value(),
            _ => metric.get_counter().get_value(),
        }
    }
}

pub fn idle(max_idle: Duration, suspended: Duration) -> IdlePolicy {
    IdlePolicy { max_idle, suspended, auto_resume: true }
}

/// Sleeps after a minute, sleeps for an hour at most, wakes on traffic, lives for 8 hours.
pub fn spec() -> RunSpec {
    RunSpec {
        image: "hello".parse().unwrap(),
        version: ImageVersion::FIRST,
        image_dir: "/images/hello/1.0".into(),
        idle: Some(idle(MINUTE, HOUR)),
        max_duration: 8 * HOUR,
        identity: BTreeMap::new(),
        egress: Default::default(),
        hooks: None,
        run_payload: None,
        request: serde_json::json!({"clientToken": "t-1"}),
        size: model::MemorySize::DEFAULT,
        keep_output: true,
    }
}

pub fn no_auto_resume() -> RunSpec {
    RunSpec { idle: Some(IdlePolicy { auto_resume: false, ..idle(MINUTE, HOUR) }), ..spec() }
}

/// Waits for a state that lasts until the test does something about it; the microVM must not end in another one.
pub async fn reaches(handle: &MicrovmHandle, state: MicrovmState) -> MicrovmView {
    reaches_within(CEILING, handle, state).await
}

pub async fn reaches_within(ceiling: Duration, handle: &MicrovmHandle, state: MicrovmState) -> MicrovmView {
    let view = tokio::time::timeout(ceiling, handle.wait_until(|view| view.state == state)).await;
    let view = view.unwrap_or_else(|_| panic!("never {state}; last seen {:?}", handle.view()));
    assert_eq!(view.state, state, "{view:?}");
    view
}

pub fn patiently() -> Instant {
    tokio::time::Instant::now().into_std() + CEILING
}

pub async fn awake(handle: &MicrovmHandle) -> Result<Awake, Refused> {
    handle.awake(patiently()).await
}

/// A request in a task of its own, which has been heard by the driver before this returns.
pub async fn request(handle: &MicrovmHandle) -> tokio::task::JoinHandle<Result<Awake, Refused>> {
    let asked = handle.clone();
    let task = tokio::spawn(async move { asked.awake(patiently()).await });
    // Two turns of the single-threaded runtime: the request's, and the driver's.
    for _ in 0..4 {
        tokio::task::yield_now().await;
    }
    task
}
