//! One multiplexed stream: its state at one end, and the handle its user holds.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use model::Door;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    frame::{Kind, MAX_PAYLOAD, put_frame, put_open},
    mux::{Key, Mux, Side, Violation, WINDOW, wait},
};

/// Room is given back when this much of it has been read: often enough that a sender never runs dry, rarely enough that
/// credits cost nothing.
const CREDIT_AT: usize = WINDOW / 4;
/// Received pieces below this are gathered, so that a sender of many small frames cannot cost the receiver much more
/// memory than the bytes it sent.
const GATHER_BELOW: usize = 8 * 1024;

/// How far a stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Host: OPEN is to be sent.
    Unsent(Door),
    /// Host: OPEN is sent, no answer yet.
    Asked,
    /// Host: answered with REFUSED. The other side has forgotten it.
    Refused,
    /// Guest: being connected to the port.
    Connecting,
    /// Guest: OPENED is to be sent.
    Accepting,
    /// Guest: REFUSED is to be sent.
    Refusing,
    Open,
    /// RESET is to be sent.
    Resetting,
    /// Reset by either side; nothing more is sent, and what arrives is ignored.
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fin {
    Not,
    Due,
    Sent,
}

pub(crate) struct Stream {
    pub stage: Stage,
    /// In the queue of turns.
    pub scheduled: bool,
    /// A user holds the handle.
    held: bool,
    /// Accepted from the user, not yet taken by the writer.
    send: BytesMut,
    /// Bytes that the other side still takes beyond `send`.
    credit: usize,
    fin: Fin,
    /// RESET follows when `send` is empty (and FIN, if it is due, is sent).
    reset_when_sent: bool,
    /// Bytes accepted from the user so far.
    accepted: u64,
    /// Guest, once it is accepted: how many of the host's bytes the app was given.
    gave: Option<u64>,
    /// Host: how many the guest says the app was given.
    given: Given,
    inbox: Inbox,
    /// Bytes that the other side may still send.
    room: usize,
    /// Read by the user since the last CREDIT.
    unreported: usize,
    fin_received: bool,
    reader: Option<Waker>,
    /// Also waits for the answer to OPEN.
    writer: Option<Waker>,
    /// Host: set while the stream is held. Nothing is sent, and this is what the guest has said.
    kept_back: Option<KeptBack>,
    /// Host: it is for a connection of the guest's own. Its end is told as soon as the guest wakes: until then the guest would
    /// try to use it.
    leads_out: bool,
    /// Host: it was there at the last silence.
    pub of_before: bool,
}

/// What the guest has said of how many bytes reached the app.
#[derive(Debug, Clone, Copy, Default)]
struct Given {
    /// Of those before its end, when it said that: more may have followed.
    at_end: Option<u64>,
    /// In all.
    in_all: Option<u64>,
}

/// What the guest has said on a stream that is held: taken in when the stream goes on, forgotten with the guest otherwise.
#[derive(Default)]
struct KeptBack {
    /// The answer to OPEN: whether it was OPENED.
    answer: Option<bool>,
    inbox: Inbox,
    /// Of data, whether or not anybody will read it.
    bytes: usize,
    credit: usize,
    fin: bool,
    reset: bool,
    given: Given,
}

/// Bytes that wait for the user.
#[derive(Default)]
struct Inbox {
    pieces: VecDeque<Bytes>,
    small: BytesMut,
    len: usize,
}

impl Inbox {
    fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        if piece.len() < GATHER_BELOW {
            self.small.extend_from_slice(&piece);
            return;
        }
        if !self.small.is_empty() {
            self.pieces.push_back(self.small.split().freeze());
        }
        self.pieces.push_back(piece);
    }

    /// The first piece, at most `limit` bytes of it.
    fn pop(&mut self, limit: usize) -> Option<Bytes> {
        let piece = match self.pieces.front_mut() {
            Some(piece) if piece.len() > limit => piece.split_to(limit),
            Some(_) => self.pieces.pop_front()?,
            None if self.small.is_empty() => return None,
            None => {
                let piece = self.small.split_to(self.small.len().min(limit)).freeze();
                if self.small.is_empty() {
                    self.small = BytesMut::new();
                }
                piece
            }
        };
        self.len -= piece.len();
        Some(piece)
    }
}

