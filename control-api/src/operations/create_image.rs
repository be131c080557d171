//! CreateMicrovmImage: starts building version 1.0 of a new image (aws-behaviour §5.1). What it checks of its input,
//! UpdateMicrovmImage checks as well.

use std::collections::BTreeMap;

use image_builder::{BuildRequest, VERSION_VARIABLE};
use model::{Capabilities, ImageName, ImageVersion, MemorySize, Rights};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Api, hooks,
    image_body::{self, Remembered},
    read,
    tags::{self, Tags},
};
use crate::{
    arn::{EGRESS, MANAGED_VERSIONS},
    artifact,
    caller::Caller,
    client_tokens::Call,
    reply::{Answer, ApiError, ErrorKind},
};

/// What this node builds for.
pub(super) const ARCHITECTURE: &str = "X86_64";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Input {
    base_image_arn: String,
    base_image_version: Option<String>,
    code_artifact: CodeArtifact,
    egress_network_connectors: Option<Vec<String>>,
    cpu_configurations: Option<Vec<CpuConfiguration>>,
    resources: Option<Vec<Resources>>,
    additional_os_capabilities: Option<Vec<String>>,
    hooks: Option<Value>,
    environment_variables: Option<BTreeMap<String, String>>,
    pub(super) client_token: Option<String>,
}

#[derive(Deserialize)]
struct Named {
    name: ImageName,
    tags: Option<Tags>,
}

#[derive(Deserialize)]
struct CodeArtifact {
    uri: String,
}

#[derive(Deserialize)]
struct CpuConfiguration {
    architecture: String,
}

#[derive(Deserialize)]
struct Resources {
    #[serde(rename = "minimumMemoryInMiB")]
    minimum_memory_in_mib: i64,
}

pub(super) async fn call(api: &Api, caller: &Caller, input: Value) -> Result<Answer, ApiError> {
    let parsed: Input = read(input.clone())?;
    let Named { name, tags } = read(input.clone())?;
    let tags = tags.unwrap_or_default();
    let Some(token) = parsed.client_token.clone() else {
        return create(api, caller, name, tags, parsed, input).await;
    };
    let call = Call::new("CreateMicrovmImage", caller, &token, &input, api.parts.clock.wall());
    let done_before = || {
        let image = api.parts.images.image(&name)?;
        let remembered = Remembered::of(image.version(ImageVersion::FIRST)?);
        let same = remembered.input["clientToken"] == token.as_str() && remembered.by.as_ref() == Some(&caller.key);
        same.then(|| Answer::created(image_body::begun(api, &image)))
    };
    let answer = api.client_tokens.once(call, done_before, create(api, caller, name.clone(), tags, parsed, input)).await?;
    still_there(api, &name, &answer)?;
    Ok(answer)
}

/// A repeated call whose image was deleted meanwhile must not be told of an image that will never be there, and must not
/// make it again behind the back of whoever deleted it.
pub(super) fn still_there(api: &Api, name: &ImageName, answer: &Answer) -> Result<(), ApiError> {
    let told = answer.body["id"].as_str();
    if told.is_none() || api.parts.images.image(name).is_some_and(|image| told == Some(image.facts.id.as_str())) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::Conflict,
        format!("The MicroVM image '{name}' that was made with this clientToken has been deleted. Use a new clientToken for a new image."),
    ))
}

async fn create(api: &Api, caller: &Caller, name: ImageName, tags: Tags, parsed: Input, input: Value) -> Result<Answer, ApiError> {
    tags::check(&tags, ErrorKind::Validation)?;
    let request = BuildRequest { tags, ..request(api, caller, name, parsed, input)? };
    // Held until the catalog shows the build, which then is in the sum.
    let _memory = api.memory.admit(api, request.memory.mib())?;
    let created = api.parts.images.create(request).await;
    created.map(|image| Answer::created(image_body::begun(api, &image))).map_err(|error| image_body::refused(api, error))
}

