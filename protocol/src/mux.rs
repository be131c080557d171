//! The streams of one channel and what is to be sent next. The same for both ends; only the host opens streams.
//!
//! Owns: stream state, credits, the order of frames, the gate that keeps the channel silent. Does no I/O: the pump asks
//! [`Mux::fill`] for bytes to write and hands received stream frames to [`Core::receive`].
//!
//! A byte is accepted from a stream's user only against credit that the other side has given, so whatever is queued here
//! can be sent at once, and neither end ever holds more than [`WINDOW`] bytes per stream and direction. Frames of streams
//! are made from the stream's state at the moment they are written, not queued, so there is nothing to bound.
//!
//! Lock order: there is one lock, around [`Core`]; nothing is awaited or called back while it is held. Wakers are woken
//! after it is released.

use std::{
    collections::{HashMap, VecDeque},
    task::{Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use model::Door;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::{
    frame::{Frame, Kind, MAX_PAYLOAD, put_frame, read_door},
    stream::{Stream, Stage},
};

/// Bytes that may be under way or unread per stream and direction: about 1 ms at the fastest rate seen on a virtio port.
pub(crate) const WINDOW: usize = 256 * 1024;
/// Streams of one guest at a time.
pub(crate) const MAX_STREAMS: usize = 4096;
/// The writer takes about this much at a time.
const BATCH: usize = 128 * 1024;
/// App output that waits to be sent.
const MAX_OUTPUT: usize = 256 * 1024;

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

/// Whether stream frames may be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Only what is urgent.
    Shut,
    Open,
    /// What is there, then these last frames, then [`Gate::Shut`].
    Draining(Bytes),
}

/// The other side did what no end of ours does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("{kind:?} frame of {len} bytes is malformed")]
    Malformed { kind: Kind, len: usize },
    #[error("{0:?} frame that this side never receives")]
    Unexpected(Kind),
    #[error("stream {0} sent more than its window")]
    Window(u32),
    #[error("stream {0} sent data after its end")]
    AfterFin(u32),
    #[error("stream {0} was opened twice or with a number that is none")]
    OpenedTwice(u32),
    #[error("a message is not understood: {0}")]
    Message(String),
}

/// Which stream: its number in frames, and the session that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    session: u32,
    number: u32,
}

/// What a received stream frame asks of the caller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Nothing,
    /// Guest: connect this stream.
    Open { stream: Key, door: Door },
}

pub(crate) struct Core {
    pub side: Side,
    pub gate: Gate,
    /// Frames that go out whatever the gate says: handshakes and the words around silence.
    urgent: VecDeque<Bytes>,
    /// CONTROL frames, ahead of stream frames.
    control: VecDeque<Bytes>,
    output: VecDeque<Bytes>,
    output_bytes: usize,
    pub streams: HashMap<Key, Stream>,
    /// Streams with something to send, each once, in the order of their turns.
    ready: VecDeque<Key>,
    next_stream: u32,
    /// Counts [`Core::reset_all`]. A new host numbers its streams anew, while those of the old one may still be in use here
    /// until their users have noticed that they were reset.
    session: u32,
    /// Host: streams of before whose RESET was said to a guest that may yet be thrown away; the next one has to hear it, too.
    resets_said: Vec<Key>,
    /// Bytes accepted from the users of streams and not yet taken by the writer.
    pub queued_bytes: usize,
    pub wakers: Vec<Waker>,
}

/// One end's streams. Shared by the pump, the handles of the streams and the end's owner.
pub(crate) struct Mux {
    core: Mutex<Core>,
    /// There may be something to write.
    writer: Notify,
    /// Something of the end's own state (not of one stream) has changed.
    pub changed: Notify,
}

/// The locked core; wakes whoever has to be woken when it is let go.
pub(crate) struct Locked<'a> {
    mux: &'a Mux,
    core: Option<MutexGuard<'a, Core>>,
    was_idle: bool,
}

