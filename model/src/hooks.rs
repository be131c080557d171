//! Lifecycle hooks: what an app wants to be told about itself, where, and how long each call may take (aws-behaviour §4).

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::Port;

/// One of AWS's six hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// While an image is built, before its snapshot: whether the app is ready to be one.
    Ready,
    /// While an image is built, on a clone that is thrown away: whether the snapshot is good.
    Validate,
    /// After a microVM was cloned, before anything else reaches it.
    Run,
    /// After a wake, before anything else reaches it.
    Resume,
    /// Before it is put to sleep.
    Suspend,
    /// Before it is ended while it is awake.
    Terminate,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Ready, Self::Validate, Self::Run, Self::Resume, Self::Suspend, Self::Terminate];

    /// The last part of its path, and its name in the API: `ready`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Validate => "validate",
            Self::Run => "run",
            Self::Resume => "resume",
            Self::Suspend => "suspend",
            Self::Terminate => "terminate",
        }
    }

    /// As AWS's reasons begin (aws-behaviour §3.5, §4): `Ready`.
    pub fn title(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Validate => "Validate",
            Self::Run => "Run",
            Self::Resume => "Resume",
            Self::Suspend => "Suspend",
            Self::Terminate => "Terminate",
        }
    }

    /// The fixed path that is posted to.
    pub fn path(self) -> &'static str {
        match self {
            Self::Ready => "/aws/lambda-microvms/runtime/v1/ready",
            Self::Validate => "/aws/lambda-microvms/runtime/v1/validate",
            Self::Run => "/aws/lambda-microvms/runtime/v1/run",
            Self::Resume => "/aws/lambda-microvms/runtime/v1/resume",
            Self::Suspend => "/aws/lambda-microvms/runtime/v1/suspend",
            Self::Terminate => "/aws/lambda-microvms/runtime/v1/terminate",
        }
    }

    /// How long it has if the image does not say. Sources contradict each other about the two of a build (60 s or 30 s, 1 s or
    /// 30 s): the longer one, since a build that is patient fails nobody.
    pub fn default_timeout(self) -> Duration {
        match self {
            Self::Ready => Duration::from_secs(60),
            Self::Validate => Duration::from_secs(30),
            Self::Run | Self::Resume | Self::Suspend | Self::Terminate => Duration::from_secs(1),
        }
    }
}

/// The hooks of an image version: a hook without a time is disabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Where the app listens for them; may be the port of its requests.
    pub port: Port,
    /// How long `/ready` has in all, with all the times that it answers 503.
    pub ready: Option<Duration>,
    /// How long `/validate` has in all.
    pub validate: Option<Duration>,
    /// How long `/run` has.
    pub run: Option<Duration>,
    /// How long `/resume` has.
    pub resume: Option<Duration>,
    /// How long `/suspend` has.
    pub suspend: Option<Duration>,
    /// How long `/terminate` has.
    pub terminate: Option<Duration>,
}

impl Hooks {
    /// None enabled.
    pub fn none(port: Port) -> Self {
        Self { port, ready: None, validate: None, run: None, resume: None, suspend: None, terminate: None }
    }

    /// How long a hook has; `None`: it is disabled.
    pub fn timeout(&self, hook: Hook) -> Option<Duration> {
        match hook {
            Hook::Ready => self.ready,
            Hook::Validate => self.validate,
            Hook::Run => self.run,
            Hook::Resume => self.resume,
            Hook::Suspend => self.suspend,
            Hook::Terminate => self.terminate,
        }
    }

    /// Enables a hook.
    pub fn enable(&mut self, hook: Hook, timeout: Duration) {
        let slot = match hook {
            Hook::Ready => &mut self.ready,
            Hook::Validate => &mut self.validate,
            Hook::Run => &mut self.run,
            Hook::Resume => &mut self.resume,
            Hook::Suspend => &mut self.suspend,
            Hook::Terminate => &mut self.terminate,
        };
        *slot = Some(timeout);
    }
}

/// What RunMicrovm hands to `/run`. Often a secret: it is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunPayload(pub String);

impl fmt::Debug for RunPayload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunPayload({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_enabled_by_itself_and_has_its_own_path() {
        for hook in Hook::ALL {
            let mut hooks = Hooks::none(Port::DEFAULT);
            hooks.enable(hook, Duration::from_secs(7));
            let enabled: Vec<_> = Hook::ALL.into_iter().filter(|hook| hooks.timeout(*hook).is_some()).collect();
            assert_eq!(enabled, [hook]);
            assert_eq!(hook.path(), format!("/aws/lambda-microvms/runtime/v1/{}", hook.name()));
            assert_eq!(hook.title().to_lowercase(), hook.name());
        }
    }

    #[test]
    fn a_payload_is_not_shown() {
        assert_eq!(format!("{:?}", RunPayload("secret".to_owned())), "RunPayload(6 bytes)");
    }
}
