//! The host's end of one guest's channel. It outlives the VMM process: the streams in it go on in the process that is
//! restored from the snapshot.
//!
//! ```text
//!            attach            quiesce              detach              attach(Restored)
//! Detached ─────────► Attached ───────► Quiesced ─────────► Parked ──────────────────────► Attached
//!                        ▲                 │                  ▲ (streams keep what they hold)  │
//!                        └─── unquiesce ───┘                  └────────── park_again ──────────┘
//! ```
//! A quiesce also *holds* the streams of the time before it: after an unquiesce or an attach no byte of theirs moves until
//! [`AgentLink::release_streams`], while new ones can be opened. Whoever restores a guest can first talk to it alone, and if
//! that goes wrong throw it away as if it had never been.
//! From anywhere else a detach, a lost transport or an attach to another guest resets every stream. The guest is not
//! trusted: whatever breaks the protocol ends the attachment, and nothing it sends can make this side hold more than the
//! windows of its streams.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use model::{Door, Port};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::oneshot,
    task::JoinSet,
};
use tracing::{debug, warn};

use crate::{
    agent::{Event, Reply, Request, Restored},
    frame::{Assembler, Decoded, Decoder, Frame, Kind, padding},
    message::{Ack, FromGuest, FromHost, Mode, Syn, VERSION, control, handshake},
    mux::{Gate, Mux, Side, Violation},
    pump::{FrameReader, write_frames},
    stream::Answer,
};

pub use crate::stream::MuxStream;

/// Unread events of one agent; it has one kind, which happens once.
const MAX_EVENTS: usize = 64;
/// How often a guest may want the same SYN; it gives up before that.
const MAX_SYNS: u32 = 16;
/// Requests without an answer at a time.
const MAX_CALLS: usize = 256;

/// How a transport is attached.
#[derive(Debug, Clone)]
pub enum Attach {
    /// A guest that boots: wait for its agent.
    Boot,
    /// A guest restored from a snapshot taken after [`AgentLink::quiesce`]. If this link quiesced it, its streams go on;
    /// a new link resets whatever streams the guest remembers.
    Restored(Restored),
    /// A guest that never stopped, while `serve` was restarted: the channel may be in the middle of a frame in both
    /// directions. All old streams are reset.
    Adopted,
}

/// Why the channel did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The agent did not answer in time.
    #[error("the guest agent did not answer within {0:?}")]
    Timeout(Duration),
    /// The transport ended, or none is attached.
    #[error("the channel to the guest agent is closed")]
    Closed,
    /// The guest sent what no agent of ours sends.
    #[error("the guest agent broke the protocol: {0}")]
    Protocol(String),
    /// The agent could not do it.
    #[error("the guest agent reports: {0}")]
    Agent(String),
    /// Nobody listens on the port in the guest.
    #[error("nobody listens on port {0} in the guest")]
    Refused(Port),
    /// The agent opens no shell: it has none to open, or too many are open.
    #[error("the guest agent does not open a shell")]
    NoShell,
    /// The agent leads nothing out.
    #[error("the guest agent takes no stream for the guest's connections")]
    NoEgress,
}

impl From<Violation> for LinkError {
    fn from(violation: Violation) -> Self {
        Self::Protocol(violation.to_string())
    }
}

/// Takes the app's output.
type Output = Box<dyn Fn(&[u8]) + Send + Sync>;

/// What the link is to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Detached,
    Attached,
    /// QUIESCE is said; the answer is outstanding.
    Quiescing,
    Quiesced,
    /// Quiesced, and then let go of.
    Parked,
    Closed,
}

/// Everything of the link that is not streams. Lock order: this one before the mux's.
struct State {
    phase: Phase,
    epoch: u64,
    /// A guest has met this epoch.
    epoch_used: bool,
    /// Counts attachments, so that the end of an old one is not taken for the end of the present one.
    attachment: u64,
    tasks: JoinSet<()>,
    /// The transport ended by itself.
    lost: bool,
    next_call: u64,
    calls: HashMap<u64, oneshot::Sender<Reply>>,
    events: VecDeque<Event>,
    /// The guest's app has ended and an event has said so.
    exit_seen: bool,
    next_seq: u64,
    /// The guest's answer to the newest quiesce or unquiesce.
    answer: Option<(u64, Result<(), String>)>,
    /// Attached to a restored guest, with all of its streams still held.
    untouched: bool,
}