impl Stream {
    fn new(stage: Stage, held: bool) -> Self {
        Self {
            stage,
            scheduled: false,
            held,
            send: BytesMut::new(),
            credit: WINDOW,
            fin: Fin::Not,
            reset_when_sent: false,
            accepted: 0,
            gave: None,
            given: Given::default(),
            inbox: Inbox::default(),
            room: WINDOW,
            unreported: 0,
            fin_received: false,
            reader: None,
            writer: None,
            kept_back: None,
            leads_out: false,
            of_before: false,
        }
    }

    /// Host: RESET is to be said (once more).
    pub fn resetting() -> Self {
        Self { of_before: true, ..Self::new(Stage::Resetting, false) }
    }

    /// Host: from now on nothing is sent, and what comes is kept back.
    pub fn hold(&mut self) {
        self.of_before = true;
        if !self.leads_out {
            self.kept_back.get_or_insert_default();
        }
    }

    pub fn is_held(&self) -> bool {
        self.kept_back.is_some()
    }

    /// What was kept back has never been said.
    pub fn forget_kept_back(&mut self) {
        if let Some(kept) = &mut self.kept_back {
            *kept = KeptBack::default();
        }
    }

    /// What was kept back is heard now. The stream is held no longer. Answers how many bytes will not be sent any more.
    pub fn take_in(&mut self, wakers: &mut Vec<Waker>) -> usize {
        let Some(mut kept) = self.kept_back.take() else { return 0 };
        match kept.answer {
            Some(true) => self.opened(wakers),
            Some(false) => self.refused(wakers),
            None => {}
        }
        if self.stage == Stage::Open {
            // Within the window: each was looked at when it came.
            self.room -= kept.bytes.min(self.room);
            self.credit += kept.credit;
            while let Some(piece) = kept.inbox.pop(usize::MAX) {
                self.inbox.push(piece);
            }
            self.fin_received |= kept.fin;
            self.given = kept.given;
            self.wake(wakers);
        }
        let unsent = if kept.reset { self.queued() } else { 0 };
        if kept.reset {
            self.abort(wakers);
        }
        unsent
    }

    /// Where the guest has the stream.
    fn stage_in_guest(&self) -> Stage {
        match (self.stage, self.kept_back.as_ref().and_then(|kept| kept.answer)) {
            (Stage::Asked, Some(true)) => Stage::Open,
            (Stage::Asked, Some(false)) => Stage::Refused,
            (stage, _) => stage,
        }
    }

    pub fn opening(door: Door) -> Self {
        Self { leads_out: door == Door::Egress, ..Self::new(Stage::Unsent(door), true) }
    }

    pub fn connecting() -> Self {
        Self::new(Stage::Connecting, true)
    }

    pub fn refusing() -> Self {
        Self::new(Stage::Refusing, false)
    }

    /// Bytes accepted and not yet taken by the writer.
    pub fn queued(&self) -> usize {
        self.send.len()
    }

    /// Open or being opened, with something still to come from either side.
    pub fn is_live(&self) -> bool {
        match self.stage {
            Stage::Unsent(_) | Stage::Asked | Stage::Connecting | Stage::Accepting => true,
            Stage::Open => !(self.fin == Fin::Sent && self.fin_received),
            Stage::Refused | Stage::Refusing | Stage::Resetting | Stage::Dead => false,
        }
    }

    /// Nobody needs it any more.
    pub fn is_finished(&self) -> bool {
        !self.held && matches!(self.stage, Stage::Open | Stage::Dead | Stage::Refused) && !self.is_live()
    }

    fn credit_is_due(&self) -> bool {
        self.unreported >= CREDIT_AT && !self.fin_received
    }

    pub fn has_work(&self) -> bool {
        if self.is_held() {
            return false;
        }
        match self.stage {
            Stage::Unsent(_) | Stage::Accepting | Stage::Refusing | Stage::Resetting => true,
            Stage::Open => !self.send.is_empty() || self.fin == Fin::Due || self.reset_when_sent || self.credit_is_due(),
            Stage::Asked | Stage::Connecting | Stage::Refused | Stage::Dead => false,
        }
    }

