//! Why the gateway could not be set up.

use std::{io, net::SocketAddr, path::PathBuf};

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
    /// The private directory or the socket in it cannot be made.
    #[error("the gateway cannot make its private socket {path}")]
    PrivateSocket {
        /// What was being made.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The path of the private socket does not fit in a socket address.
    #[error("the gateway's private socket {path} has a path of more than {limit} bytes; set a shorter runtime directory")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The most bytes it may have.
        limit: usize,
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
