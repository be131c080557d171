//! One at a time to a target, so that a cold burst of HTTP/2 streams opens one connection and not fifty.
//!
//! pingora looks for a connection with a free stream and opens one if there is none; whoever looks before the first one is
//! open opens another (its connectors/http/v2.rs says so). A turn is held from before the look until the request has its
//! connection: for a known one that is no wait, for the first one it is the dial.

use std::sync::Arc;

use dashmap::DashMap;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::links::Target;

/// The turns of all targets.
#[derive(Default)]
pub(crate) struct Turns {
    by_target: DashMap<Target, Arc<Mutex<()>>>,
}

/// A turn; given back by its drop.
pub(crate) struct Turn {
    turns: Arc<Turns>,
    target: Target,
    held: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for the turn of a target. Dropping the future gives up the place in the line.
    pub async fn take(self: &Arc<Self>, target: Target) -> Turn {
        // Whoever waits cleans up as well when it gives up: its own claim on the lock goes first.
        let mut turn = Turn { turns: self.clone(), target, held: None };
        let lock = self.by_target.entry(target).or_default().clone();
        turn.held = Some(lock.lock_owned().await);
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        self.turns.by_target.remove_if(&self.target, |_, lock| Arc::strong_count(lock) == 1);
    }
}

#[cfg(test)]
mod tests {
    use model::{Generation, MicrovmId, Port};

    use super::*;
    use crate::upstream::{links::Speaks, transport::Transport};

    #[tokio::test]
    async fn one_at_a_time_to_each_target_and_no_trace_is_left() {
        let target = |port| Target {
            microvm: MicrovmId::random(),
            port: Port::new(port).unwrap(),
            generation: Generation(1),
            speaks: Speaks::Http2,
            transport: Transport::Plain,
        };
        let turns = Arc::new(Turns::default());
        let (one, other) = (target(1), target(2));
        let first = turns.take(one).await;
        let elsewhere = turns.take(other).await;
        let mut second = Box::pin(turns.take(one));
        assert!(futures::poll!(&mut second).is_pending());
        let mut leaves = Box::pin(turns.take(one));
        assert!(futures::poll!(&mut leaves).is_pending());
        drop(leaves);
        drop(first);
        let second = second.await;
        assert!(futures::poll!(Box::pin(turns.take(one))).is_pending());
        drop((second, elsewhere));
        assert!(turns.by_target.is_empty());
    }
}
