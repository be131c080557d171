//! Calls that work.

use std::time::{Duration, SystemTime};

use model::{MicrovmId, MicrovmState, Port};
use serde_json::{Value, json};
use vmm_runtime::engine::EngineError;

use super::bench::{Bench, CODE, connector, image_arn, image_request};

const MICROVMS: &str = "/2025-09-09/microvms";
const IMAGES: &str = "/2025-09-09/microvm-images";

fn id(body: &Value) -> String {
    body["microvmId"].as_str().unwrap().to_owned()
}

async fn settled(bench: &Bench, id: &str, state: MicrovmState) {
    let handle = bench.controller.find(id.parse::<MicrovmId>().unwrap()).unwrap();
    let waited = tokio::time::timeout(Duration::from_secs(10), handle.wait_until(|view| view.state == state)).await;
    assert_eq!(waited.map(|view| view.state), Ok(state));
}

#[tokio::test]
async fn a_microvm_is_run_suspended_resumed_and_terminated() {
    let bench = Bench::with_image("hello").await;
    let idle = json!({"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 3600, "autoResumeEnabled": true});
    let role = "arn:aws:iam::000000000000:role/run";
    let run = bench
        .post(MICROVMS, json!({"imageIdentifier": image_arn("hello"), "idlePolicy": idle, "executionRoleArn": role, "logging": {"cloudWatch": {}}}))
        .await;
    assert_eq!(run.status, 200, "{run:?}");
    assert_eq!(run.headers["content-type"], "application/json");
    assert!(run.headers.contains_key("x-amzn-requestid"));
    let body = &run.body;
    let microvm = id(body);
    assert_eq!(body["state"], "PENDING");
    assert_eq!(body["imageArn"], image_arn("hello"));
    assert_eq!(body["imageVersion"], "1.0");
    assert_eq!(body["maximumDurationInSeconds"], 28_800);
    assert_eq!(body["idlePolicy"], idle);
    assert_eq!(body["executionRoleArn"], role);
    assert_eq!(body["ingressNetworkConnectors"], json!([connector("HTTP_INGRESS")]));
    assert_eq!(body["egressNetworkConnectors"], json!([connector("INTERNET_EGRESS")]));
    for absent in ["terminatedAt", "stateReason", "terminationReasonCode", "kmsKeyIdentifier"] {
        assert_eq!(body.get(absent), Some(&Value::Null), "{absent}");
    }
    let endpoint = body["endpoint"].as_str().unwrap();
    let (label, suffix) = endpoint.split_once('.').unwrap();
    assert_eq!(suffix, "microvm.localhost:8443");
    assert!(!microvm.contains(label), "the endpoint's id is not the microVM's");
    let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64() - body["startedAt"].as_f64().unwrap();
    assert!((0.0..10.0).contains(&age), "{age}");

    let target = format!("{MICROVMS}/{microvm}");
    settled(&bench, &microvm, MicrovmState::Running).await;
    let got = bench.get(&target).await;
    assert_eq!((got.body["state"].as_str(), &got.body["endpoint"]), (Some("RUNNING"), &body["endpoint"]));
    for _ in 0..2 {
        let suspended = bench.post(&format!("{target}/suspend"), json!({})).await;
        assert_eq!((suspended.status.as_u16(), suspended.body), (200, json!({})));
        settled(&bench, &microvm, MicrovmState::Suspended).await;
    }
    assert_eq!(bench.get(&target).await.body["state"], "SUSPENDED");
    for _ in 0..2 {
        let resumed = bench.post(&format!("{target}/resume"), json!({})).await;
        assert_eq!((resumed.status.as_u16(), resumed.body), (200, json!({})));
        settled(&bench, &microvm, MicrovmState::Running).await;
    }
    for _ in 0..2 {
        let terminated = bench.delete(&target).await;
        assert_eq!((terminated.status.as_u16(), terminated.body), (200, json!({})));
        settled(&bench, &microvm, MicrovmState::Terminated).await;
    }
    let got = bench.get(&target).await;
    assert_eq!(got.body["state"], "TERMINATED");
    assert!(got.body["terminatedAt"].is_f64());
    for change in ["suspend", "resume"] {
        let refused = bench.post(&format!("{target}/{change}"), json!({})).await;
        assert_eq!((refused.status.as_u16(), refused.kind()), (400, "ValidationException"));
        assert_eq!(refused.message(), format!("The MicroVM {microvm} has been terminated and its state cannot be changed."));
    }
    assert_eq!(bench.counted("SuspendMicrovm", "200"), 2.0);
    assert_eq!(bench.counted("SuspendMicrovm", "400"), 1.0);
}

#[tokio::test]
async fn a_failed_wake_is_our_fault_and_leaves_it_suspended() {
    let bench = Bench::with_image("hello").await;
    let microvm = id(&bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body);
    let target = format!("{MICROVMS}/{microvm}");
    settled(&bench, &microvm, MicrovmState::Running).await;
    bench.post(&format!("{target}/suspend"), json!({})).await;
    settled(&bench, &microvm, MicrovmState::Suspended).await;
    bench.engine.fail_next_restore(EngineError::Host { what: "no memory left".to_owned() });
    let refused = bench.post(&format!("{target}/resume"), json!({})).await;
    if refused.status == 200 {
        // The controller may accept a resume before it knows how it ends; then the state tells.
        settled(&bench, &microvm, MicrovmState::Suspended).await;
    } else {
        assert_eq!((refused.status.as_u16(), refused.kind()), (500, "InternalServerException"));
    }
    assert_eq!(bench.post(&format!("{target}/resume"), json!({})).await.status, 200);
    settled(&bench, &microvm, MicrovmState::Running).await;
}

#[tokio::test]
async fn microvms_are_listed_newest_first_in_pages_and_by_image() {
    let bench = Bench::with_image("hello").await;
    bench.post("/2025-09-09/microvm-images", image_request("other", CODE)).await;
    bench.images.end("other", None).await;
    let mut ids = Vec::new();
    for image in ["hello", "hello", "other", "hello", "hello"] {
        ids.push(id(&bench.post(MICROVMS, json!({"imageIdentifier": image})).await.body));
    }
    ids.reverse();
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let cursor = if token.is_empty() { String::new() } else { format!("&nextToken={}", token.replace('=', "%3D")) };
        let page = bench.get(&format!("{MICROVMS}?maxResults=2{cursor}")).await;
        assert_eq!(page.status, 200, "{page:?}");
        for item in page.body["items"].as_array().unwrap() {
            let mut members: Vec<_> = item.as_object().unwrap().keys().map(String::as_str).collect();
            members.sort_unstable();
            assert_eq!(members, ["imageArn", "imageVersion", "microvmId", "startedAt", "state"]);
            seen.push(id(item));
        }
        match page.body["nextToken"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen, ids);
    let arn = image_arn("other");
    for filter in [arn.clone(), arn.replace(':', "%3A"), "other".to_owned()] {
        let of_other = bench.get(&format!("{MICROVMS}?imageIdentifier={filter}&imageVersion=1.0")).await;
        assert_eq!(of_other.body["items"].as_array().unwrap().len(), 1, "{filter}");
    }
    assert_eq!(bench.get(&format!("{MICROVMS}?imageVersion=2.0")).await.body, json!({"items": [], "nextToken": null}));
}

#[tokio::test]
async fn a_client_token_makes_one_microvm_of_many_calls() {
    let bench = Bench::with_image("hello").await;
    let request = json!({"imageIdentifier": "hello", "clientToken": "t-1"});
    let calls = (0..10).map(|_| bench.post(MICROVMS, request.clone()));
    let answers = futures::future::join_all(calls).await;
    let first = &answers[0].body;
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body == *first), "{answers:?}");
    assert_eq!(bench.controller.list().len(), 1);
    settled(&bench, &id(first), MicrovmState::Running).await;
    bench.delete(&format!("{MICROVMS}/{}", id(first))).await;
    assert_eq!(bench.post(MICROVMS, request).await.body, *first, "the original answer, also after its end");
    let conflict = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "clientToken": "t-1", "maximumDurationInSeconds": 60})).await;
    assert_eq!((conflict.status.as_u16(), conflict.kind()), (409, "ConflictException"));
    assert_eq!(bench.controller.list().len(), 1);
}