/// The host's end. All methods may be called from any task.
pub struct AgentLink {
    mux: Arc<Mux>,
    state: Mutex<State>,
    output: Output,
    /// One attach at a time.
    attaching: tokio::sync::Mutex<()>,
}

fn random_epoch() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}

impl AgentLink {
    /// A link with a fresh random epoch and no transport. `output` receives the app's stdout and stderr as it comes
    /// (interleaved, in order), and must not block for long.
    pub fn new(output: Output) -> Arc<Self> {
        let state = State {
            phase: Phase::Detached,
            epoch: random_epoch(),
            epoch_used: false,
            attachment: 0,
            tasks: JoinSet::new(),
            lost: false,
            next_call: 1,
            calls: HashMap::new(),
            events: VecDeque::new(),
            exit_seen: false,
            next_seq: 1,
            answer: None,
            untouched: false,
        };
        Arc::new(Self { mux: Arc::new(Mux::new(Side::Host)), state: Mutex::new(state), output, attaching: tokio::sync::Mutex::new(()) })
    }

    /// Takes a connected transport and shakes hands. Returns when the agent is there and (after a restore) has set clock,
    /// entropy and identity and thawed the app. Spawns the tasks that carry frames; they end with the transport.
    ///
    /// After an error, a link that was parked still is, and may be attached to another restored guest.
    pub async fn attach<T: AsyncRead + AsyncWrite + Send + 'static>(self: &Arc<Self>, io: T, how: Attach, limit: Duration) -> Result<(), LinkError> {
        let attached = async {
            let _one = self.attaching.lock().await;
            self.detach();
            let (epoch, goes_on) = self.epoch_for(&how)?;
            let (reader, mut writer) = tokio::io::split(io);
            let mut reader = FrameReader::new(reader, Decoder::seeking());
            let ack = shake_hands(&mut reader, &mut writer, epoch, how).await?;
            self.install(reader, writer, ack, goes_on)
        };
        tokio::time::timeout(limit, attached).await.unwrap_or(Err(LinkError::Timeout(limit)))
    }

    /// The epoch of the attachment that begins: the old one only if the guest's streams can go on, and whether they can.
    fn epoch_for(&self, how: &Attach) -> Result<(u64, bool), LinkError> {
        let mut state = self.state.lock();
        let goes_on = match (state.phase, how) {
            (Phase::Closed, _) => return Err(LinkError::Closed),
            (Phase::Parked, Attach::Restored(_)) => true,
            _ => false,
        };
        if !goes_on {
            self.forget(&mut state, Phase::Detached);
            if std::mem::replace(&mut state.epoch_used, true) {
                state.epoch = random_epoch();
            }
        }
        Ok((state.epoch, goes_on))
    }

    fn install<T: AsyncRead + AsyncWrite + Send + 'static>(
        self: &Arc<Self>,
        reader: FrameReader<tokio::io::ReadHalf<T>>,
        writer: tokio::io::WriteHalf<T>,
        ack: Ack,
        goes_on: bool,
    ) -> Result<(), LinkError> {
        let mut state = self.state.lock();
        if state.phase == Phase::Closed {
            return Err(LinkError::Closed);
        }
        state.phase = Phase::Attached;
        state.untouched = goes_on;
        state.lost = false;
        state.attachment += 1;
        if let Some(code) = ack.exited {
            note_exit(&mut state, code);
        }
        while state.tasks.try_join_next().is_some() {}
        let (link, attachment) = (self.clone(), state.attachment);
        state.tasks.spawn(async move {
            // Whichever direction ends first ends both.
            let why = tokio::select! {
                why = link.read_frames(reader) => why,
                error = write_frames(&link.mux, writer) => format!("writing to it failed: {error}"),
            };
            link.ended(attachment, &why);
        });
        self.mux.lock().gate = Gate::Open;
        self.mux.changed.notify_waiters();
        Ok(())
    }

    /// Handles frames until the transport ends or the guest breaks the protocol; answers why.
    async fn read_frames<R: AsyncRead + Unpin>(&self, mut reader: FrameReader<R>) -> String {
        let mut messages = Assembler::default();
        let mut outside = Vec::new();
        loop {
            let handled = self.receive_streams(&mut reader, &mut outside);
            // Messages and output are handled without the mux's lock. They keep their order among each other; a stream
            // frame that overtakes them changes nothing.
            for frame in outside.drain(..) {
                if let Err(violation) = self.receive_other(frame, &mut messages) {
                    return format!("the guest broke the protocol: {violation}");
                }
            }
            if let Err(violation) = handled {
                return format!("the guest broke the protocol: {violation}");
            }
            match reader.receive().await {
                Ok(true) => {}
                Ok(false) => return "end of file".to_owned(),
                Err(error) => return format!("reading from it failed: {error}"),
            }
        }
    }

    /// Takes all frames that have arrived, under one lock.
    fn receive_streams<R: AsyncRead + Unpin>(&self, reader: &mut FrameReader<R>, outside: &mut Vec<Frame>) -> Result<(), Violation> {
        let mut core = self.mux.lock();
        while let Some(decoded) = reader.ready() {
            match decoded {
                Decoded::Frame(frame) => match frame.kind {
                    Kind::Pad => {}
                    Kind::Control | Kind::Output => outside.push(frame),
                    _ => {
                        core.receive(frame)?;
                    }
                },
                Decoded::Marker | Decoded::Lost => return Err(Violation::Message("bytes that are no frame".to_owned())),
            }
        }
        Ok(())
    }

    fn receive_other(&self, frame: Frame, messages: &mut Assembler) -> Result<(), Violation> {
        if frame.kind == Kind::Output {
            (self.output)(&frame.payload);
            return Ok(());
        }
        let not_understood = |error: &dyn std::fmt::Display| Violation::Message(error.to_string());
        let Some(message) = messages.push(frame).map_err(|error| not_understood(&error))? else { return Ok(()) };
        let message: FromGuest = serde_json::from_slice(&message).map_err(|error| not_understood(&error))?;
        let mut state = self.state.lock();
        match message {
            FromGuest::Reply { id, reply } => {
                // A caller that gave up is not there any more.
                if let Some(caller) = state.calls.remove(&id) {
                    let _ = caller.send(reply);
                }
            }
            FromGuest::Event(Event::AppExited { code }) => note_exit(&mut state, code),
            FromGuest::Quiesced { seq } | FromGuest::Unquiesced { seq } => state.answer = Some((seq, Ok(()))),
            FromGuest::QuiesceFailed { seq, why } => state.answer = Some((seq, Err(why))),
        }
        drop(state);
        self.mux.changed.notify_waiters();
        Ok(())
    }

    /// The transport has ended by itself.
    fn ended(&self, attachment: u64, why: &str) {
        let mut state = self.state.lock();
        if state.attachment != attachment || !matches!(state.phase, Phase::Attached | Phase::Quiescing | Phase::Quiesced) {
            return;
        }
        if state.phase == Phase::Quiesced {
            // The guest had said all it had to say. Its streams wait for the one that is restored from the snapshot.
            debug!(why, "the channel of a quiesced guest ended");
            self.mux.lock().gate = Gate::Shut;
            state.phase = Phase::Parked;
        } else if state.untouched {
            debug!(why, "the channel of a restored guest ended before its streams went on");
            self.forget_attempt(&mut state);
        } else {
            warn!(why, "the channel to a guest agent ended");
            self.forget(&mut state, Phase::Detached);
        }
        state.lost = true;
        drop(state);
        self.mux.changed.notify_waiters();
    }

    /// Forgets a guest: its streams, and what was asked of it.
    fn forget(&self, state: &mut State, next: Phase) {
        state.phase = next;
        state.calls.clear();
        state.answer = None;
        let mut core = self.mux.lock();
        core.gate = Gate::Shut;
        core.clear_messages();
        core.reset_all();
    }

    /// Forgets a restored guest whose streams never went on: another one of the same snapshot may be attached.
    fn forget_attempt(&self, state: &mut State) {
        state.phase = Phase::Parked;
        state.untouched = false;
        state.calls.clear();
        state.answer = None;
        state.events.clear();
        state.exit_seen = false;
        let mut core = self.mux.lock();
        core.gate = Gate::Shut;
        core.clear_messages();
        core.keep_held_only();
    }

    /// Lets the streams of the time before the last quiesce go on, with a guest that runs. Harmless at any other time.
    pub fn release_streams(&self) {
        let mut state = self.state.lock();
        if state.phase == Phase::Attached {
            state.untouched = false;
            self.mux.lock().release_streams();
        }
    }

    /// Throws away a restored guest: the link is parked as it was before the attach, with every stream of that time; those that
    /// were opened since are reset. `false`, and nothing is changed, if the guest is another or its streams have gone on.
    pub fn park_again(&self) -> bool {
        let mut state = self.state.lock();
        // Its channel may have ended already.
        let parked = state.phase == Phase::Parked || (state.phase == Phase::Attached && state.untouched);
        if state.phase == Phase::Attached && state.untouched {
            state.tasks.abort_all();
            self.forget_attempt(&mut state);
        }
        drop(state);
        self.mux.changed.notify_waiters();
        parked
    }

    /// Asks the agent something.
    pub async fn call(&self, request: Request, limit: Duration) -> Result<Reply, LinkError> {
        let (answer, reply) = oneshot::channel();
        let id = {
            let mut state = self.state.lock();
            if state.phase != Phase::Attached {
                return Err(LinkError::Closed);
            }
            if state.calls.len() >= MAX_CALLS {
                return Err(LinkError::Agent(format!("more than {MAX_CALLS} requests wait for an answer")));
            }
            let id = state.next_call;
            let frames = control(&FromHost::Call { id, request }).map_err(|error| LinkError::Protocol(error.to_string()))?;
            state.next_call += 1;
            state.calls.insert(id, answer);
            self.mux.lock().push_control(frames);
            id
        };
        let _entry = CallEntry { link: self, id };
        match tokio::time::timeout(limit, reply).await {
            Ok(Ok(Reply::Failed(why))) => Err(LinkError::Agent(why)),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_dropped)) => Err(LinkError::Closed),
            Err(_elapsed) => Err(LinkError::Timeout(limit)),
        }
    }

    /// The next thing the agent says unasked (each is delivered once; they queue). Never ends while detached.
    pub async fn event(&self) -> Event {
        self.until(|state| state.events.pop_front()).await
    }

    /// Opens a stream to a door of the guest.
    pub async fn open(self: &Arc<Self>, door: impl Into<Door>, limit: Duration) -> Result<MuxStream, LinkError> {
        let door = door.into();
        let stream = {
            let state = self.state.lock();
            if state.phase != Phase::Attached {
                return Err(LinkError::Closed);
            }
            let id = self.mux.lock().open(door);
            let id = id.ok_or_else(|| LinkError::Agent("too many streams to this guest are open".to_owned()))?;
            MuxStream::new(self.mux.clone(), id)
        };
        match tokio::time::timeout(limit, stream.answered()).await {
            Ok(Answer::Opened) => Ok(stream),
            Ok(Answer::Refused) => Err(match door {
                Door::Port(port) => LinkError::Refused(port),
                Door::Shell => LinkError::NoShell,
                Door::Egress => LinkError::NoEgress,
            }),
            Ok(Answer::Gone) => Err(LinkError::Closed),
            Err(_elapsed) => Err(LinkError::Timeout(limit)),
        }
    }

    /// Brings the channel to silence for a snapshot: the app is frozen, every byte under way has arrived on either side,
    /// and neither side sends another until [`AgentLink::unquiesce`] or the next [`AgentLink::attach`]. Streams are
    /// parked and held. If the agent does not answer in `limit` (or the future is dropped), the link is as before, but that its
    /// streams are held.
    pub async fn quiesce(&self, limit: Duration) -> Result<(), LinkError> {
        let seq = self.begin(Phase::Attached, Phase::Quiescing, |seq| FromHost::Quiesce { seq })?;
        let mut undo = UndoQuiesce { link: self, armed: true };
        let answer = tokio::time::timeout(limit, self.answer(seq)).await.unwrap_or(Err(LinkError::Timeout(limit)));
        if answer.is_ok() {
            let mut state = self.state.lock();
            if state.phase != Phase::Quiescing {
                return Err(LinkError::Closed);
            }
            state.phase = Phase::Quiesced;
            self.mux.lock().take_in_last_words();
            undo.armed = false;
        }
        answer
    }

    /// Takes a quiesce back: the app is thawed, streams can be opened. For a guest that was not replaced. That is so whatever
    /// the agent answers.
    pub async fn unquiesce(&self, limit: Duration) -> Result<(), LinkError> {
        let seq = self.begin(Phase::Quiesced, Phase::Attached, |seq| FromHost::Unquiesce { seq })?;
        tokio::time::timeout(limit, self.answer(seq)).await.unwrap_or(Err(LinkError::Timeout(limit)))
    }

    /// Goes from one phase to another, and tells the guest.
    fn begin(&self, from: Phase, to: Phase, message: impl FnOnce(u64) -> FromHost) -> Result<u64, LinkError> {
        let mut state = self.state.lock();
        if state.phase != from {
            return Err(LinkError::Closed);
        }
        let seq = state.next_seq;
        state.next_seq += 1;
        let frames = control(&message(seq)).map_err(|error| LinkError::Protocol(error.to_string()))?;
        state.phase = to;
        let mut core = self.mux.lock();
        core.push_urgent(frames);
        if to == Phase::Attached {
            core.gate = Gate::Open;
        } else {
            core.gate = Gate::Shut;
            core.give_up_unsent_opens();
            core.hold_streams();
            state.untouched = false;
        }
        drop(core);
        drop(state);
        self.mux.changed.notify_waiters();
        Ok(seq)
    }

    /// The guest's answer to a quiesce or unquiesce.
    async fn answer(&self, seq: u64) -> Result<(), LinkError> {
        self.until(|state| match &state.answer {
            Some((answered, result)) if *answered == seq => Some(result.clone().map_err(LinkError::Agent)),
            _ if matches!(state.phase, Phase::Detached | Phase::Parked | Phase::Closed) => Some(Err(LinkError::Closed)),
            _ => None,
        })
        .await
    }

    /// Lets go of the transport (after a quiesce, before the VMM process is ended). Streams stay parked. Without a
    /// quiesce nobody knows which bytes arrived, and the streams are reset.
    pub fn detach(&self) {
        let mut state = self.state.lock();
        state.tasks.abort_all();
        match state.phase {
            Phase::Quiesced => {
                state.phase = Phase::Parked;
                self.mux.lock().gate = Gate::Shut;
            }
            Phase::Attached | Phase::Quiescing => self.forget(&mut state, Phase::Detached),
            Phase::Detached | Phase::Parked | Phase::Closed => {}
        }
        drop(state);
        self.mux.changed.notify_waiters();
    }

    /// Ends every stream with a reset: the guest is gone for good.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.tasks.abort_all();
        self.forget(&mut state, Phase::Closed);
        drop(state);
        self.mux.changed.notify_waiters();
    }

    /// Returns when a parked stream has bytes for the guest, written before or after it was parked. The end of a stream
    /// is remembered and does not count.
    pub async fn parked_write(&self) {
        self.until(|state| {
            let parked = matches!(state.phase, Phase::Quiescing | Phase::Quiesced | Phase::Parked);
            (parked && self.mux.lock().queued_bytes > 0).then_some(())
        })
        .await;
    }

    /// Returns when the transport has ended by itself (the VMM died).
    pub async fn lost(&self) {
        self.until(|state| state.lost.then_some(())).await;
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.mux.lock().open_streams()
    }

    async fn until<R>(&self, mut found: impl FnMut(&mut State) -> Option<R>) -> R {
        loop {
            let mut changed = std::pin::pin!(self.mux.changed.notified());
            changed.as_mut().enable();
            if let Some(result) = found(&mut self.state.lock()) {
                return result;
            }
            changed.await;
        }
    }
}

