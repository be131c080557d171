//! All microVMs of a node.
//!
//! Owns: what the drivers share ([`Node`]), opening and closing, the list. Never touches a phase.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use dashmap::DashMap;
use futures::StreamExt;
use model::{
    Clock, Egress, EndpointId, Generation, Hook, Hooks, IdlePolicy, ImageName, ImageVersion, MAX_DURATION, MemorySize, MicrovmId, RunPayload,
    SuspendHookFailure, Usage, chain,
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmm_runtime::engine::Engine;

use crate::{
    activity::Activity,
    driver::{Beginning, Driver, Mailboxes, first_view},
    handle::{Live, MicrovmHandle, MicrovmView, Seat},
    machine::{Effect, Machine, Phase, Policy},
    metering::{self, Meter, Sums},
    metrics::Metrics,
    operations::{LOG_DIR, blocking_io},
    reconcile,
    registry::{Opened, Record, RunDue, SavedState, Store},
};

/// MicroVMs whose truth is looked up at a time at start: a few files and sockets each.
const RECONCILE_AT_ONCE: usize = 16;
/// Questions to a driver beyond one per waiting request: the API's, and those whose askers have just left.
const SPARE_MAIL: usize = 64;
/// Terminates in line at one microVM; more wait to get in line.
const KILLS: usize = 16;

/// Limits and places.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// The registry's file is `<dir>/registry.redb`, microVMs live in `<dir>/microvms/<id>/`.
    pub dir: PathBuf,
    /// Launches and wakes at a time on this node; more wait their turn.
    pub max_concurrent_starts: usize,
    /// Requests that may wait for one microVM's wake; more are refused.
    pub max_waiting_per_microvm: usize,
    /// How long a TERMINATED microVM stays readable.
    pub keep_terminated: Duration,
    /// microVMs (not TERMINATED) this node takes.
    pub max_microvms: usize,
    /// What a `/suspend` hook that does not answer 200 means.
    pub suspend_hook_failure: SuspendHookFailure,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct RunSpec {
    /// The image.
    pub image: ImageName,
    /// Its version.
    pub version: ImageVersion,
    /// The directory of its snapshot.
    pub image_dir: PathBuf,
    /// When it sleeps; `None`: never by itself.
    pub idle: Option<IdlePolicy>,
    /// Running and suspended time together, at most [`model::MAX_DURATION`].
    pub max_duration: Duration,
    /// See `LaunchSpec::identity`.
    pub identity: BTreeMap<String, String>,
    /// Where it may connect to.
    pub egress: Egress,
    /// Which hooks its app wants called, of those that a microVM has (run, resume, suspend, terminate).
    pub hooks: Option<Hooks>,
    /// What the run hook is sent; kept until it has answered.
    pub run_payload: Option<RunPayload>,
    /// Opaque to the controller: what the API wants to remember of the request, as JSON.
    pub request: serde_json::Value,
    /// Its size, for what its use is measured by.
    pub size: MemorySize,
    /// Whether what its app says is kept.
    pub keep_output: bool,
}

/// Why the controller could not take a microVM or start at all.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The node runs as many as it may.
    #[error("this node already holds {limit} microVMs")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// The registry cannot be read or written.
    #[error("{doing} failed")]
    Registry {
        /// What was tried, on what.
        doing: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn failed(doing: impl Into<String>, source: impl std::error::Error + Send + Sync + 'static) -> ControllerError {
    ControllerError::Registry { doing: doing.into(), source: Box::new(source) }
}

/// What all drivers share.
pub(crate) struct Node {
    pub(crate) config: ControllerConfig,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) store: Store,
    pub(crate) metrics: Metrics,
    pub(crate) sums: Arc<Sums>,
    /// What the microVMs of each image have used that are forgotten.
    forgotten: Mutex<BTreeMap<ImageName, Usage>>,
    /// Launches and wakes at a time. Fair: first come, first served.
    pub(crate) start_slots: Semaphore,
    /// Fired once: drivers begin nothing new and end.
    pub(crate) closing: CancellationToken,
    /// Fired when the controller is dropped without having been closed: drivers end where they are.
    abandoned: CancellationToken,
    /// Every task of this crate.
    tasks: TaskTracker,
    microvms: DashMap<MicrovmId, MicrovmHandle>,
    endpoints: DashMap<EndpointId, MicrovmHandle>,
    population: Arc<AtomicUsize>,
}

impl Node {
    /// The one place that knows the layout.
    pub(crate) fn microvm_dir(&self, id: MicrovmId) -> PathBuf {
        self.config.dir.join("microvms").join(id.to_string())
    }

    /// The rules for a microVM that has `left` of its maximum duration.
    pub(crate) fn policy(&self, idle: Option<IdlePolicy>, max_duration: Duration, left: Duration, now: Instant) -> Policy {
        Policy { suspend_hook_failure: self.config.suspend_hook_failure, ..Policy::new(idle, max_duration, left, self.config.keep_terminated, now) }
    }

    /// Passes a hint on to the engine without waiting for it.
    pub(crate) fn warm(&self, image_dir: PathBuf) {
        let (engine, closing, abandoned) = (Arc::clone(&self.engine), self.closing.clone(), self.abandoned.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = closing.cancelled() => {}
                () = abandoned.cancelled() => {}
                () = engine.warm(image_dir) => {}
            }
        });
    }

    pub(crate) fn forget(&self, id: MicrovmId, endpoint: EndpointId, image: &ImageName) {
        self.endpoints.remove(&endpoint);
        // Both or none: a sum over all must not miss it.
        let mut forgotten = self.forgotten.lock();
        if let Some((_, handle)) = self.microvms.remove(&id) {
            *forgotten.entry(image.clone()).or_default() += handle.usage();
        }
    }

    /// Every meter, with what it can be fed from.
    pub(crate) fn meters(&self) -> Vec<(MicrovmId, Arc<Meter>, Option<Arc<Live>>)> {
        self.microvms.iter().map(|entry| entry.value().metered()).collect()
    }

    /// A place for a new microVM, if there is one.
    fn admit(&self) -> Result<Ticket, ControllerError> {
        let limit = self.config.max_microvms;
        self.population
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |holds| (holds < limit).then_some(holds + 1))
            .map(|_| Ticket { population: Arc::clone(&self.population) })
            .map_err(|_| ControllerError::Full { limit })
    }

    /// A place for one that is here already, whatever the limit says now.
    fn readmit(&self) -> Ticket {
        self.population.fetch_add(1, Ordering::AcqRel);
        Ticket { population: Arc::clone(&self.population) }
    }

    /// Starts a microVM's driver and makes it known.
    fn drive(self: &Arc<Self>, beginning: Beginning) -> MicrovmHandle {
        let (asks_in, asks) = mpsc::channel(self.config.max_waiting_per_microvm.saturating_add(SPARE_MAIL).min(Semaphore::MAX_PERMITS));
        let (kills_in, kills) = mpsc::channel(KILLS);
        let (view_in, view) = watch::channel(first_view(&beginning.record, &beginning.machine));
        let seat = Arc::new(Seat {
            id: beginning.record.id,
            endpoint: beginning.record.endpoint,
            activity: Activity::new(Arc::clone(&self.clock)),
            meter: Arc::clone(&beginning.meter),
            live: ArcSwapOption::empty(),
            view,
            asks: asks_in,
            kills: kills_in,
            places: Semaphore::new(self.config.max_waiting_per_microvm.min(Semaphore::MAX_PERMITS)),
            clock: Arc::clone(&self.clock),
            requests_waiting: self.metrics.requests_waiting.clone(),
        });
        let handle = MicrovmHandle::new(Arc::clone(&seat));
        self.microvms.insert(handle.id(), handle.clone());
        self.endpoints.insert(handle.endpoint(), handle.clone());
        let (driver, effects) = Driver::new(Arc::clone(self), seat, Mailboxes { asks, kills, view: view_in }, beginning);
        let abandoned = self.abandoned.clone();
        self.tasks.spawn(async move {
            // Boxed: the driver's future is large, and there are many that sleep.
            abandoned.run_until_cancelled(Box::pin(driver.run(effects))).await
        });
        handle
    }
}

