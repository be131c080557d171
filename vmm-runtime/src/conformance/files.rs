//! Damage, and its repair.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// One way to damage a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit, at this part of the length.
    Flip { eighths: usize },
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

/// A file that is damaged for as long as this lives.
pub struct Damaged {
    path: PathBuf,
    whole: Vec<u8>,
}

impl Damaged {
    /// Damages it.
    pub fn new(path: &Path, damage: Damage) -> io::Result<Self> {
        let whole = fs::read(path)?;
        match damage {
            Damage::Flip { eighths } => {
                let mut flipped = whole.clone();
                let at = (flipped.len() * eighths / 8).min(flipped.len() - 1);
                // The lowest bit but one: it never turns one blank into another.
                flipped[at] ^= 2;
                fs::write(path, flipped)?;
            }
            Damage::Truncate => fs::write(path, &whole[..whole.len() / 2])?,
            Damage::Empty => fs::write(path, [])?,
            Damage::Remove => fs::remove_file(path)?,
        }
        Ok(Self { path: path.to_owned(), whole })
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        fs::write(&self.path, &self.whole).expect("the work directory is writable");
    }
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
