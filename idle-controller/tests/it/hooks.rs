//! What the app is told of its life, and that nothing else reaches it before it has agreed (aws-behaviour §4, design §4 rule 4).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use idle_controller::{Awake, MicrovmHandle, MicrovmView, Refused, RunSpec};
use model::{Generation, Hook, Hooks, MicrovmState, Port, RunPayload, SuspendHookFailure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use vmm_runtime::{engine::Exit, loopback::SuspendStep};

use crate::support::*;

const HOOKS: Port = Port::DEFAULT;

fn echo_port() -> Port {
    Port::new(7000).unwrap()
}

/// An app that answers its hooks with 200, or as it is told.
#[derive(Default)]
struct App {
    /// Hook and body of each call, as they come.
    heard: watch::Sender<Vec<(String, String)>>,
    /// The next answers of a hook.
    answers: Mutex<BTreeMap<&'static str, VecDeque<u16>>>,
    /// While this is set, no call is answered.
    slow: watch::Sender<bool>,
    /// What came on the echo port.
    echoed: watch::Sender<Vec<u8>>,
}

impl App {
    async fn start(node: &Node) -> Arc<Self> {
        let app = Arc::new(Self::default());
        let (hooks, echo) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
        node.engine.listen(HOOKS, hooks.local_addr().unwrap());
        node.engine.listen(echo_port(), echo.local_addr().unwrap());
        let this = Arc::clone(&app);
        tokio::spawn(async move {
            while let Ok((stream, _)) = hooks.accept().await {
                let this = Arc::clone(&this);
                tokio::spawn(async move { this.answer(stream).await });
            }
        });
        let this = Arc::clone(&app);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                let this = Arc::clone(&this);
                tokio::spawn(async move {
                    let mut piece = [0; 1000];
                    while let Ok(n @ 1..) = stream.read(&mut piece).await {
                        this.echoed.send_modify(|echoed| echoed.extend(&piece[..n]));
                        stream.write_all(&piece[..n]).await.unwrap();
                    }
                });
            }
        });
        app
    }

    async fn answer(&self, mut stream: TcpStream) {
        let (mut request, mut piece) = (Vec::new(), [0; 4096]);
        let (head, body) = loop {
            let n = stream.read(&mut piece).await.unwrap();
            request.extend(&piece[..n]);
            let text = String::from_utf8(request.clone()).unwrap();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length: usize = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(|n| n.parse().unwrap())).unwrap();
                if body.len() >= length {
                    break (head.to_owned(), body.to_owned());
                }
            }
        };
        let hook = head.split(' ').nth(1).unwrap().rsplit('/').next().unwrap().to_owned();
        let status = self.answers.lock().unwrap().get_mut(hook.as_str()).and_then(VecDeque::pop_front).unwrap_or(200);
        self.heard.send_modify(|heard| heard.push((hook, body)));
        let _ = self.slow.subscribe().wait_for(|slow| !slow).await;
        // The caller may have left.
        let _ = stream.write_all(format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
    }

    fn will_answer(&self, hook: Hook, status: u16) {
        self.answers.lock().unwrap().entry(hook.name()).or_default().push_back(status);
    }

    fn heard(&self) -> Vec<String> {
        self.heard.borrow().iter().map(|(hook, _)| hook.clone()).collect()
    }

    /// Waits for so many calls.
    async fn hears(&self, n: usize) {
        let mut heard = self.heard.subscribe();
        let there = tokio::time::timeout(REAL_CEILING, heard.wait_for(|heard| heard.len() >= n)).await;
        assert!(there.is_ok(), "the app never heard {n} calls: {:?}", self.heard());
    }
}

fn hooks(enabled: &[Hook]) -> Hooks {
    let mut hooks = Hooks::none(HOOKS);
    enabled.iter().for_each(|hook| hooks.enable(*hook, Duration::from_secs(30)));
    hooks
}

fn with(enabled: &[Hook]) -> RunSpec {
    RunSpec { hooks: Some(hooks(enabled)), ..spec() }
}

async fn settles(handle: &MicrovmHandle, state: MicrovmState) -> MicrovmView {
    reaches_within(REAL_CEILING, handle, state).await
}

async fn served(handle: &MicrovmHandle) -> Result<Awake, Refused> {
    handle.awake(std::time::Instant::now() + REAL_CEILING).await
}

