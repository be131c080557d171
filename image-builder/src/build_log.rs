//! The log of one build, and the end of it that goes into a failure.
//!
//! Owns: the log file and its bound. Never interprets what is logged.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    path::Path,
};

/// A build that prints more is cut in the file, not ended.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The log file of a build, as it grows. Losing a line of it never fails a build.
pub(crate) struct BuildLog {
    file: File,
    written: u64,
}

impl BuildLog {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::create(path)?, written: 0 })
    }

    /// A line of output.
    pub fn line(&mut self, text: &str) {
        let size = text.len() as u64 + 1;
        if self.written > MAX_FILE_BYTES {
            return;
        }
        let text = if self.written + size > MAX_FILE_BYTES { "… the rest of this log is left out: it is longer than 16 MiB" } else { text };
        self.written += size;
        // One write per line, so that a reader never sees half of one.
        if let Err(error) = self.file.write_all(format!("{text}\n").as_bytes()) {
            tracing::warn!(%error, "a line of a build log is lost");
            self.written = MAX_FILE_BYTES + 1;
        }
    }

    /// A line of ours.
    pub fn note(&mut self, text: &str) {
        for text in text.lines() {
            self.line(&format!("dormouse: {text}"));
        }
    }
}

/// The last lines of some output.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    lines: VecDeque<String>,
}

impl Tail {
    /// How many lines are kept.
    pub const LINES: usize = 400;
    /// What is shown of one line.
    const SHOWN_CHARS: usize = 300;

    pub fn push(&mut self, line: &str) {
        if self.lines.len() == Self::LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }

    pub fn clear(&mut self) {
        self.lines.clear();
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }

    /// The last `n` lines, each cut to what a person reads.
    pub fn last(&self, n: usize) -> String {
        let shown = self.iter().skip(self.lines.len().saturating_sub(n)).map(|line| line.chars().take(Self::SHOWN_CHARS).collect::<String>());
        shown.collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_bounded_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("build.log");
        let mut log = BuildLog::create(&path).unwrap();
        for _ in 0..20 {
            log.line(&"x".repeat(1 << 20));
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= MAX_FILE_BYTES + 200);
        assert_eq!(text.matches("the rest of this log").count(), 1);
    }

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::default();
        for n in 0..1000 {
            tail.push(&n.to_string());
        }
        assert_eq!(tail.last(2), "998\n999");
        assert_eq!(tail.iter().count(), Tail::LINES);
    }
}
