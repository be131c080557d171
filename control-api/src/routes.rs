//! Which operation a method and path mean.
//!
//! Path labels are decoded exactly once, after the match: an encoded slash stays inside its label.

use http::Method;
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

use crate::{
    extras,
    model_shapes as shapes,
    reply::{ApiError, ErrorKind},
    shape::{Shape, serialization},
};

/// Every operation of API version 2025-09-09.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    RunMicrovm,
    ListMicrovms,
    GetMicrovm,
    TerminateMicrovm,
    SuspendMicrovm,
    ResumeMicrovm,
    CreateMicrovmAuthToken,
    CreateMicrovmShellAuthToken,
    CreateMicrovmImage,
    ListMicrovmImages,
    GetMicrovmImage,
    UpdateMicrovmImage,
    DeleteMicrovmImage,
    ListMicrovmImageVersions,
    GetMicrovmImageVersion,
    UpdateMicrovmImageVersion,
    DeleteMicrovmImageVersion,
    ListMicrovmImageBuilds,
    GetMicrovmImageBuild,
    ListManagedMicrovmImages,
    ListManagedMicrovmImageVersions,
    ListTags,
    TagResource,
    UntagResource,
}

use Operation as Op;

const TABLE: [(&str, &str, Operation); 24] = [
    ("POST", "/2025-09-09/microvms", Op::RunMicrovm),
    ("GET", "/2025-09-09/microvms", Op::ListMicrovms),
    ("GET", "/2025-09-09/microvms/{microvmIdentifier}", Op::GetMicrovm),
    ("DELETE", "/2025-09-09/microvms/{microvmIdentifier}", Op::TerminateMicrovm),
    ("POST", "/2025-09-09/microvms/{microvmIdentifier}/suspend", Op::SuspendMicrovm),
    ("POST", "/2025-09-09/microvms/{microvmIdentifier}/resume", Op::ResumeMicrovm),
    ("POST", "/2025-09-09/microvms/{microvmIdentifier}/auth-token", Op::CreateMicrovmAuthToken),
    ("POST", "/2025-09-09/microvms/{microvmIdentifier}/shell-auth-token", Op::CreateMicrovmShellAuthToken),
    ("POST", "/2025-09-09/microvm-images", Op::CreateMicrovmImage),
    ("GET", "/2025-09-09/microvm-images", Op::ListMicrovmImages),
    ("GET", "/2025-09-09/microvm-images/{imageIdentifier}", Op::GetMicrovmImage),
    ("PUT", "/2025-09-09/microvm-images/{imageIdentifier}", Op::UpdateMicrovmImage),
    ("DELETE", "/2025-09-09/microvm-images/{imageIdentifier}", Op::DeleteMicrovmImage),
    ("GET", "/2025-09-09/microvm-images/{imageIdentifier}/versions", Op::ListMicrovmImageVersions),
    ("GET", "/2025-09-09/microvm-images/{imageIdentifier}/versions/{imageVersion}", Op::GetMicrovmImageVersion),
    ("PATCH", "/2025-09-09/microvm-images/{imageIdentifier}/versions/{imageVersion}", Op::UpdateMicrovmImageVersion),
    ("DELETE", "/2025-09-09/microvm-images/{imageIdentifier}/versions/{imageVersion}", Op::DeleteMicrovmImageVersion),
    ("GET", "/2025-09-09/microvm-images/{imageIdentifier}/versions/{imageVersion}/builds", Op::ListMicrovmImageBuilds),
    ("GET", "/2025-09-09/microvm-images/{imageIdentifier}/versions/{imageVersion}/builds/{buildId}", Op::GetMicrovmImageBuild),
    ("GET", "/2025-09-09/managed-microvm-images", Op::ListManagedMicrovmImages),
    ("GET", "/2025-09-09/managed-microvm-images/{imageIdentifier}/versions", Op::ListManagedMicrovmImageVersions),
    ("GET", "/2017-03-31/tags/{Resource}", Op::ListTags),
    ("POST", "/2017-03-31/tags/{Resource}", Op::TagResource),
    ("DELETE", "/2017-03-31/tags/{Resource}", Op::UntagResource),
];

/// Whether a path belongs to this API at all; everything else is S3's.
pub(crate) fn is_api_path(path: &str) -> bool {
    ["/2025-09-09/", "/2017-03-31/", extras::PREFIX].iter().any(|prefix| path.starts_with(prefix))
}

