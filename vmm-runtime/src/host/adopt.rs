//! Taking over a process that outlived an earlier `serve`.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use model::{Generation, MicrovmId, chain};
use protocol::link::Attach;

use super::{
    Backend, Layers, Shared, blocking, failed, image,
    pool::KillOnDrop,
    process::Process,
    record::{self, Record, Stage},
    roles::Granted,
    snapshots::committed,
    start::{attach, new_link},
    vm::{Core, Kind, ProcessVm},
};
use crate::{engine::EngineError, snapshot::atomic};

/// See `Engine::adopt`.
pub(super) async fn adopt<B: Backend>(
    shared: &Arc<Shared<B>>,
    id: MicrovmId,
    dir: PathBuf,
    image_dir: PathBuf,
    generation: Generation,
) -> Result<Option<Arc<ProcessVm<B>>>, EngineError> {
    let doing = format!("looking for the process of {id}");
    let found = blocking({
        let dir = dir.clone();
        move || -> io::Result<Option<(Record, Option<Process>)>> {
            // Half-written snapshots of a `serve` that was killed.
            match atomic::remove_leftovers(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let Some(record) = record::of_microvm(&dir)? else { return Ok(None) };
            let process = Process::find(&record.identity)?;
            Ok(Some((record, process)))
        }
    })
    .await
    .map_err(|error| failed(doing, error))?;
    let Some((record, process)) = found else { return Ok(None) };
    let Some(process) = process else {
        record::remove(&dir);
        return Ok(None);
    };
    let mut process = KillOnDrop::new(process);
    process.recorded_in = Some(dir.clone());
    // A damaged snapshot must not cost the process, which does not need it.
    let is_committed = matches!(committed(&dir), Ok(Some(committed)) if committed.manifest.record.generation >= record.generation);
    let why = match (record.stage, record.generation == generation, is_committed) {
        (Stage::Running, true, false) => match take_over(shared, id, &dir, &image_dir, &record, process.get()).await {
            Ok(core) => {
                let core = core(process.keep());
                return Ok(Some(ProcessVm::new(core)));
            }
            Err(error) => format!("it cannot be reached: {}", chain(&error)),
        },
        (Stage::Starting, ..) => "its start was cut off".to_owned(),
        (_, false, _) => format!("it is of generation {}, not {generation}", record.generation),
        (_, _, true) => "its suspend was committed".to_owned(),
    };
    tracing::info!(%id, pid = process.get().pid(), why, "a VMM process is ended instead of adopted");
    process.get().kill(shared.config.limits.kill).await;
    Ok(None)
}

async fn take_over<B: Backend>(
    shared: &Arc<Shared<B>>,
    id: MicrovmId,
    dir: &Path,
    image_dir: &Path,
    record: &Record,
    process: &Process,
) -> Result<impl FnOnce(Process) -> Core<B> + use<B>, EngineError> {
    let backend = &shared.backend;
    let image = image::load(shared, image_dir).await?;
    let vmm = backend.reconnect(process, &image).await?;
    let link = new_link(shared, dir);
    attach(backend, process, &vmm, &link, || Ok(Attach::Adopted), shared.config.limits.attach, "answer after the node's restart").await?;
    let layers = Layers::existing(dir, B::LAYER_FILES, record.sealed_layers.clone(), record.generation);
    let kind = Kind::Microvm { id, generation: record.generation, image, layers: tokio::sync::Mutex::new(layers) };
    let (shared, dir, egress, role) = (shared.clone(), dir.to_owned(), record.egress, record.role.clone());
    Ok(move |process| Core::new(&shared, kind, dir, process, vmm, link).lead_out(egress).with_role(role.map(|arn| Granted { arn, last: None })))
}
