//! DeleteMicrovmImageVersion: one version, unless it is the last or a microVM of it has not ended. Done soon after the answer.

use model::MicrovmState;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Api, image_body, read};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
    image_version: String,
}

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let (name, version) = image_body::named_version(api, &input.image_identifier, &input.image_version)?;
    let (controller, of) = (api.parts.controller.clone(), name.clone());
    let in_use = move || controller.list().iter().any(|view| view.image == of && view.version == version && view.state != MicrovmState::Terminated);
    let state = api.parts.images.delete_version(name.clone(), version, in_use).await.map_err(|error| image_body::refused(api, error))?;
    Ok(Answer::ok(json!({"imageIdentifier": api.place.image_arn(&name), "imageVersion": version, "state": state})))
}
