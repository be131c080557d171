//! Rules for a request beyond what its parser enforces: one reading of where its body ends, a bounded header, no tunnels.

use ::config::EdgeLimits;
use http::{HeaderMap, HeaderName, Method, Uri, Version, header, uri::Scheme};

use crate::reply::Reason;

const OVER_SIZE: HeaderName = HeaderName::from_static("x-h2-over-size");
const MALFORMED: HeaderName = HeaderName::from_static("x-h2-malformed");

/// How large a request's header may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeaderLimits {
    /// Bytes of names and values.
    pub bytes: usize,
    /// Fields.
    pub fields: usize,
}

impl HeaderLimits {
    /// Those of the configuration.
    pub fn of(limits: &EdgeLimits) -> Self {
        Self { bytes: limits.max_header_bytes, fields: limits.max_header_fields }
    }
}

/// Checks a parsed request. `raw` is its header as it came (HTTP/1.1; empty for HTTP/2), because the parser has already
/// taken Content-Length away where Transfer-Encoding was also there.
pub(crate) fn check(method: &Method, uri: &Uri, version: Version, headers: &HeaderMap, raw: &[u8], limits: HeaderLimits) -> Result<(), Reason> {
    // CONNECT would be a tunnel past every rule here, and TRACE would show the app's view of reserved fields.
    if method == Method::CONNECT || method == Method::TRACE {
        return Err(Reason::MethodNotAllowed);
    }
    // Marks of a header that h2 has not kept, and of one that pingora finds malformed (third_party/PATCHES.md). A client that sends
    // them asks for these answers.
    for (mark, reason) in [(&OVER_SIZE, Reason::HeaderTooLarge), (&MALFORMED, Reason::MalformedRequest)] {
        if headers.contains_key(mark) {
            return Err(reason);
        }
    }
    if headers.len() > limits.fields || crate::headers::bytes(headers) > limits.bytes || raw.len() > limits.bytes {
        return Err(Reason::HeaderTooLarge);
    }
    // HTTP/1.1 has no place for another scheme, and would make it ours.
    if version == Version::HTTP_2 && uri.scheme().is_some_and(|scheme| *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS) {
        return Err(Reason::MalformedRequest);
    }
    // pingora takes a bare LF for the end of a line, and what stands before us or behind us may not (RFC 9112 §2.2 leaves
    // it open). What comes in two readings is refused.
    if memchr::memchr_iter(b'\n', raw).any(|end| end == 0 || raw[end - 1] != b'\r') {
        return Err(Reason::MalformedRequest);
    }
    // RFC 9112 §3.2; pingora lets it through.
    if version == Version::HTTP_11 && !headers.contains_key(header::HOST) {
        return Err(Reason::MalformedRequest);
    }
    if names_end_to_end_field(headers) {
        return Err(Reason::MalformedRequest);
    }
    let codings: Vec<_> = headers.get_all(header::TRANSFER_ENCODING).iter().collect();
    if !codings.is_empty() {
        // RFC 9112 §6.1 lets a server treat both as an attack. pingora drops Content-Length and goes on (its issue #945).
        if version == Version::HTTP_2 || raw_has_field(raw, "content-length") {
            return Err(Reason::AmbiguousFraming);
        }
        // pingora forwards `gzip, chunked` as `chunked`: the app would read compressed bytes as plain ones.
        if codings.len() > 1 || !codings[0].as_bytes().eq_ignore_ascii_case(b"chunked") {
            return Err(Reason::UnsupportedTransferCoding);
        }
    }
    // Two equal values, or a list of them, are let through doubled by pingora; an app may read them as it likes.
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        let digits = length.as_bytes();
        if lengths.next().is_some() || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(Reason::AmbiguousFraming);
        }
    }
    Ok(())
}

/// Whether Connection names a field that says who is asked or where the body ends: a proxy that takes the fields it names
/// away would change what the request is (RFC 9110 §7.6.1 forbids naming such fields).
fn names_end_to_end_field(headers: &HeaderMap) -> bool {
    let named = headers.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let fixed = [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING];
    named.map(<[u8]>::trim_ascii).any(|name| fixed.iter().any(|fixed| name.eq_ignore_ascii_case(fixed.as_str().as_bytes())))
}

