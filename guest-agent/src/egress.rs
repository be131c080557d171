//! The way out of the guest: TCP to any address, and names, over streams that the host holds ready.
//!
//! A primer. There is no network card. A route makes every IPv4 address one of this machine's own (`local 0.0.0.0/0 dev lo`,
//! "AnyIP"), so that a connection to 93.184.216.34:443 looks for a listener here; a BPF program of the kind `sk_lookup` then
//! picks ours, whatever the port, for all addresses but 127.0.0.0/8. An accepted connection knows where it wanted to go: its
//! local address is that. The kernel does TCP with the app, the agent carries bytes, and the host decides who may go where
//! (`vmm-runtime/src/host/egress.rs`) and connects. So a connect succeeds at once, and is reset if the host refuses or fails.
//!
//! Owns: the route, the program, the listener, the stub name server. Never decides where the app may go; an app that is root and
//! takes this apart harms nobody but itself.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use protocol::egress::{Answer, Wanted};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Notify, Semaphore},
    task::JoinSet,
};

use crate::{
    metadata::{self, Metadata},
    pipe::{self, Pipe},
    sys,
};

/// The name server that resolv.conf names (aws-behaviour §5.3), and where the listener is.
pub(crate) const STUB: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);
const DNS: u16 = 53;
/// Of the listener. No port of an app's: nothing is asked for it.
const LISTENER: u16 = 1;
/// Connections at a time, and questions for names.
const MAX_CONNECTIONS: usize = 512;
/// What a datagram of the stub may have (RFC 6891 recommends 1232; some ask for 4096).
const MAX_DATAGRAM: usize = 4096;
/// How long a connection waits for a stream of the host's.
const STREAM_PATIENCE: Duration = Duration::from_secs(20);
/// How long a question for a name waits for its answer. Resolvers ask again after 5 s.
const NAME_PATIENCE: Duration = Duration::from_secs(10);
const STREAM_BYTES: usize = 16 * 1024;

/// Streams of the host's that wait to be used.
#[derive(Default)]
pub(crate) struct Streams {
    ready: Mutex<VecDeque<Pipe>>,
    came: Notify,
}

impl Streams {
    /// Another one; what it is a connection to.
    pub fn add(&self) -> Pipe {
        let (theirs, ours) = pipe::pair(STREAM_BYTES);
        let mut ready = self.ready.lock();
        // Those of a host that is gone would be tried first.
        ready.retain(|stream| !stream.is_reset());
        ready.push_back(ours);
        drop(ready);
        self.came.notify_one();
        theirs
    }

    async fn take(&self) -> Pipe {
        loop {
            let came = self.came.notified();
            if let Some(stream) = self.ready.lock().pop_front() {
                return stream;
            }
            came.await;
        }
    }

    /// A stream that is what is wanted, or why there is none.
    async fn open(&self, wanted: Wanted) -> io::Result<Pipe> {
        let opened = async {
            loop {
                let mut stream = self.take().await;
                // A stream may be older than the last sleep, and then its other end is gone. Nothing was done yet.
                if stream.write_all(&wanted.to_bytes()).await.is_err() {
                    continue;
                }
                match stream.read_u8().await {
                    Ok(answer) if answer == Answer::Open as u8 => return Ok(stream),
                    Ok(_) => return Err(io::ErrorKind::ConnectionRefused.into()),
                    Err(_) => {}
                }
            }
        };
        tokio::time::timeout(STREAM_PATIENCE, opened).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// How far it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// To the host, for everything.
    Everything,
    /// To the metadata service only.
    Metadata,
}

impl Reach {
    /// What a microVM has. `None`: nothing.
    pub fn of(egress: model::Egress, metadata: &Metadata) -> Option<Self> {
        match egress {
            model::Egress::Internet => Some(Self::Everything),
            model::Egress::Nothing => metadata.has_role().then_some(Self::Metadata),
        }
    }

