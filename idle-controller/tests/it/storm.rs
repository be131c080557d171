//! Everything at once, from many sides, in real time: one legal history per microVM, and nothing left behind (case 44).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use idle_controller::{MicrovmHandle, Refused, RunSpec};
use model::{Generation, MicrovmState};
use vmm_runtime::engine::{EngineError, Exit};

use crate::support::*;

/// A small generator (xorshift64*), so that a seed replays the same choices.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }

    async fn pause(&mut self) {
        let micros = self.below(4000);
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }
}

fn seed() -> u64 {
    std::env::var("DORMOUSE_STORM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x00D0_12A0)
}

/// Watches one microVM: the generation never falls, and nothing follows the end.
async fn historian(handle: MicrovmHandle) -> usize {
    let mut seen = 0;
    let mut last = handle.view();
    while last.state != MicrovmState::Terminated {
        let before = (last.state, last.generation);
        let now = handle.wait_until(|view| (view.state, view.generation) != before).await;
        assert!(now.generation >= last.generation, "the generation fell");
        if last.state == MicrovmState::Terminating {
            assert_eq!(now.state, MicrovmState::Terminated);
        }
        seen += 1;
        last = now;
    }
    seen
}

/// One client, or one user of the API, with its own luck.
async fn actor(node: Arc<Node>, handles: Vec<MicrovmHandle>, seed: u64, rounds: u32) {
    let mut dice = Dice(seed | 1);
    let mut highest = vec![Generation(0); handles.len()];
    for _ in 0..rounds {
        let which = usize::try_from(dice.below(handles.len() as u64)).unwrap();
        let handle = &handles[which];
        match dice.below(20) {
            0..10 => {
                let deadline = Instant::now() + Duration::from_secs(30);
                match handle.awake(deadline).await {
                    Ok(awake) => {
                        assert!(awake.generation() >= highest[which], "an older generation was given out");
                        highest[which] = awake.generation();
                        if dice.below(2) == 0 {
                            awake.streaming();
                            dice.pause().await;
                            awake.touch();
                            awake.computing();
                        }
                        dice.pause().await;
                    }
                    Err(Refused::TimedOut { .. }) => panic!("a request waited for 30 s"),
                    Err(_) => {}
                }
            }
            10..13 => {
                // A client that leaves.
                let brief = Duration::from_micros(dice.below(500));
                let _ = tokio::time::timeout(brief, handle.awake(Instant::now() + SEC)).await;
            }
            13..15 => drop(handle.suspend().await),
            15..17 => drop(handle.resume().await),
            17 => node.engine.fail_next_restore(EngineError::Host { what: "storm".to_owned() }),
            18 => node.engine.fail_next_suspend(EngineError::Host { what: "storm".to_owned() }),
            _ => {
                if dice.below(3) == 0 {
                    node.engine.exit(handle.id(), Exit::Vmm { detail: "storm".to_owned() });
                }
            }
        }
        dice.pause().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_leaves_one_legal_history_and_no_holds() {
    let seed = seed();
    println!("DORMOUSE_STORM_SEED={seed}");
    let node = Arc::new(Node::start_with(|config| config.max_concurrent_starts = 3).await);
    let brief = RunSpec { idle: Some(idle(Duration::from_millis(3), HOUR)), ..spec() };
    let mut handles = Vec::new();
    for _ in 0..6 {
        handles.push(node.suspended_within(REAL_CEILING, brief.clone()).await);
    }
    let historians: Vec<_> = handles.iter().cloned().map(|handle| tokio::spawn(historian(handle))).collect();
    let actors: Vec<_> =
        (0..12).map(|number| tokio::spawn(actor(node.clone(), handles.clone(), seed.wrapping_mul(number + 3), 150))).collect();
    for actor in actors {
        actor.await.unwrap();
    }

    // Every survivor falls asleep by itself: no hold has leaked. (Failures left over from the storm only delay that.)
    for handle in &handles {
        let view = tokio::time::timeout(REAL_CEILING, handle.wait_until(|view| view.state == MicrovmState::Suspended)).await;
        let view = view.unwrap_or_else(|_| panic!("it does not fall asleep: {:?}", handle.view()));
        assert!(matches!(view.state, MicrovmState::Suspended | MicrovmState::Terminated), "{view:?}");
    }
    assert!(node.engine.running().is_empty(), "{:?}", node.engine.running());
    assert_eq!(node.metric("idle_requests_waiting", None), 0.0);
    assert_eq!(node.metric("idle_starts_waiting", None), 0.0);

    // And every one can be ended, from many sides at once, while others want it awake.
    let mut ends = Vec::new();
    for handle in &handles {
        for number in 0..6 {
            let handle = handle.clone();
            ends.push(tokio::spawn(async move {
                match number {
                    0..2 => handle.terminate().await.unwrap(),
                    2..4 => drop(handle.awake(Instant::now() + 30 * SEC).await),
                    4 => drop(handle.suspend().await),
                    _ => drop(handle.resume().await),
                }
            }));
        }
    }
    for end in ends {
        end.await.unwrap();
    }
    for handle in &handles {
        reaches_within(REAL_CEILING, handle, MicrovmState::Terminated).await;
    }
    let transitions: usize = futures::future::join_all(historians).await.into_iter().map(Result::unwrap).sum();
    assert!(transitions > 100, "a storm of {transitions} transitions is none");
    assert!(node.engine.running().is_empty());
    for state in MicrovmState::ALL {
        let expected = if state == MicrovmState::Terminated { 6.0 } else { 0.0 };
        assert_eq!(node.metric("idle_microvms", Some(state.as_str())), expected, "{state}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn crashes_in_a_storm_lose_nothing() {
    let seed = seed();
    println!("DORMOUSE_STORM_SEED={seed}");
    let mut dice = Dice(seed);
    let mut node = Node::start_with(|config| config.max_concurrent_starts = 3).await;
    let brief = RunSpec { idle: Some(idle(Duration::from_millis(2), HOUR)), ..spec() };
    let mut ids = Vec::new();
    for _ in 0..6 {
        ids.push(node.suspended_within(REAL_CEILING, brief.clone()).await.id());
    }
    for _ in 0..12 {
        let before: Vec<_> = ids.iter().map(|id| node.controller().find(*id).unwrap().view()).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..8 {
            let handles: Vec<_> = ids.iter().map(|id| node.controller().find(*id).unwrap()).collect();
            let mut dice = Dice(seed.wrapping_mul(number + 7) | 1);
            tasks.spawn(async move {
                loop {
                    let handle = &handles[usize::try_from(dice.below(handles.len() as u64)).unwrap()];
                    if let Ok(awake) = handle.awake(Instant::now() + SEC).await {
                        dice.pause().await;
                        drop(awake);
                    }
                    dice.pause().await;
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(20 + dice.below(40))).await;
        node.crash();
        tasks.shutdown().await;
        node.open().await;
        for before in before {
            let handle = node.controller().find(before.id).expect("a microVM is lost");
            let now = handle.view();
            assert!(now.generation >= before.generation, "{now:?}");
            assert_ne!(now.state, MicrovmState::Terminated, "{now:?}");
            assert!(handle.awake(Instant::now() + 30 * SEC).await.is_ok());
        }
    }
    assert!(node.engine.running().keys().all(|id| ids.contains(id)));
}
