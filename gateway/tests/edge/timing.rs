//! What a stranger could learn from the time of a refusal: a report, never a judgement.
//!
//! `cargo test --release -p gateway --test edge timing -- --ignored --nocapture`

use std::time::Instant;

use model::{EndpointId, PortScope};

use crate::{
    app::App,
    rig::{Rig, SUFFIX, get},
};

const PER_KIND: usize = 4_000;

/// Requests of every kind in an order that nothing else on the machine has; the kinds' times apart, in microseconds.
async fn times(rig: &Rig, kinds: &[(&str, String, String)]) -> Vec<Vec<f64>> {
    let mut h1 = rig.h1().await;
    let mut times = vec![Vec::with_capacity(PER_KIND); kinds.len()];
    let mut order = 1_u64;
    while times.iter().any(|times| times.len() < PER_KIND) {
        order = order.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let kind = (order >> 33) as usize % kinds.len();
        let (_, host, token) = &kinds[kind];
        let request = get(host, "/", &[("x-aws-proxy-auth", token)]);
        let begun = Instant::now();
        let answer = h1.send(request).await;
        let took = begun.elapsed().as_secs_f64() * 1e6;
        assert_eq!((answer.status, answer.text()), (403, "Token authentication failed"));
        if times[kind].len() < PER_KIND {
            times[kind].push(took);
        }
    }
    times
}

/// Welch's t of two samples; beyond ±4.5 it is taken for a difference (dudect).
fn welch(one: &[f64], other: &[f64]) -> f64 {
    let about = |sample: &[f64]| {
        let mean = sample.iter().sum::<f64>() / sample.len() as f64;
        let variance = sample.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (sample.len() - 1) as f64;
        (mean, variance / sample.len() as f64)
    };
    let ((mean, error), (other_mean, other_error)) = (about(one), about(other));
    (mean - other_mean) / (error + other_error).sqrt()
}

fn report(title: &str, kinds: &[(&str, String, String)], mut times: Vec<Vec<f64>>) {
    println!("\n{title} ({PER_KIND} each, µs)\n{:<44} {:>8} {:>8} {:>8} {:>8}", "", "p10", "median", "p90", "t");
    for sample in &mut times {
        sample.sort_by(f64::total_cmp);
        // What the machine did meanwhile: the slowest tenth.
        sample.truncate(PER_KIND * 9 / 10);
    }
    for ((what, ..), sample) in kinds.iter().zip(&times) {
        let at = |part: f64| sample[(sample.len() as f64 * part) as usize];
        println!("{what:<44} {:>8.1} {:>8.1} {:>8.1} {:>8.1}", at(0.11), at(0.55), at(0.99), welch(sample, &times[0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a report of ten seconds, to be read"]
async fn what_the_time_of_a_refusal_tells() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let (awake, asleep, other) = (rig.microvm(address).await, rig.microvm(address).await, rig.run(None).await);
    rig.suspend(&asleep).await;
    let unknown = format!("{}.{SUFFIX}", EndpointId::random());
    let foreign = rig.token(&other, PortScope::All);
    let (head, tag) = foreign.rsplit_once('.').unwrap();
    let flipped = format!("{head}.{}{}", if tag.starts_with('A') { 'B' } else { 'A' }, &tag[1..]);
    let hosts = [("a microVM that runs", &awake.host), ("one that sleeps", &asleep.host), ("a host of no microVM", &unknown)];
    for (title, token) in [("A good token of another microVM", &foreign), ("A token with a wrong tag", &flipped)] {
        let kinds = hosts.map(|(what, host)| (what, host.clone(), token.clone()));
        // The first row twice: what two equal kinds differ by here and now.
        let kinds = [vec![("a microVM that runs, again", awake.host.clone(), token.clone())], kinds.to_vec()].concat();
        report(title, &kinds, times(&rig, &kinds).await);
    }
    // What differs here is what a stranger has sent himself: no cipher runs for what has not the form of a token of ours.
    let wrong = [
        ("another tag", flipped.clone()),
        ("another text", {
            let (front, text) = head.rsplit_once('.').unwrap();
            format!("{front}.{}{}.{tag}", if text.starts_with('A') { 'B' } else { 'A' }, &text[1..])
        }),
        ("eight bytes of the tag", format!("{head}.{}", &tag[..11])),
        ("a key that nobody has", format!("{}.{}", foreign.split_once('.').unwrap().0.to_uppercase(), foreign.split_once('.').unwrap().1)),
    ];
    let kinds = wrong.map(|(what, token)| (what, awake.host.clone(), token));
    report("What is wrong with the token", &kinds, times(&rig, &kinds).await);
}
