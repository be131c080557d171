//! Suspend: a running microVM becomes files.
//!
//! ```text
//! quiesce ─ stop ─ device state ─ (merge layers) ─ memory difference, disk layer ─ manifest ─ rename ═ COMMIT ─ kill
//!    └────────┴──────────┴──────────────┴──────────────────┴───────────────┘ cancelled or failed: undone, it runs on
//! ```

use std::{io, path::Path, sync::Arc};

use model::Generation;
use tokio_util::sync::CancellationToken;

use super::{
    Backend, Save, SavedParts, Stopwatch, blocking,
    egress::Egress,
    failed, snapshots,
    vm::{Core, Kind, Life},
    vmm_exit,
};
use crate::{
    engine::{EngineError, Phases, SnapshotRecord, SuspendOutcome},
    snapshot::{
        atomic::{self, Staging},
        manifest::{self, FORMAT, MicrovmManifest},
    },
};

/// Kept free beyond what a snapshot needs, for everyone else on the disk.
const SPARE_BYTES: u64 = 64 << 20;

/// See `Vm::suspend`.
pub(super) async fn suspend<B: Backend>(core: Arc<Core<B>>, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
    let _one = core.operation.lock().await;
    core.ensure_running("suspend")?;
    let mut watch = Stopwatch::start();
    // Whatever comes of it but a commit, the guest's connections go on.
    let paused = Egress::pause(core.egress.lock().as_ref());
    tokio::select! {
        biased;
        // Dropping the quiesce takes it back.
        () = cancel.cancelled() => return Ok(SuspendOutcome::TakenBack),
        quiesced = core.quiesce() => quiesced?,
    }
    watch.lap("quiesce");
    match write(&core, &cancel, &mut watch).await {
        Ok(Some(mut record)) => {
            let unasked = !core.end(Life::Suspended);
            // Its connections end with it, and the app learns of that when it wakes.
            paused.for_good();
            *core.egress.lock() = None;
            // The streams stay with the link, parked.
            core.link.detach();
            core.end_process().await;
            watch.lap("end");
            if unasked {
                core.ensure_running("suspend")?;
            }
            record.phases = watch.phases;
            Ok(SuspendOutcome::Suspended(record))
        }
        Ok(None) => {
            take_back(&core).await?;
            Ok(SuspendOutcome::TakenBack)
        }
        Err(error) => {
            take_back(&core).await?;
            Err(error)
        }
    }
}

/// Lets a stopped guest go on. If that fails it has ended.
async fn take_back<B: Backend>(core: &Core<B>) -> Result<(), EngineError> {
    const STEP: &str = "taking a suspend back";
    let resumed = core.shared.backend.run(&core.process, &core.vmm).await;
    core.ensure_running(STEP)?;
    if let Err(error) = resumed {
        let exit = vmm_exit(&core.process, &format!("a stopped guest could not go on ({error})"));
        core.end(Life::Exited(exit.clone()));
        core.link.close();
        core.end_process().await;
        return Err(EngineError::Ended { step: STEP, exit });
    }
    // Streams flow whatever the agent answers; an agent that does not is noticed by the next thing it is asked.
    if let Err(error) = core.link.unquiesce(core.limits().quiesce).await {
        tracing::warn!(dir = %core.dir.display(), %error, "the guest agent did not answer after a suspend was taken back");
    }
    Ok(())
}

/// `Ok(None)`: cancelled; nothing was committed.
async fn write<B: Backend>(core: &Arc<Core<B>>, cancel: &CancellationToken, watch: &mut Stopwatch) -> Result<Option<SnapshotRecord>, EngineError> {
    let Kind::Microvm { id, generation, image, layers } = &core.kind else {
        return Err(EngineError::Host { what: "suspend a guest that was booted for an image".to_owned() });
    };
    let backend = &core.shared.backend;
    backend.pause(&core.process, &core.vmm).await?;
    watch.lap("stop");
    if cancel.is_cancelled() {
        return Ok(None);
    }
    let staging = Staging::create(&core.dir).map_err(|error| failed(format!("creating a directory in {}", core.dir.display()), error))?;
    ensure_space(core).await?;
    let mut layers = layers.lock().await;
    let save = Save { dir: staging.path(), image, layers: &mut layers, cancel };
    let Some(SavedParts { state, memory }) = backend.save_difference(&core.process, &core.vmm, save, watch).await? else { return Ok(None) };
    let sealed = blocking({
        let layers = layers.clone();
        move || layers.seal()
    });
    let sealed = sealed.await.map_err(|error| failed("sealing the disk layer", error))?;
    watch.lap("disk");
    if cancel.is_cancelled() {
        return Ok(None);
    }
    core.ensure_running("suspend")?;
    let record = SnapshotRecord { generation: *generation, memory_bytes: memory.bytes, disk_bytes: layers.allocated_bytes(), phases: Phases::new() };
    let manifest = MicrovmManifest {
        format: FORMAT,
        fingerprint: backend.fingerprint(image.shape()),
        id: *id,
        image_crc32: image.crc32,
        record: record.clone(),
        state,
        memory,
        layers: sealed,
    };
    let to = snapshots::generation_dir(&core.dir, *generation);
    // The microVM's directory is as old as the microVM, and nobody has made its name durable. Before its first commit somebody
    // must: a snapshot in a directory that is not found is none.
    let named_in = if *generation == Generation(0) { core.dir.parent().filter(|parent| !parent.as_os_str().is_empty()).map(Path::to_owned) } else { None };
    blocking(move || -> io::Result<()> {
        if let Some(parent) = named_in {
            atomic::sync_dir(&parent)?;
        }
        staging.write(manifest::FILE, &manifest::encode(&manifest).0)?;
        staging.commit(&to)
    })
    .await
    .map_err(|error| failed(format!("committing the snapshot in {}", core.dir.display()), error))?;
    watch.lap("commit");
    Ok(Some(record))
}

/// A suspend that cannot fit is refused before it has filled the disk for others.
async fn ensure_space<B: Backend>(core: &Core<B>) -> Result<(), EngineError> {
    let space = rustix::fs::statvfs(&core.dir).map_err(|error| failed(format!("looking for free space in {}", core.dir.display()), io::Error::from(error)))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let private = core.shared.backend.usage(&core.process, &core.vmm).await.map_or(0, |usage| usage.private_bytes);
    let wanted = private.saturating_add(SPARE_BYTES);
    if free < wanted {
        let what = format!("a snapshot in {} needs {} MiB and {} MiB are free", core.dir.display(), wanted >> 20, free >> 20);
        return Err(EngineError::Host { what });
    }
    Ok(())
}
