//! ListManagedMicrovmImageVersions: versions 0 and 1 of the one base image.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Api, create_image::ARCHITECTURE, image_body, list_managed_images::CREATED_AT, read};
use crate::{
    arn::{MANAGED_VERSIONS, unknown_image},
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
    if !api.place.is_managed_image(&input.image_identifier) {
        return Err(unknown_image(&input.image_identifier));
    }
    let items = MANAGED_VERSIONS.into_iter().map(|version| {
        let body = json!({
            "imageArn": api.place.managed_image_arn(),
            // Managed versions are shown without the minor number (recorded).
            "imageVersion": version.major.to_string(),
            "status": "AVAILABLE",
            "supportedCpuConfigurations": [{"architecture": ARCHITECTURE}],
            "createdAt": CREATED_AT,
            "updatedAt": CREATED_AT,
        });
        (image_body::newest_first(version), body)
    });
    pages::page(Operation::ListManagedMicrovmImageVersions, &[], items.collect(), &input.page)
}
