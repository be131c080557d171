//! Where the code of an image lies on this host.
//!
//! Owns: the forms of a codeArtifact URI: `s3://bucket/key` in the embedded S3, and `file:///path` where the operator
//! allows it. Never leaves the bucket: a key is taken apart and may not climb. Never reads the node's own data, by whatever
//! name. Whether an object is there is for the build to find out: AWS takes the request and fails the build, and so does
//! this node.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use image_builder::Artifact;
use percent_encoding::percent_decode_str;

use crate::reply::ApiError;

/// Finds the code that a URI names. Files of the host are taken if `files_but` is given, but none in that directory.
pub(crate) fn locate(uri: &str, s3_dir: &Path, files_but: Option<&Path>) -> Result<Artifact, ApiError> {
    if let Some(rest) = uri.strip_prefix("s3://") {
        return in_s3(uri, rest, s3_dir);
    }
    if let (Some(path), Some(data_dir)) = (uri.strip_prefix("file://"), files_but) {
        return on_host(path, data_dir);
    }
    Err(malformed())
}

fn malformed() -> ApiError {
    ApiError::validation("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>")
}

fn in_s3(uri: &str, rest: &str, s3_dir: &Path) -> Result<Artifact, ApiError> {
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
    Ok(Artifact::Object { uri: uri.to_owned(), bucket, object })
}

fn on_host(path: &str, data_dir: &Path) -> Result<Artifact, ApiError> {
    let path = PathBuf::from(percent_decode_str(path).decode_utf8().map_err(|_| malformed())?.as_ref());
    if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(ApiError::validation("CodeArtifact URI must name an absolute path of this host: file:///<path>"));
    }
    let shown = path.display();
    let unreadable = |cause: io::Error| ApiError::validation(format!("CodeArtifact {shown} cannot be read on the host of this node: {cause}"));
    // Links are followed here, once; the builder is given the place they led to, and follows none inside it.
    let place = path.canonicalize().map_err(unreadable)?;
    let data = data_dir.canonicalize().map_err(|cause| ApiError::internal("looking for the node's data directory", &cause))?;
    let about = std::fs::metadata(&place).map_err(unreadable)?;
    // The keys of the node, its tokens' key and other people's images lie there.
    if place.starts_with(&data) || (about.is_dir() && data.starts_with(&place)) {
        return Err(ApiError::validation(format!("CodeArtifact {shown} lies in the data directory of this node, or holds it; copy the code elsewhere")));
    }
    if about.is_dir() {
        Ok(Artifact::Directory(place))
    } else if about.is_file() {
        Ok(Artifact::Zip(place))
    } else {
        Err(ApiError::validation(format!("CodeArtifact {shown} is neither a directory nor a zip file")))
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
        let locate = |uri: &str| locate(uri, dir.path(), Some(Path::new("/nowhere")));
        for uri in ["s3://code/a/app.zip", "s3://code/a", "s3://code/b.zip", "s3://other/b.zip"] {
            let Artifact::Object { uri: told, bucket, object } = locate(uri).unwrap() else { panic!("{uri} is an object") };
            assert_eq!((told.as_str(), object), (uri, dir.path().join(&uri[5..])));
            assert_eq!(bucket.parent(), Some(dir.path()), "{uri}");
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
        let (code, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let zip = code.path().join("my app.zip");
        fs::write(&zip, "zip").unwrap();
        let directory = format!("file://{}", code.path().display());
        let locate = |uri: &str| locate(uri, Path::new("/nowhere"), Some(data.path()));
        assert!(matches!(locate(&directory).unwrap(), Artifact::Directory(path) if path == code.path()));
        assert!(matches!(locate(&format!("{directory}/my%20app.zip")).unwrap(), Artifact::Zip(path) if path == zip));
        for (uri, told) in [("file://relative", "absolute"), ("file:///nowhere/at/all", "cannot be read"), ("file:///dev/null", "neither")] {
            assert!(locate(uri).unwrap_err().message.unwrap().contains(told), "{uri}");
        }
        assert!(super::locate(&directory, Path::new("/nowhere"), None).unwrap_err().message.unwrap().contains("valid S3 URI"));
    }

    #[test]
    fn the_data_of_the_node_is_no_code_by_whatever_name() {
        let (code, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let data = root.path().join("data");
        fs::create_dir_all(data.join("images/other")).unwrap();
        fs::write(data.join("credentials"), "secret").unwrap();
        fs::create_dir(root.path().join("data-of-mine")).unwrap();
        std::os::unix::fs::symlink(&data, code.path().join("link")).unwrap();
        std::os::unix::fs::symlink(data.join("credentials"), code.path().join("app.zip")).unwrap();
        let (code, root) = (code.path().display(), root.path().display());
        let locate = |uri: String| locate(&uri, Path::new("/nowhere"), Some(&data));
        for uri in [
            format!("file://{root}/data"),
            format!("file://{root}/data/credentials"),
            format!("file://{root}/data/images/other"),
            format!("file://{root}/data-of-mine/../data"),
            format!("file://{root}"),
            "file:///".to_owned(),
            format!("file://{code}/link"),
            format!("file://{code}/link/images"),
            format!("file://{code}/app.zip"),
            format!("file://{root}/data%2Fcredentials"),
        ] {
            assert!(locate(uri.clone()).unwrap_err().message.unwrap().contains("data directory"), "{uri}");
        }
        for uri in [format!("file://{code}"), format!("file://{root}/data-of-mine")] {
            assert!(locate(uri.clone()).is_ok(), "{uri}");
        }
    }
}
