//! `serve` ends and starts again: nothing is lost, doubled or left behind, and what expired meanwhile has ended (case 40,
//! design §4 rule 7).

use idle_controller::{Refused, RunSpec};
use model::{Generation, MicrovmId, MicrovmState};
use vmm_runtime::{engine::Exit, loopback::SuspendStep};

use crate::support::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Close,
    Crash,
}

async fn restart(node: &mut Node, how: End, away: std::time::Duration) {
    match how {
        End::Close => node.close().await,
        End::Crash => node.crash(),
    }
    tokio::time::sleep(away).await;
    node.open().await;
}

#[tokio::test(start_paused = true)]
async fn what_runs_is_adopted_and_what_sleeps_sleeps_on() {
    for how in [End::Close, End::Crash] {
        let mut node = Node::start().await;
        let running = node.suspended(spec()).await;
        running.resume().await.unwrap();
        reaches(&running, MicrovmState::Running).await;
        let asleep = node.suspended(RunSpec { request: serde_json::json!({"name": "ä"}), ..spec() }).await;
        let (running_before, asleep_before) = (running.view(), asleep.view());

        restart(&mut node, how, 10 * SEC).await;
        let (running, asleep) = (node.again(&running), node.again(&asleep));
        for (now, before) in [(running.view(), running_before), (asleep.view(), asleep_before)] {
            assert_eq!(format!("{now:?}"), format!("{before:?}"), "{how:?}");
            assert_eq!(node.controller().route(before.endpoint).unwrap().id(), before.id);
        }
        assert_eq!(node.engine.counts().adoptions, 1);
        let talking = awake(&running).await.unwrap();
        assert!(talking.woke().is_none());
        assert_eq!(talking.generation(), Generation(1));
        assert_eq!(awake(&asleep).await.unwrap().generation(), Generation(1));
        // The adopted one lives on as ever.
        drop(talking);
        reaches(&running, MicrovmState::Suspended).await;
        assert_eq!(awake(&running).await.unwrap().generation(), Generation(2));
    }
}

#[tokio::test(start_paused = true)]
async fn handles_of_before_are_harmless() {
    let mut node = Node::start().await;
    let (running, asleep) = (node.running(spec()).await, node.suspended(spec()).await);
    node.close().await;
    let closing = Refused::StartFailed { reason: "this node is shutting down".to_owned() };
    assert_eq!(awake(&asleep).await.unwrap_err(), closing);
    assert_eq!(asleep.resume().await.unwrap_err(), closing);
    assert!(matches!(running.suspend().await, Err(Refused::SuspendFailed { .. })));
    assert_eq!(running.terminate().await, Err(Refused::Busy));
    assert_eq!(running.wait_until(|_| false).await.state, MicrovmState::Running);
    assert!(node.engine.running().contains_key(&running.id()));
}

