//! Which header fields cross the edge: reserved ones out, cookies joined, sizes counted.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use uuid::Uuid;

/// The token's field.
pub(crate) static AUTH_FIELD: HeaderName = HeaderName::from_static("x-aws-proxy-auth");
/// The port's field.
pub(crate) static PORT_FIELD: HeaderName = HeaderName::from_static("x-aws-proxy-port");
/// Asks for HTTP/2 with prior knowledge towards the app.
pub(crate) static FORCE_H2_FIELD: HeaderName = HeaderName::from_static("x-aws-proxy-force-h2");
/// Why the gateway answered by itself.
pub(crate) static REASON_FIELD: HeaderName = HeaderName::from_static(REASON_NAME);
const REASON_NAME: &str = "x-dormouse-reason";
/// Names a request, towards the app and towards the client.
pub(crate) const REQUEST_ID_FIELD: &str = "x-amzn-requestid";

/// An id for a request that has just come.
pub(crate) fn new_request_id() -> String {
    Uuid::new_v4().hyphenated().encode_lower(&mut Uuid::encode_buffer()).to_owned()
}

/// The value of [`REQUEST_ID_FIELD`]. HTTP/2 keeps it in no table (RFC 7541 §6.2.3): it never comes again, and to look for each
/// among all those before it was most of the work of writing an answer's header.
pub(crate) fn request_id(id: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(id).expect("the text of a UUID is a header value");
    value.set_sensitive(true);
    value
}

/// Every field of the reserved name space, also unknown ones (aws-behaviour §1.2), and their aliases with underscores:
/// an app behind a CGI-like layer could not tell those apart from the real ones (cases.md 20).
pub(crate) fn reserved(headers: &HeaderMap) -> Vec<HeaderName> {
    headers.keys().filter(|name| is_reserved(name.as_str())).cloned().collect()
}

fn is_reserved(name: &str) -> bool {
    const PREFIX: &[u8] = b"x-aws-proxy-";
    name.len() >= PREFIX.len() && name.bytes().zip(PREFIX).all(|(byte, wanted)| byte == *wanted || (byte == b'_' && *wanted == b'-'))
}

/// Connection options that one request may have.
const MAX_OPTIONS: usize = 9;
/// Fields that say something of one connection only, besides those that Connection names (RFC 9110 §7.6.1).
const HOP_BY_HOP: [HeaderName; 10] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];
/// Fields that Connection may not take out: what they say is for the app.
const PROTECTED: [&[u8]; 4] = [b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"];

/// Connection names a field that it may not name, what cannot be a field, or too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadConnection;

/// The fields of a request that concern its own connection and not the app's.
pub(crate) fn of_this_hop(headers: &HeaderMap) -> Result<Vec<HeaderName>, BadConnection> {
    let options = headers.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let mut names: Vec<_> = headers.keys().filter(|name| HOP_BY_HOP.contains(name)).cloned().collect();
    for (count, option) in options.map(<[u8]>::trim_ascii).filter(|option| !option.is_empty()).enumerate() {
        if count >= MAX_OPTIONS || PROTECTED.iter().any(|name| option.eq_ignore_ascii_case(name)) {
            return Err(BadConnection);
        }
        // A name is a token (RFC 9110 §5.6.2), or it would not be told apart from a protected one in quotation marks.
        if !option.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)) {
            return Err(BadConnection);
        }
        names.push(HeaderName::from_bytes(option).map_err(|_| BadConnection)?);
    }
    Ok(names)
}

/// One Cookie field in place of several, as RFC 9113 §8.2.3 asks of whoever takes a request from HTTP/2 to HTTP/1.1;
/// pingora 0.9.1 does not (its issue #892). `None` where there is nothing to join.
pub(crate) fn joined_cookie(headers: &HeaderMap) -> Option<HeaderValue> {
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    (crumbs.len() > 1).then(|| HeaderValue::from_bytes(&crumbs.join(&b"; "[..])).expect("header values joined by \"; \" are a header value"))
}

/// Whether it says something of a connection of HTTP/1.1 only, and may not be in a message of HTTP/2 (RFC 9113 §8.2.2).
pub(crate) fn is_of_http_1(name: &[u8]) -> bool {
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"].iter().any(|field| name.eq_ignore_ascii_case(field.as_bytes()))
}

/// Whether it is a field of an answer in whose place the edge says its own, or says nothing.
pub(crate) fn is_said_by_the_edge(name: &[u8]) -> bool {
    ["date", "connection", REQUEST_ID_FIELD, REASON_NAME].iter().any(|said| name.eq_ignore_ascii_case(said.as_bytes()))
}

/// The length that is said several times over, once. pingora has found them to be the same number, and passes them on as they are; a
/// client may take them for an error, and one of HTTP/2 does (RFC 9110 §8.6).
pub(crate) fn length_said_again(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let (first, _again) = (lengths.next()?, lengths.next()?);
    HeaderValue::from_bytes(first.trim_ascii()).ok()
}

/// Bytes of the names and values.
pub(crate) fn bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
}

