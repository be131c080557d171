//! The guest's end of the channel: answers handshakes, keeps silence when told, connects streams to what the guest runs.
//!
//! Owns: which epoch is served, what is said in which order. What a guest *is* (a frozen cgroup, a clock, sockets) is
//! behind [`Guest`], so that this file runs in a test as it runs in a guest. The host is trusted here; the app is not,
//! and it meets only streams.

use std::{
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use model::Door;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
};
use tracing::warn;

use crate::{
    agent::{Event, Reply, Request, Restored},
    frame::{Assembler, Decoded, Decoder, Frame, Kind},
    message::{Ack, FromGuest, FromHost, Mode, Syn, VERSION, control, handshake},
    mux::{Gate, Key, Mux, Received, Side, Violation},
    pump::{FrameReader, write_frames},
    splice::splice,
    stream::MuxStream,
};

/// What the agent can do for the host. Errors are sentences for an operator.
pub trait Guest: Send + Sync + 'static {
    /// A connection to something in the guest. It must not keep written bytes back until a flush.
    type Conn: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Connects to a door of this guest.
    fn connect(&self, door: Door) -> impl Future<Output = io::Result<Self::Conn>> + Send;

    /// Whether the other end of a connection still listens. Asked before the first bytes behind something that was read.
    fn listens(&self, _connection: &Self::Conn) -> Listens {
        Listens::Yes
    }

    /// Whether the other end had closed a connection before it was given anything behind the first `before` bytes, and takes
    /// none of it. Asked right after a write to one that was said to listen. An error is the connection's.
    fn has_refused(&self, _connection: &Self::Conn, _before: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Ends a connection so that the app sees a reset, not an orderly end.
    fn reset(&self, connection: Self::Conn);

    /// Answers the host.
    fn request(&self, request: Request) -> impl Future<Output = Reply> + Send;

    /// Stops the app. On an error the app must run as before.
    fn freeze(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// Lets the app go on; harmless if it does.
    fn thaw(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// Sets clock, entropy and identity. The app is frozen and is thawed afterwards.
    fn restored(&self, restored: &Restored) -> impl Future<Output = Result<(), String>> + Send;
}

/// Whether the other end of a connection listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listens {
    /// As far as is known.
    Yes,
    /// It says no more. Whether it listens shows when it has closed.
    Perhaps,
    /// Everybody has let go of it: what would be written now reaches nobody.
    No,
}

/// A time of the host's that is at most half of this old is good enough.
const GOOD_ROUND_TRIP: Duration = Duration::from_millis(4);
/// How often a better one is asked for: on a machine that is busy none may come.
const MAX_PROBES: u32 = 6;
/// Room for the line that says what was dropped.
const NOTE_BYTES: usize = 128;

#[derive(Default)]
struct State {
    epoch: Option<u64>,
    exited: Option<i32>,
    /// A SYN that was asked for again.
    probe: Option<Probe>,
    /// Probes so far, over all attachments: an answer to an old one is none to a new one.
    probes: u64,
    /// Bytes of output dropped since the last that was sent.
    output_dropped: u64,
    /// Streams being spliced and requests being answered.
    tasks: JoinSet<()>,
}

/// Measures how long a SYN is under way.
struct Probe {
    number: u64,
    asked_at: Instant,
    tries: u32,
}

/// The guest's end. Cheap to clone. Lock order: `state` before the mux.
#[derive(Clone)]
pub struct GuestEnd {
    mux: Arc<Mux>,
    state: Arc<Mutex<State>>,
}

impl Default for GuestEnd {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestEnd {
    /// An end that has met no host.
    pub fn new() -> Self {
        Self { mux: Arc::new(Mux::new(Side::Guest)), state: Arc::default() }
    }

    /// Serves hosts on this transport until it ends. Streams stay, for the next transport.
    pub async fn run<T, G>(&self, io: T, guest: Arc<G>) -> io::Result<()>
    where
        T: AsyncRead + AsyncWrite,
        G: Guest,
    {
        let (reader, writer) = tokio::io::split(io);
        tokio::select! {
            ended = self.read_frames(FrameReader::new(reader, Decoder::seeking()), guest) => ended,
            error = write_frames(&self.mux, writer) => Err(error),
        }
    }

    async fn read_frames<R: AsyncRead + Unpin, G: Guest>(&self, mut reader: FrameReader<R>, guest: Arc<G>) -> io::Result<()> {
        let mut messages = Assembler::default();
        // Nothing but a SYN is taken after a loss: what came before it belongs to an attachment that is over.
        let mut synced = false;
        let mut opens = Vec::new();
        loop {
            let outcome = self.receive_streams(&mut reader, &mut synced, &mut opens);
            for (stream, door) in opens.drain(..) {
                self.connect(&guest, stream, door);
            }
            let outcome = match outcome {
                Ok(Some(frame)) => self.receive_message(frame, &mut synced, &mut messages, &guest).await,
                Ok(None) if reader.receive().await? => Ok(()),
                Ok(None) => return Ok(()),
                Err(violation) => Err(violation),
            };
            if let Err(violation) = outcome {
                warn!(%violation, "the host broke the protocol");
                synced = false;
            }
        }
    }

    /// Takes frames that have arrived, up to the next message.
    fn receive_streams<R: AsyncRead + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
        synced: &mut bool,
        opens: &mut Vec<(Key, Door)>,
    ) -> Result<Option<Frame>, Violation> {
        let mut core = self.mux.lock();
        while let Some(decoded) = reader.ready() {
            match decoded {
                Decoded::Marker | Decoded::Lost => *synced = false,
                Decoded::Frame(frame) if matches!(frame.kind, Kind::Syn | Kind::Control) => return Ok(Some(frame)),
                Decoded::Frame(frame) if *synced && frame.kind != Kind::Pad => {
                    if let Received::Open { stream, door } = core.receive(frame)? {
                        opens.push((stream, door));
                    }
                }
                Decoded::Frame(_) => {}
            }
        }
        Ok(None)
    }

    async fn receive_message<G: Guest>(&self, frame: Frame, synced: &mut bool, messages: &mut Assembler, guest: &Arc<G>) -> Result<(), Violation> {
        let kind = frame.kind;
        if kind == Kind::Control && !*synced {
            messages.clear();
            return Ok(());
        }
        let Some(message) = messages.push(frame).map_err(|error| Violation::Message(error.to_string()))? else { return Ok(()) };
        let not_understood = |error: serde_json::Error| Violation::Message(error.to_string());
        if kind == Kind::Syn {
            *synced = true;
            self.attached(serde_json::from_slice(&message).map_err(not_understood)?, &**guest).await;
            return Ok(());
        }
        match serde_json::from_slice(&message).map_err(not_understood)? {
            FromHost::Call { id, request } => self.answer(guest, id, request),
            FromHost::Quiesce { seq } => match guest.freeze().await {
                Ok(()) => self.mux.lock().gate = Gate::Draining(message_frames(&FromGuest::Quiesced { seq })),
                Err(why) => self.mux.lock().push_urgent(message_frames(&FromGuest::QuiesceFailed { seq, why })),
            },
            FromHost::Unquiesce { seq } => {
                let answer = match guest.thaw().await {
                    Ok(()) => FromGuest::Unquiesced { seq },
                    Err(why) => FromGuest::QuiesceFailed { seq, why },
                };
                let mut core = self.mux.lock();
                core.gate = Gate::Open;
                core.push_urgent(message_frames(&answer));
            }
        }
        Ok(())
    }

    /// A host has attached. It sends nothing until it is answered.
    async fn attached<G: Guest>(&self, syn: Syn, guest: &G) {
        let exited = {
            let mut state = self.state.lock();
            let mut core = self.mux.lock();
            core.gate = Gate::Shut;
            if state.epoch != Some(syn.epoch) {
                core.clear_messages();
                core.reset_all();
                state.epoch = Some(syn.epoch);
            }
            state.exited
        };
        let ready = async {
            if syn.version != VERSION {
                return Err(format!("the host speaks version {} of the protocol, this agent speaks {VERSION}", syn.version));
            }
            if let Mode::Restored(restored) = &syn.mode {
                let mut restored = restored.clone();
                match self.age(syn.answers) {
                    Ok(age) => restored.realtime_ns = restored.realtime_ns.saturating_add(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)),
                    Err(again) => return Ok(Some(again)),
                }
                guest.restored(&restored).await?;
            }
            guest.thaw().await.map(|()| None)
        };
        let (again, failed) = match ready.await {
            Ok(again) => (again, None),
            Err(why) => (None, Some(why)),
        };
        let open = failed.is_none() && again.is_none();
        let ack = Ack { version: VERSION, epoch: syn.epoch, exited, failed, again };
        let mut core = self.mux.lock();
        core.push_urgent(handshake(Kind::Ack, &ack).expect("an ACK is far shorter than a message may be"));
        if open {
            core.gate = Gate::Open;
        }
    }

    /// How old the time in a SYN is that answers this probe; or the number of the next one.
    fn age(&self, answers: Option<u64>) -> Result<Duration, u64> {
        let mut state = self.state.lock();
        let answered = state.probe.take().filter(|probe| answers == Some(probe.number));
        let tries = match answered {
            Some(Probe { asked_at, tries, .. }) => {
                let round_trip = asked_at.elapsed();
                if round_trip <= GOOD_ROUND_TRIP || tries >= MAX_PROBES {
                    return Ok(round_trip / 2);
                }
                tries
            }
            None => 0,
        };
        state.probes += 1;
        let number = state.probes;
        state.probe = Some(Probe { number, asked_at: Instant::now(), tries: tries + 1 });
        Err(number)
    }

    fn connect<G: Guest>(&self, guest: &Arc<G>, stream: Key, door: Door) {
        let guest = guest.clone();
        let stream = MuxStream::new(self.mux.clone(), stream);
        self.spawn(async move {
            // Dropping the stream before it is accepted refuses it.
            let Ok(mut connection) = guest.connect(door).await else { return };
            if !stream.accept() || splice(stream, &mut connection, &*guest).await.is_err() {
                guest.reset(connection);
            }
        });
    }

    fn answer<G: Guest>(&self, guest: &Arc<G>, id: u64, request: Request) {
        let (end, guest) = (self.clone(), guest.clone());
        let epoch = self.state.lock().epoch;
        self.spawn(async move {
            let reply = guest.request(request).await;
            let state = end.state.lock();
            if state.epoch == epoch {
                end.mux.lock().push_control(message_frames(&FromGuest::Reply { id, reply }));
            }
        });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut state = self.state.lock();
        while state.tasks.try_join_next().is_some() {}
        state.tasks.spawn(task);
    }

    /// Tells this host, or the next, that the app has ended.
    pub fn app_exited(&self, code: i32) {
        let mut state = self.state.lock();
        state.exited = Some(code);
        if state.epoch.is_some() {
            self.mux.lock().push_control(message_frames(&FromGuest::Event(Event::AppExited { code })));
        }
    }

    /// Sends app output in order. Waits while the host does not keep up, but no longer than `patience`: then output is
    /// dropped, counted and, when there is room again, a line says how much. One caller at a time; pieces of at most
    /// 64 KiB.
    pub async fn output(&self, output: &[u8], patience: Duration) {
        let waits = self.state.lock().output_dropped == 0;
        let patience = if waits { patience } else { Duration::ZERO };
        let room = self.mux.until(|core| core.output_room(NOTE_BYTES + output.len()).then_some(()));
        let fits = tokio::time::timeout(patience, room).await.is_ok();
        let mut state = self.state.lock();
        if !fits {
            state.output_dropped += output.len() as u64;
            return;
        }
        let dropped = std::mem::take(&mut state.output_dropped);
        let mut core = self.mux.lock();
        if dropped > 0 {
            core.push_output(Bytes::from(format!("\n[dormouse: {dropped} bytes of output were dropped here]\n")));
        }
        core.push_output(Bytes::copy_from_slice(output));
    }

    /// Returns when no output waits to be sent.
    pub async fn output_sent(&self) {
        self.mux.until(|core| core.output_is_empty().then_some(())).await;
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.mux.lock().open_streams()
    }
}

fn message_frames(message: &FromGuest) -> Bytes {
    control(message).expect("what a guest says is far shorter than a message may be")
}