/// One microVM's place among those that the node may hold.
pub(crate) struct Ticket {
    population: Arc<AtomicUsize>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.population.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All microVMs of this node. Cheap to clone. When the last clone is dropped without [`Controller::close`], everything
/// stops where it is, as in a crash: nothing is lost, and the next [`Controller::open`] finds out what is true.
#[derive(Clone)]
pub struct Controller {
    inner: Arc<Inner>,
}

struct Inner {
    node: Arc<Node>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.node.abandoned.cancel();
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("config", &self.inner.node.config).field("microvms", &self.inner.node.microvms.len()).finish()
    }
}

impl Controller {
    /// Opens the registry, adopts what still runs, enforces what expired meanwhile (design §4 rule 7), ends orphans.
    pub async fn open(
        config: ControllerConfig,
        engine: Arc<dyn Engine>,
        clock: Arc<dyn Clock>,
        metrics: &prometheus::Registry,
    ) -> Result<Self, ControllerError> {
        let registering = |error| failed("registering the controller's metrics", error);
        let sums = Arc::new(Sums::register(metrics).map_err(registering)?);
        let metrics = Metrics::register(metrics).map_err(registering)?;
        let microvms = config.dir.join("microvms");
        let made = microvms.clone();
        let data_dir = config.dir.clone();
        let make = move || {
            std::fs::create_dir_all(made)?;
            // A snapshot is durable only if the names on the way to it are.
            std::fs::File::open(data_dir)?.sync_all()
        };
        blocking_io(make).await.map_err(|error| failed(format!("making {}", microvms.display()), error))?;
        let Opened { store, records, usage, by_image, fresh } = Store::open(config.dir.join("registry.redb")).await?;

        let node = Arc::new(Node {
            start_slots: Semaphore::new(config.max_concurrent_starts.clamp(1, Semaphore::MAX_PERMITS)),
            config,
            engine,
            clock,
            store,
            metrics,
            sums,
            forgotten: Mutex::new(by_image),
            closing: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            tasks: TaskTracker::new(),
            microvms: DashMap::new(),
            endpoints: DashMap::new(),
            population: Arc::default(),
        });
        // From here on, giving up (an error, a dropped future) stops what was started.
        let controller = Self { inner: Arc::new(Inner { node: Arc::clone(&node) }) };

        if fresh {
            // A registry that was lost is not a reason to delete what it knew.
            tracing::info!(dir = %node.config.dir.display(), "made a new registry");
        } else {
            reconcile::remove_orphans(microvms, records.iter().map(|record| record.id).collect()).await;
        }
        if let Err(error) = node.engine.sweep(&reconcile::keep(&records)).await {
            tracing::error!(error = chain(&error), "processes of an earlier run may be left over");
        }
        let recovered: Vec<Beginning> = futures::stream::iter(records)
            .map(|record| {
                let saved = usage.get(&record.id).copied();
                reconcile::recover(&node, record, saved)
            })
            .buffer_unordered(RECONCILE_AT_ONCE)
            .collect()
            .await;

        let mut asleep = BTreeSet::new();
        let mut driven = Vec::new();
        for mut beginning in recovered {
            if !matches!(beginning.record.state, SavedState::Terminated { .. }) {
                beginning.ticket = Some(node.readmit());
            }
            if matches!(beginning.machine.phase(), Phase::Suspended { .. }) {
                asleep.insert(beginning.record.image_dir.clone());
            }
            driven.push(settle(&node, beginning));
        }
        // Durable before anybody can see it, in as few syncs as possible.
        for beginning in futures::future::join_all(driven).await {
            node.drive(beginning?);
        }
        for image_dir in asleep {
            node.warm(image_dir);
        }
        let (watched, abandoned) = (Arc::clone(&node), node.abandoned.clone());
        node.tasks.spawn(async move { abandoned.run_until_cancelled(metering::watch(watched)).await });
        Ok(controller)
    }

