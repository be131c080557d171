//! What Prometheus sees of the microVMs' lives.
//!
//! Owns: every `idle_…` metric of this crate and their label values, which are all fixed: no id is ever a label, and every
//! value is there from the start so that a zero can be seen.

use std::time::Duration;

use model::MicrovmState;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use vmm_runtime::engine::{Phases, SnapshotRecord};

use crate::machine::EndReason;

/// From a restore out of the page cache to a cold boot under emulation.
const START_BUCKETS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// How a wake (or a launch) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StartOutcome {
    /// It runs.
    Started,
    /// There was no need: the suspend under way was undone in time. Wakes only.
    TakenBack,
    /// It could not be started.
    Failed,
    /// Its snapshot can never be used. Wakes only.
    Damaged,
    /// It was ended before it was awake.
    Terminated,
}

impl StartOutcome {
    const ALL: [Self; 5] = [Self::Started, Self::TakenBack, Self::Failed, Self::Damaged, Self::Terminated];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::TakenBack => "taken_back",
            Self::Failed => "failed",
            Self::Damaged => "damaged",
            Self::Terminated => "terminated",
        }
    }
}

/// How a suspend ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SuspendEnd {
    /// On stable storage.
    Suspended,
    /// Undone.
    TakenBack,
    /// It could not be done; the microVM runs on.
    Failed,
    /// The app or the VMM ended meanwhile, or it was terminated.
    Ended,
}

