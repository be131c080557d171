//! One JSON line per request. Never a token, a body, a path or a query: a client may have put its token into its URL.
//!
//! Owns: the form of a line, the queue behind which lines wait, and the thread that writes them. Whoever answers requests
//! never waits for the log: when its reader or its disk stalls and the queue is full, lines are dropped and counted.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use idle_controller::WakeReport;
use model::{MicrovmId, Port};
use prometheus::IntCounter;
use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{metrics::Protocol, reply::Reason};

/// Lines that wait for the writer: about 2 MB. At 50,000 requests a second it is asked to keep up with, this bridges a
/// stall of a tenth of a second.
const QUEUE: usize = 4096;
/// The writer lets lines gather for this long, so that not each of them costs a wakeup.
const GATHERING: Duration = Duration::from_millis(5);
/// The most that is written at once.
const BATCH: usize = 256 * 1024;
/// How long the end waits for the writer.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Among what else the node says.
    Stderr,
    /// Appended to this file, which is opened again once another program has renamed or removed it.
    File(PathBuf),
}

/// The lines that were lost.
#[derive(Clone)]
pub(crate) struct Lost {
    /// Because the queue was full.
    pub queue_full: IntCounter,
    /// Because they could not be written.
    pub unwritten: IntCounter,
}

/// The log. Cheap to clone.
#[derive(Clone)]
pub(crate) struct AccessLog {
    queue: SyncSender<Message>,
    lost: Lost,
}

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// What is said of one request.
pub(crate) struct Entry<'a> {
    /// When it was over.
    pub time: OffsetDateTime,
    /// The id that client and app read in `x-amzn-requestid`.
    pub request_id: &'a str,
    /// The client.
    pub client: Option<SocketAddr>,
    /// The method; `None` for what never became a request.
    pub method: Option<&'a str>,
    /// What the client speaks.
    pub protocol: Protocol,
    /// The status of the answer; `None` if the client left before one began.
    pub status: Option<u16>,
    /// Why the gateway answered by itself, if it did.
    pub reason: Option<Reason>,
    /// The microVM, once the token was found to be for it.
    pub microvm: Option<MicrovmId>,
    /// Its port.
    pub port: Option<Port>,
    /// From the whole header to now.
    pub duration: Option<Duration>,
    /// How long of that was a wait for launches and wakes, and for which steps of them.
    pub wake: Option<Wake<'a>>,
    /// Body bytes from the client.
    pub bytes_in: u64,
    /// Body bytes to the client.
    pub bytes_out: u64,
    /// Whether the connection to the guest was used before.
    pub reused: bool,
    /// How often the request was tried again, which is only if the guest had seen nothing of it.
    pub retries: u8,
}

/// A wait for launches and wakes.
#[derive(Serialize)]
pub(crate) struct Wake<'a> {
    #[serde(rename = "wake_ms", serialize_with = "millis")]
    waited: Duration,
    // The steps begin when the wake's first caller came, so that a later one has waited for less than their sum.
    #[serde(rename = "wake_phases_ms", serialize_with = "steps", skip_serializing_if = "<[_]>::is_empty")]
    phases: &'a [(&'static str, Duration)],
}

impl<'a> From<&'a WakeReport> for Wake<'a> {
    fn from(report: &'a WakeReport) -> Self {
        Self { waited: report.waited, phases: &report.phases }
    }
}

impl Entry<'_> {
    /// The line, with its end. Written by hand, since it is written for every request: no string in it needs an escape, for
    /// names are ours and a method is a token (RFC 9110 §9.1).
    fn line(&self) -> Vec<u8> {
        let mut line = Vec::with_capacity(512);
        line.extend_from_slice(b"{\"time\":\"");
        let time = self.time.replace_nanosecond(self.time.nanosecond() / 1_000_000 * 1_000_000).unwrap_or(self.time);
        // Writing to memory does not fail, and every year until 9999 has a form.
        let _ = time.format_into(&mut line, &Rfc3339);
        text(&mut line, "\",\"request_id\":\"", self.request_id);
        if let Some(client) = self.client {
            line.extend_from_slice(b"\",\"client\":\"");
            address(&mut line, client);
        }
        if let Some(method) = self.method {
            text(&mut line, "\",\"method\":\"", method);
        }
        text(&mut line, "\",\"protocol\":\"", self.protocol.as_str());
        line.extend_from_slice(b"\",\"status\":");
        match self.status {
            Some(status) => number(&mut line, status.into()),
            None => line.extend_from_slice(b"null"),
        }
        if let Some(reason) = self.reason {
            text(&mut line, ",\"reason\":\"", reason.reply().word);
            line.push(b'"');
        }
        if let Some(microvm) = self.microvm {
            let _ = write!(line, ",\"microvm\":\"{microvm}\"");
        }
        if let Some(port) = self.port {
            line.extend_from_slice(b",\"port\":");
            number(&mut line, port.get().into());
        }
        if let Some(duration) = self.duration {
            line.extend_from_slice(b",\"duration_ms\":");
            millis_into(&mut line, duration);
        }
        // Rare enough for the general way. Its fields follow those of the line.
        if let Some(Ok(wake)) = self.wake.as_ref().map(serde_json::to_vec) {
            line.push(b',');
            line.extend_from_slice(&wake[1..wake.len() - 1]);
        }
        for (name, count) in [(",\"bytes_in\":", self.bytes_in), (",\"bytes_out\":", self.bytes_out)] {
            line.extend_from_slice(name.as_bytes());
            number(&mut line, count);
        }
        line.extend_from_slice(if self.reused { b",\"reused\":true" } else { b",\"reused\":false" });
        line.extend_from_slice(b",\"retries\":");
        number(&mut line, self.retries.into());
        line.extend_from_slice(b"}\n");
        line
    }

    /// Of something that was refused before it became a request.
    pub fn unparsed(request_id: &str, client: Option<SocketAddr>, reason: Reason) -> Entry<'_> {
        Entry {
            time: OffsetDateTime::now_utc(),
            request_id,
            client,
            method: None,
            protocol: Protocol::Http1,
            status: Some(reason.reply().status.as_u16()),
            reason: Some(reason),
            microvm: None,
            port: None,
            duration: None,
            wake: None,
            bytes_in: 0,
            bytes_out: 0,
            reused: false,
            retries: 0,
        }
    }
}

