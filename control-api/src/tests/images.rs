//! The life of an image through the API: versions, their status, deletion (aws-behaviour §5.1).

use http::StatusCode;
use image_builder::BuildFailure;
use serde_json::{Value, json};

use super::bench::{Bench, CODE, Got, image_arn, image_request};

const MICROVMS: &str = "/2025-09-09/microvms";
const IMAGES: &str = "/2025-09-09/microvm-images";

fn update_request() -> Value {
    let mut request = image_request("ignored", CODE);
    request.as_object_mut().unwrap().remove("name");
    request
}

async fn send(bench: &Bench, method: &str, target: &str, body: &Value) -> Got {
    bench.send(bench.request(method, target, body.to_string().as_bytes()).signed(bench.address)).await
}

fn told(got: &Got) -> (u16, &str, &str) {
    (got.status.as_u16(), got.kind(), got.message())
}

/// With version 2.0 built as well.
async fn two_versions() -> Bench {
    let bench = Bench::with_image("hello").await;
    assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/hello"), &update_request()).await.status, StatusCode::OK);
    bench.images.end_version("hello", 2, None).await;
    bench
}

async fn versions(bench: &Bench) -> Vec<String> {
    let items = bench.get(&format!("{IMAGES}/hello/versions")).await.body["items"].clone();
    items.as_array().unwrap().iter().map(|item| item["imageVersion"].as_str().unwrap().to_owned()).collect()
}

async fn version_gone(bench: &Bench, major: u32) {
    assert!(bench.images.catalog.version_gone(&"hello".parse().unwrap(), model::ImageVersion { major, minor: 0 }).await.is_none());
}

#[tokio::test]
async fn an_update_replaces_everything_and_makes_the_next_version() {
    let bench = Bench::new().await;
    let mut first = image_request("hello", CODE);
    first["environmentVariables"] = json!({"ONE": "1"});
    first["description"] = json!("first");
    first["tags"] = json!({"team": "a"});
    first["hooks"] = json!({"port": 9000});
    assert_eq!(bench.post(IMAGES, first).await.status, 201);
    let target = format!("{IMAGES}/{}", image_arn("hello").replace(':', "%3A"));
    let early = send(&bench, "PUT", &target, &update_request()).await;
    assert_eq!(told(&early), (409, "ConflictException", "MicroVM Image is already in state: CREATING"));
    bench.images.end("hello", None).await;

    let mut second = update_request();
    second["environmentVariables"] = json!({"TWO": "2"});
    second["resources"] = json!([{"minimumMemoryInMiB": 512}]);
    second["tags"] = json!({"team": "ignored"});
    let got = send(&bench, "PUT", &target, &second).await;
    assert_eq!(got.status, 200, "{got:?}");
    for (member, expected) in [
        ("imageArn", json!(image_arn("hello"))),
        ("state", json!("UPDATING")),
        ("imageVersion", json!("2.0")),
        ("latestActiveImageVersion", json!("1.0")),
        ("environmentVariables", json!({"TWO": "2"})),
        ("description", Value::Null),
        ("hooks", Value::Null),
    ] {
        assert_eq!(got.body.get(member), Some(&expected), "{member}");
    }
    assert!(got.body.get("tags").is_none(), "not in the model");
    assert_eq!(bench.get(&target).await.body["tags"], json!({"team": "a"}), "an update does not touch them");
    let built = &bench.images.requests(2).await[1];
    assert_eq!((built.memory.mib(), built.environment["AWS_LAMBDA_MICROVM_IMAGE_VERSION"].as_str()), (512, "2.0"));
    assert!(built.environment.contains_key("TWO") && !built.environment.contains_key("ONE"));

    // While it is under way nothing else is.
    for (method, target, body, expected) in [
        ("PUT", target.clone(), update_request(), (409, "ConflictException", "MicroVM Image is already in state: UPDATING")),
        ("PATCH", format!("{target}/versions/1.0"), json!({"status": "INACTIVE"}), (409, "ConflictException", "MicroVM Image is already in state: UPDATING")),
        ("DELETE", format!("{target}/versions/1.0"), Value::Null, (409, "ConflictException", "MicroVM Image is already in state: UPDATING")),
        ("DELETE", target.clone(), Value::Null, (400, "ValidationException", "Cannot delete MicroVM image in its current state: UPDATING")),
    ] {
        assert_eq!(told(&send(&bench, method, &target, &body).await), expected, "{method} {target}");
    }
    let run = bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await;
    assert_eq!((run.status.as_u16(), &run.body["imageVersion"]), (200, &json!("1.0")), "the old version serves until the new one is built");

    bench.images.end_version("hello", 2, None).await;
    let image = bench.get(&target).await.body;
    assert_eq!((&image["state"], &image["latestActiveImageVersion"]), (&json!("UPDATED"), &json!("2.0")));
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body["imageVersion"], "2.0");
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello", "imageVersion": "1"})).await.body["imageVersion"], "1.0");
    assert_eq!(bench.get(&format!("{target}/versions/1.0")).await.body["environmentVariables"], json!({"ONE": "1"}), "the old version is as it was");
    assert_eq!(versions(&bench).await, ["2.0", "1.0"]);
    let page = bench.get(&format!("{target}/versions?maxResults=1")).await.body;
    let next = page["nextToken"].as_str().unwrap().replace('=', "%3D");
    assert_eq!(bench.get(&format!("{target}/versions?maxResults=1&nextToken={next}")).await.body["items"][0]["imageVersion"], "1.0");
}

