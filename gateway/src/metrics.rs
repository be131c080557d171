//! The gateway's metrics. Every label set is fixed and every handle is made once: a request increments, it never looks up
//! by name. No microVM, host, path or method is a label (cases.md 50).

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::{access_log::Lost, reply::Reason};

/// What a client speaks, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// HTTP/1.x.
    Http1,
    /// HTTP/2.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// A WebSocket.
    WebSocket,
}

impl Protocol {
    const ALL: [Self; 4] = [Self::Http1, Self::Http2, Self::Grpc, Self::WebSocket];

    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "h1",
            Self::Http2 => "h2",
            Self::Grpc => "grpc",
            Self::WebSocket => "websocket",
        }
    }
}

/// `aborted`: the client left before an answer began.
const STATUS_CLASSES: [&str; 6] = ["aborted", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// From a proxied request on a warm microVM (half a millisecond) to a held one (a minute).
const REQUEST_BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// From one message to a day.
const STREAM_BUCKETS: [f64; 14] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0, 86400.0];

/// Of seconds; the grace is at most an hour.
const DRAIN_BUCKETS: [f64; 9] = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 600.0];

/// From a restore out of the page cache to a hold that is given up.
const HOLD_BUCKETS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0];

/// What lasts as long as its two ends like, and so says nothing about how fast requests are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// Server-sent events and their like.
    Events,
    /// A gRPC call of any kind.
    Grpc,
    /// A tunnel.
    WebSocket,
}

/// How the wait for a microVM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HoldEnd {
    /// The request went on.
    Awake,
    /// It was answered with a refusal.
    Refused,
    /// Its client had left.
    Left,
}

/// Why a request was tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryCause {
    /// The microVM fell asleep before the app was dialled.
    Asleep,
    /// The app had not looked at it.
    Untouched,
}

/// Why a drain cut a connection off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainCut {
    /// It carried nothing but streams that were silent.
    Silent,
    /// The grace was over.
    Grace,
}

/// All of them.
pub(crate) struct Metrics {
    requests: [[IntCounter; STATUS_CLASSES.len()]; Protocol::ALL.len()],
    refusals: [IntCounter; Reason::ALL.len()],
    open_streams: [IntGauge; Protocol::ALL.len()],
    stream_seconds: [Histogram; 3],
    hold_seconds: [Histogram; 3],
    retries: [IntCounter; 2],
    drain_cuts: [IntCounter; 2],
    /// From the begin of a drain to its end.
    pub drain_seconds: Histogram,
    /// Whether the gateway drains.
    pub draining: IntGauge,
    /// From the whole header to the end of the answer, for what is no stream.
    pub request_seconds: Histogram,
    /// Lines of the access log that were lost.
    pub log_lines_lost: Lost,
    /// Opening one token.
    pub token_open_seconds: Histogram,
    /// Body bytes from clients.
    pub bytes_in: IntCounter,
    /// Body bytes to clients.
    pub bytes_out: IntCounter,
    /// Client connections that are open.
    pub connections: IntGauge,
    /// Client connections closed at once because their address has too many.
    pub connections_refused: IntCounter,
    /// TLS handshakes that failed or took too long.
    pub tls_failures: IntCounter,
    /// Accepts that failed for want of a resource.
    pub accept_failures: IntCounter,
    /// Streams to guests that are open.
    pub upstream_streams: IntGauge,
}