impl Operation {
    /// As in AWS's model; also the metric's label.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::RunMicrovm => "RunMicrovm",
            Op::ListMicrovms => "ListMicrovms",
            Op::GetMicrovm => "GetMicrovm",
            Op::TerminateMicrovm => "TerminateMicrovm",
            Op::SuspendMicrovm => "SuspendMicrovm",
            Op::ResumeMicrovm => "ResumeMicrovm",
            Op::CreateMicrovmAuthToken => "CreateMicrovmAuthToken",
            Op::CreateMicrovmShellAuthToken => "CreateMicrovmShellAuthToken",
            Op::CreateMicrovmImage => "CreateMicrovmImage",
            Op::ListMicrovmImages => "ListMicrovmImages",
            Op::GetMicrovmImage => "GetMicrovmImage",
            Op::UpdateMicrovmImage => "UpdateMicrovmImage",
            Op::DeleteMicrovmImage => "DeleteMicrovmImage",
            Op::ListMicrovmImageVersions => "ListMicrovmImageVersions",
            Op::GetMicrovmImageVersion => "GetMicrovmImageVersion",
            Op::UpdateMicrovmImageVersion => "UpdateMicrovmImageVersion",
            Op::DeleteMicrovmImageVersion => "DeleteMicrovmImageVersion",
            Op::ListMicrovmImageBuilds => "ListMicrovmImageBuilds",
            Op::GetMicrovmImageBuild => "GetMicrovmImageBuild",
            Op::ListManagedMicrovmImages => "ListManagedMicrovmImages",
            Op::ListManagedMicrovmImageVersions => "ListManagedMicrovmImageVersions",
            Op::ListTags => "ListTags",
            Op::TagResource => "TagResource",
            Op::UntagResource => "UntagResource",
        }
    }

    /// What its input must be.
    pub(crate) fn input(self) -> &'static Shape {
        match self {
            Op::RunMicrovm => &shapes::RUN_MICROVM,
            Op::ListMicrovms => &shapes::LIST_MICROVMS,
            Op::GetMicrovm | Op::TerminateMicrovm | Op::SuspendMicrovm | Op::ResumeMicrovm => &shapes::MICROVM_INPUT,
            Op::CreateMicrovmAuthToken => &shapes::CREATE_AUTH_TOKEN,
            Op::CreateMicrovmShellAuthToken => &shapes::CREATE_SHELL_AUTH_TOKEN,
            Op::CreateMicrovmImage => &shapes::CREATE_IMAGE,
            Op::ListMicrovmImages => &shapes::LIST_IMAGES,
            Op::GetMicrovmImage | Op::DeleteMicrovmImage => &shapes::IMAGE_INPUT,
            Op::UpdateMicrovmImage => &shapes::UPDATE_IMAGE,
            Op::ListMicrovmImageVersions | Op::ListManagedMicrovmImageVersions => &shapes::LIST_OF_IMAGE,
            Op::GetMicrovmImageVersion | Op::DeleteMicrovmImageVersion => &shapes::IMAGE_VERSION_INPUT,
            Op::UpdateMicrovmImageVersion => &shapes::UPDATE_IMAGE_VERSION,
            Op::ListMicrovmImageBuilds => &shapes::LIST_BUILDS,
            Op::GetMicrovmImageBuild => &shapes::GET_BUILD,
            Op::ListManagedMicrovmImages => &shapes::LIST_MANAGED_IMAGES,
            Op::ListTags => &shapes::LIST_TAGS,
            Op::TagResource => &shapes::TAG_RESOURCE,
            Op::UntagResource => &shapes::UNTAG_RESOURCE,
        }
    }

    /// Whether it is of Lambda's older API, which has its own words for some errors.
    pub(crate) fn is_of_tags(self) -> bool {
        matches!(self, Op::ListTags | Op::TagResource | Op::UntagResource)
    }

    /// Whether it changes something or gives out a token: then a request that was overheard must not work a second time.
    pub(crate) fn acts(self) -> bool {
        !self.name().starts_with("Get") && !self.name().starts_with("List")
    }

    /// Whether members of its input come in the body.
    fn reads_body(self) -> bool {
        matches!(
            self,
            Op::RunMicrovm
                | Op::CreateMicrovmAuthToken
                | Op::CreateMicrovmShellAuthToken
                | Op::CreateMicrovmImage
                | Op::UpdateMicrovmImage
                | Op::UpdateMicrovmImageVersion
                | Op::TagResource
        )
    }
}

/// The operation, and its labels still encoded.
pub(crate) struct Found<'a> {
    pub(crate) operation: Operation,
    labels: Vec<(&'static str, &'a str)>,
}

/// Finds the operation; `None` if AWS knows none there.
pub(crate) fn find<'a>(method: &Method, path: &'a str) -> Option<Found<'a>> {
    TABLE.iter().find_map(|(wanted, template, operation)| {
        if method.as_str() != *wanted {
            return None;
        }
        let mut labels = Vec::new();
        let (mut given, mut wanted) = (path.split('/'), template.split('/'));
        loop {
            match (given.next(), wanted.next()) {
                (None, None) => return Some(Found { operation: *operation, labels }),
                (Some(given), Some(wanted)) => match wanted.strip_prefix('{').and_then(|label| label.strip_suffix('}')) {
                    Some(label) => labels.push((label, given)),
                    None if given == wanted => {}
                    None => return None,
                },
                _ => return None,
            }
        }
    })
}

