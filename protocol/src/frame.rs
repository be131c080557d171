//! Frames: how bytes on the channel are cut into pieces. Pure; no I/O, no state beyond the bytes not yet decoded.
//!
//! ```text
//! header (16 bytes, little endian)                        payload         trailer
//! ┌────────┬──────┬───────┬───────────┬─────────┬───────┬───────────────┬───────┐
//! │ D0 5E  │ kind │ flags │ stream u32│ len u32 │ crc32 │ len ≤ 32 KiB  │ crc32 │
//! └────────┴──────┴───────┴───────────┴─────────┴───────┴───────────────┴───────┘
//! ```
//!
//! Both checksums are the CRC-32 of the first twelve header bytes. The channel itself loses nothing; the checksums are
//! there because the channel has no connections: an end that starts to talk (a `serve` that was restarted) may find the
//! other one in the middle of a frame. It then sends [`padding`], which completes any frame under way, with a trailer of
//! zeros that marks the frame as cut off, so that no padding is ever taken for data. What follows the padding is found by
//! its [`MARKER`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use model::{Door, Port};

/// Bytes before a payload.
pub const HEADER_BYTES: usize = 16;
/// Bytes after a payload.
pub const TRAILER_BYTES: usize = 4;
/// The longest payload. One buffer of Linux's virtio console driver.
pub const MAX_PAYLOAD: usize = 32 * 1024;
/// The longest frame.
pub const MAX_FRAME: usize = HEADER_BYTES + MAX_PAYLOAD + TRAILER_BYTES;
/// The longest message (SYN, ACK, CONTROL) after its pieces are put together: an AppSpec with a large environment.
pub const MAX_MESSAGE: usize = 1024 * 1024;
/// Stands before every SYN and ACK, so that they are found in a stream of unknown phase. Never decodes as a header: the
/// first two bytes differ.
pub const MARKER: [u8; HEADER_BYTES] = *b"\xF3dormouse\x00sync\r\n";

const MAGIC: [u8; 2] = [0xD0, 0x5E];
const FLAG_MORE: u8 = 1;
/// Payloads from this size on are handed out without a copy and keep the read buffer (64 KiB) alive; smaller ones are
/// copied, so that a sender cannot make the receiver hold much more memory than the bytes it sent.
const SHARE_FROM: usize = 8 * 1024;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Means nothing.
    Pad = 0,
    /// Host: a new attachment begins. A message.
    Syn = 1,
    /// Guest: the answer. A message.
    Ack = 2,
    /// A request, a reply, an event. A message.
    Control = 3,
    /// Host: connect this new stream to the port (u16) in the payload, or to a door that is none: 0, and one byte that says which.
    Open = 4,
    /// Guest: connected.
    Opened = 5,
    /// Guest: nobody listens; the stream is gone.
    Refused = 6,
    /// Bytes of a stream.
    Data = 7,
    /// The receiver of a stream has room for so many more bytes (u32).
    Credit = 8,
    /// No more data in this direction. Guest: with how many bytes of the other one (u64) the app had been given by then.
    Fin = 9,
    /// The stream is gone. Guest: with how many bytes (u64) the app was given in all, where that is known: it never sees the rest.
    Reset = 10,
    /// Guest: what the app wrote to stdout and stderr.
    Output = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Pad, Syn, Ack, Control, Open, Opened, Refused, Data, Credit, Fin, Reset, Output].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The stream it belongs to; 0 for none.
    pub stream: u32,
    /// The message goes on in the next frame of this kind.
    pub more: bool,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
}

/// Appends one frame. `payload` is at most [`MAX_PAYLOAD`] long; the callers cut it.
pub fn put_frame(out: &mut BytesMut, kind: Kind, stream: u32, payload: &[u8]) {
    put(out, kind, stream, 0, payload);
}

/// Doors that are no port, behind the 0 that is none.
const SHELL: u8 = 1;
const EGRESS: u8 = 2;