    fn only(self) -> Option<Ipv4Addr> {
        match self {
            Self::Everything => None,
            Self::Metadata => Some(metadata::ADDRESS),
        }
    }
}

/// Who answers.
#[derive(Clone)]
pub(crate) struct Answerers {
    pub streams: Arc<Streams>,
    pub metadata: Arc<Metadata>,
}

/// The way out. It ends with its drop, but for the route.
pub(crate) struct Egress {
    reach: Reach,
    _tasks: JoinSet<()>,
    _lookup: Option<sys::SkLookup>,
}

impl Egress {
    /// Leads connections from now on, and questions for names.
    pub fn open(reach: Reach, answerers: &Answerers) -> io::Result<Self> {
        sys::route_to_loopback(reach.only(), true)?;
        let opened = Self::listen(reach, answerers);
        if opened.is_err() {
            let _ = sys::route_to_loopback(reach.only(), false);
        }
        opened
    }

    /// How far it leads.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Takes the route away: every other address is unreachable then, as it was at the start.
    pub fn close(self) -> io::Result<()> {
        sys::route_to_loopback(self.reach.only(), false)
    }

    fn listen(reach: Reach, answerers: &Answerers) -> io::Result<Self> {
        let (mut tasks, places) = (JoinSet::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
        let address = match reach {
            Reach::Everything => (STUB, LISTENER),
            Reach::Metadata => (metadata::ADDRESS, metadata::PORT),
        };
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        if reach == Reach::Metadata {
            tasks.spawn(accept(TcpListener::from_std(listener)?, answerers.clone(), places));
            return Ok(Self { reach, _tasks: tasks, _lookup: None });
        }
        let lookup = sys::SkLookup::attach(&listener)?;
        let listener = TcpListener::from_std(listener)?;
        let names = std::net::UdpSocket::bind((STUB, DNS))?;
        names.set_nonblocking(true)?;
        let names = UdpSocket::from_std(names)?;
        tasks.spawn(accept(listener, answerers.clone(), places.clone()));
        tasks.spawn(answer(names, answerers.streams.clone(), places));
        Ok(Self { reach, _tasks: tasks, _lookup: Some(lookup) })
    }
}

async fn accept(listener: TcpListener, answerers: Answerers, places: Arc<Semaphore>) {
    let mut tasks = JoinSet::new();
    loop {
        // The others wait in the listener's queue.
        let place = places.clone().acquire_owned().await.expect("nobody closes it");
        match listener.accept().await {
            Ok((connection, _)) => {
                while tasks.try_join_next().is_some() {}
                let answerers = answerers.clone();
                tasks.spawn(async move {
                    carry(connection, &answerers).await;
                    drop(place);
                });
            }
            Err(error) => {
                crate::say!("accepting a connection out of the guest failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(mut connection: TcpStream, Answerers { streams, metadata }: &Answerers) {
    let Ok(wanted) = connection.local_addr() else { return };
    if wanted == SocketAddr::from((metadata::ADDRESS, metadata::PORT)) && metadata.has_role() {
        // Whoever asked wrongly or left is no business of ours.
        let _ = metadata.serve(&mut connection).await;
        return;
    }
    let names = wanted == SocketAddr::new(IpAddr::V4(STUB), DNS);
    let carried = async {
        let mut stream = streams.open(if names { Wanted::Names } else { Wanted::Tcp(wanted) }).await?;
        connection.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut connection, &mut stream).await
    };
    if carried.await.is_err() {
        // Not an orderly end.
        let _ = connection.set_zero_linger();
    }
}

/// The stub: each datagram is a question, asked on a stream of its own.
async fn answer(socket: UdpSocket, streams: Arc<Streams>, places: Arc<Semaphore>) {
    let socket = Arc::new(socket);
    let mut tasks = JoinSet::new();
    let mut question = vec![0; MAX_DATAGRAM];
    loop {
        let Ok((length, asker)) = socket.recv_from(&mut question).await else { continue };
        // Too many at a time: whoever asks asks again.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        while tasks.try_join_next().is_some() {}
        let (question, streams, socket) = (question[..length].to_vec(), streams.clone(), socket.clone());
        tasks.spawn(async move {
            if let Ok(Ok(answer)) = tokio::time::timeout(NAME_PATIENCE, ask(&question, &streams)).await {
                // It is asked again if it is lost.
                let _ = socket.send_to(&answer, asker).await;
            }
            drop(place);
        });
    }
}

async fn ask(question: &[u8], streams: &Streams) -> io::Result<Vec<u8>> {
    let mut stream = streams.open(Wanted::Names).await?;
    let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    truncated(&mut answer, question);
    Ok(answer)
}

/// What is too long for a datagram is cut to its head with the bit that says so (RFC 1035 §4.1.1); the asker comes again by TCP.
fn truncated(answer: &mut Vec<u8>, question: &[u8]) {
    const HEADER: usize = 12;
    if answer.len() <= datagram_room(question) || answer.len() < HEADER {
        return;
    }
    answer.truncate(HEADER);
    answer[2] |= 0x02;
    // No question, answer, authority or additional record follows.
    answer[4..].fill(0);
}

/// What an asker takes: 512 bytes, or what its OPT record says, which is the last of its question (RFC 6891 §6.1.2).
fn datagram_room(question: &[u8]) -> usize {
    const OPT: [u8; 3] = [0, 0, 41];
    // Without options it has 11 bytes: root, type, size, four of flags, no data.
    let record = question.len().checked_sub(11).and_then(|at| question.get(at..));
    match record {
        Some([a, b, c, high, low, ..]) if [*a, *b, *c] == OPT => usize::from(u16::from_be_bytes([*high, *low])).clamp(512, MAX_DATAGRAM),
        _ => 512,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_of_a_host_that_is_gone_is_passed_over() {
        let streams = Arc::new(Streams::default());
        drop(streams.add());
        let mut host = streams.add();
        let opening = tokio::spawn({
            let streams = streams.clone();
            async move { streams.open(Wanted::Names).await }
        });
        let mut header = [0; protocol::egress::HEADER_BYTES];
        host.read_exact(&mut header).await.unwrap();
        assert_eq!(Wanted::from_bytes(&header), Some(Wanted::Names));
        host.write_all(&[Answer::Open as u8, 7]).await.unwrap();
        assert_eq!(opening.await.unwrap().unwrap().read_u8().await.unwrap(), 7);
        // A word of refusal is an answer.
        let mut host = streams.add();
        let refusing = async {
            host.read_exact(&mut header).await.unwrap();
            host.write_all(&[Answer::Forbidden as u8]).await.unwrap();
        };
        let (refused, ()) = tokio::join!(streams.open(Wanted::Names), refusing);
        assert_eq!(refused.err().map(|error| error.kind()), Some(io::ErrorKind::ConnectionRefused));
    }

    #[test]
    fn a_long_answer_is_cut_for_those_who_cannot_take_it() {
        let question = [&[0; 12][..], b"\x01a\0\0\x01\0\x01"].concat();
        let with_room = |bytes: u16| [&question[..], &[0, 0, 41], &bytes.to_be_bytes(), &[0; 6]].concat();
        assert_eq!(datagram_room(&question), 512);
        assert_eq!(datagram_room(&with_room(1232)), 1232);
        assert_eq!(datagram_room(&with_room(65535)), MAX_DATAGRAM);
        assert_eq!(datagram_room(&[]), 512);
        let long = [&[1, 2, 0x81, 0x80, 0, 1, 0, 9, 0, 0, 0, 0][..], &[7; 900]].concat();
        let mut answer = long.clone();
        truncated(&mut answer, &with_room(1232));
        assert_eq!(answer, long);
        truncated(&mut answer, &question);
        assert_eq!(answer, [1, 2, 0x83, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
