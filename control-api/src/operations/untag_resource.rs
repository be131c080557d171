//! UntagResource: takes tags from an image. A key that it does not have is no fault, so it is harmless to repeat.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, read, tags};
use crate::reply::{Answer, ApiError, ErrorKind};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Input {
    resource: String,
    tag_keys: Vec<String>,
}

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    tags::check_keys(&input.tag_keys, ErrorKind::InvalidParameterValue)?;
    tags::change(api, &input.resource, |tags| {
        tags.retain(|key, _| !input.tag_keys.contains(key));
        Ok(())
    })
    .await?;
    Ok(Answer::no_content())
}
