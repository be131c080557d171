//! TagResource: adds tags to those that an image has; a key that it has gets the new value. Harmless to repeat.

use serde::Deserialize;
use serde_json::Value;

use super::{
    Api, read,
    tags::{self, Tags},
};
use crate::reply::{Answer, ApiError, ErrorKind};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Input {
    resource: String,
    tags: Tags,
}

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    tags::change(api, &input.resource, |tags| {
        tags.extend(input.tags);
        tags::check(tags, ErrorKind::InvalidParameterValue)
    })
    .await?;
    Ok(Answer::no_content())
}
