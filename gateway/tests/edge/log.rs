//! The access log, as it is written: one event per request, with what an operator asks for and nothing that opens a door.

use std::{
    io,
    sync::{Arc, LazyLock, Mutex},
};

use model::PortScope;

use crate::{
    app::App,
    rig::{Rig, get, until},
};

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    fn lines(&self) -> Vec<serde_json::Value> {
        let bytes = self.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

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

fn entry(request_id: &str) -> Option<serde_json::Value> {
    let mut entries = LOG.lines().into_iter().filter(|line| line["target"] == "access" && line["request.id"] == request_id);
    let entry = entries.next();
    assert!(entries.next().is_none(), "two entries for one request");
    entry
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
        let id = answer.header("x-amzn-requestid").unwrap();
        until("the entry to be written", || entry(id).is_some()).await;
        let entry = entry(id).unwrap();
        assert_eq!((entry["status"].as_u64(), entry["reason"].as_str()), (Some(status), reason), "{entry}");
        assert_eq!((entry["method"].as_str(), entry["protocol"].as_str()), (Some("GET"), Some("h1")), "{entry}");
        assert!(entry["client.address"].as_str().unwrap().starts_with("127.0.0.1:"), "{entry}");
        assert!(entry["duration_ms"].as_f64().unwrap() > 0.0, "{entry}");
        assert_eq!(entry["wake_ms"].as_f64().is_some(), woke, "{entry}");
        let known = (reason.is_none()).then(|| vm.handle.id().to_string());
        assert_eq!(entry["microvm.id"].as_str(), known.as_deref(), "{entry}");
    }
    // Nothing of ours ever wrote the token, in whatever part or at whatever level.
    let log = String::from_utf8(LOG.0.lock().unwrap().clone()).unwrap();
    for secret in [token.as_str(), token.rsplit('.').nth(1).unwrap(), "garbage-but-secret", "/path?"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
