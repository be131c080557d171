//! What this node offers beyond AWS, under `/dormouse/v1/`: logs as they grow, and usage. Signed as AWS's operations are, and on
//! the same listener, since it shows what users' apps say.
//!
//! Owns: these routes and the order of their checks. Never changes anything: every route is a GET.

mod follow;
pub(crate) mod log_names;
mod logs;
mod usage;

use std::sync::Arc;

use axum::{body::Body, response::Response};
use http::{Method, Request, header};
use percent_encoding::percent_decode_str;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    authorization,
    dispatch::{Front, signed_by},
    operations::Api,
    reply::{ApiError, ErrorKind},
    routes,
};

/// Where these routes begin; no bucket can be asked for there with a signature for this API.
pub(crate) const PREFIX: &str = "/dormouse/v1/";
/// Logs that are followed at a time. Each costs a task, two open files and a `stat` five times a second.
const MAX_FOLLOWERS: usize = 64;

/// What these routes hold beyond the API's.
pub(crate) struct Extras {
    followers: Arc<Semaphore>,
}

impl Default for Extras {
    fn default() -> Self {
        Self { followers: Arc::new(Semaphore::new(MAX_FOLLOWERS)) }
    }
}

/// Told when the listener closes: what has no end of its own ends then.
#[derive(Clone)]
pub(crate) struct Closing(pub(crate) CancellationToken);

/// A request by its path, all of it decoded.
struct Ask {
    path: Vec<String>,
    query: Vec<(String, String)>,
}

impl Ask {
    fn of(path: &str, query: &str) -> Result<Self, ApiError> {
        let decode = |text: &str| {
            let decoded = percent_decode_str(text).decode_utf8();
            decoded.map(String::from).map_err(|_| ApiError::validation("A part of the address is not UTF-8."))
        };
        let path = path.strip_prefix(PREFIX).unwrap_or_default().split('/').map(decode).collect::<Result<_, _>>()?;
        let pairs = query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("X-Amz-"));
        let query = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(name, value)| Ok((decode(name)?, decode(value)?)));
        Ok(Self { path, query: query.collect::<Result<_, ApiError>>()? })
    }

    /// The parameters, each at most once and each one of `known`.
    fn parameters<const N: usize>(&self, known: [&str; N]) -> Result<[Option<&str>; N], ApiError> {
        let mut values = [None; N];
        for (name, value) in &self.query {
            let Some(index) = known.iter().position(|known| known == name) else {
                let there_are = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(ApiError::validation(format!("There is no parameter {name:?} here; there are: {there_are}.")));
            };
            if values[index].replace(value.as_str()).is_some() {
                return Err(ApiError::validation(format!("The parameter {name:?} was given twice.")));
            }
        }
        Ok(values)
    }
}

/// The name of what is asked for, for metrics.
pub(crate) fn name(path: &str) -> &'static str {
    match path.rsplit('/').next() {
        Some("logs") => "DormouseLogs",
        Some("usage") => "DormouseUsage",
        _ => "Unknown",
    }
}

/// Answers a request below [`PREFIX`].
pub(crate) async fn answer(front: &Front, request: Request<Body>) -> Result<Response, ApiError> {
    let (head, _body) = request.into_parts();
    let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
    let caller = signed_by(&front.api, &head)?;
    let ask = Ask::of(path, query)?;
    if head.method != Method::GET {
        return Err(routes::unknown());
    }
    authorization::check_extra(&front.api, &caller, name(path))?;
    let closing = head.extensions.get::<Closing>().map(|closing| closing.0.clone()).unwrap_or_default();
    let segments: Vec<&str> = ask.path.iter().map(String::as_str).collect();
    match segments[..] {
        ["microvms", id, "logs"] => logs::of_microvm(front, id, &ask, closing),
        ["images", name, "logs"] => logs::of_build(front, name, &ask, closing),
        ["microvms", id, "usage"] => usage::of_microvm(front, id, &ask),
        ["usage"] => usage::of_all(front, &ask),
        _ => Err(routes::unknown()),
    }
}

/// A switch of a query.
fn switch(name: &str, value: Option<&str>) -> Result<bool, ApiError> {
    match value {
        None | Some("0" | "false") => Ok(false),
        Some("1" | "true") => Ok(true),
        Some(other) => Err(ApiError::validation(format!("The parameter {name} is 0 or 1, not {other:?}."))),
    }
}

/// Names all logs that there are.
pub(crate) fn restore_log_names(api: &Api) {
    let controller = &api.parts.controller;
    let named = controller.list().into_iter().filter_map(|view| {
        let name = crate::operations::log_name(&view)?;
        Some((view.id, name, controller.log_dir(view.id)))
    });
    api.log_names.restore(named, |id| controller.find(id).is_some());
}

fn plain_text(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}

fn too_many_followers() -> ApiError {
    ApiError::new(ErrorKind::Throttling, format!("{MAX_FOLLOWERS} logs are followed already; end one, or ask without follow."))
}
