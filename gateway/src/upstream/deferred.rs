//! Keeps what HTTP/2 says by itself from waking a microVM, or from keeping it from falling asleep.
//!
//! A client that cancels a gRPC call makes pingora reset the call's stream; an app that measures its path (gRPC does, after each
//! message that it reads) has its PING answered by the HTTP/2 layer. A byte for a sleeper wakes it, and one for a microVM that falls
//! asleep takes the suspend back. For an app that sleeps, these are worth nothing: they are kept until something else is said to it,
//! or until it is awake, when it may be waiting for them.
//!
//! Owns: the frames that are kept: resets of streams (RFC 9113 §6.4), answers to PING (§6.7) and to SETTINGS (§6.5.3). Never keeps
//! anything else: a window update says that a client reads on.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use idle_controller::MicrovmHandle;
use model::MicrovmState;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::{ByteStream, GuestStream};

use crate::h2_frames::{FRAME_HEADER, Frames, PREFACE_LENGTH, RST_STREAM, payload_length};

const SETTINGS: u8 = 0x4;
const PING: u8 = 0x6;
const ACK: u8 = 0x1;
/// Bytes that are kept at a time: a reset for each stream that there may be on a connection, and more. What is more passes, and
/// wakes.
const MOST: usize = 256 * (FRAME_HEADER + 4);

/// Ends when a microVM runs, or never will again.
pub(crate) type Awake = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The microVM that a stream leads to.
pub(crate) trait Sleeper: Send + Sync {
    /// Whether bytes for it would wake it now, or keep it from falling asleep.
    fn sleeps(&self) -> bool;
    /// Waits for that to be over.
    fn awake(&self) -> Awake;
}

impl Sleeper for MicrovmHandle {
    fn sleeps(&self) -> bool {
        self.state() != MicrovmState::Running
    }

    fn awake(&self) -> Awake {
        let microvm = self.clone();
        Box::pin(async move {
            microvm.wait_until(|view| view.state == MicrovmState::Running).await;
        })
    }
}

/// A guest stream of HTTP/2.
pub(crate) struct Deferring {
    guest: GuestStream,
    sleeper: Box<dyn Sleeper>,
    frames: Frames,
    /// Whole frames that the guest has not been sent, but for the first `sent` bytes.
    kept: Vec<u8>,
    sent: usize,
    /// Until they may be sent; `None` while there are none.
    awake: Option<Awake>,
}

impl Deferring {
    /// Before anything was written to the guest.
    pub fn new(guest: GuestStream, sleeper: Box<dyn Sleeper>) -> Self {
        Self { guest, sleeper, frames: Frames::behind(PREFACE_LENGTH), kept: Vec::new(), sent: 0, awake: None }
    }