#[tokio::test]
async fn a_failed_update_leaves_the_old_version() {
    let bench = Bench::with_image("hello").await;
    send(&bench, "PUT", &format!("{IMAGES}/hello"), &update_request()).await;
    bench.images.end_version("hello", 2, Some(BuildFailure { code: "CONTAINER_BUILD_FAILED".to_owned(), message: "no".to_owned() })).await;
    let image = bench.get(&format!("{IMAGES}/hello")).await.body;
    assert_eq!(
        (&image["state"], &image["latestActiveImageVersion"], &image["latestFailedImageVersion"]),
        (&json!("UPDATE_FAILED"), &json!("1.0"), &json!("2.0"))
    );
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body["imageVersion"], "1.0");
    let active = send(&bench, "PATCH", &format!("{IMAGES}/hello/versions/2.0"), &json!({"status": "ACTIVE"})).await;
    assert_eq!((active.status.as_u16(), active.kind()), (400, "ValidationException"), "what was not built is not made ACTIVE");
    let failed = bench.get(&format!("{IMAGES}/hello/versions/2.0/builds")).await.body["items"][0].clone();
    assert_eq!((&failed["buildState"], &failed["stateReason"]), (&json!("FAILED"), &json!("CONTAINER_BUILD_FAILED: no")));
    // A failed version goes like any other; its number does not come again.
    assert_eq!(bench.delete(&format!("{IMAGES}/hello/versions/2.0")).await.body["state"], "DELETING");
    version_gone(&bench, 2).await;
    assert_eq!(bench.get(&format!("{IMAGES}/hello")).await.body["state"], "UPDATED");
    assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/hello"), &update_request()).await.body["imageVersion"], "3.0");
}

