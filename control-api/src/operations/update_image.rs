//! UpdateMicrovmImage: starts building the next version of an image. What the call leaves out is gone in it (aws-behaviour §5.1).

use image_builder::Image;
use model::{ImageName, ImageVersion};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Api,
    create_image::{self, Input},
    image_body::{self, Remembered},
    read,
};
use crate::{
    arn::{Wording, unknown_image},
    caller::Caller,
    client_tokens::Call,
    reply::{Answer, ApiError},
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Which {
    image_identifier: String,
}

pub(super) async fn call(api: &Api, caller: &Caller, input: Value) -> Result<Answer, ApiError> {
    let parsed: Input = read(input.clone())?;
    let name = api.place.image_name(&read::<Which>(input.clone())?.image_identifier, Wording::Image)?;
    let Some(token) = parsed.client_token.clone() else {
        return update(api, caller, name, parsed, input).await;
    };
    let call = Call::new("UpdateMicrovmImage", caller, &token, &input, api.parts.clock.wall());
    let done_before = || {
        let mut image = api.parts.images.image(&name)?;
        let of_call = |remembered: &Remembered| remembered.input["clientToken"] == token.as_str() && remembered.by.as_ref() == Some(&caller.key);
        let made = image.versions.iter().rposition(|record| record.version != ImageVersion::FIRST && of_call(&Remembered::of(record)))?;
        // The answer is of the version that the call has made.
        image.versions.truncate(made + 1);
        Some(answer(api, &image))
    };
    let told = api.client_tokens.once(call, done_before, update(api, caller, name.clone(), parsed, input)).await?;
    create_image::still_there(api, &name, &told)?;
    Ok(told)
}

/// As a creation is answered, but for the tags, which the model does not have here.
fn answer(api: &Api, image: &Image) -> Answer {
    let mut body = image_body::begun(api, image);
    if let Some(members) = body.as_object_mut() {
        members.remove("tags");
    }
    Answer::ok(body)
}

async fn update(api: &Api, caller: &Caller, name: ImageName, parsed: Input, input: Value) -> Result<Answer, ApiError> {
    if api.parts.images.image(&name).is_none() {
        return Err(unknown_image(&api.place.image_arn(&name)));
    }
    let request = create_image::request(api, caller, name, parsed, input)?;
    // Held until the catalog shows the build, which then is in the sum.
    let _memory = api.memory.admit(api, request.memory.mib())?;
    let updated = api.parts.images.update(request).await;
    updated.map(|image| answer(api, &image)).map_err(|error| image_body::refused(api, error))
}
