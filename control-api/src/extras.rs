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
use image_builder::ImageRecord;
use percent_encoding::percent_decode_str;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::log_names::Link;
use crate::{
    authorization,
    dispatch::{Front, signed_by},
    operations::Api,
    reply::{Answer, ApiError, ErrorKind},
    routes::{self, Operation},
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
    let (controller, images) = (&api.parts.controller, &api.parts.images);
    let microvms = controller.list().into_iter().filter_map(|view| Some(Link::to_microvm(view.id, crate::operations::log_name(&view)?, controller.log_dir(view.id))));
    let builds = images.images().into_iter().flat_map(|image| image.versions).filter_map(|record| build_link(api, &record));
    api.log_names.restore(microvms.chain(builds), |id| controller.find(id).is_some());
}

fn build_link(api: &Api, record: &ImageRecord) -> Option<Link> {
    let name = crate::operations::build_log_name(record)?;
    Some(Link::to_build(record, name, api.parts.images.build_log(&record.name, record.version)))
}

/// An operation was answered: the log of what it began is found under its name from now on.
pub(crate) async fn name_log(api: &Api, operation: Operation, answer: &Answer) {
    let controller = api.parts.controller.clone();
    let member = |name: &str| answer.body[name].as_str();
    let link = match operation {
        Operation::RunMicrovm => member("microvmId").and_then(|id| id.parse().ok()).and_then(|id| controller.find(id)).and_then(|handle| {
            Some(Link::to_microvm(handle.id(), crate::operations::log_name(&handle.view())?, controller.log_dir(handle.id())))
        }),
        Operation::CreateMicrovmImage | Operation::UpdateMicrovmImage => {
            let version = member("imageVersion").and_then(|version| version.parse().ok());
            let name = member("name").and_then(|name| name.parse().ok());
            name.zip(version).and_then(|(name, version)| api.parts.images.get(&name, version)).and_then(|record| build_link(api, &record))
        }
        _ => None,
    };
    let Some(link) = link else { return };
    let names = Arc::clone(&api.log_names);
    let named = tokio::task::spawn_blocking(move || names.began(&link, |id| controller.find(id).is_some()));
    if let Err(panicked) = named.await {
        tracing::error!(error = %panicked, "naming a log ended unexpectedly");
    }
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