#[tokio::test]
async fn an_inactive_version_is_not_run() {
    let bench = two_versions().await;
    let arn = image_arn("hello");
    let patch = async |version: &str, status: &str| send(&bench, "PATCH", &format!("{IMAGES}/hello/versions/{version}"), &json!({"status": status})).await;
    let run = async |version: Option<&str>| bench.post(MICROVMS, json!({"imageIdentifier": "hello", "imageVersion": version})).await;
    let off = patch("2.0", "INACTIVE").await;
    assert_eq!((off.status.as_u16(), &off.body["status"], &off.body["state"]), (200, &json!("INACTIVE"), &json!("SUCCESSFUL")));
    assert_eq!(bench.get(&format!("{IMAGES}/hello")).await.body["latestActiveImageVersion"], "1.0");
    assert_eq!(run(None).await.body["imageVersion"], "1.0");
    let pinned = run(Some("2.0")).await;
    assert_eq!(told(&pinned), (404, "ResourceNotFoundException", format!("No active version found for MicroVM image {arn} and version 2.0").as_str()));
    assert_eq!(patch("1", "INACTIVE").await.status, 200);
    assert_eq!(told(&run(None).await), (404, "ResourceNotFoundException", format!("No active version found for MicroVM image {arn}").as_str()));
    assert_eq!(bench.get(&format!("{IMAGES}/hello")).await.body["latestActiveImageVersion"], Value::Null);
    assert_eq!(patch("2.0", "ACTIVE").await.body["status"], "ACTIVE");
    assert_eq!(run(None).await.body["imageVersion"], "2.0");
    for (version, body, status, message) in [
        ("2.0", json!({}), 400, "Value null at 'status' failed to satisfy constraint: Member must not be null"),
        ("2.0", json!({"status": "ON"}), 400, "Member must satisfy enum value set: [ACTIVE, INACTIVE]"),
        ("7.0", json!({"status": "ACTIVE"}), 404, "Version: 7.0"),
        ("new", json!({"status": "ACTIVE"}), 404, "Version: new"),
    ] {
        let got = send(&bench, "PATCH", &format!("{IMAGES}/hello/versions/{version}"), &body).await;
        assert!(got.status == status && got.message().contains(message), "{got:?}");
    }
    assert_eq!(send(&bench, "PATCH", &format!("{IMAGES}/none/versions/1.0"), &json!({"status": "ACTIVE"})).await.status, 404);
}

#[tokio::test]
async fn a_version_is_deleted_unless_it_is_the_last_or_runs() {
    let bench = two_versions().await;
    let runs = bench.post(MICROVMS, json!({"imageIdentifier": "hello", "imageVersion": "1.0"})).await.body["microvmId"].as_str().unwrap().to_owned();
    let used = bench.delete(&format!("{IMAGES}/hello/versions/1.0")).await;
    assert_eq!(told(&used), (400, "ValidationException", "Cannot delete microvm image version with running microvms."));
    let gone = bench.delete(&format!("{IMAGES}/hello/versions/2.0")).await;
    assert_eq!(gone.body, json!({"imageIdentifier": image_arn("hello"), "imageVersion": "2.0", "state": "DELETING"}));
    version_gone(&bench, 2).await;
    assert_eq!(versions(&bench).await, ["1.0"]);
    assert_eq!(bench.get(&format!("{IMAGES}/hello/versions/2.0")).await.status, 404);
    assert_eq!(bench.delete(&format!("{IMAGES}/hello/versions/2.0")).await.body["state"], "DELETED", "again is no error");
    for unknown in ["3.0", "0", "1.1", "new"] {
        assert_eq!(bench.delete(&format!("{IMAGES}/hello/versions/{unknown}")).await.kind(), "ResourceNotFoundException", "{unknown}");
    }
    let handle = bench.controller.find(runs.parse().unwrap()).unwrap();
    handle.terminate().await.unwrap();
    handle.wait_until(|_| false).await;
    let last = bench.delete(&format!("{IMAGES}/hello/versions/1.0")).await;
    assert_eq!((last.status.as_u16(), last.kind()), (400, "ValidationException"));
    assert!(last.message().contains("the last one"), "{last:?}");
}

