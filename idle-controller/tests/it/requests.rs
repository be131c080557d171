//! Requests that meet a sleeping, waking or falling-asleep microVM (design §4 rules 2 and 3, cases 38 and 39).

use std::time::{Duration, Instant};

use futures::future::join_all;
use idle_controller::{Refused, RunSpec};
use model::{Generation, MicrovmState, Port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use vmm_runtime::loopback::SuspendStep;

use crate::support::*;

#[tokio::test(start_paused = true)]
async fn a_stampede_is_one_restore() {
    for n in [50, 500] {
        let node = Node::start().await;
        let handle = node.suspended(spec()).await;
        let hold = node.engine.hold_restores();
        let mut requests = Vec::new();
        for _ in 0..n {
            requests.push(request(&handle).await);
        }
        hold.arrived(1).await;
        assert_eq!(node.metric("idle_requests_waiting", None), f64::from(n));
        // Half of the clients give up.
        let (leaving, patient): (Vec<_>, Vec<_>) = requests.into_iter().enumerate().partition(|(number, _)| number % 2 == 0);
        for (_, request) in &leaving {
            request.abort();
        }
        join_all(leaving.into_iter().map(|(_, request)| request)).await;
        assert_eq!(node.metric("idle_requests_waiting", None), f64::from(n / 2));
        hold.release();
        let served = join_all(patient.into_iter().map(|(_, request)| request)).await;
        assert_eq!(served.len(), usize::try_from(n).unwrap() / 2);
        for awake in served {
            assert_eq!(awake.unwrap().unwrap().generation(), Generation(1));
        }
        assert_eq!(node.engine.counts().restores, 1);
        // Nobody left a hold behind.
        reaches(&handle, MicrovmState::Suspended).await;
    }
}

#[tokio::test(start_paused = true)]
async fn all_may_leave_and_the_wake_goes_on() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let hold = node.engine.hold_restores();
    let alone = request(&handle).await;
    hold.arrived(1).await;
    alone.abort();
    let _ = alone.await;
    hold.release();
    reaches(&handle, MicrovmState::Running).await;
    assert_eq!(handle.view().generation, Generation(1));
}

