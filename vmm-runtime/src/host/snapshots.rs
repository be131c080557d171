//! The snapshots in a microVM's directory: `gen-<n>`, of which the newest counts.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use model::{Generation, MicrovmId};
use vmm_protocol::memdiff::{PAGE, Reader};

use super::{Backend, Image, Shared, bad_manifest, bad_snapshot, failed, image, layers};
use crate::{
    engine::EngineError,
    snapshot::manifest::{self, MicrovmManifest},
};

const MIB: u64 = 1 << 20;
const GENERATION_PREFIX: &str = "gen-";

/// The newest committed snapshot of a microVM.
pub(super) struct Committed {
    pub manifest: MicrovmManifest,
    pub dir: PathBuf,
}

pub(super) fn generation_dir(microvm_dir: &Path, generation: Generation) -> PathBuf {
    microvm_dir.join(format!("{GENERATION_PREFIX}{generation}"))
}

/// The generations that were committed, in no order.
fn generations(microvm_dir: &Path) -> io::Result<Vec<Generation>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(microvm_dir)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.strip_prefix(GENERATION_PREFIX)?.parse().ok()).map(Generation));
    }
    Ok(found)
}

/// `Ok(None)`: it never was suspended.
pub(super) fn committed(microvm_dir: &Path) -> Result<Option<Committed>, EngineError> {
    let newest = match generations(microvm_dir) {
        Ok(generations) => generations.into_iter().max(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(format!("looking for snapshots in {}", microvm_dir.display()), error)),
    };
    let Some(generation) = newest else { return Ok(None) };
    let dir = generation_dir(microvm_dir, generation);
    let (manifest, _) = manifest::read::<MicrovmManifest>(&dir).map_err(|error| bad_manifest(&dir, error))?;
    if manifest.record.generation != generation {
        return Err(bad_snapshot(&dir, format!("its manifest is that of generation {}", manifest.record.generation)));
    }
    Ok(Some(Committed { manifest, dir }))
}

/// A snapshot that may be restored.
pub(super) struct Opened {
    pub manifest: MicrovmManifest,
    pub dir: PathBuf,
    pub state: Vec<u8>,
    pub difference: Reader<File>,
}

/// Checks all of the newest snapshot but the pages of its difference, which are checked as they are read.
pub(super) fn open<B: Backend>(
    shared: &Shared<B>,
    image: &Image,
    microvm_dir: &Path,
    id: MicrovmId,
    generation: Generation,
) -> Result<Opened, EngineError> {
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
    manifest.fingerprint.check(&shared.backend.fingerprint(image.shape())).map_err(bad)?;
    let state = image::read_state(&dir, &manifest.state)?;
    layers::check(microvm_dir, &manifest.layers).map_err(bad)?;
    let file = File::open(dir.join(&manifest.memory.file)).map_err(|error| bad(format!("{} cannot be opened: {error}", manifest.memory.file)))?;
    let pages = u64::from(image.shape().memory_mib) * MIB / PAGE as u64;
    let difference = Reader::open(file, pages).map_err(|error| bad(error.to_string()))?;
    if Some(difference.header_crc32()) != manifest.memory.crc32 {
        return Err(bad(format!("{} is not the one that its manifest names", manifest.memory.file)));
    }
    Ok(Opened { manifest, dir, state, difference })
}

/// Removes what is older than a snapshot that has been restored, and the layers that only those name.
pub(super) fn remove_older(dir: &Path, snapshot: Generation, running: Generation, layers: &[String]) -> io::Result<()> {
    for older in generations(dir)?.into_iter().filter(|generation| *generation < snapshot) {
        fs::remove_dir_all(generation_dir(dir, older))?;
    }
    layers::remove_older(dir, running, layers)
}
