//! The virtio-serial port to the host as an async byte stream.
//!
//! A primer. The port is a character device that one process may open. While no host is connected, `read` answers 0,
//! `write` answers EAGAIN, and `poll` says hang-up, for as long as that lasts; a host that connects later is heard on the
//! same file descriptor. Readiness that stays on would make the runtime spin, and the runtime never forgets a hang-up. So
//! each direction has an epoll of its own, edge-triggered, and the runtime watches only whether that epoll has news.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::{
    event::epoll,
    fs::{Mode, OFlags},
    io::Errno,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    time::Sleep,
};

use crate::{
    machine::{Doing, SetupError},
    sys,
};

pub(crate) const NAME: &str = "dormouse.agent";
/// How often a port without a host is looked at, should an edge be missed.
const RECHECK: Duration = Duration::from_millis(40);

/// The open port.
pub(crate) struct AgentPort {
    port: OwnedFd,
    readable: Edge,
    writable: Edge,
}

impl AgentPort {
    /// Opens the host's port.
    pub fn open(device: &Path) -> Result<Self, SetupError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let port = rustix::fs::open(device, flags, Mode::empty()).doing(|| format!("opening {}", device.display()))?;
        let edge = |flags| Edge::new(&port, flags).doing(|| format!("watching {}", device.display()));
        Ok(Self { readable: edge(epoll::EventFlags::IN)?, writable: edge(epoll::EventFlags::OUT)?, port })
    }
}

/// The device of the host's port, if it is there (yet).
pub(crate) fn find() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let named = ports.flatten().find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim_end() == NAME))?;
    let device = PathBuf::from("/dev").join(named.file_name());
    device.try_exists().is_ok_and(|there| there).then_some(device)
}

impl AsyncRead for AgentPort {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match rustix::io::read(&this.port, buf.initialize_unfilled()) {
                // Not the end: no host is connected.
                Ok(0) if buf.remaining() > 0 => ready!(this.readable.poll_or_recheck(cx))?,
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => ready!(this.readable.poll(cx))?,
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for AgentPort {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            match rustix::io::write(&this.port, buf) {
                Ok(written) => return Poll::Ready(Ok(written)),
                // Either the queue is full or no host is connected.
                Err(Errno::AGAIN) => ready!(this.writable.poll_or_recheck(cx))?,
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The port is never closed.
    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// News of one direction of the port.
struct Edge {
    epoll: AsyncFd<OwnedFd>,
    /// Runs while no host is connected.
    recheck: Option<Pin<Box<Sleep>>>,
}

impl Edge {
    fn new(port: &OwnedFd, direction: epoll::EventFlags) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, port, epoll::EventData::new_u64(0), direction | epoll::EventFlags::ET)?;
        Ok(Self { epoll: sys::watch_readable(epoll)?, recheck: None })
    }

    /// Ready when something has happened to the port. Called after a try that got nothing.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.epoll.poll_read_ready(cx))?;
            let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
            let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if epoll::wait(guard.get_inner(), &mut events[..], Some(&at_once))? > 0 {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }

    /// As [`Edge::poll`], and also ready every now and then.
    fn poll_or_recheck(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(news) = self.poll(cx) {
            return Poll::Ready(news);
        }
        let recheck = self.recheck.get_or_insert_with(|| Box::pin(tokio::time::sleep(RECHECK)));
        ready!(recheck.as_mut().poll(cx));
        self.recheck = None;
        Poll::Ready(Ok(()))
    }
}
