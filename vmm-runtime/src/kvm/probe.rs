//! Whether this host can run the engine: asked of the VMM itself, which tries a guest of two instructions.

use std::path::Path;

use serde::Deserialize;

use super::MISSING;
use crate::{engine::EngineError, host::first_line};

/// What `/dev/kvm` is worth here.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kvm")]
pub enum Probe {
    /// The processor runs guests.
    Hardware,
    /// Guests' kernels are emulated instruction by instruction; a stock kernel does not boot.
    Software {
        /// A sentence.
        why: String,
    },
    /// It cannot be used.
    Missing {
        /// A sentence.
        why: String,
    },
}

/// Runs `<vmm> --probe`. Takes some milliseconds.
pub async fn probe(vmm: &Path) -> Result<Probe, EngineError> {
    let line = first_line(vmm, "--probe", MISSING).await?;
    parse(&line).ok_or_else(|| EngineError::Host { what: format!("{} --probe says {line:?}, which is not understood", vmm.display()) })
}

fn parse(line: &str) -> Option<Probe> {
    serde_json::from_str(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_vmm_says_is_understood() {
        assert_eq!(parse(r#"{"kvm":"hardware"}"#), Some(Probe::Hardware));
        assert_eq!(parse(r#"{"kvm":"software","why":"slow"}"#), Some(Probe::Software { why: "slow".to_owned() }));
        assert_eq!(parse(r#"{"kvm":"missing","why":"no"}"#), Some(Probe::Missing { why: "no".to_owned() }));
        assert_eq!(parse("hardware"), None);
    }
}
