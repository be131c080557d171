//! From files to a running guest: boot, launch, restore.
//!
//! Nothing here leaves anything behind on an error or when its future is dropped: the process is ended with its
//! directory, and the snapshot it came from is as it was.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use model::{Generation, MicrovmId};
use protocol::{
    agent::{Reply, Request, Restored},
    link::{AgentLink, Attach, LinkError},
};
use rustix::fs::MemfdFlags;
use serde_json::json;
use tokio::{
    net::UnixStream,
    sync::{broadcast::error::RecvError, watch},
};

use super::{
    Shared, Stopwatch,
    applog::AppLog,
    bad_snapshot, blocking,
    command::{Machine, Role},
    committed,
    disk::{self, Layers},
    failed, generation_dir, generations,
    image::{self, BOOT_MEMORY, Image},
    memory::{self, Mapping},
    pool::{KillOnDrop, Ready},
    process::{Priority, Process},
    qmp::{Qmp, QmpError},
    record::{self, Record, Stage},
    vm::{Core, Kind, Life, QemuVm, console_tail},
};
use crate::{
    engine::{BootSpec, EngineError, Exit, LaunchSpec, RestoreSpec, Started},
    snapshot::manifest::{MicrovmManifest, Part},
};
use vmm_protocol::memdiff::{DiffError, PAGE, Reader};

const MIB: u64 = 1 << 20;
/// Under this name QEMU keeps the descriptor that the state is read from.
const STATE_FD: &str = "state";
/// Bytes of entropy in a [`Restored`].
const ENTROPY_BYTES: usize = 64;

/// The host's end of the channel of a microVM that had none.
pub(super) fn new_link(microvm_dir: &Path) -> Arc<AgentLink> {
    let log = AppLog::open(microvm_dir);
    AgentLink::new(Box::new(move |output| log.append(output)))
}

/// A process on its way to a running guest.
struct Starting {
    process: KillOnDrop,
    qmp: Qmp,
    agent: UnixStream,
    mapping: Mapping,
}

impl From<Ready> for Starting {
    fn from(Ready { process, qmp, agent, mapping }: Ready) -> Self {
        Self { process: KillOnDrop::new(process), qmp, agent, mapping }
    }
}

/// What an error of the channel to the agent means.
async fn link_failed(process: &Process, qmp: &Qmp, step: &'static str, limit: Duration, error: LinkError) -> EngineError {
    if !process.is_alive() {
        return EngineError::Ended { step, exit: Exit::Vmm { detail: format!("QEMU's output: {}", process.output_tail()) } };
    }
    let detail = console_tail(qmp).await;
    match error {
        LinkError::Timeout(_) => EngineError::GuestTimeout { step, limit, detail },
        error => failed(format!("{step}: the guest's part{detail}"), error),
    }
}

fn qmp_failed(process: &Process, doing: &'static str, error: QmpError) -> EngineError {
    if process.is_alive() { failed(doing, error) } else { failed(format!("{doing} (QEMU ended: {})", process.output_tail()), error) }
}

fn assemble(shared: &Arc<Shared>, kind: Kind, dir: &Path, process: Process, qmp: Qmp, mapping: Mapping, link: Arc<AgentLink>) -> Arc<QemuVm> {
    QemuVm::new(Core {
        shared: shared.clone(),
        kind,
        dir: dir.to_owned(),
        process,
        qmp,
        link,
        mapping,
        life: watch::Sender::new(Life::Running),
        handed_over: false.into(),
        operation: tokio::sync::Mutex::new(()),
        last_usage: Default::default(),
    })
}

