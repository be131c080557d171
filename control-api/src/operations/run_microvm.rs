//! RunMicrovm: a new microVM from an image.

use std::{collections::BTreeMap, time::Duration};

use idle_controller::{ControllerError, RunSpec};
use image_builder::{ImageRecord, Lease, NotRunnable};
use model::{Hook, IdlePolicy, ImageVersion, MAX_DURATION, RunPayload, rights::EXECUTION_ROLE};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Api, image_body,
    microvm_body::{self, Remembered},
    read,
};
use crate::{
    arn::{EGRESS, INGRESS, Wording, unknown_image, unknown_version},
    caller::Caller,
    client_tokens::Call,
    extras::log_names,
    reply::{Answer, ApiError, ErrorKind},
};

/// Of the whole text, measured at AWS.
const MAX_RUN_PAYLOAD_BYTES: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    image_identifier: String,
    image_version: Option<String>,
    execution_role_arn: Option<String>,
    idle_policy: Option<Idle>,
    logging: Option<Value>,
    kms_key_identifier: Option<String>,
    run_hook_payload: Option<String>,
    maximum_duration_in_seconds: Option<u64>,
    ingress_network_connectors: Option<Vec<String>>,
    egress_network_connectors: Option<Vec<String>>,
    client_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Idle {
    max_idle_duration_seconds: u64,
    suspended_duration_seconds: u64,
    auto_resume_enabled: bool,
}

pub(super) async fn call(api: &Api, caller: &Caller, input: Value) -> Result<Answer, ApiError> {
    let parsed: Input = read(input.clone())?;
    let Some(token) = parsed.client_token.clone() else {
        return run(api, caller, parsed).await;
    };
    let call = Call::new("RunMicrovm", caller, &token, &input, api.parts.clock.wall());
    let done_before = || {
        let views = api.parts.controller.list();
        let of_call = |remembered: &Remembered| remembered.client_token.as_ref() == Some(&token) && remembered.by.as_ref() == Some(&caller.key);
        let view = views.into_iter().find(|view| of_call(&Remembered::of(view)))?;
        Some(Answer::ok(microvm_body::whole(api, &view)))
    };
    api.client_tokens.once(call, done_before, run(api, caller, parsed)).await
}

async fn run(api: &Api, caller: &Caller, input: Input) -> Result<Answer, ApiError> {
    let ingress = ingress(api, input.ingress_network_connectors.unwrap_or_default())?;
    let egress = egress(api, input.egress_network_connectors.unwrap_or_default())?;
    let logs = input.logging.as_ref().is_some_and(|logging| !logging["cloudWatch"].is_null());
    if logs && input.execution_role_arn.is_none() {
        return Err(ApiError::validation("Logging cannot be enabled without providing executionRoleArn"));
    }
    // Held until the controller shows the new microVM: until then nothing else keeps its image from being deleted.
    let lease = image(api, &input.image_identifier, input.image_version.as_deref())?;
    let image = lease.record();
    let run_payload = run_payload(image, input.run_hook_payload)?;
    // Held until the controller shows the microVM, which then is in the sum.
    let _memory = api.memory.admit(api, image.memory.mib())?;
    let remembered = Remembered {
        execution_role_arn: input.execution_role_arn,
        ingress_network_connectors: ingress,
        egress_network_connectors: egress.unwrap_or_else(|| egress_of(api, image)),
        logging: input.logging,
        client_token: input.client_token,
        by: Some(caller.key.clone()),
        kms_key_identifier: input.kms_key_identifier,
        memory_mib: Some(image.memory.mib()),
    };
    let spec = RunSpec {
        keep_output: remembered.logging.as_ref().is_none_or(log_names::keeps_output),
        identity: identity(api, image, remembered.execution_role_arn.as_deref()),
        size: image.memory,
        egress: api.place.egress(&remembered.egress_network_connectors),
        hooks: image.hooks,
        run_payload,
        image: image.name.clone(),
        version: image.version,
        image_dir: lease.snapshot_dir(),
        idle: input.idle_policy.map(|idle| IdlePolicy {
            max_idle: Duration::from_secs(idle.max_idle_duration_seconds),
            suspended: Duration::from_secs(idle.suspended_duration_seconds),
            auto_resume: idle.auto_resume_enabled,
        }),
        max_duration: input.maximum_duration_in_seconds.map_or(MAX_DURATION, Duration::from_secs),
        request: serde_json::to_value(remembered).map_err(|cause| ApiError::internal("writing down a request", &cause))?,
    };
    match api.parts.controller.run(spec).await {
        Ok(view) => Ok(Answer::ok(microvm_body::whole(api, &view))),
        Err(full @ ControllerError::Full { .. }) => Err(ApiError::new(ErrorKind::ServiceQuotaExceeded, format!("{full}; terminate some first"))),
        Err(error) => Err(ApiError::internal("taking a new MicroVM", &error)),
    }
}

