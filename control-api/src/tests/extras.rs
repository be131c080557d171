//! What this node offers beyond AWS.

use std::{fs, time::Duration};

use model::{MicrovmId, MicrovmState};
use serde_json::{Value, json};

use super::bench::{Bench, image_arn};

const MICROVMS: &str = "/2025-09-09/microvms";

async fn running(bench: &Bench, more: Value) -> MicrovmId {
    let mut request = json!({"imageIdentifier": image_arn("hello"), "executionRoleArn": "arn:aws:iam::000000000000:role/run"});
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let run = bench.post(MICROVMS, request).await;
    assert_eq!(run.status, 200, "{run:?}");
    let id: MicrovmId = run.body["microvmId"].as_str().unwrap().parse().unwrap();
    let handle = bench.controller.find(id).unwrap();
    handle.wait_until(|view| view.state == MicrovmState::Running).await;
    id
}

/// What an engine would do.
fn say(bench: &Bench, id: MicrovmId, text: &str) {
    let dir = bench.controller.log_dir(id);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("app.log"), text).unwrap();
}

#[tokio::test]
async fn a_log_is_read_by_those_who_sign_and_stays_after_the_end() {
    let bench = Bench::with_image("hello").await;
    let id = running(&bench, json!({})).await;
    let target = format!("/dormouse/v1/microvms/{id}/logs");
    assert_eq!(bench.get(&target).await.text, "", "it has not said anything yet");
    say(&bench, id, "one\ntwo\nthree\n");
    let got = bench.get(&target).await;
    assert_eq!((got.status.as_u16(), got.text.as_str()), (200, "one\ntwo\nthree\n"));
    assert!(got.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    assert_eq!(bench.get(&format!("{target}?tail=2")).await.text, "two\nthree\n");

    let unsigned = bench.send(bench.request("GET", &target, b"").plain(bench.address)).await;
    assert_eq!(unsigned.status, 403, "{unsigned:?}");
    let mut foreign = bench.request("GET", &target, b"");
    foreign.key.secret = "wrong".to_owned();
    assert_eq!(bench.send(foreign.signed(bench.address)).await.kind(), "InvalidSignatureException");

    let following = bench.request("GET", &format!("{target}?follow=1"), b"").signed(bench.address);
    let (followed, ended) = tokio::join!(bench.send(following), async {
        bench.controller.find(id).unwrap().terminate().await.unwrap();
    });
    let () = ended;
    assert_eq!(followed.text, "one\ntwo\nthree\n", "it ends with the microVM");
    let handle = bench.controller.find(id).unwrap();
    handle.wait_until(|view| view.state == MicrovmState::Terminated).await;
    assert_eq!(bench.get(&target).await.text, "one\ntwo\nthree\n");
    assert!(bench.counted("DormouseLogs", "200") >= 4.0);
}

#[tokio::test]
async fn a_log_is_found_under_the_name_that_was_asked_for() {
    let bench = Bench::with_image("hello").await;
    let plain = running(&bench, json!({})).await;
    let named = running(&bench, json!({"logging": {"cloudWatch": {"logGroup": "/../../etc/cron.d", "logStream": "../../.."}}})).await;
    let silent = running(&bench, json!({"logging": {"disabled": {}}})).await;
    for id in [plain, named] {
        say(&bench, id, &id.to_string());
    }
    let logs = bench.dir.path().join("logs");
    let day = time::OffsetDateTime::now_utc().format(time::macros::format_description!("[year]%2F[month]%2F[day]")).unwrap();
    let under = logs.join(format!("%2Faws%2Flambda-microvms%2Fhello/{day}[1.0]{plain}/{plain}/app.log"));
    assert_eq!(fs::read_to_string(&under).unwrap_or_else(|error| panic!("{}: {error}", under.display())), plain.to_string());
    let under = logs.join(format!("%2F..%2F..%2Fetc%2Fcron.d/%2E.%2F..%2F../{named}/app.log"));
    assert_eq!(fs::read_to_string(&under).unwrap(), named.to_string());
    assert_eq!(fs::read_dir(&logs).unwrap().count(), 2, "the silent one has no name");
    // A build's log leads to where builds have it; this bench has none there.
    let builds = fs::read_dir(logs.join(format!("%2Faws%2Flambda-microvms%2Fhello/{day}[0.0]hello-1.0"))).unwrap();
    assert_eq!(builds.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["hello-1.0.log"]);
    let refused = bench.get(&format!("/dormouse/v1/microvms/{silent}/logs")).await;
    assert_eq!(refused.status, 404);
    assert!(refused.message().contains("logging disabled"), "{refused:?}");
    assert!(bench.dir.path().join(format!("microvms/{silent}/no-output")).is_file());
}

#[tokio::test]
async fn bad_questions_are_refused_with_a_sentence() {
    let bench = Bench::with_image("hello").await;
    let id = running(&bench, json!({})).await;
    for (target, status, part) in [
        (format!("/dormouse/v1/microvms/{id}/logs?follow=yes"), 400, "follow is 0 or 1"),
        (format!("/dormouse/v1/microvms/{id}/logs?tail=0"), 400, "tail is a number"),
        (format!("/dormouse/v1/microvms/{id}/logs?tail=1&tail=2"), 400, "twice"),
        (format!("/dormouse/v1/microvms/{id}/logs?since=1"), 400, "there are: follow, tail"),
        (format!("/dormouse/v1/microvms/{}/logs", MicrovmId::random()), 404, "MicroVM not found"),
        ("/dormouse/v1/microvms/..%2F..%2Fetc/logs".to_owned(), 404, "MicroVM not found"),
        ("/dormouse/v1/images/none/logs".to_owned(), 404, "MicroVMImage not found"),
        ("/dormouse/v1/images/..%2F../logs".to_owned(), 400, ""),
        ("/dormouse/v1/images/hello/logs?version=9.0".to_owned(), 404, "9.0"),
        ("/dormouse/v1/".to_owned(), 404, ""),
        ("/dormouse/v1/microvms/x/y/logs".to_owned(), 404, ""),
    ] {
        let got = bench.get(&target).await;
        assert_eq!(got.status, status, "{target}: {got:?}");
        assert!(got.message().contains(part), "{target}: {got:?}");
    }
    assert_eq!(bench.delete(&format!("/dormouse/v1/microvms/{id}/logs")).await.status, 404, "only GET");
}

/// One that follows for ever does not hold the end of the node up.
#[tokio::test]
async fn a_follower_ends_with_the_listener() {
    let bench = Bench::with_image("hello").await;
    let id = running(&bench, json!({})).await;
    say(&bench, id, "one\n");
    let following = bench.request("GET", &format!("/dormouse/v1/microvms/{id}/logs?follow=1"), b"").signed(bench.address);
    let (followed, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(30), bench.send(following)), async {
        while bench.counted("DormouseLogs", "200") < 1.0 {
            tokio::task::yield_now().await;
        }
        bench.close();
    });
    assert_eq!(followed.expect("the end").text, "one\n");
}

