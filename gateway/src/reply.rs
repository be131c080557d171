//! THE table: why a request was not served → what its client reads.
//!
//! Owns: status, body, `x-dormouse-reason` word and gRPC status of every answer the gateway makes itself. No other file
//! picks one. Where AWS's answer is known (aws-behaviour §1.6) status and body are AWS's, byte for byte; the word is ours
//! and tells an operator what AWS keeps to itself.
//!
//! gRPC. AWS answers a gRPC call that it refuses with the same plain HTTP 403 or 502 as any other request, and clients
//! turn that into PERMISSION_DENIED or UNAVAILABLE (aws-behaviour §1.4). We keep the status and those two codes, and say
//! them in the form that every gRPC client understands: an answer that is nothing but a header ("Trailers-Only" in gRPC's
//! HTTP/2 document) with `grpc-status` and, as `grpc-message`, the word.
//!
//! No row may tell a caller who has no valid token for a microVM whether that microVM exists: an unknown host, a
//! malformed host and a token of another microVM share one row.

use http::StatusCode;

/// Why the gateway answered by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    /// No token at all.
    TokenMissing,
    /// Something in the token's place that is not a token.
    TokenUnreadable,
    /// Two tokens in one request.
    TokenAmbiguous,
    /// Platform subprotocols without the mandatory base `lambda-microvms`.
    SubprotocolBaseMissing,
    /// The form of a token, and not one of ours.
    TokenRefused,
    /// A token of ours whose time is over.
    TokenExpired,
    /// A token of ours from the future.
    TokenNotYetValid,
    /// More tokens a second from one address than are opened.
    TooManyTokens,
    /// A good token, for another microVM than the one the host names (or the host names none).
    TokenForeign,
    /// A shell token in a request that is no WebSocket.
    ShellToken,
    /// The port's text is not a port, or there are two.
    PortMalformed,
    /// The token does not open the port.
    PortDenied,
    /// Suspended, and its policy does not wake it on traffic.
    Suspended,
    /// Ended.
    Terminated,
    /// The wake was tried and failed; the snapshot is kept.
    WakeFailed,
    /// The wake took longer than a request may be held.
    WakeTimeout,
    /// Too many wait for this microVM.
    TooManyWaiting,
    /// The requests that wait for wakes, or those for this microVM, occupy as much memory as they may.
    TooManyHeldBytes,
    /// As many shells of this microVM are open as may be.
    TooManyShells,
    /// Nobody listens on the port in the guest.
    PortNotListening,
    /// The guest agent opens no shell.
    NoShell,
    /// The guest did not open the port in time.
    GuestTimeout,
    /// The guest took the request and did not begin to answer in time.
    GuestSilent,
    /// The guest took nothing more of the request's body.
    GuestTakesNothing,
    /// The guest broke off, or what it sent is not HTTP.
    GuestBroke,
    /// The guest's answer has too large a header.
    GuestHeaderTooLarge,
    /// The guest switched protocols without being asked, or wrongly.
    UnexpectedUpgrade,
    /// The guest picked a subprotocol that the client did not offer.
    SubprotocolNotOffered,
    /// Not HTTP as we take it.
    MalformedRequest,
    /// The length of the body can be read in two ways.
    AmbiguousFraming,
    /// A transfer coding other than chunked.
    UnsupportedTransferCoding,
    /// CONNECT or TRACE.
    MethodNotAllowed,
    /// The request's header has too many bytes or fields.
    HeaderTooLarge,
    /// The request's body is larger than configured.
    BodyTooLarge,
    /// The client did not end its header in time.
    HeaderTimeout,
    /// The client did not go on with its body.
    BodyTimeout,
    /// There is no place for the connection, or none more for its address.
    TooManyConnections,
    /// More streams at a time on a connection than there may be. Said by a reset alone, as are the next two.
    TooManyStreams,
    /// Frames that break the rules of HTTP/2, or a header that does.
    H2Violation,
    /// Frames that are within the rules one by one and an attack together: resets, settings, empty frames.
    H2Flood,
    /// Our own fault.
    Internal,
}

/// What a client reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    /// The HTTP status.
    pub status: StatusCode,
    /// The whole body, `text/plain`.
    pub body: &'static str,
    /// The value of `x-dormouse-reason` and of the metric's label.
    pub word: &'static str,
    /// The gRPC status code.
    pub grpc_status: u8,
    /// Whether the client is told to try again in a second.
    pub retry_after: bool,
}

const PERMISSION_DENIED: u8 = 7;
const UNAVAILABLE: u8 = 14;
const INVALID_ARGUMENT: u8 = 3;
const INTERNAL: u8 = 13;
const RESOURCE_EXHAUSTED: u8 = 8;

const MISSING: &str = "Request missing authentication";
const FAILED: &str = "Token authentication failed";
const PORT: &str = "Access to port denied";