impl Drop for AgentLink {
    /// Streams that outlive their link (which the tasks of an attachment keep alive) end with it.
    fn drop(&mut self) {
        self.close();
    }
}

fn note_exit(state: &mut State, code: i32) {
    if !std::mem::replace(&mut state.exit_seen, true) && state.events.len() < MAX_EVENTS {
        state.events.push_back(Event::AppExited { code });
    }
}

/// Takes a call whose caller left off the books.
struct CallEntry<'a> {
    link: &'a AgentLink,
    id: u64,
}

impl Drop for CallEntry<'_> {
    fn drop(&mut self) {
        self.link.state.lock().calls.remove(&self.id);
    }
}

/// Undoes a quiesce that was not answered.
struct UndoQuiesce<'a> {
    link: &'a AgentLink,
    armed: bool,
}

impl Drop for UndoQuiesce<'_> {
    fn drop(&mut self) {
        if self.armed {
            // Refused if the transport has gone meanwhile, and then there is nothing to undo.
            let _ = self.link.begin(Phase::Quiescing, Phase::Attached, |seq| FromHost::Unquiesce { seq });
        }
    }
}

/// Sends SYN, as often as the guest wants it, and skips whatever comes before the ACK that answers it.
async fn shake_hands<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: &mut FrameReader<R>,
    writer: &mut W,
    epoch: u64,
    how: Attach,
) -> Result<Ack, LinkError> {
    let mode = match how {
        Attach::Boot => Mode::Boot,
        Attach::Restored(restored) => Mode::Restored(restored),
        Attach::Adopted => Mode::Adopted,
    };
    let began = Instant::now();
    let mut answers = None;
    for _ in 0..MAX_SYNS {
        let mut mode = mode.clone();
        if let Mode::Restored(restored) = &mut mode {
            let passed = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            restored.realtime_ns = restored.realtime_ns.saturating_add(passed);
        }
        let ack = exchange(reader, writer, &Syn { version: VERSION, epoch, mode, answers }).await?;
        if ack.again.is_none() {
            return Ok(ack);
        }
        answers = ack.again;
    }
    Err(LinkError::Protocol(format!("it wanted the time more than {MAX_SYNS} times")))
}

