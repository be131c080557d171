//! Watches the bytes of an HTTP/1.1 request header go by and says when there are too many of them or too many lines.
//!
//! pingora reads a header of up to 1 MiB and 256 fields before anyone can refuse it (pingora.md §2). This stops it early,
//! with the status that says why.

use crate::framing::HeaderLimits;

/// The state of one header.
#[derive(Debug)]
pub(crate) struct HeaderMeter {
    limits: HeaderLimits,
    bytes: usize,
    lines: usize,
    line_is_empty: bool,
    ended: bool,
}

impl HeaderMeter {
    /// For a header of which nothing has come.
    pub fn new(limits: HeaderLimits) -> Self {
        Self { limits, bytes: 0, lines: 0, line_is_empty: true, ended: false }
    }

    /// Whether anything has come.
    pub fn has_begun(&self) -> bool {
        self.bytes > 0
    }

    /// Takes the next bytes; `false` once the header is too large. What follows the header does not count.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        for byte in bytes {
            if self.ended {
                break;
            }
            self.bytes += 1;
            match byte {
                // Blank lines before a request line are allowed (RFC 9112 §2.2) and end nothing.
                b'\n' if self.line_is_empty => self.ended = self.lines > 0,
                b'\n' => {
                    self.lines += 1;
                    self.line_is_empty = true;
                }
                b'\r' => {}
                _ => self.line_is_empty = false,
            }
        }
        // The request line is one line more than there are fields.
        self.bytes <= self.limits.bytes && self.lines <= self.limits.fields + 1
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
            assert!(meter.feed(format!("GET / HTTP/1.1{end}a: 1{end}{end}").as_bytes()));
            assert!(meter.has_begun());
            assert!(meter.feed(&b"x\n".repeat(1000)));
        }
    }

    #[test]
    fn too_many_fields_or_bytes_however_they_are_cut() {
        let fields = "GET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\nd: 4\r\n";
        let bytes = format!("GET /{} HTTP/1.1\r\n", "x".repeat(100));
        for (text, step) in [(fields, 1), (fields, 7), (fields, 1000), (&bytes, 1), (&bytes, 1000)] {
            let mut meter = meter();
            assert!(!text.as_bytes().chunks(step).all(|chunk| meter.feed(chunk)), "{text:?} in steps of {step}");
        }
    }

    #[test]
    fn as_many_as_allowed_pass() {
        assert!(meter().feed(b"\r\nGET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\n\r\n"));
    }
}