/// See `Engine::boot`.
pub(super) async fn boot(shared: &Arc<Shared>, spec: BootSpec) -> Result<Arc<QemuVm>, EngineError> {
    let config = &shared.config;
    for (what, path) in [("guest kernel", &config.kernel), ("guest initramfs", &config.initrd)] {
        if let Err(error) = fs::metadata(path) {
            return Err(EngineError::Host { what: format!("the {what} {} cannot be used: {error}", path.display()) });
        }
    }
    let machine = Machine { accel: config.accel, shape: spec.shape };
    let role = Role::Boot { kernel: &config.kernel, initrd: &config.initrd, root_disk: &spec.root_disk };
    let ready = shared.pool.launcher().start(machine, &spec.dir.join(BOOT_MEMORY), role, Priority::Normal).await?;
    let Starting { process, qmp, agent, mapping } = ready.into();
    let link = new_link(&spec.dir);
    if let Err(error) = link.attach(agent, Attach::Boot, config.limits.boot).await {
        return Err(link_failed(process.get(), &qmp, "boot to its agent", config.limits.boot, error).await);
    }
    let exposed = spec.app.exposed.clone();
    match link.call(Request::Start(spec.app), config.limits.start_app).await {
        Ok(Reply::Done) => {}
        Ok(other) => return Err(failed("starting the app", format!("the guest agent answered {other:?}"))),
        Err(error) => return Err(link_failed(process.get(), &qmp, "start the app", config.limits.start_app, error).await),
    }
    let kind = Kind::Build { root_disk: spec.root_disk, machine, exposed };
    Ok(assemble(shared, kind, &spec.dir, process.keep(), qmp, mapping, link))
}

/// A clone that is about to run, whatever it is cloned from.
struct Clone<'a> {
    shared: &'a Arc<Shared>,
    id: MicrovmId,
    dir: &'a Path,
    image: Arc<Image>,
    generation: Generation,
    identity: BTreeMap<String, String>,
    sealed_layers: Vec<Part>,
    state: Vec<u8>,
    difference: Option<Reader<File>>,
    link: Arc<AgentLink>,
}

/// See `Engine::launch`.
pub(super) async fn launch(shared: &Arc<Shared>, spec: LaunchSpec) -> Result<Started, EngineError> {
    let mut watch = Stopwatch::start();
    let image = image::load(shared, &spec.image_dir).await?;
    let state = image::read_state(&image.dir, &image.manifest.state)?;
    let link = new_link(&spec.dir);
    watch.lap("verify");
    let clone = Clone {
        shared,
        id: spec.id,
        dir: &spec.dir,
        image: image.clone(),
        generation: Generation(0),
        identity: spec.identity,
        sealed_layers: Vec::new(),
        state,
        difference: None,
        link,
    };
    let started = clone.start(&mut watch).await;
    image.refill(shared);
    Ok(Started { vm: started?, phases: watch.phases })
}

/// See `Engine::restore`.
pub(super) async fn restore(shared: &Arc<Shared>, spec: RestoreSpec) -> Result<Started, EngineError> {
    let mut watch = Stopwatch::start();
    let image = image::load(shared, &spec.image_dir).await?;
    let (manifest, state, difference) = blocking({
        let (shared, image, dir, id, generation) = (shared.clone(), image.clone(), spec.dir.clone(), spec.id, spec.generation);
        move || open_snapshot(&shared, &image, &dir, id, generation)
    })
    .await?;
    let predecessor = spec.predecessor.as_ref().and_then(|vm| vm.as_any().downcast_ref::<QemuVm>()).map(QemuVm::core);
    // Streams are parked for the snapshot that this very `Vm` wrote, and fit no other.
    let predecessor = predecessor.filter(|core| {
        let wrote_it = matches!(&core.kind, Kind::Microvm { id, generation, .. } if (*id, *generation) == (manifest.id, manifest.record.generation));
        wrote_it && *core.life.borrow() == Life::Suspended
    });
    let link = predecessor.map_or_else(|| new_link(&spec.dir), |core| core.link.clone());
    watch.lap("verify");
    let snapshot_generation = manifest.record.generation;
    let layer_names: Vec<String> = manifest.layers.iter().map(|layer| layer.file.clone()).collect();
    let clone = Clone {
        shared,
        id: spec.id,
        dir: &spec.dir,
        image: image.clone(),
        generation: spec.generation,
        identity: spec.identity,
        sealed_layers: manifest.layers,
        state,
        difference: Some(difference),
        link,
    };
    let started = clone.start(&mut watch).await;
    image.refill(shared);
    let vm = started?;
    if let Some(core) = predecessor {
        core.handed_over.store(true, std::sync::atomic::Ordering::Release);
    }
    // The snapshot has proved itself; older ones, and layers that only they name, are not needed any more.
    let (dir, generation) = (spec.dir, spec.generation);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = remove_older(&dir, snapshot_generation, generation, &layer_names) {
            tracing::warn!(dir = %dir.display(), %error, "an old snapshot cannot be removed");
        }
    });
    Ok(Started { vm, phases: watch.phases })
}