/// Sends one SYN and reads the ACK that answers it.
async fn exchange<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(reader: &mut FrameReader<R>, writer: &mut W, syn: &Syn) -> Result<Ack, LinkError> {
    let padded = syn.mode == Mode::Adopted;
    let epoch = syn.epoch;
    let syn: Bytes = handshake(Kind::Syn, syn).map_err(|error| LinkError::Protocol(error.to_string()))?;
    let send = async {
        if padded {
            writer.write_all(padding()).await?;
        }
        writer.write_all(&syn).await?;
        writer.flush().await?;
        // Not the end of the handshake: only a failed write ends it from here.
        std::future::pending::<std::io::Result<()>>().await
    };
    // The guest may be unable to take the SYN before someone takes what it was sending.
    tokio::select! {
        sent = send => {
            debug!(?sent, "the SYN could not be sent");
            Err(LinkError::Closed)
        }
        ack = await_ack(reader, epoch) => ack,
    }
}

async fn await_ack<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>, epoch: u64) -> Result<Ack, LinkError> {
    let mut messages = Assembler::default();
    loop {
        let decoded = reader.next().await.map_err(|error| {
            debug!(%error, "the transport failed during the handshake");
            LinkError::Closed
        })?;
        let frame = match decoded {
            None => return Err(LinkError::Closed),
            Some(Decoded::Marker) => {
                messages.clear();
                continue;
            }
            Some(Decoded::Frame(frame)) if frame.kind == Kind::Ack => frame,
            Some(Decoded::Frame(_) | Decoded::Lost) => continue,
        };
        let Ok(Some(message)) = messages.push(frame) else { continue };
        let ack: Ack = serde_json::from_slice(&message).map_err(|error| LinkError::Protocol(format!("its ACK is not understood: {error}")))?;
        if ack.epoch != epoch {
            continue;
        }
        if let Some(why) = ack.failed {
            return Err(LinkError::Agent(why));
        }
        if ack.version != VERSION {
            return Err(LinkError::Protocol(format!("it speaks version {}, this node speaks {VERSION}", ack.version)));
        }
        return Ok(ack);
    }
}
