//! Connections to apps of HTTP/1.1 between two requests.
//!
//! Owns which of them the next request gets. When and how one ends is `links`' to say; what has ended there is only thrown
//! away here.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use dashmap::{DashMap, Entry};
use pingora_core::protocols::Stream;

use super::links::{Link, Target, Use};

/// A connection, and the record of it.
pub(crate) struct Connection {
    /// As pingora's HTTP takes it.
    pub stream: Stream,
    /// Its record.
    pub link: Arc<Link>,
}

/// Those that wait.
pub(crate) struct Pool {
    places: usize,
    waiting: AtomicUsize,
    // Keyed as the default hasher is, in a third of its time.
    by_target: DashMap<Target, Vec<Connection>, ahash::RandomState>,
}

impl Pool {
    /// Room for so many in all.
    pub fn new(places: usize) -> Self {
        Self { places, waiting: AtomicUsize::new(0), by_target: DashMap::default() }
    }

    /// The connection to `target` that was used last, which its app is the least likely to have closed.
    pub fn take(&self, target: Target) -> Option<(Connection, Use)> {
        loop {
            // The lock is not held while a connection is looked at or ended.
            let connection = self.by_target.get_mut(&target)?.pop()?;
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            if let Some(taken) = connection.link.take_up_idle() {
                return Some((connection, taken));
            }
        }
    }

    /// Keeps a connection for the next request; ends it if there is no place.
    pub fn give_back(&self, connection: Connection) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.places {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.by_target.entry(connection.link.target).or_default().push(connection);
    }

    /// Forgets what has ended meanwhile.
    pub fn tidy(&self) {
        let targets: Vec<Target> = self.by_target.iter().map(|waiting| *waiting.key()).collect();
        let mut ended = Vec::new();
        for target in targets {
            if let Entry::Occupied(mut waiting) = self.by_target.entry(target) {
                ended.extend(waiting.get_mut().extract_if(.., |connection| connection.link.has_ended()));
                if waiting.get().is_empty() {
                    waiting.remove();
                }
            }
        }
        self.waiting.fetch_sub(ended.len(), Ordering::Relaxed);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use config::Config;
    use model::{Generation, MicrovmId, Port};
    use prometheus::IntGauge;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::{
        Limits,
        upstream::{
            links::{Links, Speaks},
            transport::Transport,
        },
    };

    fn links() -> Arc<Links> {
        Arc::new(Links::new(Limits::new(Config::defaults().edge.limits), IntGauge::new("open", "open").unwrap()))
    }

    fn target(generation: u64) -> Target {
        Target { microvm: MicrovmId::random(), port: Port::DEFAULT, generation: Generation(generation), speaks: Speaks::Http1, transport: Transport::Plain }
    }

    fn used(links: &Arc<Links>, target: Target) -> (Connection, DuplexStream) {
        let (guest, app) = tokio::io::duplex(64);
        let tied = links.tie(target, Box::pin(guest), Box::new(|| false));
        let connection = Connection { link: tied.link().clone(), stream: Box::new(tied) };
        drop(connection.link.take_up().unwrap());
        (connection, app)
    }

    #[tokio::test]
    async fn the_last_one_used_is_the_next_and_leads_to_its_own_target() {
        let (links, pool) = (links(), Pool::new(10));
        let (here, there) = (target(1), target(1));
        let (first, _first_app) = used(&links, here);
        let (second, mut second_app) = used(&links, here);
        let (elsewhere, _elsewhere_app) = used(&links, there);
        [first, second, elsewhere].into_iter().for_each(|connection| pool.give_back(connection));
        assert!(pool.take(Target { generation: Generation(2), ..here }).is_none());
        let (mut taken, taken_up) = pool.take(here).unwrap();
        taken.stream.write_all(b"next").await.unwrap();
        let mut read = [0; 4];
        second_app.read_exact(&mut read).await.unwrap();
        drop(taken_up);
        assert!(pool.take(here).is_some() && pool.take(here).is_none() && pool.take(there).is_some());
        assert_eq!(pool.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_has_ended_or_was_spoken_on_is_not_handed_out() {
        let (links, pool, target) = (links(), Pool::new(10), target(1));
        let (closed, app) = used(&links, target);
        drop(app);
        let (spoken_on, mut unasked) = used(&links, target);
        unasked.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
        let (cut, _app) = used(&links, target);
        cut.link.cut();
        [closed, spoken_on, cut].into_iter().for_each(|connection| pool.give_back(connection));
        assert!(pool.take(target).is_none());
        assert_eq!(pool.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn it_has_so_many_places_and_ended_ones_take_none_for_long() {
        let (links, pool, target) = (links(), Pool::new(1), target(1));
        let (kept, _app) = used(&links, target);
        let (too_many, mut ended) = used(&links, target);
        let link = kept.link.clone();
        pool.give_back(kept);
        pool.give_back(too_many);
        let read = tokio::time::timeout(Duration::from_secs(10), ended.read(&mut [0])).await;
        assert_eq!(read.unwrap().unwrap(), 0);
        pool.tidy();
        assert_eq!(pool.waiting.load(Ordering::Relaxed), 1);
        link.cut();
        pool.tidy();
        assert_eq!((pool.waiting.load(Ordering::Relaxed), pool.by_target.len()), (0, 0));
    }
}
