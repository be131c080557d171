//! Who may do what, how often, and how much of it.

use std::{
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};

use super::bench::{Bench, CODE, image_arn, image_request};
use crate::{Rates, Role};

const MICROVMS: &str = "/2025-09-09/microvms";
const IMAGES: &str = "/2025-09-09/microvm-images";

async fn image(bench: &Bench, name: &str) {
    assert_eq!(bench.post(IMAGES, image_request(name, CODE)).await.status, 201);
    bench.images.end(name, None).await;
}

async fn run(bench: &Bench, image: &str) -> String {
    bench.post(MICROVMS, json!({"imageIdentifier": image})).await.body["microvmId"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn each_role_may_do_its_own_and_nothing_else() {
    let bench = Bench::with_image("hello").await;
    image(&bench, "other").await;
    let (mine, foreign) = (run(&bench, "hello").await, run(&bench, "other").await);
    let handle = bench.controller.find(mine.parse().unwrap()).unwrap();
    handle.wait_until(|view| view.state == model::MicrovmState::Running).await;
    let operator = bench.add_key("ops", Some(Role::Operator));
    let minter = bench.add_key("mint", Some(Role::TokenMinter(["hello".parse().unwrap()].into())));
    let nobody = bench.add_key("nobody", None);
    let arn = image_arn("hello");
    let token = json!({"expirationInMinutes": 5, "allowedPorts": [{"port": 1}]});
    // Which of operator and minter may; nobody may anything, and admin everything.
    for (method, target, body, action, resource, operator_may, minter_may) in [
        ("POST", MICROVMS.to_owned(), json!({"imageIdentifier": "hello"}), "RunMicrovm", arn.as_str(), true, false),
        ("POST", format!("{MICROVMS}/{mine}/auth-token"), token.clone(), "CreateMicrovmAuthToken", &arn, true, true),
        ("POST", format!("{MICROVMS}/{foreign}/auth-token"), token, "CreateMicrovmAuthToken", &image_arn("other"), true, false),
        ("GET", format!("{MICROVMS}/{mine}"), Value::Null, "GetMicrovm", &arn, true, true),
        ("GET", format!("{MICROVMS}/{foreign}"), Value::Null, "GetMicrovm", &image_arn("other"), true, false),
        ("GET", format!("{MICROVMS}?imageIdentifier=other"), Value::Null, "ListMicrovms", &image_arn("other"), true, false),
        ("GET", MICROVMS.to_owned(), Value::Null, "ListMicrovms", "*", true, true),
        ("POST", format!("{MICROVMS}/{mine}/suspend"), json!({}), "SuspendMicrovm", &arn, true, false),
        ("POST", format!("{MICROVMS}/{mine}/resume"), json!({}), "ResumeMicrovm", &arn, true, false),
        ("GET", format!("{IMAGES}/{arn}"), Value::Null, "GetMicrovmImage", &arn, true, false),
        ("GET", IMAGES.to_owned(), Value::Null, "ListMicrovmImages", "*", true, false),
        ("GET", format!("/2017-03-31/tags/{arn}"), Value::Null, "ListTags", &arn, true, false),
        ("POST", format!("/2017-03-31/tags/{arn}"), json!({"Tags": {}}), "TagResource", &arn, false, false),
        ("POST", IMAGES.to_owned(), image_request("new", CODE), "CreateMicrovmImage", &image_arn("new"), false, false),
        ("DELETE", format!("{MICROVMS}/{mine}"), Value::Null, "TerminateMicrovm", &arn, true, false),
    ] {
        for (key, name, may) in [(&operator, "ops", operator_may), (&minter, "mint", minter_may), (&nobody, "nobody", false)] {
            let got = bench.by(key, method, &target, body.clone()).await;
            if may {
                assert!(got.status.is_success(), "{name} {action} {target}: {got:?}");
                continue;
            }
            assert_eq!((got.status.as_u16(), got.kind()), (403, "AccessDeniedException"), "{name} {action} {target}: {got:?}");
            assert_eq!(
                got.message(),
                format!(
                    "User: arn:aws:iam::000000000000:user/{name} is not authorized to perform: lambda:{action} on resource: {resource} because \
                     no identity-based policy allows the lambda:{action} action"
                )
            );
        }
    }
    assert_eq!(bench.images.catalog.images().len(), 2, "no image was made by who may not");
}

#[tokio::test]
async fn who_may_not_learns_nothing_and_a_minter_sees_its_own() {
    let bench = Bench::with_image("hello").await;
    image(&bench, "other").await;
    let mine = run(&bench, "hello").await;
    run(&bench, "other").await;
    let minter = bench.add_key("mint", Some(Role::TokenMinter(["hello".parse().unwrap()].into())));
    let listed = bench.by(&minter, "GET", MICROVMS, Value::Null).await.body;
    assert_eq!(listed["items"].as_array().unwrap().iter().map(|item| item["microvmId"].as_str().unwrap()).collect::<Vec<_>>(), [mine.as_str()]);
    let log = bench.by(&minter, "GET", &format!("/dormouse/v1/microvms/{mine}/logs"), Value::Null).await;
    assert_eq!((log.status.as_u16(), log.kind()), (403, "AccessDeniedException"), "what an app says is for those who run it");
    // Whether the input is right is told only to those who may ask.
    let refused = bench.by(&minter, "POST", MICROVMS, json!({"imageIdentifier": ""})).await;
    assert_eq!(refused.kind(), "AccessDeniedException");
    let missing = bench.by(&minter, "GET", &format!("{MICROVMS}/microvm-00000000-0000-4000-8000-000000000000"), Value::Null).await;
    assert_eq!(missing.kind(), "ResourceNotFoundException");
}

#[tokio::test]
async fn only_admin_and_operator_have_the_code_of_images() {
    let bench = Bench::new().await;
    let keys = [
        (bench.add_key("ops", Some(Role::Operator)), true),
        (bench.add_key("mint", Some(Role::TokenMinter(["hello".parse().unwrap()].into()))), false),
        (bench.add_key("nobody", None), false),
        (bench.key.clone(), true),
    ];
    for (key, may) in keys {
        for (method, target, body) in [("PUT", "/code", ""), ("PUT", "/code/a.zip", "zip"), ("GET", "/code/a.zip", ""), ("DELETE", "/code/a.zip", "")] {
            let mut call = bench.request(method, target, body.as_bytes());
            call.service = "s3";
            call.key = key.clone();
            let got = bench.send(call.signed(bench.address)).await;
            let fits = if may { got.status.is_success() || got.status == 409 } else { got.status == 403 && got.text.contains("AccessDenied") };
            assert!(fits, "{} {method} {target}: {got:?}", key.id);
        }
    }
}

#[tokio::test]
async fn a_client_token_of_one_key_is_not_anothers() {
    let bench = Bench::with_image("hello").await;
    let operator = bench.add_key("ops", Some(Role::Operator));
    let request = json!({"imageIdentifier": "hello", "clientToken": "t"});
    let first = bench.post(MICROVMS, request.clone()).await;
    let second = bench.by(&operator, "POST", MICROVMS, request).await;
    assert_eq!((first.status.as_u16(), second.status.as_u16()), (200, 200));
    assert_ne!(first.body["microvmId"], second.body["microvmId"]);
}

#[tokio::test]
async fn more_calls_than_the_rate_are_told_when_to_come_again() {
    // One in so long a time that it does not come back while this runs.
    let bench = Bench::with(|config| config.rates = Rates { get_microvm: NonZeroU32::new(1), others: NonZeroU32::new(1), ..Rates::default() }).await;
    let stranger = format!("{MICROVMS}/microvm-00000000-0000-4000-8000-000000000000");
    let until_throttled = async |target: &str| {
        let calls = (0..60).map(|_| bench.get(target));
        let all = futures::future::join_all(calls).await;
        assert!(all.iter().any(|got| got.status != 429), "one goes through");
        all.into_iter().find(|got| got.status == 429).unwrap()
    };
    let throttled = until_throttled(&stranger).await;
    assert_eq!(throttled.kind(), "ThrottlingException");
    assert_eq!(throttled.body, json!({"message": "Rate exceeded", "quotaCode": null, "serviceCode": null}));
    assert_eq!(throttled.headers["retry-after"], "1");
    let throttled = until_throttled(&format!("/2017-03-31/tags/{}", image_arn("none"))).await;
    assert_eq!((throttled.kind(), &throttled.body), ("TooManyRequestsException", &json!({"Type": "User", "message": "Rate exceeded"})));
    assert_eq!(bench.get(MICROVMS).await.status, 200, "another operation");
    // Who is refused by the signature takes nothing from the key's allowance, and learns nothing of it.
    let forged = bench.request("GET", &stranger, b"");
    let forged = super::bench::Call { key: crate::AccessKey { secret: "x".to_owned(), ..bench.key.clone() }, ..forged };
    assert_eq!(bench.send(forged.signed(bench.address)).await.kind(), "InvalidSignatureException");
}

#[tokio::test]
async fn memory_is_a_quota_of_microvms_and_builds_together() {
    let bench = Bench::with(|config| config.max_memory_mib = 4 * 512).await;
    let small = |name: &str| {
        let mut request = image_request(name, CODE);
        request["resources"] = json!([{"minimumMemoryInMiB": 512}]);
        request
    };
    assert_eq!(bench.post(IMAGES, small("hello")).await.status, 201);
    bench.images.end("hello", None).await;
    assert_eq!(bench.post(IMAGES, small("building")).await.status, 201);
    // Three places are left, and ten come at a time.
    let answers = futures::future::join_all((0..10).map(|_| bench.post(MICROVMS, json!({"imageIdentifier": "hello"})))).await;
    assert_eq!(answers.iter().filter(|got| got.status == 200).count(), 3);
    let full = answers.iter().find(|got| got.status != 200).unwrap();
    assert_eq!((full.status.as_u16(), full.kind()), (402, "ServiceQuotaExceededException"));
    assert_eq!(
        full.body,
        json!({"message": "The base maximum allocated memory limit has been reached for this account.", "quotaCode": null, "serviceCode": null, "resourceId": null, "resourceType": null})
    );
    assert_eq!(bench.post(IMAGES, small("one-more")).await.status, 402);
    // One that sleeps holds its place, one that has ended does not; and what was refused holds nothing.
    let id: model::MicrovmId = answers.iter().find(|got| got.status == 200).unwrap().body["microvmId"].as_str().unwrap().parse().unwrap();
    let handle = bench.controller.find(id).unwrap();
    handle.wait_until(|view| view.state == model::MicrovmState::Running).await;
    assert_eq!(bench.post(&format!("{MICROVMS}/{id}/suspend"), json!({})).await.status, 200);
    handle.wait_until(|view| view.state == model::MicrovmState::Suspended).await;
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.status, 402);
    assert_eq!(bench.delete(&format!("{MICROVMS}/{id}")).await.status, 200);
    handle.wait_until(|view| view.state == model::MicrovmState::Terminated).await;
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.status, 200);
}

