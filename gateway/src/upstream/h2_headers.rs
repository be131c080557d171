//! Bounds the headers that a guest of HTTP/2 may send, before they are unpacked.
//!
//! HPACK packs well: one byte may stand for a field of four kilobytes, and pingora lets the h2 crate unpack up to 16 MiB of
//! fields per stream, with no setting of ours in between (pingora.md §2). On a hundred streams that is gigabytes for a few
//! kilobytes sent. This counts fields and packed bytes of each header as they pass, without unpacking anything.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::{ByteStream, GuestStream};

use crate::h2_frames::{FRAME_HEADER, payload_length};

const HEADERS: u8 = 0x1;
const PUSH_PROMISE: u8 = 0x5;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// What one header may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Bytes, packed.
    pub bytes: usize,
    /// Fields.
    pub fields: usize,
}

/// A guest stream whose headers are bounded; what exceeds them ends the stream with an error.
pub(crate) struct Bounded {
    guest: GuestStream,
    scanner: Scanner,
}

impl Bounded {
    /// Bounds what comes from a guest.
    pub fn new(guest: GuestStream, bounds: Bounds) -> Self {
        Self { guest, scanner: Scanner::new(bounds) }
    }
}

/// Whether an error is the end that exceeding the bounds brings.
pub(crate) fn is_excess(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Excess>())
}

#[derive(Debug, thiserror::Error)]
#[error("the guest's header has too many bytes or fields")]
struct Excess;

/// One connection carries many requests: which of its bytes are whose is not known.
impl ByteStream for Bounded {}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(self.guest.as_mut().poll_read(cx, buf))?;
        if self.scanner.pass(&buf.filled()[before..]) { Poll::Ready(Ok(())) } else { Poll::Ready(Err(io::Error::other(Excess))) }
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.guest.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.guest.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.guest.as_mut().poll_shutdown(cx)
    }
}

/// Follows the frames of one direction.
struct Scanner {
    bounds: Bounds,
    frame: [u8; FRAME_HEADER],
    /// Bytes of the frame's header that have passed.
    passed: usize,
    /// Bytes of the payload still to come, and what they are.
    left: usize,
    part: Part,
    /// What padding ends the payload with.
    padding: usize,
    block: Block,
}

/// What the next bytes of a payload are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Nothing of a header.
    Other,
    /// The length of the padding; after it this many bytes that are no field.
    PadLength(usize),
    /// This many bytes that are no field.
    Prefix(usize),
    /// Packed fields.
    Fields,
}

/// One header, which may come in several frames.
#[derive(Default)]
struct Block {
    bytes: usize,
    fields: usize,
    packed: Packed,
}

/// Where in the packed form (RFC 7541 §6) the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Packed {
    /// At the begin of a representation.
    #[default]
    Begin,
    /// In the rest of a number, after which come so many strings.
    Number { strings: u8 },
    /// At a string's length; so many strings follow it.
    Length { strings: u8 },
    /// In the rest of a string's length.
    LongLength { strings: u8, length: usize, shift: u32 },
    /// In a string.
    Text { strings: u8, left: usize },
}

impl Scanner {
    fn new(bounds: Bounds) -> Self {
        Self { bounds, frame: [0; FRAME_HEADER], passed: 0, left: 0, part: Part::Other, padding: 0, block: Block::default() }
    }

    /// These bytes pass; whether they may.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.passed < FRAME_HEADER {
                self.frame[self.passed] = bytes[0];
                self.passed += 1;
                bytes = &bytes[1..];
                if self.passed == FRAME_HEADER {
                    self.begin_payload();
                }
            } else {
                let taken = match self.part {
                    Part::Other => self.left.min(bytes.len()),
                    Part::PadLength(prefix) => {
                        self.padding = usize::from(bytes[0]);
                        self.part = if prefix > 0 { Part::Prefix(prefix) } else { Part::Fields };
                        1
                    }
                    Part::Prefix(prefix) => {
                        let taken = prefix.min(self.left).min(bytes.len());
                        self.part = if prefix > taken { Part::Prefix(prefix - taken) } else { Part::Fields };
                        taken
                    }
                    Part::Fields => {
                        let fields = self.left.saturating_sub(self.padding).min(bytes.len());
                        if !self.block.pass(&bytes[..fields], self.bounds) {
                            return false;
                        }
                        // Only padding is left, which is nothing.
                        if fields == 0 { self.left.min(bytes.len()) } else { fields }
                    }
                };
                self.left -= taken;
                bytes = &bytes[taken..];
            }
            if self.passed == FRAME_HEADER && self.left == 0 {
                self.passed = 0;
                if matches!(self.frame[3], HEADERS | PUSH_PROMISE | CONTINUATION) && self.frame[4] & END_HEADERS != 0 {
                    self.block = Block::default();
                }
            }
        }
        true
    }

    fn begin_payload(&mut self) {
        let [_, _, _, kind, flags, ..] = self.frame;
        self.left = payload_length(&self.frame);
        self.padding = 0;
        let prefix = match kind {
            HEADERS if flags & PRIORITY != 0 => 5,
            PUSH_PROMISE => 4,
            HEADERS | CONTINUATION => 0,
            _ => {
                self.part = Part::Other;
                return;
            }
        };
        self.part = match (kind != CONTINUATION && flags & PADDED != 0, prefix) {
            (true, prefix) => Part::PadLength(prefix),
            (false, 0) => Part::Fields,
            (false, prefix) => Part::Prefix(prefix),
        };
    }
}

