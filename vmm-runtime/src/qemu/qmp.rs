//! A QMP client: one connection to one QEMU.
//!
//! Owns: the pairing of answers with commands, a deadline on each command, and the events. QEMU is trusted no further
//! than this: a guest that has taken it over can make commands fail, but not make this side wait or hold memory without
//! limit.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, watch},
    task::JoinHandle,
};

use crate::host::calls::{CallError, Calls};

/// The longest answer that is read; the greatest we ask for is the console ring, escaped.
const MAX_LINE_BYTES: usize = 1 << 20;
/// Events that a slow reader may leave unread before the oldest are dropped.
const MAX_EVENTS: usize = 64;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU did not answer in time.
    #[error("QEMU did not answer `{command}` within {limit:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long it had.
        limit: Duration,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {why}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own words.
        why: String,
    },
    /// The connection has ended.
    #[error("the connection to QEMU is closed")]
    Closed,
    /// The connection failed.
    #[error("the connection to QEMU failed")]
    Io(#[source] io::Error),
    /// What was asked for did not come about.
    #[error("{0}")]
    Outcome(String),
}

/// Something QEMU says unasked.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its name, such as `SHUTDOWN`.
    pub name: String,
    /// Its fields.
    pub data: Value,
}

/// QEMU's answer to a command, or its own words of why not.
type Answer = Result<Value, String>;

struct Shared {
    stream: UnixStream,
    calls: Calls<Answer>,
    events: broadcast::Sender<Event>,
    guest_stopped: watch::Sender<bool>,
}

/// The client. Dropping it closes the connection, which QEMU survives.
pub struct Qmp {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Shakes hands on a fresh connection.
    pub async fn start(stream: UnixStream, limit: Duration) -> Result<Self, QmpError> {
        let shared = Arc::new(Shared {
            stream,
            calls: Calls::new(),
            events: broadcast::Sender::new(MAX_EVENTS),
            guest_stopped: watch::Sender::new(false),
        });
        // The greeting is a line that answers nothing; it is skipped like an unknown event.
        let reader = tokio::spawn({
            let shared = shared.clone();
            async move {
                shared.read().await;
                shared.calls.close();
            }
        });
        let qmp = Self { shared, reader };
        qmp.execute("qmp_capabilities", json!({}), limit).await?;
        Ok(qmp)
    }

    /// Runs a command.
    pub async fn execute(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.run(command, arguments, None, limit).await
    }

    /// Runs a command that takes a file descriptor along (`getfd`).
    pub async fn execute_with_fd(&self, command: &str, arguments: Value, fd: BorrowedFd<'_>, limit: Duration) -> Result<Value, QmpError> {
        self.run(command, arguments, Some(fd), limit).await
    }

    /// Everything QEMU says unasked from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Returns when QEMU has closed the connection.
    pub async fn closed(&self) {
        self.shared.calls.closed().await;
    }

    /// Returns when QEMU has said that the guest will not run any more.
    pub async fn guest_stopped(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.shared.guest_stopped.subscribe().wait_for(|stopped| *stopped).await;
    }

    async fn run(&self, command: &str, arguments: Value, fd: Option<BorrowedFd<'_>>, limit: Duration) -> Result<Value, QmpError> {
        let write = async |id| {
            let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
            self.shared.write(line.as_bytes(), fd).await
        };
        match self.shared.calls.call(limit, write).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(why)) => Err(QmpError::Refused { command: command.to_owned(), why }),
            Err(CallError::Timeout) => Err(QmpError::Timeout { command: command.to_owned(), limit }),
            Err(CallError::Closed) => Err(QmpError::Closed),
            Err(CallError::Io(error)) => Err(QmpError::Io(error)),
        }
    }
}

