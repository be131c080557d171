//! A life as its owner sees it: launch, idle, sleep, wake, durations, end.

use std::time::Duration;

use idle_controller::{ControllerError, Refused, RunSpec};
use model::{Generation, IdlePolicy, MicrovmState};
use vmm_runtime::loopback::SuspendStep;

use crate::support::*;

fn elapsed_since(start: tokio::time::Instant) -> u64 {
    start.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_new_microvm_is_pending_and_then_runs() {
    let node = Node::start().await;
    let hold = node.engine.hold_launches();
    let view = node.controller().run(spec()).await.unwrap();
    assert_eq!((view.state, view.state_reason, view.generation), (MicrovmState::Pending, None, Generation(0)));
    assert_eq!(view.request, serde_json::json!({"clientToken": "t-1"}));
    let handle = node.controller().find(view.id).unwrap();
    assert_eq!(node.controller().route(view.endpoint).unwrap().id(), view.id);
    assert!(node.controller().route(model::EndpointId::random()).is_none());
    assert!(node.controller().find(model::MicrovmId::random()).is_none());

    let waiting = request(&handle).await;
    hold.arrived(1).await;
    assert_eq!(handle.view().state, MicrovmState::Pending);
    assert_eq!(node.metric("idle_requests_waiting", None), 1.0);
    hold.release();
    let awake = waiting.await.unwrap().unwrap();
    assert_eq!(awake.generation(), Generation(0));
    let names: Vec<&str> = awake.woke().unwrap().phases.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["queue", "loopback", "record"]);
    assert_eq!(handle.view().state, MicrovmState::Running);
    assert!(awake_again_is_free(&handle).await);
    assert_eq!(node.metric("idle_requests_waiting", None), 0.0);
    assert_eq!(node.metric("idle_microvms", Some("RUNNING")), 1.0);
    assert_eq!(node.metric("idle_launches_total", Some("started")), 1.0);
    assert_eq!(node.metric("idle_launch_seconds", Some("total")), 1.0);
}

async fn awake_again_is_free(handle: &idle_controller::MicrovmHandle) -> bool {
    awake(handle).await.unwrap().woke().is_none()
}

#[tokio::test(start_paused = true)]
async fn it_sleeps_when_nobody_talks_and_wakes_for_the_next_request() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    let start = tokio::time::Instant::now();
    drop(awake(&handle).await.unwrap());
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(elapsed_since(start), 60);
    assert!(node.engine.running().is_empty());
    assert_eq!(node.metric("idle_suspend_written_bytes_total", Some("memory")), 4096.0);

    let woken = awake(&handle).await.unwrap();
    assert_eq!(woken.generation(), Generation(1));
    let names: Vec<&str> = woken.woke().unwrap().phases.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["queue", "loopback", "record"]);
    assert_eq!(handle.view().generation, Generation(1));
    assert_eq!((node.engine.counts().suspends, node.engine.counts().restores), (1, 1));
    assert_eq!(node.metric("idle_wakes_total", Some("started")), 1.0);
    assert_eq!(node.metric("idle_suspends_total", Some("suspended")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn bytes_and_answers_being_computed_keep_it_awake_and_silent_streams_do_not() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;

    // An answer that takes ten minutes.
    let computing = awake(&handle).await.unwrap();
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(handle.view().state, MicrovmState::Running);
    // It begins to stream, a byte every 40 seconds.
    computing.streaming();
    for _ in 0..10 {
        tokio::time::sleep(40 * SEC).await;
        computing.touch();
    }
    assert_eq!(handle.view().state, MicrovmState::Running);
    // It goes silent without being closed.
    let start = tokio::time::Instant::now();
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(elapsed_since(start), 60);

    // The next request on the same connection.
    drop(computing);
    let again = awake(&handle).await.unwrap();
    again.streaming();
    again.computing();
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(handle.view().state, MicrovmState::Running);
    let start = tokio::time::Instant::now();
    drop(again);
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(elapsed_since(start), 60, "no hold is left, and the end of the answer was activity");
}

#[tokio::test(start_paused = true)]
async fn without_an_idle_policy_it_never_sleeps_by_itself_and_traffic_does_not_wake_it() {
    let node = Node::start().await;
    let handle = node.running(RunSpec { idle: None, ..spec() }).await;
    tokio::time::sleep(7 * HOUR).await;
    assert_eq!(handle.view().state, MicrovmState::Running);
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Asleep);
    handle.resume().await.unwrap();
    reaches(&handle, MicrovmState::Running).await;
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("The maximum duration of 28800 seconds is over."));
}