#[tokio::test(start_paused = true)]
async fn places_are_bounded_and_freed_at_once() {
    let node = Node::start_with(|config| config.max_waiting_per_microvm = 2).await;
    let handle = node.suspended(spec()).await;
    let hold = node.engine.hold_restores();
    let (first, second) = (request(&handle).await, request(&handle).await);
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Busy);
    // Again and again somebody leaves and another comes: the driver does not collect those who left.
    first.abort();
    let _ = first.await;
    for _ in 0..100 {
        let brief = request(&handle).await;
        assert!(!brief.is_finished(), "there was no place");
        brief.abort();
        let _ = brief.await;
    }
    let third = request(&handle).await;
    assert_eq!(awake(&handle).await.unwrap_err(), Refused::Busy);
    // The API has its own way in.
    handle.resume().await.unwrap();
    hold.release();
    assert!(second.await.unwrap().is_ok() && third.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_impatient_request_leaves_and_the_wake_goes_on() {
    let node = Node::start().await;
    let handle = node.suspended(spec()).await;
    let hold = node.engine.hold_restores();
    let deadline = tokio::time::Instant::now().into_std() + 3 * SEC;
    assert_eq!(handle.awake(deadline).await.unwrap_err(), Refused::TimedOut { waited: 3 * SEC });
    assert_eq!(handle.view().state, MicrovmState::Pending);
    hold.release();
    reaches(&handle, MicrovmState::Running).await;
    assert_eq!(node.engine.counts().restores, 1);
    // A deadline that has passed is no obstacle to what is awake already.
    assert!(handle.awake(deadline).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_suspend_under_way_is_taken_back() {
    for asked in [false, true] {
        let node = Node::start().await;
        let handle = node.running(spec()).await;
        let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
        if asked {
            handle.suspend().await.unwrap();
        }
        hold.arrived(1).await;
        assert_eq!(handle.view().state, MicrovmState::Suspending);
        let awake = awake(&handle).await.unwrap();
        assert_eq!(awake.generation(), Generation(0));
        assert_eq!(awake.woke().unwrap().phases.len(), 1);
        assert_eq!(awake.woke().unwrap().phases[0].0, "take-back");
        assert_eq!(handle.view().state, MicrovmState::Running);
        assert_eq!((node.engine.counts().taken_back, node.engine.counts().restores), (1, 0));
        assert_eq!(node.metric("idle_wakes_total", Some("taken_back")), 1.0);
        assert_eq!(node.metric("idle_suspends_total", Some("taken_back")), 1.0);
        // It can sleep as ever.
        drop((hold, awake));
        reaches(&handle, MicrovmState::Suspended).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_just_after_the_commit_is_woken_for() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    let hold = node.engine.hold_suspends(SuspendStep::AfterCommit);
    node.engine.counted(|counts| counts.suspends == 1).await;
    let waiting = request(&handle).await;
    tokio::time::sleep(2 * SEC).await;
    hold.release();
    let awake = waiting.await.unwrap().unwrap();
    assert_eq!(awake.generation(), Generation(1));
    let report = awake.woke().unwrap();
    let names: Vec<&str> = report.phases.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["take-back", "queue", "loopback", "record"]);
    assert_eq!((report.waited, report.phases[0].1), (2 * SEC, 2 * SEC));
    assert_eq!(node.engine.counts().restores, 1);
}

#[tokio::test(start_paused = true)]
async fn who_is_let_through_cannot_lose_the_race_against_the_idle_clock() {
    // The shortest idle time there is: only the hold that comes with the answer keeps it awake.
    let node = Node::start().await;
    let handle = node.run(RunSpec { idle: Some(idle(Duration::from_millis(1), HOUR)), ..spec() }).await;
    for _ in 0..50 {
        let awake = awake(&handle).await.unwrap();
        let generation = awake.generation();
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(handle.view().state, MicrovmState::Running);
        assert_eq!(handle.view().generation, generation);
        drop(awake);
        reaches(&handle, MicrovmState::Suspended).await;
    }
}

/// A guest app that answers every byte with itself.
async fn echo(node: &Node) -> Port {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = Port::new(8080).unwrap();
    node.engine.listen(port, listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    port
}

fn soon() -> Instant {
    Instant::now() + 30 * SEC
}

/// In real time, because of the real sockets.
#[tokio::test]
async fn a_byte_on_a_parked_stream_wakes_it_and_is_answered() {
    let node = Node::start().await;
    let port = echo(&node).await;
    // Long enough for an echo on a busy machine: one that is caught by the next sleep is a reply that nobody waits for.
    let handle = node.run(RunSpec { idle: Some(idle(Duration::from_millis(500), HOUR)), ..spec() }).await;
    let awake = handle.awake(soon()).await.unwrap();
    let mut stream = awake.dial(port).await.unwrap();
    awake.streaming();
    for round in 1..=3 {
        reaches_within(REAL_CEILING, &handle, MicrovmState::Suspended).await;
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        // The stream flows once the wake is durable, and the view says so.
        let woken = tokio::time::timeout(REAL_CEILING, handle.wait_until(|view| view.generation == Generation(round))).await;
        assert_eq!(woken.expect("it wakes").generation, Generation(round));
    }
}

#[tokio::test]
async fn a_byte_on_a_parked_stream_does_not_wake_what_traffic_may_not_wake() {
    let node = Node::start().await;
    let port = echo(&node).await;
    let handle = node.running(no_auto_resume()).await;
    let awake = handle.awake(soon()).await.unwrap();
    let mut stream = awake.dial(port).await.unwrap();
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(handle.awake(soon()).await.unwrap_err(), Refused::Asleep);
    assert_eq!(node.engine.counts().restores, 0);
    // The byte is not lost.
    handle.resume().await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_answer_is_owed_wakes_what_was_put_to_sleep_under_it() {
    let node = Node::start().await;
    let handle = node.running(spec()).await;
    let owed = awake(&handle).await.unwrap();
    handle.suspend().await.unwrap();
    // The suspend is carried out, and the request is then like one that has just come.
    let again = handle.wait_until(|view| view.state == MicrovmState::Running && view.generation == Generation(1)).await;
    assert_eq!(again.generation, Generation(1));
    assert_eq!((node.engine.counts().suspends, node.engine.counts().restores), (1, 1));

    // Once its answer has begun it is an open stream, which wakes nobody.
    owed.streaming();
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(node.engine.counts().restores, 1);
    drop(owed);

    // Where traffic may not wake it, an owed answer may not either.
    let handle = node.running(no_auto_resume()).await;
    let owed = awake(&handle).await.unwrap();
    handle.suspend().await.unwrap();
    reaches(&handle, MicrovmState::Suspended).await;
    assert_eq!(node.engine.counts().restores, 1);
    drop(owed);
}
