//! Disk layers: what a microVM has written since its image, one layer per awake generation.
//!
//! Owns: `<microVM>/disk/<generation>.*`, which of them belong to the chain `image ← layer ← … ← top`, sealing, checking,
//! and removing what no snapshot names any more. What is in the files is the engine's. A sealed layer is never written
//! again; each restore opens a new top.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use model::Generation;

use super::sparse::{self, ZeroPages};
use crate::snapshot::{atomic, manifest::Part};

/// A chain with more sealed layers than this is merged at the next suspend.
const MAX_LAYERS: usize = 4;
/// Files that take up to this much space carry a checksum; reading longer ones would be felt in every wake.
const CHECKED_BYTES: u64 = 16 << 20;

/// The layers of one microVM.
#[derive(Debug, Clone)]
pub struct Layers {
    dir: PathBuf,
    /// Endings of the files of a layer.
    endings: &'static [&'static str],
    /// Files of the sealed layers, the lowest layer first.
    sealed: Vec<Part>,
    /// Of the layer being written.
    top: Generation,
}

fn dir(microvm_dir: &Path) -> PathBuf {
    microvm_dir.join("disk")
}

/// The generation whose layer a file belongs to.
fn generation_of(file: &str) -> Option<Generation> {
    file.split_once('.')?.0.parse().ok().map(Generation)
}

/// The files in the directory of layers, with the generations they belong to.
fn files(dir: &Path) -> io::Result<Vec<(Generation, String)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| Some((generation_of(name)?, name.to_owned()))));
    }
    Ok(found)
}

impl Layers {
    /// A new top layer over these sealed ones, without its files.
    pub(super) fn create(microvm_dir: &Path, endings: &'static [&'static str], sealed: Vec<Part>, top: Generation) -> io::Result<Self> {
        let layers = Self::existing(microvm_dir, endings, sealed, top);
        fs::create_dir_all(&layers.dir)?;
        // What a failed restore of the same generation left holds nothing that anyone has seen.
        for (generation, name) in files(&layers.dir)? {
            if generation == top {
                fs::remove_file(layers.dir.join(name))?;
            }
        }
        Ok(layers)
    }

    /// The layers of a process that runs already.
    pub(crate) fn existing(microvm_dir: &Path, endings: &'static [&'static str], sealed: Vec<Part>, top: Generation) -> Self {
        Self { dir: dir(microvm_dir), endings, sealed, top }
    }

    fn top_name(&self, ending: &str) -> String {
        format!("{}.{ending}", self.top)
    }

    /// A file of the top layer.
    pub fn top(&self, ending: &str) -> PathBuf {
        self.dir.join(self.top_name(ending))
    }

    /// The files of the sealed layers, layer by layer, the lowest first; those of one layer in the order of the endings.
    pub fn sealed(&self) -> impl DoubleEndedIterator<Item = PathBuf> {
        self.sealed.iter().map(|part| self.dir.join(&part.file))
    }

    /// How many layers are sealed.
    pub fn sealed_count(&self) -> usize {
        self.sealed.len() / self.endings.len()
    }

    /// Whether the chain is so long that the sealed layers should be copied into the top one.
    pub fn want_merge(&self) -> bool {
        self.sealed_count() > MAX_LAYERS
    }

    /// The sealed layers were copied into the top one and are not part of the chain any more.
    pub fn merged(&mut self) {
        self.sealed.clear();
    }

    /// Makes the top layer durable and names every layer's files with what a restore checks. The guest is stopped, and its
    /// VMM has written what it held back.
    pub(super) fn seal(&self) -> io::Result<Vec<Part>> {
        let mut parts = self.sealed.clone();
        for ending in self.endings {
            let path = self.top(ending);
            let file = File::open(&path)?;
            file.sync_all()?;
            let metadata = file.metadata()?;
            let small = metadata.blocks() * 512 <= CHECKED_BYTES;
            let crc32 = if small { Some(sparse::measure(&path, ZeroPages::Keep)?.crc32) } else { None };
            parts.push(Part { file: self.top_name(ending), bytes: metadata.len(), crc32 });
        }
        atomic::sync_dir(&self.dir)?;
        Ok(parts)
    }

    /// Bytes on the host's disk that belong to the microVM alone.
    pub(super) fn allocated_bytes(&self) -> u64 {
        let paths = self.sealed().chain(self.endings.iter().map(|ending| self.top(ending)));
        paths.filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.blocks() * 512).sum()
    }
}

