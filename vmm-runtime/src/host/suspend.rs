//! Suspend: a running microVM becomes files.
//!
//! ```text
//! quiesce ─ stop ─ device state ─ (merge layers) ─ memory difference, disk layer ─ manifest ─ rename ═ COMMIT ─ kill
//!    └────────┴──────────┴──────────────┴──────────────────┴───────────────┘ cancelled or failed: undone, it runs on
//! ```

use std::{io, sync::Arc};

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    Stopwatch, blocking, failed, generation_dir,
    image::save_state,
    memory::{self, WriteError},
    vm::{Core, Kind, Life},
};
use crate::{
    engine::{EngineError, Phases, SnapshotRecord, SuspendOutcome},
    snapshot::{
        atomic::Staging,
        manifest::{self, FORMAT, MicrovmManifest, Part},
    },
};
use vmm_protocol::memdiff::Written;

pub(super) const MEMORY: &str = "memory.diff";
/// Kept free beyond what a snapshot needs, for everyone else on the disk.
const SPARE_BYTES: u64 = 64 << 20;

/// See `Vm::suspend`.
pub(super) async fn suspend(core: Arc<Core>, cancel: CancellationToken) -> Result<SuspendOutcome, EngineError> {
    let _one = core.operation.lock().await;
    core.ensure_running("suspend")?;
    let mut watch = Stopwatch::start();
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
            // The streams stay with the link, parked.
            core.link.detach();
            core.process.kill(core.limits().kill).await;
            core.forget_process();
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
async fn take_back(core: &Core) -> Result<(), EngineError> {
    const STEP: &str = "taking a suspend back";
    let resumed = core.qmp.execute("cont", json!({}), core.limits().command).await;
    core.ensure_running(STEP)?;
    if let Err(error) = resumed {
        let exit = core.vmm_exit(&format!("a stopped guest could not go on ({error})"));
        core.end(Life::Exited(exit.clone()));
        core.process.kill(core.limits().kill).await;
        core.link.close();
        core.forget_process();
        return Err(EngineError::Ended { step: STEP, exit });
    }
    // Streams flow whatever the agent answers; an agent that does not is noticed by the next thing it is asked.
    if let Err(error) = core.link.unquiesce(core.limits().quiesce).await {
        tracing::warn!(dir = %core.dir.display(), %error, "the guest agent did not answer after a suspend was taken back");
    }
    Ok(())
}

/// `Ok(None)`: cancelled; nothing was committed.
async fn write(core: &Arc<Core>, cancel: &CancellationToken, watch: &mut Stopwatch) -> Result<Option<SnapshotRecord>, EngineError> {
    let Kind::Microvm { id, generation, image, layers } = &core.kind else {
        return Err(EngineError::Host { what: "suspend a guest that was booted for an image".to_owned() });
    };
    core.qmp.execute("stop", json!({}), core.limits().command).await.map_err(|error| core.qmp_failed("stopping the guest", error))?;
    watch.lap("stop");
    if cancel.is_cancelled() {
        return Ok(None);
    }
    let staging = Staging::create(&core.dir).map_err(|error| failed(format!("creating a directory in {}", core.dir.display()), error))?;
    ensure_space(core)?;
    let state = save_state(core, &staging).await?;
    watch.lap("devices");
    let mut layers = layers.lock().await;
    match layers.merge(&core.qmp, cancel).await {
        Ok(merged) if merged => watch.lap("merge"),
        Ok(_) => {}
        Err(error) if core.process.is_alive() => tracing::warn!(dir = %core.dir.display(), %error, "disk layers were not merged"),
        Err(error) => return Err(core.qmp_failed("merging disk layers", error)),
    }
    if cancel.is_cancelled() {
        return Ok(None);
    }
    let sealing = blocking({
        let layers = layers.clone();
        move || layers.seal()
    });
    let difference = blocking({
        let (core, image, cancel, to) = (core.clone(), image.clone(), cancel.clone(), staging.path().join(MEMORY));
        move || memory::write_difference(core.process.pid(), &core.mapping, &image.memory(), &to, &cancel)
    });
    let (sealed, difference) = tokio::join!(sealing, difference);
    let difference = match difference {
        Ok(difference) => difference,
        Err(WriteError::Cancelled) => return Ok(None),
        Err(WriteError::Io { .. }) if !core.process.is_alive() => {
            return Err(EngineError::Ended { step: "suspend", exit: core.vmm_exit("QEMU ended") });
        }
        Err(error) => return Err(failed("saving the guest's memory", error)),
    };
    let sealed = sealed.map_err(|error| failed("sealing the disk layer", error))?;
    watch.lap("memory");
    if cancel.is_cancelled() {
        return Ok(None);
    }
    core.ensure_running("suspend")?;
    let record = SnapshotRecord { generation: *generation, memory_bytes: difference.bytes, disk_bytes: layers.allocated_bytes(), phases: Phases::new() };
    let manifest = MicrovmManifest {
        format: FORMAT,
        fingerprint: core.shared.fingerprint(&image.machine),
        id: *id,
        image_crc32: image.crc32,
        record: record.clone(),
        state,
        memory: memory_part(&difference),
        layers: sealed,
    };
    let to = generation_dir(&core.dir, *generation);
    blocking(move || -> io::Result<()> {
        staging.write(manifest::FILE, &manifest::encode(&manifest).0)?;
        staging.commit(&to)
    })
    .await
    .map_err(|error| failed(format!("committing the snapshot in {}", core.dir.display()), error))?;
    watch.lap("commit");
    Ok(Some(record))
}

fn memory_part(difference: &Written) -> Part {
    Part { file: MEMORY.to_owned(), bytes: difference.bytes, crc32: Some(difference.header_crc32) }
}

/// A suspend that cannot fit is refused before it has filled the disk for others.
fn ensure_space(core: &Core) -> Result<(), EngineError> {
    let space = rustix::fs::statvfs(&core.dir).map_err(|error| failed(format!("looking for free space in {}", core.dir.display()), io::Error::from(error)))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let wanted = core.process.private_bytes().unwrap_or(0).saturating_add(SPARE_BYTES);
    if free < wanted {
        let what = format!("a snapshot in {} needs {} MiB and {} MiB are free", core.dir.display(), wanted >> 20, free >> 20);
        return Err(EngineError::Host { what });
    }
    Ok(())
}
