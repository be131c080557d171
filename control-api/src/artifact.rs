//! Where the code of an image lies on this host.
//!
//! Owns: the forms of a codeArtifact URI: `s3://bucket/key` in the embedded S3, and `file:///path` where the operator
//! allows it. Never leaves the bucket: a key is taken apart and may not climb.

use std::path::{Component, Path, PathBuf};

use image_builder::Artifact;
use percent_encoding::percent_decode_str;

use crate::reply::ApiError;

/// A codeArtifact, found or not.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) artifact: Artifact,
    /// Why the build must fail (aws-behaviour §5.1), if the object was not there when the image was asked for. AWS takes
    /// the request and fails the build, and so does this node.
    pub(crate) missing: Option<&'static str>,
}

/// Finds the code that a URI names.
pub(crate) fn locate(uri: &str, s3_dir: &Path, allow_files: bool) -> Result<Located, ApiError> {
    if let Some(rest) = uri.strip_prefix("s3://") {
        return in_s3(rest, s3_dir);
    }
    if let Some(path) = uri.strip_prefix("file://").filter(|_| allow_files) {
        return on_host(path);
    }
    Err(malformed())
}

fn malformed() -> ApiError {
    ApiError::validation("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>")
}

fn in_s3(rest: &str, s3_dir: &Path) -> Result<Located, ApiError> {
    let (bucket, key) = rest.split_once('/').ok_or_else(malformed)?;
    let is_bucket = (3..=63).contains(&bucket.len())
        && bucket.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.')
        && bucket.as_bytes()[0].is_ascii_alphanumeric();
    let climbs = !Path::new(key).components().all(|part| matches!(part, Component::Normal(_)));
    if !is_bucket || key.is_empty() || climbs || key.contains('\0') {
        return Err(malformed());
    }
    let bucket = s3_dir.join(bucket);
    let object = bucket.join(key);
    let missing = match (bucket.is_dir(), object.is_file()) {
        (_, true) => None,
        (true, false) => Some("S3_NO_SUCH_KEY"),
        (false, false) => Some("S3_NO_SUCH_BUCKET"),
    };
    Ok(Located { artifact: Artifact::Zip(object), missing })
}

fn on_host(path: &str) -> Result<Located, ApiError> {
    let path = PathBuf::from(percent_decode_str(path).decode_utf8().map_err(|_| malformed())?.as_ref());
    if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(ApiError::validation("CodeArtifact URI must name an absolute path of this host: file:///<path>"));
    }
    let shown = path.display();
    match std::fs::metadata(&path) {
        Ok(about) if about.is_dir() => Ok(Located { artifact: Artifact::Directory(path), missing: None }),
        Ok(about) if about.is_file() => Ok(Located { artifact: Artifact::Zip(path), missing: None }),
        Ok(_) => Err(ApiError::validation(format!("CodeArtifact {shown} is neither a directory nor a zip file"))),
        Err(cause) => Err(ApiError::validation(format!("CodeArtifact {shown} cannot be read on the host of this node: {cause}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn objects_are_files_of_their_bucket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("code/a")).unwrap();
        fs::write(dir.path().join("code/a/app.zip"), "zip").unwrap();
        fs::write(dir.path().join("outside"), "secret").unwrap();
        let locate = |uri: &str| locate(uri, dir.path(), true);
        for (uri, missing) in [
            ("s3://code/a/app.zip", None),
            ("s3://code/a", Some("S3_NO_SUCH_KEY")),
            ("s3://code/b.zip", Some("S3_NO_SUCH_KEY")),
            ("s3://other/b.zip", Some("S3_NO_SUCH_BUCKET")),
        ] {
            let located = locate(uri).unwrap();
            assert_eq!(located.missing, missing, "{uri}");
            assert!(matches!(located.artifact, Artifact::Zip(path) if path == dir.path().join(&uri[5..])));
        }
        for uri in [
            "", "code/a", "s3://", "s3://code", "s3://code/", "s3:///a", "s3://../outside", "s3://code/../outside", "s3://code//etc/passwd",
            "s3://code/a/../../outside", "s3://.upload/a", "s3://CODE/a", "https://code/a", "file:/etc", "s3://co/a",
        ] {
            assert!(locate(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn files_of_the_host_are_taken_only_where_that_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let zip = dir.path().join("my app.zip");
        fs::write(&zip, "zip").unwrap();
        let directory = format!("file://{}", dir.path().display());
        let s3 = Path::new("/nowhere");
        assert!(matches!(locate(&directory, s3, true).unwrap().artifact, Artifact::Directory(path) if path == dir.path()));
        assert!(matches!(locate(&format!("{directory}/my%20app.zip"), s3, true).unwrap().artifact, Artifact::Zip(path) if path == zip));
        for (uri, told) in [("file://relative", "absolute"), ("file:///nowhere/at/all", "cannot be read"), ("file:///dev/null", "neither")] {
            assert!(locate(uri, s3, true).unwrap_err().message.unwrap().contains(told), "{uri}");
        }
        assert!(locate(&directory, s3, false).unwrap_err().message.unwrap().contains("valid S3 URI"));
    }
}
