//! UpdateMicrovmImageVersion: makes a version ACTIVE or INACTIVE. What runs from it goes on.

use image_builder::VersionStatus;
use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
    image_version: String,
    status: VersionStatus,
}

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let (name, version) = image_body::named_version(api, &input.image_identifier, &input.image_version)?;
    let record = api.parts.images.set_status(name, version, input.status).await.map_err(|error| image_body::refused(api, error))?;
    Ok(Answer::ok(image_body::version(api, &record)))
}
