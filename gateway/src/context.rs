//! What one request knows of itself on its way through the phases.

use std::{
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::Instant,
};

use ::config::EdgeLimits;
use idle_controller::{Awake, WakeReport};
use model::MicrovmId;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    auth::permit::Permit,
    drain::InFlight,
    headers::new_request_id,
    metrics::{Open, Protocol, StreamKind},
    reply::{Asker, Reason},
    tally::Share,
    upstream::{
        connector::{FailureSlot, TunnelSlot},
        links::{Speaks, Target, Use},
        turns::Turn,
    },
    websocket::Handshake,
};

/// The context. Filled from top to bottom: nothing below `permit` is set before it is.
pub(crate) struct Context {
    /// What client and app read in `x-amzn-requestid`.
    pub request_id: String,
    /// The limits in force when it began.
    pub limits: Arc<EdgeLimits>,
    /// When the header was whole.
    pub begun: Instant,
    /// What the client speaks.
    pub protocol: Protocol,
    /// Counts the request as open.
    pub open: Option<Open>,
    /// Why it is refused for what its header looked like on the wire.
    pub malformed: Option<Reason>,
    /// Counts it on its connection.
    pub in_flight: Option<InFlight>,
    /// Whose form an answer of ours takes.
    pub asker: Asker,
    /// The WebSocket handshake, if the request is one.
    pub handshake: Option<Handshake>,
    /// Proof that the request passed every check.
    pub permit: Option<Permit>,
    /// Its place among the shells of its microVM, if it is one.
    pub shell: Option<Share<MicrovmId>>,
    /// Until when the request may be held for a wake, in all.
    pub hold_until: Instant,
    /// Leave to talk to the microVM; also its hold.
    pub awake: Option<Arc<Awake>>,
    /// How long the request waited for launches and wakes, and for which steps of them.
    pub wake: Option<WakeReport>,
    /// How often it was tried again.
    pub retries: u8,
    /// How often it was found asleep after it had been awake.
    pub found_asleep: u8,
    /// What is to be spoken with the app, as far as the request decides.
    pub speaks: Speaks,
    /// Where the request goes, and what is spoken there.
    pub target: Option<Target>,
    /// Its turn to open a connection of HTTP/2.
    pub turn: Option<Turn>,
    /// Where the connector leaves why it failed.
    pub dial_failure: FailureSlot,
    /// Where the connector leaves its end of a WebSocket's stream.
    pub tunnel: TunnelSlot,
    /// The connection to the guest, where it is a tied one.
    pub link: Option<Use>,
    /// Whether that connection was used before.
    pub reused: bool,
    /// Ends the connection if the guest stays silent.
    pub first_byte: Option<AbortOnDropHandle<()>>,
    /// Takes an answer that nothing has come of for long for an open stream.
    pub watch: Option<Watch>,
    /// Ends the connection to the guest if the client does not go on with its body (HTTP/2).
    pub upload: Option<Watch>,
    /// Why `first_byte` or `upload` did so.
    pub cut: Arc<OnceLock<Reason>>,
    /// Interim answers of the guest so far.
    pub interim: u8,
    /// What kind of stream the answer is, if it is one.
    pub stream: Option<StreamKind>,
    /// Body bytes from the client.
    pub bytes_in: u64,
    /// Body bytes to the client.
    pub bytes_out: u64,
    /// Why the gateway answered by itself.
    pub reason: Option<Reason>,
    /// Whether there is nobody left to answer.
    pub client_left: bool,
}

/// Looks whether more of a body comes.
pub(crate) struct Watch {
    /// Body bytes so far.
    pub progress: Arc<AtomicU64>,
    /// Who looks.
    pub _task: AbortOnDropHandle<()>,
}

impl Context {
    /// Of a request whose header is whole now.
    pub fn new(limits: Arc<EdgeLimits>) -> Self {
        let begun = Instant::now();
        Self {
            request_id: new_request_id(),
            begun,
            protocol: Protocol::Http1,
            open: None,
            malformed: None,
            in_flight: None,
            asker: Asker::Plain,
            handshake: None,
            permit: None,
            shell: None,
            hold_until: begun + limits.hold,
            limits,
            awake: None,
            wake: None,
            retries: 0,
            found_asleep: 0,
            speaks: Speaks::Http1,
            target: None,
            turn: None,
            dial_failure: FailureSlot::default(),
            tunnel: TunnelSlot::default(),
            link: None,
            reused: false,
            first_byte: None,
            watch: None,
            upload: None,
            cut: Arc::default(),
            interim: 0,
            stream: None,
            bytes_in: 0,
            bytes_out: 0,
            reason: None,
            client_left: false,
        }
    }

    /// What is spoken with the app.
    pub fn spoken(&self) -> Speaks {
        self.target.map_or(self.speaks, |target| target.speaks)
    }

    /// It has waited for a launch or wake, perhaps not for the first time.
    pub fn waited(&mut self, report: &WakeReport) {
        match &mut self.wake {
            None => self.wake = Some(report.clone()),
            Some(all) => {
                all.waited += report.waited;
                all.phases.extend(&report.phases);
            }
        }
    }

    /// Bytes crossed: activity.
    pub fn touch(&self) {
        if let Some(awake) = &self.awake {
            awake.touch();
        }
    }
}
