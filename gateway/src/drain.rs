//! When a connection may be closed without cutting anything off.
//!
//! Owns: the signal that the gateway drains, and for each connection the count of its requests and of those among them
//! that are streams of which nothing comes. Never closes anything: `listener` says when a connection is to leave, and
//! `connection` ends it once [`Traffic::may_end`] says so.

use std::{
    any::Any,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use pingora_core::protocols::{Digest, raw_connect::ProxyDigest};
use pingora_http::ResponseHeader;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// An answer of unknown length is being computed as long as more of it comes; after this long without a byte it is a
/// stream that is held open, which is no activity (design §3) and does not hold a drain.
pub(crate) const STREAM_SILENCE: Duration = Duration::from_secs(10);
/// What is under way between a client and us when a connection is to leave still gets this long: a handshake, a first
/// request, the next request of a client that has not heard of the drain, an acknowledgement of GOAWAY, a WebSocket's
/// answer to Close. A round trip to the other side of the earth takes 0.3 s; a lost packet is sent again after 0.2 to 1 s.
pub(crate) const MOMENT: Duration = Duration::from_secs(1);

/// Whether the gateway drains. Cheap to clone and to ask.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drain {
    begun: Arc<AtomicBool>,
    told: CancellationToken,
}

impl Drain {
    /// From now on it does.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Release);
        self.told.cancel();
    }

    /// Whether it does.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Ends when it does.
    pub async fn begins(&self) {
        self.told.cancelled().await;
    }

    /// The same, to be kept. Its state is its own: thousands of them do not meet in one lock.
    pub fn begins_owned(&self) -> WaitForCancellationFutureOwned {
        self.told.child_token().cancelled_owned()
    }
}

/// What one connection carries.
pub(crate) struct Traffic {
    leaving: AtomicBool,
    cut: AtomicBool,
    carried: Mutex<Carried>,
}

struct Carried {
    requests: usize,
    // Since the last request ended.
    idle_since: Instant,
    streams: Vec<Arc<Stream>>,
}

/// An answer that is a stream, or may be one.
struct Stream {
    begun: Instant,
    // Of the last byte: milliseconds after `begun`.
    spoke: AtomicU64,
}

impl Stream {
    fn is_silent(&self) -> bool {
        let spoke = Duration::from_millis(self.spoke.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(spoke) >= STREAM_SILENCE
    }
}

impl Traffic {
    /// Of a connection that has just been made.
    pub fn new() -> Arc<Self> {
        let carried = Carried { requests: 0, idle_since: Instant::now(), streams: Vec::new() };
        Arc::new(Self { leaving: AtomicBool::new(false), cut: AtomicBool::new(false), carried: Mutex::new(carried) })
    }

    /// That of a pingora session's connection; `None` if it is not one of ours.
    pub fn of(digest: Option<&Digest>) -> Option<&Arc<Self>> {
        digest?.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref()
    }

    /// In the form in which pingora hands it on from a connection to each of its requests.
    pub fn digest(self: &Arc<Self>) -> Option<Arc<ProxyDigest>> {
        let nothing = Box::new(ResponseHeader::build(200, Some(0)).ok()?);
        let this: Box<dyn Any + Send + Sync> = Box::new(self.clone());
        Some(Arc::new(ProxyDigest::new(nothing, Some(this))))
    }

    /// One more request, while the guard lives.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.carried().requests += 1;
        InFlight { traffic: self.clone(), stream: None }
    }

    /// Since when it has carried nothing.
    pub fn idle_since(&self) -> Option<Instant> {
        let carried = self.carried();
        (carried.requests == 0).then_some(carried.idle_since)
    }

    /// It is to end as soon as it may.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether it is to end and nothing but silent streams would be cut off. An answer that has just been given may still
    /// be on its way through HTTP/2's buffers.
    pub fn may_end(&self) -> bool {
        self.leaving.load(Ordering::Acquire) && {
            let carried = self.carried();
            carried.idle_since.elapsed() >= MOMENT && carried.requests == carried.streams.iter().filter(|stream| stream.is_silent()).count()
        }
    }

    /// It ends now. Whether that cuts anything off, the first time it is asked.
    pub fn is_cut(&self) -> bool {
        self.idle_since().is_none() && !self.cut.swap(true, Ordering::AcqRel)
    }

    fn carried(&self) -> MutexGuard<'_, Carried> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request.
pub(crate) struct InFlight {
    traffic: Arc<Traffic>,
    stream: Option<Arc<Stream>>,
}

impl InFlight {
    /// Its answer has begun, and does not say when it ends.
    pub fn streams(&mut self) {
        if self.stream.is_none() {
            let stream = Arc::new(Stream { begun: Instant::now(), spoke: AtomicU64::new(0) });
            self.traffic.carried().streams.push(stream.clone());
            self.stream = Some(stream);
        }
    }

    /// More of its answer came.
    pub fn speaks(&self) {
        if let Some(stream) = &self.stream {
            stream.spoke.store(stream.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut carried = self.traffic.carried();
        carried.requests -= 1;
        carried.idle_since = Instant::now();
        if let Some(stream) = &self.stream {
            carried.streams.retain(|other| !Arc::ptr_eq(other, stream));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_ends_when_it_is_told_to_and_carries_nothing_that_speaks() {
        let traffic = Traffic::new();
        assert!(traffic.idle_since().is_some() && !traffic.may_end());
        let long_ago = Instant::now() - STREAM_SILENCE;
        let (plain, mut stream) = (traffic.begin(), traffic.begin());
        traffic.leave();
        assert!(traffic.idle_since().is_none() && !traffic.may_end());
        drop(plain);
        stream.streams();
        traffic.carried().idle_since = long_ago;
        assert!(!traffic.may_end(), "the stream has just spoken");
        let kept = stream.stream.as_mut().unwrap();
        // As if it had begun, and said its last, long ago.
        let old = Arc::new(Stream { begun: long_ago, spoke: AtomicU64::new(0) });
        traffic.carried().streams = vec![old.clone()];
        *kept = old;
        assert!(traffic.may_end());
        assert!(traffic.is_cut() && !traffic.is_cut());
        stream.speaks();
        assert!(!traffic.may_end());
        drop(stream);
        assert!(!traffic.may_end(), "its answer may still be on its way");
        traffic.carried().idle_since = long_ago;
        assert!(traffic.may_end() && traffic.idle_since().is_some());
        assert!(traffic.carried().streams.is_empty());
    }

    #[test]
    fn a_request_finds_its_connection() {
        let traffic = Traffic::new();
        let digest = Digest { proxy_digest: traffic.digest(), ..Digest::default() };
        assert!(Arc::ptr_eq(Traffic::of(Some(&digest)).unwrap(), &traffic));
        assert!(Traffic::of(Some(&Digest::default())).is_none());
    }
}
