//! `GET /dormouse/v1/usage` and `GET /dormouse/v1/microvms/{id}/usage`: what was used, and what it would cost at the prices of
//! this node's configuration.

use axum::response::{IntoResponse as _, Response};
use idle_controller::MicrovmHandle;
use model::Usage;
use serde_json::{Value, json};

use super::Ask;
use crate::{
    dispatch::Front,
    operations::{Api, find_microvm},
    reply::{Answer, ApiError},
};

pub(super) fn of_microvm(front: &Front, id: &str, ask: &Ask) -> Result<Response, ApiError> {
    let [] = ask.parameters([])?;
    let handle = find_microvm(&front.api, id)?;
    Ok(Answer::ok(microvm(&front.api, &handle)).into_response())
}

/// Every microVM that is not forgotten, every image with all that ever ran of it, and the sum of these.
pub(super) fn of_all(front: &Front, ask: &Ask) -> Result<Response, ApiError> {
    let [] = ask.parameters([])?;
    let api = &*front.api;
    let controller = &api.parts.controller;
    let microvms: Vec<Value> = controller.list().iter().filter_map(|view| controller.find(view.id)).map(|handle| microvm(api, &handle)).collect();
    let mut total = Usage::default();
    let images: Vec<Value> = controller
        .usage_by_image()
        .into_iter()
        .map(|(image, usage)| {
            total += usage;
            json!({"image": image, "imageArn": api.place.image_arn(&image), "usage": usage, "cost": api.config.prices.cost(&usage)})
        })
        .collect();
    let body = json!({
        "microvms": microvms,
        "images": images,
        "total": {"usage": total, "cost": api.config.prices.cost(&total)},
        "prices": api.config.prices,
    });
    Ok(Answer::ok(body).into_response())
}

fn microvm(api: &Api, handle: &MicrovmHandle) -> Value {
    let (view, usage) = (handle.view(), handle.usage());
    json!({
        "microvmId": view.id,
        "image": view.image,
        "imageVersion": view.version,
        "state": view.state.as_str(),
        "usage": usage,
        "cost": api.config.prices.cost(&usage),
    })
}
