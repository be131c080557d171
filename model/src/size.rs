//! The sizes a microVM comes in.

use serde::{Deserialize, Serialize};

/// Baseline memory: one of AWS's five (aws-behaviour §5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub struct MemorySize(u32);

impl MemorySize {
    /// All supported sizes, in MiB.
    pub const SUPPORTED_MIB: [u32; 5] = [512, 1024, 2048, 4096, 8192];
    /// What an image gets that asks for nothing: 2048 MiB.
    pub const DEFAULT: Self = Self(2048);

    /// `None` if `mib` is not one of [`Self::SUPPORTED_MIB`].
    pub fn from_mib(mib: u32) -> Option<Self> {
        Self::SUPPORTED_MIB.contains(&mib).then_some(Self(mib))
    }

    /// In MiB.
    pub fn mib(self) -> u32 {
        self.0
    }

    /// Baseline vCPUs that go with this size.
    pub fn vcpus(self) -> f64 {
        f64::from(self.0) / 2048.0
    }

    /// Disk in GiB that goes with this size.
    pub fn disk_gib(self) -> u32 {
        match self.0 {
            4096 => 16,
            8192 => 32,
            _ => 8,
        }
    }
}

impl Default for MemorySize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl From<MemorySize> for u32 {
    fn from(size: MemorySize) -> u32 {
        size.0
    }
}

impl TryFrom<u32> for MemorySize {
    type Error = String;
    fn try_from(mib: u32) -> Result<Self, String> {
        Self::from_mib(mib).ok_or_else(|| format!("{mib} MiB is not a supported memory size; supported are {:?}", Self::SUPPORTED_MIB))
    }
}

/// What the engine gives a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Size of the root disk in GiB (sparse on the host).
    pub disk_gib: u32,
}
