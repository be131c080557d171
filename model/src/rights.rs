//! What an app may do beyond computing: which powers over its kernel it has, and where it may connect to.

use serde::{Deserialize, Serialize};

/// The entry of a microVM's identity that names its execution role, by ARN.
pub const EXECUTION_ROLE: &str = "DORMOUSE_EXECUTION_ROLE";

/// What an app may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rights {
    /// Powers over its kernel.
    pub capabilities: Capabilities,
    /// Where it may connect to.
    pub egress: Egress,
}

/// Powers over the guest's kernel, of processes that are root (aws-behaviour §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capabilities {
    /// Those that Docker gives.
    #[default]
    Usual,
    /// Every one, `/dev/fuse`, and a cgroup tree that can be written.
    All,
}

/// Where a guest may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Nowhere.
    #[default]
    Nothing,
    /// The internet, and what the operator adds; never the host itself, nor private networks.
    Internet,
}

/// Which network the RUN steps of an image's build have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BuildNetwork {
    /// What a guest with [`Egress::Internet`] reaches.
    #[default]
    Internet,
    /// None but a loopback of their own.
    Nothing,
    /// The host's, its loopback included.
    Host,
}
