//! Which answer on a connection belongs to which request.

use std::{collections::HashMap, io, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

/// Requests without an answer, by their number, on one connection to a VMM.
pub(crate) struct Calls<A> {
    waiting: Mutex<HashMap<u64, oneshot::Sender<A>>>,
    closed: watch::Sender<bool>,
    /// Held while a request is written, and counts them.
    next_id: tokio::sync::Mutex<u64>,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum CallError {
    /// It took too long.
    Timeout,
    /// The connection has ended.
    Closed,
    /// It could not be written.
    Io(io::Error),
}

/// Takes a request whose caller left off the books.
struct Entry<'a, A> {
    calls: &'a Calls<A>,
    id: u64,
}

impl<A> Drop for Entry<'_, A> {
    fn drop(&mut self) {
        self.calls.waiting.lock().remove(&self.id);
    }
}

impl<A> Calls<A> {
    pub fn new() -> Self {
        Self { waiting: Mutex::default(), closed: watch::Sender::new(false), next_id: tokio::sync::Mutex::new(1) }
    }

    /// Writes a request with a number of its own, and waits for its answer.
    pub async fn call(&self, limit: Duration, write: impl AsyncFnOnce(u64) -> io::Result<()>) -> Result<A, CallError> {
        let exchange = async {
            let mut next_id = self.next_id.lock().await;
            let id = *next_id;
            *next_id += 1;
            let (answer, answered) = oneshot::channel();
            self.waiting.lock().insert(id, answer);
            let _entry = Entry { calls: self, id };
            // Looked at after the entry is there: an end either clears the entry or is seen here.
            if *self.closed.borrow() {
                return Err(CallError::Closed);
            }
            write(id).await.map_err(CallError::Io)?;
            drop(next_id);
            answered.await.map_err(|_| CallError::Closed)
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or(Err(CallError::Timeout))
    }

    /// An answer has come. One that nobody waits for any more is dropped.
    pub fn answer(&self, id: u64, answer: A) {
        if let Some(caller) = self.waiting.lock().remove(&id) {
            let _ = caller.send(answer);
        }
    }

    /// The connection has ended: whoever waits is told.
    pub fn close(&self) {
        self.closed.send_replace(true);
        self.waiting.lock().clear();
    }

    /// Returns when the connection has ended.
    pub async fn closed(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }
}
