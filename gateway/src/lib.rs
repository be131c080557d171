//! The edge: TLS, routing, tokens, port scope, holding a request through a wake, forwarding every protocol.
//!
//! Owns: everything between a client's connection and a guest stream. Never names an engine, never decides when a microVM
//! sleeps, never lets an unchecked request wake or reach anything.
//!
//! A request's way, each step producing what the next one takes:
//!
//! ```text
//! connection (TLS, deadlines) → framing → route (Host) → permit (token, port scope) → awake → peer → guest
//! ```
//!
//! `service` says the order; `route`, `auth`, `ports`, `framing`, `headers`, `websocket` and `reply` are rules over plain
//! HTTP types and know nothing of pingora, which lives in `service`, `exchange`, `connection`, `socket`, `listener`, `tls` and
//! `upstream` only.
//!
//! pingora logs through `log`; its lines at error level speak of clients' mistakes and should be let through for its own
//! debugging only. Ours are `tracing` events, and one line per request in the access log.
#![forbid(unsafe_code)]

mod access_log;
mod auth;
mod config;
mod connection;
mod context;
mod crowd;
mod descriptors;
mod drain;
mod error;
mod exchange;
mod framing;
mod h2_frames;
mod h2_refusals;
mod headers;
mod held;
mod listener;
mod meter;
mod metrics;
mod microvms;
mod neighbourhood;
mod ports;
mod reply;
mod route;
mod service;
mod socket;
mod tally;
mod tickets;
mod tls;
mod upstream;
mod wake;
mod websocket;

use std::{net::SocketAddr, sync::Arc};

use ::config::EdgeLimits;
use pingora_core::{
    apps::HttpServerOptions,
    protocols::http::v2::server::H2Options,
    server::configuration::ServerConf,
};
use pingora_proxy::HttpProxy;
use token::KeyRing;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use access_log::AccessLogTarget;
pub use config::{GatewayConfig, Limits};
pub use descriptors::raise_limit as raise_open_files;
pub use error::GatewayError;
pub use microvms::Microvms;
pub use tls::Tls;

use crate::{
    access_log::AccessLog,
    connection::GuardSettings,
    crowd::Crowd,
    metrics::Metrics,
    neighbourhood::Rate,
    service::Service,
    upstream::{connector::Peers, links::Links, pool::Pool},
};

/// What a field counts in HTTP/2's measure of a header besides its name and value (RFC 9113 §6.5.2). What is within our own
/// limits is never refused by the parser, whose answer has no reason.
const FIELD_OVERHEAD: usize = 32;
/// Streams a client may make us reset before its connection is closed; a client that opens too many at once, which is
/// no attack, stays below it.
const RESETS: usize = 256;
/// Connections to guests that wait for a next request, in all.
const POOL: usize = 4096;

/// The gateway, bound to its address.
pub struct Gateway {
    listener: TcpListener,
    local_addr: SocketAddr,
    proxy: Arc<HttpProxy<Service>>,
    links: Arc<Links>,
    pool: Arc<Pool>,
    tls: Tls,
    limits: Limits,
    guard: GuardSettings,
    log: AccessLog,
}

impl Gateway {
    /// Binds the listener and registers the metrics. Connections are answered from [`Gateway::serve`] on.
    pub async fn bind(
        config: GatewayConfig,
        microvms: impl Into<Microvms>,
        keys: KeyRing,
        tls: impl Into<Tls>,
        metrics: &prometheus::Registry,
    ) -> Result<Self, GatewayError> {
        let listener = TcpListener::bind(config.listen).await.map_err(|source| GatewayError::Listen { address: config.listen, source })?;
        Self::on(listener, config, microvms, keys, tls, metrics)
    }

    /// The same on a listener that is open already, perhaps taken over from another process.
    pub fn on(
        listener: TcpListener,
        config: GatewayConfig,
        microvms: impl Into<Microvms>,
        keys: KeyRing,
        tls: impl Into<Tls>,
        metrics: &prometheus::Registry,
    ) -> Result<Self, GatewayError> {
        let listen = |source| GatewayError::Listen { address: config.listen, source };
        let local_addr = listener.local_addr().map_err(listen)?;
        let metrics = Arc::new(Metrics::register(metrics).map_err(GatewayError::Metrics)?);
        let limits = Limits::new(config.limits);
        let links = Arc::new(Links::new(limits.clone(), metrics.upstream_streams.clone()));
        let pool = Arc::new(Pool::new(POOL));
        let log = AccessLog::open(&config.access_log, metrics.log_lines_lost.clone())
            .map_err(|source| GatewayError::AccessLog { target: config.access_log, source })?;
        let guard = GuardSettings { limits: limits.clone(), metrics: metrics.clone(), log: log.clone() };
        let proxy = proxy(Service {
            peers: Peers::new(links.clone(), pool.clone(), limits.clone()),
            domain_suffix: config.domain_suffix,
            limits: limits.clone(),
            microvms: microvms.into(),
            held: Arc::default(),
            tokens: Rate::default(),
            shells: Arc::default(),
            keys,
            metrics,
            log: log.clone(),
            crowd: Crowd::default(),
        });
        Ok(Self { listener, local_addr, proxy: Arc::new(proxy), links, pool, tls: tls.into(), limits, guard, log })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The limits in force, to be replaced while it serves.
    pub fn limits(&self) -> Limits {
        self.limits.clone()
    }

    /// Serves until `shutdown` fires, then takes nothing new (HTTP/2 clients read GOAWAY, idle connections are closed),
    /// lets what runs finish for at most [`EdgeLimits::grace`], and returns as soon as nothing is left.
    pub async fn serve(self, shutdown: CancellationToken) {
        self.links.start_sweeping(move || self.pool.tidy());
        listener::serve(self.listener, self.proxy, self.tls, self.guard, self.links.drain().clone(), shutdown).await;
        self.links.close().await;
        self.log.flush().await;
    }
}

fn proxy(service: Service) -> HttpProxy<Service> {
    let conf = ServerConf {
        // pingora loads the host's certificate authorities for its own TLS towards upstreams, which is never used, and
        // panics where there are none. An empty list keeps it from looking.
        ca_file: Some("/dev/null".to_owned()),
        upstream_keepalive_pool_size: POOL,
        threads: 1,
        ..ServerConf::default()
    };
    let limits = EdgeLimits::clone(&service.limits.load());
    let mut proxy = pingora_proxy::http_proxy(&Arc::new(conf), service);
    let mut options = HttpServerOptions::default();
    // pingora would refuse CONNECT by itself and without a reason. It is refused in `framing`, as any tunnel.
    options.allow_connect_method_proxying = true;
    proxy.server_options = Some(options);
    let mut h2 = H2Options::new();
    h2.max_concurrent_streams(limits.max_streams)
        // Twice ours, and what h2 counts for each field: what is too large for us and not for h2 is refused by us, with a reason
        // and a line in the log. h2 refuses by itself what is larger, with a bare 431.
        .max_header_list_size(u32::try_from(2 * limits.max_header_bytes + FIELD_OVERHEAD * limits.max_header_fields).unwrap_or(u32::MAX))
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window)
        .max_local_error_reset_streams(Some(RESETS));
    proxy.h2_options = Some(h2);
    proxy
}
