//! The `hooks` member of CreateMicrovmImage and UpdateMicrovmImage (aws-behaviour §4).

use std::time::Duration;

use model::{Hook, Hooks, Port};
use serde_json::Value;

use crate::reply::ApiError;

/// The member of the input that a hook is switched on in.
fn group(hook: Hook) -> &'static str {
    match hook {
        Hook::Ready | Hook::Validate => "microvmImageHooks",
        Hook::Run | Hook::Resume | Hook::Suspend | Hook::Terminate => "microvmHooks",
    }
}

/// What the caller enabled; `None` if that is nothing. The model of the input was checked before.
pub(super) fn read(input: Option<&Value>) -> Result<Option<Hooks>, ApiError> {
    let Some(input) = input else { return Ok(None) };
    let enabled: Vec<Hook> = Hook::ALL.into_iter().filter(|hook| input[group(*hook)][hook.name()] == "ENABLED").collect();
    if enabled.is_empty() {
        return Ok(None);
    }
    let port = input["port"].as_u64().and_then(|port| u16::try_from(port).ok()).and_then(Port::new);
    let Some(port) = port else {
        return Err(ApiError::validation("hooks.port is required when a hook is enabled: it is where the app listens for the calls"));
    };
    // An app that is not asked whether it is ready may be in the snapshot before its hooks are.
    if !enabled.contains(&Hook::Ready)
        && let Some(hook) = enabled.iter().find(|hook| group(**hook) == "microvmHooks")
    {
        return Err(ApiError::validation(format!(
            "hooks.microvmHooks.{} is enabled, so the ready hook must be enabled too: set hooks.microvmImageHooks.ready to ENABLED",
            hook.name()
        )));
    }
    let mut hooks = Hooks::none(port);
    for hook in enabled {
        let asked = input[group(hook)][format!("{}TimeoutInSeconds", hook.name())].as_u64();
        hooks.enable(hook, asked.map_or(hook.default_timeout(), Duration::from_secs));
    }
    Ok(Some(hooks))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_disabled_or_absent_is_no_hook() {
        for input in [json!({}), json!({"port": 9000}), json!({"microvmHooks": null, "microvmImageHooks": {"ready": "DISABLED", "readyTimeoutInSeconds": 5}})] {
            assert_eq!(read(Some(&input)).unwrap(), None, "{input}");
        }
        assert_eq!(read(None).unwrap(), None);
    }

    #[test]
    fn a_hook_has_the_time_it_asks_for_or_the_default() {
        let input = json!({
            "port": 9000,
            "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 300, "validate": "ENABLED"},
            "microvmHooks": {"run": "ENABLED", "runTimeoutInSeconds": 60, "resume": "ENABLED", "suspend": "DISABLED"},
        });
        let hooks = read(Some(&input)).unwrap().unwrap();
        let seconds = |hook| hooks.timeout(hook).map(|timeout| timeout.as_secs());
        assert_eq!(Hook::ALL.map(seconds), [Some(300), Some(30), Some(60), Some(1), None, None]);
        assert_eq!(hooks.port.get(), 9000);
    }

    #[test]
    fn a_port_and_the_ready_hook_are_required() {
        let without_port = json!({"microvmImageHooks": {"ready": "ENABLED"}});
        assert!(read(Some(&without_port)).unwrap_err().message.unwrap().contains("hooks.port is required"));
        for hook in ["run", "resume", "suspend", "terminate"] {
            let without_ready = json!({"port": 9000, "microvmHooks": {hook: "ENABLED"}});
            let message = read(Some(&without_ready)).unwrap_err().message.unwrap();
            assert!(message.starts_with(&format!("hooks.microvmHooks.{hook} is enabled, so the ready hook must be enabled too")), "{message}");
        }
        // A build may be validated without being asked when it is ready.
        assert!(read(Some(&json!({"port": 9000, "microvmImageHooks": {"validate": "ENABLED"}}))).unwrap().is_some());
    }
}