#[tokio::test(start_paused = true)]
async fn without_auto_resume_only_the_api_wakes_it() {
    let node = Node::start().await;
    let handle = node.running(no_auto_resume()).await;
    reaches(&handle, MicrovmState::Suspended).await;
    for _ in 0..3 {
        assert_eq!(awake(&handle).await.unwrap_err(), Refused::Asleep);
        assert_eq!(handle.view().state, MicrovmState::Suspended);
    }
    assert_eq!(node.engine.counts().restores, 0);
    handle.resume().await.unwrap();
    assert_eq!(awake(&handle).await.unwrap().generation(), Generation(1));
}

#[tokio::test(start_paused = true)]
async fn without_auto_resume_a_request_still_takes_an_idle_suspend_back() {
    let node = Node::start().await;
    let handle = node.running(no_auto_resume()).await;
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    hold.arrived(1).await;
    assert_eq!(awake(&handle).await.unwrap().generation(), Generation(0));
    drop(hold);

    // Too late, and it stays asleep.
    let hold = node.engine.hold_suspends(SuspendStep::AfterCommit);
    hold_is_reached(&node, 2).await;
    let late = request(&handle).await;
    hold.release();
    assert_eq!(late.await.unwrap().unwrap_err(), Refused::Asleep);
    assert_eq!(handle.view().state, MicrovmState::Suspended);

    // A suspend that was asked for is not theirs to take back.
    handle.resume().await.unwrap();
    reaches(&handle, MicrovmState::Running).await;
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    handle.suspend().await.unwrap();
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Asleep);
    hold.release();
    reaches(&handle, MicrovmState::Suspended).await;
}