/// Appends the OPEN of a door.
pub(crate) fn put_open(out: &mut BytesMut, stream: u32, door: Door) {
    match door {
        Door::Port(port) => put_frame(out, Kind::Open, stream, &port.get().to_le_bytes()),
        Door::Shell => put_frame(out, Kind::Open, stream, &[0, 0, SHELL]),
        Door::Egress => put_frame(out, Kind::Open, stream, &[0, 0, EGRESS]),
    }
}

/// The door of an OPEN; `None` if its payload is none.
pub(crate) fn read_door(payload: &[u8]) -> Option<Door> {
    match *payload {
        [low, high] => Port::new(u16::from_le_bytes([low, high])).map(Door::Port),
        [0, 0, SHELL] => Some(Door::Shell),
        [0, 0, EGRESS] => Some(Door::Egress),
        _ => None,
    }
}

/// Appends a message as as many frames as it needs, or answers `false` if it is longer than [`MAX_MESSAGE`].
#[must_use]
pub fn put_message(out: &mut BytesMut, kind: Kind, message: &[u8]) -> bool {
    if message.len() > MAX_MESSAGE {
        return false;
    }
    let mut rest = message;
    while rest.len() > MAX_PAYLOAD {
        let (piece, tail) = rest.split_at(MAX_PAYLOAD);
        put(out, kind, 0, FLAG_MORE, piece);
        rest = tail;
    }
    put(out, kind, 0, 0, rest);
    true
}

/// Enough zeros to complete whatever frame the other side is in the middle of.
pub fn padding() -> &'static [u8] {
    static ZEROS: [u8; MAX_FRAME] = [0; MAX_FRAME];
    &ZEROS
}

fn put(out: &mut BytesMut, kind: Kind, stream: u32, flags: u8, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let mut header = [0u8; HEADER_BYTES - 4];
    header[..2].copy_from_slice(&MAGIC);
    header[2] = kind as u8;
    header[3] = flags;
    header[4..8].copy_from_slice(&stream.to_le_bytes());
    header[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let crc = crc32fast::hash(&header);
    out.reserve(HEADER_BYTES + payload.len() + TRAILER_BYTES);
    out.put_slice(&header);
    out.put_u32_le(crc);
    out.put_slice(payload);
    out.put_u32_le(crc);
}

struct Header {
    kind: Kind,
    flags: u8,
    stream: u32,
    len: usize,
    crc: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (stream, len, crc) = (word(4), word(8) as usize, word(12));
        if bytes[..2] != MAGIC || len > MAX_PAYLOAD || bytes[3] & !FLAG_MORE != 0 || crc32fast::hash(&bytes[..12]) != crc {
            return None;
        }
        Some(Self { kind: Kind::from_byte(bytes[2])?, flags: bytes[3], stream, len, crc })
    }
}

/// What a [`Decoder`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame.
    Frame(Frame),
    /// A [`MARKER`]: a SYN or ACK follows, and whatever was half received before it is void.
    Marker,
    /// Bytes that are no frame, or a frame that was cut off. Everything up to the next [`MARKER`] will be skipped.
    /// Reported once per loss.
    Lost,
}

/// Cuts received bytes into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    seeking: bool,
}

impl Decoder {
    /// At a frame boundary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Somewhere in a stream of bytes: skips to the next [`MARKER`].
    pub fn seeking() -> Self {
        Self { buffer: BytesMut::new(), seeking: true }
    }

