//! Calls that are refused, and in which words.

use std::time::{Duration, SystemTime};

use http::HeaderValue;
use model::MicrovmId;
use serde_json::{Value, json};

use super::bench::{Bench, CODE, connector, image_arn, image_request};

const MICROVMS: &str = "/2025-09-09/microvms";
const IMAGES: &str = "/2025-09-09/microvm-images";

/// cases.md 51.
#[tokio::test]
async fn who_does_not_sign_rightly_is_refused_before_anything_is_looked_at() {
    let bench = Bench::with_image("hello").await;
    let body = br#"{"imageIdentifier":"hello"}"#;
    let call = || bench.request("POST", MICROVMS, body);
    let with = |change: fn(&mut super::bench::Call)| {
        let mut call = call();
        change(&mut call);
        call.signed(bench.address)
    };
    let mut altered = call().signed(bench.address);
    *altered.body_mut() = r#"{"imageIdentifier":"hellO"}"#.into();
    let mut stolen = call().signed(bench.address);
    stolen.headers_mut().insert("host", HeaderValue::from_static("127.0.0.1:1"));
    for (what, request, kind) in [
        ("unsigned", call().plain(bench.address), "MissingAuthenticationTokenException"),
        ("wrong secret", with(|call| call.key.secret.push('x')), "InvalidSignatureException"),
        ("unknown key", with(|call| call.key.id = "AKIAUNKNOWN".to_owned()), "UnrecognizedClientException"),
        ("too old", with(|call| call.at = SystemTime::now() - Duration::from_secs(6 * 60)), "InvalidSignatureException"),
        ("too new", with(|call| call.at = SystemTime::now() + Duration::from_secs(6 * 60)), "InvalidSignatureException"),
        ("wrong region", with(|call| call.region = "eu-west-1"), "InvalidSignatureException"),
        ("wrong service", with(|call| call.service = "ec2"), "InvalidSignatureException"),
        ("other body", altered, "InvalidSignatureException"),
        ("other host", stolen, "InvalidSignatureException"),
    ] {
        let got = bench.send(request).await;
        assert_eq!((got.status.as_u16(), got.kind()), (403, kind), "{what}: {got:?}");
        assert!(!got.message().is_empty() && got.headers.contains_key("x-amzn-requestid"), "{what}");
        assert!(!got.text.contains(&bench.key.secret), "{what}");
    }
    let unsigned = bench.send(bench.request("GET", "/2025-09-09/no/such/thing", b"").plain(bench.address)).await;
    assert_eq!(unsigned.kind(), "MissingAuthenticationTokenException", "who does not sign learns nothing of what there is");
    assert!(bench.controller.list().is_empty());
}

#[tokio::test]
async fn run_is_refused_in_the_words_of_aws() {
    let bench = Bench::with_image("hello").await;
    bench.post(IMAGES, image_request("building", CODE)).await;
    let long = "x".repeat(4_097);
    for (request, status, told) in [
        (json!({}), 400, "1 validation error detected: Value null at 'imageIdentifier' failed to satisfy constraint: Member must not be null".to_owned()),
        (json!({"imageIdentifier": "no such"}), 400, "Malformed ARN - doesn't start with 'arn:'".to_owned()),
        (json!({"imageIdentifier": image_arn("none")}), 404, format!("MicroVMImage not found for MicroVMImageID: {}", image_arn("none"))),
        (json!({"imageIdentifier": "building"}), 404, format!("No active version found for MicroVM image {}", image_arn("building"))),
        (json!({"imageIdentifier": "building", "imageVersion": "1"}), 404, format!("No active version found for MicroVM image {} and version 1.0", image_arn("building"))),
        (json!({"imageIdentifier": "hello", "imageVersion": "7.0"}), 404, format!("MicroVMImage not found for MicroVMImage: {}, Version: 7.0", image_arn("hello"))),
        (json!({"imageIdentifier": "hello", "imageVersion": "new"}), 404, format!("MicroVMImage not found for MicroVMImage: {}, Version: new", image_arn("hello"))),
        (json!({"imageIdentifier": "hello", "runHookPayload": "x"}), 400, "run hook must be enabled".to_owned()),
        (json!({"imageIdentifier": "hello", "runHookPayload": long}), 400, "Member must have length less than or equal to 4096".to_owned()),
        (json!({"imageIdentifier": "hello", "logging": {"cloudWatch": {}}}), 400, "Logging cannot be enabled without providing executionRoleArn".to_owned()),
        (json!({"imageIdentifier": "hello", "ingressNetworkConnectors": ["HTTP_INGRESS"]}), 400, "Malformed network connector ARN".to_owned()),
        (
            json!({"imageIdentifier": "hello", "ingressNetworkConnectors": [connector("HTTP_INGRESS"), connector("NO_INGRESS")]}),
            400,
            "NO_INGRESS cannot be combined with other ingress network connectors".to_owned(),
        ),
        (json!({"imageIdentifier": "hello", "ingressNetworkConnectors": [connector("SOME_INGRESS")]}), 400, "Unrecognized managed network connector ARN".to_owned()),
        (json!({"imageIdentifier": "hello", "ingressNetworkConnectors": [connector("INTERNET_EGRESS")]}), 400, "Unrecognized managed network connector ARN".to_owned()),
        (json!({"imageIdentifier": "hello", "egressNetworkConnectors": [connector("OTHER_EGRESS")]}), 400, "Unrecognized managed network connector ARN".to_owned()),
        (
            json!({"imageIdentifier": "hello", "egressNetworkConnectors": [connector("INTERNET_EGRESS"), connector("INTERNET_EGRESS")]}),
            400,
            "Only one egress network connector can be provided".to_owned(),
        ),
        (
            json!({"imageIdentifier": "hello", "idlePolicy": {"maxIdleDurationSeconds": 59, "suspendedDurationSeconds": 0}}),
            400,
            "2 validation errors detected: Value '59' at 'idlePolicy.maxIdleDurationSeconds'".to_owned(),
        ),
        (json!({"imageIdentifier": "hello", "maximumDurationInSeconds": "60"}), 400, "STRING_VALUE can not be converted to an Integer".to_owned()),
    ] {
        let got = bench.post(MICROVMS, request.clone()).await;
        assert_eq!(got.status, status, "{request}: {got:?}");
        assert!(got.message().contains(&told), "{request}: {}", got.message());
    }
    assert!(bench.controller.list().is_empty());
    let pair = json!([connector("HTTP_INGRESS"), connector("SHELL_INGRESS")]);
    let accepted = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "ingressNetworkConnectors": pair, "egressNetworkConnectors": []})).await;
    assert_eq!((accepted.status.as_u16(), &accepted.body["ingressNetworkConnectors"]), (200, &pair));
}

