//! What all microVMs of this process have used, for Prometheus. No id and no image is ever a label.

use model::{Usage, usage::GB};
use prometheus::{Counter, CounterVec, Opts, Registry};

/// The counters.
pub(crate) struct Sums {
    running: Counter,
    vcpu: CounterVec,
    memory: CounterVec,
    snapshot: CounterVec,
    storage: Counter,
    endpoint: CounterVec,
    network: CounterVec,
}

impl Sums {
    /// Makes and registers them.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let plain = |name: &str, help: &str| {
            let counter = Counter::new(name, help)?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let labelled = |name: &str, help: &str, label: &str, values: [&str; 2]| {
            let counters = CounterVec::new(Opts::new(name, help), &[label])?;
            for value in values {
                counters.with_label_values(&[value]).reset();
            }
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        Ok(Self {
            running: plain("idle_usage_running_seconds_total", "Seconds that microVMs ran.")?,
            vcpu: labelled("idle_usage_vcpu_seconds_total", "vCPU-seconds of microVMs, at the baseline and above it.", "kind", ["baseline", "burst"])?,
            memory: labelled("idle_usage_memory_byte_seconds_total", "Bytes of microVMs' memory times seconds, at the baseline and above it.", "kind", ["baseline", "burst"])?,
            snapshot: labelled("idle_usage_snapshot_bytes_total", "Bytes of snapshots, read by launches and resumes, written by suspends.", "direction", ["read", "written"])?,
            storage: plain("idle_usage_storage_byte_seconds_total", "Bytes of suspended microVMs' snapshots times seconds.")?,
            endpoint: labelled("idle_usage_endpoint_bytes_total", "Bytes on endpoints: sent by guests, received by them.", "direction", ["sent", "received"])?,
            network: labelled("idle_usage_network_bytes_total", "Bytes in guests' networks: sent by guests, received by them.", "direction", ["sent", "received"])?,
        })
    }

    pub(super) fn add(&self, more: &Usage) {
        let add = |counter: &Counter, value: f64| {
            if value > 0.0 {
                counter.inc_by(value);
            }
        };
        // Most get nothing at a time, and looking one up costs more than asking.
        let of = |counters: &CounterVec, label: &str, value: f64| {
            if value > 0.0 {
                counters.with_label_values(&[label]).inc_by(value);
            }
        };
        add(&self.running, more.running_seconds);
        of(&self.vcpu, "baseline", more.baseline_vcpu_seconds);
        of(&self.vcpu, "burst", more.burst_vcpu_seconds);
        of(&self.memory, "baseline", more.baseline_gb_seconds * GB);
        of(&self.memory, "burst", more.burst_gb_seconds * GB);
        of(&self.snapshot, "read", more.snapshot_read_bytes as f64);
        of(&self.snapshot, "written", more.snapshot_written_bytes as f64);
        add(&self.storage, more.storage_gb_hours * GB * 3600.0);
        of(&self.endpoint, "sent", more.endpoint_sent_bytes as f64);
        of(&self.endpoint, "received", more.endpoint_received_bytes as f64);
        of(&self.network, "sent", more.network_sent_bytes as f64);
        of(&self.network, "received", more.network_received_bytes as f64);
    }
}
