//! `manifest.json`: what belongs together in one snapshot, and what a host must be to restore it.
//!
//! On disk it is `{"crc32":"…","manifest":{…}}`, the checksum being that of the inner object as this program writes it.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use model::{MicrovmId, Port};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::engine::{ImageSnapshot, SnapshotRecord};

/// Its name in every snapshot directory.
pub const FILE: &str = "manifest.json";

/// The format of manifests and of the parts they name. Another one is refused.
pub const FORMAT: u32 = 1;

/// No manifest is nearly as long.
const MAX_BYTES: u64 = 1 << 20;

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name in the snapshot directory (or, for a layer, in the microVM's disk directory).
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Checksum; what it covers is said where the part is named. `None`: only the length is checked.
    pub crc32: Option<u32>,
}

impl Part {
    /// A plain name is the only thing that a manifest may point at.
    fn has_plain_name(&self) -> bool {
        !self.file.is_empty() && !self.file.contains(['/', '\0']) && self.file != "." && self.file != ".."
    }
}

/// What must be the same at a restore. Device state of one machine loaded into another is garbage that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Name of the engine.
    pub engine: String,
    /// Version of the VMM.
    pub vmm: String,
    /// The virtual machine's description, or its SHA-256 (for QEMU that of its command line without paths).
    pub machine: String,
    /// What of the host's CPU shows in the guest.
    pub cpu: String,
}

impl Fingerprint {
    /// `Err` says what differs, as a sentence.
    pub fn check(&self, here: &Self) -> Result<(), String> {
        let Self { engine, vmm, machine, cpu } = self;
        for (what, saved, here) in [
            ("by the engine", engine, &here.engine),
            ("by the VMM version", vmm, &here.vmm),
            ("of the machine", machine, &here.machine),
            ("on the CPU", cpu, &here.cpu),
        ] {
            if saved != here {
                return Err(format!("it was made {what} `{saved}`, and here it is `{here}`"));
            }
        }
        Ok(())
    }
}

/// An image snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageManifest {
    /// [`FORMAT`].
    pub format: u32,
    /// What a host must be.
    pub fingerprint: Fingerprint,
    /// Kernel and initramfs that the guest booted with. For people: they are in the memory and not loaded again.
    pub guest: String,
    /// Sizes.
    pub snapshot: ImageSnapshot,
    /// The app's ports.
    pub exposed: Vec<Port>,
    /// Device state; the checksum is of the whole file.
    pub state: Part,
    /// Memory, flat and sparse; the checksum is of its data (zero pages left out).
    pub memory: Part,
    /// Root disk, raw and sparse; the checksum is of its data (zero pages left out).
    pub disk: Part,
}

/// A snapshot of one microVM: what differs from the image it is a clone of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicrovmManifest {
    /// [`FORMAT`].
    pub format: u32,
    /// What a host must be.
    pub fingerprint: Fingerprint,
    /// Whose it is.
    pub id: MicrovmId,
    /// Checksum of the image's manifest: a difference fits one base only.
    pub image_crc32: u32,
    /// What was written.
    pub record: SnapshotRecord,
    /// Device state; the checksum is of the whole file.
    pub state: Part,
    /// Memory difference; the checksum is that of its header, which binds the rest.
    pub memory: Part,
    /// Disk layers over the image's disk, the lowest first; the checksum is of the whole file, if it is small.
    pub layers: Vec<Part>,
}

/// What both kinds have.
pub trait Manifest: Serialize + DeserializeOwned {
    /// [`FORMAT`] at the time of writing.
    fn format(&self) -> u32;
    /// Every file it names.
    fn parts(&self) -> Vec<&Part>;
}

impl Manifest for ImageManifest {
    fn format(&self) -> u32 {
        self.format
    }
    fn parts(&self) -> Vec<&Part> {
        vec![&self.state, &self.memory, &self.disk]
    }
}