#[tokio::test]
async fn a_full_node_is_a_quota() {
    let bench = Bench::with_image("hello").await;
    for _ in 0..30 {
        assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.status, 200);
    }
    let full = bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await;
    assert_eq!((full.status.as_u16(), full.kind()), (402, "ServiceQuotaExceededException"));
    assert_eq!(full.body.get("quotaCode"), Some(&Value::Null));
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let bench = Bench::new().await;
    let stranger = MicrovmId::random().to_string();
    for (method, target) in [("GET", String::new()), ("DELETE", String::new()), ("POST", "/suspend".to_owned()), ("POST", "/resume".to_owned())] {
        let got = bench.send(bench.request(method, &format!("{MICROVMS}/{stranger}{target}"), b"{}").signed(bench.address)).await;
        assert_eq!((got.status.as_u16(), got.kind()), (404, "ResourceNotFoundException"));
        assert_eq!(got.body, json!({"message": format!("MicroVM not found: {stranger}"), "resourceId": null, "resourceType": null}));
    }
    for odd in ["mvm-1", "microvm-", "%2e%2e", "%2fetc%2fpasswd", "%00"] {
        assert_eq!(bench.get(&format!("{MICROVMS}/{odd}")).await.kind(), "ResourceNotFoundException", "{odd}");
    }
    let arn = image_arn("none");
    for target in [arn.clone(), arn.replace(':', "%3A"), format!("{arn}/versions"), format!("{arn}/versions/1.0"), format!("{arn}/versions/1.0/builds")] {
        assert_eq!(bench.get(&format!("{IMAGES}/{target}")).await.status, 404, "{target}");
    }
    for (target, kind) in [
        (arn.replace(":none", "%2Fnone"), "AccessDeniedException"),
        (arn.replace(':', "%253A"), "ValidationException"),
        (arn.replace("us-east-1", "us-west-2"), "AccessDeniedException"),
        ("a b".replace(' ', "%20"), "ValidationException"),
    ] {
        let got = bench.get(&format!("{IMAGES}/{target}")).await;
        assert_eq!(got.kind(), kind, "{target}: {got:?}");
    }
    for (method, target) in [("GET", "/2025-09-09/nothing"), ("PUT", MICROVMS), ("GET", "/2025-09-09/microvms/a/b/c"), ("GET", "/")] {
        let got = bench.send(bench.request(method, target, b"").signed(bench.address)).await;
        assert_eq!((got.status.as_u16(), got.kind()), (404, "UnknownOperationException"), "{method} {target}");
    }
}

