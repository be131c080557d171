//! A redb file that is there whole or not at all.
//!
//! Owns: the making of the file. redb writes a new file in several steps, and one that is cut off in between is no database to it
//! any more: a node that was killed in its very first start would never start again.

use std::{fs, io, path::Path};

use redb::{Database, DatabaseError, StorageError};
use vmm_runtime::snapshot::atomic;

/// Opens the file; makes it if it is missing, by another name first. Only one process at a time may do that: the caller holds the
/// lock of the data directory.
pub fn open(path: &Path) -> Result<Database, DatabaseError> {
    let failed = |error: io::Error| DatabaseError::Storage(StorageError::Io(error));
    if !path.try_exists().map_err(failed)? {
        let half = path.with_extension("redb.new");
        match fs::remove_file(&half) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        drop(Database::create(&half)?);
        fs::rename(&half, path).map_err(failed)?;
        atomic::sync_parent(path).map_err(failed)?;
    }
    Database::create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_start_that_was_cut_off_is_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        // What redb has written before its magic number. As the file itself it is refused for ever.
        fs::write(dir.path().join("registry.redb.new"), [0; 4096]).unwrap();
        drop(open(&path).unwrap());
        drop(open(&path).unwrap());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["registry.redb"]);
    }
}
