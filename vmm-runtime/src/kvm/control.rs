//! A client of a VMM process's control socket: one connection to one process.
//!
//! Owns: the pairing of answers with requests, a deadline on each request, and what the process has said unasked. The
//! process is trusted no further than this: a guest that has taken it over can make requests fail, but not make this side
//! wait or hold memory or descriptors without limit.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::{io::unix::AsyncFd, sync::watch, task::JoinHandle};
use vmm_protocol::control::{Event, Fault, FromVmm, PacketError, Reply, Request, ToVmm, receive, send};

use crate::host::{
    calls::{CallError, Calls},
    process::watched,
};

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The process did not answer in time.
    #[error("the VMM did not answer `{request}` within {limit:?}")]
    Timeout {
        /// What was asked.
        request: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The process says why not.
    #[error("the VMM did not do `{request}`: {why}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Whose fault it is.
        fault: Fault,
        /// A sentence.
        why: String,
    },
    /// The process answered something else.
    #[error("the VMM answered `{request}` with something else")]
    Unexpected {
        /// What was asked.
        request: &'static str,
    },
    /// The connection has ended.
    #[error("the connection to the VMM is closed")]
    Closed,
    /// The connection failed.
    #[error("the connection to the VMM failed")]
    Io(#[source] io::Error),
}

/// An answer with its descriptors.
type Answer = (Reply, Vec<OwnedFd>);

struct Shared {
    socket: AsyncFd<OwnedFd>,
    calls: Calls<Answer>,
    /// How the guest ended.
    stopped: watch::Sender<Option<String>>,
}

/// The client. Dropping it closes the connection, which the process survives.
pub struct Control {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A connected socket that does not wait.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(socket),
        // Too many others wait for it.
        Err(rustix::io::Errno::AGAIN) => Err(io::ErrorKind::ConnectionRefused.into()),
        Err(error) => Err(error.into()),
    }
}

impl Control {
    /// Takes a connected socket.
    pub fn start(socket: OwnedFd) -> io::Result<Self> {
        let socket = watched(socket)?;
        let shared = Arc::new(Shared { socket, calls: Calls::new(), stopped: watch::Sender::new(None) });
        // Ends with the connection, or with the client.
        let reader = tokio::spawn({
            let shared = shared.clone();
            async move {
                shared.read().await;
                shared.calls.close();
            }
        });
        Ok(Self { shared, reader })
    }

