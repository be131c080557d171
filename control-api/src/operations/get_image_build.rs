//! GetMicrovmImageBuild: the one build of a version, with its sizes, and the reason if it failed.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
    image_version: String,
    build_id: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let record = image_body::find_version(api, &input.image_identifier, &input.image_version)?;
    if input.build_id != image_body::build_id(&record) {
        let arn = api.place.image_arn(&record.name);
        return Err(ApiError::not_found(format!("Build {} not found for MicroVMImage: {arn}, Version: {}", input.build_id, record.version)));
    }
    Ok(Answer::ok(image_body::build(api, &record)))
}