async fn running(node: &Node, spec: RunSpec) -> MicrovmHandle {
    let handle = node.run(spec).await;
    settles(&handle, MicrovmState::Running).await;
    handle
}

async fn sleeps(handle: &MicrovmHandle) {
    handle.suspend().await.unwrap();
    settles(handle, MicrovmState::Suspended).await;
}

#[tokio::test]
async fn nothing_is_let_through_before_run_has_answered() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    app.slow.send_replace(true);
    let handle = node.run(RunSpec { run_payload: Some(RunPayload("for one tenant".to_owned())), ..with(&[Hook::Run]) }).await;
    app.hears(1).await;
    let waiting = request(&handle).await;
    assert!(!waiting.is_finished());
    assert_eq!(handle.view().state, MicrovmState::Pending);
    app.slow.send_replace(false);
    let awake = waiting.await.unwrap().unwrap();
    assert!(awake.woke().unwrap().phases.iter().any(|(phase, _)| *phase == "hook"), "{awake:?}");
    assert_eq!(handle.view().state, MicrovmState::Running);
    let body = format!(r#"{{"microvmId":"{}","runHookPayload":"for one tenant"}}"#, handle.id());
    assert_eq!(*app.heard.borrow(), [("run".to_owned(), body)]);
}

#[tokio::test]
async fn an_app_that_does_not_agree_to_run_is_ended_with_awss_words() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    app.will_answer(Hook::Run, 400);
    let reason = "Run lifecycle hook returned HTTP status 400. Please check your hook endpoint and application logs for more details.";
    app.slow.send_replace(true);
    let handle = node.run(with(&[Hook::Run, Hook::Terminate])).await;
    let waiting = request(&handle).await;
    app.slow.send_replace(false);
    assert_eq!(waiting.await.unwrap().unwrap_err(), Refused::StartFailed { reason: reason.to_owned() });
    let view = settles(&handle, MicrovmState::Terminated).await;
    assert_eq!(view.state_reason.as_deref(), Some(reason));
    assert_eq!(app.heard(), ["run"], "one that never ran is not told of its end");
    assert!(node.engine.running().is_empty());
    assert_eq!(node.metric("idle_terminations_total", Some("hook_failed")), 1.0);

    // An app that ends says why by its code.
    app.slow.send_replace(true);
    let handle = node.run(with(&[Hook::Run])).await;
    app.hears(2).await;
    assert!(node.engine.exit(handle.id(), Exit::App { code: 3 }));
    let view = settles(&handle, MicrovmState::Terminated).await;
    assert_eq!(view.state_reason.as_deref(), Some("Container Stopped with Exit Code: 3"));
}

#[tokio::test]
async fn a_terminate_does_not_wait_for_run() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    app.slow.send_replace(true);
    let handle = node.run(with(&[Hook::Run, Hook::Terminate])).await;
    app.hears(1).await;
    handle.terminate().await.unwrap();
    settles(&handle, MicrovmState::Terminated).await;
    assert!(node.engine.running().is_empty());
    assert_eq!(app.heard(), ["run"]);
}

#[tokio::test]
async fn a_crash_before_run_has_answered_launches_once_more_with_the_same_payload() {
    let mut node = Node::start().await;
    let app = App::start(&node).await;
    app.slow.send_replace(true);
    let before = node.run(RunSpec { run_payload: Some(RunPayload("once".to_owned())), ..with(&[Hook::Run]) }).await;
    app.hears(1).await;
    node.crash();
    node.open().await;
    let handle = node.again(&before);
    app.hears(2).await;
    assert_eq!((handle.view().state, node.engine.counts().adoptions), (MicrovmState::Pending, 0), "it is no microVM before it has agreed");
    app.slow.send_replace(false);
    settles(&handle, MicrovmState::Running).await;
    let heard = app.heard.borrow().clone();
    assert_eq!(heard[0], heard[1]);
    assert_eq!(node.engine.counts().launches, 2);

    // Once it has, it is adopted and not told again.
    node.crash();
    node.open().await;
    settles(&node.again(&before), MicrovmState::Running).await;
    assert_eq!((app.heard().len(), node.engine.counts().adoptions), (2, 1));
}

