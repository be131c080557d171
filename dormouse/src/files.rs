//! Small files of the data directory: written whole or not at all, private where they hold secrets.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result};

/// Makes a directory that only its owner may enter.
pub fn private_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| format!("making the directory {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).with_context(|| format!("closing the directory {} to others", path.display()))
}

/// Replaces a file atomically; only its owner may read it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, 0o600)
}

/// Replaces a file atomically; everyone may read it.
pub fn write_public(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, 0o644)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let name = path.file_name().expect("callers name a file").to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        File::open(path.parent().expect("a file has a directory"))?.sync_all()
    })();
    if written.is_err() {
        // The rename did not happen, so this is ours alone; what could not be written need not stay.
        let _ = fs::remove_file(&fresh);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

/// Removes what writers that were killed left in the data directory: the half of a small file bears the number of the process that
/// wrote it (here, and where the access keys are made), and may hold a key. Those of processes that live are theirs. To be called
/// by whoever holds the directory's lock.
pub fn remove_leftovers(data_dir: &Path) -> Result<()> {
    let of_the_dead = |name: &str| {
        let number = name.strip_prefix('.').and_then(|name| name.rsplit_once('.')).and_then(|(_, number)| number.parse::<u32>().ok());
        number.is_some_and(|pid| pid != std::process::id() && !Path::new("/proc").join(pid.to_string()).exists())
    };
    // Initramfs images are made by the node that holds the lock alone, in files that the crate `tempfile` names.
    let half_made = |name: &str| name.starts_with(".tmp");
    for place in ["", "tls", "guest"] {
        let is_left = |name: &str| if place == "guest" { half_made(name) } else { of_the_dead(name) };
        let dir = data_dir.join(place);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("listing {}", dir.display()))?,
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", dir.display()))?;
            if entry.file_name().to_str().is_some_and(is_left) {
                let path = entry.path();
                tracing::info!(path = %path.display(), "removing what a process that was killed had not written to its end");
                fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            }
        }
    }
    Ok(())
}

/// Reads a text file.
pub fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dead_left_goes_and_what_the_living_write_stays() {
        let dir = tempfile::tempdir().unwrap();
        for place in ["tls", "guest", "s3"] {
            fs::create_dir(dir.path().join(place)).unwrap();
        }
        // Above any process id that Linux gives.
        let goes = [".node.json.1073741824", "tls/.ca.key.1073741824", "guest/.tmpAb12Cd"];
        let mine = format!(".node.json.{}", std::process::id());
        let stays = ["node.json", ".token-keys.json.lock", "registry.redb", "tls/ca.key", "guest/initramfs-1.cpio", "s3/.tmp.1", &mine, ".1.x", ".x.1 "];
        for name in goes.iter().chain(&stays) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_leftovers(dir.path()).unwrap();
        assert!(goes.iter().all(|name| !dir.path().join(name).exists()));
        assert!(stays.iter().all(|name| dir.path().join(name).exists()));
    }
}