#[tokio::test]
async fn a_shell_token_is_one_header_and_opens_no_port() {
    let bench = Bench::with_image("hello").await;
    let ingress = json!([connector("HTTP_INGRESS"), connector("SHELL_INGRESS")]);
    let microvm = id(&bench.post(MICROVMS, json!({"imageIdentifier": "hello", "ingressNetworkConnectors": ingress})).await.body);
    let got = bench.post(&format!("{MICROVMS}/{microvm}/shell-auth-token"), json!({"expirationInMinutes": 5})).await;
    assert_eq!(got.status, 200, "{got:?}");
    let parts = got.body["authToken"].as_object().unwrap();
    assert_eq!((got.body.as_object().unwrap().len(), parts.len()), (1, 1));
    let claims = bench.tokens.open(parts["X-aws-proxy-auth"].as_str().unwrap(), SystemTime::now()).unwrap();
    assert_eq!((claims.microvm.to_string(), claims.shell), (microvm, true));
    assert_eq!(claims.expires_at.duration_since(claims.issued_at).unwrap(), Duration::from_secs(300));
    assert!((1..=u16::MAX).all(|port| !claims.ports.allows(Port::new(port).unwrap())));
}

#[tokio::test]
async fn tokens_open_what_they_were_asked_for() {
    let bench = Bench::with_image("hello").await;
    // While PENDING as well: the launch is held.
    let hold = bench.engine.hold_launches();
    let microvm = id(&bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body);
    let target = format!("{MICROVMS}/{microvm}/auth-token");
    let request = |ports: Value| json!({"expirationInMinutes": 60, "allowedPorts": ports});
    for (ports, open, closed) in [
        (json!([{"port": 8080}]), vec![8080], vec![8079, 8081]),
        (json!([{"range": {"startPort": 3000, "endPort": 3005}}, {"port": 80}]), vec![80, 3000, 3005], vec![2999, 3006]),
        (json!([{"allPorts": {}}]), vec![1, 65_535], vec![]),
    ] {
        let got = bench.post(&target, request(ports.clone())).await;
        assert_eq!(got.status, 200, "{got:?}");
        let parts = got.body["authToken"].as_object().unwrap();
        assert_eq!((got.body.as_object().unwrap().len(), parts.len()), (1, 1));
        let now = SystemTime::now();
        let claims = bench.tokens.open(parts["X-aws-proxy-auth"].as_str().unwrap(), now).unwrap();
        assert_eq!((claims.microvm.to_string(), claims.shell), (microvm.clone(), false));
        assert_eq!(claims.expires_at.duration_since(claims.issued_at).unwrap(), Duration::from_secs(3_600));
        let allows = |port: &u16| claims.ports.allows(Port::new(*port).unwrap());
        assert!(open.iter().all(allows) && !closed.iter().any(allows), "{ports}");
    }
    drop(hold);
    settled(&bench, &microvm, MicrovmState::Running).await;
    bench.post(&format!("{MICROVMS}/{microvm}/suspend"), json!({})).await;
    settled(&bench, &microvm, MicrovmState::Suspended).await;
    assert_eq!(bench.post(&target, request(json!([{"port": 1}]))).await.status, 200, "while suspended");
    bench.delete(&format!("{MICROVMS}/{microvm}")).await;
    settled(&bench, &microvm, MicrovmState::Terminated).await;
    let ended = bench.post(&target, request(json!([{"port": 1}]))).await;
    assert_eq!((ended.status.as_u16(), ended.kind()), (400, "ValidationException"));
}

