//! Where a test stops an operation, looks around, and lets it go on.

use tokio::sync::watch;

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    holds: usize,
    waiting: usize,
}

/// A place that operations pass unless a test holds it.
#[derive(Debug)]
pub(super) struct Gate {
    count: watch::Sender<Count>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { count: watch::Sender::new(Count::default()) }
    }
}

impl Gate {
    pub fn hold(&self) -> Hold {
        self.count.send_modify(|count| count.holds += 1);
        Hold { count: self.count.clone() }
    }

    /// Returns when nobody holds the gate. Safe to drop.
    pub async fn pass(&self) {
        let mut changes = self.count.subscribe();
        if changes.borrow_and_update().holds == 0 {
            return;
        }
        self.count.send_modify(|count| count.waiting += 1);
        let _waiting = Waiting { count: &self.count };
        // The sender lives in `self`, so waiting cannot fail.
        let _ = changes.wait_for(|count| count.holds == 0).await;
    }
}

struct Waiting<'a> {
    count: &'a watch::Sender<Count>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.count.send_modify(|count| count.waiting -= 1);
    }
}

/// Operations of one kind stop and wait while this lives.
#[derive(Debug)]
#[must_use = "dropping it lets the operations go on"]
pub struct Hold {
    count: watch::Sender<Count>,
}

impl Hold {
    /// Returns when `n` operations wait.
    pub async fn arrived(&self, n: usize) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.count.subscribe().wait_for(|count| count.waiting >= n).await;
    }

    /// Lets the operations go on; the same as dropping it, but readable.
    pub fn release(self) {}
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.count.send_modify(|count| count.holds -= 1);
    }
}
