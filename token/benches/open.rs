//! What opening a token costs, in nanoseconds: one that was opened a moment ago, and one that was not.
//!
//! `cargo bench -p token`. Time on the processor, so that a busy machine does not count much: the median of 15 rounds, and the
//! least of them beside it.

use std::{
    hint::black_box,
    time::{Duration, SystemTime},
};

use model::{MicrovmId, PortScope};
use token::{Claims, KeyRing};

const ROUNDS: usize = 15;
const PER_ROUND: usize = 20_000;

/// Nanoseconds that this thread has run.
fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn measure(what: &str, mut once: impl FnMut(usize)) {
    let mut rounds: Vec<f64> = (0..=ROUNDS)
        .map(|_| {
            let begun = processor_time();
            for number in 0..PER_ROUND {
                once(number);
            }
            (processor_time() - begun) / PER_ROUND as f64
        })
        .skip(1)
        .collect();
    rounds.sort_by(f64::total_cmp);
    println!("{what:<40} {:>7.0} ns, least {:>6.0}", rounds[ROUNDS / 2], rounds[0]);
}

fn main() {
    let dir = tempfile::tempdir().expect("a directory for the ring");
    let ring = KeyRing::open_or_create(&dir.path().join("keys.json")).expect("a fresh ring");
    let now = SystemTime::now();
    let claims = |microvm| Claims { microvm, ports: PortScope::All, shell: false, issued_at: now, expires_at: now + Duration::from_secs(3_000) };
    // More than any cache would hold: the next time one comes round, it has been forgotten.
    let many: Vec<String> = (0..PER_ROUND).map(|_| ring.mint(&claims(MicrovmId::random()))).collect();
    let forged: Vec<String> = many.iter().map(|token| format!("{}A", &token[..token.len() - 1])).collect();
    println!("a token has {} characters", many[0].len());
    measure("20,000 tokens in turn", |number| {
        black_box(ring.open(&many[number], now)).expect("a good token");
    });
    measure("one token", |_| {
        black_box(ring.open(&many[0], now)).expect("a good token");
    });
    measure("a hundred tokens in turn", |number| {
        black_box(ring.open(&many[number % 100], now)).expect("a good token");
    });
    measure("a token whose tag does not fit", |number| {
        let _ = black_box(ring.open(&forged[number], now));
    });
}