impl SuspendEnd {
    const ALL: [Self; 4] = [Self::Suspended, Self::TakenBack, Self::Failed, Self::Ended];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Suspended => "suspended",
            Self::TakenBack => "taken_back",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// Handles to all of them.
pub(crate) struct Metrics {
    microvms: IntGaugeVec,
    wakes: IntCounterVec,
    launches: IntCounterVec,
    wake_seconds: HistogramVec,
    launch_seconds: HistogramVec,
    suspends: IntCounterVec,
    suspend_seconds: Histogram,
    written_bytes: IntCounterVec,
    ends: IntCounterVec,
    /// Launches and wakes that wait for a start slot.
    pub(crate) starts_waiting: IntGauge,
    /// Requests that wait for a microVM.
    pub(crate) requests_waiting: IntGauge,
    /// Records that could not be written when they should have been.
    pub(crate) registry_failures: IntCounter,
}

impl Metrics {
    /// Makes and registers them. Fails if `registry` has metrics of these names already.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name, help, label| registered(registry, IntCounterVec::new(Opts::new(name, help), &[label])?);
        let starts = |name, help| {
            let options = HistogramOpts::new(name, help).buckets(START_BUCKETS.to_vec());
            registered(registry, HistogramVec::new(options, &["phase"])?)
        };
        let metrics = Self {
            microvms: registered(registry, IntGaugeVec::new(Opts::new("idle_microvms", "MicroVMs by public state."), &["state"])?)?,
            wakes: counters("idle_wakes_total", "Wakes that have ended, by outcome.", "outcome")?,
            launches: counters("idle_launches_total", "Launches that have ended, by outcome.", "outcome")?,
            wake_seconds: starts("idle_wake_seconds", "Time of successful wakes by phase; the phases add up to the phase total.")?,
            launch_seconds: starts("idle_launch_seconds", "Time of successful launches by phase; the phases add up to the phase total.")?,
            suspends: counters("idle_suspends_total", "Suspends that have ended, by outcome.", "outcome")?,
            suspend_seconds: registered(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new("idle_suspend_seconds", "Time of successful suspends.").buckets(START_BUCKETS.to_vec()),
                )?,
            )?,
            written_bytes: counters("idle_suspend_written_bytes_total", "Bytes that suspends wrote to stable storage, by part.", "part")?,
            ends: counters("idle_terminations_total", "MicroVMs that have ended, by reason.", "reason")?,
            starts_waiting: registered(
                registry,
                IntGauge::new("idle_starts_waiting", "Launches and wakes that wait for one of the node's start slots.")?,
            )?,
            requests_waiting: registered(
                registry,
                IntGauge::new("idle_requests_waiting", "Requests that wait for a microVM to be awake.")?,
            )?,
            registry_failures: registered(
                registry,
                IntCounter::new("idle_registry_failures_total", "Writes to the registry that failed.")?,
            )?,
        };
        for state in MicrovmState::ALL {
            metrics.microvms.with_label_values(&[state.as_str()]).set(0);
        }
        for outcome in StartOutcome::ALL {
            metrics.wakes.with_label_values(&[outcome.label()]).reset();
            if !matches!(outcome, StartOutcome::TakenBack | StartOutcome::Damaged) {
                metrics.launches.with_label_values(&[outcome.label()]).reset();
            }
        }
        for outcome in SuspendEnd::ALL {
            metrics.suspends.with_label_values(&[outcome.label()]).reset();
        }
        for part in ["memory", "disk"] {
            metrics.written_bytes.with_label_values(&[part]).reset();
        }
        for reason in EndReason::LABELS {
            metrics.ends.with_label_values(&[reason]).reset();
        }
        Ok(metrics)
    }

    pub(crate) fn launch_ended(&self, outcome: StartOutcome) {
        self.launches.with_label_values(&[outcome.label()]).inc();
    }

    pub(crate) fn wake_ended(&self, outcome: StartOutcome) {
        self.wakes.with_label_values(&[outcome.label()]).inc();
    }

    pub(crate) fn launched(&self, phases: &Phases, total: Duration) {
        observe(&self.launch_seconds, phases, total);
    }

    pub(crate) fn woken(&self, phases: &Phases, total: Duration) {
        observe(&self.wake_seconds, phases, total);
    }

    pub(crate) fn suspend_ended(&self, end: SuspendEnd) {
        self.suspends.with_label_values(&[end.label()]).inc();
    }

    pub(crate) fn suspended(&self, record: &SnapshotRecord, took: Duration) {
        self.suspend_seconds.observe(took.as_secs_f64());
        self.written_bytes.with_label_values(&["memory"]).inc_by(record.memory_bytes);
        self.written_bytes.with_label_values(&["disk"]).inc_by(record.disk_bytes);
    }

    pub(crate) fn terminated(&self, reason: &EndReason) {
        self.ends.with_label_values(&[reason.label()]).inc();
    }

    /// Counts one microVM in `state` for as long as the returned value lives.
    pub(crate) fn in_state(&self, state: MicrovmState) -> Counted {
        Counted::new(&self.microvms.with_label_values(&[state.as_str()]))
    }
}

fn registered<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn observe(histogram: &HistogramVec, phases: &Phases, total: Duration) {
    for (phase, took) in phases {
        histogram.with_label_values(&[phase]).observe(took.as_secs_f64());
    }
    histogram.with_label_values(&["total"]).observe(total.as_secs_f64());
}

/// One more in a gauge, until it is dropped.
pub(crate) struct Counted(IntGauge);

impl Counted {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_there_from_the_start_and_names_are_clean() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let families = registry.gather();
        for (name, values) in [
            ("idle_microvms", 6),
            ("idle_wakes_total", 5),
            ("idle_launches_total", 3),
            ("idle_suspends_total", 4),
            ("idle_suspend_written_bytes_total", 2),
            ("idle_terminations_total", 8),
            ("idle_starts_waiting", 1),
        ] {
            let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(family.get_metric().len(), values, "{name}");
        }
        for family in &families {
            let counter = family.get_field_type() == prometheus::proto::MetricType::COUNTER;
            assert_eq!(counter, family.name().ends_with("_total"), "{}", family.name());
            assert!(family.help().ends_with('.'), "{}", family.name());
        }
        let running = metrics.in_state(MicrovmState::Running);
        assert_eq!(metrics.microvms.with_label_values(&["RUNNING"]).get(), 1);
        drop(running);
        assert_eq!(metrics.microvms.with_label_values(&["RUNNING"]).get(), 0);
    }
}
