//! Whether anything happens on a microVM's endpoint.
//!
//! Owns: the gate that the request path enters without asking anybody, the count of answers being computed, the time of
//! the last byte. Never arms a timer: the driver looks when its own timer fires. On the request path it costs one atomic
//! addition to enter and one atomic store per touch.
//!
//! The gate and the count are one word, so that "nobody is inside, close" and "is it open? I am inside" are one atomic
//! step each: a request cannot slip in between the idle clock's look and the suspend.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use model::Clock;
use parking_lot::Mutex;

/// Set: whoever wants in has to ask the driver.
const CLOSED: u64 = 1 << 63;
/// The rest of the word counts the holds.
const COUNT: u64 = CLOSED - 1;

/// One microVM's activity, over all its generations.
pub(crate) struct Activity {
    gate: AtomicU64,
    /// Nanoseconds from `origin` to the last activity.
    last: AtomicU64,
    origin: Instant,
    clock: Arc<dyn Clock>,
}

/// Somebody who counts, while computing, and touches, while streaming.
pub(crate) struct Hold {
    activity: Arc<Activity>,
    /// Guards the mode together with its share of the count; held for a few instructions.
    mode: Mutex<Mode>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Computing,
    Streaming,
}

impl Activity {
    /// Closed, and last active now.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let origin = clock.now();
        Arc::new(Self { gate: AtomicU64::new(CLOSED), last: AtomicU64::new(0), origin, clock })
    }

    /// In, if the gate is open.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Hold> {
        // Acquire pairs with the Release in `open`: what the driver published before it opened is seen.
        if self.gate.fetch_add(1, Ordering::AcqRel) & CLOSED != 0 {
            self.gate.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        self.touch();
        Some(Hold { activity: Arc::clone(self), mode: Mutex::new(Mode::Computing) })
    }

    /// In, whatever the gate says: for the driver, on behalf of one who waited.
    pub(crate) fn admit(self: &Arc<Self>) -> Hold {
        self.gate.fetch_add(1, Ordering::AcqRel);
        self.touch();
        Hold { activity: Arc::clone(self), mode: Mutex::new(Mode::Computing) }
    }

    /// Something happened now.
    pub(crate) fn touch(&self) {
        let since_origin = self.clock.now().saturating_duration_since(self.origin);
        self.last.store(u64::try_from(since_origin.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Since when nothing happened; `None` while an answer is being computed.
    pub(crate) fn quiet_since(&self) -> Option<Instant> {
        // Acquire pairs with the Release of the last `leave`, whose touch is then seen.
        (self.gate.load(Ordering::Acquire) & COUNT == 0).then(|| self.last())
    }

    /// Closes the gate if nobody is inside and nothing has happened for `long_enough`; says since when.
    pub(crate) fn close_if_quiet(&self, now: Instant, long_enough: Duration) -> Option<Instant> {
        self.gate.compare_exchange(0, CLOSED, Ordering::AcqRel, Ordering::Acquire).ok()?;
        // Looked at after the gate is closed: a request that came and went just before has left its time here.
        let since = self.last();
        if now.saturating_duration_since(since) >= long_enough {
            return Some(since);
        }
        self.open();
        None
    }

    /// Nobody gets in any more; who is in stays in.
    pub(crate) fn close(&self) {
        self.gate.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Everybody gets in.
    pub(crate) fn open(&self) {
        self.gate.fetch_and(COUNT, Ordering::AcqRel);
    }

    /// Whether whoever wants in has to ask the driver.
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Answers being computed.
    pub(crate) fn holds(&self) -> u64 {
        self.gate.load(Ordering::Acquire) & COUNT
    }

    fn last(&self) -> Instant {
        self.origin + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }

    fn leave(&self) {
        self.gate.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Hold {
    /// The activity it belongs to.
    pub(crate) fn touch(&self) {
        self.activity.touch();
    }

    /// Whether the microVM is asleep, or on its way there or back.
    pub(crate) fn is_shut_out(&self) -> bool {
        self.activity.is_closed()
    }

    /// Counts no longer; the idle clock runs from now.
    pub(crate) fn streaming(&self) {
        let mut mode = self.mode.lock();
        if *mode == Mode::Computing {
            *mode = Mode::Streaming;
            self.activity.touch();
            self.activity.leave();
        }
    }

    /// Counts again.
    pub(crate) fn computing(&self) {
        let mut mode = self.mode.lock();
        if *mode == Mode::Streaming {
            *mode = Mode::Computing;
            self.activity.gate.fetch_add(1, Ordering::AcqRel);
            self.activity.touch();
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.streaming();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that a test moves by hand.
    struct Manual(Mutex<Instant>);
    impl Clock for Manual {
        fn now(&self) -> Instant {
            *self.0.lock()
        }
        fn wall(&self) -> std::time::SystemTime {
            std::time::SystemTime::UNIX_EPOCH
        }
    }

    fn manual() -> (Arc<Manual>, Arc<Activity>) {
        let clock = Arc::new(Manual(Mutex::new(Instant::now())));
        let activity = Activity::new(Arc::clone(&clock) as Arc<dyn Clock>);
        (clock, activity)
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_closed_gate_lets_nobody_in_and_counts_nobody() {
        let (_, activity) = manual();
        assert!(activity.enter().is_none());
        assert_eq!(activity.holds(), 0);
        activity.open();
        assert!(activity.enter().is_some());
    }

    #[test]
    fn computing_blocks_the_clock_and_streaming_does_not() {
        let (clock, activity) = manual();
        activity.open();
        let hold = activity.enter().unwrap();
        *clock.0.lock() += MINUTE;
        assert_eq!(activity.close_if_quiet(clock.now(), MINUTE), None);
        assert_eq!(activity.quiet_since(), None);

        hold.streaming();
        hold.streaming();
        assert_eq!(activity.quiet_since(), Some(clock.now()), "the answer's begin was activity");
        hold.computing();
        assert_eq!(activity.quiet_since(), None);
        drop(hold);
        assert_eq!(activity.holds(), 0);
        assert_eq!(activity.close_if_quiet(clock.now(), MINUTE), None);
        *clock.0.lock() += MINUTE;
        assert_eq!(activity.close_if_quiet(clock.now(), MINUTE), Some(clock.now() - MINUTE));
        assert!(activity.enter().is_none());
    }

    #[test]
    fn a_dropped_stream_is_no_activity() {
        let (clock, activity) = manual();
        activity.open();
        let hold = activity.enter().unwrap();
        hold.streaming();
        let began = clock.now();
        *clock.0.lock() += MINUTE;
        drop(hold);
        assert_eq!(activity.quiet_since(), Some(began));
    }

    #[test]
    fn no_request_slips_in_between_the_look_and_the_close() {
        let (_, activity) = manual();
        activity.open();
        let rounds = 20_000;
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        if let Some(hold) = activity.enter() {
                            // Inside, the idle clock's close must have failed.
                            assert_eq!(activity.gate.load(Ordering::Acquire) & CLOSED, 0);
                            hold.streaming();
                            hold.computing();
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..rounds {
                    if activity.close_if_quiet(Instant::now(), Duration::ZERO).is_some() {
                        activity.open();
                    }
                }
            });
        });
        assert_eq!(activity.holds(), 0);
    }
}