#[tokio::test]
async fn after_a_wake_nothing_moves_before_resume_has_answered() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Resume])).await;
    let mut stream = served(&handle).await.unwrap().dial(echo_port()).await.unwrap();
    sleeps(&handle).await;
    assert!(app.heard().is_empty());
    app.slow.send_replace(true);
    stream.write_all(b"parked").await.unwrap();
    app.hears(1).await;
    let waiting = request(&handle).await;
    assert!(!waiting.is_finished());
    assert_eq!(handle.view().state, MicrovmState::Pending);
    assert!(tokio::time::timeout(Duration::from_millis(100), app.echoed.subscribe().wait_for(|echoed| !echoed.is_empty())).await.is_err());
    app.slow.send_replace(false);
    let awake = waiting.await.unwrap().unwrap();
    assert!(awake.woke().unwrap().phases.iter().any(|(phase, _)| *phase == "hook"));
    stream.read_exact(&mut [0; 6]).await.unwrap();
    assert_eq!(app.heard(), ["resume"]);
}

#[tokio::test]
async fn an_app_that_does_not_agree_to_its_wake_sleeps_on_with_its_streams() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Resume])).await;
    let mut stream = served(&handle).await.unwrap().dial(echo_port()).await.unwrap();
    sleeps(&handle).await;
    for status in [500, 404] {
        app.will_answer(Hook::Resume, status);
        let reason = format!("Resume lifecycle hook returned HTTP status {status}. Please check your hook endpoint and application logs for more details.");
        assert_eq!(served(&handle).await.unwrap_err(), Refused::StartFailed { reason: reason.clone() });
        let view = handle.view();
        assert_eq!((view.state, view.state_reason, view.generation), (MicrovmState::Suspended, Some(reason), Generation(0)));
        assert!(node.engine.running().is_empty());
    }
    // The next one agrees.
    stream.write_all(b"kept").await.unwrap();
    assert_eq!(served(&handle).await.unwrap().generation(), Generation(1));
    stream.read_exact(&mut [0; 4]).await.unwrap();
    assert_eq!(*app.echoed.borrow(), b"kept");
    assert_eq!(handle.view().state_reason, None);
}

#[tokio::test]
async fn an_app_that_does_not_agree_to_sleep_runs_on_or_ends_as_configured() {
    let reason = "Suspend lifecycle hook returned HTTP status 500. Please check your hook endpoint and application logs for more details.";
    let node = Node::start().await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Suspend, Hook::Resume])).await;
    app.will_answer(Hook::Suspend, 500);
    handle.suspend().await.unwrap();
    let view = tokio::time::timeout(REAL_CEILING, handle.wait_until(|view| view.state_reason.is_some())).await.unwrap();
    assert_eq!((view.state, view.state_reason.as_deref()), (MicrovmState::Running, Some(reason)));
    assert!(served(&handle).await.unwrap().woke().is_none());
    sleeps(&handle).await;
    assert_eq!(handle.view().state_reason, None);
    assert_eq!(app.heard(), ["suspend", "suspend"], "one that said no knows that it is awake");

    let node = Node::start_with(|config| config.suspend_hook_failure = SuspendHookFailure::Terminate).await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Suspend])).await;
    app.will_answer(Hook::Suspend, 500);
    handle.suspend().await.unwrap();
    let view = settles(&handle, MicrovmState::Terminated).await;
    assert_eq!(view.state_reason.as_deref(), Some(reason));
}

#[tokio::test]
async fn an_app_that_was_told_to_sleep_and_stays_awake_is_told_that_too() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Suspend, Hook::Resume])).await;
    let mut stream = served(&handle).await.unwrap().dial(echo_port()).await.unwrap();
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    handle.suspend().await.unwrap();
    hold.arrived(1).await;
    assert_eq!(app.heard(), ["suspend"]);
    app.slow.send_replace(true);
    stream.write_all(b"held").await.unwrap();
    let waiting = request(&handle).await;
    app.hears(2).await;
    assert!(!waiting.is_finished() && app.echoed.borrow().is_empty());
    app.slow.send_replace(false);
    assert_eq!(waiting.await.unwrap().unwrap().generation(), Generation(0));
    stream.read_exact(&mut [0; 4]).await.unwrap();
    assert_eq!(app.heard(), ["suspend", "resume"]);
    drop(hold);

    // A request that comes while the app is thinking about it.
    app.slow.send_replace(true);
    handle.suspend().await.unwrap();
    app.hears(3).await;
    let waiting = request(&handle).await;
    app.slow.send_replace(false);
    assert_eq!(waiting.await.unwrap().unwrap().generation(), Generation(0));
    assert_eq!(app.heard(), ["suspend", "resume", "suspend", "resume"]);
    assert_eq!(handle.view().state_reason, None);
}

