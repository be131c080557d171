//! ListMicrovmImages: by name. Unlike AWS's, the filter works before the paging, so no page is empty for nothing.

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
    let images = &api.parts.images;
    let records = images.list().into_iter().filter(|record| input.name_filter.as_ref().is_none_or(|part| record.name.as_str().contains(part)));
    let items = records.filter_map(|record| Some((image_body::by_name(&record.name), image_body::image(api, &images.versions(&record.name))?)));
    pages::page(Operation::ListMicrovmImages, items.collect(), &input.page)
}
