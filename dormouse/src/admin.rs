//! `/metrics`, `/healthz`, `/readyz` for the operator, on a listener of their own that the data plane never reaches.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{Encoder as _, TextEncoder};

/// What the admin surface shows.
#[derive(Clone)]
pub struct Admin {
    registry: prometheus::Registry,
    ready: Arc<AtomicBool>,
}

impl Admin {
    /// Not ready yet.
    pub fn new(registry: prometheus::Registry) -> Self {
        Self { registry, ready: Arc::default() }
    }

    /// Said once everything listens, and taken back when the node drains.
    pub fn set_ready(&self, state: Readiness) {
        self.ready.store(matches!(state, Readiness::Ready), Ordering::Release);
    }

    /// The routes.
    pub fn router(self) -> Router {
        Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(self)
    }
}

/// Whether the node takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It does.
    Ready,
    /// It starts or drains.
    NotReady,
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&admin.registry.gather(), &mut text) {
        Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(error = %error, "the metrics could not be encoded");
            (StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be encoded\n").into_response()
        }
    }
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if admin.ready.load(Ordering::Acquire) { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "starting or draining\n") }
}
