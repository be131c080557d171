//! What keeps the node from writing to a guest that is being suspended.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Open at first. The mutex guards a flag and the list of those who wait, for moments.
#[derive(Default)]
pub(super) struct Gate(Mutex<State>);

#[derive(Default)]
struct State {
    shut: bool,
    waiting: Vec<Waker>,
}

impl Gate {
    /// From now on nobody passes.
    pub fn shut(&self) {
        self.0.lock().shut = true;
    }

    /// Everybody passes again.
    pub fn open(&self) {
        let waiting = {
            let mut state = self.0.lock();
            state.shut = false;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.0.lock();
        if !state.shut {
            return Poll::Ready(());
        }
        // Nobody waits twice with the same waker, however often it is polled.
        if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Waits until it is open.
    pub async fn opened(&self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }
}

/// A stream to a guest whose writes pass the gate.
pub(super) struct Gated<S> {
    io: S,
    gate: Arc<Gate>,
}

impl<S> Gated<S> {
    pub fn new(io: S, gate: Arc<Gate>) -> Self {
        Self { io, gate }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gated<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gated<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.gate.poll(cx));
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.gate.poll(cx));
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_shut_gate_holds_every_byte_back_and_loses_none() {
        let gate = Arc::new(Gate::default());
        let (near, mut far) = tokio::io::duplex(64);
        let mut gated = Gated::new(near, gate.clone());
        gated.write_all(b"before").await.unwrap();
        gate.shut();
        let writing = tokio::spawn(async move {
            gated.write_all(b" after").await.unwrap();
            gated.shutdown().await.unwrap();
        });
        let mut read = [0; 6];
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"before");
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!writing.is_finished());
        gate.open();
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b" after");
    }
}