fn remove_older(dir: &Path, snapshot: Generation, running: Generation, layers: &[String]) -> io::Result<()> {
    for older in generations(dir)?.into_iter().filter(|generation| *generation < snapshot) {
        fs::remove_dir_all(generation_dir(dir, older))?;
    }
    disk::remove_older(dir, running, layers)
}

/// Checks all of a snapshot but the pages of its difference, which are checked as they are read.
fn open_snapshot(
    shared: &Shared,
    image: &Image,
    microvm_dir: &Path,
    id: MicrovmId,
    generation: Generation,
) -> Result<(MicrovmManifest, Vec<u8>, Reader<File>), EngineError> {
    let found = committed(microvm_dir)?.ok_or_else(|| bad_snapshot(microvm_dir, "there is none"))?;
    let (dir, manifest) = (found.dir, found.manifest);
    let bad = |why: String| bad_snapshot(&dir, why);
    if manifest.id != id {
        return Err(bad(format!("it is that of {}", manifest.id)));
    }
    if manifest.record.generation >= generation {
        return Err(bad(format!("it is of generation {}, and generation {generation} was to follow it", manifest.record.generation)));
    }
    if manifest.image_crc32 != image.crc32 {
        return Err(bad(format!("it was made over another image than the one in {}", image.dir.display())));
    }
    manifest.fingerprint.check(&shared.fingerprint(&image.machine)).map_err(bad)?;
    let state = image::read_state(&dir, &manifest.state)?;
    disk::check(microvm_dir, &manifest.layers).map_err(bad)?;
    let file = File::open(dir.join(&manifest.memory.file)).map_err(|error| bad(format!("{} cannot be opened: {error}", manifest.memory.file)))?;
    let pages = u64::from(image.machine.shape.memory_mib) * MIB / PAGE as u64;
    let difference = Reader::open(file, pages).map_err(|error| bad(error.to_string()))?;
    if Some(difference.header_crc32()) != manifest.memory.crc32 {
        return Err(bad(format!("{} is not the one that its manifest names", manifest.memory.file)));
    }
    Ok((manifest, state, difference))
}

