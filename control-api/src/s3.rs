//! The embedded S3 endpoint, where the code of images is uploaded.
//!
//! Owns: the bridge to `s3s` and its file-system store: buckets are directories, objects are files, the access keys are
//! those of the API. Path-style addresses only. `s3s` verifies the signatures itself. Keys that would climb out of their
//! bucket's directory are refused here, because the store resolves them (s3s-fs 0.14 keeps inside its root only).

use std::{panic::AssertUnwindSafe, path::Path};

use axum::{body::Body, response::Response};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
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

/// Removes what the store keeps beside its objects and what is not about them as they are: of objects that are not there any more (it
/// leaves that when one is deleted), and of those that were replaced when the node was killed, since it writes the object first. No
/// client reads an object against the checksum of another.
fn forget_past(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let object = name.to_str().and_then(object_of);
        if let Some((bucket, key)) = object
            && !is_about(&entry.metadata()?, &dir.join(bucket).join(key))?
        {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether what is kept was written after the object.
fn is_about(kept: &std::fs::Metadata, object: &Path) -> std::io::Result<bool> {
    match std::fs::metadata(object) {
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(false),
        object => Ok(kept.modified()? >= object?.modified()?),
    }
}

/// The bucket and the key that a file of s3s-fs 0.14 beside the buckets is about, `.bucket-<base64>.object-<base64>.<what>.json`.
/// Those of uploads under way, which have one more part, are of objects that may yet come.
fn object_of(name: &str) -> Option<(String, String)> {
    let parts: Vec<&str> = name.strip_prefix('.')?.split('.').collect();
    let [bucket, object, "metadata" | "internal", "json"] = parts[..] else { return None };
    let text = |encoded: &str| String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(encoded).ok()?).ok();
    let (bucket, key) = (text(bucket.strip_prefix("bucket-")?)?, text(object.strip_prefix("object-")?)?);
    plain(&key).is_ok().then_some((bucket, key))
}

impl S3Endpoint {
    /// Opens the store; its directory is made if it is missing.
    pub(crate) fn open(dir: &Path, keys: AccessKeys) -> Result<Self, OpenError> {
        let error = |what: &str, source| OpenError { doing: format!("{what} the S3 directory {}", dir.display()), source };
        std::fs::create_dir_all(dir).map_err(|cause| error("making", Box::new(cause)))?;
        forget_past(dir).map_err(|cause| error("tidying", Box::new(cause)))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_an_object_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("code/a")).unwrap();
        std::fs::write(dir.path().join("code/a/b.zip"), "zip").unwrap();
        let beside = |bucket: &str, key: &str, what: &str| {
            let text = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
            format!(".bucket-{}.object-{}.{what}.json", text(bucket), text(key))
        };
        let upload = beside("code", "c.zip", "upload-0e5dd0a8-0f4d-4ac4-9f25-e0b5e06a1c3d.metadata");
        let kept = [beside("code", "a/b.zip", "internal"), beside("code", "a/b.zip", "metadata"), upload, ".something".to_owned()];
        let goes = [beside("code", "gone.zip", "internal"), beside("gone", "a", "metadata")];
        for name in kept.iter().chain(&goes) {
            std::fs::write(dir.path().join(name), "{}").unwrap();
        }
        let older = beside("code", "new.zip", "internal");
        std::fs::write(dir.path().join(&older), "{}").unwrap();
        let object = std::fs::File::create(dir.path().join("code/new.zip")).unwrap();
        object.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1)).unwrap();
        forget_past(dir.path()).unwrap();
        assert!(!dir.path().join(&older).exists(), "the checksum of what was there before");
        assert!(kept.iter().all(|name| dir.path().join(name).exists()));
        assert!(goes.iter().all(|name| !dir.path().join(name).exists()));
        assert!(dir.path().join("code/a/b.zip").exists());
    }
}