#[tokio::test]
async fn a_request_that_acts_is_not_done_again_by_who_overheard_it() {
    let bench = Bench::with_image("hello").await;
    let call = |at| {
        let mut call = bench.request("POST", MICROVMS, br#"{"imageIdentifier":"hello"}"#);
        call.at = at;
        call
    };
    let at = SystemTime::now() - Duration::from_secs(60);
    for _ in 0..2 {
        assert_eq!(bench.send(call(at).signed(bench.address)).await.status, 200, "a repeat that comes at once is an honest one");
    }
    bench.later(Duration::from_secs(11));
    let replayed = bench.send(call(at).signed(bench.address)).await;
    assert_eq!((replayed.status.as_u16(), replayed.kind()), (403, "InvalidSignatureException"), "{replayed:?}");
    assert!(replayed.message().contains("used before"), "{}", replayed.message());
    assert_eq!(bench.controller.list().len(), 2);
    assert_eq!(bench.send(call(at + Duration::from_secs(1)).signed(bench.address)).await.status, 200, "signed anew");
    for _ in 0..2 {
        let mut look = bench.request("GET", MICROVMS, b"");
        look.at = at;
        assert_eq!(bench.send(look.signed(bench.address)).await.status, 200, "looking may be repeated");
        bench.later(Duration::from_secs(11));
    }
}
