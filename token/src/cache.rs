//! Tokens that were opened a moment ago: the next request with the same one costs no cipher (0.2 µs where josekit takes 4.8,
//! on the development machine; `cargo bench -p token`).
//!
//! Owns: which texts were found authentic, and what they say. Never says that a token is good: who finds one here still
//! checks its time and its key's. It belongs to one reading of the ring and goes with it, so that no rotation and no reload
//! leaves an entry behind. Only what the cipher has found authentic gets in, so a stranger can neither fill it nor drive
//! anybody's token out of it.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwapOption;
use subtle::ConstantTimeEq as _;

use crate::Claims;

/// Entries. With [`MAX_CHARS`] the bound of its memory: 8 MiB, and 4 MiB for tokens of the usual length. One entry a place: of
/// two tokens that fall on the same one, the newer is kept, and the other is opened anew.
const PLACES: usize = 4096;
/// Longer tokens (more than about a hundred port ranges) are opened each time.
const MAX_CHARS: usize = 2048;
/// The end of a token, which holds its tag, picks the place.
const HASHED_CHARS: usize = 32;

pub(crate) struct Cache {
    /// Keyed, by a key of this process that nobody knows.
    hasher: RandomState,
    places: Box<[ArcSwapOption<Entry>]>,
}

/// A token that was authentic.
pub(crate) struct Entry {
    token: Box<str>,
    pub(crate) claims: Claims,
    /// Until when its key opens anything.
    pub(crate) key_opens_until: Option<SystemTime>,
}

impl Cache {
    pub(crate) fn new() -> Self {
        Self { hasher: RandomState::new(), places: (0..PLACES).map(|_| ArcSwapOption::empty()).collect() }
    }

    /// What `judge` says of the entry of exactly this text, if there is one.
    pub(crate) fn find<T>(&self, token: &str, judge: impl FnOnce(&Entry) -> T) -> Option<T> {
        let found = self.place(token)?.load();
        let entry = found.as_ref()?;
        same(entry.token.as_bytes(), token.as_bytes()).then(|| judge(entry))
    }

    /// Keeps what the cipher has found authentic.
    pub(crate) fn keep(&self, token: &str, claims: &Claims, key_opens_until: Option<SystemTime>) {
        if token.len() <= MAX_CHARS
            && let Some(place) = self.place(token)
        {
            place.store(Some(Arc::new(Entry { token: token.into(), claims: claims.clone(), key_opens_until })));
        }
    }

    fn place(&self, token: &str) -> Option<&ArcSwapOption<Entry>> {
        let end: &[u8; HASHED_CHARS] = token.as_bytes().last_chunk()?;
        let hash = self.hasher.hash_one(end);
        // The remainder is below the number of places.
        self.places.get((hash % PLACES as u64) as usize)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.places.iter().filter(|place| place.load().is_some()).count()
    }
}

/// Whether two texts are the same; the time does not tell where they first differ. Lengths are no secret.
fn same(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    let ((one, one_end), (other, other_end)) = (one.as_chunks::<16>(), other.as_chunks::<16>());
    let gather = |difference, (one, other): (&[u8; 16], &[u8; 16])| difference | (u128::from_ne_bytes(*one) ^ u128::from_ne_bytes(*other));
    let difference = one.iter().zip(other).fold(0, gather);
    // Looked at once, at the end: nothing before depends on what it is.
    (difference.ct_eq(&0) & one_end.ct_eq(other_end)).into()
}
