//! Joins a stream with a connection in the guest, both ways, with half-close, and without a buffer that lives longer
//! than one poll: a thousand idle connections cost a guest no buffers.

use std::{
    cell::RefCell,
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    time::Sleep,
};

use crate::{
    frame::MAX_PAYLOAD,
    guest::{Guest, Listens},
    stream::MuxStream,
};

/// How long an app that says no more may take to close: a few lines of a slow language on a busy guest.
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);
const LOOKS: u32 = 25;

thread_local! {
    /// Holds nothing between two polls.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_PAYLOAD].into_boxed_slice());
}

/// Host to connection.
enum Inbound {
    Reading,
    Writing(Bytes),
    Ending,
    Done,
    /// The connection takes no more. What it still says is worth reading: an early answer to a long upload.
    Failed(io::Error),
}

struct Splice<'a, G: Guest> {
    stream: &'a MuxStream,
    connection: &'a mut G::Conn,
    guest: &'a G,
    inbound: Inbound,
    /// How the other direction ended.
    outbound: Option<io::Result<()>>,
    /// Bytes that the connection was given.
    given: u64,
    /// It has said something, if only its end, since it was given something, or was never given anything. It may have been
    /// closed since: apps close what idles, and that is when a host uses it again.
    said: bool,
    /// Looks whether an app that says no more has closed, and the pause before the next.
    looks: u32,
    pause: Option<Pin<Box<Sleep>>>,
}

/// Carries bytes until both directions have ended. On an error the stream has been told (what came from the connection
/// before is still delivered) and the connection is to be reset. With its end the host is told how many bytes the app was given:
/// what it was not given may be said again elsewhere.
pub(crate) async fn splice<G: Guest>(stream: MuxStream, connection: &mut G::Conn, guest: &G) -> io::Result<()> {
    let mut splice = Splice { stream: &stream, connection, guest, inbound: Inbound::Reading, outbound: None, given: 0, said: true, looks: 0, pause: None };
    let result = std::future::poll_fn(|cx| splice.poll(cx)).await;
    if result.is_err() {
        stream.reset_when_sent();
    }
    result
}

impl<G: Guest> Splice<'_, G> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // First what the app says: it may be that it has gone.
        if self.outbound.is_none()
            && let Poll::Ready(ended) = self.poll_outbound(cx)
        {
            match ended {
                Ok(()) => self.stream.finish(),
                // A host that said all it had to say and left: the app still gets it.
                Err(_) if self.stream.is_ended_by_peer() => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            self.outbound = Some(ended);
        }
        self.poll_inbound(cx)?;
        match (&mut self.inbound, &mut self.outbound) {
            (Inbound::Done, Some(ended)) => Poll::Ready(std::mem::replace(ended, Ok(()))),
            (Inbound::Failed(error), Some(_)) => Poll::Ready(Err(std::mem::replace(error, ErrorKind::Other.into()))),
            _ => Poll::Pending,
        }
    }

    /// An error is the stream's: it was reset. One of the connection is kept in `inbound`.
    fn poll_inbound(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        loop {
            let step = match &mut self.inbound {
                Inbound::Reading => match self.stream.poll_piece(cx, MAX_PAYLOAD)? {
                    Poll::Ready(Some(piece)) => Poll::Ready(Ok(Inbound::Writing(piece))),
                    Poll::Ready(None) => Poll::Ready(Ok(Inbound::Ending)),
                    Poll::Pending => Poll::Pending,
                },
                Inbound::Writing(piece) => {
                    // A clone shares the bytes.
                    let mut piece = piece.clone();
                    self.poll_give(cx, &piece).map_ok(|given| {
                        piece.advance(given);
                        if piece.is_empty() { Inbound::Reading } else { Inbound::Writing(piece) }
                    })
                }
                Inbound::Ending => Pin::new(&mut *self.connection).poll_shutdown(cx).map_ok(|()| Inbound::Done),
                Inbound::Done | Inbound::Failed(_) => Poll::Pending,
            };
            match step {
                Poll::Ready(next) => self.inbound = next.unwrap_or_else(Inbound::Failed),
                Poll::Pending => return Ok(()),
            }
        }
    }

    /// Gives the connection as much of `piece` as it takes.
    fn poll_give(&mut self, cx: &mut Context<'_>, piece: &[u8]) -> Poll<io::Result<usize>> {
        if self.said {
            ready!(self.poll_listens(cx))?;
        }
        let written = ready!(Pin::new(&mut *self.connection).poll_write(cx, piece))?;
        if written == 0 {
            return Poll::Ready(Err(ErrorKind::WriteZero.into()));
        }
        // Of one that was known to say no more, it cannot be told what it has read.
        let refused = if self.said && self.looks == 0 { self.guest.has_refused(self.connection, self.given) } else { Ok(false) };
        if let Ok(true) = refused {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        self.said = false;
        self.given += written as u64;
        self.stream.gave(written);
        Poll::Ready(refused.map(|_| written))
    }

    /// Ready once the connection may be given something; an error if nobody listens any more. One whose app says no more gets a
    /// moment: many close in two steps, and what comes between them would be taken and never read.
    fn poll_listens(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.guest.listens(self.connection) {
                Listens::No => return Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
                Listens::Perhaps if self.looks < LOOKS => {}
                Listens::Perhaps | Listens::Yes => return Poll::Ready(Ok(())),
            }
            let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(BETWEEN_LOOKS)));
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
            self.looks += 1;
        }
    }

    /// Ready at the connection's end of file.
    fn poll_outbound(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let room = ready!(self.stream.poll_room(cx))?;
            let ended = SCRATCH.with_borrow_mut(|scratch| {
                let limit = room.min(scratch.len());
                let mut buffer = ReadBuf::new(&mut scratch[..limit]);
                ready!(Pin::new(&mut *self.connection).poll_read(cx, &mut buffer))?;
                self.said = true;
                let filled = buffer.filled();
                if filled.is_empty() {
                    return Poll::Ready(Ok::<_, io::Error>(true));
                }
                // There is room for all of it: only this task writes to the stream.
                ready!(self.stream.poll_send(cx, &[IoSlice::new(filled)]))?;
                Poll::Ready(Ok(false))
            });
            if ready!(ended)? {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
