//! What each microVM uses, as it is billed at AWS (aws-behaviour §8).
//!
//! Owns: one [`Meter`] per microVM, the sampling of what runs. Never decides a transition: the driver says what happened, and
//! the registry keeps what the meters say (with every transition, and once a minute for what goes on in between, so that a
//! crash of the node forgets a minute at most).
//!
//! Time at the baseline is exact. Use above it is known as an average between two samples: a burst that is shorter than
//! [`SAMPLE`] counts with the share of that time that it took. The CPU is that of the whole VMM process, and so what emulation
//! and a restore take is in it. Bytes of the endpoint are counted where the controller gives out streams.

mod stream;
mod sums;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::StreamExt as _;
use model::{Generation, MemorySize, Usage, usage::GB};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_runtime::engine::{self, GuestStream};

use self::stream::{Counting, EndpointBytes};
pub(crate) use self::sums::Sums;
use crate::controller::Node;

/// How often what runs is looked at: a read of two small files of `/proc`, or one message to a VMM.
const SAMPLE: Duration = Duration::from_secs(5);
/// How often what has grown is written down between transitions.
const SAVE: Duration = Duration::from_secs(60);
/// MicroVMs looked at at a time.
const AT_ONCE: usize = 16;

/// A meter on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedUsage {
    pub(crate) usage: Usage,
    /// Bytes of the snapshot that is kept while it sleeps.
    pub(crate) stored_bytes: u64,
    /// Wall time of this writing: what went on without this process is counted from here.
    pub(crate) saved_at: SystemTime,
}

/// What a microVM does, as far as it is billed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Doing {
    /// Nothing: it has not begun, or has ended.
    Nothing,
    Running {
        generation: Generation,
        /// At the last sample.
        seen: engine::Usage,
        sampled_at: Instant,
    },
    Sleeping,
}

/// The first sample after this one adds nothing.
const UNSEEN: engine::Usage = engine::Usage {
    cpu_micros: u64::MAX,
    net_sent_bytes: u64::MAX,
    net_received_bytes: u64::MAX,
    private_bytes: 0,
    peak_bytes: 0,
    block_read_bytes: 0,
    block_written_bytes: 0,
    stream_sent_bytes: 0,
    stream_received_bytes: 0,
    exits: 0,
};

/// What a restarted node finds a microVM to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Found {
    Running(Generation),
    Sleeping,
    Ended,
}

/// One microVM's use.
pub(crate) struct Meter {
    size: MemorySize,
    sums: Arc<Sums>,
    endpoint: Arc<EndpointBytes>,
    /// Held for a few instructions.
    state: Mutex<State>,
}

struct State {
    usage: Usage,
    stored_bytes: u64,
    doing: Doing,
    /// Until when time is accounted for.
    at: Instant,
    /// As on stable storage.
    saved: Usage,
}

impl Meter {
    /// Of a microVM that has not begun.
    pub(crate) fn new(size: MemorySize, sums: Arc<Sums>, now: Instant) -> Self {
        let state = State { usage: Usage::default(), stored_bytes: 0, doing: Doing::Nothing, at: now, saved: Usage::default() };
        Self { size, sums, endpoint: Arc::default(), state: Mutex::new(state) }
    }

    /// Goes on from what was written down. What the microVM is found to do, it did all the time since.
    pub(crate) fn restored(size: MemorySize, sums: Arc<Sums>, saved: SavedUsage, found: Found, now: Instant, wall: SystemTime) -> Self {
        // A wall clock that went backwards meanwhile counts as no time at all.
        let away = wall.duration_since(saved.saved_at).unwrap_or_default();
        let meter = Self::new(size, sums, now);
        {
            let mut state = meter.state.lock();
            (state.usage, state.saved, state.stored_bytes) = (saved.usage, saved.usage, saved.stored_bytes);
            let more;
            (more, state.doing) = match found {
                // The CPU time of its process is in what was saved, or went by unseen.
                Found::Running(generation) => (Usage::running(size, away.as_secs_f64(), 0.0, 0.0), Doing::Running { generation, seen: UNSEEN, sampled_at: now }),
                Found::Sleeping => (stored(saved.stored_bytes, away), Doing::Sleeping),
                Found::Ended => (Usage::default(), Doing::Nothing),
            };
            meter.add(&mut state, more);
        }
        meter
    }

    fn add(&self, state: &mut State, more: Usage) {
        state.usage += more;
        self.sums.add(&more);
    }

    /// Everything up to now that needs no sample.
    fn account(&self, state: &mut State, now: Instant) {
        let passed = now.saturating_duration_since(state.at);
        state.at = state.at.max(now);
        let mut more = match state.doing {
            Doing::Nothing => Usage::default(),
            Doing::Running { .. } => Usage::running(self.size, passed.as_secs_f64(), 0.0, 0.0),
            Doing::Sleeping => stored(state.stored_bytes, passed),
        };
        (more.endpoint_sent_bytes, more.endpoint_received_bytes) = self.endpoint.take();
        self.add(state, more);
    }

