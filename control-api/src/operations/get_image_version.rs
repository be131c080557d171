//! GetMicrovmImageVersion: one version, with the reason if its build failed.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
    image_version: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let record = image_body::find_version(api, &input.image_identifier, &input.image_version)?;
    Ok(Answer::ok(image_body::version(api, &record)))
}
