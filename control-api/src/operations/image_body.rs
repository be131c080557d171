//! An image, its versions and builds as the API shows them. What is absent is an explicit null, as AWS writes it.

use image_builder::{BuildState, ImageRecord};
use model::{ImageName, ImageVersion};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Api, create_image::ARCHITECTURE};
use crate::{
    arn::{Wording, unknown_image, unknown_version},
    reply::{ApiError, timestamp},
};

/// What the API remembers of a CreateMicrovmImage call, in the catalog's keeping.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Remembered {
    /// The input, with what was left out filled in.
    pub(super) input: Value,
    /// The code of aws-behaviour §5.1, if the artifact was not there.
    pub(super) missing: Option<String>,
}

impl Remembered {
    pub(super) fn of(record: &ImageRecord) -> Self {
        serde_json::from_value(record.request.clone()).unwrap_or_default()
    }
}

/// Members of the request that answers repeat.
const REPEATED: [&str; 13] = [
    "baseImageArn",
    "baseImageVersion",
    "buildRoleArn",
    "description",
    "codeArtifact",
    "logging",
    "egressNetworkConnectors",
    "cpuConfigurations",
    "resources",
    "additionalOsCapabilities",
    "hooks",
    "environmentVariables",
    "tags",
];

/// All versions of an image, oldest first, none missing.
pub(super) fn versions(api: &Api, identifier: &str) -> Result<Vec<ImageRecord>, ApiError> {
    let name = api.place.image_name(identifier, Wording::Image)?;
    let versions = api.parts.images.versions(&name);
    if versions.is_empty() { Err(unknown_image(&api.place.image_arn(&name))) } else { Ok(versions) }
}

/// One version of an image.
pub(super) fn find_version(api: &Api, identifier: &str, version: &str) -> Result<ImageRecord, ApiError> {
    let name = api.place.image_name(identifier, Wording::Image)?;
    let record = version.parse().ok().and_then(|version| api.parts.images.find(&name, version));
    record.ok_or_else(|| unknown_version(&api.place.image_arn(&name), version))
}

/// The image's own state follows its newest version (aws-behaviour §5.1).
fn image_state(newest: &ImageRecord) -> &'static str {
    match (newest.version == ImageVersion::FIRST, newest.state) {
        (true, BuildState::Pending | BuildState::InProgress) => "CREATING",
        (true, BuildState::Successful) => "CREATED",
        (true, BuildState::Failed) => "CREATE_FAILED",
        (false, BuildState::Pending | BuildState::InProgress) => "UPDATING",
        (false, BuildState::Successful) => "UPDATED",
        (false, BuildState::Failed) => "UPDATE_FAILED",
    }
}

fn newest_in(versions: &[ImageRecord], state: BuildState) -> Option<ImageVersion> {
    versions.iter().filter(|record| record.state == state).map(|record| record.version).max()
}

/// GetMicrovmImage and an item of ListMicrovmImages. `versions` is not empty.
pub(super) fn image(api: &Api, versions: &[ImageRecord]) -> Option<Value> {
    let (first, newest) = (versions.first()?, versions.last()?);
    Some(json!({
        "imageArn": api.place.image_arn(&newest.name),
        "name": newest.name,
        "state": image_state(newest),
        "latestActiveImageVersion": newest_in(versions, BuildState::Successful),
        "latestFailedImageVersion": newest_in(versions, BuildState::Failed),
        "createdAt": timestamp(first.created_at),
        "updatedAt": timestamp(newest.updated_at),
        "tags": Remembered::of(first).input["tags"],
    }))
}

/// What CreateMicrovmImage answers: the image and the request.
pub(super) fn created(api: &Api, record: &ImageRecord) -> Value {
    let mut body = image(api, std::slice::from_ref(record)).unwrap_or_default();
    body["imageVersion"] = json!(record.version);
    repeat_request(&mut body, record);
    body
}

/// GetMicrovmImageVersion and an item of ListMicrovmImageVersions.
pub(super) fn version(api: &Api, record: &ImageRecord) -> Value {
    let mut body = json!({
        "imageArn": api.place.image_arn(&record.name),
        "imageVersion": record.version,
        "state": record.state,
        "status": if record.state == BuildState::Failed { "INACTIVE" } else { "ACTIVE" },
        "stateReason": state_reason(record),
        "createdAt": timestamp(record.created_at),
        "updatedAt": timestamp(record.updated_at),
    });
    repeat_request(&mut body, record);
    body
}

/// The id of the one build of a version.
pub(super) fn build_id(record: &ImageRecord) -> String {
    format!("build-{}", record.version)
}

/// GetMicrovmImageBuild and an item of ListMicrovmImageBuilds.
pub(super) fn build(api: &Api, record: &ImageRecord) -> Value {
    json!({
        "imageArn": api.place.image_arn(&record.name),
        "imageVersion": record.version,
        "buildId": build_id(record),
        "buildState": record.state,
        "architecture": ARCHITECTURE,
        "chipset": "INTEL",
        // The model wants a text without blanks; a node has but one kind of processor.
        "chipsetGeneration": "HOST",
        "stateReason": state_reason(record),
        "createdAt": timestamp(record.created_at),
        "snapshotBuild": null,
    })
}

fn repeat_request(body: &mut Value, record: &ImageRecord) {
    let input = Remembered::of(record).input;
    for member in REPEATED {
        body[member] = input[member].clone();
    }
}

/// `CODE: sentence`. An artifact that was not there is the reason, whatever the builder made of its absence.
fn state_reason(record: &ImageRecord) -> Option<String> {
    let failure = record.failure.as_ref()?;
    let remembered = Remembered::of(record);
    Some(match remembered.missing {
        Some(code) => format!("{code}: {} does not exist", remembered.input["codeArtifact"]["uri"].as_str().unwrap_or_default()),
        None => format!("{}: {}", failure.code, failure.message),
    })
}

/// The sort key of versions in lists: newest first.
pub(super) fn newest_first(version: ImageVersion) -> String {
    format!("{:010}.{:010}", u32::MAX - version.major, u32::MAX - version.minor)
}

/// The sort key of images in lists: by name.
pub(super) fn by_name(name: &ImageName) -> String {
    name.to_string()
}
