//! Tags of images.

use serde_json::{Value, json};

use super::bench::{Bench, CODE, Got, image_arn, image_request};

const IMAGES: &str = "/2025-09-09/microvm-images";

async fn call(bench: &Bench, method: &str, target: &str, body: Value) -> Got {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    bench.send(bench.request(method, &format!("/2017-03-31/tags/{target}"), body.as_bytes()).signed(bench.address)).await
}

async fn tagged(bench: &Bench) -> String {
    let mut request = image_request("hello", CODE);
    request["tags"] = json!({"team": "a", "ä b": ""});
    assert_eq!(bench.post(IMAGES, request).await.body["tags"], json!({"team": "a", "ä b": ""}));
    image_arn("hello")
}

#[tokio::test]
async fn tags_are_added_replaced_listed_and_taken_away() {
    let bench = Bench::new().await;
    let arn = tagged(&bench).await;
    for target in [arn.clone(), arn.replace(':', "%3A")] {
        let got = call(&bench, "GET", &target, Value::Null).await;
        assert_eq!((got.status.as_u16(), got.body), (200, json!({"Tags": {"team": "a", "ä b": ""}})), "{target}");
    }
    for _ in 0..2 {
        let got = call(&bench, "POST", &arn, json!({"Tags": {"team": "b", "cost": "9.5/month"}})).await;
        assert_eq!((got.status.as_u16(), got.text.as_str(), got.headers.get("content-type")), (204, "", None));
        assert_eq!(call(&bench, "GET", &arn, Value::Null).await.body["Tags"], json!({"cost": "9.5/month", "team": "b", "ä b": ""}));
    }
    assert_eq!(bench.get(&format!("{IMAGES}/{arn}")).await.body["tags"], json!({"cost": "9.5/month", "team": "b", "ä b": ""}));
    for _ in 0..2 {
        let got = call(&bench, "DELETE", &format!("{arn}?tagKeys=cost&tagKeys=%C3%A4%20b&tagKeys=none"), Value::Null).await;
        assert_eq!((got.status.as_u16(), got.text.as_str()), (204, ""));
    }
    assert_eq!(call(&bench, "GET", &arn, Value::Null).await.body["Tags"], json!({"team": "b"}));
    assert_eq!(call(&bench, "DELETE", &format!("{arn}?tagKeys=team"), Value::Null).await.status, 204);
    assert_eq!(call(&bench, "GET", &arn, Value::Null).await.body, json!({"Tags": {}}));
    assert_eq!(bench.get(&format!("{IMAGES}/{arn}")).await.body["tags"], json!({}));
}

#[tokio::test]
async fn tags_that_may_not_be_are_refused_and_change_nothing() {
    let bench = Bench::new().await;
    let arn = tagged(&bench).await;
    let before = call(&bench, "GET", &arn, Value::Null).await.body;
    let many: Value = (0..49).map(|n| (format!("k{n}"), json!(""))).collect();
    for (body, kind, told) in [
        (json!({}), "ValidationException", "Value null at 'Tags' failed to satisfy constraint: Member must not be null"),
        (json!({"Tags": {"": "x"}}), "ValidationException", "Member must have length greater than or equal to 1"),
        (json!({"Tags": {"k".repeat(129): "x"}}), "ValidationException", "Member must have length less than or equal to 128"),
        (json!({"Tags": {"k": "v".repeat(257)}}), "ValidationException", "Member must have length less than or equal to 256"),
        (json!({"Tags": {"k": "a<b"}}), "ValidationException", "regular expression pattern"),
        (json!({"Tags": {"k": 1}}), "SerializationException", "NUMBER_VALUE"),
        (json!({"Tags": ["k"]}), "SerializationException", "Expected map"),
        (json!({"Tags": {"aws:k": "x"}}), "InvalidParameterValueException", "reserved"),
        (json!({"Tags": {"AWS:k": "x", "ok": "x"}}), "InvalidParameterValueException", "reserved"),
        (json!({"Tags": many}), "InvalidParameterValueException", "would have 51 tags"),
    ] {
        let got = call(&bench, "POST", &arn, body.clone()).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, kind), "{body}: {got:?}");
        assert!(got.message().contains(told), "{body}: {}", got.message());
        assert_eq!(got.body.get("Type").is_some(), kind == "InvalidParameterValueException", "{got:?}");
    }
    for (query, kind) in [("", "ValidationException"), ("?tagKeys=", "ValidationException"), ("?tagKeys=aws%3Ax", "InvalidParameterValueException")] {
        let got = call(&bench, "DELETE", &format!("{arn}{query}"), Value::Null).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, kind), "{query}: {got:?}");
    }
    assert_eq!(call(&bench, "GET", &arn, Value::Null).await.body, before);
    let mut request = image_request("other", CODE);
    for tags in [json!({"aws:x": ""}), (0..51).map(|n| (format!("k{n}"), json!(""))).collect()] {
        request["tags"] = tags;
        assert_eq!(bench.post(IMAGES, request.clone()).await.kind(), "ValidationException", "what CreateMicrovmImage declares");
    }
    assert_eq!(bench.images.catalog.images().len(), 1);
}

#[tokio::test]
async fn only_images_have_tags() {
    let bench = Bench::with_image("hello").await;
    let microvm = bench.post("/2025-09-09/microvms", json!({"imageIdentifier": "hello"})).await.body["microvmId"].as_str().unwrap().to_owned();
    for (resource, status, kind) in [
        (image_arn("none"), 404, "ResourceNotFoundException"),
        (image_arn("hello").replace(":microvm-image:", ":function:"), 404, "ResourceNotFoundException"),
        (image_arn("hello").replace("us-east-1", "us-west-2"), 403, "AccessDeniedException"),
        (image_arn("hello").replace("000000000000", "111111111111"), 403, "AccessDeniedException"),
        (image_arn("hello").replace(":microvm-image:hello", &format!(":microvm:{microvm}")), 400, "ValidationException"),
        (microvm, 400, "ValidationException"),
        ("hello".to_owned(), 400, "ValidationException"),
        (image_arn("hello").replace(":microvm-image:", ":microvm-image%2F"), 400, "ValidationException"),
    ] {
        for (method, query, body) in [("GET", "", Value::Null), ("POST", "", json!({"Tags": {"a": "b"}})), ("DELETE", "?tagKeys=a", Value::Null)] {
            let got = call(&bench, method, &format!("{resource}{query}"), body).await;
            assert_eq!((got.status.as_u16(), got.kind()), (status, kind), "{method} {resource}: {got:?}");
        }
    }
}

#[tokio::test]
async fn changes_at_the_same_time_are_all_made() {
    let bench = Bench::new().await;
    let arn = tagged(&bench).await;
    let calls = (0..40).map(|n| call(&bench, "POST", &arn, json!({"Tags": {format!("k{n}"): "x"}})));
    assert!(futures::future::join_all(calls).await.iter().all(|got| got.status == 204));
    assert_eq!(call(&bench, "GET", &arn, Value::Null).await.body["Tags"].as_object().unwrap().len(), 42);
}
