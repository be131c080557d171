//! ResumeMicrovm: wakes a microVM, whatever its policy says of traffic; harmless to repeat.

use serde_json::Value;

use super::{Api, has_ended, named_microvm, refused, terminated};
use crate::reply::{Answer, ApiError};

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let handle = named_microvm(api, input)?;
    if has_ended(&handle) {
        return Err(terminated(&handle));
    }
    match handle.resume().await {
        Ok(()) => Ok(Answer::empty()),
        Err(refusal) => Err(refused(&handle, &refusal)),
    }
}
