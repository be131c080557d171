//! Joins a stream with a connection in the guest, both ways, with half-close, and without a buffer that lives longer
//! than one poll: a thousand idle connections cost a guest no buffers.

use std::{
    cell::RefCell,
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{frame::MAX_PAYLOAD, stream::MuxStream};

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

/// Carries bytes until both directions have ended. On an error the stream has been told (what came from the connection
/// before is still delivered) and the connection is to be reset.
pub(crate) async fn splice<C: AsyncRead + AsyncWrite + Unpin>(stream: MuxStream, connection: &mut C) -> io::Result<()> {
    let mut inbound = Inbound::Reading;
    let mut outbound = None;
    let result = std::future::poll_fn(|cx| {
        poll_inbound(cx, &stream, connection, &mut inbound)?;
        if outbound.is_none()
            && let Poll::Ready(ended) = poll_outbound(cx, &stream, connection)
        {
            match ended {
                Ok(()) => stream.finish(),
                // A host that said all it had to say and left: the app still gets it.
                Err(_) if stream.is_ended_by_peer() => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            outbound = Some(ended);
        }
        match (&mut inbound, &mut outbound) {
            (Inbound::Done, Some(ended)) => Poll::Ready(std::mem::replace(ended, Ok(()))),
            (Inbound::Failed(error), Some(_)) => Poll::Ready(Err(std::mem::replace(error, ErrorKind::Other.into()))),
            _ => Poll::Pending,
        }
    })
    .await;
    if result.is_err() {
        stream.reset_when_sent();
    }
    result
}

/// An error is the stream's: it was reset. One of the connection is kept in `state`.
fn poll_inbound<C: AsyncWrite + Unpin>(cx: &mut Context<'_>, stream: &MuxStream, connection: &mut C, state: &mut Inbound) -> io::Result<()> {
    loop {
        let step = match state {
            Inbound::Reading => match stream.poll_piece(cx, MAX_PAYLOAD)? {
                Poll::Ready(Some(piece)) => Poll::Ready(Ok(Inbound::Writing(piece))),
                Poll::Ready(None) => Poll::Ready(Ok(Inbound::Ending)),
                Poll::Pending => Poll::Pending,
            },
            Inbound::Writing(piece) => Pin::new(&mut *connection).poll_write(cx, piece).map_ok(|written| {
                piece.advance(written);
                match written {
                    0 => Inbound::Failed(ErrorKind::WriteZero.into()),
                    _ if piece.is_empty() => Inbound::Reading,
                    _ => Inbound::Writing(std::mem::take(piece)),
                }
            }),
            Inbound::Ending => Pin::new(&mut *connection).poll_shutdown(cx).map_ok(|()| Inbound::Done),
            Inbound::Done | Inbound::Failed(_) => Poll::Pending,
        };
        match step {
            Poll::Ready(next) => *state = next.unwrap_or_else(Inbound::Failed),
            Poll::Pending => return Ok(()),
        }
    }
}

/// Ready at the connection's end of file.
fn poll_outbound<C: AsyncRead + Unpin>(cx: &mut Context<'_>, stream: &MuxStream, connection: &mut C) -> Poll<io::Result<()>> {
    loop {
        let room = ready!(stream.poll_room(cx))?;
        let ended = SCRATCH.with_borrow_mut(|scratch| {
            let limit = room.min(scratch.len());
            let mut buffer = ReadBuf::new(&mut scratch[..limit]);
            ready!(Pin::new(&mut *connection).poll_read(cx, &mut buffer))?;
            let filled = buffer.filled();
            if filled.is_empty() {
                return Poll::Ready(Ok::<_, io::Error>(true));
            }
            // There is room for all of it: only this task writes to the stream.
            ready!(stream.poll_send(cx, &[IoSlice::new(filled)]))?;
            Poll::Ready(Ok(false))
        });
        if ready!(ended)? {
            return Poll::Ready(Ok(()));
        }
    }
}
