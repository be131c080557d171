//! TerminateMicrovm: ends a microVM; harmless to repeat.

use idle_controller::Refused;
use serde_json::Value;

use super::{Api, named_microvm, refused};
use crate::reply::{Answer, ApiError};

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let handle = named_microvm(api, input)?;
    match handle.terminate().await {
        Ok(()) | Err(Refused::Terminated) => Ok(Answer::empty()),
        Err(refusal) => Err(refused(&handle, &refusal)),
    }
}
