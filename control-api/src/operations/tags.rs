//! What the three operations on tags share: whose tags, and which there may be.

use std::collections::BTreeMap;

use image_builder::CatalogError;
use model::ImageName;

use super::Api;
use crate::{
    arn::{Wording, unknown_image},
    reply::{ApiError, ErrorKind},
};

pub(super) type Tags = BTreeMap<String, String>;

/// AWS's for every resource of every service.
pub(super) const MAX_TAGS: usize = 50;
/// Keys that only AWS may give.
const RESERVED: &str = "aws:";

/// The image that an ARN names; of what can have tags at AWS, this node has images only.
pub(super) fn tagged_image(api: &Api, arn: &str) -> Result<ImageName, ApiError> {
    if !arn.contains(":microvm-image:") {
        return Err(ApiError::not_found(format!("The resource {arn} does not exist: this node has MicroVM images only.")));
    }
    let name = api.place.image_name(arn, Wording::Image)?;
    if api.parts.images.image(&name).is_none() { Err(unknown_image(arn)) } else { Ok(name) }
}

/// What the model does not say of tags. `kind`: the error that the operation declares for it.
pub(super) fn check(tags: &Tags, kind: ErrorKind) -> Result<(), ApiError> {
    check_keys(tags.keys(), kind)?;
    if tags.len() > MAX_TAGS {
        return Err(ApiError::new(kind, format!("The resource would have {} tags, and may have {MAX_TAGS}.", tags.len())));
    }
    Ok(())
}

/// Whether a caller may add or remove these.
pub(super) fn check_keys<'a>(keys: impl IntoIterator<Item = &'a String>, kind: ErrorKind) -> Result<(), ApiError> {
    match keys.into_iter().find(|key| key.get(..RESERVED.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED))) {
        Some(key) => Err(ApiError::new(kind, format!("The tag key {key} begins with {RESERVED}, which is reserved."))),
        None => Ok(()),
    }
}

/// The tags of an image.
pub(super) fn of(api: &Api, image: &ImageName) -> Result<Tags, ApiError> {
    api.parts.images.image(image).map(|image| image.facts.tags).ok_or_else(|| unknown_image(&api.place.image_arn(image)))
}

/// Changes the tags of an image; of two who change them at a time, one sees what the other made.
pub(super) async fn change(api: &Api, arn: &str, change: impl FnOnce(&mut Tags) -> Result<(), ApiError>) -> Result<(), ApiError> {
    let _turn = api.tag_changes.lock().await;
    let image = tagged_image(api, arn)?;
    let mut tags = of(api, &image)?;
    change(&mut tags)?;
    match api.parts.images.set_tags(image, tags).await {
        Ok(_) => Ok(()),
        Err(CatalogError::UnknownImage(_)) => Err(unknown_image(arn)),
        // The API of tags has an error of its own for it (aws-behaviour §7.3).
        Err(busy @ CatalogError::Busy(_)) => Err(ApiError::new(ErrorKind::Conflict, busy.to_string())),
        Err(cause) => Err(ApiError::internal("writing the tags of an image", &cause)),
    }
}
