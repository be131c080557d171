//! What the gateway is told.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

/// Settings of the gateway, already checked. The defaults run on a laptop.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Where it listens for TLS; port 0 picks a free one ([`crate::Gateway::local_addr`] says which).
    pub listen: SocketAddr,
    /// Endpoints are `<uuid>.<domain_suffix>`.
    pub domain_suffix: String,
    /// A directory in which the gateway makes a private directory of its own (mode 0700) for the sockets that tie it to
    /// itself. The path must be short: a socket's path has at most 107 bytes.
    pub runtime_dir: PathBuf,
    /// Client connections at a time; more wait in the kernel's backlog.
    pub max_connections: usize,
    /// Client connections at a time from one address (one /64 of IPv6); more are closed at once.
    pub max_connections_per_address: usize,
    /// How long a request waits for its microVM to wake.
    pub hold: Duration,
    /// From the first byte of a request to the end of its header (HTTP/1.1), and from the end of the TLS handshake to
    /// the end of the first header.
    pub header_deadline: Duration,
    /// From accept to the end of the TLS handshake.
    pub handshake_deadline: Duration,
    /// How long a client's connection may idle between two requests.
    pub keepalive: Duration,
    /// How long a client may take for the next bytes of a request body.
    pub body_deadline: Duration,
    /// How long a client may refuse to take the next bytes of an answer.
    pub write_deadline: Duration,
    /// How long a guest may take to accept a connection to a port.
    pub dial_deadline: Duration,
    /// How long a guest may take from the whole request header to the begin of its answer; `None`: for ever, as a
    /// request that computes for long is a feature (design §3).
    pub first_byte_deadline: Option<Duration>,
    /// How long a connection to a guest waits for its next request. Below AWS's least maxIdleDurationSeconds (60 s), so
    /// that idle connections are gone before their microVM falls asleep by itself.
    pub upstream_keepalive: Duration,
    /// Bytes of a request header (names and values, the request line included).
    pub max_header_bytes: usize,
    /// Fields of a request header.
    pub max_header_fields: usize,
    /// Bytes of an answer's header that a guest may send.
    pub max_answer_header_bytes: usize,
    /// Bytes of a request body; `None`: any.
    pub max_body_bytes: Option<u64>,
    /// How long running requests may go on once the gateway is told to stop.
    pub grace: Duration,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8443)),
            domain_suffix: "microvm.localhost".to_owned(),
            runtime_dir: PathBuf::from("/tmp"),
            max_connections: 10_000,
            max_connections_per_address: 2_000,
            hold: Duration::from_secs(60),
            header_deadline: Duration::from_secs(10),
            handshake_deadline: Duration::from_secs(5),
            keepalive: Duration::from_secs(60),
            body_deadline: Duration::from_secs(60),
            write_deadline: Duration::from_secs(60),
            dial_deadline: Duration::from_secs(10),
            first_byte_deadline: None,
            upstream_keepalive: Duration::from_secs(30),
            // A token has up to 8,000 characters (aws-behaviour §2); the rest is room for cookies.
            max_header_bytes: 24 * 1024,
            max_header_fields: 100,
            max_answer_header_bytes: 64 * 1024,
            max_body_bytes: None,
            grace: Duration::from_secs(30),
        }
    }
}