#[tokio::test]
async fn token_requests_are_refused_in_the_words_of_aws() {
    let bench = Bench::with_image("hello").await;
    let microvm = bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body["microvmId"].as_str().unwrap().to_owned();
    let target = format!("{MICROVMS}/{microvm}/auth-token");
    let port = json!([{"port": 8080}]);
    for (request, kind, told) in [
        (json!({"expirationInMinutes": 61, "allowedPorts": port}), "ValidationException", "ExpirationMinutes 61 exceeded max allowed of 60."),
        (json!({"expirationInMinutes": 0, "allowedPorts": port}), "ValidationException", "Value '0' at 'expirationInMinutes' failed to satisfy constraint: Member must have value greater than or equal to 1"),
        (json!({"expirationInMinutes": -1, "allowedPorts": port}), "ValidationException", "'-1'"),
        (json!({}), "ValidationException", "2 validation errors detected"),
        (json!({"expirationInMinutes": 5, "allowedPorts": []}), "ValidationException", "Member must have length greater than or equal to 1"),
        (json!({"expirationInMinutes": 5, "allowedPorts": [{}]}), "ValidationException", "exactly one member"),
        (json!({"expirationInMinutes": 5, "allowedPorts": [{"port": 1, "allPorts": {}}]}), "ValidationException", "exactly one member"),
        (json!({"expirationInMinutes": 5, "allowedPorts": [{"range": {"startPort": 2, "endPort": 1}}]}), "ValidationException", "startPort"),
        (json!({"expirationInMinutes": 5, "allowedPorts": [{"allPorts": true}]}), "SerializationException", "Expected null"),
        (json!({"expirationInMinutes": 5.5, "allowedPorts": port}), "SerializationException", "DECIMAL_VALUE"),
    ] {
        let got = bench.post(&target, request.clone()).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, kind), "{request}: {got:?}");
        assert!(got.message().contains(told), "{request}: {}", got.message());
    }
    let shell = bench.post(&format!("{MICROVMS}/{microvm}/shell-auth-token"), json!({"expirationInMinutes": 5})).await;
    assert_eq!((shell.status.as_u16(), shell.kind()), (400, "ValidationException"));
    assert_eq!(shell.message(), "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.");
    for (minutes, told) in [(json!(61), "ExpirationMinutes 61 exceeded max allowed of 60."), (json!(0), "greater than or equal to 1"), (Value::Null, "expirationInMinutes")] {
        let got = bench.post(&format!("{MICROVMS}/{microvm}/shell-auth-token"), json!({"expirationInMinutes": minutes})).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, "ValidationException"), "{minutes}");
        assert!(got.message().contains(told), "{minutes}: {}", got.message());
    }
    let connectors = json!([connector("ALL_INGRESS"), connector("SHELL_INGRESS")]);
    let both = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "ingressNetworkConnectors": connectors})).await.body;
    let both = bench.post(&format!("{MICROVMS}/{}/shell-auth-token", both["microvmId"].as_str().unwrap()), json!({"expirationInMinutes": 5})).await;
    assert_eq!(
        (both.status.as_u16(), both.message()),
        (400, "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead")
    );
    let nobody = bench.post(&format!("{MICROVMS}/{}/shell-auth-token", model::MicrovmId::random()), json!({"expirationInMinutes": 5})).await;
    assert_eq!((nobody.status.as_u16(), nobody.kind()), (404, "ResourceNotFoundException"));
}

#[tokio::test]
async fn bodies_cursors_and_queries_of_a_wrong_form_are_refused() {
    let bench = Bench::new().await;
    for body in ["[]", "{", "nonsense", "\"x\""] {
        let got = bench.send(bench.request("POST", MICROVMS, body.as_bytes()).signed(bench.address)).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, "SerializationException"), "{body}");
    }
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let got = bench.send(bench.request("POST", MICROVMS, deep.as_bytes()).signed(bench.address)).await;
    assert_eq!(got.kind(), "SerializationException");
    let got = bench.send(bench.request("POST", MICROVMS, &vec![b' '; 1024 * 1024 + 1]).signed(bench.address)).await;
    assert_eq!((got.status.as_u16(), got.kind()), (413, "RequestTooLargeException"));
    for (query, kind, message) in [
        ("nextToken=x", "ValidationException", Value::Null),
        ("nextToken=e30%3D", "ValidationException", Value::Null),
    ] {
        let got = bench.get(&format!("{MICROVMS}?{query}")).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, kind), "{query}");
        assert_eq!(got.body, json!({"message": message}));
    }
    for (query, kind) in [("maxResults=0", "ValidationException"), ("maxResults=51", "ValidationException"), ("maxResults=x", "SerializationException")] {
        assert_eq!(bench.get(&format!("{MICROVMS}?{query}")).await.kind(), kind, "{query}");
    }
    assert_eq!(bench.get(&format!("{MICROVMS}?maxResults=50&unknown=1")).await.status, 200);
}

#[tokio::test]
async fn a_request_that_never_ends_is_ended() {
    let bench = Bench::with(|config| config.request_timeout = Duration::from_millis(300)).await;
    let mut request = bench.request("POST", MICROVMS, b"{}").signed(bench.address);
    *request.body_mut() = axum::body::Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>());
    let got = tokio::time::timeout(Duration::from_secs(10), bench.send(request)).await.unwrap();
    assert_eq!((got.status.as_u16(), got.kind()), (400, "ValidationException"));
}