impl std::ops::Deref for Locked<'_> {
    type Target = Core;
    fn deref(&self) -> &Core {
        self.core.as_deref().expect("the guard is only taken in drop")
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Core {
        self.core.as_deref_mut().expect("the guard is only taken in drop")
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let wakers = std::mem::take(&mut self.wakers);
        let has_work = self.was_idle && self.has_work();
        self.core = None;
        if has_work {
            self.mux.writer.notify_one();
        }
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Mux {
    pub fn new(side: Side) -> Self {
        let core = Core {
            side,
            gate: Gate::Shut,
            urgent: VecDeque::new(),
            control: VecDeque::new(),
            output: VecDeque::new(),
            output_bytes: 0,
            streams: HashMap::new(),
            ready: VecDeque::new(),
            next_stream: 1,
            session: 0,
            resets_said: Vec::new(),
            queued_bytes: 0,
            wakers: Vec::new(),
        };
        Self { core: Mutex::new(core), writer: Notify::new(), changed: Notify::new() }
    }

    pub fn lock(&self) -> Locked<'_> {
        let core = self.core.lock();
        let was_idle = !core.has_work();
        Locked { mux: self, core: Some(core), was_idle }
    }

    /// Waits until there is something to write and appends about [`BATCH`] bytes of it. Cancel-safe: bytes are taken in
    /// the same poll that answers.
    pub async fn fill(&self, batch: &mut BytesMut) {
        loop {
            let drained = {
                // Not `lock`: taking bytes away gives nobody new work.
                let mut core = self.core.lock();
                let had_output = core.output_bytes;
                core.fill(batch);
                core.output_bytes < had_output
            };
            if drained {
                self.changed.notify_waiters();
            }
            if !batch.is_empty() {
                return;
            }
            self.writer.notified().await;
        }
    }

    /// Returns what `found` finds in the state, looking again at every [`Mux::changed`].
    pub async fn until<R>(&self, mut found: impl FnMut(&mut Core) -> Option<R>) -> R {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(result) = found(&mut self.lock()) {
                return result;
            }
            changed.await;
        }
    }
}

impl Core {
    fn has_work(&self) -> bool {
        if !self.urgent.is_empty() {
            return true;
        }
        match self.gate {
            Gate::Shut => false,
            Gate::Open => !self.control.is_empty() || !self.ready.is_empty() || !self.output.is_empty(),
            Gate::Draining(_) => true,
        }
    }

    /// Queues frames that go out whatever the gate says.
    pub fn push_urgent(&mut self, frames: Bytes) {
        self.urgent.push_back(frames);
    }

    /// Queues CONTROL frames. The callers bound how many there can be.
    pub fn push_control(&mut self, frames: Bytes) {
        self.control.push_back(frames);
    }

    /// Forgets queued messages that were meant for another epoch.
    pub fn clear_messages(&mut self) {
        self.urgent.clear();
        self.control.clear();
    }

    /// Whether so much app output can be queued.
    pub fn output_room(&self, bytes: usize) -> bool {
        self.output_bytes + bytes <= MAX_OUTPUT
    }

    pub fn output_is_empty(&self) -> bool {
        self.output_bytes == 0
    }

    /// Queues app output.
    pub fn push_output(&mut self, output: Bytes) {
        self.output_bytes += output.len();
        self.output.push_back(output);
    }

    /// The next batch: urgent frames, then control, then app output and streams in turns of one frame each.
    fn fill(&mut self, batch: &mut BytesMut) {
        while let Some(frames) = self.urgent.pop_front() {
            batch.extend_from_slice(&frames);
        }
        if self.gate == Gate::Shut {
            return;
        }
        while batch.len() < BATCH {
            let Some(frames) = self.control.pop_front() else { break };
            batch.extend_from_slice(&frames);
        }
        while batch.len() < BATCH {
            let mut idle = true;
            if let Some(mut output) = self.output.pop_front() {
                let piece = output.split_to(output.len().min(MAX_PAYLOAD));
                put_frame(batch, Kind::Output, 0, &piece);
                self.output_bytes -= piece.len();
                if !output.is_empty() {
                    self.output.push_front(output);
                }
                idle = false;
            }
            if let Some(key) = self.ready.pop_front() {
                self.emit(key, batch);
                idle = false;
            }
            if idle {
                if let Gate::Draining(last) = &self.gate {
                    batch.extend_from_slice(last);
                    self.gate = Gate::Shut;
                }
                return;
            }
        }
    }

    /// One turn of one stream: its signs, and at most one frame of data.
    fn emit(&mut self, key: Key, batch: &mut BytesMut) {
        let Some(stream) = self.streams.get_mut(&key) else { return };
        stream.scheduled = false;
        if stream.of_before && stream.stage == Stage::Resetting && !stream.is_held() {
            self.resets_said.push(key);
        }
        self.queued_bytes -= stream.emit(key.number, batch);
        self.settle(key);
    }

    /// After a change of a stream: queues its next turn, or forgets it if nobody needs it any more.
    pub fn settle(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(&key) else { return };
        if stream.is_finished() {
            self.streams.remove(&key);
        } else if stream.has_work() && !stream.scheduled {
            stream.scheduled = true;
            self.ready.push_back(key);
        }
    }

