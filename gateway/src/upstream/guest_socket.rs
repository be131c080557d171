//! A guest stream as pingora's socket, for connections that are never reused.

use std::{
    fmt, io,
    pin::Pin,
    sync::Mutex,
    task::{Context, Poll},
};

use pingora_core::protocols::l4::virt::{VirtualSockOpt, VirtualSocket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::GuestStream;

use crate::metrics::Open;

/// The stream. Its drop closes it.
pub(crate) struct GuestSocket {
    // Never locked: pingora wants `Sync`, and every use has `&mut`.
    stream: Mutex<GuestStream>,
    first_read: FirstRead,
    _open: Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstRead {
    Ahead,
    Yielded,
}

impl GuestSocket {
    /// Wraps a stream and counts it as open.
    pub fn new(stream: GuestStream, open: Open) -> Self {
        Self { stream: Mutex::new(stream), first_read: FirstRead::Ahead, _open: open }
    }

    fn stream(&mut self) -> Pin<&mut (dyn vmm_runtime::engine::ByteStream + '_)> {
        self.stream.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).as_mut()
    }
}

impl fmt::Debug for GuestSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestSocket")
    }
}

impl AsyncRead for GuestSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first_read == FirstRead::Ahead {
            // pingora issue #946: if the 101 is read before the end of the (empty) request body has gone through its
            // other task, the tunnel is torn down. Yielding once lets the body go first.
            self.first_read = FirstRead::Yielded;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.stream().poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}

impl VirtualSocket for GuestSocket {
    fn set_socket_option(&self, _option: VirtualSockOpt) -> io::Result<()> {
        Ok(())
    }
}
