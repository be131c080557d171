//! What a microVM has used, and what that costs.
//!
//! Owns: the quantities that are billed at AWS (aws-behaviour §8) and the one price function. Never measures.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::MemorySize;

/// Bytes of a GB of memory, of a snapshot and of storage: 2^30, as AWS counts memory.
pub const GB: f64 = (1u64 << 30) as f64;

/// Use above its baseline goes up to this many times the baseline (aws-behaviour §5.2).
pub const PEAK: f64 = 4.0;

/// Use that adds up: of one microVM, or of many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Seconds of being RUNNING (and of going to sleep).
    pub running_seconds: f64,
    /// Of the baseline, while running: vCPUs times seconds.
    pub baseline_vcpu_seconds: f64,
    /// Of the baseline, while running: GB times seconds.
    pub baseline_gb_seconds: f64,
    /// Above the baseline, while used.
    pub burst_vcpu_seconds: f64,
    /// Above the baseline, while used.
    pub burst_gb_seconds: f64,
    /// Of snapshots, by launches and resumes.
    pub snapshot_read_bytes: u64,
    /// Of snapshots, by suspends.
    pub snapshot_written_bytes: u64,
    /// Of snapshots of suspended microVMs: GB times hours.
    pub storage_gb_hours: f64,
    /// From clients to the guest, on all streams of its endpoint.
    pub endpoint_received_bytes: u64,
    /// From the guest to clients.
    pub endpoint_sent_bytes: u64,
    /// From the guest into its network.
    pub network_sent_bytes: u64,
    /// To the guest out of its network.
    pub network_received_bytes: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, more: Self) {
        // Taken apart whole, so that a new quantity cannot be forgotten here.
        let Self {
            running_seconds,
            baseline_vcpu_seconds,
            baseline_gb_seconds,
            burst_vcpu_seconds,
            burst_gb_seconds,
            snapshot_read_bytes,
            snapshot_written_bytes,
            storage_gb_hours,
            endpoint_received_bytes,
            endpoint_sent_bytes,
            network_sent_bytes,
            network_received_bytes,
        } = more;
        self.running_seconds += running_seconds;
        self.baseline_vcpu_seconds += baseline_vcpu_seconds;
        self.baseline_gb_seconds += baseline_gb_seconds;
        self.burst_vcpu_seconds += burst_vcpu_seconds;
        self.burst_gb_seconds += burst_gb_seconds;
        self.snapshot_read_bytes = self.snapshot_read_bytes.saturating_add(snapshot_read_bytes);
        self.snapshot_written_bytes = self.snapshot_written_bytes.saturating_add(snapshot_written_bytes);
        self.storage_gb_hours += storage_gb_hours;
        self.endpoint_received_bytes = self.endpoint_received_bytes.saturating_add(endpoint_received_bytes);
        self.endpoint_sent_bytes = self.endpoint_sent_bytes.saturating_add(endpoint_sent_bytes);
        self.network_sent_bytes = self.network_sent_bytes.saturating_add(network_sent_bytes);
        self.network_received_bytes = self.network_received_bytes.saturating_add(network_received_bytes);
    }
}

impl Usage {
    /// Running for a while: at the baseline of its size, and above it what `vcpus` and `gb`, in use all the while, exceed it, up to
    /// [`PEAK`] times.
    pub fn running(size: MemorySize, seconds: f64, vcpus: f64, gb: f64) -> Self {
        let above = |used: f64, baseline: f64| (used - baseline).clamp(0.0, baseline * (PEAK - 1.0));
        let (baseline_vcpus, baseline_gb) = (size.vcpus(), f64::from(size.mib()) / 1024.0);
        Self {
            running_seconds: seconds,
            baseline_vcpu_seconds: baseline_vcpus * seconds,
            baseline_gb_seconds: baseline_gb * seconds,
            burst_vcpu_seconds: above(vcpus, baseline_vcpus) * seconds,
            burst_gb_seconds: above(gb, baseline_gb) * seconds,
            ..Self::default()
        }
    }
}

/// US dollars for one of each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prices {
    /// A vCPU for a second.
    pub vcpu_second: f64,
    /// A GB of memory for a second.
    pub gb_second: f64,
    /// A GB of snapshots that launches and resumes read.
    pub snapshot_read_gb: f64,
    /// A GB of snapshots that suspends write.
    pub snapshot_written_gb: f64,
    /// A GB of a suspended microVM's snapshot for an hour.
    pub storage_gb_hour: f64,
    /// A GB from the guest to clients or into its network.
    pub transfer_gb: f64,
}