    /// Host: a new stream; `None` if there are [`MAX_STREAMS`] already.
    pub fn open(&mut self, door: Door) -> Option<Key> {
        if self.streams.len() >= MAX_STREAMS {
            return None;
        }
        let key = loop {
            let key = self.key(self.next_stream);
            self.next_stream = self.next_stream.wrapping_add(1).max(1);
            if !self.streams.contains_key(&key) {
                break key;
            }
        };
        self.streams.insert(key, Stream::opening(door));
        self.settle(key);
        Some(key)
    }

    fn key(&self, number: u32) -> Key {
        Key { session: self.session, number }
    }

    /// Resets every stream without a word to the other side, which has forgotten them.
    pub fn reset_all(&mut self) {
        let Self { streams, wakers, ready, queued_bytes, .. } = self;
        streams.retain(|_, stream| {
            stream.abort(wakers);
            stream.scheduled = false;
            !stream.is_finished()
        });
        ready.clear();
        *queued_bytes = 0;
        self.resets_said.clear();
        self.session = self.session.wrapping_add(1);
    }

    /// Host: holds every stream that there is. Streams that are opened later are not held.
    pub fn hold_streams(&mut self) {
        self.resets_said.clear();
        self.streams.values_mut().for_each(Stream::hold);
    }

    /// Host: what held streams kept back is heard; whether they stay held is the caller's to say.
    fn take_in(&mut self) {
        let Self { streams, wakers, queued_bytes, .. } = self;
        for stream in streams.values_mut() {
            *queued_bytes -= stream.take_in(wakers);
        }
    }

    /// Host: the guest has said all that it will say before its snapshot.
    pub fn take_in_last_words(&mut self) {
        self.take_in();
        self.hold_streams();
    }

    /// Host: held streams go on.
    pub fn release_streams(&mut self) {
        self.take_in();
        // Nobody asks for these any more.
        self.streams.values_mut().for_each(|stream| stream.of_before = false);
        self.resets_said.clear();
        self.settle_all();
    }

    fn settle_all(&mut self) {
        let keys: Vec<Key> = self.streams.keys().copied().collect();
        keys.into_iter().for_each(|key| self.settle(key));
    }

    /// Host: the guest is thrown away, and another one of the same snapshot will know nothing of what it said. Held streams
    /// are as they were; the others are reset.
    pub fn keep_held_only(&mut self) {
        let Self { streams, wakers, ready, queued_bytes, .. } = self;
        streams.retain(|_, stream| {
            stream.scheduled = false;
            if stream.of_before {
                stream.forget_kept_back();
                return true;
            }
            *queued_bytes -= stream.queued();
            stream.abort(wakers);
            !stream.is_finished()
        });
        ready.clear();
        for key in std::mem::take(&mut self.resets_said) {
            self.streams.entry(key).or_insert_with(Stream::resetting);
        }
        self.settle_all();
    }

    /// Streams that are open or being opened.
    pub fn open_streams(&self) -> usize {
        self.streams.values().filter(|stream| stream.is_live()).count()
    }

    /// Host: streams whose OPEN has not been sent are refused a wait through a sleep.
    pub fn give_up_unsent_opens(&mut self) {
        let Self { streams, wakers, .. } = self;
        for stream in streams.values_mut() {
            if matches!(stream.stage, Stage::Unsent(_)) {
                stream.abort(wakers);
            }
        }
    }

    /// Takes a received frame of a stream.
    pub fn receive(&mut self, frame: Frame) -> Result<Received, Violation> {
        let Frame { kind, stream: id, payload, .. } = frame;
        let malformed = Violation::Malformed { kind, len: payload.len() };
        if kind == Kind::Open {
            return self.receive_open(id, &payload, malformed);
        }
        match kind {
            Kind::Opened | Kind::Refused if self.side == Side::Guest => return Err(Violation::Unexpected(kind)),
            Kind::Pad | Kind::Syn | Kind::Ack | Kind::Control | Kind::Output => return Err(Violation::Unexpected(kind)),
            _ => {}
        }
        // Frames of a stream that was reset here cross the reset on their way.
        let key = self.key(id);
        let Self { streams, wakers, queued_bytes, .. } = self;
        let Some(stream) = streams.get_mut(&key) else { return Ok(Received::Nothing) };
        match kind {
            Kind::Opened => stream.opened(wakers),
            Kind::Refused => stream.refused(wakers),
            Kind::Data => stream.receive(id, payload, wakers)?,
            Kind::Credit => {
                let bytes = payload.as_ref().try_into().map_err(|_| malformed)?;
                stream.credit(id, u32::from_le_bytes(bytes) as usize, wakers)?;
            }
            Kind::Fin => stream.receive_fin(count(&payload), wakers),
            Kind::Reset => *queued_bytes -= stream.receive_reset(count(&payload), wakers),
            _ => return Err(Violation::Unexpected(kind)),
        }
        self.settle(key);
        Ok(Received::Nothing)
    }