impl Shared {
    /// Writes all of a line; the descriptor goes with its first byte. Cancelled in the middle of a line only by a
    /// deadline, after which QEMU is not usable anyway.
    async fn write(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || send(self.stream.as_fd(), bytes, fd)).await?;
            fd = None;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    async fn read(&self) {
        let mut buffer = Vec::new();
        loop {
            if self.stream.readable().await.is_err() {
                return;
            }
            match self.stream.try_read_buf(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return,
            }
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                self.take(&line);
            }
            if buffer.len() > MAX_LINE_BYTES {
                tracing::warn!("QEMU sent an answer without an end; the connection is given up");
                return;
            }
        }
    }

    fn take(&self, line: &[u8]) {
        let Ok(mut message) = serde_json::from_slice::<Value>(line) else {
            tracing::warn!("QEMU sent a line that is not JSON");
            return;
        };
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let data = message.get_mut("data").map(Value::take).unwrap_or_default();
            if matches!(name.as_str(), "SHUTDOWN" | "GUEST_PANICKED") {
                self.guest_stopped.send_replace(true);
            }
            // Nobody listening is fine.
            let _ = self.events.send(Event { name, data });
            return;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else { return };
        let answer = match message.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(message["error"]["desc"].as_str().unwrap_or("no reason was given").to_owned()),
        };
        self.calls.answer(id, answer);
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds
        && !ancillary.push(SendAncillaryMessage::ScmRights(fds))
    {
        return Err(io::Error::other("no room for a file descriptor"));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A QEMU that answers each command with what `answer` says to it.
    pub(in crate::qemu) fn server(answer: impl Fn(&Value) -> Option<Vec<u8>> + Send + 'static) -> UnixStream {
        let (client, server) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (from, mut to) = server.into_split();
            to.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
            let mut lines = BufReader::new(from).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let command: Value = serde_json::from_str(&line).unwrap();
                let bytes = match command["execute"].as_str() {
                    Some("qmp_capabilities") => Some(format!("{{\"return\": {{}}, \"id\": {}}}\r\n", command["id"]).into_bytes()),
                    _ => answer(&command),
                };
                match bytes {
                    Some(bytes) => to.write_all(&bytes).await.unwrap(),
                    None => return,
                }
            }
        });
        client
    }

    #[tokio::test]
    async fn answers_find_their_command_between_events() {
        let stream = server(|command| {
            let text = format!("{{\"event\": \"STOP\", \"data\": {{\"a\": 1}}}}\r\n{{\"return\": 7, \"id\": {}}}\r\n", command["id"]);
            Some(text.into_bytes())
        });
        let qmp = Qmp::start(stream, LIMIT).await.unwrap();
        let mut events = qmp.events();
        assert_eq!(qmp.execute("stop", json!({}), LIMIT).await.unwrap(), 7);
        let event = events.recv().await.unwrap();
        assert_eq!((event.name.as_str(), &event.data["a"]), ("STOP", &json!(1)));
    }

    #[tokio::test]
    async fn the_end_of_the_guest_is_remembered() {
        let stream = server(|command| Some(format!("{{\"event\": \"SHUTDOWN\"}}\n{{\"return\": {{}}, \"id\": {}}}\n", command["id"]).into_bytes()));
        let qmp = Qmp::start(stream, LIMIT).await.unwrap();
        qmp.execute("system_powerdown", json!({}), LIMIT).await.unwrap();
        tokio::time::timeout(LIMIT, qmp.guest_stopped()).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_carries_qemus_words() {
        let stream = server(|command| Some(format!("{{\"id\": {}, \"error\": {{\"desc\": \"no\"}}}}\n", command["id"]).into_bytes()));
        let error = Qmp::start(stream, LIMIT).await.unwrap().execute("x", json!({}), LIMIT).await.unwrap_err();
        assert!(matches!(error, QmpError::Refused { why, .. } if why == "no"));
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let qmp = Qmp::start(server(|_| Some(b"not json\n".to_vec())), LIMIT).await.unwrap();
        let limit = Duration::from_millis(20);
        assert!(matches!(qmp.execute("x", json!({}), limit).await, Err(QmpError::Timeout { .. })));
    }

    #[tokio::test]
    async fn a_dead_qemu_fails_commands_at_once() {
        let qmp = Qmp::start(server(|_| None), LIMIT).await.unwrap();
        assert!(matches!(qmp.execute("x", json!({}), LIMIT).await, Err(QmpError::Closed)));
        qmp.closed().await;
        assert!(matches!(qmp.execute("x", json!({}), LIMIT).await, Err(QmpError::Closed | QmpError::Io(_))));
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_connection() {
        let qmp = Qmp::start(server(|_| Some(vec![b'x'; 2 * MAX_LINE_BYTES])), LIMIT).await.unwrap();
        assert!(matches!(qmp.execute("x", json!({}), LIMIT).await, Err(QmpError::Closed)));
    }
}
