//! Disk layers: what a microVM has written since its image, one qcow2 file per awake generation.
//!
//! Owns: `<microVM>/disk/<generation>.qcow2`, the chain `image ← layer ← … ← top` as QEMU is told it, sealing and merging.
//! A sealed layer is never written again; each restore opens a new top. Chains are always told to QEMU whole, node by
//! node, so that the names inside the files are of no consequence.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use model::Generation;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    command::{Machine, ROOT_NODE},
    qmp::{Qmp, QmpError},
};
use crate::snapshot::manifest::Part;

/// A chain with more sealed layers than this is merged at the next suspend.
pub const MAX_LAYERS: usize = 4;
/// Layers up to this size carry a checksum; reading longer ones would be felt in every wake.
const CHECKED_BYTES: u64 = 16 << 20;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Node name of the image's disk.
const IMAGE_NODE: &str = "image";
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// What merging may take; a longer chain is better than a suspend without end.
const MERGE_LIMIT: Duration = Duration::from_secs(20);

/// The layers of one microVM.
#[derive(Debug, Clone)]
pub struct Layers {
    dir: PathBuf,
    image_disk: PathBuf,
    /// Sealed layers, the lowest first.
    sealed: Vec<Part>,
    /// File name of the layer being written.
    top: String,
}

fn layer_name(generation: Generation) -> String {
    format!("{generation}.qcow2")
}

impl Layers {
    /// A new top layer over these sealed ones.
    pub fn create(microvm_dir: &Path, image_disk: &Path, sealed: Vec<Part>, generation: Generation) -> io::Result<Self> {
        let layers = Self::existing(microvm_dir, image_disk, sealed, generation);
        fs::create_dir_all(&layers.dir)?;
        // What a failed restore of the same generation left holds nothing that anyone has seen.
        match fs::remove_file(layers.top_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        create_overlay(&layers.top_path(), fs::metadata(image_disk)?.len())?;
        Ok(layers)
    }

    /// The layers of a process that runs already.
    pub fn existing(microvm_dir: &Path, image_disk: &Path, sealed: Vec<Part>, generation: Generation) -> Self {
        Self { dir: dir(microvm_dir), image_disk: image_disk.to_owned(), sealed, top: layer_name(generation) }
    }

    fn top_path(&self) -> PathBuf {
        self.dir.join(&self.top)
    }

    /// Plugs the disk into a machine that waits for its state.
    pub async fn plug(&self, qmp: &Qmp) -> Result<(), QmpError> {
        qmp.execute("blockdev-add", self.chain(), COMMAND_LIMIT).await?;
        qmp.execute("device_add", Machine::disk_device(), COMMAND_LIMIT).await?;
        Ok(())
    }

    /// `no-flush`: what a guest flushes is worth nothing without the memory that goes with it, and a suspend makes both
    /// durable together.
    fn chain(&self) -> Value {
        let file = |path: &Path| json!({ "driver": "file", "filename": path, "discard": "unmap", "cache": { "no-flush": true } });
        let image = json!({ "driver": "raw", "node-name": IMAGE_NODE, "read-only": true, "file": file(&self.image_disk) });
        let mut chain = image;
        for (index, layer) in self.sealed.iter().enumerate() {
            let node = format!("layer{index}");
            chain = json!({ "driver": "qcow2", "node-name": node, "read-only": true, "file": file(&self.dir.join(&layer.file)), "backing": chain });
        }
        let file = file(&self.top_path());
        json!({ "driver": "qcow2", "node-name": ROOT_NODE, "discard": "unmap", "cache": { "no-flush": true }, "file": file, "backing": chain })
    }

    /// Copies the sealed layers into the top one, if there are many. The vCPUs are stopped. Whether this ends well or
    /// not, the chain that QEMU has stays right; `Ok(true)` says that the sealed layers are not part of it any more.
    pub async fn merge(&mut self, qmp: &Qmp, cancel: &CancellationToken) -> Result<bool, QmpError> {
        if self.sealed.len() <= MAX_LAYERS {
            return Ok(false);
        }
        let mut events = qmp.events();
        let job = json!({ "job-id": "merge", "device": ROOT_NODE, "base-node": IMAGE_NODE, "auto-dismiss": true });
        qmp.execute("block-stream", job, COMMAND_LIMIT).await?;
        let mut asked_to_end = false;
        let deadline = tokio::time::sleep(MERGE_LIMIT);
        tokio::pin!(deadline);
        let ended = loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = cancel.cancelled(), if !asked_to_end => {
                    asked_to_end = true;
                    qmp.execute("block-job-cancel", json!({ "device": "merge", "force": true }), COMMAND_LIMIT).await?;
                    continue;
                }
                () = &mut deadline, if !asked_to_end => {
                    asked_to_end = true;
                    qmp.execute("block-job-cancel", json!({ "device": "merge", "force": true }), COMMAND_LIMIT).await?;
                    continue;
                }
                () = qmp.closed() => return Err(QmpError::Closed),
            };
            match event {
                Ok(event) if event.name == "BLOCK_JOB_COMPLETED" && event.data["device"] == "merge" => break event,
                Ok(event) if event.name == "BLOCK_JOB_CANCELLED" && event.data["device"] == "merge" => return Ok(false),
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return Err(QmpError::Closed),
            }
        };
        if let Some(why) = ended.data["error"].as_str() {
            return Err(QmpError::Outcome(format!("merging the disk layers failed: {why}")));
        }
        self.sealed.clear();
        Ok(true)
    }

    /// Makes the top layer durable and names every layer with what a restore checks. The vCPUs are stopped, and QEMU has
    /// written what it held back.
    pub fn seal(&self) -> io::Result<Vec<Part>> {
        let file = File::open(self.top_path())?;
        file.sync_all()?;
        crate::snapshot::atomic::sync_dir(&self.dir)?;
        let bytes = file.metadata()?.len();
        let crc32 = if bytes <= CHECKED_BYTES { Some(checksum(file)?) } else { None };
        let mut layers = self.sealed.clone();
        layers.push(Part { file: self.top.clone(), bytes, crc32 });
        Ok(layers)
    }

    /// Bytes on the host's disk that belong to the microVM alone.
    pub fn allocated_bytes(&self) -> u64 {
        let names = self.sealed.iter().map(|layer| &layer.file).chain([&self.top]);
        names.filter_map(|name| fs::metadata(self.dir.join(name)).ok()).map(|metadata| metadata.blocks() * 512).sum()
    }
}

