//! From an HTTP request to an operation's answer.
//!
//! ```text
//! request ─► S3? ─────────────────────────────────────────► s3s
//!        └─► body (bounded) ─► turn ─► signature ─► route ─► model ─► operation ─► answer
//! ```
//!
//! Owns: the order of the checks, the bounds on body, time and number, request ids, the request counter. A request that
//! has passed the bounds goes on to its end when its client leaves, so that no operation is left half done.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prometheus::IntCounterVec;
use serde_json::Value;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use crate::{
    caller::Caller,
    extras::{self, Extras},
    operations::{self, Api},
    reply::{Answer, ApiError, ErrorKind},
    routes::{self, Operation},
    s3::S3Endpoint,
    shape,
    sigv4::{self, Expected, Signed},
};

/// The largest request of the model is a CreateMicrovmImage with 100 variables of 4096 characters; that fits twice.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Signing name of the API.
const SERVICE: &str = "lambda";

/// What all requests share.
pub(crate) struct Front {
    pub(crate) api: Arc<Api>,
    pub(crate) s3: S3Endpoint,
    pub(crate) turns: Arc<Semaphore>,
    pub(crate) request_timeout: Duration,
    /// Labels: operation (a fixed set) and status code.
    pub(crate) requests: IntCounterVec,
    pub(crate) extras: Extras,
}

/// A request that an operation answers, whole.
struct Whole {
    head: http::request::Parts,
    body: Bytes,
}

/// Answers any request.
pub(crate) async fn handle(State(front): State<Arc<Front>>, request: Request<Body>) -> Response {
    if is_s3(&request) {
        let response = front.s3.answer(request).await;
        front.count("S3", &response);
        return response;
    }
    let id = uuid::Uuid::new_v4().to_string();
    let found = routes::find(request.method(), request.uri().path()).map(|found| found.operation);
    let path = request.uri().path();
    let extra = path.starts_with(extras::PREFIX);
    let operation = match found {
        Some(operation) => operation.name(),
        None if extra => extras::name(path),
        None => "Unknown",
    };
    let answered = if extra { extras::answer(&front, request).await } else { answer(&front, request).await.map(IntoResponse::into_response) };
    let mut response = match answered {
        Ok(response) => response,
        Err(mut error) => {
            if error.kind == ErrorKind::Throttling && found.is_some_and(Operation::is_of_tags) {
                error.kind = ErrorKind::TooManyRequests;
            }
            tracing::debug!(request.id = %id, operation, kind = ?error.kind, message = error.message, "an API call was refused");
            error.into_response()
        }
    };
    tracing::debug!(request.id = %id, operation, status = response.status().as_u16(), "an API call was answered");
    front.count(operation, &response);
    let id = HeaderValue::from_str(&id).expect("a uuid is header text");
    response.headers_mut().insert("x-amzn-requestid", id);
    response
}

impl Front {
    fn count(&self, operation: &str, response: &Response) {
        self.requests.with_label_values(&[operation, response.status().as_str()]).inc();
    }
}

/// What is signed for S3 is S3's, what is signed for something else is not; what is not signed is judged by its path.
fn is_s3(request: &Request<Body>) -> bool {
    match sigv4::claimed_service(request.headers(), request.uri().query().unwrap_or_default()) {
        Some(service) => service == "s3",
        None => !routes::is_api_path(request.uri().path()),
    }
}

async fn answer(front: &Front, request: Request<Body>) -> Result<Answer, ApiError> {
    let deadline = Instant::now() + front.request_timeout;
    let (head, body) = request.into_parts();
    let body = timeout_at(deadline, whole_body(body))
        .await
        .map_err(|_| ApiError::validation("The body of the request did not arrive in time."))??;
    let turn = timeout_at(deadline, Arc::clone(&front.turns).acquire_owned()).await;
    let Ok(Ok(turn)) = turn else {
        return Err(ApiError::new(ErrorKind::Throttling, "Rate exceeded: this node works on as many requests as it may."));
    };
    let api = Arc::clone(&front.api);
    // Held by this request; when its client leaves, the task ends by itself and its turn bounds how many there are.
    let work = tokio::spawn(async move {
        let answer = work(&api, Whole { head, body }).await;
        drop(turn);
        answer
    });
    match timeout_at(deadline, work).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(panicked)) => Err(ApiError::internal("answering the request", &panicked)),
        Err(_) => Err(ApiError::new(
            ErrorKind::Internal,
            format!("The request was not done within {:?}. It goes on; ask for the state before trying again.", front.request_timeout),
        )),
    }
}

async fn whole_body(body: Body) -> Result<Bytes, ApiError> {
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(ApiError::new(ErrorKind::RequestTooLarge, format!("The body is larger than {MAX_BODY_BYTES} bytes.")))
        }
        Err(_) => Err(ApiError::validation("The body of the request ended early.")),
    }
}

async fn work(api: &Api, request: Whole) -> Result<Answer, ApiError> {
    let (caller, operation, input) = check(api, &request)?;
    operations::call(api, &caller, operation, input).await
}

/// Who signed a request of this API.
pub(crate) fn signed_by(api: &Api, head: &http::request::Parts, body: &[u8]) -> Result<Caller, ApiError> {
    let signed = Signed {
        method: head.method.as_str(),
        path: head.uri.path(),
        query: head.uri.query().unwrap_or_default(),
        headers: &head.headers,
        authority: head.uri.authority().map(|authority| authority.as_str()),
        body,
    };
    let keys = &api.parts.access_keys;
    let expected = Expected { region: &api.config.region, service: SERVICE, now: api.parts.clock.wall(), secret: &|id| keys.secret(id) };
    Ok(Caller { key: sigv4::verify(&signed, &expected)? })
}

/// Signature, route and model; who asks, and for what.
fn check(api: &Api, request: &Whole) -> Result<(Caller, Operation, Value), ApiError> {
    let (path, query) = (request.head.uri.path(), request.head.uri.query().unwrap_or_default());
    let caller = signed_by(api, &request.head, &request.body)?;
    let found = routes::find(&request.head.method, path).ok_or_else(routes::unknown)?;
    let input = found.gather(query, &request.body)?;
    let least_idle = i64::try_from(api.config.least_idle.as_secs()).unwrap_or(i64::MAX);
    shape::check(found.operation.input(), &input, &[("idlePolicy.maxIdleDurationSeconds", least_idle)])?;
    Ok((caller, found.operation, input))
}
