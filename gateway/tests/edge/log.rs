//! The access log, as it is written: one line per request, with what an operator asks for and nothing that opens a door;
//! and the metrics beside it.

use std::{
    io,
    sync::{Arc, LazyLock, Mutex},
};

use model::PortScope;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use vmm_runtime::engine::EngineError;

use crate::{
    app::{App, canned},
    rig::{Rig, full, get, h2_request, until, within},
};

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that any test of this binary logs, from the first use on.
static LOG: LazyLock<Written> = LazyLock::new(|| {
    let written = Written::default();
    let writer = written.clone();
    let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    tracing::subscriber::set_global_default(subscriber).expect("only this file sets one");
    written
});

/// The entry of one request, when it is written.
async fn entry(rig: &Rig, request_id: &str) -> Value {
    let all = || rig.log().into_iter().filter(|line| line["request_id"] == request_id).collect::<Vec<_>>();
    until("the entry to be written", || !all().is_empty()).await;
    let mut entries = all();
    assert_eq!(entries.len(), 1, "two entries for one request");
    entries.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_entry_per_request_without_its_secrets() {
    LazyLock::force(&LOG);
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let mut h1 = rig.h1().await;
    let path = format!("/path?token={token}");
    for (auth, status, reason, woke) in
        [(token.as_str(), 200, None, true), (&token, 200, None, false), ("garbage-but-secret", 403, Some("token-unreadable"), false)]
    {
        let answer = h1.send(get(&vm.host, &path, &[("x-aws-proxy-auth", auth)])).await;
        let entry = entry(&rig, answer.header("x-amzn-requestid").unwrap()).await;
        assert_eq!((entry["status"].as_u64(), entry["reason"].as_str()), (Some(status), reason), "{entry}");
        assert_eq!((entry["method"].as_str(), entry["protocol"].as_str()), (Some("GET"), Some("h1")), "{entry}");
        assert!(entry["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{entry}");
        assert!(entry["time"].as_str().unwrap().ends_with('Z'), "{entry}");
        assert!(entry["duration_ms"].as_f64().unwrap() > 0.0, "{entry}");
        assert_eq!(entry["wake_ms"].as_f64().is_some(), woke, "{entry}");
        let steps: Vec<_> = entry["wake_phases_ms"].as_object().map(|steps| steps.keys().cloned().collect()).unwrap_or_default();
        assert_eq!(steps.contains(&"queue".to_owned()) && steps.contains(&"record".to_owned()), woke, "{entry}");
        let known = (reason.is_none()).then(|| vm.handle.id().to_string());
        assert_eq!(entry["microvm"].as_str(), known.as_deref(), "{entry}");
    }
    // Nothing of ours ever wrote the token, in whatever part or at whatever level.
    let log = String::from_utf8(LOG.0.lock().unwrap().clone()).unwrap() + &std::fs::read_to_string(&rig.access_log).unwrap();
    for secret in [token.as_str(), token.rsplit('.').nth(1).unwrap(), "garbage-but-secret", "/path?"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_says_is_in_no_log() {
    LazyLock::force(&LOG);
    let rig = Rig::new().await;
    let vm = rig.microvm(canned("HTTP/1.1 200 OK\r\nx: tenant-secret\r\nb ad: tenant-secret\r\n\r\ntenant-secret").await).await;
    let token = rig.token(&vm, PortScope::All);
    let answer = rig.h1().await.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((answer.status, answer.reason()), (502, "guest-answer-broken"));
    let entry = entry(&rig, answer.header("x-amzn-requestid").unwrap()).await;
    assert_eq!(entry["reason"], "guest-answer-broken");
    assert!(!String::from_utf8_lossy(&LOG.0.lock().unwrap()).contains("tenant-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_in_vain_is_said_with_its_steps_and_counted() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let failure = io::Error::other("no space left on device");
    rig.engine.fail_next_restore(EngineError::Failed { doing: "reading memory".to_owned(), source: Box::new(failure) });
    let mut h1 = rig.h1().await;
    let refused = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((refused.status, refused.reason()), (502, "wake-failed"));
    let refused = entry(&rig, refused.header("x-amzn-requestid").unwrap()).await;
    assert!(refused["wake_ms"].as_f64().unwrap() > 0.0, "{refused}");
    for step in ["queue", "failed"] {
        assert!(refused["wake_phases_ms"][step].is_number(), "{refused}");
    }
    assert_eq!(h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await.status, 200);
    for outcome in ["awake", "refused"] {
        assert_eq!(rig.observations("edge_hold_seconds", &[("outcome", outcome)]), 1, "{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_became_a_request_is_said_too() {
    let rig = Rig::new().await;
    let mut tls = rig.tls(&["http/1.1"]).await;
    tls.write_all(b"\x01\x02\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = within("the answer", tls.read_to_string(&mut answer)).await;
    let id = answer.split("x-amzn-requestid: ").nth(1).unwrap().split("\r\n").next().unwrap();
    let entry = entry(&rig, id).await;
    assert_eq!((entry["status"].as_u64(), entry["reason"].as_str()), (Some(400), Some("malformed-request")), "{entry}");
    assert!(entry["client"].as_str().unwrap().starts_with("127.0.0.1:") && entry["method"].is_null(), "{entry}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_rotated_is_opened_again() {
    let rig = Rig::new().await;
    let mut h1 = rig.h1().await;
    let first = h1.send(get("x", "/", &[])).await;
    entry(&rig, first.header("x-amzn-requestid").unwrap()).await;
    let old = rig.access_log.with_extension("1");
    std::fs::rename(&rig.access_log, &old).unwrap();
    let second = h1.send(get("x", "/", &[])).await;
    until("the new file to be there", || rig.access_log.exists()).await;
    entry(&rig, second.header("x-amzn-requestid").unwrap()).await;
    assert_eq!(std::fs::read_to_string(&old).unwrap().lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_not_among_the_times_of_requests() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let mut h2 = rig.h2().await;
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &auth, full(""))).await.status, 200);
    app.go.notify_one();
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/events", &auth, full(""))).await.status, 200);
    let grpc = [auth[0], ("content-type", "application/grpc")];
    assert_eq!(h2.send(h2_request("POST", &vm.host, "/duplex", &grpc, full("x"))).await.status, 200);
    until("all of them to be noted", || {
        let streams = ["events", "grpc"].map(|kind| rig.observations("edge_stream_seconds", &[("kind", kind)]));
        (rig.observations("edge_request_seconds", &[]), streams) == (1, [1, 1])
    })
    .await;
}
