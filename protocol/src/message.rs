//! Messages between the two ends of the channel themselves: handshake, silence, and the envelopes of [`crate::agent`].

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    agent::{Event, Reply, Request, Restored},
    frame::{Kind, MARKER, TooLong, put_message},
};

/// Both ends must speak the same version: agent and node are installed together, and a snapshot of another version is
/// refused by the engine before it runs.
pub const VERSION: u32 = 5;

/// How the guest got here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    Boot,
    Restored(Restored),
    Adopted,
}

/// Begins an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Syn {
    pub version: u32,
    /// Random; the guest's streams go on if it is the one of the attachment before, and are reset if not.
    pub epoch: u64,
    pub mode: Mode,
    /// Set if it is the same again because an [`Ack`] asked for that.
    pub answers: Option<u64>,
}

/// Answers a [`Syn`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ack {
    pub version: u32,
    /// Of the [`Syn`] it answers.
    pub epoch: u64,
    /// Set if the app has ended and the host of this epoch may not know.
    pub exited: Option<i32>,
    /// What the agent could not do; the attachment fails.
    pub failed: Option<String>,
    /// Not an answer yet: the SYN is wanted once more, with this number and the time as it is then. By how long that takes
    /// the guest knows how old the time in it is; the first SYN may have waited long for a guest that was just waking up.
    pub again: Option<u64>,
}

/// What the host says in CONTROL frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromHost {
    Call { id: u64, request: Request },
    /// Freeze the app, send what there is to send, answer `Quiesced`, and then be silent.
    Quiesce { seq: u64 },
    /// Thaw the app and go on.
    Unquiesce { seq: u64 },
}

/// What the guest says in CONTROL frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromGuest {
    Reply { id: u64, reply: Reply },
    Event(Event),
    Quiesced { seq: u64 },
    QuiesceFailed { seq: u64, why: String },
    Unquiesced { seq: u64 },
}

fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("our messages have string keys only, and writing to memory cannot fail")
}

/// The frames of a SYN or ACK, with its marker.
pub(crate) fn handshake(kind: Kind, message: &impl Serialize) -> Result<Bytes, TooLong> {
    let mut frames = BytesMut::from(&MARKER[..]);
    if put_message(&mut frames, kind, &json(message)) { Ok(frames.freeze()) } else { Err(TooLong) }
}

/// The frames of a CONTROL message.
pub(crate) fn control(message: &impl Serialize) -> Result<Bytes, TooLong> {
    let mut frames = BytesMut::new();
    if put_message(&mut frames, Kind::Control, &json(message)) { Ok(frames.freeze()) } else { Err(TooLong) }
}