impl Manifest for MicrovmManifest {
    fn format(&self) -> u32 {
        self.format
    }
    fn parts(&self) -> Vec<&Part> {
        [&self.state, &self.memory].into_iter().chain(&self.layers).collect()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<T> {
    crc32: String,
    manifest: T,
}

/// Why a manifest was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is none.
    #[error("there is no {FILE}")]
    Missing,
    /// It could not be read.
    #[error("{FILE} cannot be read")]
    Read(#[source] io::Error),
    /// It is not what was written.
    #[error("{FILE} is damaged: {0}")]
    Damaged(String),
    /// Another version of this program wrote it.
    #[error("{FILE} is of format {found}, and this program reads format {FORMAT}")]
    Format {
        /// What it is.
        found: u32,
    },
}

fn text<T: Serialize>(manifest: &T) -> Vec<u8> {
    serde_json::to_vec(manifest).expect("manifests have string keys only, and writing to memory cannot fail")
}

/// The bytes of the file, and the checksum that stands for the manifest elsewhere.
pub fn encode<T: Manifest>(manifest: &T) -> (Vec<u8>, u32) {
    let crc32 = crc32fast::hash(&text(manifest));
    let mut bytes = serde_json::to_vec_pretty(&Envelope { crc32: format!("{crc32:08x}"), manifest }).expect("as in `text`");
    bytes.push(b'\n');
    (bytes, crc32)
}

/// Reads what [`encode`] wrote, and its checksum.
pub fn decode<T: Manifest>(bytes: &[u8]) -> Result<(T, u32), ManifestError> {
    /// Read first and leniently, so that another format is called that and not damage.
    #[derive(Deserialize)]
    struct Peek {
        manifest: PeekFormat,
    }
    #[derive(Deserialize)]
    struct PeekFormat {
        format: u32,
    }
    let damaged = |error: serde_json::Error| ManifestError::Damaged(error.to_string());
    let Peek { manifest: PeekFormat { format } } = serde_json::from_slice(bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(ManifestError::Format { found: format });
    }
    let Envelope { crc32, manifest } = serde_json::from_slice::<Envelope<T>>(bytes).map_err(damaged)?;
    let found = crc32fast::hash(&text(&manifest));
    if crc32 != format!("{found:08x}") {
        return Err(ManifestError::Damaged("its checksum is wrong".to_owned()));
    }
    if let Some(part) = manifest.parts().into_iter().find(|part| !part.has_plain_name()) {
        return Err(ManifestError::Damaged(format!("`{}` is no plain file name", part.file.escape_debug())));
    }
    Ok((manifest, found))
}

/// Reads the manifest in a snapshot directory.
pub fn read<T: Manifest>(dir: &Path) -> Result<(T, u32), ManifestError> {
    let file = File::open(dir.join(FILE)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ManifestError::Missing,
        _ => ManifestError::Read(error),
    })?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(ManifestError::Read)?;
    decode(&bytes)
}

#[cfg(test)]
mod tests {
    use model::Generation;
    use proptest::prelude::*;

    use super::*;

    fn part(file: &str) -> Part {
        Part { file: file.to_owned(), bytes: 7, crc32: Some(9) }
    }

    fn manifest(file: &str) -> MicrovmManifest {
        MicrovmManifest {
            format: FORMAT,
            fingerprint: Fingerprint { engine: "qemu".into(), vmm: "7.2".into(), machine: "ab".into(), cpu: "x".into() },
            id: MicrovmId::random(),
            image_crc32: 5,
            record: SnapshotRecord { generation: Generation(3), memory_bytes: 1, disk_bytes: 2, phases: Vec::new() },
            state: part("state"),
            memory: part("memory.diff"),
            layers: vec![part(file)],
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let written = manifest("0.qcow2");
        let (bytes, crc32) = encode(&written);
        assert_eq!(decode::<MicrovmManifest>(&bytes).unwrap(), (written, crc32));
    }

    #[test]
    fn a_manifest_points_at_nothing_outside() {
        for name in ["../other", "/etc/passwd", "..", ".", "", "a\0b"] {
            let (bytes, _) = encode(&manifest(name));
            assert!(matches!(decode::<MicrovmManifest>(&bytes), Err(ManifestError::Damaged(_))), "{name}");
        }
    }

    #[test]
    fn another_format_is_called_that() {
        let (bytes, _) = encode(&MicrovmManifest { format: FORMAT + 1, ..manifest("0.qcow2") });
        assert!(matches!(decode::<MicrovmManifest>(&bytes), Err(ManifestError::Format { found }) if found == FORMAT + 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode::<MicrovmManifest>(&bytes).is_err());
        }

        #[test]
        fn a_changed_byte_is_noticed_or_changes_nothing(at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let written = manifest("0.qcow2");
            let (mut bytes, _) = encode(&written);
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok((read, _)) = decode::<MicrovmManifest>(&bytes) {
                prop_assert_eq!(read, written);
            }
        }
    }
}