/// The length of the body, where the request states it.
pub(crate) fn stated_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether the client waits for `100 Continue` before it sends its body.
pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn raw_has_field(raw: &[u8], name: &str) -> bool {
    raw.split(|byte| *byte == b'\n').skip(1).any(|line| {
        line.iter().position(|byte| *byte == b':').is_some_and(|colon| line[..colon].trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const LIMITS: HeaderLimits = HeaderLimits { bytes: 1000, fields: 6 };

    fn verdict(method: Method, fields: &[(&str, &str)], raw: &str) -> Result<(), Reason> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("h"));
        for (name, value) in fields {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        check(&method, &Uri::from_static("/"), Version::HTTP_11, &headers, raw.as_bytes(), LIMITS)
    }

    #[test]
    fn one_reading_of_the_body() {
        use Reason::{AmbiguousFraming as Ambiguous, UnsupportedTransferCoding as Coding};
        let post = |fields, raw| verdict(Method::POST, fields, raw);
        assert_eq!(post(&[("content-length", "3")], ""), Ok(()));
        assert_eq!(post(&[("transfer-encoding", "Chunked")], "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n"), Ok(()));
        assert_eq!(post(&[("transfer-encoding", "chunked")], "POST / HTTP/1.1\r\ncontent-LENGTH : 3\r\n\r\n"), Err(Ambiguous));
        assert_eq!(post(&[("transfer-encoding", "gzip, chunked")], ""), Err(Coding));
        assert_eq!(post(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], ""), Err(Coding));
        assert_eq!(post(&[("content-length", "3"), ("content-length", "3")], ""), Err(Ambiguous));
        for bad in ["3, 3", "+3", "-1", "0x3", ""] {
            assert_eq!(verdict(Method::POST, &[("content-length", bad)], ""), Err(Ambiguous), "{bad}");
        }
    }

    #[test]
    fn a_line_ends_with_both_of_its_characters() {
        let get = |raw| verdict(Method::GET, &[], raw);
        assert_eq!(get("GET / HTTP/1.1\r\nhost: h\r\n\r\n"), Ok(()));
        for bare in ["\nGET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\nhost: h\r\n\r\n", "GET / HTTP/1.1\r\nhost: h\n\r\n", "GET / HTTP/1.1\r\nhost: h\r\n\n"] {
            assert_eq!(get(bare), Err(Reason::MalformedRequest), "{bare:?}");
        }
    }

    #[test]
    fn connection_names_nothing_that_frames_or_routes() {
        for (value, expected) in [
            ("close", Ok(())),
            ("keep-alive, x-custom", Ok(())),
            ("close, Content-Length", Err(Reason::MalformedRequest)),
            ("transfer-encoding", Err(Reason::MalformedRequest)),
            ("x,HOST ,y", Err(Reason::MalformedRequest)),
        ] {
            assert_eq!(verdict(Method::GET, &[("connection", value)], ""), expected, "{value}");
        }
        assert_eq!(verdict(Method::GET, &[("connection", "close"), ("connection", "host")], ""), Err(Reason::MalformedRequest));
    }

    #[test]
    fn http_1_1_needs_a_host() {
        let verdict = |version| check(&Method::GET, &Uri::from_static("/"), version, &HeaderMap::new(), b"", LIMITS);
        assert_eq!(verdict(Version::HTTP_11), Err(Reason::MalformedRequest));
        assert_eq!(verdict(Version::HTTP_10), Ok(()));
        assert_eq!(verdict(Version::HTTP_2), Ok(()));
    }

    #[test]
    fn tunnels_and_large_headers() {
        assert_eq!(verdict(Method::CONNECT, &[], ""), Err(Reason::MethodNotAllowed));
        assert_eq!(verdict(Method::TRACE, &[], ""), Err(Reason::MethodNotAllowed));
        assert_eq!(verdict(Method::GET, &[("a", "1"); 6], ""), Err(Reason::HeaderTooLarge));
        assert_eq!(verdict(Method::GET, &[("a", &"x".repeat(1000))], ""), Err(Reason::HeaderTooLarge));
        assert_eq!(verdict(Method::GET, &[("x-h2-over-size", "")], ""), Err(Reason::HeaderTooLarge));
        assert_eq!(verdict(Method::GET, &[("a", "1"); 5], ""), Ok(()));
    }
}