impl Metrics {
    /// Makes and registers all of them.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = counters(registry, "edge_requests_total", "Requests answered or given up.", &["protocol", "status_class"])?;
        let refusals = counters(registry, "edge_refusals_total", "Answers the gateway made itself.", &["reason"])?;
        let bytes = counters(registry, "edge_bytes_total", "Body bytes that crossed the edge.", &["direction"])?;
        let retries = counters(registry, "edge_retries_total", "Requests tried again, of which no app had seen anything.", &["cause"])?;
        let cuts = counters(registry, "edge_drain_cuts_total", "Client connections that a drain cut off in the middle of something.", &["cause"])?;
        let lost = counters(registry, "edge_access_log_lost_total", "Lines of the access log that were dropped.", &["cause"])?;
        let streams = histograms(
            registry,
            "edge_stream_seconds",
            "How long event streams, gRPC calls and WebSockets lasted; they are not in edge_request_seconds.",
            "kind",
            &STREAM_BUCKETS,
        )?;
        let holds = histograms(registry, "edge_hold_seconds", "How long requests were held for a launch or wake.", "outcome", &HOLD_BUCKETS)?;
        let open = IntGaugeVec::new(Opts::new("edge_open_streams", "Requests and tunnels under way."), &["kind"])?;
        registry.register(Box::new(open.clone()))?;
        Ok(Self {
            requests: Protocol::ALL
                .map(|protocol| STATUS_CLASSES.map(|class| requests.with_label_values(&[protocol.as_str(), class]))),
            refusals: Reason::ALL.map(|reason| refusals.with_label_values(&[reason.reply().word])),
            open_streams: Protocol::ALL.map(|protocol| open.with_label_values(&[protocol.as_str()])),
            stream_seconds: ["events", "grpc", "websocket"].map(|kind| streams.with_label_values(&[kind])),
            hold_seconds: ["awake", "refused", "left"].map(|outcome| holds.with_label_values(&[outcome])),
            retries: ["asleep", "untouched"].map(|cause| retries.with_label_values(&[cause])),
            drain_cuts: ["silent", "grace"].map(|cause| cuts.with_label_values(&[cause])),
            drain_seconds: histogram(registry, "edge_drain_seconds", "How long drains took, to the last connection.", &DRAIN_BUCKETS)?,
            draining: gauge(registry, "edge_draining", "1 while the edge takes nothing new and finishes what runs.")?,
            log_lines_lost: Lost { queue_full: lost.with_label_values(&["queue-full"]), unwritten: lost.with_label_values(&["unwritten"]) },
            request_seconds: histogram(registry, "edge_request_seconds", "Time of a request at the edge; streams are not in it.", &REQUEST_BUCKETS)?,
            token_open_seconds: histogram(
                registry,
                "edge_token_open_seconds",
                "Time to open one token.",
                &[0.000_001, 0.000_002, 0.000_005, 0.000_01, 0.000_05, 0.001],
            )?,
            bytes_in: bytes.with_label_values(&["in"]),
            bytes_out: bytes.with_label_values(&["out"]),
            connections: gauge(registry, "edge_connections", "Client connections that are open.")?,
            connections_refused: counter(registry, "edge_connections_refused_total", "Connections over the limit of their address.")?,
            tls_failures: counter(registry, "edge_tls_handshake_failures_total", "TLS handshakes that failed or took too long.")?,
            accept_failures: counter(registry, "edge_accept_failures_total", "Accepts that failed for want of a resource.")?,
            upstream_streams: gauge(registry, "edge_upstream_streams", "Streams to guests that are open.")?,
        })
    }

    /// Counts a finished request. `status`: of its answer; `None` if the client left before one began.
    pub fn request(&self, protocol: Protocol, status: Option<u16>) {
        let class = status.map_or(0, |status| usize::from(status / 100).clamp(1, 5));
        self.requests[protocol as usize][class].inc();
    }

    /// Notes how long a stream lasted, from the whole header of its request to its end.
    pub fn stream(&self, kind: StreamKind, lasted: Duration) {
        self.stream_seconds[kind as usize].observe(lasted.as_secs_f64());
    }

    /// Notes how long a request was held for a launch or wake.
    pub fn hold(&self, end: HoldEnd, waited: Duration) {
        self.hold_seconds[end as usize].observe(waited.as_secs_f64());
    }

    /// Counts a request that is tried again.
    pub fn retry(&self, cause: RetryCause) {
        self.retries[cause as usize].inc();
    }

    /// Counts connections that a drain cuts off.
    pub fn drain_cut(&self, cause: DrainCut, connections: usize) {
        self.drain_cuts[cause as usize].inc_by(connections as u64);
    }

    /// Counts an answer of the gateway's own.
    pub fn refusal(&self, reason: Reason) {
        self.refusals[reason.index()].inc();
    }

    /// Counts a request or tunnel as open while the guard lives.
    pub fn open(&self, protocol: Protocol) -> Open {
        Open::new(&self.open_streams[protocol as usize])
    }
}

/// One more in a gauge while it lives.
#[derive(Debug)]
pub(crate) struct Open(IntGauge);

impl Open {
    /// Counts it.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    let metric = IntCounter::new(name, help)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    let metric = IntGauge::new(name, help)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histograms(registry: &Registry, name: &str, help: &str, label: &str, buckets: &[f64]) -> Result<HistogramVec, prometheus::Error> {
    let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label])?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
    let metric = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