    /// Takes a new microVM: durable on return, state PENDING; the launch goes on by itself.
    pub async fn run(&self, spec: RunSpec) -> Result<MicrovmView, ControllerError> {
        let node = Arc::clone(&self.inner.node);
        let ticket = node.admit()?;
        // A task of its own, so that a caller who leaves half way does not leave a record without a driver.
        let taken = self.inner.node.tasks.spawn(async move { take(&node, spec, ticket).await });
        taken.await.map_err(|error| failed("taking a new microVM", error))?
    }

    /// By id.
    pub fn find(&self, id: MicrovmId) -> Option<MicrovmHandle> {
        self.inner.node.microvms.get(&id).map(|found| found.value().clone())
    }

    /// By the first label of its hostname. Also finds terminated ones that are still kept.
    pub fn route(&self, endpoint: EndpointId) -> Option<MicrovmHandle> {
        self.inner.node.endpoints.get(&endpoint).map(|found| found.value().clone())
    }

    /// Where the output of a microVM's app is: `app.log`, and `app.log.1` with what is older. May not be there (yet).
    pub fn log_dir(&self, id: MicrovmId) -> PathBuf {
        self.inner.node.microvm_dir(id).join(LOG_DIR)
    }

    /// What the microVMs of each image have used, those that are forgotten included.
    pub fn usage_by_image(&self) -> BTreeMap<ImageName, Usage> {
        let node = &self.inner.node;
        // Held meanwhile, so that nothing is forgotten between the two looks.
        let forgotten = node.forgotten.lock();
        let mut sums = forgotten.clone();
        for entry in node.microvms.iter() {
            *sums.entry(entry.value().view().image).or_default() += entry.value().usage();
        }
        sums
    }

