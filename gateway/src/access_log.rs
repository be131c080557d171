//! One event per request on the target `access`. Never a token, a body, a path or a query: a client may have put its
//! token into its URL.

use std::{net::SocketAddr, time::Duration};

use model::{MicrovmId, Port};

use crate::{metrics::Protocol, reply::Reason};

/// What is said of one request.
pub(crate) struct Entry<'a> {
    /// The id that client and app read in `x-amzn-requestid`.
    pub request_id: &'a str,
    /// The client.
    pub client: Option<SocketAddr>,
    /// The method.
    pub method: &'a str,
    /// What the client speaks.
    pub protocol: Protocol,
    /// The status of the answer; `None` if the client left before one began.
    pub status: Option<u16>,
    /// Why the gateway answered by itself, if it did.
    pub reason: Option<Reason>,
    /// The microVM, once the token was found to be for it.
    pub microvm: Option<MicrovmId>,
    /// Its port.
    pub port: Option<Port>,
    /// From the whole header to now.
    pub duration: Duration,
    /// How long of that was a wait for a launch or wake.
    pub wake: Option<Duration>,
    /// Body bytes from the client.
    pub bytes_in: u64,
    /// Body bytes to the client.
    pub bytes_out: u64,
    /// Whether the connection to the guest was used before.
    pub reused: bool,
}

/// Says it.
pub(crate) fn request(entry: &Entry<'_>) {
    tracing::info!(
        target: "access",
        method = entry.method,
        request.id = entry.request_id,
        client.address = entry.client.map(tracing::field::display),
        protocol = entry.protocol.as_str(),
        status = entry.status,
        reason = entry.reason.map(|reason| reason.reply().word),
        microvm.id = entry.microvm.map(tracing::field::display),
        port = entry.port.map(Port::get),
        duration_ms = millis(entry.duration),
        wake_ms = entry.wake.map(millis),
        bytes_in = entry.bytes_in,
        bytes_out = entry.bytes_out,
        reused = entry.reused,
        "request"
    );
}

/// Says that something was refused which never became a request.
pub(crate) fn unparsed(request_id: &str, reason: Reason) {
    let reply = reason.reply();
    tracing::info!(target: "access", protocol = "h1", request.id = request_id, status = reply.status.as_u16(), reason = reply.word, "request");
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