impl Block {
    fn pass(&mut self, mut bytes: &[u8], bounds: Bounds) -> bool {
        self.bytes = self.bytes.saturating_add(bytes.len());
        while let [byte, rest @ ..] = bytes {
            bytes = rest;
            self.packed = match self.packed {
                Packed::Begin => {
                    // The number's prefix, and how many strings follow it: the value, and the name where the number is 0.
                    let (mask, literal) = match byte {
                        0x80.. => (0x7f, false),
                        0x40.. => (0x3f, true),
                        // A new size of the table is no field, but as good as one for what it costs.
                        0x20.. => (0x1f, false),
                        _ => (0x0f, true),
                    };
                    self.fields += 1;
                    let strings = if literal { 1 + u8::from(byte & mask == 0) } else { 0 };
                    if byte & mask == mask { Packed::Number { strings } } else { Packed::next(strings) }
                }
                Packed::Number { strings } if byte & 0x80 != 0 => Packed::Number { strings },
                Packed::Number { strings } => Packed::next(strings),
                Packed::Length { strings } => match usize::from(byte & 0x7f) {
                    0x7f => Packed::LongLength { strings, length: 0x7f, shift: 0 },
                    length => Packed::text(strings, length),
                },
                Packed::LongLength { strings, length, shift } => {
                    // Longer than any bound, and than what h2 takes, after four bytes.
                    let length = length.saturating_add(usize::from(byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX));
                    if byte & 0x80 != 0 { Packed::LongLength { strings, length, shift: (shift + 7).min(63) } } else { Packed::text(strings, length) }
                }
                Packed::Text { strings, left } => {
                    let taken = (left - 1).min(bytes.len());
                    bytes = &bytes[taken..];
                    Packed::text(strings, left - 1 - taken)
                }
            };
        }
        self.bytes <= bounds.bytes && self.fields <= bounds.fields
    }
}

impl Packed {
    fn next(strings: u8) -> Self {
        if strings == 0 { Self::Begin } else { Self::Length { strings: strings - 1 } }
    }

    fn text(strings: u8, left: usize) -> Self {
        if left == 0 { Self::next(strings) } else { Self::Text { strings, left } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { bytes: 1000, fields: 20 };

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// However the bytes are cut.
    fn passes(bytes: &[u8]) -> bool {
        let verdicts = [1, 2, 7, 1000, bytes.len()].map(|cut| {
            let mut scanner = Scanner::new(BOUNDS);
            bytes.chunks(cut).all(|piece| scanner.pass(piece))
        });
        assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]), "{verdicts:?}");
        verdicts[0]
    }

    /// `:status 200`, then literal fields, with every kind of number and string.
    fn fields(count: usize) -> Vec<u8> {
        let literal = [&[0x00, 1, b'a', 2][..], b"bc"].concat();
        let named = [&[0x0f, 0x90, 0x01, 0x7f, 0x05][..], &[b'v'; 132]].concat();
        [&[0x88][..], &literal.repeat(count - 2), &named].concat()
    }

    #[test]
    fn as_many_fields_as_allowed_pass_in_any_frames() {
        let block = fields(20);
        let whole = frame(HEADERS, END_HEADERS, &block);
        let split = [frame(HEADERS, 0, &block[..5]), frame(CONTINUATION, 0, &block[5..90]), frame(CONTINUATION, END_HEADERS, &block[90..])].concat();
        let padded = frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &[&[100, 0, 0, 0, 0, 9][..], &block, &[0x88; 100]].concat());
        for header in [whole, split, padded] {
            // One after another: each header counts from zero. Data counts nothing.
            let all = [header.clone(), frame(0, 0, &[0x88; 5000]), frame(4, 0, &[]), header].concat();
            assert!(passes(&all));
        }
    }

    #[test]
    fn one_field_more_does_not_pass_in_any_frames() {
        let block = fields(21);
        assert!(!passes(&frame(HEADERS, END_HEADERS, &block)));
        assert!(!passes(&[frame(HEADERS, 0, &block[..5]), frame(CONTINUATION, END_HEADERS, &block[5..])].concat()));
        assert!(!passes(&frame(HEADERS, 0, &[0x88; 21])), "fields of one byte each");
        assert!(!passes(&frame(PUSH_PROMISE, 0, &[&[0, 0, 0, 2][..], &[0x88; 21]].concat())));
    }

    #[test]
    fn more_bytes_than_allowed_do_not_pass() {
        let long = [&[0x00, 1, b'a', 0x7f, 0xe9, 0x07][..], &[b'v'; 1000]].concat();
        assert!(!passes(&frame(HEADERS, 0, &long)));
        let endless = [frame(HEADERS, 0, &long[..900]), frame(CONTINUATION, 0, &long[900..])].concat();
        assert!(!passes(&endless));
        assert!(!passes(&frame(HEADERS, 0, &[0xff; 1001])), "a number without an end");
    }
}