fn dir(microvm_dir: &Path) -> PathBuf {
    microvm_dir.join("disk")
}

fn checksum(mut file: impl Read) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&block[..n]),
        }
    }
}

/// Whether the sealed layers are what was sealed; `Err` is a sentence.
pub fn check(microvm_dir: &Path, layers: &[Part]) -> Result<(), String> {
    for layer in layers {
        let name = &layer.file;
        let file = File::open(dir(microvm_dir).join(name)).map_err(|error| format!("the disk layer {name} cannot be opened: {error}"))?;
        let bytes = file.metadata().map_err(|error| format!("the disk layer {name} cannot be looked at: {error}"))?.len();
        if bytes != layer.bytes {
            return Err(format!("the disk layer {name} has {bytes} bytes and should have {}", layer.bytes));
        }
        if let Some(wanted) = layer.crc32 {
            let found = checksum(file).map_err(|error| format!("the disk layer {name} cannot be read: {error}"))?;
            if found != wanted {
                return Err(format!("the checksum of the disk layer {name} is wrong"));
            }
        }
    }
    Ok(())
}

/// Removes layers of generations before `running` that are not among `keep`.
pub fn remove_older(microvm_dir: &Path, running: Generation, keep: &[String]) -> io::Result<()> {
    let entries = match fs::read_dir(dir(microvm_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let generation = name.to_str().and_then(|name| name.strip_suffix(".qcow2")?.parse().ok()).map(Generation);
        // Later layers may be those of a restore that is going on.
        if generation.is_some_and(|generation| generation < running) && !keep.iter().any(|kept| **kept == *name) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes an empty qcow2 (version 3) of this size. By hand, since a `qemu-img` process would be a fifth of a wake.
///
/// Clusters of 64 KiB: 0 header, 1 refcount table, 2 first refcount block, 3… L1 table. No backing name: see the module.
fn create_overlay(path: &Path, virtual_bytes: u64) -> io::Result<()> {
    let l1_entries = virtual_bytes.div_ceil(CLUSTER * (CLUSTER / 8));
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER).max(1);
    let used_clusters = 3 + l1_clusters;
    let mut header = Vec::with_capacity(112);
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes());
    header.extend(0u64.to_be_bytes()); // Backing file offset: none.
    header.extend(0u32.to_be_bytes()); // Backing file name length.
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(virtual_bytes.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // No encryption.
    header.extend((l1_entries as u32).to_be_bytes());
    header.extend((3 * CLUSTER).to_be_bytes()); // L1 table.
    header.extend(CLUSTER.to_be_bytes()); // Refcount table.
    header.extend(1u32.to_be_bytes()); // Clusters of the refcount table.
    header.extend(0u32.to_be_bytes()); // No internal snapshots,
    header.extend(0u64.to_be_bytes()); // and no table of them.
    header.extend([0; 24]); // No incompatible, compatible or autoclear features.
    header.extend(4u32.to_be_bytes()); // Refcounts of 2^4 bits.
    header.extend(104u32.to_be_bytes()); // Length of this header, without the extensions.
    header.extend([0; 8]); // The extension that ends the extensions.
    let mut file = File::create_new(path)?;
    file.write_all(&header)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    let refcounts: Vec<u8> = (0..used_clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&refcounts, 2 * CLUSTER)?;
    file.set_len(used_clusters * CLUSTER)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn info(path: &Path) -> Value {
        let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path).status().unwrap();
        assert!(check.success());
        let output = Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2"]).arg(path).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[test]
    fn qemu_finds_no_fault_in_an_empty_layer() {
        let dir = tempfile::tempdir().unwrap();
        for (name, size) in [("small", 1 << 20), ("usual", 8 << 30), ("odd", (8 << 30) + 512), ("huge", 16 << 40)] {
            let path = dir.path().join(name);
            create_overlay(&path, size).unwrap();
            assert_eq!(info(&path)["virtual-size"], size);
        }
    }

    #[test]
    fn damaged_layers_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(1 << 30).unwrap();
        let layers = Layers::create(dir.path(), &image, Vec::new(), Generation(0)).unwrap();
        let sealed = layers.seal().unwrap();
        assert_eq!(check(dir.path(), &sealed), Ok(()));

        let path = dir.path().join("disk/0.qcow2");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..100]).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("bytes"));
        let mut flipped = whole.clone();
        flipped[70_000] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("checksum"));
        fs::remove_file(&path).unwrap();
        assert!(check(dir.path(), &sealed).unwrap_err().contains("opened"));
    }

    #[test]
    fn a_restore_that_is_tried_again_begins_with_an_empty_top() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(1 << 30).unwrap();
        let layers = Layers::create(dir.path(), &image, Vec::new(), Generation(1)).unwrap();
        fs::write(layers.top_path(), b"garbage").unwrap();
        let again = Layers::create(dir.path(), &image, Vec::new(), Generation(1)).unwrap();
        assert_eq!(info(&again.top_path())["virtual-size"], 1 << 30);
        remove_older(dir.path(), Generation(1), &[]).unwrap();
        assert!(again.top_path().exists());
        remove_older(dir.path(), Generation(2), &["1.qcow2".to_owned()]).unwrap();
        assert!(again.top_path().exists());
        remove_older(dir.path(), Generation(2), &[]).unwrap();
        assert!(!again.top_path().exists());
    }
}
