//! Image snapshots: made once from a booted guest, checked before the first use, read by every clone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::json;

use super::{
    Shared, bad_manifest, bad_snapshot, blocking, command::Machine, failed, memory,
    memory::{Measured, ZeroPages},
    qmp::QmpError,
    vm::{Core, Kind, Life},
};
use crate::{
    engine::{EngineError, ImageSnapshot},
    snapshot::{
        atomic::Staging,
        manifest::{self, FORMAT, ImageManifest, Manifest, Part},
    },
};

pub(super) const STATE: &str = "state";
const MEMORY: &str = "memory";
const DISK: &str = "disk";
/// Device state is 60–200 KB; more than this is none of ours.
pub(super) const MAX_STATE_BYTES: u64 = 64 << 20;
/// Images whose verification is remembered.
const MAX_REMEMBERED: usize = 4096;

/// An image that may be used.
pub(super) struct Image {
    pub dir: PathBuf,
    pub manifest: ImageManifest,
    pub crc32: u32,
    pub machine: Machine,
}

impl Image {
    pub fn memory(&self) -> PathBuf {
        self.dir.join(&self.manifest.memory.file)
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join(&self.manifest.disk.file)
    }

    pub fn refill(&self, shared: &Shared) {
        shared.pool.refill(&self.dir, self.machine, &self.memory());
    }
}

/// Reads an image's manifest and checks that this host can restore it. Its memory and disk are read and compared with
/// their checksums on the first use in this process; their lengths always.
pub(super) async fn load(shared: &Arc<Shared>, dir: &Path) -> Result<Arc<Image>, EngineError> {
    let dir = dir.to_owned();
    let (manifest, crc32) = blocking({
        let dir = dir.clone();
        move || manifest::read::<ImageManifest>(&dir).map_err(|error| bad_manifest(&dir, error))
    })
    .await?;
    let machine = Machine { accel: shared.config.accel, shape: manifest.snapshot.shape };
    manifest.fingerprint.check(&shared.fingerprint(&machine)).map_err(|why| bad_snapshot(&dir, why))?;
    for part in manifest.parts() {
        let path = dir.join(&part.file);
        let bytes = fs::metadata(&path).map_err(|error| bad_snapshot(&dir, format!("{} cannot be looked at: {error}", part.file)))?.len();
        if bytes != part.bytes {
            return Err(bad_snapshot(&dir, format!("{} has {bytes} bytes and should have {}", part.file, part.bytes)));
        }
    }
    let image = Arc::new(Image { dir, manifest, crc32, machine });
    verify_once(shared, &image).await?;
    Ok(image)
}

async fn verify_once(shared: &Shared, image: &Arc<Image>) -> Result<(), EngineError> {
    let verified = {
        let mut all = shared.verified.lock();
        if all.len() >= MAX_REMEMBERED {
            all.clear();
        }
        all.entry(image.dir.clone()).or_default().clone()
    };
    let verify = async || {
        let image = image.clone();
        blocking(move || {
            for part in [&image.manifest.memory, &image.manifest.disk] {
                let found = memory::measure(&image.dir.join(&part.file), ZeroPages::Keep)
                    .map_err(|error| failed(format!("reading {} of the image {}", part.file, image.dir.display()), error))?;
                if Some(found.crc32) != part.crc32 {
                    return Err(bad_snapshot(&image.dir, format!("the checksum of {} is wrong", part.file)));
                }
            }
            Ok(image.crc32)
        })
        .await
    };
    if *verified.get_or_try_init(verify).await? == image.crc32 {
        return Ok(());
    }
    // Another image has come to the same place.
    shared.verified.lock().remove(&image.dir);
    verify().await.map(|_| ())
}

/// Reads device state and checks it. What is loaded later is this very copy.
pub(super) fn read_state(dir: &Path, part: &Part) -> Result<Vec<u8>, EngineError> {
    if part.bytes > MAX_STATE_BYTES {
        return Err(bad_snapshot(dir, format!("{} claims {} bytes", part.file, part.bytes)));
    }
    let state = match fs::read(dir.join(&part.file)) {
        Ok(state) => state,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(bad_snapshot(dir, format!("{} is missing", part.file))),
        Err(error) => return Err(failed(format!("reading {} in {}", part.file, dir.display()), error)),
    };
    if state.len() as u64 != part.bytes || Some(crc32fast::hash(&state)) != part.crc32 {
        return Err(bad_snapshot(dir, format!("the checksum of {} is wrong", part.file)));
    }
    Ok(state)
}

