//! The host's CPU, as far as it shows in a guest's memory.

use std::fs;

use sha2::{Digest, Sha256};

/// `/proc/cpuinfo` of the first CPU.
pub(crate) struct Cpu {
    text: String,
}

impl Cpu {
    pub fn of_host() -> Self {
        Self { text: fs::read_to_string("/proc/cpuinfo").unwrap_or_default() }
    }

    /// A field, or `unknown`.
    pub fn field(&self, name: &str) -> &str {
        let line = self.text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    }

    /// Stands for all features.
    pub fn features_hash(&self) -> String {
        hex::encode(&Sha256::digest(self.field("flags"))[..8])
    }
}
