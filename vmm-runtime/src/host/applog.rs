//! What the app says on stdout and stderr, kept in `<microVM>/log/app.log` within a bound.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

/// A file that has grown to this becomes `app.log.1`, so that a microVM's log takes at most twice as much.
const MAX_BYTES: u64 = 4 << 20;

struct Current {
    file: File,
    bytes: u64,
}

/// The log of one microVM. Trouble with it is reported once and never felt by the guest.
pub(super) struct AppLog {
    path: PathBuf,
    current: Mutex<Option<Current>>,
}

impl AppLog {
    pub fn open(microvm_dir: &Path) -> Self {
        let path = microvm_dir.join("log/app.log");
        let current = open(&path).inspect_err(|error| complain(&path, error)).ok();
        Self { path, current: Mutex::new(current) }
    }

    pub fn append(&self, output: &[u8]) {
        let mut current = self.current.lock();
        let Some(log) = current.as_mut() else { return };
        let written = log.file.write_all(output).and_then(|()| {
            log.bytes += output.len() as u64;
            if log.bytes >= MAX_BYTES {
                fs::rename(&self.path, self.path.with_extension("log.1"))?;
                *log = open(&self.path)?;
            }
            Ok(())
        });
        if let Err(error) = written {
            complain(&self.path, &error);
            *current = None;
        }
    }
}

fn open(path: &Path) -> io::Result<Current> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let bytes = file.metadata()?.len();
    Ok(Current { file, bytes })
}

fn complain(path: &Path, error: &io::Error) {
    tracing::warn!(path = %path.display(), %error, "the app's output cannot be kept");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..11u8 {
            // Opened anew each time: a restart goes on where it was.
            AppLog::open(dir.path()).append(&vec![round; 1 << 20]);
        }
        let log = dir.path().join("log");
        let total: u64 = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(total, 7 << 20);
        assert_eq!(fs::read(log.join("app.log")).unwrap().last(), Some(&10));
    }
}
