//! Requests and sleep: one wake for all, refusals that wake nobody, clients that leave, and what a failed wake reads like.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use model::{Generation, IdlePolicy, MicrovmState, PortScope};
use tokio::io::AsyncWriteExt as _;
use vmm_runtime::{engine::EngineError, loopback::{LoopbackEngine, SuspendStep}};

use crate::{
    app::App,
    eager::{Dials, EagerEngine, Prompt},
    rig::{H2, Rig, full, get, h2_request, request, until, within},
};

fn policy(max_idle: Duration) -> Option<IdlePolicy> {
    Some(IdlePolicy { max_idle, suspended: Duration::from_secs(600), auto_resume: true })
}

#[tokio::test(flavor = "multi_thread")]
async fn case_38_fifty_requests_to_a_sleeping_microvm_are_one_restore() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let hold = rig.engine.hold_restores();
    let h2 = rig.h2().await;
    let mut waiting = Vec::new();
    for place in 0..50 {
        let fields = [("x-aws-proxy-auth", token.as_str())];
        let body = format!("body {place}");
        if place % 2 == 0 {
            let (mut h2, request) = (H2(h2.0.clone()), h2_request("POST", &vm.host, "/", &fields, full(body.clone())));
            waiting.push(tokio::spawn(async move { (h2.send(request).await, body) }));
        } else {
            let (mut h1, request) = (rig.h1().await, request("POST", &vm.host, "/", &fields, full(body.clone())));
            waiting.push(tokio::spawn(async move { (h1.send(request).await, body) }));
        }
    }
    within("the restore to begin", hold.arrived(1)).await;
    until("all requests to be held", || {
        let open = |kind| rig.metric("edge_open_streams", &[("kind", kind)]);
        open("h1") + open("h2") == 50.0
    })
    .await;
    assert_eq!(app.requests.load(Ordering::SeqCst), 0);
    hold.release();
    for answer in waiting {
        let (answer, body) = answer.await.unwrap();
        assert_eq!(answer.status, 200);
        assert!(answer.text().ends_with(&body));
    }
    assert_eq!(rig.engine.counts().restores, 1);
    assert_eq!(app.requests.load(Ordering::SeqCst), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_its_place_and_cancels_nothing() {
    // Longer than any wait of this test, so that no place is freed by its end.
    let rig = Rig::with(|config| config.hold = Duration::from_secs(600)).await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let hold = rig.engine.hold_restores();
    let open = |kind: &str| rig.metric("edge_open_streams", &[("kind", kind)]);

    // HTTP/1.1, with a body that waits in the socket: the whole connection goes.
    let mut tls = rig.tls(&["http/1.1"]).await;
    let text = format!("POST / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\ncontent-length: 5\r\n\r\nhello", vm.host);
    tls.write_all(text.as_bytes()).await.unwrap();
    within("the restore to begin", hold.arrived(1)).await;
    until("the h1 request to be held", || open("h1") == 1.0).await;
    drop(tls);
    until("the h1 place to be free", || open("h1") == 0.0).await;

    // HTTP/2: one stream is reset, the other one goes on waiting.
    let h2 = rig.h2().await;
    let send = |place: usize| {
        let (mut h2, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, &format!("/{place}"), &[("x-aws-proxy-auth", &token)], full("")));
        tokio::spawn(async move { h2.send(request).await })
    };
    let (leaves, stays) = (send(1), send(2));
    until("both streams to be held", || open("h2") == 2.0).await;
    leaves.abort();
    until("the h2 place to be free", || open("h2") == 1.0).await;

    hold.release();
    assert_eq!(stays.await.unwrap().status, 200);
    assert_eq!((rig.engine.counts().restores, app.requests.load(Ordering::SeqCst)), (1, 1));
    assert_eq!(rig.metric("edge_requests_total", &[("protocol", "h1"), ("status_class", "aborted")]), 1.0);
    assert_eq!(rig.metric("edge_requests_total", &[("protocol", "h2"), ("status_class", "aborted")]), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_woken_reads_as_on_aws() {
    let rig = Rig::with(|config| config.hold = Duration::from_millis(300)).await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let stubborn = rig.run(Some(IdlePolicy { auto_resume: false, ..policy(Duration::from_secs(600)).unwrap() })).await;
    let (token, stubborn_token) = (rig.token(&vm, PortScope::All), rig.token(&stubborn, PortScope::All));
    let mut h1 = rig.h1().await;

    rig.suspend(&stubborn).await;
    for _ in 0..2 {
        let answer = h1.send(get(&stubborn.host, "/", &[("x-aws-proxy-auth", &stubborn_token)])).await;
        assert_eq!((answer.status, answer.text(), answer.reason()), (502, "", "suspended"));
    }
    assert_eq!(stubborn.state(), MicrovmState::Suspended);

    rig.suspend(&vm).await;
    rig.engine.fail_next_restore(EngineError::Host { what: "no memory".to_owned() });
    let answer = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((answer.status, answer.text(), answer.reason()), (502, "", "wake-failed"));
    within("SUSPENDED again", vm.handle.wait_until(|view| view.state == MicrovmState::Suspended)).await;

    let hold = rig.engine.hold_restores();
    let answer = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((answer.status, answer.text(), answer.reason()), (502, "", "wake-timeout"));
    hold.release();

    // The snapshot was kept: it can be woken again.
    within("the wake to end", vm.handle.wait_until(|view| view.state == MicrovmState::Running)).await;
    assert_eq!(h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await.status, 200);

    within("the end", vm.handle.terminate()).await.unwrap();
    within("TERMINATED", vm.handle.wait_until(|view| view.state == MicrovmState::Terminated)).await;
    let answer = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((answer.status, answer.text(), answer.reason()), (502, "", "terminated"));
    // And for whoever has no token for it, it is as unknown as ever.
    let answer = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &stubborn_token)])).await;
    assert_eq!((answer.status, answer.text()), (403, "Token authentication failed"));
    assert_eq!(app.requests.load(Ordering::SeqCst), 1);
    assert_eq!(rig.metric("edge_connections", &[]), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_39_a_request_during_a_suspend_is_served_once() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let send = async || {
        let request = request("POST", &vm.host, "/", &[("x-aws-proxy-auth", &token)], full("once"));
        rig.h1().await.send(request).await.status
    };
    // Before the commit: the suspend is taken back.
    let hold = rig.engine.hold_suspends(SuspendStep::BeforeCommit);
    within("the suspend to be taken", vm.handle.suspend()).await.unwrap();
    within("the suspend", hold.arrived(1)).await;
    assert_eq!(send().await, 200);
    assert_eq!((app.requests.load(Ordering::SeqCst), rig.engine.counts().taken_back), (1, 1));
    hold.release();

    // After it: the request waits for the suspend and for the wake that follows.
    let hold = rig.engine.hold_suspends(SuspendStep::AfterCommit);
    within("the suspend to be taken", vm.handle.suspend()).await.unwrap();
    within("the suspend", hold.arrived(1)).await;
    let release = async {
        until("the request to be held", || rig.metric("edge_open_streams", &[("kind", "h1")]) == 1.0).await;
        hold.release();
    };
    assert_eq!(tokio::join!(send(), release).0, 200);
    assert_eq!((app.requests.load(Ordering::SeqCst), rig.engine.counts().restores), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_that_falls_asleep_between_wake_and_dial_is_woken_again() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let hold = rig.engine.hold_dials();
    let (mut h1, request) = (rig.h1().await, request("POST", &vm.host, "/", &[("x-aws-proxy-auth", &token)], full("once")));
    let answer = tokio::spawn(async move { h1.send(request).await });
    within("the dial", hold.arrived(1)).await;
    within("the suspend to be taken", vm.handle.suspend()).await.unwrap();
    // It sleeps, and wakes for the answer that it owes.
    within("the wake", vm.handle.wait_until(|view| view.generation == Generation(1) && view.state == MicrovmState::Running)).await;
    hold.release();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.text().ends_with("once"));
    assert_eq!((app.requests.load(Ordering::SeqCst), rig.engine.counts().restores), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_being_computed_keeps_its_microvm_awake_and_a_silent_stream_does_not() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    rig.engine.listen(model::Port::DEFAULT, address);
    let vm = rig.run(policy(Duration::from_millis(200))).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let h2 = rig.h2().await;

    let (mut slow, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, "/slow", &auth, full("")));
    let answer = tokio::spawn(async move { slow.send(request).await });
    until("the request to reach the app", || app.requests.load(Ordering::SeqCst) == 1).await;
    let suspends = rig.engine.counts().suspends;
    // It does not fall asleep for many times its maxIdle.
    assert!(tokio::time::timeout(Duration::from_secs(1), rig.engine.counted(|counts| counts.suspends > suspends)).await.is_err());
    app.go.notify_one();
    assert_eq!(answer.await.unwrap().text(), "at last");

    // An event stream after its first event is silent: it sleeps, and the stream is still there.
    let mut events = H2(h2.0.clone());
    let response = within("the answer", events.0.send_request(h2_request("GET", &vm.host, "/events", &auth, full("")))).await.unwrap();
    within("the sleep", vm.handle.wait_until(|view| view.state == MicrovmState::Suspended)).await;
    assert_eq!(app.dropped.load(Ordering::SeqCst), 0);
    drop(response);
}