/// The n-th suspend is under way.
async fn hold_is_reached(node: &Node, n: usize) {
    node.engine.counted(|counts| counts.suspends >= n).await;
    for _ in 0..4 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn suspended_for_too_long_it_ends() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let start = tokio::time::Instant::now();
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(elapsed_since(start), 3600);
    assert_eq!(ended.state_reason.as_deref(), Some("The suspended duration of 3600 seconds is over."));
    assert!(ended.terminated_at.is_some());
    assert_eq!(node.files(&handle), [""; 0]);
    assert_eq!(node.metric("idle_terminations_total", Some("suspended_duration")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_suspended_duration_of_zero_means_the_end_instead_of_sleep() {
    let node = Node::start().await;
    let never_asleep = RunSpec { idle: Some(idle(MINUTE, Duration::ZERO)), ..spec() };
    let (idle, asked) = (node.running(never_asleep.clone()).await, node.running(never_asleep).await);
    asked.suspend().await.unwrap();
    for handle in [asked, idle] {
        let ended = reaches(&handle, MicrovmState::Terminated).await;
        assert_eq!(ended.state_reason.as_deref(), Some("The suspended duration of 0 seconds is over."));
    }
    assert_eq!(node.engine.counts().suspends, 0);
}

#[tokio::test(start_paused = true)]
async fn the_maximum_duration_counts_running_and_suspended_time() {
    let node = Node::start().await;
    let start = tokio::time::Instant::now();
    let spec = RunSpec { max_duration: HOUR, ..spec() };
    let (busy, asleep) = (node.running(spec.clone()).await, node.running(spec).await);
    let _computing = awake(&busy).await.unwrap();
    reaches(&asleep, MicrovmState::Suspended).await;
    for handle in [busy, asleep] {
        let ended = reaches(&handle, MicrovmState::Terminated).await;
        assert_eq!(ended.state_reason.as_deref(), Some("The maximum duration of 3600 seconds is over."));
        assert_eq!(elapsed_since(start), 3600);
    }
    assert!(node.engine.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_duration_that_ends_during_a_wake_wins() {
    for max_duration in [HOUR, 8 * HOUR] {
        // Once the maximum duration ends first, once the suspended duration.
        let node = Node::start().await;
        let handle = node.suspended(RunSpec { max_duration, ..spec() }).await;
        tokio::time::sleep(50 * MINUTE).await;
        let hold = node.engine.hold_restores();
        let waiting = request(&handle).await;
        hold.arrived(1).await;
        assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::Terminated);
        reaches(&handle, MicrovmState::Terminated).await;
        drop(hold);
        assert!(node.engine.running().is_empty());
        assert_eq!(node.metric("idle_wakes_total", Some("terminated")), 1.0);
    }
}

#[tokio::test(start_paused = true)]
async fn repeated_operations_are_answered_as_aws_does() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    handle.resume().await.unwrap();
    handle.suspend().await.unwrap();
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
    handle.suspend().await.unwrap();
    assert_eq!(node.engine.counts().suspends, 1);
    handle.terminate().await.unwrap();
    assert!(matches!(handle.view().state, MicrovmState::Terminating | MicrovmState::Terminated));
    handle.terminate().await.unwrap();
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("Success."));
    handle.terminate().await.unwrap();
    assert_eq!(handle.suspend().await, Err(Refused::Terminated));
    assert_eq!(handle.resume().await, Err(Refused::Terminated));
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Terminated);
}

#[tokio::test(start_paused = true)]
async fn a_suspend_asked_for_during_a_start_follows_it() {
    let node = Node::start().await;
    let hold = node.engine.hold_launches();
    let handle = node.run(no_auto_resume()).await;
    let waiting = request(&handle).await;
    handle.suspend().await.unwrap();
    hold.release();
    assert!(waiting.await.unwrap().is_ok(), "who waited is let through first");
    reaches(&handle, MicrovmState::Suspended).await;

    let hold = node.engine.hold_restores();
    handle.resume().await.unwrap();
    handle.suspend().await.unwrap();
    handle.resume().await.unwrap();
    hold.release();
    reaches(&handle, MicrovmState::Running).await;
    assert_eq!(node.engine.counts().suspends, 1, "the resume came last");
}

#[tokio::test(start_paused = true)]
async fn terminate_wins_in_every_phase() {
    let node = Node::start_with(|config| config.max_concurrent_starts = 1).await;
    let engine = &node.engine;
    let ends = async |handle: &idle_controller::MicrovmHandle| {
        let start = tokio::time::Instant::now();
        handle.terminate().await.unwrap();
        let ended = reaches(handle, MicrovmState::Terminated).await;
        assert_eq!(ended.state_reason.as_deref(), Some("Success."));
        assert!(start.elapsed() < 5 * SEC, "it waited for a hanging operation");
        assert!(engine.running().is_empty());
        // One whose turn never came has no directory at all.
        assert!(node.files(handle).iter().all(|file| file == "no directory"), "{:?}", node.files(handle));
    };

    // Launching, and in line behind it.
    let hold = engine.hold_launches();
    let (launching, queued) = (node.run(spec()).await, node.run(spec()).await);
    hold.arrived(1).await;
    assert_eq!(node.metric("idle_starts_waiting", None), 1.0);
    let waiting = request(&queued).await;
    ends(&queued).await;
    assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::Terminated);
    assert_eq!(node.metric("idle_starts_waiting", None), 0.0);
    ends(&launching).await;
    drop(hold);
    assert_eq!(engine.counts().launches, 1);

    // Running, with an answer being computed.
    let running = node.running(spec()).await;
    let _computing = awake(&running).await.unwrap();
    ends(&running).await;

    // Suspending, on either side of the commit, and with a take-back under way.
    for step in [SuspendStep::BeforeCommit, SuspendStep::AfterCommit] {
        for taken_back in [false, true] {
            let handle = node.running(spec()).await;
            let hold = engine.hold_suspends(step);
            handle.suspend().await.unwrap();
            let waiting = if taken_back { Some(request(&handle).await) } else { None };
            if step == SuspendStep::AfterCommit || !taken_back {
                ends(&handle).await;
                if let Some(waiting) = waiting {
                    assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::Terminated);
                }
            }
            drop(hold);
            handle.terminate().await.unwrap();
            reaches(&handle, MicrovmState::Terminated).await;
        }
    }

    // Suspended.
    ends(&node.suspended(spec()).await).await;

    // Waking.
    let handle = node.suspended(spec()).await;
    let hold = engine.hold_restores();
    let waiting = request(&handle).await;
    hold.arrived(1).await;
    ends(&handle).await;
    assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::Terminated);
    drop(hold);
    assert!(engine.running().is_empty());

    // Its slot is free again.
    node.running(spec()).await;
}

