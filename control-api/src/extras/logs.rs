//! `GET /dormouse/v1/microvms/{id}/logs` and `GET /dormouse/v1/images/{name}/logs`: what an app said, what a build said.
//!
//! Parameters: `follow=1` goes on until nothing can come any more, `tail=N` begins N lines before the end; of a build also
//! `version` (the newest, without it).

use std::{path::PathBuf, sync::Arc};

use axum::{body::Body, response::Response};
use futures::StreamExt as _;
use model::MicrovmState;
use tokio_util::sync::CancellationToken;

use super::{
    Ask, follow::{self, Ended, Part},
    plain_text, switch, too_many_followers,
};
use crate::{
    arn::{Wording, unknown_image, unknown_version},
    dispatch::Front,
    operations::{find_microvm, log_name},
    reply::ApiError,
};

pub(super) fn of_microvm(front: &Front, id: &str, ask: &Ask, stop: CancellationToken) -> Result<Response, ApiError> {
    let [follow, tail] = ask.parameters(["follow", "tail"])?;
    let part = part(follow, tail)?;
    let handle = find_microvm(&front.api, id)?;
    if log_name(&handle.view()).is_none() {
        return Err(ApiError::not_found(format!("Nothing that {} says is kept: it was run with logging disabled.", handle.id())));
    }
    let log = front.api.parts.controller.log_dir(handle.id()).join("app.log");
    let ended: Ended = Arc::new(move || handle.state() == MicrovmState::Terminated);
    answer(front, log, part, ended, stop)
}

pub(super) fn of_build(front: &Front, image: &str, ask: &Ask, stop: CancellationToken) -> Result<Response, ApiError> {
    let [follow, tail, version] = ask.parameters(["follow", "tail", "version"])?;
    let part = part(follow, tail)?;
    let (place, images) = (&front.api.place, front.api.parts.images.clone());
    let name = place.image_name(image, Wording::Run)?;
    let arn = place.image_arn(&name);
    let record = match version {
        None => images.image(&name).and_then(|mut image| image.versions.pop()).ok_or_else(|| unknown_image(&arn))?,
        Some(text) => text.parse().ok().and_then(|version| images.get(&name, version)).ok_or_else(|| unknown_version(&arn, text))?,
    };
    let log = images.build_log(&name, record.version);
    let ended: Ended = Arc::new(move || {
        let now = images.get(&name, record.version);
        now.is_none_or(|now| now.state.is_finished())
    });
    answer(front, log, part, ended, stop)
}

fn part(follow: Option<&str>, tail: Option<&str>) -> Result<Part, ApiError> {
    let lines = |text: &str| text.parse::<u64>().ok().filter(|lines| *lines > 0);
    let tail = tail
        .map(|text| lines(text).ok_or_else(|| ApiError::validation(format!("The parameter tail is a number of lines, 1 or more, not {text:?}."))))
        .transpose()?;
    Ok(Part { tail, follow: switch("follow", follow)? })
}

fn answer(front: &Front, log: PathBuf, part: Part, ended: Ended, stop: CancellationToken) -> Result<Response, ApiError> {
    let place = if part.follow { Some(Arc::clone(&front.extras.followers).try_acquire_owned().map_err(|_| too_many_followers())?) } else { None };
    let path = log.clone();
    let pieces = follow::stream(log, part, ended, stop).map(move |piece| {
        // Given back with the answer.
        let _place = &place;
        piece.inspect_err(|error| tracing::warn!(log = %path.display(), %error, "a log cannot be read"))
    });
    Ok(plain_text(Body::from_stream(pieces)))
}
