//! Whether this host can run the engine: asked of the VMM itself, which tries a guest of two instructions.

use std::path::Path;

pub use vmm_protocol::probe::Probe;

use super::MISSING;
use crate::{engine::EngineError, host::first_line};

/// Runs `<vmm> --probe`. Takes some milliseconds.
pub async fn probe(vmm: &Path) -> Result<Probe, EngineError> {
    let line = first_line(vmm, "--probe", MISSING).await?;
    Probe::from_json(&line).ok_or_else(|| EngineError::Host { what: format!("{} --probe says {line:?}, which is not understood", vmm.display()) })
}
