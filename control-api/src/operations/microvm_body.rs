//! A microVM as RunMicrovm, GetMicrovm and ListMicrovms show it. What is absent is an explicit null, as AWS writes it.

use idle_controller::MicrovmView;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Api;
use crate::reply::timestamp;

/// What the API remembers of a RunMicrovm call, in the controller's keeping.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Remembered {
    pub(super) execution_role_arn: Option<String>,
    pub(super) ingress_network_connectors: Vec<String>,
    pub(super) egress_network_connectors: Vec<String>,
    pub(super) logging: Option<Value>,
    pub(super) client_token: Option<String>,
    /// The access key id that asked for it: client tokens are its own.
    pub(super) by: Option<String>,
    pub(super) kms_key_identifier: Option<String>,
    /// Baseline memory of its image version.
    pub(super) memory_mib: Option<u32>,
}

impl Remembered {
    /// Of a microVM; one made by an older version may lack some of it.
    pub(super) fn of(view: &MicrovmView) -> Self {
        serde_json::from_value(view.request.clone()).unwrap_or_default()
    }

    /// Whether one of its ingress connectors is the managed one of this name.
    pub(super) fn has_ingress(&self, name: &str) -> bool {
        self.ingress_network_connectors.iter().any(|arn| arn.rsplit(':').next() == Some(name))
    }
}

/// All of it.
pub(super) fn whole(api: &Api, view: &MicrovmView) -> Value {
    let remembered = Remembered::of(view);
    let idle_policy = view.idle.map(|idle| {
        json!({
            "maxIdleDurationSeconds": idle.max_idle.as_secs(),
            "suspendedDurationSeconds": idle.suspended.as_secs(),
            "autoResumeEnabled": idle.auto_resume,
        })
    });
    json!({
        "microvmId": view.id,
        "state": view.state.as_str(),
        "stateReason": view.state_reason,
        "endpoint": format!("{}.{}", view.endpoint, api.config.endpoint_authority_suffix),
        "imageArn": api.place.image_arn(&view.image),
        "imageVersion": view.version,
        "executionRoleArn": remembered.execution_role_arn,
        "idlePolicy": idle_policy,
        "maximumDurationInSeconds": view.max_duration.as_secs(),
        "startedAt": timestamp(view.started_at),
        "terminatedAt": view.terminated_at.map(timestamp),
        // Undocumented, and null whenever recorded.
        "terminationReasonCode": null,
        "kmsKeyIdentifier": remembered.kms_key_identifier,
        "ingressNetworkConnectors": remembered.ingress_network_connectors,
        "egressNetworkConnectors": remembered.egress_network_connectors,
    })
}

/// The five members of a list's item.
pub(super) fn item(api: &Api, view: &MicrovmView) -> Value {
    json!({
        "microvmId": view.id,
        "state": view.state.as_str(),
        "imageArn": api.place.image_arn(&view.image),
        "imageVersion": view.version,
        "startedAt": timestamp(view.started_at),
    })
}