#[tokio::test]
async fn an_image_is_deleted_unless_something_runs_and_its_name_is_free_again() {
    let bench = Bench::new().await;
    let mut request = image_request("hello", CODE);
    request["clientToken"] = json!("one");
    let made = bench.post(IMAGES, request.clone()).await;
    let building = bench.delete(&format!("{IMAGES}/hello")).await;
    assert_eq!(told(&building), (400, "ValidationException", "Cannot delete MicroVM image in its current state: CREATING"));
    bench.images.end("hello", None).await;
    let microvm = bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.body["microvmId"].as_str().unwrap().to_owned();
    let used = bench.delete(&format!("{IMAGES}/hello")).await;
    assert_eq!(told(&used), (400, "ValidationException", "Cannot delete microvm image with running microvms."));
    let handle = bench.controller.find(microvm.parse().unwrap()).unwrap();
    handle.terminate().await.unwrap();
    handle.wait_until(|_| false).await;

    let gone = bench.delete(&format!("{IMAGES}/{}", image_arn("hello"))).await;
    assert_eq!((gone.status.as_u16(), &gone.body), (200, &json!({"imageIdentifier": image_arn("hello"), "state": "DELETING"})));
    assert!(bench.images.catalog.gone(&"hello".parse().unwrap()).await.is_none());
    assert_eq!(bench.get(&format!("{IMAGES}/hello")).await.status, 404);
    assert_eq!(bench.get(IMAGES).await.body["items"], json!([]));
    assert_eq!(bench.delete(&format!("{IMAGES}/hello")).await.body["state"], "DELETED", "again is no error");
    assert_eq!(bench.delete(&format!("{IMAGES}/never")).await.kind(), "ResourceNotFoundException");
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.kind(), "ResourceNotFoundException");

    // The same call again must neither tell of an image that is not there nor make it behind somebody's back.
    let repeated = bench.post(IMAGES, request.clone()).await;
    assert_eq!((repeated.status.as_u16(), repeated.kind()), (409, "ConflictException"), "{repeated:?}");
    assert!(repeated.message().contains("has been deleted"), "{repeated:?}");
    request["clientToken"] = json!("two");
    let again = bench.post(IMAGES, request.clone()).await;
    assert_eq!((again.status.as_u16(), &again.body["imageVersion"], &again.body["state"]), (201, &json!("1.0"), &json!("CREATING")));
    assert_ne!(again.body["id"], made.body["id"]);
    assert_eq!(bench.post(IMAGES, request).await.body, again.body, "a repeat of this one is answered as before");
    bench.images.end("hello", None).await;
    assert_eq!(bench.post(MICROVMS, json!({"imageIdentifier": "hello"})).await.status, 200);
}

#[tokio::test]
async fn an_update_is_done_once_for_its_token() {
    let bench = Bench::with_image("hello").await;
    let mut request = update_request();
    request["clientToken"] = json!("t");
    let first = send(&bench, "PUT", &format!("{IMAGES}/hello"), &request).await;
    let second = send(&bench, "PUT", &format!("{IMAGES}/hello"), &request).await;
    assert_eq!((second.status.as_u16(), &first.body), (200, &second.body));
    request["description"] = json!("other");
    assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/hello"), &request).await.kind(), "ConflictException");
    bench.images.end_version("hello", 2, None).await;
    assert_eq!(versions(&bench).await, ["2.0", "1.0"]);
}

#[tokio::test]
async fn an_update_is_checked_as_a_creation_is() {
    let bench = Bench::with_image("hello").await;
    for (member, value, message) in [
        ("codeArtifact", Value::Null, "Value null at 'codeArtifact'"),
        ("buildRoleArn", Value::Null, "Value null at 'buildRoleArn'"),
        ("baseImageArn", Value::Null, "Value null at 'baseImageArn'"),
        ("baseImageVersion", json!("999"), "and version 999 is available"),
        ("resources", json!([{"minimumMemoryInMiB": 100}]), "The requested memory size of 100 MiB is not supported"),
        ("cpuConfigurations", json!([{"architecture": "ARM_64"}]), "cpuConfigurations"),
        ("environmentVariables", json!({"A=B": "x"}), "environmentVariables"),
        ("kmsKeyIdentifier", json!("no key"), "'kmsKeyIdentifier' failed to satisfy constraint"),
        ("codeArtifact", json!({"uri": "https://x/y"}), "CodeArtifact URI must be a valid S3 URI"),
    ] {
        let mut request = update_request();
        request[member] = value;
        let got = send(&bench, "PUT", &format!("{IMAGES}/hello"), &request).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, "ValidationException"), "{member}: {got:?}");
        assert!(got.message().contains(message), "{member}: {}", got.message());
    }
    assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/none"), &update_request()).await.kind(), "ResourceNotFoundException");
    assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/a%20b"), &update_request()).await.kind(), "ValidationException");
    assert_eq!(versions(&bench).await, ["1.0"]);
}

