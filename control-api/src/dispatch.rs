//! From an HTTP request to an operation's answer.
//!
//! ```text
//! request ─► S3? ───────────────────────────────────────────────────────────────────────► s3s
//!        └─► signature's header ─► body (bounded) ─► signature ─► route ─► replay ─► rate ─► turn
//!                                        answer ◄─ operation ◄─ model ◄─ role ◄───────────────┘
//! ```
//!
//! Owns: the order of the checks, the bounds on body, time and number, request ids, the request counter. Nothing of a
//! request is kept, and no turn taken, before its header names a key that there is; none is worked on before its signature
//! is found good. A request that has its turn goes on to its end when its client leaves, so that no operation is left half
//! done.

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
    authorization,
    caller::Caller,
    extras::{self, Extras},
    operations::{self, Api},
    rates::Allowances,
    replays::Replays,
    reply::{Answer, ApiError, ErrorKind},
    routes::{self, Operation},
    s3::S3Endpoint,
    shape,
    sigv4::{self, Expected, Signed},
};

/// The largest request of the model is a CreateMicrovmImage with 100 variables of 4096 characters; that fits twice.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// How long a request that is refused by its header may take to send the rest, which is thrown away: a client that is
/// cut off while it sends does not read the refusal.
const DISCARD_DEADLINE: Duration = Duration::from_secs(5);
/// Signing name of the API.
const SERVICE: &str = "lambda";

/// What all requests share.
pub(crate) struct Front {
    pub(crate) api: Arc<Api>,
    pub(crate) s3: S3Endpoint,
    /// For requests that are worked on.
    pub(crate) turns: Arc<Semaphore>,
    /// For bodies that are received: each may be [`MAX_BODY_BYTES`] long, and its signature is not known to be good.
    pub(crate) bodies: Semaphore,
    pub(crate) allowances: Allowances,
    pub(crate) replays: Replays,
    pub(crate) request_timeout: Duration,
    /// Labels: operation (a fixed set) and status code.
    pub(crate) requests: IntCounterVec,
    pub(crate) extras: Extras,
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
    let pending = match begin(&front.api, &head) {
        Ok(pending) => pending,
        Err(refused) => {
            discard(body).await;
            return Err(refused);
        }
    };
    let place = timeout_at(deadline, front.bodies.acquire()).await;
    let Ok(Ok(place)) = place else { return Err(busy()) };
    let body = timeout_at(deadline, whole_body(body))
        .await
        .map_err(|_| ApiError::validation("The body of the request did not arrive in time."))??;
    drop(place);
    let verified = pending.finish(&body)?;
    let caller = caller(&front.api, &verified)?;
    let operation = routes::find(&head.method, head.uri.path()).ok_or_else(routes::unknown)?.operation;
    if operation.acts() && !verified.presigned {
        front.replays.note(verified.signature, front.api.parts.clock.wall())?;
    }
    front.allowances.take(&caller.key, operation)?;
    let Ok(Ok(turn)) = timeout_at(deadline, Arc::clone(&front.turns).acquire_owned()).await else { return Err(busy()) };
    let api = Arc::clone(&front.api);
    // Held by this request; when its client leaves, the task ends by itself and its turn bounds how many there are.
    let work = tokio::spawn(async move {
        let answer = match read(&api, &caller, &head, &body) {
            Ok(input) => operations::call(&api, &caller, operation, input).await,
            Err(refused) => Err(refused),
        };
        if let Ok(answer) = &answer {
            extras::name_log(&api, operation, answer).await;
        }
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

fn busy() -> ApiError {
    ApiError::new(ErrorKind::Throttling, "Rate exceeded: this node works on as many requests as it may.")
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

/// Reads a body that nobody wants, as far as an honest one goes, and keeps none of it.
async fn discard(body: Body) {
    let mut body = std::pin::pin!(Limited::new(body, MAX_BODY_BYTES));
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    // One that takes longer is cut off.
    let _ = tokio::time::timeout(DISCARD_DEADLINE, rest).await;
}

/// Who signed a request that has no body to speak of.
pub(crate) fn signed_by(api: &Api, head: &http::request::Parts) -> Result<Caller, ApiError> {
    caller(api, &begin(api, head)?.finish(&[])?)
}

fn caller(api: &Api, verified: &sigv4::Verified) -> Result<Caller, ApiError> {
    api.parts.access_keys.caller(&verified.id).ok_or_else(|| {
        ApiError::new(ErrorKind::UnrecognizedClient, "The access key of the request was taken away while the request was received.")
    })
}

/// What of the signature can be checked before the body is there.
fn begin(api: &Api, head: &http::request::Parts) -> Result<sigv4::Pending, ApiError> {
    let signed = Signed {
        method: head.method.as_str(),
        path: head.uri.path(),
        query: head.uri.query().unwrap_or_default(),
        headers: &head.headers,
        authority: head.uri.authority().map(|authority| authority.as_str()),
    };
    let keys = &api.parts.access_keys;
    let expected = Expected { region: &api.config.region, service: SERVICE, now: api.parts.clock.wall(), secret: &|id| keys.secret(id) };
    sigv4::begin(&signed, &expected)
}

/// What is asked for, if the caller may and it fits the model.
fn read(api: &Api, caller: &Caller, head: &http::request::Parts, body: &[u8]) -> Result<Value, ApiError> {
    let found = routes::find(&head.method, head.uri.path()).ok_or_else(routes::unknown)?;
    let input = found.gather(head.uri.query().unwrap_or_default(), body)?;
    authorization::check(api, caller, found.operation, &input)?;
    let least_idle = i64::try_from(api.config.least_idle.as_secs()).unwrap_or(i64::MAX);
    shape::check(found.operation.input(), &input, &[("idlePolicy.maxIdleDurationSeconds", least_idle)])?;
    Ok(input)
}