#[tokio::test]
async fn a_crash_after_suspend_was_called_tells_the_app_that_it_is_awake_before_anything_else_reaches_it() {
    let mut node = Node::start().await;
    let app = App::start(&node).await;
    let before = running(&node, with(&[Hook::Suspend, Hook::Resume])).await;
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    before.suspend().await.unwrap();
    hold.arrived(1).await;
    node.crash();
    drop(hold);
    app.slow.send_replace(true);
    node.open().await;
    let handle = node.again(&before);
    let waiting = request(&handle).await;
    app.hears(2).await;
    assert!(!waiting.is_finished() && handle.view().state == MicrovmState::Suspending);
    // A crash in the middle of that says it again.
    node.crash();
    node.open().await;
    let handle = node.again(&before);
    let waiting = request(&handle).await;
    app.hears(3).await;
    app.slow.send_replace(false);
    assert_eq!(waiting.await.unwrap().unwrap().generation(), Generation(0));
    settles(&handle, MicrovmState::Running).await;
    assert_eq!(app.heard(), ["suspend", "resume", "resume"]);
    // And once it has answered, no more.
    node.crash();
    node.open().await;
    settles(&node.again(&before), MicrovmState::Running).await;
    assert_eq!((app.heard().len(), node.engine.counts().adoptions), (3, 3));

    // One that does not agree runs on, with the reason.
    let before = node.again(&before);
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    before.suspend().await.unwrap();
    hold.arrived(1).await;
    node.crash();
    drop(hold);
    app.will_answer(Hook::Resume, 500);
    node.open().await;
    let reason = settles(&node.again(&before), MicrovmState::Running).await.state_reason.unwrap();
    assert!(reason.contains("500"), "{reason}");
}

#[tokio::test]
async fn an_app_that_is_awake_is_told_of_its_end() {
    let node = Node::start().await;
    let app = App::start(&node).await;
    let handle = running(&node, with(&[Hook::Terminate])).await;
    app.slow.send_replace(true);
    handle.terminate().await.unwrap();
    app.hears(1).await;
    assert_eq!(handle.view().state, MicrovmState::Terminating);
    assert_eq!(served(&handle).await.unwrap_err(), Refused::Terminated);
    app.slow.send_replace(false);
    assert_eq!(settles(&handle, MicrovmState::Terminated).await.state_reason.as_deref(), Some("Success."));
    assert!(node.engine.running().is_empty());

    // A no changes nothing.
    app.will_answer(Hook::Terminate, 500);
    let handle = running(&node, with(&[Hook::Terminate])).await;
    handle.terminate().await.unwrap();
    assert_eq!(settles(&handle, MicrovmState::Terminated).await.state_reason.as_deref(), Some("Success."));
    assert_eq!(app.heard().len(), 2);

    // Nor is one told that sleeps, or that has ended by itself.
    let handle = running(&node, with(&[Hook::Terminate])).await;
    sleeps(&handle).await;
    handle.terminate().await.unwrap();
    settles(&handle, MicrovmState::Terminated).await;
    let handle = running(&node, with(&[Hook::Terminate])).await;
    assert!(node.engine.exit(handle.id(), Exit::App { code: 0 }));
    settles(&handle, MicrovmState::Terminated).await;
    assert_eq!(app.heard().len(), 2);

    // A suspend under way is undone first.
    let handle = running(&node, with(&[Hook::Terminate])).await;
    let hold = node.engine.hold_suspends(SuspendStep::BeforeCommit);
    handle.suspend().await.unwrap();
    hold.arrived(1).await;
    handle.terminate().await.unwrap();
    settles(&handle, MicrovmState::Terminated).await;
    assert_eq!(app.heard().len(), 3);
    drop(hold);
}
