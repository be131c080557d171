//! How one process follows another on the same data directory without a connection being refused.
//!
//! The listening sockets pass from the running process to the new one over `<data>/run/handover.sock` (SCM_RIGHTS); both
//! then hold the same sockets, so the kernel's queue of connections goes on whichever of them ends. In order:
//!
//! ```text
//! new: connects                                  old: sends the sockets
//! new: makes everything that needs no microVM, accepts connections and holds their requests, says `ready`
//!                                                old: drains, lets go of registry, VMMs and lock, says `released`
//! new: opens the registry, adopts the VMMs, serves what it holds, says `adopted`
//!                                                old: ends
//! ```
//!
//! If the new process ends before `ready`, nothing has happened to the old one. If it ends after that and before `adopted`,
//! the old one, which has kept the sockets, starts again.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use config::Config;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// One byte each; the sockets travel with the first one.
const SOCKETS: u8 = b'S';
const READY: u8 = b'R';
const RELEASED: u8 = b'L';
const ADOPTED: u8 = b'A';
/// Edge, API, admin.
const COUNT: usize = 3;
/// A new process that takes longer than this to be ready is not waited for.
const PREPARATION: Duration = Duration::from_secs(120);

fn socket(data_dir: &Path) -> PathBuf {
    data_dir.join("run/handover.sock")
}

/// The node's listening sockets, held as long as the process lives.
pub struct Listeners {
    /// Clients.
    pub edge: TcpListener,
    /// The control API.
    pub api: TcpListener,
    /// Metrics and health.
    pub admin: TcpListener,
}

impl Listeners {
    /// Opens them where the configuration says.
    pub fn open(config: &Config) -> Result<Self> {
        let open = |(key, address): (&str, SocketAddr)| {
            TcpListener::bind(address).with_context(|| format!("{key}: opening {address} (is another node or program using it?)"))
        };
        let [edge, api, admin] = Self::wanted(config).map(open);
        Ok(Self { edge: edge?, api: api?, admin: admin? })
    }

