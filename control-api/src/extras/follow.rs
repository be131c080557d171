//! A log file as it grows and rotates, as a stream of bytes.
//!
//! Owns: the order `<log>.1` before `<log>`, what happens at a rotation, and the look for more. Never writes. A reader that is
//! slow holds nobody up: it keeps the files that it has open, and goes on with the oldest that is still there.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use tokio_util::sync::CancellationToken;

/// Bytes read at a time.
const PIECE: usize = 64 << 10;
/// How often a log is looked at for more: soon for a person, and a `stat` for the node.
const POLL: Duration = Duration::from_millis(200);

/// Which part of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The last so many lines; `None`: all that is kept.
    pub(crate) tail: Option<u64>,
    /// Whether to go on with what comes.
    pub(crate) follow: bool,
}

/// Says whether nothing can come any more.
pub(crate) type Ended = Arc<dyn Fn() -> bool + Send + Sync>;

/// The bytes. Ends with the log, if it is not followed; else when `ended` says so and all is read, or at `stop`.
pub(crate) fn stream(log: PathBuf, part: Part, ended: Ended, stop: CancellationToken) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let state = State { log, part, ended, stop, files: None };
    futures::stream::try_unfold(state, |mut state| async move {
        loop {
            // Asked before the look: what was written until then is read by it.
            let last_look = !state.part.follow || state.stop.is_cancelled() || (state.ended)();
            let (back, piece) = tokio::task::spawn_blocking(move || {
                let piece = state.read();
                (state, piece)
            })
            .await
            .map_err(io::Error::other)?;
            state = back;
            let piece = piece?;
            if !piece.is_empty() {
                return Ok(Some((piece, state)));
            }
            if last_look {
                return Ok(None);
            }
            tokio::select! {
                () = state.stop.cancelled() => {}
                () = tokio::time::sleep(POLL) => {}
            }
        }
    })
}

struct State {
    log: PathBuf,
    part: Part,
    ended: Ended,
    stop: CancellationToken,
    /// Oldest first; the last one is, or was, the file that grows. `None`: not looked at yet.
    files: Option<VecDeque<File>>,
}

impl State {
    /// The next bytes; none if there are none now.
    fn read(&mut self) -> io::Result<Bytes> {
        let files = match &mut self.files {
            Some(files) => files,
            None => {
                let mut files = open(&self.log, None)?;
                if let Some(lines) = self.part.tail {
                    tail(&mut files, lines)?;
                }
                self.files.insert(files)
            }
        };
        let mut piece = vec![0; PIECE];
        loop {
            if files.is_empty() {
                *files = open(&self.log, None)?;
            }
            // Before the read: nothing is written to a file once it has been renamed, so that what is read then is all of it.
            let rotated = files.len() == 1 && is_another(files.front(), &self.log)?;
            let Some(file) = files.front_mut() else { return Ok(Bytes::new()) };
            let read = file.read(&mut piece)?;
            if read > 0 {
                piece.truncate(read);
                return Ok(Bytes::from(piece));
            }
            if files.len() > 1 {
                files.pop_front();
            } else if rotated {
                let last = files.pop_front();
                *files = open(&self.log, last.as_ref())?;
            } else {
                return Ok(Bytes::new());
            }
        }
    }
}

/// The files that are there, oldest first, without `known` and what is older.
fn open(log: &Path, known: Option<&File>) -> io::Result<VecDeque<File>> {
    // The newer one first: a rotation in between shows it twice, not never.
    let newer = existing(log)?;
    let older = existing(&log.with_extension("log.1"))?;
    let same = |a: &File, b: &File| -> io::Result<bool> { Ok(identity(a)? == identity(b)?) };
    let mut files = VecDeque::new();
    if let Some(older) = older
        && known.map_or(Ok(true), |known| same(known, &older).map(|same| !same))?
    {
        files.push_back(older);
    }
    if let Some(newer) = newer
        && files.front().map_or(Ok(true), |older| same(older, &newer).map(|same| !same))?
        && known.map_or(Ok(true), |known| same(known, &newer).map(|same| !same))?
    {
        files.push_back(newer);
    }
    Ok(files)
}

