//! Disk layers in QEMU's form: one qcow2 file each.
//!
//! Owns: the chain `image ← layer ← … ← top` as QEMU is told it, and merging. Chains are always told to QEMU whole, node by
//! node, so that the names inside the files are of no consequence.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    command::{Machine, ROOT_NODE},
    qmp::{Qmp, QmpError},
};
use crate::host::Layers;

/// The ending of a layer's file.
pub(super) const LAYER: &str = "qcow2";

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Node name of the image's disk.
const IMAGE_NODE: &str = "image";
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// What merging may take; a longer chain is better than a suspend without end.
const MERGE_LIMIT: Duration = Duration::from_secs(20);

/// Plugs the disk into a machine that waits for its state.
pub(super) async fn plug(layers: &Layers, image_disk: &Path, qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("blockdev-add", chain(layers, image_disk), COMMAND_LIMIT).await?;
    qmp.execute("device_add", Machine::disk_device(), COMMAND_LIMIT).await?;
    Ok(())
}

/// `no-flush`: what a guest flushes is worth nothing without the memory that goes with it, and a suspend makes both
/// durable together.
fn chain(layers: &Layers, image_disk: &Path) -> Value {
    let file = |path: &Path| json!({ "driver": "file", "filename": path, "discard": "unmap", "cache": { "no-flush": true } });
    let image = json!({ "driver": "raw", "node-name": IMAGE_NODE, "read-only": true, "file": file(image_disk) });
    let mut chain = image;
    for (index, layer) in layers.sealed().enumerate() {
        let node = format!("layer{index}");
        chain = json!({ "driver": "qcow2", "node-name": node, "read-only": true, "file": file(&layer), "backing": chain });
    }
    let file = file(&layers.top(LAYER));
    json!({ "driver": "qcow2", "node-name": ROOT_NODE, "discard": "unmap", "cache": { "no-flush": true }, "file": file, "backing": chain })
}

/// Copies the sealed layers into the top one, if there are many. The vCPUs are stopped. Whether this ends well or
/// not, the chain that QEMU has stays right; `Ok(true)` says that the sealed layers are not part of it any more.
pub(super) async fn merge(layers: &mut Layers, qmp: &Qmp, cancel: &CancellationToken) -> Result<bool, QmpError> {
    if !layers.want_merge() {
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
                end_merge(qmp).await?;
                continue;
            }
            () = &mut deadline, if !asked_to_end => {
                asked_to_end = true;
                end_merge(qmp).await?;
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
    layers.merged();
    Ok(true)
}

/// Asks the job to end; the event of its end follows. QEMU's refusal means that the job has just ended by itself, and that
/// the event is on its way or here.
async fn end_merge(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute("block-job-cancel", json!({ "device": "merge", "force": true }), COMMAND_LIMIT).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes an empty qcow2 (version 3) of this size. By hand, since a `qemu-img` process would be a fifth of a wake.
///
/// Clusters of 64 KiB: 0 header, 1 refcount table, 2 first refcount block, 3… L1 table. No backing name: see the module.
pub(super) fn create_overlay(path: &Path, virtual_bytes: u64) -> io::Result<()> {
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

    use model::Generation;

    use super::*;
    use crate::{qemu::qmp, snapshot::manifest::Part};

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

    /// A take-back comes in the instant in which the job ends by itself: QEMU says so, and refuses to cancel what is not there.
    #[tokio::test]
    async fn a_merge_that_ends_as_it_is_cancelled_is_a_merge() {
        let qemu = qmp::tests::server(|command| {
            let id = &command["id"];
            let said = match command["execute"].as_str() {
                Some("block-job-cancel") => format!(
                    "{{\"event\": \"BLOCK_JOB_COMPLETED\", \"data\": {{\"device\": \"merge\"}}}}\n{{\"id\": {id}, \"error\": {{\"desc\": \"Block job 'merge' not found\"}}}}\n"
                ),
                _ => format!("{{\"return\": {{}}, \"id\": {id}}}\n"),
            };
            Some(said.into_bytes())
        });
        let qmp = Qmp::start(qemu, COMMAND_LIMIT).await.unwrap();
        let sealed = (0..9).map(|layer| Part { file: format!("{layer}.{LAYER}"), bytes: 0, crc32: None }).collect();
        let mut layers = Layers::existing(Path::new("nowhere"), &[LAYER], sealed, Generation(9));
        assert!(layers.want_merge());
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert!(merge(&mut layers, &qmp, &cancel).await.unwrap());
        assert_eq!(layers.sealed_count(), 0);
    }
}
