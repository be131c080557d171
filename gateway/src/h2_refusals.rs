//! What the HTTP/2 layer refuses by itself: it resets a stream, or ends the connection, and tells nobody of ours.
//!
//! Owns: which of the frames that go out to a client say so (RFC 9113 §§6.4, 6.8, 7), as a [`Reason`]. Counts and logs nothing, and keeps
//! nothing of a frame but its first bytes.

use crate::{
    h2_frames::{Frames, RST_STREAM},
    reply::Reason,
};

/// What is looked at of a payload: of GOAWAY the last stream and the error code, of RST_STREAM the error code.
const LOOKED_AT: usize = 8;
const GOAWAY: u8 = 0x7;

const PROTOCOL_ERROR: u32 = 0x1;
const FLOW_CONTROL_ERROR: u32 = 0x3;
const SETTINGS_TIMEOUT: u32 = 0x4;
const STREAM_CLOSED: u32 = 0x5;
const FRAME_SIZE_ERROR: u32 = 0x6;
const REFUSED_STREAM: u32 = 0x7;
const COMPRESSION_ERROR: u32 = 0x9;
const ENHANCE_YOUR_CALM: u32 = 0xb;

/// Follows the frames to a client.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    frames: Frames,
    payload: [u8; LOOKED_AT],
    looked_at: usize,
}

impl Outgoing {
    /// These bytes went out; `refused` is told of every refusal that is whole with them.
    pub fn pass(&mut self, bytes: &[u8], mut refused: impl FnMut(Reason)) {
        let Self { frames, payload, looked_at } = self;
        frames.pass(bytes, |kind, piece, ends| {
            if !matches!(kind, RST_STREAM | GOAWAY) {
                return;
            }
            let kept = piece.len().min(LOOKED_AT - *looked_at);
            payload[*looked_at..*looked_at + kept].copy_from_slice(&piece[..kept]);
            *looked_at += kept;
            if ends {
                refusal(kind, &payload[..std::mem::take(looked_at)]).into_iter().for_each(&mut refused);
            }
        });
    }
}

/// Of a frame that is whole. What ends streams and connections in order, and what our own side gives up, is none.
fn refusal(kind: u8, payload: &[u8]) -> Option<Reason> {
    let code = if kind == GOAWAY { payload.get(4..8) } else { payload.get(..4) };
    match u32::from_be_bytes(code?.try_into().ok()?) {
        REFUSED_STREAM => Some(Reason::TooManyStreams),
        ENHANCE_YOUR_CALM => Some(Reason::H2Flood),
        PROTOCOL_ERROR | FLOW_CONTROL_ERROR | SETTINGS_TIMEOUT | STREAM_CLOSED | FRAME_SIZE_ERROR | COMPRESSION_ERROR => Some(Reason::H2Violation),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn refusals_are_seen_however_the_bytes_are_cut() {
        let goaway = |code: u32, words: &[u8]| frame(GOAWAY, &[&[0; 4][..], &code.to_be_bytes(), words].concat());
        let reset = |code: u32| frame(RST_STREAM, &code.to_be_bytes());
        let all = [
            frame(4, &[]),
            reset(0),
            frame(0, &[3; 20_000]),
            reset(REFUSED_STREAM),
            reset(PROTOCOL_ERROR),
            frame(1, &[7, 0, 0, 0, 11]),
            goaway(0, b""),
            reset(8),
            goaway(ENHANCE_YOUR_CALM, b"too_many_resets"),
            frame(RST_STREAM, &[0, 0]),
        ]
        .concat();
        for cut in [1, 2, 5, 13, 1000, all.len()] {
            let (mut outgoing, mut seen) = (Outgoing::default(), Vec::new());
            all.chunks(cut).for_each(|piece| outgoing.pass(piece, |reason| seen.push(reason)));
            assert_eq!(seen, [Reason::TooManyStreams, Reason::H2Violation, Reason::H2Flood], "in pieces of {cut}");
        }
    }
}
