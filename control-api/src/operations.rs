//! The operations, one file each, and what several of them share.
//!
//! An operation gets its input after it was checked against the model; what is left for it to check is what the model
//! cannot say.

mod create_auth_token;
mod create_image;
mod create_shell_auth_token;
mod delete_image;
mod delete_image_version;
mod get_image;
mod get_image_build;
mod get_image_version;
mod get_microvm;
mod hooks;
mod image_body;
mod list_image_builds;
mod list_image_versions;
mod list_images;
mod list_managed_images;
mod list_managed_versions;
mod list_microvms;
mod list_tags;
mod microvm_body;
mod resume_microvm;
mod run_microvm;
mod suspend_microvm;
mod tag_resource;
mod tags;
mod terminate_microvm;
mod untag_resource;
mod update_image;
mod update_image_version;

use std::sync::Arc;

use idle_controller::{MicrovmHandle, MicrovmView, Refused};
use image_builder::ImageRecord;
use model::MicrovmState;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    ApiConfig, Parts,
    arn::Place,
    caller::Caller,
    client_tokens::ClientTokens,
    extras::log_names::{LogName, LogNames},
    quotas::MemoryQuota,
    reply::{Answer, ApiError, ErrorKind},
    routes::Operation,
};

/// What operations work with.
pub(crate) struct Api {
    pub(crate) config: ApiConfig,
    pub(crate) place: Place,
    pub(crate) parts: Parts,
    pub(crate) client_tokens: ClientTokens,
    pub(crate) memory: MemoryQuota,
    /// Held while tags are read, changed and written.
    pub(crate) tag_changes: tokio::sync::Mutex<()>,
    pub(crate) log_names: Arc<LogNames>,
}

/// Does what was asked.
pub(crate) async fn call(api: &Api, caller: &Caller, operation: Operation, input: Value) -> Result<Answer, ApiError> {
    match operation {
        Operation::RunMicrovm => run_microvm::call(api, caller, input).await,
        Operation::ListMicrovms => list_microvms::call(api, caller, input),
        Operation::GetMicrovm => get_microvm::call(api, input),
        Operation::TerminateMicrovm => terminate_microvm::call(api, input).await,
        Operation::SuspendMicrovm => suspend_microvm::call(api, input).await,
        Operation::ResumeMicrovm => resume_microvm::call(api, input).await,
        Operation::CreateMicrovmAuthToken => create_auth_token::call(api, input),
        Operation::CreateMicrovmShellAuthToken => create_shell_auth_token::call(api, input),
        Operation::CreateMicrovmImage => create_image::call(api, caller, input).await,
        Operation::ListMicrovmImages => list_images::call(api, input),
        Operation::GetMicrovmImage => get_image::call(api, input),
        Operation::ListMicrovmImageVersions => list_image_versions::call(api, input),
        Operation::GetMicrovmImageVersion => get_image_version::call(api, input),
        Operation::ListMicrovmImageBuilds => list_image_builds::call(api, input),
        Operation::GetMicrovmImageBuild => get_image_build::call(api, input),
        Operation::ListManagedMicrovmImages => list_managed_images::call(api, input),
        Operation::ListManagedMicrovmImageVersions => list_managed_versions::call(api, input),
        Operation::ListTags => list_tags::call(api, input),
        Operation::TagResource => tag_resource::call(api, input).await,
        Operation::UntagResource => untag_resource::call(api, input).await,
        Operation::UpdateMicrovmImage => update_image::call(api, caller, input).await,
        Operation::DeleteMicrovmImage => delete_image::call(api, input).await,
        Operation::UpdateMicrovmImageVersion => update_image_version::call(api, input).await,
        Operation::DeleteMicrovmImageVersion => delete_image_version::call(api, input).await,
    }
}

/// The input as a type. The model was checked before, so a failure is a mistake of ours.
fn read<T: DeserializeOwned>(input: Value) -> Result<T, ApiError> {
    serde_json::from_value(input).map_err(|cause| ApiError::internal("reading a request that fits the model", &cause))
}

/// GetMicrovm, SuspendMicrovm, ResumeMicrovm, TerminateMicrovm.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OneMicrovm {
    microvm_identifier: String,
}

/// The microVM an identifier names.
pub(crate) fn find_microvm(api: &Api, identifier: &str) -> Result<MicrovmHandle, ApiError> {
    let handle = identifier.parse().ok().and_then(|id| api.parts.controller.find(id));
    handle.ok_or_else(|| ApiError::not_found(format!("MicroVM not found: {identifier}")))
}

fn named_microvm(api: &Api, input: Value) -> Result<MicrovmHandle, ApiError> {
    find_microvm(api, &read::<OneMicrovm>(input)?.microvm_identifier)
}

/// The name of a microVM's log; `None` if it has none.
pub(crate) fn log_name(view: &MicrovmView) -> Option<LogName> {
    LogName::of(view, microvm_body::Remembered::of(view).logging.as_ref())
}

/// The baseline memory that a microVM was run with.
pub(crate) fn microvm_memory_mib(api: &Api, view: &MicrovmView) -> u32 {
    let remembered = microvm_body::Remembered::of(view).memory_mib;
    // One of before this was recorded: its image is there as long as it is.
    remembered.or_else(|| api.parts.images.get(&view.image, view.version).map(|record| record.memory.mib())).unwrap_or_default()
}

/// The same of the log of a build.
pub(crate) fn build_log_name(record: &ImageRecord) -> Option<LogName> {
    LogName::of_build(record, &image_body::Remembered::of(record).input["logging"])
}

/// AWS's words for changing what has ended (aws-behaviour §3.4).
fn terminated(handle: &MicrovmHandle) -> ApiError {
    ApiError::validation(format!("The MicroVM {} has been terminated and its state cannot be changed.", handle.id()))
}

fn has_ended(handle: &MicrovmHandle) -> bool {
    matches!(handle.state(), MicrovmState::Terminating | MicrovmState::Terminated)
}

/// What the caller of a suspend or resume reads when it was not done.
fn refused(handle: &MicrovmHandle, refusal: &Refused) -> ApiError {
    match refusal {
        Refused::Terminated => terminated(handle),
        Refused::Busy => ApiError::new(ErrorKind::Throttling, "Too many requests wait for this MicroVM. Try again."),
        Refused::Asleep | Refused::StartFailed { .. } | Refused::TimedOut { .. } | Refused::SuspendFailed { .. } => {
            ApiError::new(ErrorKind::Internal, format!("{}: {refusal}", handle.id()))
        }
    }
}
