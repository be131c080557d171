//! The only way to learn the time, so that tests can drive it.

use std::time::{Instant, SystemTime};

/// Where time comes from.
pub trait Clock: Send + Sync + 'static {
    /// Monotonic time, for timers of this process.
    fn now(&self) -> Instant;
    /// Wall time, for what outlives the process or is shown to people.
    fn wall(&self) -> SystemTime;
}

/// The system's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}