#[tokio::test(start_paused = true)]
async fn what_expired_while_the_node_was_down_has_ended() {
    for how in [End::Close, End::Crash] {
        let mut node = Node::start().await;
        let old = node.running(RunSpec { max_duration: HOUR, ..spec() }).await;
        let sleeper = node.suspended(spec()).await;
        let young = node.suspended(RunSpec { idle: Some(idle(MINUTE, 3 * HOUR)), ..spec() }).await;
        restart(&mut node, how, 2 * HOUR).await;

        // Condemned before anybody can talk to them.
        let (old, sleeper, young) = (node.again(&old), node.again(&sleeper), node.again(&young));
        assert_eq!((old.view().state, sleeper.view().state), (MicrovmState::Terminating, MicrovmState::Terminating));
        assert_eq!(awake(&old).await.unwrap_err(), Refused::Terminated);
        assert_eq!(awake(&sleeper).await.unwrap_err(), Refused::Terminated);
        let reason = reaches(&old, MicrovmState::Terminated).await.state_reason;
        assert_eq!(reason.as_deref(), Some("The maximum duration of 3600 seconds is over."));
        let reason = reaches(&sleeper, MicrovmState::Terminated).await.state_reason;
        assert_eq!(reason.as_deref(), Some("The suspended duration of 3600 seconds is over."));
        assert!(node.engine.running().is_empty());

        // What has an hour left has an hour left.
        let start = tokio::time::Instant::now();
        reaches(&young, MicrovmState::Terminated).await;
        assert_eq!(start.elapsed().as_secs(), 3600, "{how:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn jumps_of_the_wall_clock_end_nothing() {
    let mut node = Node::start().await;
    let (running, asleep) = (node.running(RunSpec { idle: None, ..spec() }).await, node.suspended(spec()).await);
    // While it runs, only the monotonic clock counts.
    node.clock.wall_jumps_forward(9 * HOUR);
    tokio::time::sleep(MINUTE).await;
    assert_eq!((running.view().state, asleep.view().state), (MicrovmState::Running, MicrovmState::Suspended));
    // An orderly restart after the jump does not count it either, and one backwards gives no time back.
    restart(&mut node, End::Close, SEC).await;
    node.close().await;
    node.clock.wall_jumps_back(5 * HOUR);
    node.open().await;
    let (running, asleep) = (node.again(&running), node.again(&asleep));
    assert_eq!((running.view().state, asleep.view().state), (MicrovmState::Running, MicrovmState::Suspended));
    let start = tokio::time::Instant::now();
    reaches(&asleep, MicrovmState::Terminated).await;
    assert_eq!(start.elapsed().as_secs(), 3600 - 61);
}

#[tokio::test(start_paused = true)]
async fn a_reboot_of_the_host_leaves_what_was_committed() {
    let mut node = Node::start().await;
    let never_slept = node.running(spec()).await;
    let slept_once = node.suspended(spec()).await;
    drop(awake(&slept_once).await.unwrap());
    let asleep = node.suspended(spec()).await;
    node.crash();
    node.engine.lose_processes();
    node.open().await;

    let lost = reaches(&node.again(&never_slept), MicrovmState::Terminated).await;
    assert_eq!(lost.state_reason.as_deref(), Some("The MicroVM was lost and has no snapshot: its VMM process ended while the node was down"));
    let fallen = node.again(&slept_once);
    let view = fallen.view();
    assert_eq!((view.state, view.generation), (MicrovmState::Suspended, Generation(1)));
    assert_eq!(view.state_reason.as_deref(), Some("fell back to its last snapshot: its VMM process ended while the node was down"));
    assert_eq!(awake(&fallen).await.unwrap().generation(), Generation(2));
    let asleep = node.again(&asleep);
    assert_eq!((asleep.view().state, asleep.view().state_reason), (MicrovmState::Suspended, None));
    assert_eq!(awake(&asleep).await.unwrap().generation(), Generation(1));
}

#[tokio::test(start_paused = true)]
async fn a_crash_during_a_launch_ends_it() {
    let mut node = Node::start().await;
    let hold = node.engine.hold_launches();
    let handle = node.run(spec()).await;
    hold.arrived(1).await;
    node.crash();
    node.open().await;
    let handle = node.again(&handle);
    let ended = reaches(&handle, MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("The MicroVM could not be launched: the node was restarted before it ran"));
    drop(hold);
    assert!(node.engine.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_crash_during_a_suspend_leaves_the_old_state_or_the_new_one() {
    for (step, state) in [(SuspendStep::BeforeCommit, MicrovmState::Running), (SuspendStep::AfterCommit, MicrovmState::Suspended)] {
        let mut node = Node::start().await;
        let handle = node.running(spec()).await;
        let hold = node.engine.hold_suspends(step);
        node.engine.counted(|counts| counts.suspends == 1).await;
        tokio::time::sleep(SEC).await;
        assert_eq!(handle.view().state, MicrovmState::Suspending);
        node.crash();
        node.open().await;
        drop(hold);
        let handle = node.again(&handle);
        assert_eq!((handle.view().state, handle.view().state_reason), (state, None));
        assert!(awake(&handle).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_during_a_wake_leaves_it_asleep() {
    let mut node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let hold = node.engine.hold_restores();
    let waiting = request(&handle).await;
    hold.arrived(1).await;
    node.crash();
    assert!(waiting.await.unwrap().is_err(), "who waited is not left hanging");
    node.open().await;
    drop(hold);
    let handle = node.again(&handle);
    assert_eq!(handle.view().state, MicrovmState::Suspended);
    assert_eq!(awake(&handle).await.unwrap().generation(), Generation(1));
    assert_eq!(node.engine.running().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_crash_during_a_terminate_does_not_undo_it() {
    let mut node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let hold = node.engine.hold_restores();
    handle.resume().await.unwrap();
    hold.arrived(1).await;
    handle.terminate().await.unwrap();
    assert_eq!(handle.view().state, MicrovmState::Terminating);
    node.crash();
    node.open().await;
    drop(hold);
    let ended = reaches(&node.again(&handle), MicrovmState::Terminated).await;
    assert_eq!(ended.state_reason.as_deref(), Some("Success."));
    assert_eq!(node.files(&handle), [""; 0]);
    assert!(node.engine.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_close_lets_what_is_under_way_end() {
    let mut node = Node::start().await;
    let launches = node.engine.hold_launches();
    let launching = node.run(spec()).await;
    launches.arrived(1).await;
    let waiting = request(&launching).await;
    let closing = node.controller().clone();
    let closed = tokio::spawn(async move { closing.close().await });
    tokio::time::sleep(SEC).await;
    assert!(!closed.is_finished());
    launches.release();
    closed.await.unwrap();
    assert!(waiting.await.unwrap().is_ok(), "who waited is served");
    assert_eq!(node.engine.running().len(), 1);
    assert!(node.controller().run(spec()).await.is_err());
    node.crash();
    node.open().await;
    assert_eq!(node.again(&launching).view().state, MicrovmState::Running);

    // A suspend under way is finished.
    let handle = node.again(&launching);
    let suspends = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    handle.suspend().await.unwrap();
    let closing = node.controller().clone();
    let closed = tokio::spawn(async move { closing.close().await });
    tokio::time::sleep(SEC).await;
    suspends.release();
    closed.await.unwrap();
    assert_eq!(handle.view().state, MicrovmState::Suspended);
    node.crash();
    node.open().await;
    assert_eq!(node.again(&handle).view().state, MicrovmState::Suspended);
}

#[tokio::test(start_paused = true)]
async fn terminated_ones_stay_readable_across_a_restart_and_go_in_time() {
    let mut node = Node::start_with(|config| {
        config.keep_terminated = HOUR;
        config.max_microvms = 1;
    })
    .await;
    let handle = node.running(spec()).await;
    node.engine.exit(handle.id(), Exit::App { code: 7 });
    let before = reaches(&handle, MicrovmState::Terminated).await;
    restart(&mut node, End::Crash, 20 * MINUTE).await;
    let view = node.again(&handle).view();
    assert_eq!(format!("{view:?}"), format!("{before:?}"));
    // It takes nobody's place.
    node.running(spec()).await;
    restart(&mut node, End::Close, 30 * MINUTE).await;
    assert_eq!(node.controller().list().len(), 2);
    restart(&mut node, End::Close, 15 * MINUTE).await;
    tokio::time::sleep(SEC).await;
    assert!(node.controller().find(handle.id()).is_none());
    assert_eq!(node.files(&handle), ["no directory"]);
}

#[tokio::test(start_paused = true)]
async fn orphans_are_ended_and_removed() {
    let mut node = Node::start().await;
    let handle = node.suspended(spec()).await;
    node.close().await;
    let orphan = node.dir.path().join("microvms").join(MicrovmId::random().to_string());
    let stranger = node.dir.path().join("microvms").join("lost+found");
    std::fs::create_dir_all(&orphan).unwrap();
    std::fs::create_dir_all(&stranger).unwrap();
    node.open().await;
    assert!(!orphan.exists() && stranger.exists());
    assert_eq!(node.files(&handle), ["snapshot.json"]);

    // A registry that is gone is no reason to throw the microVMs away.
    node.close().await;
    std::fs::remove_file(node.dir.path().join("registry.redb")).unwrap();
    node.open().await;
    assert_eq!(node.files(&handle), ["snapshot.json"]);
}

#[tokio::test(start_paused = true)]
async fn a_second_controller_on_the_same_directory_is_refused() {
    let node = Node::start().await;
    let metrics = prometheus::Registry::new();
    let engine = std::sync::Arc::new(node.engine.clone());
    let second = idle_controller::Controller::open(node.config.clone(), engine, node.clock.clone(), &metrics).await;
    let error = second.unwrap_err();
    assert!(error.to_string().contains("registry.redb"), "{error}");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("another process"));
}