    /// A launch or a resume has succeeded.
    pub(crate) fn started(&self, generation: Generation, read_bytes: u64, now: Instant) {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        self.add(&mut state, Usage { snapshot_read_bytes: read_bytes, ..Usage::default() });
        state.doing = Doing::Running { generation, seen: engine::Usage::default(), sampled_at: now };
    }

    /// Whether samples of this generation are of use.
    fn runs(&self, generation: Generation) -> bool {
        matches!(self.state.lock().doing, Doing::Running { generation: of, .. } if of == generation)
    }

    /// What an engine counted until now.
    pub(crate) fn sample(&self, generation: Generation, counted: engine::Usage, now: Instant) {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        let Doing::Running { generation: of, seen, sampled_at } = state.doing else { return };
        if of != generation {
            return;
        }
        let window = now.saturating_duration_since(sampled_at).as_secs_f64();
        let cpu_seconds = counted.cpu_micros.saturating_sub(seen.cpu_micros) as f64 / 1e6;
        let vcpus = if window > 0.0 { cpu_seconds / window } else { 0.0 };
        let above = Usage::running(self.size, window, vcpus, counted.private_bytes as f64 / GB);
        let more = Usage {
            burst_vcpu_seconds: above.burst_vcpu_seconds,
            burst_gb_seconds: above.burst_gb_seconds,
            network_sent_bytes: counted.net_sent_bytes.saturating_sub(seen.net_sent_bytes),
            network_received_bytes: counted.net_received_bytes.saturating_sub(seen.net_received_bytes),
            ..Usage::default()
        };
        self.add(&mut state, more);
        state.doing = Doing::Running { generation, seen: counted, sampled_at: now };
    }

    /// It is asleep with a snapshot of so many bytes, of which so many were written for it.
    pub(crate) fn sleeps(&self, stored_bytes: u64, written_bytes: u64, now: Instant) {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        self.add(&mut state, Usage { snapshot_written_bytes: written_bytes, ..Usage::default() });
        (state.doing, state.stored_bytes) = (Doing::Sleeping, stored_bytes);
    }

    /// It is where it was before [`Meter::started`]: what was begun is undone.
    pub(crate) fn sleeps_again(&self, now: Instant) {
        let stored_bytes = self.state.lock().stored_bytes;
        self.sleeps(stored_bytes, 0, now);
    }

    /// It has ended.
    pub(crate) fn ended(&self, now: Instant) {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        (state.doing, state.stored_bytes) = (Doing::Nothing, 0);
    }

    /// All of it, until now.
    pub(crate) fn usage(&self, now: Instant) -> Usage {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        state.usage
    }

    /// For stable storage.
    pub(crate) fn save(&self, now: Instant, wall: SystemTime) -> SavedUsage {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        state.saved = state.usage;
        SavedUsage { usage: state.usage, stored_bytes: state.stored_bytes, saved_at: wall }
    }

    /// Whether anything was added since [`Meter::save`].
    fn is_unsaved(&self, now: Instant) -> bool {
        let mut state = self.state.lock();
        self.account(&mut state, now);
        state.usage != state.saved
    }

    /// The stream, its bytes counted.
    pub(crate) fn counting(&self, stream: GuestStream) -> GuestStream {
        Box::pin(Counting::new(stream, Arc::clone(&self.endpoint)))
    }
}

fn stored(bytes: u64, passed: Duration) -> Usage {
    Usage { storage_gb_hours: bytes as f64 / GB * (passed.as_secs_f64() / 3600.0), ..Usage::default() }
}

/// Samples what runs and writes it down, until the node ends.
pub(crate) async fn watch(node: Arc<Node>) {
    let mut tick = tokio::time::interval(SAMPLE);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut saved_at = node.clock.now();
    loop {
        tokio::select! {
            biased;
            () = node.closing.cancelled() => return,
            _ = tick.tick() => {}
        }
        futures::stream::iter(node.meters())
            .for_each_concurrent(AT_ONCE, |(_, meter, live)| {
                let clock = &node.clock;
                async move {
                    if let Some(live) = live
                        && meter.runs(live.generation)
                    {
                        let counted = live.vm.usage().await;
                        meter.sample(live.generation, counted, clock.now());
                    }
                }
            })
            .await;
        let now = node.clock.now();
        if now.saturating_duration_since(saved_at) >= SAVE {
            saved_at = now;
            let wall = node.clock.wall();
            let unsaved = node.meters().into_iter().filter(|(_, meter, _)| meter.is_unsaved(now));
            let rows = unsaved.map(|(id, meter, _)| (id, meter.save(now, wall))).collect();
            if let Err(error) = node.store.put_usage(rows).await {
                node.metrics.registry_failures.inc();
                tracing::error!(error = model::chain(&error), "what microVMs have used could not be written; check the disk of the data directory");
            }
        }
    }
}

#[cfg(test)]
mod tests;
