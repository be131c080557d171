//! The channel to the guest agent: one vsock connection, through the socket of the VMM's muxer.
//!
//! The connection survives a suspend. At the save the VMM hands out its end; this side keeps that and its own, and at the
//! restore the new process gets the former while the agent's link goes on with the latter. In the guest nothing has happened.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use vmm_protocol::control::{AGENT_PORT, ParkedStream, VSOCK_SOCKET};

use super::KvmVm;
use crate::host::process::Process;

/// Between two tries to reach an agent that is not there yet.
const TRY_EVERY: Duration = Duration::from_millis(5);
/// What a try may take: the guest's answer to a connection request.
const TRY_LIMIT: Duration = Duration::from_secs(5);
/// `OK <port>\n` is shorter.
const MAX_ANSWER: usize = 32;

/// This side's end.
struct Ours {
    stream: StdStream,
    /// Port on the host's side, by which the VMM knows the connection.
    host_port: u32,
}

impl Ours {
    fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()?, host_port: self.host_port })
    }
}

/// Both ends of a connection that is held still.
pub(super) struct Parked {
    /// What the VMM calls it.
    pub stream: ParkedStream,
    /// The VMM's end.
    pub theirs: OwnedFd,
    ours: Ours,
}

impl Parked {
    fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.clone(), theirs: self.theirs.try_clone()?, ours: self.ours.duplicate()? })
    }
}

/// The connection to the agent of one process, if there is one.
#[derive(Default)]
pub(super) struct Channel {
    ours: Mutex<Option<Ours>>,
    /// Since the newest save.
    parked: Mutex<Option<Parked>>,
    /// Whether it is the one of the process before.
    kept: AtomicBool,
}

impl Channel {
    /// The connection: the one that goes on, or a new one as soon as the agent listens.
    pub async fn open(&self, process: &Process) -> io::Result<UnixStream> {
        let going_on = self.ours.lock().as_ref().map(Ours::duplicate).transpose()?;
        let ours = match going_on {
            Some(ours) => ours,
            None => {
                let ours = dial(process).await?;
                *self.ours.lock() = Some(ours.duplicate()?);
                ours
            }
        };
        UnixStream::from_std(ours.stream)
    }

    /// A save has handed out the VMM's ends of all streams; the one to the agent is kept.
    pub fn park(&self, streams: Vec<ParkedStream>, ends: Vec<OwnedFd>) {
        let ours = self.ours.lock();
        let Some(ours) = ours.as_ref() else { return };
        let found = streams.into_iter().zip(ends).find(|(stream, _)| stream.guest_port == AGENT_PORT && stream.host_port == ours.host_port);
        let parked = found.map(|(stream, theirs)| Ok(Parked { stream, theirs, ours: ours.duplicate()? }));
        // Without it the restored microVM gets a new connection.
        *self.parked.lock() = parked.and_then(|parked: io::Result<_>| parked.ok());
    }

    /// The guest goes on in its old process.
    pub fn unpark(&self) {
        *self.parked.lock() = None;
    }

    /// Both ends for another process to go on with, which may fail to.
    pub fn parked(&self) -> io::Result<Option<Parked>> {
        self.parked.lock().as_ref().map(Parked::duplicate).transpose()
    }

    /// The process goes on with this connection, and its predecessor cannot any more: bytes may move now.
    pub fn take_over(&self, parked: Parked, predecessor: &Self) {
        *self.ours.lock() = Some(parked.ours);
        self.kept.store(true, Ordering::Relaxed);
        predecessor.unpark();
        *predecessor.ours.lock() = None;
    }
}

impl KvmVm {
    /// The guest's network: none without [`super::KvmConfig::net`], and none of a microVM that was taken over from an earlier
    /// node (its card works on; only the name of its network is lost).
    pub fn network(&self) -> Option<&super::Network> {
        self.vmm().network.as_ref()
    }

    /// Whether the guest's connection to this node is the one that it had before its last sleep.
    pub fn kept_its_channel(&self) -> bool {
        self.vmm().channel.kept.load(Ordering::Relaxed)
    }
}

/// Connects to the agent's port. While nobody listens there, the muxer closes the connection.
async fn dial(process: &Process) -> io::Result<Ours> {
    loop {
        match tokio::time::timeout(TRY_LIMIT, try_dial(process)).await {
            Ok(Ok(ours)) => return Ok(ours),
            Ok(Err(error)) if !process.is_alive() || error.kind() == io::ErrorKind::InvalidData => return Err(error),
            _ => tokio::time::sleep(TRY_EVERY).await,
        }
    }
}

