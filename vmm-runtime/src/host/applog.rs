//! What the app says on stdout and stderr, kept in `<microVM>/log/app.log` within a bound.
//!
//! Owns: the two files and their bound. Never holds a guest up: what cannot be written is lost, and told once.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use crate::engine::NO_OUTPUT;

/// What the log of one microVM may take unless the operator says otherwise; `[log] microvm_bytes` has the reason.
pub const DEFAULT_LOG_BYTES: u64 = 8 << 20;

struct Current {
    file: File,
    bytes: u64,
}

/// The log of one microVM. Trouble with it is reported once and never felt by the guest.
pub(super) struct AppLog {
    path: PathBuf,
    /// A file that has grown to this becomes `app.log.1` in place of an older one.
    rotate_at: u64,
    /// `None`: nothing is kept (any more).
    current: Mutex<Option<Current>>,
}

impl AppLog {
    /// Goes on where an earlier one of the microVM was. Both files together take at most `bytes`.
    pub fn open(microvm_dir: &Path, bytes: u64) -> Self {
        let path = microvm_dir.join("log/app.log");
        let rotate_at = (bytes / 2).max(1);
        let wanted = !microvm_dir.join(NO_OUTPUT).exists();
        let current = if wanted { open(&path).inspect_err(|error| complain(&path, error)).ok() } else { None };
        Self { path, rotate_at, current: Mutex::new(current) }
    }

    pub fn append(&self, mut output: &[u8]) {
        let mut current = self.current.lock();
        while let Some(log) = current.as_mut()
            && !output.is_empty()
        {
            // A file never grows beyond its half, however much comes at a time.
            let room = usize::try_from(self.rotate_at.saturating_sub(log.bytes)).unwrap_or(usize::MAX);
            let (now, later) = output.split_at(output.len().min(room));
            output = later;
            let written = log.file.write_all(now).and_then(|()| {
                log.bytes += now.len() as u64;
                if log.bytes >= self.rotate_at {
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

    fn sizes(dir: &Path) -> Vec<(String, u64)> {
        let mut sizes: Vec<_> =
            fs::read_dir(dir.join("log")).unwrap().map(|entry| entry.unwrap()).map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect();
        sizes.sort();
        sizes
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..11u8 {
            // Opened anew each time: a restart goes on where it was.
            AppLog::open(dir.path(), 8 << 20).append(&vec![round; 1 << 20]);
        }
        assert_eq!(sizes(dir.path()), [("app.log".to_owned(), 3 << 20), ("app.log.1".to_owned(), 4 << 20)]);
        assert_eq!(fs::read(dir.path().join("log/app.log")).unwrap().last(), Some(&10));
    }

    #[test]
    fn one_large_piece_keeps_the_bound_and_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = AppLog::open(dir.path(), 1000);
        let flood: Vec<u8> = (0..12_345).map(|n| (n / 100) as u8).collect();
        log.append(&flood);
        assert_eq!(sizes(dir.path()), [("app.log".to_owned(), 345), ("app.log.1".to_owned(), 500)]);
        let kept = [fs::read(dir.path().join("log/app.log.1")).unwrap(), fs::read(dir.path().join("log/app.log")).unwrap()].concat();
        assert_eq!(kept, flood[12_345 - 845..]);
    }

    #[test]
    fn nothing_is_kept_where_nothing_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(NO_OUTPUT), "").unwrap();
        AppLog::open(dir.path(), 1000).append(b"a secret");
        assert!(!dir.path().join("log").exists());
    }
}
