//! DeleteMicrovmImage: an image with all its versions, unless a microVM of it has not ended. Done soon after the answer.

use model::MicrovmState;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Api, image_body, read};
use crate::{
    arn::Wording,
    reply::{Answer, ApiError},
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
}

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let name = api.place.image_name(&read::<Input>(input)?.image_identifier, Wording::Image)?;
    let (controller, of) = (api.parts.controller.clone(), name.clone());
    // TERMINATING counts (aws-behaviour §5.1).
    let in_use = move || controller.list().iter().any(|view| view.image == of && view.state != MicrovmState::Terminated);
    let state = api.parts.images.delete(name.clone(), in_use).await.map_err(|error| image_body::refused(api, error))?;
    Ok(Answer::ok(json!({"imageIdentifier": api.place.image_arn(&name), "state": state})))
}
