//! GetMicrovmImage: an image and how far its newest version is.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let identifier = read::<Input>(input)?.image_identifier;
    Ok(Answer::ok(image_body::image(api, &image_body::find_image(api, &identifier)?)))
}