#[tokio::test]
async fn the_managed_image_is_listed_with_its_versions() {
    let bench = Bench::new().await;
    let arn = "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1";
    let images = bench.get("/2025-09-09/managed-microvm-images").await;
    assert_eq!(images.body["items"][0]["imageArn"], arn);
    for identifier in [arn.to_owned(), arn.replace(':', "%3A"), "al2023-1".to_owned()] {
        let versions = bench.get(&format!("/2025-09-09/managed-microvm-images/{identifier}/versions")).await;
        let numbers: Vec<_> = versions.body["items"].as_array().unwrap().iter().map(|item| item["imageVersion"].as_str().unwrap()).collect();
        assert_eq!(numbers, ["1", "0"]);
    }
    assert_eq!(bench.get("/2025-09-09/managed-microvm-images/al2022/versions").await.status, 404);
}

#[tokio::test]
async fn a_filter_works_on_the_page_and_a_cursor_goes_on_with_its_own_list_only() {
    let bench = Bench::new().await;
    for name in ["a-1", "a-2", "b-1", "b-2"] {
        bench.post(IMAGES, image_request(name, CODE)).await;
    }
    let names = |body: &Value| body["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let first = bench.get(&format!("{IMAGES}?maxResults=2&nameFilter=b")).await.body;
    assert_eq!(names(&first), Vec::<String>::new(), "the first page holds a-1 and a-2");
    let cursor = first["nextToken"].as_str().unwrap().replace('=', "%3D");
    let second = bench.get(&format!("{IMAGES}?maxResults=2&nameFilter=b&nextToken={cursor}")).await.body;
    assert_eq!((names(&second), &second["nextToken"]), (vec!["b-1".to_owned(), "b-2".to_owned()], &Value::Null));
    for other in [format!("{IMAGES}?nextToken={cursor}"), format!("{IMAGES}?nameFilter=a&nextToken={cursor}"), format!("{MICROVMS}?nextToken={cursor}")] {
        let refused = bench.get(&other).await;
        assert_eq!((refused.status.as_u16(), refused.kind(), &refused.body), (400, "ValidationException", &json!({"message": null})), "{other}");
    }
}

#[tokio::test]
async fn connectors_are_checked_echoed_and_decide_about_tokens() {
    let bench = Bench::with_image("hello").await;
    for (ingress, opens) in [
        (vec![], true),
        (vec!["HTTP_INGRESS"], true),
        (vec!["ALL_INGRESS"], true),
        (vec!["ALL_INGRESS", "SHELL_INGRESS"], true),
        (vec!["HTTP_INGRESS", "SHELL_INGRESS"], true),
        (vec!["SHELL_INGRESS"], false),
        (vec!["NO_INGRESS"], false),
    ] {
        let asked: Vec<String> = ingress.iter().map(|name| connector(name)).collect();
        let run = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "ingressNetworkConnectors": asked})).await;
        assert_eq!(run.status, 200, "{ingress:?}: {run:?}");
        let shown = if asked.is_empty() { vec![connector("HTTP_INGRESS")] } else { asked };
        assert_eq!(run.body["ingressNetworkConnectors"], json!(shown));
        assert!(run.body["endpoint"].is_string(), "every microVM has a hostname");
        let minted = bench.post(&format!("{MICROVMS}/{}/auth-token", id(&run.body)), json!({"expirationInMinutes": 5, "allowedPorts": [{"allPorts": {}}]})).await;
        if opens {
            assert_eq!(minted.status, 200, "{ingress:?}");
        } else {
            assert_eq!((minted.status.as_u16(), minted.kind()), (400, "ValidationException"), "{ingress:?}");
            assert!(minted.message().contains("requires HTTP_INGRESS"), "{}", minted.message());
        }
    }
}

