//! Keeps what a client says by leaving from waking its microVM.
//!
//! A client that cancels a gRPC call makes pingora reset the call's stream, and a byte for a sleeper wakes it. For an app that
//! sleeps, a reset is worth nothing: it is kept until something else is said to it, or until the app itself speaks.
//!
//! Owns: the resets (RFC 9113 §6.4) that are kept. Never keeps
//! anything else: a window update, an answer to a ping or to settings may be what an app waits for.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::{ByteStream, GuestStream};

use super::links::Asleep;
use crate::h2_frames::{FRAME_HEADER, Frames};

/// What every connection begins with before its first frame (RFC 9113 §3.4).
const PREFACE_LENGTH: usize = 24;
const RST_STREAM: u8 = 0x3;
/// A whole RST_STREAM frame: the header and an error code.
const RESET: usize = FRAME_HEADER + 4;
/// Resets that are kept at a time. There are no more than streams at a time on a connection; one more passes, and wakes.
const MOST: usize = 256;

/// A guest stream of HTTP/2.
pub(crate) struct Resets {
    guest: GuestStream,
    asleep: Asleep,
    frames: Frames,
    /// Whole frames that the guest has not been sent, but for the first `sent` bytes.
    kept: Vec<u8>,
    sent: usize,
}

impl Resets {
    /// Before anything was written to the guest.
    pub fn new(guest: GuestStream, asleep: Asleep) -> Self {
        Self { guest, asleep, frames: Frames::behind(PREFACE_LENGTH), kept: Vec::new(), sent: 0 }
    }

    /// Whether all of this is resets that a sleeper need not hear of.
    fn may_wait(&self, bytes: &[u8]) -> bool {
        let resets = !bytes.is_empty() && bytes.len().is_multiple_of(RESET) && bytes.chunks(RESET).all(is_reset);
        resets && self.frames.at_boundary() && self.kept.len() + bytes.len() <= MOST * RESET && (self.asleep)()
    }

    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.kept.len() {
            let written = ready!(self.guest.as_mut().poll_write(cx, &self.kept[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        (self.kept, self.sent) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

/// One connection carries many requests: which of its bytes are whose is not known.
impl ByteStream for Resets {}

impl AsyncRead for Resets {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = self.guest.as_mut().poll_read(cx, buf);
        if read.is_ready() && !self.kept.is_empty() {
            // The guest is awake. What it does not take now it takes before the next thing it is sent; an error shows there.
            let _ = self.poll_kept(&mut Context::from_waker(Waker::noop()));
        }
        read
    }
}

impl AsyncWrite for Resets {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.sent == 0 && self.may_wait(bytes) {
            self.kept.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        if !self.kept.is_empty() {
            ready!(self.poll_kept(cx))?;
        }
        let written = ready!(self.guest.as_mut().poll_write(cx, bytes))?;
        self.frames.pass(&bytes[..written], |_, _, _| {});
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.guest.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.guest.as_mut().poll_shutdown(cx)
    }
}

fn is_reset(frame: &[u8]) -> bool {
    frame.len() == RESET && frame[..4] == [0, 0, 4, RST_STREAM]
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    const PREFACE: &[u8; PREFACE_LENGTH] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    fn reset() -> Vec<u8> {
        frame(RST_STREAM, &[0, 0, 0, 8])
    }

    fn connection() -> (Resets, DuplexStream, Arc<AtomicBool>) {
        let (guest, app) = tokio::io::duplex(4096);
        let asleep = Arc::new(AtomicBool::new(false));
        let sleeps = asleep.clone();
        (Resets::new(Box::pin(guest), Box::new(move || sleeps.load(Ordering::SeqCst))), app, asleep)
    }

    async fn reads(app: &mut DuplexStream, wanted: &[u8]) {
        let mut read = vec![0; wanted.len()];
        app.read_exact(&mut read).await.unwrap();
        assert_eq!(read, wanted);
    }

    fn has_nothing(app: &mut DuplexStream) {
        let mut byte = [0];
        let read = Pin::new(app).poll_read(&mut Context::from_waker(Waker::noop()), &mut ReadBuf::new(&mut byte));
        assert!(read.is_pending(), "{read:?} {byte:?}");
    }

    #[tokio::test]
    async fn a_sleeper_hears_of_resets_with_the_next_frame() {
        let (mut pingoras, mut app, asleep) = connection();
        pingoras.write_all(PREFACE).await.unwrap();
        pingoras.write_all(&reset()).await.unwrap();
        reads(&mut app, &[&PREFACE[..], &reset()].concat()).await;
        asleep.store(true, Ordering::SeqCst);
        pingoras.write_all(&[reset(), reset()].concat()).await.unwrap();
        has_nothing(&mut app);
        let data = frame(0, &[7; 20]);
        pingoras.write_all(&data).await.unwrap();
        reads(&mut app, &[reset(), reset(), data].concat()).await;
    }

    #[tokio::test]
    async fn or_when_it_speaks() {
        let (mut pingoras, mut app, asleep) = connection();
        pingoras.write_all(PREFACE).await.unwrap();
        reads(&mut app, PREFACE).await;
        asleep.store(true, Ordering::SeqCst);
        pingoras.write_all(&reset()).await.unwrap();
        has_nothing(&mut app);
        asleep.store(false, Ordering::SeqCst);
        app.write_all(b"awake").await.unwrap();
        pingoras.read_exact(&mut [0; 5]).await.unwrap();
        reads(&mut app, &reset()).await;
    }

    #[tokio::test]
    async fn nothing_else_waits() {
        for begun in [&[][..], &frame(0, &[1; RESET])[..FRAME_HEADER], &frame(4, &[])[..3]] {
            for bytes in [frame(8, &[0, 0, 0, 1]), [reset(), frame(6, &[0; 8])].concat(), reset()[..RESET - 1].to_vec(), reset()] {
                if begun.is_empty() && bytes == reset() {
                    continue;
                }
                let (mut pingoras, mut app, asleep) = connection();
                let begin = [PREFACE, begun].concat();
                pingoras.write_all(&begin).await.unwrap();
                reads(&mut app, &begin).await;
                asleep.store(true, Ordering::SeqCst);
                pingoras.write_all(&bytes).await.unwrap();
                reads(&mut app, &bytes).await;
            }
        }
    }

    #[tokio::test]
    async fn no_more_are_kept_than_there_may_be_streams() {
        let (mut pingoras, mut app, asleep) = connection();
        pingoras.write_all(PREFACE).await.unwrap();
        reads(&mut app, PREFACE).await;
        asleep.store(true, Ordering::SeqCst);
        for _ in 0..MOST {
            pingoras.write_all(&reset()).await.unwrap();
        }
        has_nothing(&mut app);
        pingoras.write_all(&reset()).await.unwrap();
        reads(&mut app, &reset().repeat(MOST + 1)).await;
    }
}
