//! `[api]` of the configuration, as the control API takes it.

use std::{collections::BTreeMap, num::NonZeroU32};

use config::{ApiKey, ApiRates, KeyRole};
use control_api::{Rates, Role};

/// Roles by access key id.
pub fn roles(keys: &[ApiKey]) -> BTreeMap<String, Role> {
    let role = |role: &KeyRole| match role {
        KeyRole::Admin => Role::Admin,
        KeyRole::Operator => Role::Operator,
        KeyRole::TokenMinter { images } => Role::TokenMinter(images.iter().cloned().collect()),
    };
    keys.iter().map(|key| (key.id.clone(), role(&key.role))).collect()
}

/// Rates; the configuration has no zero in them.
pub fn rates(rates: &ApiRates) -> Rates {
    let rate = |rate: Option<u32>| rate.and_then(NonZeroU32::new);
    let ApiRates { run, suspend, resume, terminate, get_microvm, list_microvms, auth_token, shell_auth_token, image_changes, others } = *rates;
    Rates {
        run: rate(run),
        suspend: rate(suspend),
        resume: rate(resume),
        terminate: rate(terminate),
        get_microvm: rate(get_microvm),
        list_microvms: rate(list_microvms),
        auth_token: rate(auth_token),
        shell_auth_token: rate(shell_auth_token),
        image_changes: rate(image_changes),
        others: rate(others),
    }
}