#[tokio::test]
async fn limits_are_quotas() {
    let bench = Bench::new().await;
    let request = |name: &str| image_request(name, CODE);
    for n in 0..8 {
        assert_eq!(bench.post(IMAGES, request(&format!("i{n}"))).await.status, 201);
    }
    let full = bench.post(IMAGES, request("more")).await;
    assert_eq!((full.status.as_u16(), full.kind()), (402, "ServiceQuotaExceededException"));
    assert!(full.message().contains("maximum number of concurrent builds"), "{full:?}");
    for n in 0..8 {
        bench.images.end(&format!("i{n}"), None).await;
    }
    for major in 2..=5 {
        assert_eq!(send(&bench, "PUT", &format!("{IMAGES}/i0"), &update_request()).await.status, 200);
        bench.images.end_version("i0", major, None).await;
    }
    let full = send(&bench, "PUT", &format!("{IMAGES}/i0"), &update_request()).await;
    assert_eq!((full.status.as_u16(), full.kind()), (402, "ServiceQuotaExceededException"));
    for n in 8..30 {
        assert_eq!(bench.post(IMAGES, request(&format!("i{n}"))).await.status, 201);
        bench.images.end(&format!("i{n}"), None).await;
    }
    let full = bench.post(IMAGES, request("more")).await;
    assert!(full.status == 402 && full.message().contains("maximum number of MicroVM images"), "{full:?}");
}

#[tokio::test]
async fn a_build_tells_its_sizes_in_one_place() {
    let bench = Bench::with_image("hello").await;
    let target = format!("{IMAGES}/hello/versions/1.0/builds");
    let listed = bench.get(&target).await.body["items"][0].clone();
    assert!(listed.get("snapshotBuild").is_none());
    let id = listed["buildId"].as_str().unwrap();
    assert!(id.starts_with("build-") && id.len() > 40, "{id}");
    let build = bench.get(&format!("{target}/{id}")).await.body;
    assert_eq!(build["snapshotBuild"], json!({"codeInstallSizeInBytes": 1, "memorySnapshotSizeInBytes": 2, "diskSnapshotSizeInBytes": 3}));
    assert_eq!(bench.get(&format!("{target}/build-1.0")).await.kind(), "ResourceNotFoundException");
    let version = bench.get(&format!("{IMAGES}/hello/versions/1.0")).await.body;
    let bucket = version["versionStateTimeBucket"].as_str().unwrap();
    assert!(bucket.strip_prefix("SUCCESSFUL#").is_some_and(|hour| hour.len() == 8 && hour.bytes().all(|byte| byte.is_ascii_digit())), "{bucket}");
    for (filter, there) in [("architecture=X86_64", true), ("chipset=INTEL", true), ("chipset=GRAVITON", false), ("chipsetGeneration=4", false)] {
        assert_eq!(bench.get(&format!("{target}?{filter}")).await.body["items"].as_array().unwrap().len(), usize::from(there), "{filter}");
    }
}

/// Whichever comes first: either the image goes and nothing runs, or the microVM runs and the image stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_and_a_deletion_at_once_agree() {
    let bench = Bench::new().await;
    let mut both = [0, 0];
    for round in 0..12 {
        let name = format!("i{round}");
        bench.post(IMAGES, image_request(&name, CODE)).await;
        bench.images.end(&name, None).await;
        let run = async || bench.post(MICROVMS, json!({"imageIdentifier": name})).await;
        let delete = async || bench.delete(&format!("{IMAGES}/{name}")).await;
        let (one, two, deleted) = if round % 2 == 0 {
            tokio::join!(run(), run(), delete())
        } else {
            let (deleted, one, two) = tokio::join!(delete(), run(), run());
            (one, two, deleted)
        };
        let ran = [&one, &two].into_iter().filter(|got| got.status == 200).count();
        match deleted.status.as_u16() {
            200 => assert_eq!(ran, 0, "{name}: deleted, and yet {one:?} {two:?}"),
            400 => assert!(deleted.message().contains("running microvms"), "{deleted:?}"),
            other => panic!("{other}: {deleted:?}"),
        }
        both[usize::from(deleted.status == 200)] += 1;
        assert!([&one, &two].into_iter().all(|got| [200, 404].contains(&got.status.as_u16())), "{one:?} {two:?}");
    }
    println!("the image stayed {} times and went {} times", both[0], both[1]);
}
