//! The certificates the gateway shows, and how they are changed while it runs.

use std::sync::Arc;

use arc_swap::ArcSwap;
use pingora_core::listeners::tls::Acceptor;
use rustls::ServerConfig;

/// The TLS set-up of the listener. Cheap to clone; a [`Tls::replace`] is seen by every connection accepted after it.
#[derive(Clone)]
pub struct Tls {
    current: Arc<ArcSwap<Acceptor>>,
}

impl Tls {
    /// Uses this set-up. The application protocols are the gateway's own: `h2`, then `http/1.1` (aws-behaviour §1.1).
    pub fn new(config: &ServerConfig) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(acceptor(config))) }
    }

    /// Uses this set-up from the next connection on. Connections that are open keep theirs.
    pub fn replace(&self, config: &ServerConfig) {
        self.current.store(Arc::new(acceptor(config)));
    }

    pub(crate) fn acceptor(&self) -> Arc<Acceptor> {
        self.current.load_full()
    }
}

impl From<Arc<ServerConfig>> for Tls {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self::new(&config)
    }
}

fn acceptor(config: &ServerConfig) -> Acceptor {
    let mut config = config.clone();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Acceptor::from_server_config(Arc::new(config))
}