    /// All, newest first.
    pub fn list(&self) -> Vec<MicrovmView> {
        let mut views: Vec<MicrovmView> = self.inner.node.microvms.iter().map(|entry| entry.value().view()).collect();
        // The id breaks ties, so that two calls agree.
        views.sort_by(|a, b| b.started_at.cmp(&a.started_at).then_with(|| a.id.cmp(&b.id)));
        views
    }

    /// Stops the drivers without ending any microVM: suspends under way are finished or taken back, what runs goes on
    /// running and is adopted by the next start.
    pub async fn close(&self) {
        let node = &self.inner.node;
        node.closing.cancel();
        node.tasks.close();
        node.tasks.wait().await;
        node.store.close().await;
    }
}

/// Makes durable what was found out about a microVM.
async fn settle(node: &Node, mut beginning: Beginning) -> Result<Beginning, ControllerError> {
    let record = Driver::record_of(node, &beginning.record, &beginning.machine);
    if record.state != beginning.record.state {
        let doing = || format!("recording what became of {}", record.id);
        let usage = beginning.meter.save(node.clock.now(), node.clock.wall());
        node.store.put(&record, &usage).await.map_err(|error| failed(doing(), error))?;
        beginning.record = record;
    }
    Ok(beginning)
}

async fn take(node: &Arc<Node>, spec: RunSpec, ticket: Ticket) -> Result<MicrovmView, ControllerError> {
    let (now, wall) = (node.clock.now(), node.clock.wall());
    let max_duration = spec.max_duration.min(MAX_DURATION);
    let policy = node.policy(spec.idle, max_duration, max_duration, now);
    let run_due = spec.hooks.filter(|hooks| hooks.timeout(Hook::Run).is_some()).map(|_| RunDue { payload: spec.run_payload });
    let record = Record {
        id: MicrovmId::random(),
        endpoint: EndpointId::random(),
        image: spec.image,
        version: spec.version,
        image_dir: spec.image_dir,
        idle: spec.idle,
        max_duration,
        identity: spec.identity,
        egress: spec.egress,
        hooks: spec.hooks,
        run_due,
        resume_due: false,
        request: spec.request,
        keep_output: spec.keep_output,
        size: spec.size,
        started_at: wall,
        generation: Generation::default(),
        state: SavedState::Pending,
        saved_at: wall,
        lived: Duration::ZERO,
        asleep: Duration::ZERO,
    };
    let meter = Arc::new(Meter::new(record.size, Arc::clone(&node.sums), now));
    node.store.put(&record, &meter.save(now, wall)).await.map_err(|error| failed("recording a new microVM", error))?;
    tracing::info!(microvm.id = %record.id, endpoint.id = %record.endpoint, image = %record.image, version = %record.version, "took a new microVM");
    let machine = Machine::launching(policy);
    let view = first_view(&record, &machine);
    node.drive(Beginning { machine, record, vm: None, effects: vec![Effect::Launch], ticket: Some(ticket), meter });
    Ok(view)
}

