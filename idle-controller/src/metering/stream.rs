//! Bytes on the streams of an endpoint, counted on their way.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::{ByteStream, GuestStream};

/// Bytes that are not in a `Usage` yet.
#[derive(Default)]
pub(super) struct EndpointBytes {
    sent: AtomicU64,
    received: AtomicU64,
}

impl EndpointBytes {
    /// Sent by the guest and received by it, since the last time.
    pub(super) fn take(&self) -> (u64, u64) {
        (self.sent.swap(0, Ordering::Relaxed), self.received.swap(0, Ordering::Relaxed))
    }
}

/// A stream to a guest.
pub(super) struct Counting {
    stream: GuestStream,
    bytes: Arc<EndpointBytes>,
}

impl Counting {
    pub(super) fn new(stream: GuestStream, bytes: Arc<EndpointBytes>) -> Self {
        Self { stream, bytes }
    }

    fn written(&self, outcome: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(written)) = outcome {
            self.bytes.received.fetch_add(*written as u64, Ordering::Relaxed);
        }
    }
}

impl ByteStream for Counting {
    fn written(&self) -> u64 {
        self.stream.written()
    }

    fn poll_untouched(&mut self, cx: &mut Context<'_>, from: u64) -> Poll<bool> {
        self.stream.poll_untouched(cx, from)
    }
}

impl AsyncRead for Counting {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let outcome = self.stream.as_mut().poll_read(cx, buf);
        let read = buf.filled().len() - before;
        if read > 0 {
            self.bytes.sent.fetch_add(read as u64, Ordering::Relaxed);
        }
        outcome
    }
}

impl AsyncWrite for Counting {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = self.stream.as_mut().poll_write(cx, buf);
        self.written(&outcome);
        outcome
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = self.stream.as_mut().poll_write_vectored(cx, bufs);
        self.written(&outcome);
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }
}
