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

/// A sentence.
impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hardware => f.write_str("/dev/kvm has hardware behind it: the probe guest ran on the processor itself"),
            Self::Software { why } => write!(f, "/dev/kvm opens, but it is a software KVM, which cannot run a stock kernel: {why}"),
            Self::Missing { why } => write!(f, "there is no /dev/kvm that can be used: {why}"),
        }
    }
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
