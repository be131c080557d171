//! ListManagedMicrovmImages: the one base image that images are made from.

use serde_json::{Value, json};

use super::{Api, read};
use crate::{
    arn::MANAGED_IMAGE,
    pages::{self, PageRequest},
    reply::{Answer, ApiError},
    routes::Operation,
};

/// When AWS announced the service: 2026-06-22, as epoch seconds. The base image has no birthday of its own here.
pub(super) const CREATED_AT: f64 = 1_782_086_400.0;

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let page: PageRequest = read(input)?;
    let image = json!({"imageArn": api.place.managed_image_arn(), "createdAt": CREATED_AT, "updatedAt": CREATED_AT});
    pages::page(Operation::ListManagedMicrovmImages, &[], vec![(MANAGED_IMAGE.to_owned(), image)], &page)
}
