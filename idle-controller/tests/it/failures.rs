//! What goes wrong below, and what is left of the microVM (cases 40–42).

use std::{
    io,
    time::{Duration, Instant},
};

use idle_controller::Refused;
use model::{Generation, MicrovmState};
use vmm_runtime::engine::{EngineError, Exit};

use crate::support::*;

fn disk_full() -> EngineError {
    EngineError::Failed { doing: "writing memory".to_owned(), source: Box::new(io::Error::other("no space left on device")) }
}

const DISK_FULL: &str = "writing memory failed: no space left on device";

fn killed() -> Exit {
    Exit::Vmm { detail: "killed by signal 9".to_owned() }
}

#[tokio::test(start_paused = true)]
async fn a_failed_launch_ends_it_with_the_reason() {
    let node = Node::start().await;
    node.engine.fail_next_launch(disk_full());
    let hold = node.engine.hold_launches();
    let handle = node.run(spec()).await;
    let waiting = request(&handle).await;
    hold.release();
    assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::StartFailed { reason: DISK_FULL.to_owned() });
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason, Some(format!("The MicroVM could not be launched: {DISK_FULL}")));
    assert_eq!(node.metric("idle_launches_total", Some("failed")), 1.0);

    node.engine.fail_next_launch(EngineError::Ended { step: "launch", exit: Exit::App { code: 3 } });
    let handle = node.run(spec()).await;
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("Container Stopped with Exit Code: 3"));
}

#[tokio::test(start_paused = true)]
async fn a_failed_wake_keeps_the_snapshot_and_the_next_request_tries_again() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    for _ in 0..3 {
        node.engine.fail_next_restore(disk_full());
        assert_eq!(awake(&handle).await.unwrap_err(), Refused::StartFailed { reason: DISK_FULL.to_owned() });
        let view = handle.view();
        assert_eq!((view.state, view.generation), (MicrovmState::Suspended, Generation(0)));
        assert_eq!(view.state_reason.as_deref(), Some(DISK_FULL));
    }
    let woken = awake(&handle).await.unwrap();
    assert_eq!(woken.generation(), Generation(1));
    assert_eq!(handle.view().state_reason, None);
    assert_eq!(node.metric("idle_wakes_total", Some("failed")), 3.0);
    assert_eq!(node.metric("idle_wakes_total", Some("started")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn one_who_waits_in_vain_learns_how_far_the_wake_came() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    node.engine.fail_next_restore(disk_full());
    let unwoken = handle.awake_or_why(Instant::now() + 30 * MINUTE).await.unwrap_err();
    assert_eq!(unwoken.refused, Refused::StartFailed { reason: DISK_FULL.to_owned() });
    let steps: Vec<_> = unwoken.report.phases.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, ["queue", "failed"]);
    assert_eq!(unwoken.report.phases.iter().map(|(_, took)| *took).sum::<Duration>(), unwoken.report.waited);
}

