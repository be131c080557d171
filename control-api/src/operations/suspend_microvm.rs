//! SuspendMicrovm: puts a microVM to sleep; harmless to repeat.

use model::MicrovmState;
use serde_json::Value;

use super::{Api, has_ended, named_microvm, refused, terminated};
use crate::reply::{Answer, ApiError};

pub(super) async fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let handle = named_microvm(api, input)?;
    if has_ended(&handle) {
        return Err(terminated(&handle));
    }
    if handle.state() == MicrovmState::Suspended {
        return Ok(Answer::empty());
    }
    match handle.suspend().await {
        Ok(()) => Ok(Answer::empty()),
        Err(refusal) => Err(refused(&handle, &refusal)),
    }
}
