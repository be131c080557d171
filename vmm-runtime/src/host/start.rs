//! From files to a running guest: boot, launch, restore.
//!
//! Nothing here leaves anything behind on an error or when its future is dropped: the process is ended with its
//! directory, and the snapshot it came from is as it was.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use model::{Egress, Generation, MicrovmId, rights::EXECUTION_ROLE};
use protocol::{
    agent::{Reply, Request, Restored, Role as ExecutionRole},
    link::{AgentLink, Attach, LinkError},
};
use vmm_protocol::memdiff::Reader;

use super::{
    Backend, Image, Layers, Load, Role, Shared, Stopwatch,
    applog::AppLog,
    blocking, failed,
    image::{self, BOOT_MEMORY},
    pool::{self, KillOnDrop, Ready},
    process::{Identity, Priority, Process},
    record::{self, Record, Stage},
    roles::{self, Granted},
    snapshots,
    vm::{Core, Kind, Life, ProcessVm, console_tail},
    vmm_exit,
};
use crate::{
    engine::{BootSpec, EngineError, Exit, ImageSnapshot, LaunchSpec, RestoreSpec, Started},
    snapshot::manifest::Part,
};

/// Bytes of entropy in a [`Restored`].
const ENTROPY_BYTES: usize = 64;

/// The host's end of the channel of a microVM that had none.
pub(super) fn new_link<B: Backend>(shared: &Shared<B>, microvm_dir: &Path) -> Arc<AgentLink> {
    let log = AppLog::open(microvm_dir, shared.config.log_bytes);
    AgentLink::new(Box::new(move |output| log.append(output)))
}

/// What an error of the channel to the agent means.
async fn link_failed<B: Backend>(backend: &B, process: &Process, vmm: &B::Vmm, step: &'static str, limit: Duration, error: LinkError) -> EngineError {
    if !process.is_alive() {
        return EngineError::Ended { step, exit: vmm_exit(process, "the VMM ended") };
    }
    let detail = console_tail(backend, vmm).await;
    match error {
        LinkError::Timeout(_) => EngineError::GuestTimeout { step, limit, detail },
        error => failed(format!("{step}: the guest's part{detail}"), error),
    }
}

/// Connects to the agent of a guest that runs, and shakes hands.
pub(super) async fn attach<B: Backend>(
    backend: &B,
    process: &Process,
    vmm: &B::Vmm,
    link: &Arc<AgentLink>,
    how: impl FnOnce() -> io::Result<Attach>,
    limit: Duration,
    step: &'static str,
) -> Result<(), EngineError> {
    let attached = async {
        let agent = backend.agent(process, vmm).await.map_err(|error| failed(format!("{step}: connecting to the guest agent"), error))?;
        let how = how().map_err(|error| failed("reading /dev/urandom", error))?;
        Ok(link.attach(agent, how, limit).await)
    };
    tokio::select! {
        // An attachment that has come about counts; an end is noticed again.
        biased;
        attached = tokio::time::timeout(limit, attached) => match attached {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(link_failed(backend, process, vmm, step, limit, error).await),
            Ok(Err(error)) if process.is_alive() => Err(error),
            Ok(Err(_)) => Err(EngineError::Ended { step, exit: vmm_exit(process, "the VMM ended") }),
            Err(_late) => Err(link_failed(backend, process, vmm, step, limit, LinkError::Timeout(limit)).await),
        },
        how = backend.stopped(vmm) => Err(EngineError::Ended { step, exit: Exit::Vmm { detail: format!("{how}{}", console_tail(backend, vmm).await) } }),
        () = process.ended() => Err(EngineError::Ended { step, exit: vmm_exit(process, "the VMM ended") }),
    }
}

