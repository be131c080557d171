//! What callers read: answers and refusals in AWS's form (aws-behaviour §7.3).
//!
//! Owns: the error types with their status codes and body members. The only place that turns either into HTTP.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

/// The types of errors this API answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ErrorKind {
    Validation,
    /// A body or parameter that has not even the types of the model.
    Serialization,
    /// A cursor or such that AWS refuses without a word.
    BadCursor,
    AccessDenied,
    MissingAuthenticationToken,
    IncompleteSignature,
    InvalidSignature,
    UnrecognizedClient,
    ResourceNotFound,
    UnknownOperation,
    Conflict,
    /// The tag operations are of Lambda's older API and say so in its way.
    InvalidParameterValue,
    TooManyRequests,
    RequestTooLarge,
    ServiceQuotaExceeded,
    Throttling,
    Internal,
}

impl ErrorKind {
    /// The name in `x-amzn-errortype`, the status, and a word for `x-dormouse-reason`.
    fn wire(self) -> (&'static str, StatusCode, &'static str) {
        match self {
            Self::Validation => ("ValidationException", StatusCode::BAD_REQUEST, "validation"),
            Self::Serialization => ("SerializationException", StatusCode::BAD_REQUEST, "serialization"),
            Self::BadCursor => ("ValidationException", StatusCode::BAD_REQUEST, "bad-cursor"),
            Self::AccessDenied => ("AccessDeniedException", StatusCode::FORBIDDEN, "access-denied"),
            Self::MissingAuthenticationToken => ("MissingAuthenticationTokenException", StatusCode::FORBIDDEN, "not-signed"),
            Self::IncompleteSignature => ("IncompleteSignatureException", StatusCode::FORBIDDEN, "incomplete-signature"),
            Self::InvalidSignature => ("InvalidSignatureException", StatusCode::FORBIDDEN, "invalid-signature"),
            Self::UnrecognizedClient => ("UnrecognizedClientException", StatusCode::FORBIDDEN, "unknown-access-key"),
            Self::ResourceNotFound => ("ResourceNotFoundException", StatusCode::NOT_FOUND, "not-found"),
            Self::UnknownOperation => ("UnknownOperationException", StatusCode::NOT_FOUND, "unknown-operation"),
            Self::Conflict => ("ConflictException", StatusCode::CONFLICT, "conflict"),
            Self::InvalidParameterValue => ("InvalidParameterValueException", StatusCode::BAD_REQUEST, "invalid-parameter"),
            Self::TooManyRequests => ("TooManyRequestsException", StatusCode::TOO_MANY_REQUESTS, "busy"),
            Self::RequestTooLarge => ("RequestTooLargeException", StatusCode::PAYLOAD_TOO_LARGE, "body-too-large"),
            Self::ServiceQuotaExceeded => ("ServiceQuotaExceededException", StatusCode::PAYMENT_REQUIRED, "quota"),
            Self::Throttling => ("ThrottlingException", StatusCode::TOO_MANY_REQUESTS, "busy"),
            Self::Internal => ("InternalServerException", StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }
}

/// A refusal: its type and what the caller reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) kind: ErrorKind,
    /// AWS refuses some things with a null message.
    pub(crate) message: Option<String>,
    /// Whole seconds; said to those who are throttled, and for faults of ours.
    pub(crate) retry_after: Duration,
}

impl ApiError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: Some(message.into()), retry_after: Duration::from_secs(1) }
    }

    pub(crate) fn silent(kind: ErrorKind) -> Self {
        Self { message: None, ..Self::new(kind, "") }
    }

    /// The same, to be tried again after `retry_after`, whole seconds.
    pub(crate) fn after(self, retry_after: Duration) -> Self {
        Self { retry_after, ..self }
    }

    pub(crate) fn validation(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Validation, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::ResourceNotFound, message)
    }

    /// Our fault: the log gets the cause, the caller only that it was not theirs.
    pub(crate) fn internal(doing: &str, cause: &(dyn std::error::Error + 'static)) -> Self {
        let mut chain = cause.to_string();
        let mut next = cause.source();
        while let Some(cause) = next {
            chain.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        tracing::error!(doing, error = %chain, "an API call failed on our side");
        Self::new(ErrorKind::Internal, format!("{doing} failed on this node; its log says why."))
    }

    fn body(&self) -> Value {
        let mut body = Map::new();
        // Coral spells it so for what its parser refuses (M80).
        let key = if self.kind == ErrorKind::Serialization { "Message" } else { "message" };
        body.insert(key.to_owned(), json!(self.message));
        let nulls: &[&str] = match self.kind {
            ErrorKind::ResourceNotFound | ErrorKind::Conflict => &["resourceId", "resourceType"],
            ErrorKind::ServiceQuotaExceeded => &["quotaCode", "serviceCode", "resourceId", "resourceType"],
            ErrorKind::Throttling => &["quotaCode", "serviceCode"],
            _ => &[],
        };
        if matches!(self.kind, ErrorKind::InvalidParameterValue | ErrorKind::TooManyRequests) {
            body.insert("Type".to_owned(), json!("User"));
        }
        for name in nulls {
            body.insert((*name).to_owned(), Value::Null);
        }
        Value::Object(body)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (name, status, reason) = self.kind.wire();
        let mut response = json_response(status, &self.body());
        response.headers_mut().insert("x-amzn-errortype", HeaderValue::from_static(name));
        response.headers_mut().insert("x-dormouse-reason", HeaderValue::from_static(reason));
        if matches!(self.kind, ErrorKind::Throttling | ErrorKind::TooManyRequests | ErrorKind::Internal) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after.as_secs()));
        }
        response
    }
}

