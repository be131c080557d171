//! Damage, and its repair.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// One way to damage a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit, at this part of the length.
    Flip { eighths: u64 },
    /// Half of it is gone.
    Truncate,
    /// Nothing of it is left.
    Empty,
    /// It is not there.
    Remove,
}

/// All of them.
pub const ALL: [Damage; 7] = [
    Damage::Flip { eighths: 0 },
    Damage::Flip { eighths: 3 },
    Damage::Flip { eighths: 6 },
    Damage::Flip { eighths: 8 },
    Damage::Truncate,
    Damage::Empty,
    Damage::Remove,
];

/// A file that is damaged for as long as this lives. The whole one waits beside it: it may be long and sparse.
pub struct Damaged {
    path: PathBuf,
    whole: PathBuf,
}

impl Damaged {
    /// Damages it.
    pub fn new(path: &Path, damage: Damage) -> io::Result<Self> {
        let name = path.file_name().expect("a file has a name").to_string_lossy();
        let damaged = Self { path: path.to_owned(), whole: path.with_file_name(format!(".whole-{name}")) };
        fs::rename(path, &damaged.whole)?;
        let whole = File::open(&damaged.whole)?;
        let length = whole.metadata()?.len();
        match damage {
            Damage::Flip { eighths } => {
                let copy = copy(&whole, length, path)?;
                let at = (length / 8 * eighths).min(length - 1);
                let mut byte = [0];
                copy.read_exact_at(&mut byte, at)?;
                // The lowest bit but one: it never turns one blank into another.
                byte[0] ^= 2;
                copy.write_all_at(&byte, at)?;
            }
            Damage::Truncate => {
                copy(&whole, length / 2, path)?;
            }
            Damage::Empty => {
                File::create(path)?;
            }
            Damage::Remove => {}
        }
        Ok(damaged)
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        fs::rename(&self.whole, &self.path).expect("the work directory is writable");
    }
}

/// Copies the first `length` bytes, holes as holes.
fn copy(from: &File, length: u64, to: &Path) -> io::Result<File> {
    let to = File::options().read(true).write(true).create_new(true).open(to)?;
    to.set_len(length)?;
    let (mut at, mut block) = (0, vec![0; 1 << 20]);
    while at < length {
        at = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(at) if at < length => at,
            _ => break,
        };
        let wanted = usize::try_from(length - at).unwrap_or(usize::MAX).min(block.len());
        from.read_exact_at(&mut block[..wanted], at)?;
        to.write_all_at(&block[..wanted], at)?;
        at += wanted as u64;
    }
    Ok(to)
}

/// Every file of a sleeping microVM but its logs.
pub fn snapshot_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("the microVM has a directory") {
        let path = entry.expect("the directory can be read").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "log") {
                found.extend(snapshot_files(&path));
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}
