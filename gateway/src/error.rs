//! Why the gateway could not be set up.

use std::{io, net::SocketAddr};

use crate::access_log::AccessLogTarget;

/// Why [`crate::Gateway::bind`] failed.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address cannot be listened on.
    #[error("the gateway cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The access log cannot be opened.
    #[error("the gateway cannot open its access log {target:?}; set log.access to a file that it may append to")]
    AccessLog {
        /// Where it was to go.
        target: AccessLogTarget,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A metric cannot be registered, most likely because another gateway uses the same registry.
    #[error("the gateway's metrics cannot be registered")]
    Metrics(#[source] prometheus::Error),
}