    /// Writes one turn's frames; answers how many bytes of data were taken.
    pub fn emit(&mut self, id: u32, out: &mut BytesMut) -> usize {
        if self.is_held() {
            return 0;
        }
        match self.stage {
            Stage::Unsent(door) => {
                put_open(out, id, door);
                self.stage = Stage::Asked;
                return 0;
            }
            Stage::Refusing => {
                put_frame(out, Kind::Refused, id, &[]);
                self.stage = Stage::Dead;
                return 0;
            }
            Stage::Resetting => {
                self.put_end(Kind::Reset, id, out);
                self.stage = Stage::Dead;
                return 0;
            }
            Stage::Asked | Stage::Connecting | Stage::Refused | Stage::Dead => return 0,
            Stage::Accepting => {
                put_frame(out, Kind::Opened, id, &[]);
                self.stage = Stage::Open;
            }
            Stage::Open => {}
        }
        if self.credit_is_due() {
            put_frame(out, Kind::Credit, id, &(self.unreported as u32).to_le_bytes());
            self.room += self.unreported;
            self.unreported = 0;
        }
        let taken = self.send.len().min(MAX_PAYLOAD);
        if taken > 0 {
            put_frame(out, Kind::Data, id, &self.send[..taken]);
            self.send.advance(taken);
        }
        if self.send.is_empty() {
            // An idle stream holds no buffer.
            self.send = BytesMut::new();
            if self.fin == Fin::Due {
                self.put_end(Kind::Fin, id, out);
                self.fin = Fin::Sent;
            }
            if self.reset_when_sent {
                self.stage = Stage::Resetting;
            }
        }
        taken
    }

    /// FIN or RESET: with what the app was given, where there is an app.
    fn put_end(&self, kind: Kind, id: u32, out: &mut BytesMut) {
        match self.gave {
            Some(bytes) => put_frame(out, kind, id, &bytes.to_le_bytes()),
            None => put_frame(out, kind, id, &[]),
        }
    }

    /// The other side has reset it. `given`: what it says the app was given. Answers how many bytes will not be sent any more.
    pub fn receive_reset(&mut self, given: Option<u64>, wakers: &mut Vec<Waker>) -> usize {
        if let Some(kept) = &mut self.kept_back {
            kept.reset = true;
            kept.given.in_all = given;
            return 0;
        }
        self.given.in_all = given;
        let unsent = self.queued();
        self.abort(wakers);
        unsent
    }

    /// Resets it without a word to the other side. What has arrived can still be read.
    pub fn abort(&mut self, wakers: &mut Vec<Waker>) {
        self.stage = if self.stage == Stage::Refused { Stage::Refused } else { Stage::Dead };
        self.send = BytesMut::new();
        self.wake(wakers);
    }

    fn wake(&mut self, wakers: &mut Vec<Waker>) {
        wakers.extend(self.reader.take());
        wakers.extend(self.writer.take());
    }

    pub fn opened(&mut self, wakers: &mut Vec<Waker>) {
        if let Some(kept) = &mut self.kept_back {
            kept.answer.get_or_insert(true);
            return;
        }
        if self.stage == Stage::Asked {
            self.stage = Stage::Open;
            self.wake(wakers);
        }
    }

    pub fn refused(&mut self, wakers: &mut Vec<Waker>) {
        if let Some(kept) = &mut self.kept_back {
            kept.answer.get_or_insert(false);
            return;
        }
        if self.stage == Stage::Asked {
            self.stage = Stage::Refused;
            self.wake(wakers);
        } else if self.stage == Stage::Resetting {
            self.stage = Stage::Dead;
        }
    }

    pub fn receive(&mut self, id: u32, data: Bytes, wakers: &mut Vec<Waker>) -> Result<(), Violation> {
        match self.stage_in_guest() {
            Stage::Open => {}
            Stage::Resetting | Stage::Dead => return Ok(()),
            _ => return Err(Violation::Unexpected(Kind::Data)),
        }
        if self.fin_received || self.kept_back.as_ref().is_some_and(|kept| kept.fin) {
            return Err(Violation::AfterFin(id));
        }
        if let Some(kept) = &mut self.kept_back {
            if kept.bytes + data.len() > self.room {
                return Err(Violation::Window(id));
            }
            kept.bytes += data.len();
            if self.held && !data.is_empty() {
                kept.inbox.push(data);
            }
            return Ok(());
        }
        self.room = self.room.checked_sub(data.len()).ok_or(Violation::Window(id))?;
        if self.held && !data.is_empty() {
            self.inbox.push(data);
            wakers.extend(self.reader.take());
        }
        Ok(())
    }