/// An app of gRPC measures its path by a PING whenever it has read a message, and what answers it is the HTTP/2 layer.
#[tokio::test(flavor = "multi_thread")]
async fn what_http2_itself_says_takes_no_suspend_back_wakes_nobody_and_is_heard_after_the_wake() {
    let (engine, prompt) = (LoopbackEngine::new(), Prompt::new());
    let rig = Rig::over(engine.clone(), Arc::new(EagerEngine(engine, Dials::Prompted(prompt.clone()))), |_| {}).await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let forced = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
    let h2 = rig.h2().await;
    let events = within("the answer", H2(h2.0.clone()).0.send_request(h2_request("GET", &vm.host, "/events", &forced, full("")))).await.unwrap();
    assert_eq!(events.version(), http::Version::HTTP_2);

    let hold = rig.engine.hold_suspends(SuspendStep::BeforeCommit);
    within("the suspend to be taken", vm.handle.suspend()).await.unwrap();
    within("the suspend", hold.arrived(1)).await;
    for said in 1..=2 {
        // RFC 9113 §6.7; the second is read after the first was answered.
        prompt.says.send([&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"measure", &[said]].concat()).unwrap();
        until("the PING to be read", || prompt.said.load(Ordering::SeqCst) == usize::from(said)).await;
    }
    hold.release();
    within("the sleep", vm.handle.wait_until(|view| view.state == MicrovmState::Suspended)).await;
    let answer = |said| [&[0, 0, 8, 6, 1, 0, 0, 0, 0][..], b"measure", &[said]].concat();
    let told = |bytes: &[u8]| prompt.told.lock().unwrap().windows(bytes.len()).any(|window| window == bytes);
    assert!(!told(&answer(1)));

    let (mut h1, request) = (rig.h1().await, get(&vm.host, "/", &forced[..1]));
    assert_eq!(within("the wake", h1.send(request)).await.status, 200);
    assert_eq!((rig.engine.counts().taken_back, rig.engine.counts().restores), (0, 1));
    until("both answers", || told(&[answer(1), answer(2)].concat())).await;
    drop(events);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_requests_do_not_move_the_idle_clock() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    rig.engine.listen(model::Port::DEFAULT, address);
    let vm = rig.run(policy(Duration::from_millis(400))).await;
    let mut h1 = rig.h1().await;
    // A flood of refusals that never pauses for as long as maxIdle.
    let slept = vm.handle.wait_until(|view| view.state == MicrovmState::Suspended);
    let flood = async {
        loop {
            assert_eq!(h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", "garbage")])).await.status, 403);
        }
    };
    within("the sleep", async {
        tokio::select! {
            _ = slept => {}
            () = flood => {}
        }
    })
    .await;
    assert_eq!(rig.engine.counts().restores, 0);
}
