//! How much memory the requests occupy that wait for a wake, and the bound on it.
//!
//! Owns the count, in all and for each microVM. What is counted is the most that a request can make the gateway keep while
//! nobody reads it; a request whose microVM is awake is never counted, and so never refused here.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use ::config::EdgeLimits;
use http::header;
use model::MicrovmId;
use pingora_core::protocols::http::ServerSession as HttpSession;
use pingora_proxy::Session;

use crate::{
    framing, headers,
    tally::{Share, Tally},
};

/// What a request costs besides its header and body: its task and its place in the wake's queue.
const BASE: u64 = 8 * 1024;
/// What is read of a connection of HTTP/1.1 ahead of its body; the rest stays in the socket.
const READ_AHEAD: u64 = 64 * 1024;

/// The most that this request can occupy while it waits.
pub(crate) fn weight(session: &Session, limits: &EdgeLimits) -> u64 {
    let request = session.req_header();
    let stated = framing::stated_length(&request.headers);
    let (ahead, has_body) = match session.as_downstream() {
        HttpSession::H2(stream) => (u64::from(limits.stream_window), !stream.is_body_empty()),
        _ => (READ_AHEAD, stated.is_some() || request.headers.contains_key(header::TRANSFER_ENCODING)),
    };
    let body = if has_body { stated.unwrap_or(u64::MAX).min(ahead) } else { 0 };
    BASE + headers::bytes(&request.headers) as u64 + body
}

/// The count.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    total: AtomicU64,
    by_microvm: Arc<Tally<MicrovmId>>,
}

/// An entry; taken out by its drop.
#[derive(Debug)]
pub(crate) struct Held {
    ledger: Arc<Ledger>,
    bytes: u64,
    _own: Share<MicrovmId>,
}

impl Ledger {
    /// Enters a request, if there is room for it.
    pub fn enter(self: &Arc<Self>, microvm: MicrovmId, bytes: u64, limits: &EdgeLimits) -> Option<Held> {
        let own = self.by_microvm.take(microvm, bytes, limits.max_held_bytes_per_microvm)?;
        let with_it = |total| Some(total + bytes).filter(|sum| *sum <= limits.max_held_bytes);
        self.total.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with_it).ok()?;
        Some(Held { ledger: self.clone(), bytes, _own: own })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ledger.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_hold_and_a_refusal_leaves_no_trace() {
        let limits = EdgeLimits { max_held_bytes: 100, max_held_bytes_per_microvm: 60, ..::config::Config::defaults().edge.limits };
        let ledger = Arc::new(Ledger::default());
        let [a, b, c] = [(); 3].map(|()| MicrovmId::random());
        let first = ledger.enter(a, 50, &limits);
        assert!(first.is_some());
        assert!(ledger.enter(a, 11, &limits).is_none(), "over its own bound");
        let second = ledger.enter(b, 50, &limits);
        assert!(second.is_some(), "a neighbour has room");
        assert!(ledger.enter(c, 1, &limits).is_none(), "over the bound of all");
        drop(first);
        assert!(ledger.enter(c, 1, &limits).is_some());
        drop(second);
        assert_eq!(ledger.total.load(Ordering::Relaxed), 0);
        assert!(ledger.by_microvm.is_empty());
    }
}
