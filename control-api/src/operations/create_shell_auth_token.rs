//! CreateMicrovmShellAuthToken: a token for the shell of one microVM (aws-behaviour §2.1).

use serde::Deserialize;
use serde_json::Value;

use super::{
    Api,
    create_auth_token::{self, Opens},
    microvm_body::Remembered,
    read,
};
use crate::reply::{Answer, ApiError};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    microvm_identifier: String,
    expiration_in_minutes: u64,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let lifetime = create_auth_token::lifetime(input.expiration_in_minutes)?;
    let handle = create_auth_token::alive(api, &input.microvm_identifier)?;
    check(&Remembered::of(&handle.view()).ingress_network_connectors)?;
    Ok(create_auth_token::minted(api, handle.id(), Opens::Shell, lifetime))
}

/// Whether these ingress connectors let a shell in; AWS's words if not. RunMicrovm takes what is refused here.
fn check(connectors: &[String]) -> Result<(), ApiError> {
    let has = |name: &str| connectors.iter().any(|arn| arn.rsplit(':').next() == Some(name));
    if has("ALL_INGRESS") && connectors.len() > 1 {
        return Err(ApiError::validation(
            "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead",
        ));
    }
    if has("SHELL_INGRESS") {
        return Ok(());
    }
    Err(ApiError::validation("Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connectors_decide() {
        let told = |names: &[&str]| {
            let arns: Vec<_> = names.iter().map(|name| format!("arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:{name}")).collect();
            check(&arns).map_err(|error| error.message.unwrap_or_default())
        };
        let needs = Err("Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.".to_owned());
        let combined =
            Err("ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead".to_owned());
        for (names, expected) in [
            (&["HTTP_INGRESS", "SHELL_INGRESS"][..], &Ok(())),
            (&["SHELL_INGRESS"], &Ok(())),
            (&["HTTP_INGRESS"], &needs),
            (&["ALL_INGRESS"], &needs),
            (&["NO_INGRESS"], &needs),
            (&[], &needs),
            (&["ALL_INGRESS", "SHELL_INGRESS"], &combined),
            (&["SHELL_INGRESS", "ALL_INGRESS"], &combined),
            (&["ALL_INGRESS", "HTTP_INGRESS"], &combined),
        ] {
            assert_eq!(&told(names), expected, "{names:?}");
        }
    }
}