    pub fn credit(&mut self, id: u32, bytes: usize, wakers: &mut Vec<Waker>) -> Result<(), Violation> {
        if let Some(kept) = &mut self.kept_back {
            kept.credit = kept.credit.saturating_add(bytes);
            return if self.credit.saturating_add(kept.credit) + self.send.len() > WINDOW { Err(Violation::Window(id)) } else { Ok(()) };
        }
        if self.stage == Stage::Open {
            self.credit += bytes;
            if self.credit + self.send.len() > WINDOW {
                return Err(Violation::Window(id));
            }
            wakers.extend(self.writer.take());
        }
        Ok(())
    }

    pub fn receive_fin(&mut self, given: Option<u64>, wakers: &mut Vec<Waker>) {
        if let Some(kept) = &mut self.kept_back {
            kept.fin = true;
            kept.given.at_end = given;
            return;
        }
        if self.stage == Stage::Open {
            self.fin_received = true;
            self.given.at_end = given;
            wakers.extend(self.reader.take());
        }
    }

    fn read(&mut self, limit: usize) -> Option<Bytes> {
        let piece = self.inbox.pop(limit)?;
        self.unreported += piece.len();
        Some(piece)
    }

    /// The user's handle is gone.
    fn release(&mut self) {
        self.held = false;
        self.inbox = Inbox::default();
        self.stage = match self.stage {
            Stage::Unsent(_) => Stage::Dead,
            Stage::Asked => Stage::Resetting,
            Stage::Connecting => Stage::Refusing,
            Stage::Accepting | Stage::Open if self.fin == Fin::Not && !self.reset_when_sent => Stage::Resetting,
            stage @ (Stage::Accepting | Stage::Open) => {
                // What was written before the shutdown still arrives, as with a TCP socket.
                self.reset_when_sent |= !self.fin_received;
                stage
            }
            stage @ (Stage::Refused | Stage::Refusing | Stage::Resetting | Stage::Dead) => stage,
        };
        if !matches!(self.stage, Stage::Accepting | Stage::Open) {
            self.send = BytesMut::new();
        }
    }
}

/// One multiplexed stream: bytes to a door of the guest and back, with half-close. Parked while the link is quiesced or
/// detached; reset (an error on read and write) when the guest forgot it.
///
/// A dropped handle resets the stream, except for what [`AsyncWrite::poll_shutdown`] has already promised to deliver.
pub struct MuxStream {
    mux: Arc<Mux>,
    key: Key,
}

impl std::fmt::Debug for MuxStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuxStream").field("key", &self.key).finish_non_exhaustive()
    }
}

/// How an OPEN ended.
pub(crate) enum Answer {
    Opened,
    Refused,
    Gone,
}

impl MuxStream {
    /// The handle of a stream that is in the table and has none yet.
    pub(crate) fn new(mux: Arc<Mux>, key: Key) -> Self {
        Self { mux, key }
    }

    fn with<R>(&self, act: impl FnOnce(&mut Stream) -> R) -> Option<R> {
        let mut core = self.mux.lock();
        let result = act(core.streams.get_mut(&self.key)?);
        core.settle(self.key);
        Some(result)
    }

    /// Host: waits for the answer to OPEN.
    pub(crate) async fn answered(&self) -> Answer {
        std::future::poll_fn(|cx| {
            self.with(|stream| match stream.stage {
                Stage::Unsent(_) | Stage::Asked => wait(&mut stream.writer, cx),
                Stage::Refused => Poll::Ready(Answer::Refused),
                Stage::Dead | Stage::Resetting => Poll::Ready(Answer::Gone),
                _ => Poll::Ready(Answer::Opened),
            })
            .unwrap_or(Poll::Ready(Answer::Gone))
        })
        .await
    }

    /// Guest: connected. `false` if the host has given up meanwhile.
    pub(crate) fn accept(&self) -> bool {
        self.with(|stream| {
            let wanted = stream.stage == Stage::Connecting;
            if wanted {
                stream.stage = Stage::Accepting;
                stream.gave = Some(0);
            }
            wanted
        })
        .unwrap_or(false)
    }

    /// The next received piece without a copy; `None` at the end.
    pub(crate) fn poll_piece(&self, cx: &mut Context<'_>, limit: usize) -> Poll<io::Result<Option<Bytes>>> {
        self.with(|stream| {
            if let Some(piece) = stream.read(limit) {
                return Poll::Ready(Ok(Some(piece)));
            }
            if stream.fin_received {
                return Poll::Ready(Ok(None));
            }
            match stream.stage {
                Stage::Unsent(_) | Stage::Asked | Stage::Connecting | Stage::Accepting | Stage::Open => wait(&mut stream.reader, cx),
                Stage::Refused | Stage::Refusing | Stage::Resetting | Stage::Dead => Poll::Ready(Err(gone())),
            }
        })
        .unwrap_or_else(|| Poll::Ready(Err(gone())))
    }