impl Reason {
    /// Every reason, in the order of the table; a reason's place in it is its place in the metrics.
    pub const ALL: [Self; 41] = [
        Self::TokenMissing,
        Self::TokenUnreadable,
        Self::TokenAmbiguous,
        Self::SubprotocolBaseMissing,
        Self::TokenRefused,
        Self::TokenExpired,
        Self::TokenNotYetValid,
        Self::TooManyTokens,
        Self::TokenForeign,
        Self::ShellToken,
        Self::PortMalformed,
        Self::PortDenied,
        Self::Suspended,
        Self::Terminated,
        Self::WakeFailed,
        Self::WakeTimeout,
        Self::TooManyWaiting,
        Self::TooManyHeldBytes,
        Self::TooManyShells,
        Self::PortNotListening,
        Self::NoShell,
        Self::GuestTimeout,
        Self::GuestSilent,
        Self::GuestTakesNothing,
        Self::GuestBroke,
        Self::GuestHeaderTooLarge,
        Self::UnexpectedUpgrade,
        Self::SubprotocolNotOffered,
        Self::MalformedRequest,
        Self::AmbiguousFraming,
        Self::UnsupportedTransferCoding,
        Self::MethodNotAllowed,
        Self::HeaderTooLarge,
        Self::BodyTooLarge,
        Self::HeaderTimeout,
        Self::BodyTimeout,
        Self::TooManyConnections,
        Self::TooManyStreams,
        Self::H2Violation,
        Self::H2Flood,
        Self::Internal,
    ];

    /// The row of the table.
    pub fn reply(self) -> Reply {
        let (status, body, word, grpc_status) = match self {
            Self::TokenMissing => (403, MISSING, "token-missing", PERMISSION_DENIED),
            Self::TokenUnreadable => (403, MISSING, "token-unreadable", PERMISSION_DENIED),
            Self::TokenAmbiguous => (403, MISSING, "token-ambiguous", PERMISSION_DENIED),
            Self::SubprotocolBaseMissing => (403, MISSING, "subprotocol-base-missing", PERMISSION_DENIED),
            Self::TokenRefused => (403, FAILED, "token-refused", PERMISSION_DENIED),
            Self::TokenExpired => (403, FAILED, "token-expired", PERMISSION_DENIED),
            Self::TokenNotYetValid => (403, FAILED, "token-not-yet-valid", PERMISSION_DENIED),
            Self::TooManyTokens => (429, "Too many tokens", "too-many-tokens", RESOURCE_EXHAUSTED),
            Self::TokenForeign => (403, FAILED, "token-not-for-this-host", PERMISSION_DENIED),
            Self::ShellToken => (502, "", "shell-token", UNAVAILABLE),
            Self::PortMalformed => (400, "Malformed port", "port-malformed", INVALID_ARGUMENT),
            Self::PortDenied => (403, PORT, "port-denied", PERMISSION_DENIED),
            Self::Suspended => (502, "", "suspended", UNAVAILABLE),
            Self::Terminated => (502, "", "terminated", UNAVAILABLE),
            Self::WakeFailed => (502, "", "wake-failed", UNAVAILABLE),
            Self::WakeTimeout => (502, "", "wake-timeout", UNAVAILABLE),
            Self::TooManyWaiting => (503, "", "too-many-waiting", UNAVAILABLE),
            Self::TooManyHeldBytes => (503, "", "too-many-held-bytes", UNAVAILABLE),
            Self::TooManyShells => (503, "", "too-many-shells", UNAVAILABLE),
            Self::PortNotListening => (502, "", "port-not-listening", UNAVAILABLE),
            Self::NoShell => (502, "", "no-shell", UNAVAILABLE),
            Self::GuestTimeout => (502, "", "guest-timeout", UNAVAILABLE),
            Self::GuestSilent => (504, "", "guest-silent", UNAVAILABLE),
            Self::GuestTakesNothing => (504, "", "guest-takes-nothing", UNAVAILABLE),
            Self::GuestBroke => (502, "", "guest-answer-broken", UNAVAILABLE),
            Self::GuestHeaderTooLarge => (502, "", "guest-header-too-large", UNAVAILABLE),
            Self::UnexpectedUpgrade => (502, "", "unexpected-upgrade", UNAVAILABLE),
            Self::SubprotocolNotOffered => (502, "", "subprotocol-not-offered", UNAVAILABLE),
            Self::MalformedRequest => (400, "Malformed request", "malformed-request", INVALID_ARGUMENT),
            Self::AmbiguousFraming => (400, "Malformed request", "ambiguous-framing", INVALID_ARGUMENT),
            Self::UnsupportedTransferCoding => (501, "Unsupported transfer coding", "unsupported-transfer-coding", INVALID_ARGUMENT),
            Self::MethodNotAllowed => (405, "Method not allowed", "method-not-allowed", INVALID_ARGUMENT),
            Self::HeaderTooLarge => (431, "Request header too large", "header-too-large", INVALID_ARGUMENT),
            Self::BodyTooLarge => (413, "Request body too large", "body-too-large", INVALID_ARGUMENT),
            Self::HeaderTimeout => (408, "Request header timed out", "header-timeout", INVALID_ARGUMENT),
            Self::BodyTimeout => (408, "Request body timed out", "body-timeout", INVALID_ARGUMENT),
            Self::TooManyConnections => (503, "", "too-many-connections", UNAVAILABLE),
            Self::TooManyStreams => (503, "", "too-many-streams", UNAVAILABLE),
            Self::H2Violation => (400, "", "h2-violation", INVALID_ARGUMENT),
            Self::H2Flood => (429, "", "h2-flood", RESOURCE_EXHAUSTED),
            Self::Internal => (500, "Internal failure", "internal", INTERNAL),
        };
        Reply {
            status: StatusCode::from_u16(status).expect("every status of the table is a valid one"),
            body,
            word,
            grpc_status,
            retry_after: matches!(self, Self::TooManyWaiting | Self::TooManyShells | Self::TooManyHeldBytes | Self::TooManyTokens | Self::TooManyConnections),
        }
    }

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

impl Reply {
    /// The body for this asker.
    pub fn body(&self, asker: Asker) -> &'static str {
        match asker {
            Asker::Plain => self.body,
            Asker::Grpc => "",
        }
    }

