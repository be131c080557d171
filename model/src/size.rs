//! The sizes a microVM comes in.

use serde::{Deserialize, Serialize};

/// How many times its baseline a microVM may use (aws-behaviour §5.2): of memory and of CPU.
const PEAK: u32 = 4;

/// What guests see of their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SizeSeen {
    /// All that they may use, as at AWS.
    #[default]
    Peak,
    /// What they are billed for at least.
    Baseline,
}

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

    /// What a guest of this size is made of. A guest sees no more than that, whatever it uses of it. `seen`: what the node gives;
    /// `processors`: what it has, for a virtual CPU without one of its own would only take turns with another.
    pub fn shape(self, seen: SizeSeen, processors: usize) -> Shape {
        let (times, vcpus) = match seen {
            SizeSeen::Baseline => (1, self.vcpus()),
            SizeSeen::Peak => (PEAK, self.vcpus() * f64::from(PEAK)),
        };
        // At most 16: aws-behaviour §5.2.
        let vcpus = (vcpus.ceil() as u8).min(processors.clamp(1, 16) as u8);
        Shape { memory_mib: self.0 * times, vcpus, disk_gib: self.disk_gib() }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// aws-behaviour §5.2, row by row.
    #[test]
    fn a_guest_sees_the_peak_of_its_size() {
        for (mib, baseline_vcpus, peak_mib, peak_vcpus, disk_gib) in
            [(512, 1, 2048, 1, 8), (1024, 1, 4096, 2, 8), (2048, 1, 8192, 4, 8), (4096, 2, 16384, 8, 16), (8192, 4, 32768, 16, 32)]
        {
            let size = MemorySize::from_mib(mib).unwrap();
            assert_eq!(size.shape(SizeSeen::Peak, 64), Shape { memory_mib: peak_mib, vcpus: peak_vcpus, disk_gib });
            assert_eq!(size.shape(SizeSeen::Baseline, 64), Shape { memory_mib: mib, vcpus: baseline_vcpus, disk_gib });
            assert_eq!(size.shape(SizeSeen::Peak, 2).vcpus, peak_vcpus.min(2), "no more than there are processors");
            assert_eq!(size.shape(SizeSeen::Baseline, 0).vcpus, 1);
        }
    }
}
