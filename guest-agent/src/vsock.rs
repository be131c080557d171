//! The vsock port that the host connects to, and a connection as an async byte stream.
//!
//! Where there is a vsock device it takes the place of the virtio-serial port. A connection may end (the host's process is
//! another one, or a snapshot was restored without its streams); the next is accepted then. Only the host is let in: whoever
//! else can name this port in some kernel to come is turned away.

use std::{
    fs, io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::{io::Errno, net::Shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

use crate::sys;

/// As in `vmm_protocol::control::AGENT_PORT`.
const PORT: u32 = 1024;
/// The host's context id (virtio 1.2 §5.10.4).
const HOST_CID: u32 = 2;
/// Device type of a socket device (virtio 1.2 §5), as sysfs writes it.
const DEVICE_TYPE: &str = "0x0013";

/// Whether the machine has a vsock device.
pub(crate) fn has_device() -> bool {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else { return false };
    devices.flatten().any(|device| fs::read_to_string(device.path().join("device")).is_ok_and(|kind| kind.trim_end() == DEVICE_TYPE))
}

/// The port.
pub(crate) struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: sys::watch_readable(sys::listen_vsock(PORT)?)? })
    }

    /// The host's next connection.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let mut guard = self.socket.readable().await?;
            match sys::accept_vsock(guard.get_inner()) {
                Ok((socket, HOST_CID)) => return Ok(Connection { socket: sys::watch_both(socket)? }),
                Ok((_, stranger)) => crate::say!("a connection from context {stranger} was turned away"),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => guard.clear_ready(),
                    // It was gone before it was accepted.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

/// A connection.
pub(crate) struct Connection {
    socket: AsyncFd<OwnedFd>,
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            match rustix::io::read(guard.get_inner(), buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(cx))?;
            match rustix::io::write(guard.get_inner(), buf) {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(self.socket.get_ref(), Shutdown::Write).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A connection on a socket that behaves as a vsock one does, and its other end.
    fn connected() -> (Connection, Connection) {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        let connection = |socket| Connection { socket: sys::watch_both(socket).unwrap() };
        (connection(ours), connection(theirs))
    }

    #[tokio::test]
    async fn bytes_and_the_end_arrive_however_slow_the_reader_is() {
        let (mut ours, mut theirs) = connected();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let writing = async {
            ours.write_all(&sent).await.unwrap();
            ours.shutdown().await.unwrap();
            // The other direction stays open.
            let mut answer = [0; 4];
            ours.read_exact(&mut answer).await.unwrap();
            answer
        };
        let reading = async {
            let mut heard = Vec::new();
            theirs.read_to_end(&mut heard).await.unwrap();
            theirs.write_all(b"done").await.unwrap();
            heard
        };
        let (answer, heard) = tokio::join!(writing, reading);
        assert!(heard == sent);
        assert_eq!(&answer, b"done");
    }

    #[tokio::test]
    async fn a_host_that_is_gone_fails_a_write() {
        let (mut ours, theirs) = connected();
        drop(theirs);
        assert_eq!(ours.write_all(b"hello?").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