/// What an operation that worked answers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn ok(body: Value) -> Self {
        Self { status: StatusCode::OK, body }
    }

    pub(crate) fn created(body: Value) -> Self {
        Self { status: StatusCode::CREATED, body }
    }

    /// What a change of tags answers: nothing.
    pub(crate) fn no_content() -> Self {
        Self { status: StatusCode::NO_CONTENT, body: Value::Null }
    }

    /// `{}`: what suspend, resume and terminate answer.
    pub(crate) fn empty() -> Self {
        Self::ok(json!({}))
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        if self.status == StatusCode::NO_CONTENT {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = self.status;
            return response;
        }
        json_response(self.status, &self.body)
    }
}

fn json_response(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Epoch seconds with a fraction, as AWS writes them (aws-behaviour §7.2).
pub(crate) fn timestamp(time: SystemTime) -> Value {
    let millis = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    json!(millis as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refusals_have_the_type_the_status_and_the_members_of_the_model() {
        for (error, status, kind, body) in [
            (ApiError::validation("no"), 400, "ValidationException", r#"{"message":"no"}"#),
            (ApiError::silent(ErrorKind::BadCursor), 400, "ValidationException", r#"{"message":null}"#),
            (ApiError::new(ErrorKind::Serialization, "Expected null"), 400, "SerializationException", r#"{"Message":"Expected null"}"#),
            (ApiError::not_found("gone"), 404, "ResourceNotFoundException", r#"{"message":"gone","resourceId":null,"resourceType":null}"#),
            (ApiError::new(ErrorKind::Conflict, "c"), 409, "ConflictException", r#"{"message":"c","resourceId":null,"resourceType":null}"#),
            (
                ApiError::new(ErrorKind::ServiceQuotaExceeded, "full"),
                402,
                "ServiceQuotaExceededException",
                r#"{"message":"full","quotaCode":null,"serviceCode":null,"resourceId":null,"resourceType":null}"#,
            ),
            (ApiError::new(ErrorKind::Throttling, "t"), 429, "ThrottlingException", r#"{"message":"t","quotaCode":null,"serviceCode":null}"#),
            (ApiError::new(ErrorKind::InvalidParameterValue, "p"), 400, "InvalidParameterValueException", r#"{"Type":"User","message":"p"}"#),
            (ApiError::new(ErrorKind::TooManyRequests, "t"), 429, "TooManyRequestsException", r#"{"Type":"User","message":"t"}"#),
            (ApiError::new(ErrorKind::Internal, "i"), 500, "InternalServerException", r#"{"message":"i"}"#),
        ] {
            let response = error.into_response();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()["x-amzn-errortype"], kind);
            assert!(response.headers().contains_key("x-dormouse-reason"));
            let told = axum::body::to_bytes(response.into_body(), 1_000).await.unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&told).unwrap(), serde_json::from_str::<Value>(body).unwrap());
        }
    }

    #[test]
    fn timestamps_are_floats_with_milliseconds() {
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_millis(1_790_000_000_123)).to_string(), "1790000000.123");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(1_790_000_000)).to_string(), "1790000000.0");
    }
}
