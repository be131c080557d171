//! The embedded S3 endpoint, where the code of images is uploaded.
//!
//! Owns: the bridge to `s3s` and its file-system store: buckets are directories, objects are files, the access keys are
//! those of the API. Path-style addresses only. `s3s` verifies the signatures itself. Keys that would climb out of their
//! bucket's directory are refused here, because the store resolves them (s3s-fs 0.14 keeps inside its root only).

use std::{panic::AssertUnwindSafe, path::Path};

use axum::{body::Body, response::Response};
use futures::FutureExt as _;
use http::{HeaderValue, Request, StatusCode, header};
use s3s::{
    S3Request, S3Result,
    access::{S3Access, S3AccessContext},
    auth::{S3Auth, SecretKey},
    dto::{CopyObjectInput, CopySource, DeleteObjectsInput, UploadPartCopyInput},
    path::S3Path,
    s3_error,
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;

use crate::{AccessKeys, OpenError, Role};

/// The endpoint. Cheap to clone.
#[derive(Clone)]
pub(crate) struct S3Endpoint {
    service: S3Service,
}

struct Keys(AccessKeys);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        self.0.secret(access_key).map(SecretKey::from).ok_or_else(|| s3_error!(InvalidAccessKeyId))
    }
}

/// Admins and operators may do everything, with keys that are file names; nobody else has business with the code of images.
struct PlainKeys(AccessKeys);

fn plain(key: &str) -> S3Result<()> {
    let whole = key.strip_suffix('/').unwrap_or(key);
    if whole.split('/').all(|segment| !matches!(segment, "" | "." | "..") && !segment.contains('\0')) {
        return Ok(());
    }
    Err(s3_error!(InvalidArgument, "This store keeps objects as files: no segment of a key may be empty, '.' or '..'"))
}

fn plain_source(source: &CopySource) -> S3Result<()> {
    match source {
        CopySource::Bucket { key, .. } => plain(key),
        CopySource::AccessPoint { .. } | CopySource::Outpost { .. } => Err(s3_error!(NotImplemented)),
    }
}

#[async_trait::async_trait]
impl S3Access for PlainKeys {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(credentials) = context.credentials() else {
            return Err(s3_error!(AccessDenied, "Signature is required"));
        };
        let caller = self.0.caller(&credentials.access_key);
        if !caller.is_some_and(|caller| matches!(caller.role, Some(Role::Admin | Role::Operator))) {
            return Err(s3_error!(AccessDenied, "Access Denied: this access key has neither the role admin nor operator"));
        }
        match context.s3_path() {
            S3Path::Object { key, .. } => plain(key),
            S3Path::Root | S3Path::Bucket { .. } => Ok(()),
        }
    }

    async fn copy_object(&self, request: &mut S3Request<CopyObjectInput>) -> S3Result<()> {
        plain_source(&request.input.copy_source)
    }

    async fn upload_part_copy(&self, request: &mut S3Request<UploadPartCopyInput>) -> S3Result<()> {
        plain_source(&request.input.copy_source)
    }

    async fn delete_objects(&self, request: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        request.input.delete.objects.iter().try_for_each(|object| plain(&object.key))
    }
}

impl S3Endpoint {
    /// Opens the store; its directory is made if it is missing.
    pub(crate) fn open(dir: &Path, keys: AccessKeys) -> Result<Self, OpenError> {
        let error = |what: &str, source| OpenError { doing: format!("{what} the S3 directory {}", dir.display()), source };
        std::fs::create_dir_all(dir).map_err(|cause| error("making", Box::new(cause)))?;
        let store = FileSystem::new(dir).map_err(|cause| error("opening", format!("{cause:?}").into()))?;
        let mut builder = S3ServiceBuilder::new(store);
        builder.set_auth(Keys(keys.clone()));
        builder.set_access(PlainKeys(keys));
        Ok(Self { service: builder.build() })
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Body>) -> Response {
        // The body of an upload is streamed to its file and never held. The store's code is not ours, so a panic of it is
        // taken for a failure of this one request; nothing of ours is shared with it.
        let answer = AssertUnwindSafe(self.service.call(request.map(s3s::Body::http_body_unsync))).catch_unwind();
        let cause = match answer.await {
            Ok(Ok(response)) => return response.map(Body::new),
            Ok(Err(error)) => format!("{error:?}"),
            Err(_) => "a panic in the store".to_owned(),
        };
        tracing::error!(cause, "an S3 request failed on our side");
        let mut response = Response::new(Body::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>InternalError</Code></Error>"));
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
        response
    }
}
