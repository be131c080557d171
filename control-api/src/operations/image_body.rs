//! An image, its versions and builds as the API shows them. What is absent is an explicit null, as AWS writes it.

use std::collections::BTreeMap;

use image_builder::{BuildState, ImageRecord};
use model::{ImageName, ImageVersion};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

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
    /// The access key id that asked for it: client tokens are its own.
    pub(super) by: Option<String>,
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
    "kmsKeyIdentifier",
];

const HOUR: &[BorrowedFormatItem<'_>] = format_description!("[year repr:last_two][month][day][hour]");

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

/// An item of ListMicrovmImages, to the member as recorded (aws-behaviour §7.2). `versions` is not empty.
pub(super) fn image_item(api: &Api, versions: &[ImageRecord]) -> Option<Value> {
    let (first, newest) = (versions.first()?, versions.last()?);
    let arn = api.place.image_arn(&newest.name);
    Some(json!({
        "id": image_id(&arn),
        "imageArn": arn,
        "name": newest.name,
        "state": image_state(newest),
        "latestActiveImageVersion": newest_in(versions, BuildState::Successful),
        "latestFailedImageVersion": newest_in(versions, BuildState::Failed),
        "createdAt": timestamp(first.created_at),
    }))
}

/// GetMicrovmImage. `versions` is not empty. Tags that are none are `{}` here and null elsewhere (recorded).
pub(super) fn image(api: &Api, versions: &[ImageRecord]) -> Option<Value> {
    let newest = versions.last()?;
    let mut body = image_item(api, versions)?;
    body["updatedAt"] = timestamp(newest.updated_at);
    body["tags"] = json!(tags(api, newest));
    Some(body)
}

/// The tags of a version's image. That they cannot be read is told of in the log; the image is shown all the same.
fn tags(api: &Api, record: &ImageRecord) -> BTreeMap<String, String> {
    super::tags::of(api, &record.name).unwrap_or_default()
}

/// An image's undocumented `id` is some UUID; ours is made of its ARN, so that it stays the same.
fn image_id(arn: &str) -> String {
    let hash: [u8; 32] = Sha256::digest(arn).into();
    uuid::Builder::from_random_bytes(std::array::from_fn(|at| hash[at])).into_uuid().to_string()
}

/// What CreateMicrovmImage answers: the image and the request.
pub(super) fn created(api: &Api, record: &ImageRecord) -> Value {
    let mut body = image(api, std::slice::from_ref(record)).unwrap_or_default();
    body["imageVersion"] = json!(record.version);
    // Not in the model, and null whenever recorded.
    body["buildPhaseOverrides"] = Value::Null;
    body["roleConfiguration"] = Value::Null;
    repeat_request(api, &mut body, record);
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
        "versionStateTimeBucket": time_bucket(record),
    });
    repeat_request(api, &mut body, record);
    body
}

/// `SUCCESSFUL#26073006`: the state and the hour of its beginning, undocumented and recorded.
fn time_bucket(record: &ImageRecord) -> String {
    let hour = OffsetDateTime::from(record.updated_at).format(HOUR).unwrap_or_default();
    format!("{}#{hour}", json!(record.state).as_str().unwrap_or_default())
}

/// The id of the one build of a version.
pub(super) fn build_id(record: &ImageRecord) -> String {
    format!("build-{}", record.version)
}

/// GetMicrovmImageBuild.
pub(super) fn build(api: &Api, record: &ImageRecord) -> Value {
    let mut body = build_item(api, record);
    body["snapshotBuild"] = Value::Null;
    body
}

/// An item of ListMicrovmImageBuilds.
pub(super) fn build_item(api: &Api, record: &ImageRecord) -> Value {
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
        "terminationReasonCode": null,
    })
}

fn repeat_request(api: &Api, body: &mut Value, record: &ImageRecord) {
    let input = Remembered::of(record).input;
    for member in REPEATED {
        body[member] = input[member].clone();
    }
    let tags = tags(api, record);
    body["tags"] = if tags.is_empty() { Value::Null } else { json!(tags) };
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
