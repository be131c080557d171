//! ListMicrovmImages: by name. As at AWS the filter works on what is on a page, so a page may be empty and not the last.

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
    name_filter: Option<String>,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let images = api.parts.images.images();
    let items = images.iter().map(|image| (image_body::by_name(&image.facts.name), image_body::image_item(api, image)));
    let filter = input.name_filter.unwrap_or_default();
    let mut answer = pages::page(Operation::ListMicrovmImages, &[&filter], items.collect(), &input.page)?;
    if let Some(items) = answer.body["items"].as_array_mut() {
        items.retain(|item| item["name"].as_str().is_some_and(|name| name.contains(&filter)));
    }
    Ok(answer)
}