/// Saves device state of a stopped guest into a file, and names it.
pub(super) async fn save_state(core: &Core, staging: &Staging) -> Result<Part, EngineError> {
    let path = staging.path().join(STATE);
    // Not `live`: that would take the disks from this process, which may have to merge layers or let the guest go on. What
    // the disks held back was written by `stop`.
    let arguments = json!({ "filename": path, "live": false });
    core.qmp.execute("xen-save-devices-state", arguments, core.limits().state).await.map_err(|error| core.qmp_failed("saving device state", error))?;
    blocking(move || {
        let state = fs::read(&path)?;
        crate::snapshot::atomic::sync_file(&path)?;
        Ok(Part { file: STATE.to_owned(), bytes: state.len() as u64, crc32: Some(crc32fast::hash(&state)) })
    })
    .await
    .map_err(|error: io::Error| failed("reading back the saved device state", error))
}

/// See `Engine::capture_image`.
pub(super) async fn capture(core: Arc<Core>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
    let Kind::Build { root_disk, machine, exposed } = &core.kind else {
        return Err(EngineError::Host { what: "capture an image of a microVM that was not booted for it".to_owned() });
    };
    let _one = core.operation.lock().await;
    core.ensure_running("capture")?;
    core.quiesce().await?;
    core.qmp.execute("stop", json!({}), core.limits().command).await.map_err(|error| core.qmp_failed("stopping the guest", error))?;
    let parent = into.parent().ok_or_else(|| failed(format!("creating {}", into.display()), io::Error::from(io::ErrorKind::InvalidInput)))?;
    let staging = Staging::create(parent).map_err(|error| failed(format!("creating a directory in {}", parent.display()), error))?;
    let state = save_state(&core, &staging).await?;
    core.end(Life::Suspended);
    core.link.close();
    core.process.kill(core.limits().kill).await;
    core.forget_process();

    let fingerprint = core.shared.fingerprint(machine);
    let (shape, exposed, root_disk, guest) = (machine.shape, exposed.clone(), root_disk.clone(), core.shared.config.guest_fingerprint.clone());
    let written = blocking({
        let (into, memory) = (into.clone(), core.dir.join(BOOT_MEMORY));
        move || -> io::Result<ImageSnapshot> {
            let (memory, memory_sum) = take(&memory, &staging, MEMORY)?;
            let (disk, disk_sum) = take(&root_disk, &staging, DISK)?;
            let snapshot = ImageSnapshot { engine: super::NAME.to_owned(), shape, memory_bytes: memory_sum.data_bytes, disk_bytes: disk_sum.data_bytes };
            let manifest = ImageManifest { format: FORMAT, fingerprint, guest, snapshot: snapshot.clone(), exposed, state, memory, disk };
            staging.write(manifest::FILE, &manifest::encode(&manifest).0)?;
            staging.commit(&into)?;
            Ok(snapshot)
        }
    });
    written.await.map_err(|error| failed(format!("writing the image snapshot {}", into.display()), error))
}

/// The memory file of a booting guest, in its directory.
pub(super) const BOOT_MEMORY: &str = "memory";

/// Moves a file into the image, makes zero pages holes, and makes it durable.
fn take(from: &Path, staging: &Staging, name: &str) -> io::Result<(Part, Measured)> {
    let to = staging.path().join(name);
    fs::rename(from, &to).map_err(|error| io::Error::new(error.kind(), format!("moving {} to {}: {error}", from.display(), to.display())))?;
    let measured = memory::measure(&to, ZeroPages::Punch)?;
    let file = fs::File::open(&to)?;
    file.sync_all()?;
    Ok((Part { file: name.to_owned(), bytes: file.metadata()?.len(), crc32: Some(measured.crc32) }, measured))
}

impl Core {
    /// What a failed QMP command means.
    pub(super) fn qmp_failed(&self, doing: &'static str, error: QmpError) -> EngineError {
        if self.process.is_alive() {
            failed(doing, error)
        } else {
            EngineError::Ended { step: doing, exit: self.vmm_exit("QEMU ended") }
        }
    }
}