impl Found<'_> {
    /// Labels, query parameters and body members as the one structure of which the model speaks.
    pub(crate) fn gather(&self, query: &str, body: &[u8]) -> Result<Value, ApiError> {
        let mut input = if self.operation.reads_body() && !body.is_empty() {
            match serde_json::from_slice(body) {
                Ok(Value::Object(members)) => members,
                Ok(_) => return Err(serialization("Start of structure or map found where not expected")),
                Err(cause) => return Err(serialization(format!("The body is not JSON: {cause}"))),
            }
        } else {
            Map::new()
        };
        let decode = |text: &str| {
            let decoded = percent_decode_str(text).decode_utf8();
            decoded.map(String::from).map_err(|_| serialization("A part of the address is not UTF-8"))
        };
        let mut tag_keys = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            let value = match name.as_str() {
                "maxResults" => value.parse::<i64>().map_err(|_| serialization("STRING_VALUE can not be converted to an Integer"))?.into(),
                "nextToken" | "imageIdentifier" | "imageVersion" | "nameFilter" | "architecture" | "chipset" | "chipsetGeneration" => Value::String(value),
                "tagKeys" => {
                    tag_keys.push(Value::String(value));
                    continue;
                }
                _ => continue,
            };
            if !self.operation.reads_body() {
                input.entry(name).or_insert(value);
            }
        }
        if self.operation == Op::UntagResource && !tag_keys.is_empty() {
            input.insert("TagKeys".to_owned(), Value::Array(tag_keys));
        }
        for (label, text) in &self.labels {
            input.insert((*label).to_owned(), Value::String(decode(text)?));
        }
        Ok(Value::Object(input))
    }
}

/// What AWS's front end says of a path it does not know.
pub(crate) fn unknown() -> ApiError {
    ApiError::silent(ErrorKind::UnknownOperation)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_operation_is_found_by_its_own_template_only() {
        for (method, template, operation) in TABLE {
            let path = template.replace(['{', '}'], "");
            let found = find(&method.parse().unwrap(), &path).unwrap();
            assert_eq!(found.operation, operation);
            assert!(TABLE.iter().filter(|row| row.2.name() == operation.name()).count() == 1);
        }
        for (method, path) in [
            ("PUT", "/2025-09-09/microvms"),
            ("GET", "/2025-09-09/microvms/a/b"),
            ("GET", "/2025-09-09/microvms/"),
            ("POST", "/2025-09-09/microvms/a/suspend/"),
            ("GET", "/2025-09-08/microvms"),
            ("GET", "/2025-09-09//microvms"),
            ("GET", "/"),
        ] {
            let found = find(&method.parse().unwrap(), path);
            assert!(found.is_none_or(|found| found.labels == [("microvmIdentifier", "")]), "{method} {path}");
        }
    }

    #[test]
    fn labels_are_decoded_exactly_once() {
        for (raw, decoded) in [
            ("arn:aws:x", "arn:aws:x"),
            ("arn%3Aaws%3Ax", "arn:aws:x"),
            ("arn%253Aaws", "arn%3Aaws"),
            ("a%2Fb", "a/b"),
            ("..", ".."),
            ("%00", "\0"),
        ] {
            let path = format!("/2025-09-09/microvm-images/{raw}");
            let input = find(&Method::GET, &path).unwrap().gather("", b"").unwrap();
            assert_eq!(input, json!({"imageIdentifier": decoded}));
        }
        let found = find(&Method::GET, "/2025-09-09/microvm-images/%ff").unwrap();
        assert_eq!(found.gather("", b"").unwrap_err().kind, ErrorKind::Serialization);
    }

    #[test]
    fn labels_win_over_the_body_and_the_query_fills_lists() {
        let found = find(&Method::POST, "/2025-09-09/microvms/m/auth-token").unwrap();
        let input = found.gather("maxResults=3", br#"{"microvmIdentifier":"other","x":1}"#).unwrap();
        assert_eq!(input, json!({"microvmIdentifier": "m", "x": 1}));
        let found = find(&Method::GET, "/2025-09-09/microvms").unwrap();
        let input = found.gather("maxResults=3&nextToken=a%3D&imageIdentifier=arn%3Aaws&other=1&X-Amz-Date=x", b"ignored").unwrap();
        assert_eq!(input, json!({"maxResults": 3, "nextToken": "a=", "imageIdentifier": "arn:aws"}));
        let found = find(&Method::DELETE, "/2017-03-31/tags/arn%3Aaws").unwrap();
        assert_eq!(found.gather("tagKeys=b&tagKeys=a%20b&tagKeys=b", b"").unwrap(), json!({"Resource": "arn:aws", "TagKeys": ["b", "a b", "b"]}));
        assert_eq!(found.gather("", b"").unwrap(), json!({"Resource": "arn:aws"}));
        let found = find(&Method::GET, "/2025-09-09/microvms").unwrap();
        for (query, body) in [("maxResults=x", ""), ("maxResults=", ""), ("maxResults=1.5", ""), ("maxResults=99999999999999999999", "")] {
            assert_eq!(found.gather(query, body.as_bytes()).unwrap_err().kind, ErrorKind::Serialization, "{query}");
        }
        let run = find(&Method::POST, "/2025-09-09/microvms").unwrap();
        for body in ["[]", "1", "null", "{", "{\"a\":}", "\u{feff}{}", "{}x"] {
            assert_eq!(run.gather("", body.as_bytes()).unwrap_err().kind, ErrorKind::Serialization, "{body}");
        }
    }
}
