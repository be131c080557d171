//! ListMicrovmImageVersions: newest first.

use serde::Deserialize;
use serde_json::Value;

use super::{Api, image_body, read};
use crate::{
    pages::{self, PageRequest},
    reply::{Answer, ApiError},
    routes::Operation,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    #[serde(flatten)]
    page: PageRequest,
    image_identifier: String,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let image = image_body::find_image(api, &input.image_identifier)?;
    let name = image.facts.name.to_string();
    let items = image.versions.iter().map(|record| (image_body::newest_first(record.version), image_body::version(api, record)));
    pages::page(Operation::ListMicrovmImageVersions, &[&name], items.collect(), &input.page)
}