#[tokio::test(start_paused = true)]
async fn failed_wakes_do_not_stop_the_suspended_clock() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let start = tokio::time::Instant::now();
    tokio::time::sleep(30 * MINUTE).await;
    node.engine.fail_next_restore(disk_full());
    assert!(awake(&handle).await.is_err());
    reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(start.elapsed().as_secs(), 3600);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_snapshot_ends_it_and_is_set_aside() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let snapshot = node.microvm_dir(&handle).join("snapshot.json");
    let bytes = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, &bytes[..bytes.len() / 2]).unwrap();
    let Err(Refused::StartFailed { reason }) = awake(&handle).await else { panic!("it woke from a truncated snapshot") };
    assert!(reason.contains("damaged"), "{reason}");
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert!(ended.state_reason.unwrap().starts_with("The MicroVM's snapshot is damaged: "));
    assert_eq!(node.files(&handle), ["damaged-snapshot.json"]);
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Terminated);
    assert!(node.engine.running().is_empty());
    assert_eq!(node.metric("idle_wakes_total", Some("damaged")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_used_now_is_not_the_microvms_end() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    node.engine.fail_next_restore(EngineError::BadSnapshot { dir: spec().image_dir, why: "memory is missing".to_owned() });
    assert!(matches!(awake(&handle).await, Err(Refused::StartFailed { .. })));
    assert_eq!(handle.view().state, MicrovmState::Suspended);
    assert!(awake(&handle).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_failed_suspend_leaves_it_running_and_is_tried_again() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    node.engine.fail_next_suspend(disk_full());
    let start = tokio::time::Instant::now();
    let view = handle.wait_until(|view| view.state_reason.is_some()).await;
    assert_eq!((view.state, view.generation), (MicrovmState::Running, Generation(0)));
    assert_eq!(view.state_reason, Some(format!("could not be suspended: {DISK_FULL}")));
    assert!(awake(&handle).await.unwrap().woke().is_none(), "it serves as before");
    let asleep = reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(asleep.state_reason, None);
    assert_eq!(start.elapsed().as_secs(), 120);
    assert_eq!(node.metric("idle_suspends_total", Some("failed")), 1.0);

    // Asked for by the API: accepted, and then it runs on.
    handle.resume().await.unwrap();
    reaches(&handle, MicrovmState::Running).await;
    node.engine.fail_next_suspend(disk_full());
    handle.suspend().await.unwrap();
    handle.wait_until(|view| view.state == MicrovmState::Running && view.state_reason.is_some()).await;
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_took_a_failing_suspend_back_is_served() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    let hold = node.engine.hold_suspends(vmm_runtime::loopback::SuspendStep::AfterCommit);
    node.engine.fail_next_suspend(disk_full());
    handle.suspend().await.unwrap();
    assert_eq!(awake(&handle).await.unwrap().generation(), Generation(0));
    drop(hold);
}

#[tokio::test(start_paused = true)]
async fn the_apps_exit_ends_it_with_its_code() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    let _computing = awake(&handle).await.unwrap();
    assert!(node.engine.exit(handle.id(), Exit::App { code: 137 }));
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("Container Stopped with Exit Code: 137"));

    // Also when it exits while it is being suspended.
    let handle = node.running(spec()).await;
    node.engine.fail_next_suspend(EngineError::Ended { step: "suspend", exit: Exit::App { code: 0 } });
    handle.suspend().await.unwrap();
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("Container Stopped with Exit Code: 0"));
}

#[tokio::test(start_paused = true)]
async fn a_dead_vmm_without_a_snapshot_is_the_end() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    assert!(node.engine.exit(handle.id(), killed()));
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("The MicroVM was lost and has no snapshot: killed by signal 9"));
}

#[tokio::test(start_paused = true)]
async fn a_dead_vmm_with_a_snapshot_falls_back_to_it() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    drop(awake(&handle).await.unwrap());
    assert!(node.engine.exit(handle.id(), killed()));
    let asleep = reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(asleep.state_reason.as_deref(), Some("fell back to its last snapshot: killed by signal 9"));
    // Its connections were of generation 1, so what comes is 2.
    assert_eq!(awake(&handle).await.unwrap().generation(), Generation(2));

    // The same while it is being suspended, with somebody who wants it awake.
    node.engine.fail_next_suspend(EngineError::Ended { step: "suspend", exit: killed() });
    let hold = node.engine.hold_restores();
    handle.suspend().await.unwrap();
    let waiting = request(&handle).await;
    hold.release();
    assert_eq!(waiting.await.unwrap().unwrap().generation(), Generation(3));
}

#[tokio::test(start_paused = true)]
async fn one_that_dies_disturbs_no_other() {
    let node = Node::start().await;
    let (victim, neighbour) = (node.running(spec()).await, node.running(spec()).await);
    let talking = awake(&neighbour).await.unwrap();
    node.engine.exit(victim.id(), killed());
    reaches(&victim, MicrovmState::Terminated).await;
    assert_eq!(neighbour.view().state, MicrovmState::Running);
    assert_eq!(talking.generation(), Generation(0));
}
