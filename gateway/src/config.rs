//! What the gateway is told.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::{ArcSwap, Guard};
use ::config::EdgeLimits;
use tokio::sync::watch;

use crate::access_log::AccessLogTarget;

/// Settings of the gateway, already checked.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Where it listens for TLS; port 0 picks a free one ([`crate::Gateway::local_addr`] says which).
    pub listen: SocketAddr,
    /// Endpoints are `<uuid>.<domain_suffix>`.
    pub domain_suffix: String,
    /// What clients and guests may take.
    pub limits: EdgeLimits,
    /// Where the access log goes.
    pub access_log: AccessLogTarget,
}

/// The limits in force. Cheap to clone; a [`Limits::replace`] is seen by everything that begins after it: the next
/// connection, the next header, the next request, the next wait.
#[derive(Debug, Clone)]
pub struct Limits {
    current: Arc<ArcSwap<EdgeLimits>>,
    // Wakes the accept loop, which may be waiting for a place.
    changed: watch::Sender<()>,
}

impl Limits {
    /// With these in force.
    pub fn new(limits: EdgeLimits) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(limits)), changed: watch::Sender::new(()) }
    }

    /// Puts others in force. What is under way keeps what it began with.
    pub fn replace(&self, limits: EdgeLimits) {
        self.current.store(Arc::new(limits));
        self.changed.send_replace(());
    }

    /// Those in force now. Not to be kept across an await.
    pub(crate) fn load(&self) -> Guard<Arc<EdgeLimits>> {
        self.current.load()
    }

    /// Those in force now, to be kept.
    pub(crate) fn load_full(&self) -> Arc<EdgeLimits> {
        self.current.load_full()
    }

    /// Tells of each [`Limits::replace`].
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}
