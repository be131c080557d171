use prometheus::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const ONE: Generation = Generation(1);

fn size() -> MemorySize {
    MemorySize::from_mib(2048).unwrap()
}

fn sums() -> Arc<Sums> {
    Arc::new(Sums::register(&Registry::new()).unwrap())
}

fn counted(cpu_secs: u64, private_gb: u64) -> engine::Usage {
    engine::Usage { cpu_micros: cpu_secs * 1_000_000, private_bytes: private_gb << 30, ..engine::Usage::default() }
}

#[test]
fn time_is_billed_while_it_runs_and_bursts_while_they_are_used() {
    let begin = Instant::now();
    let at = |secs: u64| begin + Duration::from_secs(secs);
    let meter = Meter::new(size(), sums(), begin);
    // In line for its launch: nothing.
    meter.started(Generation(0), 3 << 30, at(7));
    // Two vCPUs and 4 GB for three seconds, looked at in the middle by somebody who only reads.
    assert_eq!(meter.usage(at(8)).running_seconds, 1.0);
    meter.sample(Generation(0), counted(6, 4), at(10));
    // Then the baseline, and less.
    meter.sample(Generation(0), counted(8, 1), at(15));
    meter.sleeps(2 << 30, 1 << 30, at(15));
    let wanted = Usage {
        running_seconds: 8.0,
        baseline_vcpu_seconds: 8.0,
        baseline_gb_seconds: 16.0,
        burst_vcpu_seconds: 3.0,
        burst_gb_seconds: 6.0,
        snapshot_read_bytes: 3 << 30,
        snapshot_written_bytes: 1 << 30,
        ..Usage::default()
    };
    assert_eq!(meter.usage(at(15)), wanted);
    // Two GB for half an hour.
    let asleep = meter.usage(at(15 + 1800));
    assert_eq!((asleep.running_seconds, asleep.storage_gb_hours), (8.0, 1.0));
    // A sample that comes late is of another life.
    meter.started(ONE, 0, at(2000));
    meter.sample(Generation(0), counted(500, 8), at(2001));
    meter.sample(ONE, counted(1, 1), at(2001));
    meter.ended(at(2001));
    let over = meter.usage(at(9000));
    assert_eq!((over.running_seconds, over.burst_vcpu_seconds, over.burst_gb_seconds), (9.0, 3.0, 6.0));
}

#[test]
fn a_restart_goes_on_where_the_meter_was() {
    let (now, wall) = (Instant::now(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));
    let usage = Usage { running_seconds: 5.0, ..Usage::default() };
    let saved = SavedUsage { usage, stored_bytes: 1 << 30, saved_at: wall - Duration::from_secs(3600) };
    let after = |found, wall| Meter::restored(size(), sums(), saved, found, now, wall);
    let ran = after(Found::Running(ONE), wall);
    assert_eq!(ran.usage(now).running_seconds, 3605.0, "it ran on without us");
    // What its process took before is nothing that it takes now.
    ran.sample(ONE, counted(4000, 0), now + Duration::from_secs(5));
    ran.sample(ONE, counted(4010, 0), now + Duration::from_secs(10));
    assert_eq!(ran.usage(now + Duration::from_secs(10)).burst_vcpu_seconds, 5.0);
    assert_eq!(after(Found::Sleeping, wall).usage(now).storage_gb_hours, 1.0);
    assert_eq!(after(Found::Ended, wall).usage(now), usage);
    let backwards = wall - Duration::from_secs(999_999);
    assert_eq!(after(Found::Running(ONE), backwards).usage(now).running_seconds, 5.0);
}

#[tokio::test]
async fn bytes_of_streams_are_counted_in_their_direction() {
    let now = Instant::now();
    let meter = Meter::new(size(), sums(), now);
    let (ours, mut guests) = tokio::io::duplex(64);
    let mut stream = meter.counting(Box::pin(ours));
    stream.write_all(b"question").await.unwrap();
    guests.write_all(b"an answer").await.unwrap();
    stream.read_exact(&mut [0; 9]).await.unwrap();
    let usage = meter.usage(now);
    assert_eq!((usage.endpoint_received_bytes, usage.endpoint_sent_bytes), (8, 9));
    assert_eq!(meter.usage(now), usage, "once");
}
