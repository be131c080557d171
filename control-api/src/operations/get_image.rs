//! GetMicrovmImage: an image and how far its newest version is.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::{
    arn::unknown_image,
    reply::{Answer, ApiError},
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let identifier = read::<Input>(input)?.image_identifier;
    let versions = image_body::versions(api, &identifier)?;
    image_body::image(api, &versions).map(Answer::ok).ok_or_else(|| unknown_image(&identifier))
}
