//! ListMicrovms: newest first, optionally of one image or image version.

use std::time::UNIX_EPOCH;

use idle_controller::MicrovmView;
use model::ImageVersion;
use serde::Deserialize;
use serde_json::Value;

use super::{Api, microvm_body, read};
use crate::{
    arn::Wording,
    caller::Caller,
    pages::{self, PageRequest},
    reply::{Answer, ApiError},
    routes::Operation,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    #[serde(flatten)]
    page: PageRequest,
    image_identifier: Option<String>,
    image_version: Option<String>,
}

pub(super) fn call(api: &Api, caller: &Caller, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let image = input.image_identifier.map(|identifier| api.place.image_name(&identifier, Wording::Run)).transpose()?;
    let version = match &input.image_version {
        Some(text) => Some(text.parse::<ImageVersion>().map_err(|error| ApiError::validation(error.to_string()))?),
        None => None,
    };
    let wanted = |view: &MicrovmView| caller.sees(&view.image) && image.as_ref().is_none_or(|image| view.image == *image) && version.is_none_or(|version| view.version == version);
    let filters = [image.as_ref().map_or("", |image| image.as_str()), &version.map(|version| version.to_string()).unwrap_or_default()];
    let views = api.parts.controller.list().into_iter().filter(wanted);
    pages::page(Operation::ListMicrovms, &filters, views.map(|view| (newest_first(&view), microvm_body::item(api, &view))).collect(), &input.page)
}

/// A key that sorts newer microVMs before older ones, and those of one instant by id.
fn newest_first(view: &MicrovmView) -> String {
    let age = u128::from(u64::MAX).saturating_sub(view.started_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros());
    format!("{age:020}/{}", view.id)
}
