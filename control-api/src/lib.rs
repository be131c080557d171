//! The AWS Lambda MicroVMs REST-JSON API (version 2025-09-09) with SigV4, and the S3 endpoint for artifacts.
//!
//! Owns: the wire form of the control plane, access keys, idempotency, what callers read when they are refused. Never
//! drives a microVM by itself: it asks the controller and the catalog.
#![forbid(unsafe_code)]

mod access_keys;
mod arn;
mod artifact;
mod authorization;
mod caller;
mod client_tokens;
mod dispatch;
mod extras;
mod model_shapes;
mod operations;
mod pages;
mod quotas;
mod rates;
mod replays;
mod reply;
mod routes;
mod s3;
mod serve;
mod shape;
mod sigv4;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc, time::Duration};

use idle_controller::Controller;
use image_builder::Catalog;
use model::{Clock, Prices};
use prometheus::{IntCounterVec, Opts};
use token::KeyRing;
use tokio::sync::Semaphore;

pub use access_keys::{AccessKey, AccessKeys, AccessKeysError};
pub use caller::Role;
pub use rates::Rates;
pub use serve::serve;

/// What the API is told.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// The record of client tokens is `<dir>/client-tokens.redb`; made if missing.
    pub dir: PathBuf,
    /// Buckets of the embedded S3 are directories of this one; made if missing.
    pub s3_dir: PathBuf,
    /// Region in ARNs, signatures and the guest's AWS_REGION.
    pub region: String,
    /// Account in ARNs: 12 digits.
    pub account: String,
    /// An endpoint is `<uuid>.<this>`: the edge's domain suffix, with `:port` unless the edge is on 443.
    pub endpoint_authority_suffix: String,
    /// Whether `file://` artifacts of this host are taken.
    pub allow_file_artifacts: bool,
    /// What usage is shown to cost.
    pub prices: Prices,
    /// The least maxIdleDurationSeconds; AWS: 60 s.
    pub least_idle: Duration,
    /// Baseline memory that microVMs (not TERMINATED) and builds may have together; MiB.
    pub max_memory_mib: u64,
    /// How often one access key may call.
    pub rates: Rates,
    /// API requests worked on at a time; more wait their turn within `request_timeout`.
    pub max_concurrent_requests: usize,
    /// How long one API request may take (S3 uploads and downloads are not bounded by it).
    pub request_timeout: Duration,
}

impl ApiConfig {
    /// A request takes milliseconds; one that resumes a microVM takes a wake.
    pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
    /// Far more than one node can do at once, far less than what would hurt it.
    pub const DEFAULT_MAX_CONCURRENT_REQUESTS: usize = 256;
}

/// The pieces the API speaks for.
#[derive(Clone)]
pub struct Pieces {
    /// Runs, suspends, resumes, ends microVMs.
    pub controller: Controller,
    /// Builds images.
    pub catalog: Catalog,
    /// Mints tokens.
    pub tokens: KeyRing,
    /// Who may call.
    pub access_keys: AccessKeys,
    /// The time of requests and of tokens.
    pub clock: Arc<dyn Clock>,
}

/// Why the API could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed")]
pub struct OpenError {
    /// What was tried, on what.
    pub doing: String,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The whole API, and S3 for everything that is signed for S3.
pub fn router(config: ApiConfig, pieces: Pieces, metrics: &prometheus::Registry) -> Result<axum::Router, OpenError> {
    let Pieces { controller, catalog: images, tokens, access_keys, clock } = pieces;
    route(config, Parts { controller, images, tokens, access_keys, clock }, metrics)
}

/// [`Pieces`], as operations name them.
pub(crate) struct Parts {
    pub(crate) controller: Controller,
    pub(crate) images: Catalog,
    pub(crate) tokens: KeyRing,
    pub(crate) access_keys: AccessKeys,
    pub(crate) clock: Arc<dyn Clock>,
}

fn route(config: ApiConfig, parts: Parts, metrics: &prometheus::Registry) -> Result<axum::Router, OpenError> {
    let error = |doing: String, source: Box<dyn std::error::Error + Send + Sync>| OpenError { doing, source };
    std::fs::create_dir_all(&config.dir).map_err(|cause| error(format!("making the directory {}", config.dir.display()), Box::new(cause)))?;
    let requests = IntCounterVec::new(Opts::new("api_requests_total", "Requests to the control API and to S3."), &["operation", "code"])
        .and_then(|requests| metrics.register(Box::new(requests.clone())).map(|()| requests))
        .map_err(|cause| error("registering the metric api_requests_total".to_owned(), Box::new(cause)))?;
    let client_tokens = client_tokens::ClientTokens::open(&config.dir.join("client-tokens.redb"), parts.clock.wall())?;
    let s3 = s3::S3Endpoint::open(&config.s3_dir, parts.access_keys.clone())?;
    let front = dispatch::Front {
        s3,
        turns: Arc::new(Semaphore::new(config.max_concurrent_requests.max(1))),
        bodies: Semaphore::new(config.max_concurrent_requests.max(1)),
        allowances: rates::Allowances::new(config.rates),
        replays: replays::Replays::default(),
        request_timeout: config.request_timeout,
        requests,
        extras: extras::Extras::default(),
        api: Arc::new(operations::Api {
            log_names: Arc::new(extras::log_names::LogNames::new(config.dir.join("logs"))),
            place: arn::Place { region: config.region.clone(), account: config.account.clone() },
            config,
            parts,
            client_tokens,
            memory: quotas::MemoryQuota::default(),
            tag_changes: tokio::sync::Mutex::default(),
        }),
    };
    extras::restore_log_names(&front.api);
    Ok(axum::Router::new().fallback(dispatch::handle).with_state(Arc::new(front)))
}