/// Whether the sealed layers are what was sealed; `Err` is a sentence.
pub(super) fn check(microvm_dir: &Path, layers: &[Part]) -> Result<(), String> {
    for layer in layers {
        let name = &layer.file;
        let path = dir(microvm_dir).join(name);
        let bytes = fs::metadata(&path).map_err(|error| format!("the disk layer {name} cannot be looked at: {error}"))?.len();
        if bytes != layer.bytes {
            return Err(format!("the disk layer {name} has {bytes} bytes and should have {}", layer.bytes));
        }
        if let Some(wanted) = layer.crc32 {
            let found = sparse::measure(&path, ZeroPages::Keep).map_err(|error| format!("the disk layer {name} cannot be read: {error}"))?;
            if found.crc32 != wanted {
                return Err(format!("the checksum of the disk layer {name} is wrong"));
            }
        }
    }
    Ok(())
}

/// Removes layers of generations before `running` that are not among `keep`.
pub(super) fn remove_older(microvm_dir: &Path, running: Generation, keep: &[String]) -> io::Result<()> {
    let dir = dir(microvm_dir);
    for (generation, name) in files(&dir)? {
        // Later layers may be those of a restore that is going on.
        if generation < running && !keep.contains(&name) {
            fs::remove_file(dir.join(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDINGS: &[&str] = &["data", "map"];

    fn written(dir: &Path, sealed: Vec<Part>, top: u64) -> Layers {
        let layers = Layers::create(dir, ENDINGS, sealed, Generation(top)).unwrap();
        for ending in ENDINGS {
            fs::write(layers.top(ending), vec![7; 70_000]).unwrap();
        }
        layers
    }

    #[test]
    fn damaged_layers_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let sealed = written(dir.path(), Vec::new(), 0).seal().unwrap();
        assert_eq!(check(dir.path(), &sealed), Ok(()));

        let path = dir.path().join("disk/0.data");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..100]).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("bytes"));
        let mut flipped = whole.clone();
        flipped[65_000] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("checksum"));
        fs::remove_file(&path).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("looked at"));
    }

    #[test]
    fn a_restore_that_is_tried_again_begins_with_an_empty_top() {
        let dir = tempfile::tempdir().unwrap();
        let sealed = written(dir.path(), Vec::new(), 0).seal().unwrap();
        assert!(written(dir.path(), sealed.clone(), 1).top("map").exists());
        let again = Layers::create(dir.path(), ENDINGS, sealed.clone(), Generation(1)).unwrap();
        assert!(ENDINGS.iter().all(|ending| !again.top(ending).exists()));
        assert_eq!(check(dir.path(), &sealed), Ok(()));
    }

    #[test]
    fn only_what_no_snapshot_names_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let first = written(dir.path(), Vec::new(), 1);
        let names: Vec<String> = first.seal().unwrap().into_iter().map(|part| part.file).collect();
        remove_older(dir.path(), Generation(1), &[]).unwrap();
        remove_older(dir.path(), Generation(2), &names).unwrap();
        assert!(first.top("data").exists() && first.top("map").exists());
        remove_older(dir.path(), Generation(2), &[]).unwrap();
        assert!(!first.top("data").exists() && !first.top("map").exists());
    }

    #[test]
    fn long_chains_want_to_be_merged() {
        let dir = tempfile::tempdir().unwrap();
        let mut sealed = Vec::new();
        for generation in 0..=MAX_LAYERS as u64 {
            let layers = written(dir.path(), sealed, generation);
            assert!(!layers.want_merge());
            sealed = layers.seal().unwrap();
        }
        let mut layers = written(dir.path(), sealed, 9);
        assert!(layers.want_merge());
        layers.merged();
        assert_eq!((layers.want_merge(), layers.seal().unwrap().len()), (false, 2));
    }
}
