//! Image snapshots: made once from a booted guest, checked before the first use, read by every clone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use model::Shape;

use super::{
    Backend, Shared, bad_manifest, bad_snapshot, blocking, failed,
    sparse::{self, Measured, ZeroPages},
    vm::{Core, Kind, Life},
};
use crate::{
    engine::{EngineError, ImageSnapshot},
    snapshot::{
        atomic::Staging,
        manifest::{self, FORMAT, ImageManifest, Manifest, Part},
    },
};

const MEMORY: &str = "memory";
const DISK: &str = "disk";
/// The memory file of a booting guest, in its directory.
pub(super) const BOOT_MEMORY: &str = "memory";
/// Device state is 60–200 KB; more than this is none of ours.
const MAX_STATE_BYTES: u64 = 64 << 20;
/// Images whose verification is remembered.
const MAX_REMEMBERED: usize = 4096;

/// An image that may be used.
pub struct Image {
    pub(super) dir: PathBuf,
    pub(super) manifest: ImageManifest,
    pub(super) crc32: u32,
}

impl Image {
    /// Size of its guests.
    pub fn shape(&self) -> Shape {
        self.manifest.snapshot.shape
    }

    /// The file with its memory.
    pub fn memory(&self) -> PathBuf {
        self.dir.join(&self.manifest.memory.file)
    }

    /// The file with its disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(&self.manifest.disk.file)
    }

    /// Length of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.manifest.disk.bytes
    }
}

/// Reads an image's manifest and checks that this host can restore it. Its memory and disk are read and compared with
/// their checksums on the first use in this process; their lengths always.
pub(super) async fn load<B: Backend>(shared: &Arc<Shared<B>>, dir: &Path) -> Result<Arc<Image>, EngineError> {
    let dir = dir.to_owned();
    let (manifest, crc32) = blocking({
        let dir = dir.clone();
        move || manifest::read::<ImageManifest>(&dir).map_err(|error| bad_manifest(&dir, error))
    })
    .await?;
    manifest.fingerprint.check(&shared.backend.fingerprint(manifest.snapshot.shape)).map_err(|why| bad_snapshot(&dir, why))?;
    for part in manifest.parts() {
        let path = dir.join(&part.file);
        let bytes = fs::metadata(&path).map_err(|error| bad_snapshot(&dir, format!("{} cannot be looked at: {error}", part.file)))?.len();
        if bytes != part.bytes {
            return Err(bad_snapshot(&dir, format!("{} has {bytes} bytes and should have {}", part.file, part.bytes)));
        }
    }
    let image = Arc::new(Image { dir, manifest, crc32 });
    verify_once(shared, &image).await?;
    Ok(image)
}

async fn verify_once<B: Backend>(shared: &Shared<B>, image: &Arc<Image>) -> Result<(), EngineError> {
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
                let found = sparse::measure(&image.dir.join(&part.file), ZeroPages::Keep)
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

/// See `Engine::capture_image`.
pub(super) async fn capture<B: Backend>(core: Arc<Core<B>>, into: PathBuf) -> Result<ImageSnapshot, EngineError> {
    let Kind::Build { root_disk, shape, exposed } = &core.kind else {
        return Err(EngineError::Host { what: "capture an image of a microVM that was not booted for it".to_owned() });
    };
    let _one = core.operation.lock().await;
    core.ensure_running("capture")?;
    *core.egress.lock() = None;
    core.quiesce().await?;
    let backend = &core.shared.backend;
    backend.pause(&core.process, &core.vmm).await?;
    let parent = into.parent().ok_or_else(|| failed(format!("creating {}", into.display()), io::Error::from(io::ErrorKind::InvalidInput)))?;
    let staging = Staging::create(parent).map_err(|error| failed(format!("creating a directory in {}", parent.display()), error))?;
    let state = backend.save_image(&core.process, &core.vmm, staging.path()).await?;
    core.end(Life::Suspended);
    core.link.close();
    core.end_process().await;

    let fingerprint = backend.fingerprint(*shape);
    let (shape, exposed, root_disk, guest) = (*shape, exposed.clone(), root_disk.clone(), core.shared.config.guest_fingerprint.clone());
    let written = blocking({
        let (into, memory) = (into.clone(), core.dir.join(BOOT_MEMORY));
        move || -> io::Result<ImageSnapshot> {
            let (memory, memory_sum) = take(&memory, &staging, MEMORY)?;
            let (disk, disk_sum) = take(&root_disk, &staging, DISK)?;
            let snapshot = ImageSnapshot { engine: B::NAME.to_owned(), shape, memory_bytes: memory_sum.data_bytes, disk_bytes: disk_sum.data_bytes };
            let manifest = ImageManifest { format: FORMAT, fingerprint, guest, snapshot: snapshot.clone(), exposed, state, memory, disk };
            staging.write(manifest::FILE, &manifest::encode(&manifest).0)?;
            staging.commit(&into)?;
            Ok(snapshot)
        }
    });
    written.await.map_err(|error| failed(format!("writing the image snapshot {}", into.display()), error))
}

/// Moves a file into the image, makes zero pages holes, and makes it durable.
fn take(from: &Path, staging: &Staging, name: &str) -> io::Result<(Part, Measured)> {
    let to = staging.path().join(name);
    fs::rename(from, &to).map_err(|error| io::Error::new(error.kind(), format!("moving {} to {}: {error}", from.display(), to.display())))?;
    let measured = sparse::measure(&to, ZeroPages::Punch)?;
    let file = fs::File::open(&to)?;
    file.sync_all()?;
    Ok((Part { file: name.to_owned(), bytes: file.metadata()?.len(), crc32: Some(measured.crc32) }, measured))
}
