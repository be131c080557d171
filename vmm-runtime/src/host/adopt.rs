//! Taking over a process that outlived an earlier `serve`.

use std::{io, path::PathBuf, sync::Arc};

use model::{Generation, MicrovmId};
use protocol::link::Attach;
use serde_json::json;
use tokio::sync::watch;

use super::{
    Shared, blocking,
    command::{AGENT_SOCKET, QMP_SOCKET},
    committed,
    disk::Layers,
    failed, image, memory,
    pool::KillOnDrop,
    process::Process,
    qmp::Qmp,
    record::{self, Record, Stage},
    start::new_link,
    vm::{Core, Kind, Life, QemuVm},
};
use crate::{engine::EngineError, snapshot::atomic};

/// See `Engine::adopt`.
pub(super) async fn adopt(
    shared: &Arc<Shared>,
    id: MicrovmId,
    dir: PathBuf,
    image_dir: PathBuf,
    generation: Generation,
) -> Result<Option<Arc<QemuVm>>, EngineError> {
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
                return Ok(Some(QemuVm::new(core)));
            }
            Err(error) => format!("it cannot be reached: {}", chain(&error)),
        },
        (Stage::Starting, ..) => "its start was cut off".to_owned(),
        (_, false, _) => format!("it is of generation {}, not {generation}", record.generation),
        (_, _, true) => "its suspend was committed".to_owned(),
    };
    tracing::info!(%id, pid = process.get().pid(), why, "a QEMU process is ended instead of adopted");
    process.get().kill(shared.config.limits.kill).await;
    Ok(None)
}

/// An error with all its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

async fn take_over(
    shared: &Arc<Shared>,
    id: MicrovmId,
    dir: &std::path::Path,
    image_dir: &std::path::Path,
    record: &Record,
    process: &Process,
) -> Result<impl FnOnce(Process) -> Core + use<>, EngineError> {
    let limits = &shared.config.limits;
    let connecting = |error: io::Error| failed("connecting to QEMU", error);
    let talking = |error: super::qmp::QmpError| failed("talking to QEMU", error);
    let image = image::load(shared, image_dir).await?;
    let mapping = memory::find_mapping(process.pid(), &image.memory()).map_err(|error| failed("finding the guest's memory in QEMU", error))?;
    let qmp = process.connect(QMP_SOCKET, limits.command).await.map_err(connecting)?;
    let qmp = Qmp::start(qmp, limits.command).await.map_err(talking)?;
    let status = qmp.execute("query-status", json!({}), limits.command).await.map_err(talking)?;
    if status["running"] != true {
        if status["status"] == "shutdown" {
            return Err(failed("adopting it", "the guest has shut down"));
        }
        // A suspend was cut off before its commit: it is taken back.
        qmp.execute("cont", json!({}), limits.command).await.map_err(talking)?;
    }
    let agent = process.connect(AGENT_SOCKET, limits.command).await.map_err(connecting)?;
    let link = new_link(dir);
    link.attach(agent, Attach::Adopted, limits.attach).await.map_err(|error| failed("talking to the guest agent", error))?;
    let layers = Layers::existing(dir, &image.disk(), record.sealed_layers.clone(), record.generation);
    let kind = Kind::Microvm { id, generation: record.generation, image, layers: tokio::sync::Mutex::new(layers) };
    let (shared, dir) = (shared.clone(), dir.to_owned());
    Ok(move |process| Core {
        shared,
        kind,
        dir,
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
