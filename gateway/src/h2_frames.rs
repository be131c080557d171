//! The frames of one direction of an HTTP/2 connection, as far as their ends.
//!
//! Owns: where a frame begins and how long it is (RFC 9113 §4.1), however its bytes are cut. Keeps no payload.

/// Bytes that a client's direction begins with, before its first frame (RFC 9113 §3.4).
pub(crate) const PREFACE_LENGTH: usize = 24;
/// The type of the frame that ends one stream (RFC 9113 §6.4).
pub(crate) const RST_STREAM: u8 = 0x3;
/// Bytes of a frame's header.
pub(crate) const FRAME_HEADER: usize = 9;

/// Bytes of the payload that a frame's header announces.
pub(crate) fn payload_length(header: &[u8; FRAME_HEADER]) -> usize {
    let [high, middle, low, ..] = *header;
    usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low)
}

/// Follows frames.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    header: [u8; FRAME_HEADER],
    /// Bytes of the header that have passed.
    passed: usize,
    /// Bytes of the payload, or of what comes before the first frame, that are still to come; only meaningful while `passed` is zero.
    left: usize,
}

impl Frames {
    /// Of a direction that begins with this many bytes that are no frame.
    pub fn behind(preface: usize) -> Self {
        Self { left: preface, ..Self::default() }
    }

    /// Whether the next byte begins a frame.
    pub fn at_boundary(&self) -> bool {
        self.passed == 0 && self.left == 0
    }

    /// These bytes pass; `payload` is told of each piece of a payload, with the frame's type, and whether the payload ends with it.
    pub fn pass(&mut self, mut bytes: &[u8], mut payload: impl FnMut(u8, &[u8], bool)) {
        while !bytes.is_empty() {
            let taken = if self.left > 0 {
                let taken = self.left.min(bytes.len());
                self.left -= taken;
                payload(self.header[3], &bytes[..taken], self.left == 0);
                taken
            } else {
                let taken = (FRAME_HEADER - self.passed).min(bytes.len());
                self.header[self.passed..self.passed + taken].copy_from_slice(&bytes[..taken]);
                self.passed += taken;
                if self.passed == FRAME_HEADER {
                    (self.passed, self.left) = (0, payload_length(&self.header));
                }
                taken
            };
            bytes = &bytes[taken..];
        }
    }
}
