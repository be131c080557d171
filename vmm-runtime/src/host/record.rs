//! Who runs what: `<microVM>/process.json`, and `owner.json` in the directory of the process.
//!
//! Owns: what a later `serve` needs to adopt a process, or to know that nobody will. Neither file is durable: after a
//! restart of the host there is no process either.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use model::{Egress, Generation, MicrovmId};
use serde::{Deserialize, Serialize};

use super::process::Identity;
use crate::snapshot::{atomic, manifest::Part};

const RECORD: &str = "process.json";
const OWNER: &str = "owner.json";

/// How far a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The guest has not been told who it is; nobody may talk to it.
    Starting,
    /// It runs.
    Running,
}

/// The process of a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which process.
    pub identity: Identity,
    /// Which generation it is.
    pub generation: Generation,
    /// How far it is.
    pub stage: Stage,
    /// The sealed disk layers under its own.
    pub sealed_layers: Vec<Part>,
    /// Where it may connect to.
    #[serde(default)]
    pub egress: Egress,
    /// The ARN of its execution role.
    #[serde(default)]
    pub role: Option<String>,
}

/// The microVM that a process belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its id.
    pub id: MicrovmId,
    /// Its directory.
    pub dir: PathBuf,
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("records have string keys only, and writing to memory cannot fail")
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Claims a process for a microVM, and then tells the microVM.
pub fn write(id: MicrovmId, dir: &Path, record: &Record) -> io::Result<()> {
    atomic::replace_file(&record.identity.dir.join(OWNER), &json(&Owner { id, dir: dir.to_owned() }))?;
    atomic::replace_file(&dir.join(RECORD), &json(record))
}

/// The record of a microVM. One that cannot be understood is none.
pub fn of_microvm(dir: &Path) -> io::Result<Option<Record>> {
    read(&dir.join(RECORD))
}

/// Whose process it is: claimed by a microVM whose own record agrees.
pub fn owner_of(process_dir: &Path) -> Option<Owner> {
    let owner: Owner = read(&process_dir.join(OWNER)).ok()??;
    let record = of_microvm(&owner.dir).ok()??;
    (record.identity.dir == process_dir).then_some(owner)
}

/// Makes the microVM forget the process of this directory, which has ended: its own record, if it is of that process, and the half
/// of one that a `serve` which was killed has left. Not for a microVM that is being started.
pub fn disown(process_dir: &Path) {
    let Ok(Some(owner)) = read::<Owner>(&process_dir.join(OWNER)) else { return };
    let _ = fs::remove_file(atomic::half_of(&owner.dir.join(RECORD)));
    if owner_of(process_dir).is_some() {
        remove(&owner.dir);
    }
}

/// Forgets the process of a microVM.
pub fn remove(dir: &Path) {
    match fs::remove_file(dir.join(RECORD)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "the record of an ended process cannot be removed");
        }
        _ => {}
    }
}