async fn try_dial(process: &Process) -> io::Result<Ours> {
    let mut stream = process.connect(VSOCK_SOCKET, TRY_LIMIT).await?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await?;
    // Byte by byte: what comes after the line is the agent's.
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() >= MAX_ANSWER {
            return Err(nonsense());
        }
        answer.push(stream.read_u8().await?);
    }
    let host_port = std::str::from_utf8(&answer).ok().and_then(|answer| answer.strip_prefix("OK ")?.trim_end().parse().ok()).ok_or_else(nonsense)?;
    Ok(Ours { stream: stream.into_std()?, host_port })
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the VMM did not answer `OK` and a port to a connection request")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read, Write},
        os::unix::net::UnixListener,
        path::Path,
    };

    use super::*;
    use crate::host::process::Priority;

    /// A process that does nothing, with a muxer in this one that treats connection after connection as told.
    fn process(run_dir: &Path, answers: &'static [&'static str]) -> (Process, std::thread::JoinHandle<StdStream>) {
        let process = Process::start(Path::new("sleep"), run_dir, |_| Ok(vec!["60".to_owned()]), Priority::Normal).unwrap();
        let listener = UnixListener::bind(process.dir().join(VSOCK_SOCKET)).unwrap();
        let muxer = std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                assert_eq!(line, "CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).unwrap();
                if answer.starts_with("OK") {
                    return stream;
                }
            }
            panic!("nobody was satisfied");
        });
        (process, muxer)
    }

    async fn says(stream: &mut UnixStream, wanted: &[u8]) {
        let mut found = vec![0; wanted.len()];
        stream.read_exact(&mut found).await.unwrap();
        assert_eq!(found, wanted);
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_yet_is_waited_for_and_its_connection_goes_on_in_another_process() {
        let run_dir = tempfile::tempdir().unwrap();
        let (process, muxer) = process(run_dir.path(), &["", "", "OK 4242\nfirst word"]);
        let channel = Channel::default();
        let mut stream = channel.open(&process).await.unwrap();
        says(&mut stream, b"first word").await;
        let mut theirs = muxer.join().unwrap();

        // The guest sleeps: this side's task ends, and the VMM with its descriptors.
        let named = |host_port| ParkedStream { guest_port: AGENT_PORT, host_port };
        let end = || OwnedFd::from(theirs.try_clone().unwrap());
        channel.park(vec![named(7), named(4242)], vec![end(), end()]);
        drop(stream);
        let parked = channel.parked().unwrap().unwrap();
        assert_eq!(parked.stream, named(4242));

        let next = Channel::default();
        next.take_over(parked, &channel);
        assert!(channel.parked().unwrap().is_none());
        let mut stream = next.open(&process).await.unwrap();
        theirs.write_all(b"goes on").unwrap();
        says(&mut stream, b"goes on").await;
        process.kill(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn only_the_agents_own_connection_is_kept_and_a_guest_that_goes_on_keeps_none() {
        let run_dir = tempfile::tempdir().unwrap();
        let (process, muxer) = process(run_dir.path(), &["OK 5\n"]);
        let channel = Channel::default();
        let mut stream = channel.open(&process).await.unwrap();
        let mut theirs = muxer.join().unwrap();
        let end = || vec![OwnedFd::from(theirs.try_clone().unwrap())];
        channel.park(vec![ParkedStream { guest_port: 80, host_port: 5 }], end());
        assert!(channel.parked().unwrap().is_none());
        channel.park(vec![ParkedStream { guest_port: AGENT_PORT, host_port: 5 }], end());
        assert!(channel.parked().unwrap().is_some());
        channel.unpark();
        assert!(channel.parked().unwrap().is_none());
        stream.write_all(b"still here").await.unwrap();
        let mut found = [0; 10];
        theirs.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"still here");
        process.kill(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        for answer in [&["OK seven\n"][..], &["WELL\n"], &["OK 1234567890123456789012345678901234567890"]] {
            let run_dir = tempfile::tempdir().unwrap();
            let (process, muxer) = process(run_dir.path(), answer);
            let error = Channel::default().open(&process).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            process.kill(Duration::from_secs(5)).await;
            drop(muxer);
        }
    }
}
