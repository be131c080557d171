//! A zip as the artifact.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use rustix::fs::OFlags;
use zip::{ZipArchive, result::ZipError};

use super::{ArchiveError, EntryName, MAX_PATH, Tree, open_place, shown};

/// The end-of-central-directory record with the longest comment it can have, the zip64 locator and the zip64 record.
const TAIL_BYTES: u64 = 22 + 65_535 + 20 + 56;

/// File kinds in the upper bits of a unix mode.
const KIND_MASK: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;

pub(super) fn unpack(path: &Path, tree: &mut Tree) -> Result<(), ArchiveError> {
    let failed = |source| ArchiveError::Read { path: path.to_owned(), source };
    // NONBLOCK: what was a file may be a pipe by now.
    let mut file = File::from(open_place(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(ArchiveError::NotAZip { why: "it is not a regular file".to_owned() });
    }
    if metadata.len() > tree.limits.zip_bytes {
        return Err(ArchiveError::TooLarge { what: format!("the zip has more than {} MiB", tree.limits.zip_bytes >> 20) });
    }
    check_promised_entries(&mut file, metadata.len(), tree.limits.entries).map_err(failed)??;
    tree.packed_bytes = Some(metadata.len());

    let mut archive = ZipArchive::new(file).map_err(|error| ArchiveError::NotAZip { why: error.to_string() })?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|error| entry_error(index, error))?;
        let raw = entry.name_raw().to_vec();
        if entry.encrypted() {
            return Err(ArchiveError::Encrypted { name: shown(&raw) });
        }
        let Some(name) = EntryName::parse(&raw)? else { continue };
        let mode = entry.unix_mode();
        match mode.map(|mode| mode & KIND_MASK) {
            Some(SYMLINK) => {
                let mut target = Vec::new();
                let read = (&mut entry).take(MAX_PATH as u64 + 1).read_to_end(&mut target);
                read.map_err(|source| ArchiveError::Damaged { name: name.0.clone(), source })?;
                tree.link(name, &target)?;
            }
            _ if raw.ends_with(b"/") => tree.directory(&name, mode)?,
            Some(DIRECTORY) => tree.directory(&name, mode)?,
            None | Some(0 | REGULAR) => tree.file(&name, mode.filter(|mode| mode & 0o777 != 0), &mut entry)?,
            Some(_) => return Err(ArchiveError::Special { name: name.0 }),
        }
    }
    Ok(())
}

fn entry_error(index: usize, error: ZipError) -> ArchiveError {
    let name = format!("number {}", index + 1);
    match error {
        ZipError::UnsupportedArchive(ZipError::PASSWORD_REQUIRED) => ArchiveError::Encrypted { name },
        ZipError::Io(source) => ArchiveError::Damaged { name, source },
        other => ArchiveError::Damaged { name, source: std::io::Error::other(other) },
    }
}

/// Refuses an archive whose end promises more entries than are allowed, before a reader makes room for them.
///
/// Every record in the tail is looked at, whichever of them a reader would go by.
fn check_promised_entries(file: &mut File, len: u64, limit: usize) -> std::io::Result<Result<(), ArchiveError>> {
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    file.seek(SeekFrom::Start(0))?;

    // (entries, whether it is a zip64 record)
    let promised = |record: &[u8]| -> Option<(u64, bool)> {
        if record.starts_with(b"PK\x05\x06") {
            Some((u64::from(u16::from_le_bytes([*record.get(10)?, *record.get(11)?])), false))
        } else if record.starts_with(b"PK\x06\x06") {
            Some((u64::from_le_bytes(record.get(32..40)?.try_into().ok()?), true))
        } else {
            None
        }
    };
    let found: Vec<(u64, bool)> = (0..tail.len()).filter_map(|at| promised(&tail[at..])).collect();
    let has_zip64 = found.iter().any(|(_, zip64)| *zip64);
    // In the plain record 0xffff stands for "see the zip64 record".
    let too_many = |&(n, zip64): &(u64, bool)| n > limit as u64 && (zip64 || n != 0xffff || !has_zip64);
    Ok(if found.iter().all(|(_, zip64)| *zip64) {
        let why = if len == 0 { "it is empty" } else { "it has no end record; the upload may have been cut short" };
        Err(ArchiveError::NotAZip { why: why.to_owned() })
    } else if found.iter().any(too_many) {
        Err(ArchiveError::TooLarge { what: format!("it has more than {limit} entries") })
    } else {
        Ok(())
    })
}