    fn wanted(config: &Config) -> [(&'static str, SocketAddr); COUNT] {
        [("edge.listen", config.edge.listen), ("api.listen", config.api.listen), ("admin.listen", config.admin.listen)]
    }

    fn all(&self) -> [&TcpListener; COUNT] {
        [&self.edge, &self.api, &self.admin]
    }

    /// Sockets that were taken over must be those that the configuration asks for.
    fn check(&self, config: &Config) -> Result<()> {
        for ((key, wanted), listener) in Self::wanted(config).into_iter().zip(self.all()) {
            let is = listener.local_addr()?;
            if is.ip() != wanted.ip() || (wanted.port() != 0 && wanted.port() != is.port()) {
                bail!("{key} is {wanted}, but the running node listens on {is}: an upgrade keeps addresses; set it back, or stop the node and start it anew");
            }
        }
        Ok(())
    }

    /// For tokio.
    pub fn for_tokio(listener: &TcpListener) -> io::Result<tokio::net::TcpListener> {
        let listener = listener.try_clone()?;
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    }
}

// -- the new process ------------------------------------------------------------------------------------------------

/// The process that runs before this one.
pub struct Predecessor {
    stream: UnixStream,
}

/// Takes the sockets of the node that runs on this data directory.
pub fn take_over(data_dir: &Path, config: &Config) -> Result<(Listeners, Predecessor)> {
    let path = socket(data_dir);
    let stream = UnixStream::connect(&path)
        .with_context(|| format!("no running node can be reached at {}; start one without --upgrade", path.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0];
    let got = rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut word)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .with_context(|| format!("receiving the sockets of the running node over {}", path.display()))?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    let Ok([edge, api, admin]) = <[OwnedFd; COUNT]>::try_from(fds) else {
        bail!("the running node did not give its sockets away ({} bytes came); is another upgrade under way?", got.bytes);
    };
    if word != [SOCKETS] {
        bail!("the running node speaks another form of handover; stop it and start the new one instead");
    }
    let listeners = Listeners { edge: edge.into(), api: api.into(), admin: admin.into() };
    listeners.check(config)?;
    stream.set_read_timeout(None)?;
    Ok((listeners, Predecessor { stream }))
}

impl Predecessor {
    /// Tells it to go and waits until it has let go of everything, or has ended.
    pub async fn replace(self) -> Result<Replaced> {
        self.stream.set_nonblocking(true)?;
        let mut stream = tokio::net::UnixStream::from_std(self.stream)?;
        stream.write_all(&[READY]).await.context("telling the running node to go; it has ended meanwhile")?;
        let mut word = [0];
        match stream.read(&mut word).await {
            Ok(1) if word == [RELEASED] => {}
            // What it held, the kernel has taken back.
            outcome => tracing::warn!(?outcome, "the running node ended before it had let go in order"),
        }
        Ok(Replaced { stream })
    }
}

/// A predecessor that has let go and waits to hear that all is well.
pub struct Replaced {
    stream: tokio::net::UnixStream,
}

impl Replaced {
    /// It may end.
    pub async fn adopted(mut self) {
        // If it is gone already, nobody needs to be told.
        let _ = self.stream.write_all(&[ADOPTED]).await;
    }
}

// -- the running process --------------------------------------------------------------------------------------------

/// Where a new process may ask for the sockets.
pub struct Offer {
    listener: tokio::net::UnixListener,
}

/// A new process that accepts connections by now and waits for the microVMs.
pub struct Successor {
    stream: UnixStream,
}

impl Offer {
    /// Makes the socket anew: whoever made the one that may be there is not the node of this data directory any more.
    pub fn open(data_dir: &Path) -> Result<Self> {
        let path = socket(data_dir);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(|| format!("removing {}", path.display())),
            _ => {}
        }
        let listener = tokio::net::UnixListener::bind(&path).with_context(|| format!("making {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(|| format!("closing {} to others", path.display()))?;
        Ok(Self { listener })
    }

    /// Waits for a new process that is ready to follow.
    pub async fn successor(&self, listeners: &Listeners) -> Successor {
        loop {
            let outcome = async {
                let (stream, _) = self.listener.accept().await.context("accepting a new process")?;
                tracing::info!("a new process asks for the sockets");
                tokio::time::timeout(PREPARATION, give(stream, listeners)).await.context("it was not ready in time")?
            };
            match outcome.await {
                Ok(successor) => return successor,
                Err(error) => {
                    tracing::error!(error = model::chain(error.as_ref()), "no new process followed; this one goes on");
                    // An accept that fails for want of descriptors would spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn give(mut stream: tokio::net::UnixStream, listeners: &Listeners) -> Result<Successor> {
    let peer = stream.peer_cred().context("looking who it is")?;
    let us = rustix::process::geteuid().as_raw();
    if peer.uid() != us && peer.uid() != 0 {
        bail!("user {} is not the node's own ({us})", peer.uid());
    }
    let fds = listeners.all().map(|listener| listener.as_fd());
    stream
        .async_io(tokio::io::Interest::WRITABLE, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            Ok(rustix::net::sendmsg(&stream, &[IoSlice::new(&[SOCKETS])], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await
        .context("sending it the sockets")?;
    let mut word = [0];
    match stream.read(&mut word).await.context("waiting until it is ready")? {
        1 if word == [READY] => {}
        _ => bail!("it ended before it was ready; its own last words say why"),
    }
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(Successor { stream })
}

impl Successor {
    /// Lets it go on, and waits for what becomes of it: whether it has taken over.
    pub fn release(mut self) -> bool {
        let mut word = [0];
        // It may have ended; the answer says so as well.
        let _ = self.stream.write_all(&[RELEASED]);
        matches!(self.stream.read(&mut word), Ok(1)) && word == [ADOPTED]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::parse("[edge]\nlisten = \"127.0.0.1:0\"\n[api]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n").unwrap()
    }

    fn dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        dir
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_sockets_pass_and_every_word_is_heard() {
        let (dir, config) = (dir(), config());
        let listeners = Listeners::open(&config).unwrap();
        let edge = listeners.edge.local_addr().unwrap();
        let offer = Offer::open(dir.path()).unwrap();
        let data_dir = dir.path().to_owned();
        let new = tokio::spawn(async move {
            let (taken, predecessor) = tokio::task::spawn_blocking(move || take_over(&data_dir, &config)).await.unwrap().unwrap();
            let replaced = predecessor.replace().await.unwrap();
            replaced.adopted().await;
            taken
        });
        let successor = offer.successor(&listeners).await;
        drop((listeners, offer));
        assert!(tokio::task::spawn_blocking(|| successor.release()).await.unwrap());
        let taken = new.await.unwrap();
        assert_eq!(taken.edge.local_addr().unwrap(), edge);
        let client = std::net::TcpStream::connect(edge).unwrap();
        assert_eq!(taken.edge.accept().unwrap().1, client.local_addr().unwrap());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_new_process_that_ends_early_changes_nothing_and_one_that_ends_late_is_seen() {
        let (dir, config) = (dir(), config());
        let listeners = Listeners::open(&config).unwrap();
        let offer = Offer::open(dir.path()).unwrap();
        let data_dir = dir.path().to_owned();
        let late = tokio::spawn(async move {
            let again = (data_dir.clone(), config.clone());
            drop(tokio::task::spawn_blocking(move || take_over(&again.0, &again.1)).await.unwrap().unwrap());
            let (_, predecessor) = tokio::task::spawn_blocking(move || take_over(&data_dir, &config)).await.unwrap().unwrap();
            drop(predecessor.replace().await.unwrap());
        });
        let successor = offer.successor(&listeners).await;
        assert!(!tokio::task::spawn_blocking(|| successor.release()).await.unwrap());
        late.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_upgrade_keeps_addresses_and_needs_a_node() {
        let (dir, mut config) = (dir(), config());
        let nobody = take_over(dir.path(), &config).err().unwrap();
        assert!(nobody.to_string().contains("start one without --upgrade"), "{nobody}");
        let listeners = Listeners::open(&config).unwrap();
        let offer = Offer::open(dir.path()).unwrap();
        config.api.listen = "127.0.0.1:1".parse().unwrap();
        let data_dir = dir.path().to_owned();
        let moved = tokio::task::spawn_blocking(move || take_over(&data_dir, &config).err().unwrap());
        let moved = tokio::select! {
            moved = moved => moved.unwrap(),
            _ = offer.successor(&listeners) => panic!("it followed"),
        };
        assert!(moved.to_string().contains("api.listen is 127.0.0.1:1"), "{moved}");
    }
}
