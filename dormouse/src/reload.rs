//! What is read again while the node runs: the certificate, the token keys, the access keys, the limits.
//!
//! Owns: when they are read (SIGHUP, or a file that has changed and has been left alone for a poll), the record of it in
//! the log and in `node_reloads_total`. A fault in one does not keep the others from being read, and what is in force stays
//! in force until something better has been read whole.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use model::chain;
use prometheus::{IntCounterVec, Opts};

/// How often files are looked at. A change is read at the next look that finds the file as the one before it did.
pub const POLL: Duration = Duration::from_secs(1);

/// All that can be read again.
pub struct Reloads {
    items: Vec<Item>,
    total: IntCounterVec,
}

struct Item {
    what: &'static str,
    files: Vec<PathBuf>,
    read: Box<dyn FnMut() -> Result<()> + Send>,
    /// As it was when it was read last, and when it was looked at last.
    loaded: Vec<Look>,
    seen: Vec<Look>,
}

/// A file as it was at one time; `None`: it was not there.
type Look = Option<(u64, u64, i64, i64, u64)>;

fn look(path: &Path) -> Look {
    let data = fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.mtime(), data.mtime_nsec(), data.len()))
}

impl Reloads {
    /// Nothing yet.
    pub fn new(registry: &prometheus::Registry) -> Result<Self> {
        let total = IntCounterVec::new(Opts::new("node_reloads_total", "Files read again while the node runs."), &["what", "outcome"])?;
        registry.register(Box::new(total.clone()))?;
        Ok(Self { items: Vec::new(), total })
    }

    /// One more thing, which has just been read from these files.
    pub fn add(&mut self, what: &'static str, files: Vec<PathBuf>, read: impl FnMut() -> Result<()> + Send + 'static) {
        for outcome in ["done", "failed"] {
            self.total.with_label_values(&[what, outcome]);
        }
        let loaded: Vec<Look> = files.iter().map(|file| look(file)).collect();
        self.items.push(Item { what, files, read: Box::new(read), seen: loaded.clone(), loaded });
    }

    /// Reads everything.
    pub fn all(&mut self, why: &str) {
        for item in &mut self.items {
            item.loaded = item.look();
            item.reload(why, &self.total);
        }
    }

    /// Reads what has changed.
    pub fn changed(&mut self) {
        for item in &mut self.items {
            let now = item.look();
            let settled = now == item.seen;
            item.seen = now;
            if settled && item.seen != item.loaded {
                // Also if it fails: the same bad file is told of once.
                item.loaded.clone_from(&item.seen);
                item.reload("it has changed", &self.total);
            }
        }
    }
}

impl Item {
    fn look(&self) -> Vec<Look> {
        self.files.iter().map(|file| look(file)).collect()
    }

    fn reload(&mut self, why: &str, total: &IntCounterVec) {
        let what = self.what;
        match (self.read)() {
            Ok(()) => {
                total.with_label_values(&[what, "done"]).inc();
                tracing::info!(what, why, "read again, and in force from now on");
            }
            Err(error) => {
                total.with_label_values(&[what, "failed"]).inc();
                tracing::error!(what, why, error = chain(error.as_ref()), "could not be read again; what was in force before stays in force");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn count(reloads: &Reloads, what: &str, outcome: &str) -> u64 {
        reloads.total.with_label_values(&[what, outcome]).get()
    }

    #[test]
    fn a_changed_file_is_read_once_it_is_left_alone_and_a_fault_stops_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::write(&one, "1").unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut reloads = Reloads::new(&prometheus::Registry::new()).unwrap();
        reloads.add("bad", vec![one.clone()], || anyhow::bail!("no good"));
        let (note, path) = (seen.clone(), one.clone());
        reloads.add("good", vec![one.clone(), two.clone()], move || {
            note.lock().unwrap().push(fs::read_to_string(&path)?);
            Ok(())
        });
        reloads.changed();
        assert_eq!((count(&reloads, "bad", "failed"), count(&reloads, "good", "done")), (0, 0));
        fs::write(&one, "22").unwrap();
        reloads.changed();
        // It is still being written.
        fs::write(&one, "333").unwrap();
        reloads.changed();
        assert_eq!(count(&reloads, "good", "done"), 0);
        for _ in 0..3 {
            reloads.changed();
        }
        assert_eq!((count(&reloads, "bad", "failed"), count(&reloads, "good", "done")), (1, 1));
        // A file that appears is a change, and so is a file that goes.
        fs::write(&two, "").unwrap();
        reloads.changed();
        reloads.changed();
        assert_eq!(count(&reloads, "good", "done"), 2);
        fs::remove_file(&one).unwrap();
        reloads.changed();
        reloads.changed();
        assert_eq!((count(&reloads, "good", "done"), count(&reloads, "good", "failed")), (2, 1));
        reloads.all("SIGHUP");
        assert_eq!((count(&reloads, "bad", "failed"), count(&reloads, "good", "failed")), (3, 2));
        assert_eq!(*seen.lock().unwrap(), ["333", "333"]);
    }
}