/// Checks what the model cannot say; what is to be built.
pub(super) fn request(api: &Api, caller: &Caller, name: ImageName, parsed: Input, mut input: Value) -> Result<BuildRequest, ApiError> {
    let base_version = base(api, &parsed)?;
    let memory = memory(&parsed)?;
    let hooks = hooks::read(parsed.hooks.as_ref())?;
    if let Some(other) = parsed.cpu_configurations.iter().flatten().find(|cpu| cpu.architecture != ARCHITECTURE) {
        return Err(ApiError::validation(format!(
            "cpuConfigurations: this node builds {ARCHITECTURE} images and not {}; leave the member out or ask for {ARCHITECTURE}",
            other.architecture
        )));
    }
    for arn in parsed.egress_network_connectors.iter().flatten() {
        api.place.connector(arn, &EGRESS)?;
    }
    let mut environment = parsed.environment_variables.unwrap_or_default();
    if let Some(name) = environment.keys().find(|name| name.contains(['=', '\0'])) {
        return Err(ApiError::validation(format!("environmentVariables: '{name}' cannot be the name of a variable")));
    }
    if let Some((name, _)) = environment.iter().find(|(_, value)| value.contains('\0')) {
        return Err(ApiError::validation(format!("environmentVariables: the value of '{name}' contains a NUL")));
    }
    let rights = Rights {
        // The model knows one word, ALL.
        capabilities: if parsed.additional_os_capabilities.is_none_or(|asked| asked.is_empty()) { Capabilities::Usual } else { Capabilities::All },
        egress: api.place.egress(parsed.egress_network_connectors.as_deref().unwrap_or_default()),
    };
    environment.extend(whose(api, &name));
    let artifact = artifact::locate(&parsed.code_artifact.uri, &api.config.s3_dir, api.config.allow_file_artifacts.then_some(&api.config.dir))?;
    // What the caller left to us is remembered as decided, so that every later answer says the same.
    input["baseImageArn"] = json!(api.place.managed_image_arn());
    input["baseImageVersion"] = json!(base_version);
    input["resources"] = json!([{"minimumMemoryInMiB": memory.mib()}]);
    input["cpuConfigurations"] = json!([{"architecture": ARCHITECTURE}]);
    if parsed.egress_network_connectors.is_none_or(|connectors| connectors.is_empty()) {
        input["egressNetworkConnectors"] = json!([api.place.connector_arn("INTERNET_EGRESS")]);
    }
    let remembered = Remembered { input, by: Some(caller.key.clone()) };
    let request = serde_json::to_value(remembered).map_err(|cause| ApiError::internal("writing down a request", &cause))?;
    Ok(BuildRequest { name, artifact, memory, environment, rights, hooks, tags: Tags::new(), request })
}

/// The variables every guest has (aws-behaviour §5.3); they are baked into the image and told again at every restore.
pub(super) fn identity(api: &Api, image: &ImageName, version: ImageVersion) -> BTreeMap<String, String> {
    let mut variables = whose(api, image);
    variables.insert(VERSION_VARIABLE.to_owned(), version.to_string());
    variables
}

/// The same without the version, which the catalog gives.
fn whose(api: &Api, image: &ImageName) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("AWS_LAMBDA_MICROVM_IMAGE_NAME".to_owned(), image.to_string()),
        ("AWS_LAMBDA_MICROVM_IMAGE_ARN".to_owned(), api.place.image_arn(image)),
        ("AWS_REGION".to_owned(), api.config.region.clone()),
    ])
}

/// Checks the managed image; its version as it is shown: the newest unless one is asked for.
fn base(api: &Api, input: &Input) -> Result<ImageVersion, ApiError> {
    let newest = MANAGED_VERSIONS[MANAGED_VERSIONS.len() - 1];
    let asked = input.base_image_version.as_deref();
    let version = asked.map_or(Some(newest), |text| text.parse().ok());
    match version.filter(|version| api.place.is_managed_image(&input.base_image_arn) && MANAGED_VERSIONS.contains(version)) {
        Some(version) => Ok(version),
        None => Err(ApiError::validation(format!(
            "No managed MicroVM Image with arn {} and version {} is available",
            input.base_image_arn,
            asked.map_or_else(|| newest.to_string(), str::to_owned)
        ))),
    }
}

fn memory(input: &Input) -> Result<MemorySize, ApiError> {
    let Some(asked) = input.resources.iter().flatten().next().map(|resources| resources.minimum_memory_in_mib) else {
        return Ok(MemorySize::DEFAULT);
    };
    u32::try_from(asked).ok().and_then(MemorySize::from_mib).ok_or_else(|| {
        ApiError::validation(format!(
            "The requested memory size of {asked} MiB is not supported by base MicroVM image {}. Supported memory sizes in MiB are: {:?}.",
            input.base_image_arn,
            MemorySize::SUPPORTED_MIB
        ))
    })
}