/// Whether the request is a gRPC call.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        const GRPC: &[u8] = b"application/grpc";
        value.get(..GRPC.len()).is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
            && value.get(GRPC.len()).is_none_or(|next| matches!(next, b'+' | b';' | b' '))
    })
}

/// When an answer that has begun is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnswerKind {
    /// When its guest has sent all of it.
    Finite,
    /// Perhaps never: it is held open for what may come.
    Stream,
    /// It does not say.
    Unknown,
}

/// Media types whose answers are held open: server-sent events (HTML standard §9.2), gRPC, and what cameras and log tails use.
const STREAMS: [&str; 6] =
    ["text/event-stream", "application/grpc", "multipart/x-mixed-replace", "application/x-ndjson", "application/jsonl", "application/stream+json"];

/// What kind of answer this header begins.
pub(crate) fn answer_kind(status: StatusCode, headers: &HeaderMap) -> AnswerKind {
    let media_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    kind_of(status, media_type, headers.contains_key(header::CONTENT_LENGTH))
}

/// The same, by what it says in Content-Type and whether it says its length.
pub(crate) fn kind_of(status: StatusCode, media_type: &[u8], has_length: bool) -> AnswerKind {
    let is = |stream: &&str| media_type.get(..stream.len()).is_some_and(|start| start.eq_ignore_ascii_case(stream.as_bytes()));
    if status == StatusCode::SWITCHING_PROTOCOLS || STREAMS.iter().any(is) {
        AnswerKind::Stream
    } else if has_length || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        AnswerKind::Finite
    } else {
        AnswerKind::Unknown
    }
}

/// Whether HTTP/2 with prior knowledge towards the app was asked for.
pub(crate) fn forces_h2(headers: &HeaderMap) -> bool {
    headers.get(&FORCE_H2_FIELD).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_length_is_said_once() {
        let said = |lengths: &[&'static str]| lengths.iter().map(|length| (header::CONTENT_LENGTH, HeaderValue::from_static(length))).collect::<HeaderMap>();
        assert_eq!(length_said_again(&said(&["2"])), None);
        assert_eq!(length_said_again(&said(&[])), None);
        for lengths in [&["2, 2"][..], &["2", "2"], &[" 2,2 ", "2"]] {
            assert_eq!(length_said_again(&said(lengths)).unwrap(), "2", "{lengths:?}");
        }
    }

    #[test]
    fn an_answer_says_whether_it_ends() {
        for (status, fields, kind) in [
            (200, &[("content-length", "5"), ("content-type", "text/plain")][..], AnswerKind::Finite),
            (200, &[("transfer-encoding", "chunked")], AnswerKind::Unknown),
            (200, &[("content-type", "application/json")], AnswerKind::Unknown),
            (304, &[], AnswerKind::Finite),
            (101, &[], AnswerKind::Stream),
            (200, &[("content-type", "Text/Event-Stream; charset=utf-8"), ("content-length", "5")], AnswerKind::Stream),
            (200, &[("content-type", "application/grpc+proto")], AnswerKind::Stream),
        ] {
            assert_eq!(answer_kind(StatusCode::from_u16(status).unwrap(), &map(fields)), kind, "{status} {fields:?}");
        }
    }

    #[test]
    fn what_concerns_one_connection_stays_on_it() {
        let of = |fields: &[(&'static str, &'static str)]| of_this_hop(&map(fields)).map(|names| names.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&[("accept", "x"), ("keep-alive", "timeout=5"), ("te", "trailers")]), Ok(vec!["keep-alive".into(), "te".into()]));
        assert_eq!(of(&[("connection", "close, , X-Own ")]), Ok(vec!["connection".into(), "close".into(), "x-own".into()]));
        for bad in ["Host", "x-forwarded-for", ":authority", "\"X-Forwarded-For\"", "a b", "1,2,3,4,5,6,7,8,9,10"] {
            assert_eq!(of(&[("connection", bad)]), Err(BadConnection), "{bad}");
        }
        assert!(of(&[("connection", "1,2,3,4,5,6,7,8,9")]).is_ok());
    }

    #[test]
    fn the_reserved_name_space_and_its_aliases_go() {
        let headers = map(&[
            ("x-aws-proxy-auth", "t"),
            ("x-aws-proxy-unknown", "1"),
            ("x_aws_proxy_auth", "t"),
            ("x-aws-proxy", "stays"),
            ("x-aws-prox", "stays"),
            ("authorization", "stays"),
        ]);
        let mut gone: Vec<_> = reserved(&headers).iter().map(ToString::to_string).collect();
        gone.sort();
        assert_eq!(gone, ["x-aws-proxy-auth", "x-aws-proxy-unknown", "x_aws_proxy_auth"]);
    }

    #[test]
    fn cookie_crumbs_are_joined_in_order() {
        let mut headers = map(&[("cookie", "a=1")]);
        assert_eq!(joined_cookie(&headers), None);
        headers.append(header::COOKIE, HeaderValue::from_static("b=2"));
        headers.append(header::COOKIE, HeaderValue::from_static("c=3"));
        assert_eq!(joined_cookie(&headers).unwrap(), "a=1; b=2; c=3");
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for (value, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("Application/GRPC;x=y", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&map(&[("content-type", value)])), grpc, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