fn existing(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the name means another file by now. One that is gone for good is not another one.
fn is_another(file: Option<&File>, log: &Path) -> io::Result<bool> {
    let Some(file) = file else { return Ok(false) };
    match std::fs::metadata(log) {
        Ok(now) => Ok(identity(file)? != (now.dev(), now.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts the files where their last lines begin. A last line without an end counts as one.
fn tail(files: &mut VecDeque<File>, lines: u64) -> io::Result<()> {
    let mut wanted = lines;
    let mut newest = true;
    let mut at = files.len();
    while at > 0 {
        at -= 1;
        let file = &mut files[at];
        let mut end = file.metadata()?.len();
        if end == 0 {
            continue;
        }
        let mut block = vec![0; PIECE];
        while end > 0 {
            let from = end.saturating_sub(PIECE as u64);
            let block = &mut block[..(end - from) as usize];
            file.read_exact_at(block, from)?;
            for (index, byte) in block.iter().enumerate().rev() {
                let position = from + index as u64 + 1;
                // The end of the very last line ends no line before it.
                let ends_last = newest;
                newest = false;
                if *byte != b'\n' || ends_last {
                    continue;
                }
                wanted = wanted.saturating_sub(1);
                if wanted == 0 {
                    file.seek(SeekFrom::Start(position))?;
                    files.drain(..at);
                    return Ok(());
                }
            }
            end = from;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, sync::atomic::{AtomicBool, Ordering}};

    use futures::StreamExt as _;

    use super::*;

    struct Log {
        dir: tempfile::TempDir,
        ended: Arc<AtomicBool>,
    }

    impl Log {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), ended: Arc::default() }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("app.log")
        }

        fn write(&self, text: &str) {
            File::options().create(true).append(true).open(self.path()).unwrap().write_all(text.as_bytes()).unwrap();
        }

        fn rotate(&self) {
            fs::rename(self.path(), self.dir.path().join("app.log.1")).unwrap();
            self.write("");
        }

        fn stream(&self, tail: Option<u64>, follow: bool) -> std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>> {
            let ended = Arc::clone(&self.ended);
            Box::pin(stream(self.path(), Part { tail, follow }, Arc::new(move || ended.load(Ordering::SeqCst)), CancellationToken::new()))
        }

        async fn all(&self, tail: Option<u64>) -> String {
            text(self.stream(tail, false)).await
        }
    }

    async fn text(stream: impl Stream<Item = io::Result<Bytes>>) -> String {
        let pieces: Vec<Bytes> = stream.map(|piece| piece.unwrap()).collect().await;
        String::from_utf8(pieces.concat()).unwrap()
    }

    #[tokio::test]
    async fn a_log_is_read_oldest_first_and_by_its_last_lines() {
        let log = Log::new();
        assert_eq!(log.all(None).await, "");
        log.write("one\ntwo\n");
        log.rotate();
        assert_eq!(log.all(None).await, "one\ntwo\n");
        assert_eq!(log.all(Some(1)).await, "two\n");
        log.write("three\nfo");
        log.write("ur");
        assert_eq!(log.all(None).await, "one\ntwo\nthree\nfour");
        for (lines, wanted) in [(1, "four"), (2, "three\nfour"), (3, "two\nthree\nfour"), (4, "one\ntwo\nthree\nfour"), (99, "one\ntwo\nthree\nfour")] {
            assert_eq!(log.all(Some(lines)).await, wanted, "{lines}");
        }
        log.write("\n\n");
        assert_eq!(log.all(Some(1)).await, "\n");
        assert_eq!(log.all(Some(2)).await, "four\n\n");
        log.write(&"x".repeat(3 * PIECE));
        assert_eq!(log.all(Some(1)).await.len(), 3 * PIECE);
    }

    #[tokio::test]
    async fn a_follower_loses_nothing_at_a_rotation_and_ends_with_the_log() {
        let log = Log::new();
        let mut stream = log.stream(None, true);
        log.write("one\n");
        let mut read = String::new();
        let mut take = async |read: &mut String, until: &str| {
            while !read.ends_with(until) {
                let piece = tokio::time::timeout(Duration::from_secs(30), stream.next()).await.expect("more").expect("no end").unwrap();
                read.push_str(std::str::from_utf8(&piece).unwrap());
            }
        };
        take(&mut read, "one\n").await;
        log.write("two\n");
        log.rotate();
        log.write("three\n");
        take(&mut read, "three\n").await;
        log.rotate();
        log.write("four\n");
        // Nobody has looked since the last rotation.
        log.rotate();
        log.write("five\n");
        log.ended.store(true, Ordering::SeqCst);
        while let Some(piece) = tokio::time::timeout(Duration::from_secs(30), stream.next()).await.expect("the end") {
            read.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        }
        assert_eq!(read, "one\ntwo\nthree\nfour\nfive\n");
    }

    #[tokio::test]
    async fn a_follower_is_told_to_stop() {
        let log = Log::new();
        log.write("one\n");
        let stop = CancellationToken::new();
        let stream = stream(log.path(), Part { tail: None, follow: true }, Arc::new(|| false), stop.clone());
        stop.cancel();
        assert_eq!(tokio::time::timeout(Duration::from_secs(30), text(stream)).await.expect("the end"), "one\n");
    }
}
