//! When an answer is written where many are under way.
//!
//! Owns: how many requests are carried at the same time, and the moment that each lets the others that are ready go first, so
//! that the writes of all of them follow one another: whom the first one wakes has not fallen asleep before the next. Never
//! delays a request that nobody competes with.

use std::{
    future::poll_fn,
    mem,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use tokio::runtime::Handle;

/// The requests under way.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    under_way: AtomicUsize,
    workers: OnceLock<usize>,
}

/// A request under way, as long as it lives.
pub(crate) struct Member<'a>(&'a Crowd);

impl Crowd {
    /// One more.
    pub fn join(&self) -> Member<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        Member(self)
    }

    /// Whether a thread of the runtime has more than one of them.
    fn is_dense(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > *self.workers.get_or_init(|| Handle::current().metrics().num_workers())
    }

    /// Lets all tasks of this thread run that are ready to. With a thread for each request there are none, and the wake would
    /// rouse a thread that sleeps.
    pub async fn let_others_first(&self) {
        let mut gone_back = !self.is_dense();
        poll_fn(|cx| {
            if mem::replace(&mut gone_back, true) {
                return Poll::Ready(());
            }
            // A task that wakes itself while it runs is the last in the queue.
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn in_a_crowd_whoever_is_ready_goes_first_and_alone_nobody_waits() {
        let (crowd, order) = (Crowd::default(), Mutex::new(Vec::new()));
        let one = async |name| {
            let _member = crowd.join();
            crowd.let_others_first().await;
            order.lock().unwrap().push(name);
        };
        one("alone").await;
        tokio::join!(one("first"), async { order.lock().unwrap().push("other") });
        assert_eq!(*order.lock().unwrap(), ["alone", "first", "other"], "one request for one thread is no crowd");
        let another = crowd.join();
        tokio::join!(one("in a crowd"), async { order.lock().unwrap().push("ready") });
        assert_eq!(order.lock().unwrap()[3..], ["ready", "in a crowd"]);
        drop(another);
        assert_eq!(crowd.under_way.load(Ordering::Relaxed), 0);
    }
}
