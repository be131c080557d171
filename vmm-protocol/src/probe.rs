//! What `dormouse-vmm --probe` says of `/dev/kvm`: one line of JSON.

use serde::{Deserialize, Serialize};

/// What `/dev/kvm` is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kvm")]
pub enum Probe {
    /// The processor runs guests: a stock kernel boots.
    Hardware,
    /// It works, but guests' kernels are emulated instruction by instruction: a stock kernel does not boot.
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

impl Probe {
    /// One line: `{"kvm":"software","why":"…"}`.
    pub fn to_json(&self) -> String {
        // Strings and a tag: nothing in it can fail to be written.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads what [`Probe::to_json`] wrote.
    pub fn from_json(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        assert_eq!(Probe::from_json(r#"{"kvm":"hardware"}"#), Some(Probe::Hardware));
        let software = Probe::Software { why: "slow".to_owned() };
        assert_eq!(Probe::from_json(&software.to_json()), Some(software));
        assert_eq!(Probe::from_json("hardware"), None);
    }
}
