//! ListTags: the tags of an image; `{}` if it has none.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Api, read, tags};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
struct Input {
    #[serde(rename = "Resource")]
    resource: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let image = tags::tagged_image(api, &input.resource)?;
    Ok(Answer::ok(json!({"Tags": tags::of(api, &image)?})))
}