    /// Asks something, and returns the answer with its descriptors.
    pub async fn ask(&self, request: Request, descriptors: &[BorrowedFd<'_>], limit: Duration) -> Result<Answer, ControlError> {
        let asked = request.name();
        let write = async |id| self.shared.write(&ToVmm { id, request }, descriptors).await;
        match self.shared.calls.call(limit, write).await {
            Ok((Reply::Failed { fault, why }, _)) => Err(ControlError::Refused { request: asked, fault, why }),
            Ok(answer) => Ok(answer),
            Err(CallError::Timeout) => Err(ControlError::Timeout { request: asked, limit }),
            Err(CallError::Closed) => Err(ControlError::Closed),
            Err(CallError::Io(error)) => Err(ControlError::Io(error)),
        }
    }

    /// Asks for something that is done or not.
    pub async fn demand(&self, request: Request, descriptors: &[BorrowedFd<'_>], limit: Duration) -> Result<Vec<(String, u64)>, ControlError> {
        let asked = request.name();
        match self.ask(request, descriptors, limit).await? {
            (Reply::Done { phases_us }, _) => Ok(phases_us),
            _ => Err(ControlError::Unexpected { request: asked }),
        }
    }

    /// Returns how, when the guest has ended.
    pub async fn stopped(&self) -> String {
        let mut stopped = self.shared.stopped.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let how = stopped.wait_for(Option::is_some).await.ok().and_then(|how| how.clone());
        match how {
            Some(how) => how,
            None => std::future::pending().await,
        }
    }

    /// Returns when the process has closed the connection.
    pub async fn closed(&self) {
        self.shared.calls.closed().await;
    }
}

impl Shared {
    /// A packet goes whole or not at all, so this may be cancelled anywhere.
    async fn write(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut ready = self.socket.writable().await?;
            match send(ready.get_inner(), message, descriptors) {
                Ok(()) => return Ok(()),
                Err(PacketError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(PacketError::Io(error)) => return Err(error),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    async fn read(&self) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { return };
            match receive::<FromVmm>(ready.get_inner()) {
                Ok((FromVmm::Reply { id, reply }, descriptors)) => self.calls.answer(id, (reply, descriptors)),
                Ok((FromVmm::Event(Event::GuestStopped { how }), _)) => {
                    self.stopped.send_replace(Some(how));
                }
                Err(PacketError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(PacketError::Closed | PacketError::Io(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "the connection to a VMM is given up");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::fd::AsFd,
    };

    use rustix::net::socketpair;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A VMM process that answers each request with what `answer` says to it, until that says nothing.
    fn vmm(mut answer: impl FnMut(ToVmm, Vec<OwnedFd>) -> Option<Vec<(FromVmm, Vec<OwnedFd>)>> + Send + 'static) -> Control {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::io::ioctl_fionbio(&ours, true).unwrap();
        std::thread::spawn(move || {
            while let Ok((request, descriptors)) = receive::<ToVmm>(&theirs) {
                let Some(packets) = answer(request, descriptors) else { return };
                for (packet, descriptors) in packets {
                    send(&theirs, &packet, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
                }
            }
        });
        Control::start(ours).unwrap()
    }

    fn reply(id: u64, reply: Reply) -> (FromVmm, Vec<OwnedFd>) {
        (FromVmm::Reply { id, reply }, Vec::new())
    }

    fn done(id: u64) -> (FromVmm, Vec<OwnedFd>) {
        reply(id, Reply::Done { phases_us: vec![("step".to_owned(), id)] })
    }

    #[tokio::test]
    async fn answers_find_their_request_and_descriptors_come_along() {
        // The first answer is held back until the second request has come, and comes last.
        let mut first = None;
        let control = vmm(move |packet, descriptors| {
            let Some(first) = first.take() else {
                first = Some(packet.id);
                return Some(Vec::new());
            };
            let file = descriptors.into_iter().next().unwrap();
            Some(vec![(FromVmm::Reply { id: packet.id, reply: Reply::Console { text: "second".to_owned() } }, vec![file]), done(first)])
        });
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let fds = [file.as_fd()];
        let (first, second) = tokio::join!(control.demand(Request::Pause, &[], LIMIT), control.ask(Request::Console, &fds, LIMIT));
        assert_eq!(first.unwrap(), [("step".to_owned(), 1)]);
        let (reply, descriptors) = second.unwrap();
        assert_eq!(reply, Reply::Console { text: "second".to_owned() });
        let mut back = File::from(descriptors.into_iter().next().unwrap());
        let mut text = String::new();
        back.rewind().unwrap();
        back.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[tokio::test]
    async fn a_refusal_carries_the_fault_and_the_reason() {
        let control = vmm(|packet, _| Some(vec![reply(packet.id, Reply::Failed { fault: Fault::Snapshot, why: "no".to_owned() })]));
        let error = control.demand(Request::Run, &[], LIMIT).await.unwrap_err();
        assert!(matches!(&error, ControlError::Refused { request: "Run", fault: Fault::Snapshot, why } if why == "no"), "{error:?}");
    }

    #[tokio::test]
    async fn the_end_of_the_guest_is_remembered() {
        let control = vmm(|packet, _| Some(vec![(FromVmm::Event(Event::GuestStopped { how: "reset".to_owned() }), Vec::new()), done(packet.id)]));
        control.demand(Request::Usage, &[], LIMIT).await.unwrap();
        assert_eq!(control.stopped().await, "reset");
        assert_eq!(control.stopped().await, "reset");
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline_and_a_late_answer_is_dropped() {
        let control = vmm(|packet, _| Some(if packet.id == 1 { Vec::new() } else { vec![done(1), done(packet.id)] }));
        let limit = Duration::from_millis(20);
        assert!(matches!(control.demand(Request::Pause, &[], limit).await, Err(ControlError::Timeout { request: "Pause", .. })));
        assert_eq!(control.demand(Request::Run, &[], LIMIT).await.unwrap(), [("step".to_owned(), 2)]);
    }

    #[tokio::test]
    async fn a_dead_process_fails_requests_at_once() {
        let control = vmm(|_, _| None);
        assert!(matches!(control.demand(Request::Run, &[], LIMIT).await, Err(ControlError::Closed)));
        control.closed().await;
        assert!(matches!(control.demand(Request::Run, &[], LIMIT).await, Err(ControlError::Closed | ControlError::Io(_))));
    }

    #[tokio::test]
    async fn nonsense_ends_the_connection() {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        let control = Control::start(ours).unwrap();
        rustix::net::send(&theirs, b"{\"event\": 7}", rustix::net::SendFlags::empty()).unwrap();
        tokio::time::timeout(LIMIT, control.closed()).await.unwrap();
        assert!(matches!(control.demand(Request::Run, &[], LIMIT).await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn a_process_that_does_not_listen_holds_nobody_up() {
        // Nobody reads at the other end: the socket's buffer fills up.
        let (ours, _theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        let control = Control::start(ours).unwrap();
        let limit = Duration::from_millis(1);
        for _ in 0..400 {
            let long = Request::Boot { cmdline: "x".repeat(60_000) };
            assert!(matches!(control.demand(long, &[], limit).await, Err(ControlError::Timeout { .. })));
        }
    }
}