    /// Where received bytes are appended. Holds at most one incomplete frame after [`Decoder::next`] answered `None`.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next thing in the received bytes; `None` until more arrive.
    #[expect(clippy::should_implement_trait, reason = "None is not the end, it means that more bytes are needed")]
    pub fn next(&mut self) -> Option<Decoded> {
        if self.seeking {
            return self.seek();
        }
        let header: &[u8; HEADER_BYTES] = self.buffer.first_chunk()?;
        if *header == MARKER {
            self.buffer.advance(HEADER_BYTES);
            return Some(Decoded::Marker);
        }
        let Some(Header { kind, flags, stream, len, crc }) = Header::parse(header) else {
            return Some(self.lose());
        };
        let end = HEADER_BYTES + len;
        let trailer = self.buffer.get(end..end + TRAILER_BYTES)?;
        if trailer != crc.to_le_bytes() {
            self.buffer.advance(end);
            return Some(self.lose());
        }
        let payload = if len >= SHARE_FROM {
            self.buffer.advance(HEADER_BYTES);
            let payload = self.buffer.split_to(len).freeze();
            self.buffer.advance(TRAILER_BYTES);
            payload
        } else {
            let payload = Bytes::copy_from_slice(&self.buffer[HEADER_BYTES..end]);
            self.buffer.advance(end + TRAILER_BYTES);
            payload
        };
        Some(Decoded::Frame(Frame { kind, stream, more: flags & FLAG_MORE != 0, payload }))
    }

    fn lose(&mut self) -> Decoded {
        self.seeking = true;
        Decoded::Lost
    }

    fn seek(&mut self) -> Option<Decoded> {
        match self.buffer.windows(MARKER.len()).position(|window| window == MARKER) {
            Some(at) => {
                self.buffer.advance(at + MARKER.len());
                self.seeking = false;
                Some(Decoded::Marker)
            }
            None => {
                // The last 15 bytes may be the beginning of a marker.
                let keep = self.buffer.len().min(MARKER.len() - 1);
                self.buffer.advance(self.buffer.len() - keep);
                None
            }
        }
    }
}

/// Puts the pieces of a message together.
#[derive(Debug, Default)]
pub struct Assembler {
    pieces: BytesMut,
}

impl Assembler {
    /// Takes the next piece: `Ok(Some)` when the message is whole, `Err` when it is longer than [`MAX_MESSAGE`].
    pub fn push(&mut self, frame: Frame) -> Result<Option<Bytes>, TooLong> {
        if self.pieces.len() + frame.payload.len() > MAX_MESSAGE {
            self.pieces.clear();
            return Err(TooLong);
        }
        if self.pieces.is_empty() && !frame.more {
            return Ok(Some(frame.payload));
        }
        self.pieces.extend_from_slice(&frame.payload);
        Ok((!frame.more).then(|| self.pieces.split().freeze()))
    }

    /// Forgets the pieces so far.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }
}