impl AccessLog {
    /// Opens the target and starts the writer.
    pub fn open(target: &AccessLogTarget, lost: Lost) -> io::Result<Self> {
        let mut sink = match target {
            AccessLogTarget::Stderr => Sink::Stderr,
            AccessLogTarget::File(path) => Sink::File { path: path.clone(), file: append_to(path)? },
        };
        let (queue, lines) = sync_channel(QUEUE);
        let unwritten = lost.unwritten.clone();
        thread::Builder::new().name("access-log".to_owned()).spawn(move || write(&lines, &mut sink, &unwritten))?;
        Ok(Self { queue, lost })
    }

    /// Says it, or counts that it could not be said.
    pub fn say(&self, entry: &Entry<'_>) {
        let line = entry.line();
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.lost.queue_full.inc();
        }
    }

    /// Waits until what was said is written, for a second at most.
    pub async fn flush(&self) {
        let queue = self.queue.clone();
        let waited = tokio::task::spawn_blocking(move || {
            let (done, written) = sync_channel(1);
            let deadline = Instant::now() + LAST_LINES;
            let mut flush = Message::Flush(done);
            // No blocking send: behind a writer that stalls it would have no deadline.
            while let Err(error) = queue.try_send(flush) {
                let std::sync::mpsc::TrySendError::Full(back) = error else { return };
                flush = back;
                if Instant::now() >= deadline {
                    return;
                }
                thread::sleep(GATHERING);
            }
            let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        });
        let _ = waited.await;
    }
}

enum Sink {
    Stderr,
    File { path: PathBuf, file: File },
}

impl Sink {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().lock().write_all(lines),
            Self::File { path, file } => {
                let here = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
                if std::fs::metadata(&*path).map(here).ok() != file.metadata().map(here).ok() {
                    *file = append_to(path)?;
                }
                file.write_all(lines)
            }
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

/// The writer; ends with the last [`AccessLog`].
fn write(lines: &Receiver<Message>, sink: &mut Sink, unwritten: &IntCounter) {
    let mut batch = Vec::new();
    let mut failing = false;
    while let Ok(first) = lines.recv() {
        let (mut flushes, mut count) = (Vec::new(), 0);
        let gathered = Instant::now() + GATHERING;
        let mut next = Some(first);
        while let Some(message) = next.take() {
            match message {
                Message::Line(line) => {
                    batch.extend_from_slice(&line);
                    count += 1;
                }
                Message::Flush(done) => flushes.push(done),
            }
            if batch.len() < BATCH && flushes.is_empty() {
                next = match lines.try_recv() {
                    Ok(message) => Some(message),
                    Err(_) => {
                        thread::sleep(gathered.saturating_duration_since(Instant::now()));
                        lines.try_recv().ok()
                    }
                };
            }
        }
        if count > 0 {
            let written = sink.write(&batch);
            if let Err(error) = &written {
                unwritten.inc_by(count);
                if !failing {
                    tracing::error!(error = %error, "the access log cannot be written; its lines are dropped until it can");
                }
            }
            failing = written.is_err();
        }
        batch.clear();
        batch.shrink_to(BATCH);
        drop(flushes);
    }
}

fn text(line: &mut Vec<u8>, before: &str, text: &str) {
    line.extend_from_slice(before.as_bytes());
    line.extend_from_slice(text.as_bytes());
}

/// As its `Display`, whose padding takes four times as long.
fn address(line: &mut Vec<u8>, address: SocketAddr) {
    let SocketAddr::V4(v4) = address else {
        let _ = write!(line, "{address}");
        return;
    };
    for (octet, end) in v4.ip().octets().into_iter().zip(*b"...:") {
        number(line, octet.into());
        line.push(end);
    }
    number(line, v4.port().into());
}

fn number(line: &mut Vec<u8>, number: u64) {
    line.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// The same as [`millis`], without the detour over a float.
fn millis_into(line: &mut Vec<u8>, duration: Duration) {
    let micros = u64::try_from((duration.as_nanos() + 500) / 1000).unwrap_or(u64::MAX);
    number(line, micros / 1000);
    line.push(b'.');
    line.extend([100, 10, 1].map(|place| b'0' + (micros / place % 10) as u8));
}

/// Milliseconds with three places.
fn as_millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000_000.0).round() / 1000.0
}

fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(as_millis(*duration))
}

/// As one object. A step that came twice (two wakes of one request) is there once, with its sum.
fn steps<S: Serializer>(phases: &&[(&'static str, Duration)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut sums: Vec<(&str, Duration)> = Vec::with_capacity(phases.len());
    for (step, took) in *phases {
        match sums.iter_mut().find(|(known, _)| known == step) {
            Some((_, sum)) => *sum += *took,
            None => sums.push((step, *took)),
        }
    }
    serializer.collect_map(sums.into_iter().map(|(step, took)| (step, as_millis(took))))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io::{BufRead as _, BufReader},
    };

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn lost() -> Lost {
        Lost { queue_full: IntCounter::new("full", "full").unwrap(), unwritten: IntCounter::new("unwritten", "unwritten").unwrap() }
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_and_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        // A reader that holds the pipe open and reads nothing of it.
        let reader = File::options().read(true).write(true).open(&pipe).unwrap();
        let lost = lost();
        let log = AccessLog::open(&AccessLogTarget::File(pipe), lost.clone()).unwrap();
        // Returns although the pipe, the writer's hands and the queue are full.
        let mut said = 0;
        while lost.queue_full.get() < 10 {
            log.say(&Entry::unparsed("id", None, Reason::MalformedRequest));
            said += 1;
        }
        // When the reader reads again, everything that was not dropped comes, in whole lines.
        for line in BufReader::new(reader).lines().take(said - 10) {
            assert_eq!(serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap()["status"], 400);
        }
        assert_eq!(lost.unwritten.get(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_counted_and_the_rest_is_there_at_the_end() {
        let full = lost();
        let log = AccessLog::open(&AccessLogTarget::File("/dev/full".into()), full.clone()).unwrap();
        log.say(&Entry::unparsed("id", None, Reason::MalformedRequest));
        log.flush().await;
        assert_eq!(full.unwritten.get(), 1);

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        let log = AccessLog::open(&AccessLogTarget::File(file.clone()), lost()).unwrap();
        for _ in 0..100 {
            log.say(&Entry::unparsed("id", None, Reason::HeaderTooLarge));
        }
        log.flush().await;
        assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 100);
    }

    #[test]
    fn an_address_reads_as_everywhere_else() {
        for text in ["0.0.0.0:0", "203.0.113.70:65535", "[2001:db8::1]:443"] {
            let mut line = Vec::new();
            address(&mut line, text.parse().unwrap());
            assert_eq!(String::from_utf8(line).unwrap(), text);
        }
    }

    #[test]
    fn a_line_is_one_json_object_with_every_field() {
        let report = WakeReport { waited: Duration::from_millis(7), phases: vec![("restore", Duration::from_millis(2))] };
        let mut entry = Entry {
            client: Some("[2001:db8::1]:443".parse().unwrap()),
            method: Some("GET"),
            status: None,
            microvm: Some(MicrovmId::random()),
            port: Some(Port::DEFAULT),
            duration: Some(Duration::from_nanos(1_234_567_800)),
            wake: Some(Wake::from(&report)),
            bytes_in: 1,
            bytes_out: u64::MAX,
            reused: true,
            retries: 3,
            ..Entry::unparsed("an-id", None, Reason::WakeFailed)
        };
        entry.time = OffsetDateTime::UNIX_EPOCH;
        let line = String::from_utf8(entry.line()).unwrap();
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
        let expected = serde_json::json!({
            "time": "1970-01-01T00:00:00Z", "request_id": "an-id", "client": "[2001:db8::1]:443", "method": "GET", "protocol": "h1",
            "status": null, "reason": "wake-failed", "microvm": entry.microvm.unwrap().to_string(), "port": 8080, "duration_ms": 1234.568,
            "wake_ms": 7.0, "wake_phases_ms": { "restore": 2.0 }, "bytes_in": 1, "bytes_out": u64::MAX, "reused": true, "retries": 3,
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), expected);
        let bare: serde_json::Value = serde_json::from_slice(&Entry::unparsed("id", None, Reason::HeaderTimeout).line()).unwrap();
        let names: BTreeSet<_> = bare.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, BTreeSet::from(["time", "request_id", "protocol", "status", "reason", "bytes_in", "bytes_out", "reused", "retries"]));
    }

    #[test]
    fn a_step_that_came_twice_is_there_once() {
        let step = |millis| ("restore", Duration::from_millis(millis));
        let report = WakeReport { waited: Duration::from_millis(7), phases: vec![("queue", Duration::from_micros(1500)), step(2), step(3)] };
        let line = serde_json::to_value(Wake::from(&report)).unwrap();
        assert_eq!(line, serde_json::json!({ "wake_ms": 7.0, "wake_phases_ms": { "queue": 1.5, "restore": 5.0 } }));
    }
}