/// The variables every guest has (aws-behaviour §5.3), and the role that it may have.
fn identity(api: &Api, image: &ImageRecord, role: Option<&str>) -> BTreeMap<String, String> {
    let mut identity = super::create_image::identity(api, &image.name, image.version);
    identity.extend(role.map(|arn| (EXECUTION_ROLE.to_owned(), arn.to_owned())));
    identity
}

/// What the run hook is sent. It is neither remembered nor shown by the API.
fn run_payload(image: &ImageRecord, payload: Option<String>) -> Result<Option<RunPayload>, ApiError> {
    let Some(payload) = payload.filter(|payload| !payload.is_empty()) else { return Ok(None) };
    if image.hooks.is_none_or(|hooks| hooks.timeout(Hook::Run).is_none()) {
        return Err(ApiError::validation("runHookPayload was given, but the run hook must be enabled in the MicroVM image to receive it"));
    }
    // The model counts characters, the limit is of bytes (aws-behaviour §4).
    if payload.len() > MAX_RUN_PAYLOAD_BYTES {
        return Err(ApiError::validation(format!(
            "1 validation error detected: Value at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to {MAX_RUN_PAYLOAD_BYTES}"
        )));
    }
    Ok(Some(RunPayload(payload)))
}

/// The version to run: the one asked for, or the newest that can be run.
fn image(api: &Api, identifier: &str, version: Option<&str>) -> Result<Lease, ApiError> {
    let name = api.place.image_name(identifier, Wording::Run)?;
    let arn = api.place.image_arn(&name);
    let asked = version.map(str::parse).transpose();
    // A text that is no version names none of an image that may not be there either.
    let leased = asked.map_or_else(
        |_| Err(if api.parts.images.image(&name).is_some() { NotRunnable::UnknownVersion } else { NotRunnable::UnknownImage }),
        |asked| api.parts.images.lease(&name, asked),
    );
    leased.map_err(|why| match (why, version) {
        (NotRunnable::UnknownImage, _) => unknown_image(&arn),
        (NotRunnable::UnknownVersion, version) => unknown_version(&arn, version.unwrap_or_default()),
        (NotRunnable::NotActive, None) => ApiError::not_found(format!("No active version found for MicroVM image {arn}")),
        (NotRunnable::NotActive, Some(text)) => {
            let version = text.parse().map_or_else(|_| text.to_owned(), |version: ImageVersion| version.to_string());
            ApiError::not_found(format!("No active version found for MicroVM image {arn} and version {version}"))
        }
    })
}

/// What is asked for, or HTTP. As at AWS, ALL_INGRESS may stand beside others here and is told of where a shell token is
/// asked for (aws-behaviour §2.1). What a microVM has decides which tokens there are for it, and without a token its
/// endpoint refuses everybody.
fn ingress(api: &Api, asked: Vec<String>) -> Result<Vec<String>, ApiError> {
    if asked.is_empty() {
        return Ok(vec![api.place.connector_arn("HTTP_INGRESS")]);
    }
    let mut names = Vec::new();
    for arn in &asked {
        names.push(api.place.connector(arn, &INGRESS)?);
    }
    if names.contains(&"NO_INGRESS") && names.iter().any(|name| *name != "NO_INGRESS") {
        return Err(ApiError::validation("NO_INGRESS cannot be combined with other ingress network connectors"));
    }
    Ok(asked)
}

/// What is asked for; `None`: what the image has.
fn egress(api: &Api, asked: Vec<String>) -> Result<Option<Vec<String>>, ApiError> {
    match &asked[..] {
        [] => Ok(None),
        [arn] => {
            api.place.connector(arn, &EGRESS)?;
            Ok(Some(asked))
        }
        _ => Err(ApiError::validation("Only one egress network connector can be provided")),
    }
}

/// The egress that an image was made with, or the internet.
fn egress_of(api: &Api, image: &ImageRecord) -> Vec<String> {
    let connectors = image_body::Remembered::of(image).input["egressNetworkConnectors"].take();
    let connectors: Vec<String> = serde_json::from_value(connectors).unwrap_or_default();
    if connectors.is_empty() { vec![api.place.connector_arn("INTERNET_EGRESS")] } else { connectors }
}
