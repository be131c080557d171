//! GetMicrovm: all that is publicly known of one microVM.

use serde_json::Value;

use super::{Api, microvm_body, named_microvm};
use crate::reply::{Answer, ApiError};

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let view = named_microvm(api, input)?.view();
    Ok(Answer::ok(microvm_body::whole(api, &view)))
}