#[tokio::test]
async fn usage_is_read_of_one_and_of_all_and_stays_after_the_end() {
    let bench = Bench::with_image("hello").await;
    let id = running(&bench, json!({})).await;
    let target = format!("/dormouse/v1/microvms/{id}/usage");
    let got = bench.get(&target).await;
    assert_eq!((got.status.as_u16(), &got.body["microvmId"], &got.body["image"], &got.body["state"]), (200, &json!(id), &json!("hello"), &json!("RUNNING")));
    let unsigned = bench.send(bench.request("GET", &target, b"").plain(bench.address)).await;
    assert_eq!(unsigned.status, 403, "{unsigned:?}");

    let handle = bench.controller.find(id).unwrap();
    handle.terminate().await.unwrap();
    handle.wait_until(|view| view.state == MicrovmState::Terminated).await;
    let one = bench.get(&target).await.body;
    let seconds = |body: &Value| body["usage"]["baselineVcpuSeconds"].as_f64().unwrap();
    assert!(seconds(&one) > 0.0 && one["state"] == "TERMINATED", "{one}");
    // A vCPU-second costs a dollar here, and nothing else costs anything.
    let cost = one["cost"]["total"].as_f64().unwrap();
    assert!((cost - seconds(&one) - one["usage"]["burstVcpuSeconds"].as_f64().unwrap()).abs() < 1e-9, "{one}");

    let all = bench.get("/dormouse/v1/usage").await.body;
    assert_eq!(all["microvms"], json!([one]));
    assert_eq!((&all["images"][0]["image"], &all["images"][0]["usage"], &all["total"]["usage"]), (&json!("hello"), &one["usage"], &one["usage"]));
    assert_eq!(all["prices"]["vcpuSecond"], 1.0);
    let refused = bench.get("/dormouse/v1/usage?of=me").await;
    assert!(refused.status == 400 && refused.message().contains("there are: none"), "{refused:?}");
}
