//! A connection within the agent, which tells a reset from an orderly end as one of TCP does.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// One end. Dropped before it has been shut down, it resets the other.
pub(crate) struct Pipe {
    io: DuplexStream,
    /// Says the other end of this one's reset.
    reset: Arc<AtomicBool>,
    other_reset: Arc<AtomicBool>,
    shut: bool,
}

/// Both ends, with so much room each way.
pub(crate) fn pair(bytes: usize) -> (Pipe, Pipe) {
    let (a, b) = tokio::io::duplex(bytes);
    let (a_reset, b_reset) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let end = |io, reset: &Arc<AtomicBool>, other: &Arc<AtomicBool>| Pipe { io, reset: reset.clone(), other_reset: other.clone(), shut: false };
    (end(a, &a_reset, &b_reset), end(b, &b_reset, &a_reset))
}

impl Pipe {
    /// Whether the other end has been reset.
    pub fn is_reset(&self) -> bool {
        self.other_reset.load(Ordering::Acquire)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Before the stream itself goes, so that nobody takes the reset for an end.
        if !self.shut {
            self.reset.store(true, Ordering::Release);
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        let ended = matches!(read, Poll::Ready(Ok(()))) && buf.filled().len() == before && buf.remaining() > 0;
        if ended && self.is_reset() { Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())) } else { read }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn an_end_is_an_end_and_a_reset_a_reset() {
        let (mut a, mut b) = pair(64);
        a.write_all(b"bye").await.unwrap();
        a.shutdown().await.unwrap();
        let mut read = Vec::new();
        b.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"bye");
        b.write_all(b"late").await.unwrap();
        drop(b);
        let mut read = [0; 4];
        a.read_exact(&mut read).await.unwrap();
        assert_eq!(a.read(&mut read).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(a.is_reset());
    }
}
