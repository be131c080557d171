//! The life of an image and a microVM by the AWS SDK for Rust, which was told nothing but the variables of `dormouse env`.
//! Arguments: name of the image, URI of its zip. Prints what the SDK made of each answer, as JSON.

use std::{error::Error, time::Duration};

use aws_config::BehaviorVersion;
use aws_sdk_lambdamicrovms::{
    Client,
    error::ProvideErrorMetadata as _,
    operation::get_microvm::GetMicrovmOutput,
    types::{CodeArtifact, IdlePolicy, MicrovmImageState, MicrovmState, PortSpecification, Resources},
};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, uri] = &arguments[..] else { return Err("two arguments: NAME URI".into()) };
    let http = aws_smithy_http_client::Builder::new().build_http();
    let config = aws_config::defaults(BehaviorVersion::latest()).http_client(http).load().await;
    let region = config.region().ok_or("no region")?.to_string();
    let client = Client::new(&config);

    let created = client
        .create_microvm_image()
        .name(name)
        .code_artifact(CodeArtifact::Uri(uri.clone()))
        .base_image_arn(format!("arn:aws:lambda:{region}:aws:microvm-image:al2023-1"))
        .build_role_arn("arn:aws:iam::123456789012:role/MicroVMBuildRole")
        .resources(Resources::builder().minimum_memory_in_mib(512).build()?)
        .send()
        .await?;
    let arn = created.image_arn();
    let image = loop {
        let image = client.get_microvm_image().image_identifier(arn).send().await?;
        if image.state() != &MicrovmImageState::Creating {
            break image;
        }
        pause().await;
    };
    let idle = IdlePolicy::builder().max_idle_duration_seconds(300).suspended_duration_seconds(300).auto_resume_enabled(true).build()?;
    let ran = client.run_microvm().image_identifier(arn).idle_policy(idle).send().await?;
    let id = ran.microvm_id();
    let running = reaches(&client, id, MicrovmState::Running).await?;
    let token = client.create_microvm_auth_token().microvm_identifier(id).expiration_in_minutes(5).allowed_ports(PortSpecification::Port(8080)).send().await?;
    client.suspend_microvm().microvm_identifier(id).send().await?;
    let suspended = reaches(&client, id, MicrovmState::Suspended).await?;
    client.resume_microvm().microvm_identifier(id).send().await?;
    let resumed = reaches(&client, id, MicrovmState::Running).await?;
    let mut listed = Vec::new();
    let mut pages = client.list_microvms().into_paginator().page_size(1).items().send();
    while let Some(item) = pages.next().await {
        listed.push(item?.microvm_id().to_owned());
    }
    let one = client.list_microvms().image_identifier(arn).send().await?;
    client.terminate_microvm().microvm_identifier(id).send().await?;
    let terminated = reaches(&client, id, MicrovmState::Terminated).await?;
    let Err(error) = client.get_microvm().microvm_identifier("microvm-00000000-0000-4000-8000-000000000000").send().await else {
        return Err("a microVM that is not there was found".into());
    };
    let status = error.raw_response().map(|response| response.status().as_u16());
    let error = error.into_service_error();

    println!(
        "{}",
        json!({
            "created": {"state": created.state().as_str(), "imageVersion": created.image_version()},
            "image": {"state": image.state().as_str(), "name": image.name(), "latestActiveImageVersion": image.latest_active_image_version()},
            "ran": {"microvmId": id, "state": ran.state().as_str()},
            "running": running,
            "token": {"authToken": token.auth_token()},
            "suspended": suspended,
            "resumed": resumed,
            "listed": listed,
            "one": one.items().iter().map(|item| json!({"microvmId": item.microvm_id()})).collect::<Vec<_>>(),
            "terminated": terminated,
            "refused": {"known": error.is_resource_not_found_exception(), "name": error.code(), "status": status, "message": error.message()},
        })
    );
    Ok(())
}

/// Asks until it is so; whoever runs this has a ceiling.
async fn reaches(client: &Client, id: &str, state: MicrovmState) -> Outcome<Value> {
    loop {
        let view: GetMicrovmOutput = client.get_microvm().microvm_identifier(id).send().await?;
        if [&state, &MicrovmState::Terminated].contains(&view.state()) {
            return Ok(json!({"microvmId": view.microvm_id(), "state": view.state().as_str(), "stateReason": view.state_reason()}));
        }
        pause().await;
    }
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}
