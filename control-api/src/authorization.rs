//! Whether a caller may do what it asks for.
//!
//! Owns: what each role may do, and AWS's words for what it may not. Works on what is asked for as it came, before the
//! model is looked at, so a caller without the right learns nothing of what is there.

use model::ImageName;
use serde_json::Value;

use crate::{
    arn::Wording,
    caller::{Caller, Role},
    operations::Api,
    reply::{ApiError, ErrorKind},
    routes::Operation,
};

/// What an operation does, as far as roles tell one from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Changes images or their tags.
    Images,
    /// Runs, suspends, resumes, ends microVMs, or looks at images.
    Microvms,
    /// Looks at one microVM or mints a token for it.
    OneMicrovm,
    /// Lists microVMs.
    List,
}

fn needs(operation: Operation) -> Needs {
    use Operation as Op;
    match operation {
        Op::CreateMicrovmImage
        | Op::UpdateMicrovmImage
        | Op::DeleteMicrovmImage
        | Op::UpdateMicrovmImageVersion
        | Op::DeleteMicrovmImageVersion
        | Op::TagResource
        | Op::UntagResource => Needs::Images,
        Op::GetMicrovm | Op::CreateMicrovmAuthToken | Op::CreateMicrovmShellAuthToken => Needs::OneMicrovm,
        Op::ListMicrovms => Needs::List,
        Op::RunMicrovm
        | Op::TerminateMicrovm
        | Op::SuspendMicrovm
        | Op::ResumeMicrovm
        | Op::ListMicrovmImages
        | Op::GetMicrovmImage
        | Op::ListMicrovmImageVersions
        | Op::GetMicrovmImageVersion
        | Op::ListMicrovmImageBuilds
        | Op::GetMicrovmImageBuild
        | Op::ListManagedMicrovmImages
        | Op::ListManagedMicrovmImageVersions
        | Op::ListTags => Needs::Microvms,
    }
}

/// Refuses what the caller's role does not hold. `input` may be anything.
pub(crate) fn check(api: &Api, caller: &Caller, operation: Operation, input: &Value) -> Result<(), ApiError> {
    let needs = needs(operation);
    let allowed = match &caller.role {
        Some(Role::Admin) => true,
        Some(Role::Operator) => needs != Needs::Images,
        Some(Role::TokenMinter(images)) => match needs {
            Needs::Images | Needs::Microvms => false,
            // Of a microVM that is not there the operation says so; ids cannot be guessed.
            Needs::OneMicrovm => microvm_image(api, input).is_none_or(|image| images.contains(&image)),
            // Without a filter the list holds what the caller may see.
            Needs::List => named_image(api, input).is_none_or(|image| images.contains(&image)),
        },
        None => false,
    };
    if allowed { Ok(()) } else { Err(denied(api, caller, &format!("lambda:{}", operation.name()), &resource(api, operation, input))) }
}

/// The same for what this node offers beyond AWS: it shows what every app says and uses, so admins and operators read it.
pub(crate) fn check_extra(api: &Api, caller: &Caller, action: &str) -> Result<(), ApiError> {
    match caller.role {
        Some(Role::Admin | Role::Operator) => Ok(()),
        Some(Role::TokenMinter(_)) | None => Err(denied(api, caller, &format!("dormouse:{action}"), "*")),
    }
}

fn denied(api: &Api, caller: &Caller, action: &str, resource: &str) -> ApiError {
    ApiError::new(
        ErrorKind::AccessDenied,
        format!(
            "User: arn:aws:iam::{}:user/{} is not authorized to perform: {action} on resource: {resource} because no identity-based policy \
             allows the {action} action",
            api.config.account, caller.name
        ),
    )
}

/// As at AWS, the resource is the image, and `*` where there is none (aws-behaviour §7.4).
fn resource(api: &Api, operation: Operation, input: &Value) -> String {
    let image = match needs(operation) {
        Needs::OneMicrovm => microvm_image(api, input),
        _ => microvm_image(api, input).or_else(|| named_image(api, input)),
    };
    image.map_or_else(|| "*".to_owned(), |image| api.place.image_arn(&image))
}

fn microvm_image(api: &Api, input: &Value) -> Option<ImageName> {
    let id = input.get("microvmIdentifier")?.as_str()?.parse().ok()?;
    Some(api.parts.controller.find(id)?.view().image)
}

fn named_image(api: &Api, input: &Value) -> Option<ImageName> {
    let named = ["imageIdentifier", "Resource", "name"].iter().find_map(|member| input.get(member)?.as_str())?;
    api.place.image_name(named, Wording::Image).ok()
}