/// See `Engine::boot`.
pub(super) async fn boot<B: Backend>(shared: &Arc<Shared<B>>, spec: BootSpec) -> Result<Arc<ProcessVm<B>>, EngineError> {
    let (config, backend) = (&shared.config, &shared.backend);
    for (what, path) in [("guest kernel", &config.kernel), ("guest initramfs", &config.initrd)] {
        if let Err(error) = fs::metadata(path) {
            return Err(EngineError::Host { what: format!("the {what} {} cannot be used: {error}", path.display()) });
        }
    }
    let role = Role::Boot { shape: spec.shape, memory: spec.dir.join(BOOT_MEMORY), root_disk: spec.root_disk.clone() };
    let Ready { process, vmm } = pool::start(shared, &role, Priority::Normal).await?;
    let process = KillOnDrop::new(process);
    let link = new_link(shared, &spec.dir);
    attach(backend, process.get(), &vmm, &link, || Ok(Attach::Boot), config.limits.boot, "boot to its agent").await?;
    let (exposed, egress) = (spec.app.exposed.clone(), spec.app.rights.egress);
    match link.call(Request::Start(spec.app), config.limits.start_app).await {
        Ok(Reply::Done) => {}
        Ok(other) => return Err(failed("starting the app", format!("the guest agent answered {other:?}"))),
        Err(error) => return Err(link_failed(backend, process.get(), &vmm, "start the app", config.limits.start_app, error).await),
    }
    let kind = Kind::Build { root_disk: spec.root_disk, shape: spec.shape, exposed };
    Ok(ProcessVm::new(Core::new(shared, kind, spec.dir, process.keep(), vmm, link).lead_out(egress)))
}

/// A clone that is about to run, whatever it is cloned from.
struct Clone<'a, B: Backend> {
    shared: &'a Arc<Shared<B>>,
    id: MicrovmId,
    dir: &'a Path,
    image: Arc<Image>,
    generation: Generation,
    identity: BTreeMap<String, String>,
    egress: Egress,
    sealed_layers: Vec<Part>,
    snapshot_dir: &'a Path,
    state: Vec<u8>,
    difference: Option<Reader<File>>,
    link: Arc<AgentLink>,
    predecessor: Option<Arc<Core<B>>>,
}

/// See `Engine::launch`.
pub(super) async fn launch<B: Backend>(shared: &Arc<Shared<B>>, spec: LaunchSpec) -> Result<Started, EngineError> {
    let mut watch = Stopwatch::start();
    let image = image::load(shared, &spec.image_dir).await?;
    let state = image::read_state(&image.dir, &image.manifest.state)?;
    let link = new_link(shared, &spec.dir);
    watch.lap("verify");
    let clone = Clone {
        shared,
        id: spec.id,
        dir: &spec.dir,
        image: image.clone(),
        generation: Generation(0),
        identity: spec.identity,
        egress: spec.egress,
        sealed_layers: Vec::new(),
        snapshot_dir: &image.dir,
        state,
        difference: None,
        link,
        predecessor: None,
    };
    let started = clone.start(&mut watch).await;
    shared.pool.refill(&image);
    let ImageSnapshot { memory_bytes, disk_bytes, .. } = image.manifest.snapshot;
    Ok(Started { vm: started?, read_bytes: memory_bytes.saturating_add(disk_bytes), phases: watch.phases })
}

/// See `Engine::restore`.
pub(super) async fn restore<B: Backend>(shared: &Arc<Shared<B>>, spec: RestoreSpec) -> Result<Started, EngineError> {
    let mut watch = Stopwatch::start();
    let image = image::load(shared, &spec.image_dir).await?;
    let opened = blocking({
        let (shared, image, dir, id, generation) = (shared.clone(), image.clone(), spec.dir.clone(), spec.id, spec.generation);
        move || snapshots::open(&shared, &image, &dir, id, generation)
    })
    .await?;
    let manifest = opened.manifest;
    let predecessor = spec.predecessor.as_ref().and_then(|vm| vm.as_any().downcast_ref::<ProcessVm<B>>()).map(ProcessVm::core);
    // Streams are parked for the snapshot that this very `Vm` wrote, and fit no other.
    let predecessor = predecessor.filter(|core| {
        let wrote_it = matches!(&core.kind, Kind::Microvm { id, generation, .. } if (*id, *generation) == (manifest.id, manifest.record.generation));
        wrote_it && *core.life.borrow() == Life::Suspended
    });
    let link = predecessor.map_or_else(|| new_link(shared, &spec.dir), |core| core.link.clone());
    watch.lap("verify");
    let snapshot_generation = manifest.record.generation;
    let read_bytes = manifest.record.memory_bytes.saturating_add(manifest.record.disk_bytes);
    let layer_names: Vec<String> = manifest.layers.iter().map(|layer| layer.file.clone()).collect();
    let clone = Clone {
        shared,
        id: spec.id,
        dir: &spec.dir,
        image: image.clone(),
        generation: spec.generation,
        identity: spec.identity,
        egress: spec.egress,
        sealed_layers: manifest.layers,
        snapshot_dir: &opened.dir,
        state: opened.state,
        difference: Some(opened.difference),
        link,
        predecessor: predecessor.cloned(),
    };
    let started = clone.start(&mut watch).await;
    shared.pool.refill(&image);
    let vm = started?;
    // The snapshot has proved itself; older ones, and layers that only they name, are not needed any more.
    let (dir, generation) = (spec.dir, spec.generation);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = snapshots::remove_older(&dir, snapshot_generation, generation, &layer_names) {
            tracing::warn!(dir = %dir.display(), %error, "an old snapshot cannot be removed");
        }
    });
    Ok(Started { vm, read_bytes, phases: watch.phases })
}