#[cfg(test)]
mod tests {
    use model::{MicrovmState, SystemClock};
    use vmm_runtime::loopback::LoopbackEngine;

    use super::*;
    use crate::Refused;

    /// What cannot be recorded must not be let through: a crash would throw away what happens in it.
    #[tokio::test]
    async fn a_wake_that_cannot_be_recorded_is_undone() {
        let (dir, engine, registry) = (tempfile::tempdir().unwrap(), LoopbackEngine::new(), prometheus::Registry::new());
        let config = ControllerConfig {
            dir: dir.path().to_owned(),
            max_concurrent_starts: 4,
            max_waiting_per_microvm: 4,
            keep_terminated: Duration::from_secs(60),
            max_microvms: 4,
            suspend_hook_failure: SuspendHookFailure::Keep,
        };
        let controller = Controller::open(config, Arc::new(engine.clone()), Arc::new(SystemClock), &registry).await.unwrap();
        let spec = RunSpec {
            image: "hello".parse().unwrap(),
            version: ImageVersion::FIRST,
            image_dir: "/images/hello".into(),
            idle: Some(IdlePolicy { max_idle: Duration::from_secs(60), suspended: Duration::from_secs(60), auto_resume: true }),
            max_duration: MAX_DURATION,
            identity: BTreeMap::new(),
            egress: Egress::default(),
            hooks: None,
            run_payload: None,
            request: serde_json::Value::Null,
            size: MemorySize::DEFAULT,
            keep_output: true,
        };
        let handle = controller.find(controller.run(spec).await.unwrap().id).unwrap();
        handle.wait_until(|view| view.state == MicrovmState::Running).await;
        handle.suspend().await.unwrap();
        handle.wait_until(|view| view.state == MicrovmState::Suspended).await;

        controller.inner.node.store.close().await;
        let Err(Refused::StartFailed { reason }) = handle.awake(Instant::now() + Duration::from_secs(30)).await else {
            panic!("it was let through")
        };
        assert!(reason.contains("could not be recorded"), "{reason}");
        assert!(engine.running().is_empty());
        let view = handle.view();
        assert_eq!((view.state, view.generation), (MicrovmState::Suspended, Generation(0)));
        // Neither that it runs nor why it sleeps again could be written.
        assert_eq!(controller.inner.node.metrics.registry_failures.get(), 2);
        // A terminate is done all the same.
        handle.terminate().await.unwrap();
        handle.wait_until(|view| view.state == MicrovmState::Terminated).await;
    }
}