    /// The header fields of the answer besides `content-length`, `date` and `connection`.
    pub fn fields<'a>(&'a self, request_id: &'a str, asker: Asker) -> impl Iterator<Item = (&'static str, std::borrow::Cow<'a, str>)> {
        let grpc = (asker == Asker::Grpc).then(|| {
            [("grpc-status", self.grpc_status.to_string().into()), ("grpc-message", self.word.into())]
        });
        let content_type = match asker {
            Asker::Plain => "text/plain",
            Asker::Grpc => "application/grpc",
        };
        [
            ("content-type", content_type.into()),
            ("cache-control", "private, no-store".into()),
            ("x-amzn-requestid", request_id.into()),
            ("x-dormouse-reason", self.word.into()),
        ]
        .into_iter()
        .chain(self.retry_after.then(|| ("retry-after", "1".into())))
        .chain(grpc.into_iter().flatten())
    }

    /// The whole answer as HTTP/1.1 that ends its connection, for a request that was never parsed.
    pub fn wire(&self, request_id: &str) -> Vec<u8> {
        let mut wire = format!("HTTP/1.1 {} {}\r\n", self.status.as_u16(), self.status.canonical_reason().unwrap_or("Error"));
        for (name, value) in self.fields(request_id, Asker::Plain) {
            wire.push_str(&format!("{name}: {value}\r\n"));
        }
        wire.push_str(&format!("content-length: {}\r\nconnection: close\r\n\r\n{}", self.body.len(), self.body));
        wire.into_bytes()
    }
}

/// What kind of client reads the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Any HTTP client.
    Plain,
    /// One whose request has a gRPC content type.
    Grpc,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_reason_has_its_own_place_and_word() {
        let words: HashSet<_> = Reason::ALL.iter().map(|reason| reason.reply().word).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), place, "{reason:?}");
        }
    }

    #[test]
    fn aws_bodies_are_verbatim() {
        for (reason, status, body) in [
            (Reason::TokenMissing, 403, "Request missing authentication"),
            (Reason::TokenUnreadable, 403, "Request missing authentication"),
            (Reason::TokenForeign, 403, "Token authentication failed"),
            (Reason::TokenExpired, 403, "Token authentication failed"),
            (Reason::PortDenied, 403, "Access to port denied"),
            (Reason::ShellToken, 502, ""),
            (Reason::Suspended, 502, ""),
            (Reason::Terminated, 502, ""),
            (Reason::PortNotListening, 502, ""),
            (Reason::WakeFailed, 502, ""),
        ] {
            let reply = reason.reply();
            assert_eq!((reply.status.as_u16(), reply.body), (status, body), "{reason:?}");
        }
    }

    #[test]
    fn a_grpc_client_reads_its_own_status_beside_the_http_one() {
        for (reason, code) in [
            (Reason::TokenMissing, "7"),
            (Reason::TokenForeign, "7"),
            (Reason::PortDenied, "7"),
            (Reason::PortMalformed, "3"),
            (Reason::Suspended, "14"),
            (Reason::TooManyWaiting, "14"),
        ] {
            let reply = reason.reply();
            let fields: Vec<_> = reply.fields("id", Asker::Grpc).collect();
            assert!(fields.contains(&("grpc-status", code.into())), "{reason:?}");
            assert!(fields.contains(&("content-type", "application/grpc".into())), "{reason:?}");
            assert_eq!(reply.body(Asker::Grpc), "");
            assert!(reply.fields("id", Asker::Plain).all(|(name, _)| !name.starts_with("grpc")));
        }
    }

    #[test]
    fn the_wire_form_is_one_whole_answer() {
        let wire = String::from_utf8(Reason::HeaderTooLarge.reply().wire("some-id")).unwrap();
        assert!(wire.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"));
        assert!(wire.contains("\r\nx-amzn-requestid: some-id\r\n"));
        assert!(wire.ends_with("\r\ncontent-length: 24\r\nconnection: close\r\n\r\nRequest header too large"));
    }
}
