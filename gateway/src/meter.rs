//! Watches the bytes of an HTTP/1.1 request header go by and says when there are too many of them or too many lines, or when
//! the request line is none.
//!
//! pingora reads a header of up to 1 MiB and 256 fields before anyone can refuse it (pingora.md §2), and mends request lines:
//! `GET /a b HTTP/1.1` becomes `/a%20b`, and a NUL `%00`. This stops both early, with the status that says why.

use crate::{framing::HeaderLimits, reply::Reason};

/// The state of one header.
#[derive(Debug)]
pub(crate) struct HeaderMeter {
    limits: HeaderLimits,
    bytes: usize,
    lines: usize,
    line_is_empty: bool,
    /// Blanks in the request line.
    blanks: usize,
    malformed: bool,
    ended: bool,
    /// Bytes came after the end.
    followed: bool,
}

impl HeaderMeter {
    /// For a header of which nothing has come.
    pub fn new(limits: HeaderLimits) -> Self {
        Self { limits, bytes: 0, lines: 0, line_is_empty: true, blanks: 0, malformed: false, ended: false, followed: false }
    }

    /// For a header whose beginning pingora may have taken together with what was before it: the first line that is seen may
    /// be any, and is not judged.
    pub fn in_the_middle(limits: HeaderLimits) -> Self {
        Self { lines: 1, ..Self::new(limits) }
    }

    /// Whether more came than this header.
    pub fn was_followed(&self) -> bool {
        self.followed
    }

    /// Whether anything has come.
    pub fn has_begun(&self) -> bool {
        self.bytes > 0
    }

    /// Whether all of it has come.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes the next bytes; why the header is refused, once it is. What follows the header does not count.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while !self.ended && !bytes.is_empty() {
            let end = memchr::memchr(b'\n', bytes);
            let (piece, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            self.bytes += piece.len();
            self.take(piece);
            bytes = rest;
            if end.is_some() {
                self.bytes += 1;
                self.end_line();
                bytes = &rest[1..];
            }
        }
        self.followed |= !bytes.is_empty();
        // The request line is one line more than there are fields.
        if self.bytes > self.limits.bytes || self.lines > self.limits.fields + 1 {
            return Err(Reason::HeaderTooLarge);
        }
        if self.malformed { Err(Reason::MalformedRequest) } else { Ok(()) }
    }

    /// Takes bytes of one line.
    fn take(&mut self, piece: &[u8]) {
        self.line_is_empty &= piece.iter().all(|byte| *byte == b'\r');
        if self.lines == 0 {
            self.blanks += piece.iter().filter(|byte| **byte == b' ').count();
            self.malformed |= piece.iter().any(|byte| (*byte < b' ' && *byte != b'\r') || *byte == 0x7f);
        }
    }

    fn end_line(&mut self) {
        // Blank lines before a request line are allowed (RFC 9112 §2.2) and end nothing.
        if self.line_is_empty {
            self.ended = self.lines > 0;
            return;
        }
        // A method, a target, a version (RFC 9112 §3).
        self.malformed |= self.lines == 0 && self.blanks != 2;
        self.lines += 1;
        self.line_is_empty = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> HeaderMeter {
        HeaderMeter::new(HeaderLimits { bytes: 100, fields: 3 })
    }

    #[test]
    fn the_body_does_not_count() {
        for end in ["\r\n", "\n"] {
            let mut meter = meter();
            assert!(!meter.has_begun());
            assert_eq!(meter.feed(format!("GET / HTTP/1.1{end}a: 1{end}{end}").as_bytes()), Ok(()));
            assert!(meter.has_begun());
            assert_eq!(meter.feed(&b"x y z\n\0".repeat(1000)), Ok(()));
        }
    }

    #[test]
    fn what_begins_in_the_middle_is_no_request_line() {
        let mut meter = HeaderMeter::in_the_middle(HeaderLimits { bytes: 100, fields: 3 });
        assert_eq!(meter.feed(b"agent: a b c d\r\nb: 2\r\n\r\n"), Ok(()));
        assert!(meter.has_ended() && !meter.was_followed());
        assert_eq!(meter.feed(b"G"), Ok(()));
        assert!(meter.was_followed());
    }

    #[test]
    fn too_many_fields_or_bytes_however_they_are_cut() {
        let fields = "GET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\nd: 4\r\n";
        let bytes = format!("GET /{} HTTP/1.1\r\n", "x".repeat(100));
        for (text, step) in [(fields, 1), (fields, 7), (fields, 1000), (&bytes, 1), (&bytes, 1000)] {
            let mut meter = meter();
            let refused = text.as_bytes().chunks(step).find_map(|chunk| meter.feed(chunk).err());
            assert_eq!(refused, Some(Reason::HeaderTooLarge), "{text:?} in steps of {step}");
        }
    }

    #[test]
    fn as_many_as_allowed_pass() {
        assert_eq!(meter().feed(b"\r\nGET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\n\r\n"), Ok(()));
    }

    #[test]
    fn a_request_line_has_three_words_and_no_control_characters() {
        for line in ["GET /a b HTTP/1.1", "GET  / HTTP/1.1", " GET / HTTP/1.1", "GET / HTTP/1.1 ", "GET /", "x", "GET /\0 HTTP/1.1", "GET\t/ HTTP/1.1", "GET /\x7f HTTP/1.1"] {
            for step in [1, 1000] {
                let mut meter = meter();
                let text = format!("{line}\r\na: b c d\te\r\n\r\n");
                let refused = text.as_bytes().chunks(step).find_map(|chunk| meter.feed(chunk).err());
                assert_eq!(refused, Some(Reason::MalformedRequest), "{line:?} in steps of {step}");
            }
        }
        assert_eq!(meter().feed("GET /ä%00?q=\"<> HTTP/1.1\r\na: b c d\te\r\n\r\n".as_bytes()), Ok(()));
    }
}
