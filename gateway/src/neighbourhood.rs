//! What the clients of one address share: places for connections, and tokens a second.
//!
//! Owns who counts as one client. Never looks at a request.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dashmap::{DashMap, Entry};

use crate::tally::{Share, Tally};

/// After so many new addresses those are forgotten that have not been heard of for a while.
const SWEEP: usize = 4096;
/// What an address may take at once after it was quiet: as much as in this time.
const BURST: Duration = Duration::from_secs(1);

/// One subscriber of IPv6 has at least a /64.
pub(crate) fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

/// How many connections each address has.
#[derive(Default)]
pub(crate) struct Crowd {
    members: Arc<Tally<IpAddr>>,
}

/// A place of an address in the crowd; given back by its drop.
pub(crate) type Member = Share<IpAddr>;

impl Crowd {
    /// A place for a connection of this address, if it has fewer than `limit`.
    pub fn admit(&self, address: IpAddr, limit: usize) -> Option<Member> {
        self.members.take(neighbourhood(address), 1, limit as u64)
    }
}

/// A rate for each address: so many a second, and as many at once after a quiet second.
#[derive(Default)]
pub(crate) struct Rate {
    // Until when the address has used up its share.
    used_until: DashMap<IpAddr, Instant>,
    new: AtomicUsize,
}

impl Rate {
    /// Takes one, if the address has one left.
    pub fn take(&self, address: IpAddr, per_second: u32, now: Instant) -> bool {
        let share = Duration::from_secs(1) / per_second.max(1);
        let used_until = match self.used_until.entry(neighbourhood(address)) {
            Entry::Occupied(mut entry) => {
                let until = (*entry.get()).max(now) + share;
                if until > now + BURST {
                    return false;
                }
                entry.insert(until);
                return true;
            }
            Entry::Vacant(entry) => entry.insert(now + share),
        };
        drop(used_until);
        if self.new.fetch_add(1, Ordering::Relaxed) % SWEEP == SWEEP - 1 {
            self.used_until.retain(|_, until| *until > now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_as_many_places_as_the_limit_and_leaves_no_trace() {
        let crowd = Crowd::default();
        let [a, near_a, b]: [IpAddr; 3] = ["2001:db8::1", "2001:db8::2", "127.0.0.1"].map(|text| text.parse().unwrap());
        let first = crowd.admit(a, 2);
        let second = crowd.admit(near_a, 2);
        assert!(first.is_some() && second.is_some());
        assert!(crowd.admit(a, 2).is_none());
        assert!(crowd.admit(b, 2).is_some());
        drop(first);
        assert!(crowd.admit(a, 2).is_some());
        drop(second);
        assert!(crowd.members.is_empty());
    }

    #[test]
    fn a_rate_is_kept_for_each_address_and_comes_back_with_time() {
        let rate = Rate::default();
        let [a, near_a, b]: [IpAddr; 3] = ["2001:db8::1", "2001:db8::2", "127.0.0.1"].map(|text| text.parse().unwrap());
        let now = Instant::now();
        assert!((0..5).all(|_| rate.take(a, 10, now)) && (0..5).all(|_| rate.take(near_a, 10, now)));
        assert!(!rate.take(a, 10, now));
        assert!(rate.take(b, 10, now));
        let later = now + Duration::from_millis(100);
        assert!(rate.take(a, 10, later) && !rate.take(a, 10, later));
        assert!((0..10).all(|_| rate.take(a, 10, now + Duration::from_secs(60))));
        assert!(!rate.take(a, 10, now + Duration::from_secs(60)));
    }

    #[test]
    fn addresses_that_fell_silent_are_forgotten() {
        let rate = Rate::default();
        let now = Instant::now();
        for number in 0..u32::try_from(4 * SWEEP).unwrap() {
            rate.take(IpAddr::from(number.to_be_bytes()), 1000, now + Duration::from_millis(number.into()));
        }
        assert!(rate.used_until.len() <= SWEEP, "{}", rate.used_until.len());
    }
}