/// US dollars, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// vCPUs and memory, at the baseline and above.
    pub compute: f64,
    /// Snapshots, read and written.
    pub snapshots: f64,
    /// Snapshots, kept.
    pub storage: f64,
    /// Bytes sent.
    pub transfer: f64,
    /// All of it.
    pub total: f64,
}

impl Prices {
    /// What it costs.
    pub fn cost(&self, usage: &Usage) -> Cost {
        let gb = |bytes: u64| bytes as f64 / GB;
        let compute = (usage.baseline_vcpu_seconds + usage.burst_vcpu_seconds) * self.vcpu_second
            + (usage.baseline_gb_seconds + usage.burst_gb_seconds) * self.gb_second;
        let snapshots = gb(usage.snapshot_read_bytes) * self.snapshot_read_gb + gb(usage.snapshot_written_bytes) * self.snapshot_written_gb;
        let storage = usage.storage_gb_hours * self.storage_gb_hour;
        let transfer = gb(usage.endpoint_sent_bytes.saturating_add(usage.network_sent_bytes)) * self.transfer_gb;
        Cost { compute, snapshots, storage, transfer, total: compute + snapshots + storage + transfer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// eu-west-1, as the article has it.
    const ARTICLE: Prices = Prices {
        vcpu_second: 0.000_029_157_2,
        gb_second: 0.000_003_860_3,
        snapshot_read_gb: 0.0,
        snapshot_written_gb: 0.0,
        storage_gb_hour: 0.0,
        transfer_gb: 0.0,
    };

    /// A baseline of 1 vCPU and 2 GB; seconds in all, seconds of burst, and how many times the baseline that is.
    fn browser(seconds: f64, burst_seconds: f64, times: f64) -> f64 {
        let size = MemorySize::from_mib(2048).unwrap();
        let mut usage = Usage::running(size, seconds - burst_seconds, 0.8, 1.5);
        usage += Usage::running(size, burst_seconds, times, 2.0 * times);
        ARTICLE.cost(&usage).total
    }

    #[test]
    fn the_three_examples_of_the_article_cost_what_it_says() {
        // A second at the baseline costs 0.0000291572 + 2 × 0.0000038603 = $0.0000368778. The article rounds up in the first and
        // third, down in the second: no one way of rounding gives all its last digits.
        for (what, cost, told) in [
            ("a simple scrape: 5 s at the baseline", browser(5.0, 0.0, 1.0), 0.000_185),
            ("a heavy page: 8 s, of them 3 s at 2 vCPU and 4 GB", browser(8.0, 3.0, 2.0), 0.000_405),
            ("a PDF: 12 s, of them 5 s at the peak, 4 vCPU and 8 GB", browser(12.0, 5.0, 4.0), 0.000_996),
        ] {
            assert!((cost - told).abs() < 1e-6, "{what}: ${cost:.9}, not ${told}");
        }
    }

    #[test]
    fn what_is_above_the_peak_is_not_billed_and_what_is_below_the_baseline_is() {
        let size = MemorySize::from_mib(512).unwrap();
        let idle = Usage::running(size, 8.0, 0.0, 0.0);
        assert_eq!((idle.baseline_vcpu_seconds, idle.baseline_gb_seconds, idle.burst_vcpu_seconds, idle.burst_gb_seconds), (2.0, 4.0, 0.0, 0.0));
        let wild = Usage::running(size, 8.0, 16.0, 64.0);
        assert_eq!((wild.burst_vcpu_seconds, wild.burst_gb_seconds), (6.0, 12.0), "four times the baseline in all");
    }

    #[test]
    fn snapshots_storage_and_transfer_have_prices_of_their_own() {
        let prices = Prices { snapshot_read_gb: 1.0, snapshot_written_gb: 10.0, storage_gb_hour: 100.0, transfer_gb: 1000.0, ..ARTICLE };
        let usage = Usage {
            snapshot_read_bytes: 1 << 30,
            snapshot_written_bytes: 2 << 30,
            storage_gb_hours: 0.5,
            endpoint_sent_bytes: 1 << 30,
            network_sent_bytes: 1 << 30,
            endpoint_received_bytes: 5 << 30,
            network_received_bytes: 5 << 30,
            ..Usage::default()
        };
        let cost = prices.cost(&usage);
        assert_eq!((cost.compute, cost.snapshots, cost.storage, cost.transfer, cost.total), (0.0, 21.0, 50.0, 2000.0, 2071.0));
    }
}