    /// Whether all of this is frames that a sleeper need not hear of.
    fn may_wait(&self, bytes: &[u8]) -> bool {
        self.frames.at_boundary() && self.sent == 0 && self.kept.len() + bytes.len() <= MOST && are_deferrable(bytes) && self.sleeper.sleeps()
    }

    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.kept.len() {
            let written = ready!(self.guest.as_mut().poll_write(cx, &self.kept[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        // Nobody else does, after a wake.
        ready!(self.guest.as_mut().poll_flush(cx))?;
        (self.kept, self.sent, self.awake) = (Vec::new(), 0, None);
        Poll::Ready(Ok(()))
    }

    /// Sends what is kept once the microVM is awake; the task that asks is woken for that.
    fn poll_awake(&mut self, cx: &mut Context<'_>) {
        if self.kept.is_empty() {
            return;
        }
        let awake = self.awake.get_or_insert_with(|| self.sleeper.awake());
        if awake.as_mut().poll(cx).is_ready() {
            // If it falls asleep before all of it is sent, the rest waits for the next time. An error shows at the next write.
            self.awake = None;
            let _ = self.poll_kept(cx);
        }
    }
}

/// One connection carries many requests: which of its bytes are whose is not known.
impl ByteStream for Deferring {}

impl AsyncRead for Deferring {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_awake(cx);
        self.guest.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Deferring {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.may_wait(bytes) {
            self.kept.extend_from_slice(bytes);
            // The reads of this task may all have been made before.
            self.poll_awake(cx);
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

/// Whether these are whole frames, each of which can wait.
fn are_deferrable(mut bytes: &[u8]) -> bool {
    let none = bytes.is_empty();
    while let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER>() {
        let length = payload_length(header);
        let waits = match (header[3], length) {
            (RST_STREAM, 4) => true,
            (PING, 8) | (SETTINGS, 0) => header[4] & ACK != 0,
            _ => false,
        };
        if !waits || rest.len() < length {
            return false;
        }
        bytes = &rest[length..];
    }
    !none && bytes.is_empty()
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
        sync::watch,
    };

    use super::*;

    const PREFACE: &[u8; PREFACE_LENGTH] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    impl Sleeper for watch::Receiver<bool> {
        fn sleeps(&self) -> bool {
            *self.borrow()
        }

        fn awake(&self) -> Awake {
            let mut asleep = self.clone();
            Box::pin(async move {
                asleep.wait_for(|asleep| !asleep).await.unwrap();
            })
        }
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn reset() -> Vec<u8> {
        frame(RST_STREAM, 0, &[0, 0, 0, 8])
    }

    fn pong() -> Vec<u8> {
        frame(PING, ACK, b"measured")
    }

    /// What pingora has, what the app has, and whether it sleeps. What a connection begins with has passed, and `begun`.
    async fn connection_after(begun: &[u8]) -> (Deferring, DuplexStream, watch::Sender<bool>) {
        let (guest, mut app) = tokio::io::duplex(4096);
        let (asleep, sleeps) = watch::channel(false);
        let mut pingoras = Deferring::new(Box::pin(guest), Box::new(sleeps));
        let begin = [PREFACE, begun].concat();
        pingoras.write_all(&begin).await.unwrap();
        reads(&mut app, &begin).await;
        (pingoras, app, asleep)
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
    async fn a_sleeper_hears_of_them_with_the_next_frame() {
        let (mut pingoras, mut app, asleep) = connection_after(&[reset(), pong()].concat()).await;
        asleep.send_replace(true);
        let said = [[reset(), pong()].concat(), frame(SETTINGS, ACK, &[]), reset()];
        for said in &said {
            pingoras.write_all(said).await.unwrap();
        }
        has_nothing(&mut app);
        let data = frame(0, 0, &[7; 20]);
        pingoras.write_all(&data).await.unwrap();
        reads(&mut app, &[said.concat(), data].concat()).await;
    }

    #[tokio::test]
    async fn or_when_it_is_awake_though_nobody_says_anything() {
        let (mut pingoras, mut app, asleep) = connection_after(&[]).await;
        for what_the_app_said_before_matters in [&b""[..], b"last words"] {
            asleep.send_replace(true);
            pingoras.write_all(&pong()).await.unwrap();
            app.write_all(what_the_app_said_before_matters).await.unwrap();
            pingoras.read_exact(&mut vec![0; what_the_app_said_before_matters.len()]).await.unwrap();
            has_nothing(&mut app);
            let reader = tokio::spawn(async move {
                pingoras.read_exact(&mut [0; 4]).await.unwrap();
                pingoras
            });
            asleep.send_replace(false);
            reads(&mut app, &pong()).await;
            app.write_all(b"next").await.unwrap();
            pingoras = reader.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_task_that_has_read_already_is_woken_too() {
        let (mut pingoras, mut app, asleep) = connection_after(&[]).await;
        asleep.send_replace(true);
        // HTTP/2's own task: it reads until there is nothing, answers, and waits.
        let task = tokio::spawn(async move {
            let mut answered = false;
            std::future::poll_fn(|cx| {
                let mut byte = [0];
                let read = Pin::new(&mut pingoras).poll_read(cx, &mut ReadBuf::new(&mut byte));
                if !std::mem::replace(&mut answered, true) {
                    assert!(Pin::new(&mut pingoras).poll_write(cx, &pong()).is_ready());
                }
                read
            })
            .await
        });
        tokio::task::yield_now().await;
        has_nothing(&mut app);
        asleep.send_replace(false);
        reads(&mut app, &pong()).await;
        drop(app);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn nothing_else_waits() {
        let window_update = frame(8, 0, &[0, 0, 0, 1]);
        for begun in [&[][..], &frame(0, 0, &[1; 13])[..FRAME_HEADER], &frame(4, 0, &[])[..3]] {
            let passing = [
                window_update.clone(),
                [pong(), window_update.clone()].concat(),
                frame(PING, 0, &[0; 8]),
                frame(SETTINGS, 0, &[]),
                frame(SETTINGS, ACK, &[0; 6]),
                reset()[..12].to_vec(),
                reset()[..FRAME_HEADER - 1].to_vec(),
                [reset(), pong()[..16].to_vec()].concat(),
            ];
            // In the middle of another frame nothing is what it looks like.
            let passing = passing.into_iter().chain([reset(), pong()].into_iter().filter(|_| !begun.is_empty()));
            for bytes in passing {
                let (mut pingoras, mut app, asleep) = connection_after(begun).await;
                asleep.send_replace(true);
                pingoras.write_all(&bytes).await.unwrap();
                reads(&mut app, &bytes).await;
            }
        }
    }

    #[tokio::test]
    async fn no_more_are_kept_than_there_is_room_for() {
        let (mut pingoras, mut app, asleep) = connection_after(&[]).await;
        asleep.send_replace(true);
        let fit = MOST / reset().len();
        for _ in 0..fit {
            pingoras.write_all(&reset()).await.unwrap();
        }
        has_nothing(&mut app);
        pingoras.write_all(&reset()).await.unwrap();
        reads(&mut app, &reset().repeat(fit + 1)).await;
    }
}
