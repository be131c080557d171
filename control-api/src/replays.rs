//! Signatures that have been used: one that somebody listened to does nothing a second time.
//!
//! A signature holds for minutes (see `sigv4`), so a request that was overheard could be sent again in that time. What only
//! looks may be repeated: who overheard the request has seen the answer, too. For what acts or mints, a signature is taken
//! again only within [`RETRY`] of its first use: SDKs sign each attempt anew, and two signatures of one request are equal
//! only if they were made within the same second, so an honest repeat comes soon or not at all.
//!
//! Not covered: presigned URLs, which are made to be used until they expire, and what was seen before the process began.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;

use crate::{
    reply::{ApiError, ErrorKind},
    sigv4,
};

/// A second for equal signatures, and the rest for a request that waited on its way: in a full pool, on a slow line.
const RETRY: Duration = Duration::from_secs(10);
/// A signature dated in the future by the whole skew holds twice as long as one of now.
const KEPT: Duration = Duration::from_secs(2 * sigv4::MAX_SKEW.as_secs() + 1);
/// 100 bytes each. At the default rates a key fills it with five times what it is let do; more is refused, not forgotten.
const MOST: usize = 500_000;

/// What was used, and when first.
#[derive(Default)]
pub(crate) struct Replays {
    /// Held for a look-up.
    used: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    at: HashMap<[u8; 32], SystemTime>,
    /// In the order of use.
    order: VecDeque<(SystemTime, [u8; 32])>,
}

impl Replays {
    /// Notes the use of a good signature, or refuses it.
    pub(crate) fn note(&self, signature: [u8; 32], now: SystemTime) -> Result<(), ApiError> {
        let mut used = self.used.lock();
        while let Some((at, oldest)) = used.order.front().copied()
            && now.duration_since(at).is_ok_and(|age| age > KEPT)
        {
            used.order.pop_front();
            used.at.remove(&oldest);
        }
        match used.at.get(&signature) {
            Some(first) if now.duration_since(*first).is_ok_and(|age| age > RETRY) => Err(ApiError::new(
                ErrorKind::InvalidSignature,
                "This signature was used before. A request that acts may be repeated with the same signature for 10 seconds; sign it again.",
            )),
            Some(_) => Ok(()),
            None if used.order.len() >= MOST => {
                Err(ApiError::new(ErrorKind::Throttling, "Rate exceeded: this node remembers as many signatures as it may."))
            }
            None => {
                used.at.insert(signature, now);
                used.order.push_back((now, signature));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_taken_again_soon_and_not_later() {
        let replays = Replays::default();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let note = |signature: u8, after: u64| replays.note([signature; 32], now + Duration::from_secs(after)).map_err(|error| error.kind);
        for (signature, after, expected) in [
            (1, 0, Ok(())),
            (1, 0, Ok(())),
            (1, 10, Ok(())),
            (1, 11, Err(ErrorKind::InvalidSignature)),
            (2, 11, Ok(())),
            // Being refused does not begin the time anew, nor does it end.
            (1, 12, Err(ErrorKind::InvalidSignature)),
            (1, 600, Err(ErrorKind::InvalidSignature)),
            (2, 21, Ok(())),
        ] {
            assert_eq!(note(signature, after), expected, "{signature} after {after}");
        }
        // By then no signature of that time verifies any more, so it need not be remembered.
        assert_eq!(note(3, 700), Ok(()));
        assert_eq!(replays.used.lock().order.len(), 1);
    }
}