    /// How many bytes a write would take now; waits while it is none.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.with(|stream| match stream.stage {
            _ if stream.fin != Fin::Not => Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
            Stage::Accepting | Stage::Open if stream.credit == 0 => wait(&mut stream.writer, cx),
            Stage::Accepting | Stage::Open => Poll::Ready(Ok(stream.credit)),
            _ => Poll::Ready(Err(gone())),
        })
        .unwrap_or_else(|| Poll::Ready(Err(gone())))
    }

    /// Writes as much of `buffers` as there is room for.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>, buffers: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if buffers.iter().all(|buffer| buffer.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_room(cx))?;
        let mut core = self.mux.lock();
        let Some(stream) = core.streams.get_mut(&self.key) else { return Poll::Ready(Err(gone())) };
        let mut taken = 0;
        if matches!(stream.stage, Stage::Accepting | Stage::Open) {
            for buffer in buffers {
                let n = buffer.len().min(stream.credit);
                stream.send.extend_from_slice(&buffer[..n]);
                stream.credit -= n;
                taken += n;
            }
            stream.accepted += taken as u64;
        }
        if taken == 0 {
            // Reset since the look above, which only this handle's owner follows with a write.
            return Poll::Ready(Err(gone()));
        }
        core.queued_bytes += taken;
        core.settle(self.key);
        let parked = core.side == Side::Host && core.gate == crate::mux::Gate::Shut;
        drop(core);
        if parked {
            self.mux.changed.notify_waiters();
        }
        Poll::Ready(Ok(taken))
    }

    /// The other side has said that it writes no more.
    pub(crate) fn is_ended_by_peer(&self) -> bool {
        self.with(|stream| stream.fin_received).unwrap_or(false)
    }

    /// When everything written has been sent, the stream is reset.
    pub(crate) fn reset_when_sent(&self) {
        self.with(|stream| stream.reset_when_sent |= matches!(stream.stage, Stage::Accepting | Stage::Open));
    }

    /// Guest: so many more of the host's bytes were given to the app.
    pub(crate) fn gave(&self, bytes: usize) {
        self.with(|stream| stream.gave = stream.gave.map(|gave| gave + bytes as u64));
    }

    /// Host: how many bytes were written to it so far.
    pub fn written(&self) -> u64 {
        self.with(|stream| stream.accepted).unwrap_or(0)
    }

    /// Host, after the guest has ended the stream or broken it off: whether it is certain that of the bytes behind the first
    /// `from` the app has seen none and will see none. Waits while that is not known and may become known.
    pub fn poll_untouched(&self, cx: &mut Context<'_>, from: u64) -> Poll<bool> {
        self.with(|stream| match stream.stage {
            Stage::Open if stream.fin_received && stream.given.at_end.is_some_and(|given| given <= from) => wait(&mut stream.reader, cx),
            Stage::Dead => Poll::Ready(stream.given.in_all.is_some_and(|given| given <= from)),
            _ => Poll::Ready(false),
        })
        .unwrap_or(Poll::Ready(false))
    }

    /// Nothing more will be written.
    pub(crate) fn finish(&self) {
        self.with(|stream| {
            if stream.fin == Fin::Not && matches!(stream.stage, Stage::Accepting | Stage::Open) {
                stream.fin = Fin::Due;
            }
        });
    }
}

fn gone() -> io::Error {
    io::Error::new(ErrorKind::ConnectionReset, "the stream was reset")
}

impl AsyncRead for MuxStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.remaining();
        if before == 0 {
            return Poll::Ready(Ok(()));
        }
        while buf.remaining() > 0 {
            match self.poll_piece(cx, buf.remaining()) {
                Poll::Ready(Ok(Some(piece))) => buf.put_slice(&piece),
                // What was read before an end, an error or a wait is handed out first; the rest shows at the next read.
                _ if buf.remaining() < before => break,
                Poll::Ready(Ok(None)) => break,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// What was written is on its way by itself.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        let mut core = self.mux.lock();
        let Some(stream) = core.streams.get_mut(&self.key) else { return };
        let queued = stream.queued();
        stream.release();
        let still_queued = stream.queued();
        core.queued_bytes -= queued - still_queued;
        core.settle(self.key);
    }
}