impl Clone<'_> {
    async fn start(self, watch: &mut Stopwatch) -> Result<Arc<QemuVm>, EngineError> {
        let limits = &self.shared.config.limits;
        let starting: Starting = match self.shared.pool.take(&self.image.dir) {
            Some(ready) => {
                watch.lap("process (ready)");
                ready.into()
            }
            None => {
                let launcher = self.shared.pool.launcher();
                let ready = launcher.start(self.image.machine, &self.image.memory(), Role::Clone, Priority::Normal).await?;
                watch.lap("process (started)");
                ready.into()
            }
        };
        let Starting { mut process, qmp, agent, mapping } = starting;

        let record = |stage, identity: &super::process::Identity| Record {
            identity: identity.clone(),
            generation: self.generation,
            stage,
            sealed_layers: self.sealed_layers.clone(),
        };
        let recording = |error: io::Error| failed(format!("writing the process's record in {}", self.dir.display()), error);
        let identity = process.get().identity().clone();
        record::write(self.id, self.dir, &record(Stage::Starting, &identity)).map_err(recording)?;
        process.recorded_in = Some(self.dir.to_owned());

        let layers = async {
            let layers = Layers::create(self.dir, &self.image.disk(), self.sealed_layers.clone(), self.generation)
                .map_err(|error| failed(format!("creating a disk layer in {}", self.dir.display()), error))?;
            layers.plug(&qmp).await.map_err(|error| qmp_failed(process.get(), "plugging the disk", error))?;
            Ok(layers)
        };
        let (pid, memory, to_wipe) = (process.get().pid(), mapping.clone(), self.difference);
        let memory = async {
            let Some(mut difference) = to_wipe else { return Ok(()) };
            blocking(move || memory::apply_difference(pid, &memory, &mut difference)).await.map_err(|error| match error {
                DiffError::Damaged(_) | DiffError::OtherSize { .. } => bad_snapshot(self.dir, error.to_string()),
                error => failed("putting the saved memory into the guest", error),
            })
        };
        let (layers, ()) = tokio::try_join!(layers, memory)?;
        watch.lap("memory and disk");

        load_state(&qmp, &self.state, limits.state).await.map_err(|error| qmp_failed(process.get(), "loading device state", error))?;
        watch.lap("devices");

        let restored = restored(self.generation, self.identity).map_err(|error| failed("reading /dev/urandom", error))?;
        qmp.execute("cont", json!({}), limits.command).await.map_err(|error| qmp_failed(process.get(), "letting the guest run", error))?;
        if let Err(error) = self.link.attach(agent, Attach::Restored(restored), limits.attach).await {
            return Err(link_failed(process.get(), &qmp, "answer after the restore", limits.attach, error).await);
        }
        record::write(self.id, self.dir, &record(Stage::Running, &identity)).map_err(recording)?;
        let kind = Kind::Microvm { id: self.id, generation: self.generation, image: self.image, layers: tokio::sync::Mutex::new(layers) };
        let vm = assemble(self.shared, kind, self.dir, process.keep(), qmp, mapping, self.link);
        watch.lap("agent");
        Ok(vm)
    }
}

fn restored(generation: Generation, identity: BTreeMap<String, String>) -> io::Result<Restored> {
    let mut entropy = [0; ENTROPY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut entropy)?;
    // A clock before 1970 is beyond repair; the guest's is then left at 1970, too.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Restored { realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), entropy: hex::encode(entropy), generation, identity })
}

/// Gives QEMU the state through a descriptor, so that what was checked is what is loaded, and waits until it is in.
async fn load_state(qmp: &Qmp, state: &[u8], limit: Duration) -> Result<(), QmpError> {
    let file = || -> io::Result<File> {
        let mut file = File::from(rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC)?);
        file.write_all(state)?;
        io::Seek::rewind(&mut file)?;
        Ok(file)
    };
    let file = file().map_err(QmpError::Io)?;
    let mut events = qmp.events();
    qmp.execute_with_fd("getfd", json!({ "fdname": STATE_FD }), file.as_fd(), limit).await?;
    qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{STATE_FD}") }), limit).await?;
    let loaded = async {
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                // QEMU ends when it cannot load a state.
                () = qmp.closed() => return Err(QmpError::Closed),
            };
            match event {
                Ok(event) if event.name == "MIGRATION" && event.data["status"] == "completed" => return Ok(()),
                Ok(event) if event.name == "MIGRATION" && event.data["status"] == "failed" => {
                    return Err(QmpError::Outcome("QEMU does not take the device state".to_owned()));
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => return Err(QmpError::Outcome("QEMU said too much at once".to_owned())),
                Err(RecvError::Closed) => return Err(QmpError::Closed),
            }
        }
    };
    let late = || QmpError::Timeout { command: "migrate-incoming".to_owned(), limit };
    tokio::time::timeout(limit, loaded).await.unwrap_or_else(|_| Err(late()))
}
