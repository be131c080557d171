//! An image, its versions and builds as the API shows them. What is absent is an explicit null, as AWS writes it.

use image_builder::{CatalogError, Image, ImageRecord};
use model::{ImageName, ImageVersion};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

use super::{Api, create_image::ARCHITECTURE};
use crate::{
    arn::{Wording, unknown_image, unknown_version},
    reply::{ApiError, ErrorKind, timestamp},
};

/// What the API remembers of a CreateMicrovmImage or UpdateMicrovmImage call, in the catalog's keeping.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Remembered {
    /// The input, with what was left out filled in.
    pub(super) input: Value,
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

/// An image with its versions.
pub(super) fn find_image(api: &Api, identifier: &str) -> Result<Image, ApiError> {
    let name = api.place.image_name(identifier, Wording::Image)?;
    api.parts.images.image(&name).ok_or_else(|| unknown_image(&api.place.image_arn(&name)))
}

/// One version of an image.
pub(super) fn find_version(api: &Api, identifier: &str, version: &str) -> Result<ImageRecord, ApiError> {
    let name = api.place.image_name(identifier, Wording::Image)?;
    let record = version.parse().ok().and_then(|version| api.parts.images.get(&name, version));
    record.ok_or_else(|| unknown_version(&api.place.image_arn(&name), version))
}

/// The name and version that a caller names, whether there is such a version or not.
pub(super) fn named_version(api: &Api, identifier: &str, version: &str) -> Result<(ImageName, ImageVersion), ApiError> {
    let name = api.place.image_name(identifier, Wording::Image)?;
    let version = version.parse().map_err(|_| unknown_version(&api.place.image_arn(&name), version))?;
    Ok((name, version))
}

/// What the caller reads of a change of images that was not made.
pub(super) fn refused(api: &Api, error: CatalogError) -> ApiError {
    match error {
        CatalogError::NameTaken(_)
        | CatalogError::NotDeletable(_)
        | CatalogError::InUse
        | CatalogError::VersionInUse
        | CatalogError::LastVersion(_)
        | CatalogError::NotActivatable(_) => ApiError::validation(error.to_string()),
        CatalogError::TooManyBuilds { .. } | CatalogError::TooManyImages { .. } | CatalogError::TooManyVersions { .. } => {
            ApiError::new(ErrorKind::ServiceQuotaExceeded, format!("{error}."))
        }
        CatalogError::Busy(_) => ApiError::new(ErrorKind::Conflict, error.to_string()),
        CatalogError::UnknownImage(name) => unknown_image(&api.place.image_arn(&name)),
        CatalogError::UnknownVersion(name, version) => unknown_version(&api.place.image_arn(&name), &version.to_string()),
        CatalogError::Storage { .. } => ApiError::internal("changing images", &error),
    }
}

/// An item of ListMicrovmImages, to the member as recorded (aws-behaviour §7.2).
pub(super) fn image_item(api: &Api, image: &Image) -> Value {
    json!({
        "id": image.facts.id,
        "imageArn": api.place.image_arn(&image.facts.name),
        "name": image.facts.name,
        "state": image.state(),
        "latestActiveImageVersion": image.latest_active().map(|record| record.version),
        "latestFailedImageVersion": image.latest_failed().map(|record| record.version),
        "createdAt": timestamp(image.facts.created_at),
    })
}

/// GetMicrovmImage. Tags that are none are `{}` here and null elsewhere (recorded).
pub(super) fn image(api: &Api, image: &Image) -> Value {
    let mut body = image_item(api, image);
    body["updatedAt"] = timestamp(image.updated_at());
    body["tags"] = json!(image.facts.tags);
    body
}

/// What CreateMicrovmImage and UpdateMicrovmImage answer: the image, and the request of its newest version.
pub(super) fn begun(api: &Api, of: &Image) -> Value {
    let mut body = image(api, of);
    // Not in the model, and null whenever recorded.
    body["buildPhaseOverrides"] = Value::Null;
    body["roleConfiguration"] = Value::Null;
    if let Some(newest) = of.versions.last() {
        body["imageVersion"] = json!(newest.version);
        repeat_request(api, &mut body, newest);
    }
    body
}

/// GetMicrovmImageVersion and an item of ListMicrovmImageVersions.
pub(super) fn version(api: &Api, record: &ImageRecord) -> Value {
    let mut body = json!({
        "imageArn": api.place.image_arn(&record.name),
        "imageVersion": record.version,
        "state": record.shown_state(),
        "status": record.shown_status(),
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
    format!("{}#{hour}", json!(record.shown_state()).as_str().unwrap_or_default())
}

/// The id of the one build of a version; records of old nodes have none.
pub(super) fn build_id(record: &ImageRecord) -> String {
    if record.build.id.is_empty() { format!("build-{}", record.version) } else { record.build.id.clone() }
}

/// GetMicrovmImageBuild: with the sizes, as far as the build came (aws-behaviour §5.1).
pub(super) fn build(api: &Api, record: &ImageRecord) -> Value {
    let mut body = build_item(api, record);
    let facts = &record.build;
    body["snapshotBuild"] = match (facts.code_bytes, facts.memory_bytes, facts.disk_bytes) {
        (None, None, None) => Value::Null,
        (code, memory, disk) => json!({"codeInstallSizeInBytes": code, "memorySnapshotSizeInBytes": memory, "diskSnapshotSizeInBytes": disk}),
    };
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
    // The tags are the image's, whatever its versions were made with.
    let tags = api.parts.images.image(&record.name).map(|image| image.facts.tags).unwrap_or_default();
    body["tags"] = if tags.is_empty() { Value::Null } else { json!(tags) };
}

/// `CODE: sentence`.
fn state_reason(record: &ImageRecord) -> Option<String> {
    record.failure.as_ref().map(|failure| format!("{}: {}", failure.code, failure.message))
}

/// The sort key of versions in lists: newest first.
pub(super) fn newest_first(version: ImageVersion) -> String {
    format!("{:010}.{:010}", u32::MAX - version.major, u32::MAX - version.minor)
}

/// The sort key of images in lists: by name.
pub(super) fn by_name(name: &ImageName) -> String {
    name.to_string()
}