#[tokio::test(start_paused = true)]
async fn a_terminated_microvm_is_kept_for_a_while_and_then_forgotten() {
    let node = Node::start_with(|config| config.keep_terminated = HOUR).await;
    let handle = node.suspended(spec()).await;
    let endpoint = handle.view().endpoint;
    std::fs::write(node.microvm_dir(&handle).join("console.log"), "panic").unwrap();
    handle.terminate().await.unwrap();
    reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(node.files(&handle), ["console.log"]);
    tokio::time::sleep(59 * MINUTE).await;
    assert_eq!(node.controller().list().len(), 1);
    assert!(node.controller().route(endpoint).is_some());
    tokio::time::sleep(2 * MINUTE).await;
    assert!(node.controller().list().is_empty());
    assert!(node.controller().route(endpoint).is_none());
    assert_eq!(node.files(&handle), ["no directory"]);
    // The handle outlives it harmlessly.
    handle.terminate().await.unwrap();
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Terminated);
    assert_eq!(handle.suspend().await, Err(Refused::Terminated));
}

#[tokio::test(start_paused = true)]
async fn a_full_node_says_so_and_has_room_again() {
    let node = Node::start_with(|config| config.max_microvms = 2).await;
    let (first, _second) = (node.running(spec()).await, node.suspended(spec()).await);
    assert!(matches!(node.controller().run(spec()).await, Err(ControllerError::Full { limit: 2 })));
    assert_eq!(node.controller().list().len(), 2);
    first.terminate().await.unwrap();
    reaches(&first, MicrovmState::Terminated).await;
    node.running(spec()).await;
}

#[tokio::test(start_paused = true)]
async fn the_list_is_newest_first() {
    let node = Node::start().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(node.run(spec()).await.id());
        tokio::time::sleep(SEC).await;
    }
    let listed: Vec<_> = node.controller().list().iter().map(|view| view.id).rev().collect();
    assert_eq!(listed, ids);
}

#[tokio::test(start_paused = true)]
async fn starts_take_turns() {
    let node = Node::start_with(|config| config.max_concurrent_starts = 2).await;
    let mut asleep = Vec::new();
    for _ in 0..6 {
        asleep.push(node.suspended(spec()).await);
    }
    let hold = node.engine.hold_restores();
    let mut waiting = Vec::new();
    for handle in &asleep {
        waiting.push(request(handle).await);
    }
    hold.arrived(2).await;
    assert_eq!(node.engine.counts().restores, 2);
    assert_eq!(node.metric("idle_starts_waiting", None), 4.0);
    tokio::time::sleep(SEC).await;
    hold.release();
    for request in waiting {
        let awake = request.await.unwrap().unwrap();
        let report = awake.woke().unwrap();
        assert_eq!(report.waited, SEC);
        assert!(report.phases.iter().any(|(name, took)| *name == "queue" && (*took == SEC || took.is_zero())));
    }
    assert_eq!(node.metric("idle_starts_waiting", None), 0.0);
}

#[tokio::test(start_paused = true)]
async fn processes_are_kept_ready_for_what_will_start() {
    let mut node = Node::start().await;
    node.suspended(spec()).await;
    node.suspended(spec()).await;
    // After each launch and after each suspend.
    node.engine.counted(|counts| counts.warms == 4).await;
    node.close().await;
    node.open().await;
    // Once for the image of all that sleep.
    node.engine.counted(|counts| counts.warms == 5).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_shorter_than_a_second() {
    let node = Node::start().await;
    let brief = IdlePolicy { max_idle: Duration::from_millis(5), suspended: Duration::from_millis(500), auto_resume: true };
    let handle = node.run(RunSpec { idle: Some(brief), ..spec() }).await;
    reaches(&handle, MicrovmState::Suspended).await;
    reaches(&handle, MicrovmState::Terminated).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_longer_than_time() {
    let node = Node::start_with(|config| config.keep_terminated = Duration::MAX).await;
    let endless = IdlePolicy { max_idle: Duration::MAX, suspended: Duration::MAX, auto_resume: true };
    let handle = node.suspended(RunSpec { idle: Some(endless), max_duration: Duration::MAX, ..spec() }).await;
    assert_eq!(handle.view().idle, Some(endless));
    assert_eq!(handle.view().max_duration, model::MAX_DURATION);
    let start = tokio::time::Instant::now();
    reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(elapsed_since(start), model::MAX_DURATION.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_suspend_after_a_start_counts_as_no_wake() {
    let node = Node::start().await;
    let hold = node.engine.hold_launches();
    let handle = node.run(spec()).await;
    handle.suspend().await.unwrap();
    hold.release();
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(node.metric("idle_launches_total", Some("started")), 1.0);
    assert_eq!(node.metric("idle_wakes_total", Some("taken_back")), 0.0);
    let woken = awake(&handle).await.unwrap();
    assert_eq!(woken.woke().unwrap().phases[0].0, "queue", "nothing of the launch is in the wake's report");
}