impl<B: Backend> Clone<'_, B> {
    async fn start(self, watch: &mut Stopwatch) -> Result<Arc<ProcessVm<B>>, EngineError> {
        let (backend, limits) = (&self.shared.backend, &self.shared.config.limits);
        let Ready { process, vmm } = match self.shared.pool.take(&self.image) {
            Some(ready) => {
                watch.lap("process (ready)");
                ready
            }
            None => {
                let ready = pool::start(self.shared, &Role::Clone(self.image.clone()), Priority::Normal).await?;
                watch.lap("process (started)");
                ready
            }
        };
        let mut process = KillOnDrop::new(process);

        let role = self.identity.get(EXECUTION_ROLE).cloned();
        let record = |stage, identity: &Identity| Record {
            identity: identity.clone(),
            generation: self.generation,
            stage,
            sealed_layers: self.sealed_layers.clone(),
            egress: self.egress,
            role: role.clone(),
        };
        let recording = |error: io::Error| failed(format!("writing the process's record in {}", self.dir.display()), error);
        let identity = process.get().identity().clone();
        record::write(self.id, self.dir, &record(Stage::Starting, &identity)).map_err(recording)?;
        process.recorded_in = Some(self.dir.to_owned());

        let layers = Layers::create(self.dir, B::LAYER_FILES, self.sealed_layers.clone(), self.generation)
            .map_err(|error| failed(format!("creating a disk layer in {}", self.dir.display()), error))?;
        let saved = Load {
            dir: self.snapshot_dir,
            image: &self.image,
            layers: &layers,
            state: &self.state,
            difference: self.difference,
            predecessor: self.predecessor.as_ref().map(|core| &core.vmm),
        };
        backend.load(process.get(), &vmm, saved, watch).await?;
        backend.run(process.get(), &vmm).await?;
        let granted = role.as_deref().map(|arn| roles::role(arn, self.shared.config.roles.as_deref()));
        let how = || Ok(Attach::Restored(restored(self.generation, self.identity, self.egress, granted.clone())?));
        attach(backend, process.get(), &vmm, &self.link, how, limits.attach, "answer after the restore").await?;
        record::write(self.id, self.dir, &record(Stage::Running, &identity)).map_err(recording)?;
        let kind = Kind::Microvm { id: self.id, generation: self.generation, image: self.image, layers: tokio::sync::Mutex::new(layers) };
        let core = Core::new(self.shared, kind, self.dir.to_owned(), process.keep(), vmm, self.link).lead_out(self.egress).with_role(role.map(|arn| Granted { arn, last: granted }));
        if let Some(before) = self.predecessor {
            before.handed_over.store(true, Ordering::Release);
            *core.predecessor.lock() = Some(before);
        }
        let vm = ProcessVm::new(core);
        watch.lap("agent");
        Ok(vm)
    }
}

fn restored(generation: Generation, identity: BTreeMap<String, String>, egress: Egress, role: Option<ExecutionRole>) -> io::Result<Restored> {
    let mut entropy = [0; ENTROPY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut entropy)?;
    // A clock before 1970 is beyond repair; the guest's is then left at 1970, too.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Restored { realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), entropy: hex::encode(entropy), generation, identity, egress, role })
}
