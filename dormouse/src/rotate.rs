//! `dormouse rotate-token-key`: a fresh key mints from now on, and a node that runs takes it up without a restart.
//!
//! Owns: the order of the two steps. The ring's file is changed first; a node that never reads it again refuses nobody, it
//! only goes on with the old key.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use token::KeyRing;

use crate::env::NodeFile;

/// Rotates, and tells the node.
pub fn run(data_dir: &Path) -> Result<()> {
    KeyRing::open_existing(&data_dir.join("token-keys.json"))?.rotate()?;
    match running_node(data_dir)? {
        Some((pid, node)) => {
            pidfd_send_signal(&node, Signal::HUP).with_context(|| {
                format!("the key was rotated, but the node (process {pid}) was not told; send it SIGHUP within a minute, as its user or as root")
            })?;
            println!("rotated; the node (process {pid}) has been told, and what the old key has minted stays good for its whole life");
        }
        None => println!("rotated; no node runs with {}", data_dir.display()),
    }
    Ok(())
}

/// The process that serves from this directory: the one `node.json` names, if it holds the directory's lock file open. A
/// process id alone may have gone to somebody else.
fn running_node(data_dir: &Path) -> Result<Option<(u32, OwnedFd)>> {
    let Ok(NodeFile { pid, .. }) = NodeFile::read(data_dir) else { return Ok(None) };
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    // Opened before the look at its files, so that they and the signal are one process's.
    let node = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(node) => node,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("looking at the process {pid}")),
    };
    let lock = match File::open(data_dir.join("lock")).and_then(|lock| lock.metadata()) {
        Ok(lock) => (lock.dev(), lock.ino()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("looking at the lock of the data directory"),
    };
    let files = fs::read_dir(format!("/proc/{pid}/fd"))
        .with_context(|| format!("the key was rotated, but whether the process {pid} is the node cannot be seen; send the node SIGHUP within a minute"))?;
    let holds = files.filter_map(|file| fs::metadata(file.ok()?.path()).ok()).any(|file| (file.dev(), file.ino()) == lock);
    Ok(holds.then_some((pid, node)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_a_ring_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let error = run(dir.path()).unwrap_err();
        assert!(error.to_string().contains("dormouse serve makes it"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_the_process_that_holds_the_lock_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let node = |pid| {
            let text = |text: &str| text.to_owned();
            NodeFile { pid, edge: text(""), api: text(""), admin: text(""), region: text(""), domain_suffix: text(""), ca: text("") }
        };
        assert!(running_node(dir.path()).unwrap().is_none(), "no node.json");
        node(std::process::id()).write(dir.path()).unwrap();
        assert!(running_node(dir.path()).unwrap().is_none(), "no lock file");
        fs::write(dir.path().join("lock"), "").unwrap();
        assert!(running_node(dir.path()).unwrap().is_none(), "this process does not hold it");
        let _held = File::open(dir.path().join("lock")).unwrap();
        assert_eq!(running_node(dir.path()).unwrap().unwrap().0, std::process::id());
        // Above any process id that Linux gives.
        node(1 << 30).write(dir.path()).unwrap();
        assert!(running_node(dir.path()).unwrap().is_none(), "a process that is no more");
    }
}