#[tokio::test]
async fn a_key_is_shown_again_and_nothing_else_is_done_with_it() {
    let bench = Bench::with_image("hello").await;
    let run = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "kmsKeyIdentifier": "alias/mine"})).await;
    assert_eq!((run.status.as_u16(), &run.body["kmsKeyIdentifier"]), (200, &json!("alias/mine")));
}

#[tokio::test]
async fn egress_is_the_images_unless_the_call_names_its_own() {
    let bench = Bench::new().await;
    let mut request = image_request("closed", CODE);
    request["egressNetworkConnectors"] = json!([connector("NO_EGRESS")]);
    assert_eq!(bench.post(IMAGES, request).await.body["egressNetworkConnectors"], json!([connector("NO_EGRESS")]));
    bench.images.end("closed", None).await;
    for (asked, echoed) in [(Value::Null, "NO_EGRESS"), (json!([]), "NO_EGRESS"), (json!([connector("INTERNET_EGRESS")]), "INTERNET_EGRESS")] {
        let run = bench.post(MICROVMS, json!({"imageIdentifier": "closed", "egressNetworkConnectors": asked})).await;
        assert_eq!((run.status.as_u16(), &run.body["egressNetworkConnectors"]), (200, &json!([connector(echoed)])), "{run:?}");
    }
}