/// A message is longer than [`MAX_MESSAGE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message is longer than {MAX_MESSAGE} bytes")]
pub struct TooLong;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn kind() -> impl Strategy<Value = Kind> {
        (0u8..12).prop_map(|byte| Kind::from_byte(byte).expect("the range names every kind"))
    }

    fn decode_in_pieces(bytes: &[u8], cuts: &[usize], mut decoder: Decoder) -> Vec<Decoded> {
        let mut found = Vec::new();
        let mut rest = bytes;
        let mut cuts = cuts.iter().copied().cycle();
        while !rest.is_empty() {
            let n = cuts.next().unwrap_or(1).clamp(1, rest.len());
            decoder.buffer().extend_from_slice(&rest[..n]);
            rest = &rest[n..];
            found.extend(std::iter::from_fn(|| decoder.next()));
        }
        found
    }

    proptest! {
        #[test]
        fn frames_survive_any_chunking(
            frames in vec((kind(), any::<u32>(), vec(any::<u8>(), 0..3000)), 1..20),
            cuts in vec(1usize..5000, 1..20),
        ) {
            let mut wire = BytesMut::new();
            for (kind, stream, payload) in &frames {
                put_frame(&mut wire, *kind, *stream, payload);
            }
            let expected: Vec<_> = frames
                .into_iter()
                .map(|(kind, stream, payload)| Decoded::Frame(Frame { kind, stream, more: false, payload: payload.into() }))
                .collect();
            prop_assert_eq!(decode_in_pieces(&wire, &cuts, Decoder::new()), expected);
        }

        #[test]
        fn random_bytes_never_panic_and_are_never_kept(bytes in vec(any::<u8>(), 0..100_000), cuts in vec(1usize..9000, 1..9)) {
            let mut decoder = Decoder::new();
            let mut rest = &bytes[..];
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let n = cuts.next().unwrap_or(1).min(rest.len());
                decoder.buffer().extend_from_slice(&rest[..n]);
                rest = &rest[n..];
                while decoder.next().is_some() {}
                prop_assert!(decoder.buffer().len() < MAX_FRAME);
            }
        }

        #[test]
        fn damaged_frames_never_panic(payload in vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut wire = BytesMut::new();
            put_frame(&mut wire, Kind::Data, 7, &payload);
            let whole = wire.clone();
            let at = at.index(wire.len());
            wire[at] ^= flip;
            let in_payload = (HEADER_BYTES..HEADER_BYTES + payload.len()).contains(&at);
            let mut decoder = Decoder::new();
            decoder.buffer().extend_from_slice(&wire);
            let first = decoder.next();
            prop_assert_eq!(matches!(first, Some(Decoded::Frame(_))), in_payload, "{:?} of {:?}", first, whole);
        }

        /// Wherever a sender stopped, padding and a marker bring the receiver back, and no padding becomes data.
        #[test]
        fn padding_ends_any_frame_under_way(len in 0usize..=MAX_PAYLOAD, cut in any::<prop::sample::Index>(), cuts in vec(1usize..40_000, 1..5)) {
            let mut wire = BytesMut::new();
            put_frame(&mut wire, Kind::Data, 1, &vec![0; len]);
            let cut = cut.index(wire.len() + 1);
            wire.truncate(cut);
            wire.extend_from_slice(padding());
            wire.extend_from_slice(&MARKER);
            let put = put_message(&mut wire, Kind::Syn, b"{}");
            prop_assert!(put);
            let mut found = decode_in_pieces(&wire, &cuts, Decoder::new());
            if matches!(found[0], Decoded::Frame(_)) {
                // Only zeros of its checksum were missing, if anything.
                prop_assert!(cut >= HEADER_BYTES + len);
                found.remove(0);
            }
            let syn = Frame { kind: Kind::Syn, stream: 0, more: false, payload: Bytes::from_static(b"{}") };
            prop_assert_eq!(found, vec![Decoded::Lost, Decoded::Marker, Decoded::Frame(syn)]);
        }

        #[test]
        fn long_messages_are_cut_and_put_together(message in vec(any::<u8>(), 0..4 * MAX_PAYLOAD)) {
            let mut wire = BytesMut::new();
            prop_assert!(put_message(&mut wire, Kind::Control, &message));
            let mut decoder = Decoder::new();
            decoder.buffer().extend_from_slice(&wire);
            let mut assembler = Assembler::default();
            let mut whole = None;
            while let Some(Decoded::Frame(frame)) = decoder.next() {
                prop_assert!(whole.is_none());
                whole = assembler.push(frame).expect("the message is short enough");
            }
            prop_assert_eq!(whole.as_deref(), Some(&message[..]));
        }
    }

    #[test]
    fn a_message_has_a_ceiling_on_both_sides() {
        assert!(!put_message(&mut BytesMut::new(), Kind::Control, &vec![0; MAX_MESSAGE + 1]));
        let mut assembler = Assembler::default();
        let piece = Frame { kind: Kind::Control, stream: 0, more: true, payload: vec![0; MAX_PAYLOAD].into() };
        let refused = (0..1000).find(|_| assembler.push(piece.clone()).is_err());
        assert_eq!(refused, Some(MAX_MESSAGE / MAX_PAYLOAD));
    }

    #[test]
    fn a_lost_end_finds_the_marker_in_the_middle_of_noise() {
        let mut decoder = Decoder::seeking();
        decoder.buffer().extend_from_slice(b"noise \xF3dormouse almost ");
        assert_eq!(decoder.next(), None);
        decoder.buffer().extend_from_slice(&MARKER[..9]);
        assert_eq!(decoder.next(), None);
        decoder.buffer().extend_from_slice(&MARKER[9..]);
        assert_eq!(decoder.next(), Some(Decoded::Marker));
    }
}
