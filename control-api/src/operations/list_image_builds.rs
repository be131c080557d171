//! ListMicrovmImageBuilds: a version of this node has one build.

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
    image_version: String,
    architecture: Option<String>,
    chipset: Option<String>,
    chipset_generation: Option<String>,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let record = image_body::find_version(api, &input.image_identifier, &input.image_version)?;
    let build = image_body::build_item(api, &record);
    let fits = |wanted: &Option<String>, member: &str| wanted.as_deref().is_none_or(|wanted| build[member] == wanted);
    let wanted = fits(&input.architecture, "architecture") && fits(&input.chipset, "chipset") && fits(&input.chipset_generation, "chipsetGeneration");
    let arn = api.place.image_arn(&record.name);
    let version = record.version.to_string();
    let asked = [&input.architecture, &input.chipset, &input.chipset_generation].map(|filter| filter.as_deref().unwrap_or_default());
    let filters = [&arn, &version, asked[0], asked[1], asked[2]];
    let items = if wanted { vec![(image_body::build_id(&record), build)] } else { Vec::new() };
    pages::page(Operation::ListMicrovmImageBuilds, &filters, items, &input.page)
}
