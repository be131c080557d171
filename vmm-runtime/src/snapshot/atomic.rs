//! Files and directories that appear whole or not at all.
//!
//! The order of a commit: write everything into a `tmp-…` directory, fsync each file, write the manifest last, fsync it,
//! fsync the directory, rename it, fsync the parent. The rename is the commit; what it did not reach is a leftover that
//! [`remove_leftovers`] ends.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

const PREFIX: &str = "tmp-";

/// A directory being filled. Removed when dropped, unless it was committed.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    committed: bool,
}

impl Staging {
    /// A fresh directory in `parent`.
    pub fn create(parent: &Path) -> io::Result<Self> {
        let path = parent.join(format!("{PREFIX}{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&path)?;
        Ok(Self { path, committed: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file into it, durably.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create_new(self.path.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// Gives the directory its final name, durably. Every file in it must have been synced. An error after the rename
    /// undoes the rename, so that "failed" never means "perhaps there".
    pub fn commit(mut self, to: &Path) -> io::Result<()> {
        sync_dir(&self.path)?;
        // A rename onto an empty directory would succeed; a commit must never replace anything.
        if fs::symlink_metadata(to).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} exists already", to.display())));
        }
        fs::rename(&self.path, to)?;
        if let Err(error) = sync_parent(to) {
            fs::rename(to, &self.path)?;
            return Err(error);
        }
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is a leftover that the next start removes.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the name of a file or directory durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    sync_dir(parent(path))
}

/// Makes the content of a file durable.
pub fn sync_file(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Replaces a small file in one step. Not durable: for what means nothing after a restart of the host.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let half = half_of(path);
    fs::write(&half, bytes)?;
    fs::rename(&half, path)
}

/// How a file is named while [`replace_file`] writes it.
pub fn half_of(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

/// Removes what writers that were killed left in a directory.
pub fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_commit_leaves_something() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::create(dir.path()).unwrap();
        staging.write("a", b"a").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        let staging = Staging::create(dir.path()).unwrap();
        staging.write("a", b"a").unwrap();
        staging.commit(&dir.path().join("gen-0")).unwrap();
        assert_eq!(fs::read(dir.path().join("gen-0/a")).unwrap(), b"a");
    }

    #[test]
    fn a_commit_never_replaces_anything() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("gen-0");
        fs::create_dir(&to).unwrap();
        let staging = Staging::create(dir.path()).unwrap();
        assert_eq!(staging.commit(&to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_go_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("tmp-1/deep")).unwrap();
        fs::create_dir(dir.path().join("gen-1")).unwrap();
        remove_leftovers(dir.path()).unwrap();
        assert!(dir.path().join("gen-1").exists() && !dir.path().join("tmp-1").exists());
    }
}
