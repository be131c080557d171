//! How a call ended, and what people read about it.

use std::{fmt::Write as _, time::Duration};

use http::StatusCode;
use model::Hook;
use vmm_runtime::engine::Exit;

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With this status. Only 200 is a yes.
    Answered(StatusCode),
    /// Nobody listened on the hook port until the time was over.
    Refused,
    /// The app took the call and did not answer in time.
    TimedOut,
    /// The connection broke; for the log.
    Transport(String),
    /// The app or its VMM ended meanwhile.
    Ended(Exit),
}

/// A hook that did not answer 200. `Display` is the sentence of aws-behaviour §3.5, the API's `stateReason`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct HookFailed {
    /// Which.
    pub hook: Hook,
    /// The time that it had.
    pub limit: Duration,
    /// What came instead.
    pub outcome: Outcome,
}

const ADVICE: &str = "Please check your hook endpoint and application logs for more details.";

impl HookFailed {
    fn sentence(&self) -> String {
        let hook = self.hook.title();
        match &self.outcome {
            Outcome::Answered(status) => format!("{hook} lifecycle hook returned HTTP status {}. {ADVICE}", status.as_u16()),
            Outcome::Refused => format!("{hook} lifecycle hook connection was refused. {ADVICE}"),
            Outcome::TimedOut => format!("{hook} lifecycle hook timed out. {ADVICE}"),
            Outcome::Transport(_) | Outcome::Ended(_) => format!("{hook} lifecycle hook failed."),
        }
    }

    /// The same of a hook of an image build, in the words of aws-behaviour §4.
    pub fn of_build(&self) -> String {
        let hook = self.hook.title();
        let answered = |class: &str, form: &str| format!("{hook} hook check failed: the application returned a {class} error (HTTP {form}) response");
        match &self.outcome {
            Outcome::Answered(StatusCode::SERVICE_UNAVAILABLE) | Outcome::Refused | Outcome::TimedOut => {
                format!("{hook} hook invocation timed out after {}", iso8601(self.limit))
            }
            Outcome::Answered(status) if status.is_server_error() => answered("server", "5xx"),
            Outcome::Answered(status) if status.is_client_error() => answered("client", "4xx"),
            Outcome::Answered(status) => {
                format!("{hook} hook check failed: the application returned HTTP status {} instead of 200", status.as_u16())
            }
            Outcome::Transport(why) => format!("{hook} hook check failed: {why}"),
            Outcome::Ended(Exit::App { code }) => format!("{hook} hook check failed: the application ended with exit code {code}"),
            Outcome::Ended(Exit::Vmm { .. }) => format!("{hook} hook check failed: the MicroVM ended"),
        }
    }

    /// What the last try met, for a log.
    pub fn detail(&self) -> String {
        match &self.outcome {
            Outcome::Answered(status) => format!("it answered HTTP status {}", status.as_u16()),
            Outcome::Refused => "nobody listened on the hook port".to_owned(),
            Outcome::TimedOut => "it took the call and did not answer in time".to_owned(),
            Outcome::Transport(why) => why.clone(),
            Outcome::Ended(exit) => format!("the microVM ended: {exit:?}"),
        }
    }
}

/// As java.time.Duration writes whole seconds: `PT5M`, `PT1M30S`, `PT1H`.
fn iso8601(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let mut text = "PT".to_owned();
    for (amount, unit) in [(seconds / 3600, 'H'), (seconds / 60 % 60, 'M'), (seconds % 60, 'S')] {
        if amount > 0 {
            // Writing to a String cannot fail.
            let _ = write!(text, "{amount}{unit}");
        }
    }
    if text == "PT" { "PT0S".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_java_writes_them() {
        for (seconds, text) in [(0, "PT0S"), (1, "PT1S"), (60, "PT1M"), (90, "PT1M30S"), (300, "PT5M"), (3600, "PT1H"), (3599, "PT59M59S"), (3601, "PT1H1S")] {
            assert_eq!(iso8601(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn reasons_are_those_of_aws() {
        let failed = |hook, outcome| HookFailed { hook, limit: Duration::from_secs(300), outcome };
        let status = |code| Outcome::Answered(StatusCode::from_u16(code).unwrap());
        for (failure, lifecycle) in [
            (
                failed(Hook::Run, status(400)),
                "Run lifecycle hook returned HTTP status 400. Please check your hook endpoint and application logs for more details.",
            ),
            (
                failed(Hook::Resume, Outcome::Refused),
                "Resume lifecycle hook connection was refused. Please check your hook endpoint and application logs for more details.",
            ),
            (failed(Hook::Run, Outcome::TimedOut), "Run lifecycle hook timed out. Please check your hook endpoint and application logs for more details."),
            (failed(Hook::Resume, Outcome::Transport("reset".to_owned())), "Resume lifecycle hook failed."),
        ] {
            assert_eq!(failure.to_string(), lifecycle);
        }
        for (failure, build) in [
            (failed(Hook::Ready, status(503)), "Ready hook invocation timed out after PT5M"),
            (failed(Hook::Validate, Outcome::Refused), "Validate hook invocation timed out after PT5M"),
            (failed(Hook::Ready, status(500)), "Ready hook check failed: the application returned a server error (HTTP 5xx) response"),
            (failed(Hook::Validate, status(404)), "Validate hook check failed: the application returned a client error (HTTP 4xx) response"),
        ] {
            assert_eq!(failure.of_build(), build);
        }
    }
}
