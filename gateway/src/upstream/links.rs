//! Ties a guest stream to a named socket pair, so that pingora can pool it.
//!
//! Owns: one private listener of this process in a directory of mode 0700, one task per tied stream that carries bytes
//! both ways, and the record of what each descriptor leads to. The record is asked each time a pooled connection is used
//! again: pingora's pool key is a 64-bit hash without a check for equality, and a collision would hand one tenant's
//! connection to another (cases.md 32).

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::{
            fs::DirBuilderExt as _,
            net::{UnixListener as StdListener, UnixStream as StdStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use dashmap::DashMap;
use model::{Generation, MicrovmId, Port};
use prometheus::IntGauge;
use tokio::{io::AsyncWriteExt as _, net::UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmm_runtime::engine::GuestStream;

use super::transport::Transport;
use crate::{error::GatewayError, metrics::Open};

/// A socket address holds a path of 108 bytes with its end mark.
const MAX_PATH: usize = 107;

/// What is spoken with an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1.1 that may become a WebSocket; never reused.
    WebSocket,
}

/// What a connection leads to. Two connections may stand in for one another only if all of it is equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    /// The microVM.
    pub microvm: MicrovmId,
    /// The guest port.
    pub port: Port,
    /// The restore it belongs to; a connection of an older one is dead (design §4 rule 5).
    pub generation: Generation,
    /// The protocol.
    pub speaks: Speaks,
    /// What it is spoken over.
    pub transport: Transport,
}

/// One tied stream.
#[derive(Debug)]
pub(crate) struct Link {
    /// Where it leads.
    pub target: Target,
    cut: CancellationToken,
    broken: AtomicBool,
}

impl Link {
    /// Ends it at once; pingora reads an end of file.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Whether the guest's end was reset, which a socket pair can only show as an orderly end.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }
}

/// All tied streams of one gateway.
pub(crate) struct Links {
    dir: PathBuf,
    path: PathBuf,
    // Guards connect and accept as one step, so that the two ends are a pair. Held for two system calls, neither of
    // which waits: the backlog is empty whenever it is taken.
    listener: Mutex<StdListener>,
    by_descriptor: DashMap<RawFd, Arc<Link>>,
    tasks: TaskTracker,
    ended: CancellationToken,
    open: IntGauge,
}

impl Links {
    /// Makes the private directory and the listener in it.
    pub fn open(runtime_dir: &Path, open: IntGauge) -> Result<Self, GatewayError> {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let dir = runtime_dir.join(format!("dormouse-edge-{}", &unique[..12]));
        let path = dir.join("guest");
        if path.as_os_str().len() > MAX_PATH || path.to_str().is_none() {
            return Err(GatewayError::PathTooLong { path, limit: MAX_PATH });
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| GatewayError::PrivateSocket { path, source }
        };
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(failed(&dir))?;
        let listener = StdListener::bind(&path).map_err(failed(&path))?;
        // An accept that would wait is a fault, never a hang.
        listener.set_nonblocking(true).map_err(failed(&path))?;
        Ok(Self {
            dir,
            path,
            listener: Mutex::new(listener),
            by_descriptor: DashMap::new(),
            tasks: TaskTracker::new(),
            ended: CancellationToken::new(),
            open,
        })
    }

    /// The address that every tied stream's pingora end is connected to.
    pub fn path(&self) -> &str {
        self.path.to_str().expect("checked when it was made")
    }

    /// The private directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Counts a stream to a guest as open while the guard lives.
    pub fn count_open(&self) -> Open {
        Open::new(&self.open)
    }

    /// What a descriptor of pingora's leads to.
    pub fn find(&self, descriptor: RawFd) -> Option<Arc<Link>> {
        self.by_descriptor.get(&descriptor).map(|link| link.clone())
    }

    /// Ties a guest stream. Dropping the returned end closes the stream.
    pub fn tie(self: &Arc<Self>, target: Target, guest: GuestStream) -> io::Result<UnixStream> {
        let (ours, pingoras) = self.pair()?;
        let link = Arc::new(Link { target, cut: self.ended.child_token(), broken: AtomicBool::new(false) });
        let descriptor = pingoras.as_raw_fd();
        self.by_descriptor.insert(descriptor, link.clone());
        let links = self.clone();
        self.tasks.spawn(async move {
            let _open = links.count_open();
            tokio::select! {
                () = carry(ours, guest, &link) => {}
                () = link.cut.cancelled() => {}
            }
            // By now the descriptor's number may be another connection's.
            links.by_descriptor.remove_if(&descriptor, |_, current| Arc::ptr_eq(current, &link));
        });
        Ok(pingoras)
    }

    /// Runs something beside a connection; it ends with the gateway.
    pub fn watch(&self, watch: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = watch => {}
                () = ended.cancelled() => {}
            }
        })
    }

    /// Ends every tied stream.
    pub async fn close(&self) {
        self.ended.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn pair(&self) -> io::Result<(UnixStream, UnixStream)> {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        let pingoras = StdStream::connect(&self.path)?;
        let ours = loop {
            let (candidate, _) = listener.accept()?;
            // The directory is private, but a process of the same user could still get in first.
            let peer = rustix::net::sockopt::socket_peercred(&candidate)?;
            if peer.pid == rustix::process::getpid() {
                break candidate;
            }
        };
        drop(listener);
        for end in [&ours, &pingoras] {
            end.set_nonblocking(true)?;
        }
        Ok((UnixStream::from_std(ours)?, UnixStream::from_std(pingoras)?))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.ended.cancel();
        // The name is of no use to anybody any more; if it stays, nothing breaks.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Carries bytes until pingora's end is closed or both directions are done.
async fn carry(ours: UnixStream, guest: GuestStream, link: &Link) {
    let (mut from_pingora, mut to_pingora) = ours.into_split();
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    let up = async {
        let _ = tokio::io::copy(&mut from_pingora, &mut to_guest).await;
        // pingora never half-closes: its end of file means that nobody reads any more either.
        let _ = to_guest.shutdown().await;
    };
    let down = async {
        if let Err(error) = tokio::io::copy(&mut from_guest, &mut to_pingora).await
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            link.broken.store(true, Ordering::Release);
        }
        let _ = to_pingora.shutdown().await;
        // The guest has said all; it may still take the rest of a request.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;

    fn links() -> (tempfile::TempDir, Arc<Links>) {
        let dir = tempfile::tempdir().unwrap();
        let links = Links::open(dir.path(), IntGauge::new("open", "open").unwrap()).unwrap();
        (dir, Arc::new(links))
    }

    fn target(port: u16) -> Target {
        Target { microvm: MicrovmId::random(), port: Port::new(port).unwrap(), generation: Generation(1), speaks: Speaks::Http1, transport: Transport::Plain }
    }

    fn tied(links: &Arc<Links>, target: Target) -> (UnixStream, DuplexStream) {
        let (guest, app) = tokio::io::duplex(1024);
        (links.tie(target, Box::pin(guest)).unwrap(), app)
    }

    #[tokio::test]
    async fn bytes_and_ends_cross_both_ways() {
        let (_dir, links) = links();
        let (mut pingoras, mut app) = tied(&links, target(1));
        pingoras.write_all(b"ping").await.unwrap();
        let mut four = [0; 4];
        app.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"ping");

        // The guest closes first: pingora reads the end, and can still send.
        app.write_all(b"bye").await.unwrap();
        app.shutdown().await.unwrap();
        let mut text = String::new();
        pingoras.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "bye");
        pingoras.write_all(b"late").await.unwrap();
        app.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"late");

        // pingora closes: the guest reads the end, the task is gone.
        drop(pingoras);
        assert_eq!(app.read(&mut four).await.unwrap(), 0);
        links.tasks.close();
        links.tasks.wait().await;
        assert!(links.by_descriptor.is_empty());
        assert_eq!(links.open.get(), 0);
    }

    #[tokio::test]
    async fn each_end_belongs_to_its_own_pair() {
        let (_dir, links) = links();
        let mut all: Vec<_> = (1..=50).map(|port| (port, tied(&links, target(port)))).collect();
        for (port, (pingoras, app)) in &mut all {
            assert_eq!(links.find(pingoras.as_raw_fd()).unwrap().target.port.get(), *port);
            app.write_all(&port.to_be_bytes()).await.unwrap();
            let mut read = [0; 2];
            pingoras.read_exact(&mut read).await.unwrap();
            assert_eq!(u16::from_be_bytes(read), *port);
        }
        links.close().await;
        assert!(links.by_descriptor.is_empty());
    }

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_the_gateway() {
        let (dir, links) = links();
        let made = links.dir.clone();
        assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700);
        drop(links);
        assert!(fs::symlink_metadata(&made).is_err(), "{} is still there", made.display());
        drop(dir);
    }

    #[tokio::test]
    async fn a_long_runtime_directory_is_refused_with_its_path() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        let error = Links::open(&long, IntGauge::new("open", "open").unwrap()).err().expect("too long");
        assert!(matches!(error, GatewayError::PathTooLong { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_cut_link_ends_for_both_sides() {
        let (_dir, links) = links();
        let (mut pingoras, mut app) = tied(&links, target(1));
        links.find(pingoras.as_raw_fd()).unwrap().cut();
        assert_eq!(pingoras.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(app.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