    fn receive_open(&mut self, id: u32, payload: &[u8], malformed: Violation) -> Result<Received, Violation> {
        if self.side == Side::Host {
            return Err(Violation::Unexpected(Kind::Open));
        }
        let door = read_door(payload).ok_or(malformed)?;
        let key = self.key(id);
        if id == 0 || self.streams.contains_key(&key) {
            return Err(Violation::OpenedTwice(id));
        }
        // The host keeps the same bound; a few more may be on their way out here.
        let stream = if self.streams.len() < 2 * MAX_STREAMS { Stream::connecting() } else { Stream::refusing() };
        let refusing = matches!(stream.stage, Stage::Refusing);
        self.streams.insert(key, stream);
        self.settle(key);
        Ok(if refusing { Received::Nothing } else { Received::Open { stream: key, door } })
    }
}

/// What a guest counted; nothing, if it did not or if this is no count.
fn count(payload: &[u8]) -> Option<u64> {
    payload.try_into().ok().map(u64::from_le_bytes)
}

/// For `poll` functions: keeps the newest waker of one direction of one stream.
pub(crate) fn wait<T>(slot: &mut Option<Waker>, cx: &std::task::Context<'_>) -> Poll<T> {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::stream::MuxStream;

    /// A guest must not wait for the answer on a stream whose other end is gone, and the guest that is restored next has not
    /// heard what an earlier one was told.
    #[tokio::test]
    async fn the_end_of_a_stream_that_leads_out_is_told_at_once_and_to_every_restored_guest() {
        let mux = Arc::new(Mux::new(Side::Host));
        let sent = |mux: &Mux| {
            let mut batch = BytesMut::new();
            mux.core.lock().fill(&mut batch);
            let mut decoder = crate::frame::Decoder::new();
            decoder.buffer().extend_from_slice(&batch);
            let frames = std::iter::from_fn(|| decoder.next());
            let kinds = frames.map(|decoded| match decoded {
                crate::frame::Decoded::Frame(frame) => (frame.kind, frame.stream),
                other => panic!("{other:?}"),
            });
            kinds.collect::<Vec<_>>()
        };
        let open = |door| {
            let key = mux.lock().open(door).unwrap();
            MuxStream::new(mux.clone(), key)
        };
        let answered = |stream: u32| {
            let opened = Frame { kind: Kind::Opened, stream, more: false, payload: Bytes::new() };
            assert_eq!(mux.lock().receive(opened), Ok(Received::Nothing));
        };
        mux.lock().gate = Gate::Open;
        let (out, into) = (open(Door::Egress), open(Door::Port(model::Port::DEFAULT)));
        assert_eq!(sent(&mux), [(Kind::Open, 1), (Kind::Open, 2)]);
        answered(1);
        answered(2);
        mux.lock().hold_streams();
        mux.lock().gate = Gate::Shut;
        drop((out, into));
        for attempt in 0..3 {
            mux.lock().gate = Gate::Open;
            assert_eq!(sent(&mux), [(Kind::Reset, 1)], "attempt {attempt}");
            mux.lock().gate = Gate::Shut;
            mux.lock().keep_held_only();
        }
        mux.lock().gate = Gate::Open;
        assert_eq!(sent(&mux), [(Kind::Reset, 1)]);
        mux.lock().release_streams();
        assert_eq!(sent(&mux), [(Kind::Reset, 2)], "the end of the others is told when they are released");
        assert!(mux.lock().streams.is_empty());
    }

    /// After a restart of `serve`: the new host's first stream has the number of an old one whose user in the guest has not
    /// looked at it since.
    #[tokio::test]
    async fn a_number_of_a_forgotten_host_is_free_for_the_next() {
        let mux = Arc::new(Mux::new(Side::Guest));
        let open = || Frame { kind: Kind::Open, stream: 1, more: false, payload: Bytes::from_static(&[80, 0]) };
        let Ok(Received::Open { stream: first, .. }) = mux.lock().receive(open()) else { panic!("it was not taken") };
        let mut held = MuxStream::new(mux.clone(), first);
        assert_eq!(mux.lock().receive(open()), Err(Violation::OpenedTwice(1)));

        mux.lock().reset_all();
        let Ok(Received::Open { stream: second, .. }) = mux.lock().receive(open()) else { panic!("it was not taken") };
        let fresh = MuxStream::new(mux.clone(), second);
        assert!(held.read_u8().await.is_err());
        drop(held);
        assert!(fresh.accept(), "the old stream's end was taken for the new one's");
        assert_eq!(mux.lock().open_streams(), 1);
    }
}
