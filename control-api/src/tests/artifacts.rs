//! Images and the code they are made of.

use http::StatusCode;
use image_builder::{Artifact, BuildFailure};
use serde_json::{Value, json};

use super::bench::{Bench, CODE, Got, image_arn, image_request};

const IMAGES: &str = "/2025-09-09/microvm-images";

async fn s3(bench: &Bench, method: &str, target: &str, body: &[u8]) -> Got {
    let mut call = bench.request(method, target, body);
    call.service = "s3";
    bench.send(call.signed(bench.address)).await
}

#[tokio::test]
async fn code_is_uploaded_to_s3_and_built_from_there() {
    let bench = Bench::new().await;
    assert_eq!(s3(&bench, "PUT", "/code", b"").await.status, StatusCode::OK);
    assert_eq!(s3(&bench, "PUT", "/code/apps/hello.zip", b"a zip").await.status, StatusCode::OK);
    assert_eq!(s3(&bench, "GET", "/code/apps/hello.zip", b"").await.text, "a zip");
    let listed = s3(&bench, "GET", "/code?list-type=2", b"").await;
    assert!(listed.text.contains("<Key>apps/hello.zip</Key>"), "{}", listed.text);
    let made = bench.post(IMAGES, image_request("hello", "s3://code/apps/hello.zip")).await;
    assert_eq!(made.status, 201, "{made:?}");
    let requests = bench.images.requests(1).await;
    assert!(matches!(&requests[0].artifact, Artifact::Object { object, .. } if *object == bench.dir.path().join("s3/code/apps/hello.zip")));
    assert_eq!(std::fs::read(bench.dir.path().join("s3/code/apps/hello.zip")).unwrap(), b"a zip");
    assert_eq!(s3(&bench, "DELETE", "/code/apps/hello.zip", b"").await.status, StatusCode::NO_CONTENT);
    assert_eq!(s3(&bench, "GET", "/code/apps/hello.zip", b"").await.status, StatusCode::NOT_FOUND);
    assert!(bench.counted("S3", "200") >= 4.0);
}

#[tokio::test]
async fn s3_is_closed_to_who_does_not_sign_rightly() {
    let bench = Bench::new().await;
    let unsigned = bench.send(bench.request("PUT", "/code", b"").plain(bench.address)).await;
    assert_eq!(unsigned.status, 403, "{unsigned:?}");
    let mut call = bench.request("PUT", "/code", b"");
    call.service = "s3";
    call.key.secret.push('x');
    assert_eq!(bench.send(call.signed(bench.address)).await.status, 403);
    let mut call = bench.request("PUT", "/code", b"");
    call.service = "s3";
    call.key.id = "AKIAUNKNOWN".to_owned();
    assert_eq!(bench.send(call.signed(bench.address)).await.status, 403);
    assert!(!bench.dir.path().join("s3/code").exists());
    // Signed for S3, an API path is a bucket's; signed for the API, a bucket's path is no operation.
    assert_eq!(s3(&bench, "GET", "/2025-09-09/microvms", b"").await.status, 404);
    assert_eq!(bench.get("/code/x").await.kind(), "UnknownOperationException");
}

#[tokio::test]
async fn keys_stay_in_their_bucket() {
    let bench = Bench::new().await;
    for bucket in ["/code", "/other"] {
        assert_eq!(s3(&bench, "PUT", bucket, b"").await.status, StatusCode::OK);
    }
    assert_eq!(s3(&bench, "PUT", "/other/secret", b"theirs").await.status, StatusCode::OK);
    for key in ["..", ".", "../other/x", "../../x", "a/../../other/x", "%2e%2e/other/x", "%2e%2e%2fother%2fx", "a//b", "/abs", "a/%00b"] {
        for method in ["PUT", "GET", "DELETE"] {
            let got = s3(&bench, method, &format!("/code/{key}"), b"evil").await;
            assert_eq!(got.status, StatusCode::BAD_REQUEST, "{method} {key}: {got:?}");
        }
    }
    let delete = b"<Delete><Object><Key>../other/secret</Key></Object></Delete>";
    let got = s3(&bench, "POST", "/code?delete", delete).await;
    assert!(got.status.is_client_error(), "{got:?}");
    let mut copy = bench.request("PUT", "/code/copied", b"");
    copy.service = "s3";
    copy.headers.insert("x-amz-copy-source", "/code/..%2Fother%2Fsecret".parse().unwrap());
    assert!(bench.send(copy.signed(bench.address)).await.status.is_client_error());
    assert_eq!(s3(&bench, "GET", "/other/secret", b"").await.text, "theirs");
    let mut left: Vec<_> = std::fs::read_dir(bench.dir.path().join("s3")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.retain(|name| !name.starts_with(".bucket-"));
    left.sort();
    assert_eq!(left, ["code", "other"]);
}

#[tokio::test]
async fn an_image_is_created_seen_and_described() {
    let bench = Bench::new().await;
    let mut request = image_request("hello", CODE);
    request["description"] = json!("says hello");
    request["resources"] = json!([{"minimumMemoryInMiB": 512}]);
    request["environmentVariables"] = json!({"GREETING": "hello", "AWS_REGION": "nowhere"});
    request["tags"] = json!({"team": "a"});
    request["baseImageVersion"] = json!("0");
    request["hooks"] = json!({"port": 9000, "microvmHooks": {"run": "DISABLED"}});
    let made = bench.post(IMAGES, request).await;
    assert_eq!(made.status, 201, "{made:?}");
    for (member, expected) in [
        ("imageArn", json!(image_arn("hello"))),
        ("name", json!("hello")),
        ("state", json!("CREATING")),
        ("imageVersion", json!("1.0")),
        ("latestActiveImageVersion", Value::Null),
        ("latestFailedImageVersion", Value::Null),
        ("baseImageVersion", json!("0.0")),
        ("description", json!("says hello")),
        ("resources", json!([{"minimumMemoryInMiB": 512}])),
        ("cpuConfigurations", json!([{"architecture": "X86_64"}])),
        ("tags", json!({"team": "a"})),
        ("logging", Value::Null),
        ("environmentVariables", json!({"GREETING": "hello", "AWS_REGION": "nowhere"})),
    ] {
        assert_eq!(made.body.get(member), Some(&expected), "{member}");
    }
    let built = &bench.images.requests(1).await[0];
    assert_eq!(built.memory.mib(), 512);
    let variables: Vec<_> = built.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(
        variables,
        [
            format!("AWS_LAMBDA_MICROVM_IMAGE_ARN={}", image_arn("hello")),
            "AWS_LAMBDA_MICROVM_IMAGE_NAME=hello".to_owned(),
            "AWS_LAMBDA_MICROVM_IMAGE_VERSION=1.0".to_owned(),
            "AWS_REGION=us-east-1".to_owned(),
            "GREETING=hello".to_owned(),
        ]
    );
    let target = format!("{IMAGES}/{}", image_arn("hello").replace(':', "%3A"));
    assert_eq!(bench.get(&target).await.body["state"], "CREATING");
    bench.images.end("hello", None).await;
    let got = bench.get(&target).await.body;
    assert_eq!(got["tags"], json!({"team": "a"}));
    assert_eq!((&got["state"], &got["latestActiveImageVersion"]), (&json!("CREATED"), &json!("1.0")));
    let item = &bench.get(IMAGES).await.body["items"][0];
    assert_eq!(item["imageArn"], image_arn("hello"));
    let mut members: Vec<_> = item.as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    // To the member as recorded, so neither tags nor updatedAt.
    assert_eq!(members, ["createdAt", "id", "imageArn", "latestActiveImageVersion", "latestFailedImageVersion", "name", "state"]);
    assert_eq!(bench.get(&format!("{IMAGES}?nameFilter=ell")).await.body["items"].as_array().unwrap().len(), 1);
    assert_eq!(bench.get(&format!("{IMAGES}?nameFilter=other")).await.body["items"], json!([]));
    let version = bench.get(&format!("{target}/versions/1")).await.body;
    let bucket = version["versionStateTimeBucket"].as_str().unwrap();
    assert!(bucket.strip_prefix("SUCCESSFUL#").is_some_and(|hour| hour.len() == 8 && hour.parse::<u32>().is_ok()), "{bucket}");
    assert_eq!((&version["state"], &version["status"]), (&json!("SUCCESSFUL"), &json!("ACTIVE")));
    assert_eq!(bench.get(&format!("{target}/versions")).await.body["items"][0], version);
    let builds = bench.get(&format!("{target}/versions/1.0/builds?architecture=X86_64")).await.body;
    let build = builds["items"][0]["buildId"].as_str().unwrap();
    assert!(builds["items"][0].get("snapshotBuild").is_none(), "the sizes are shown by GetMicrovmImageBuild only");
    let got = bench.get(&format!("{target}/versions/1.0/builds/{build}")).await.body;
    assert_eq!((&got["buildState"], got.get("snapshotBuild").is_some()), (&json!("SUCCESSFUL"), true));
    assert_eq!(bench.get(&format!("{target}/versions/1.0/builds?architecture=ARM_64")).await.body["items"], json!([]));
}

#[tokio::test]
async fn a_failed_build_tells_why() {
    let bench = Bench::new().await;
    assert_eq!(s3(&bench, "PUT", "/code", b"").await.status, StatusCode::OK);
    let failure = |code: &str| Some(BuildFailure { code: code.to_owned(), message: "line 3 failed".to_owned() });
    for (name, uri, code, told) in [
        ("a", CODE, "CONTAINER_BUILD_FAILED", "CONTAINER_BUILD_FAILED: line 3 failed"),
        // What the build found wrong is told, whatever became of the object meanwhile.
        ("b", "s3://code/none.zip", "ARCHIVE_INVALID", "ARCHIVE_INVALID: line 3 failed"),
    ] {
        assert_eq!(bench.post(IMAGES, image_request(name, uri)).await.status, 201, "{name}");
        bench.images.end(name, failure(code)).await;
        let got = bench.get(&format!("{IMAGES}/{name}")).await.body;
        assert_eq!((&got["state"], &got["latestFailedImageVersion"], &got["latestActiveImageVersion"]), (&json!("CREATE_FAILED"), &json!("1.0"), &Value::Null));
        let version = bench.get(&format!("{IMAGES}/{name}/versions/1.0")).await.body;
        assert_eq!((&version["state"], &version["status"], &version["stateReason"]), (&json!("FAILED"), &json!("INACTIVE"), &json!(told)));
    }
}

#[tokio::test]
async fn image_requests_are_refused_in_the_words_of_aws() {
    let bench = Bench::with_image("hello").await;
    let good = image_request("new", CODE);
    for (member, value, told) in [
        ("name", json!("hello"), "A MicroVM image with the name 'hello' already exists in this account"),
        ("codeArtifact", json!({"uri": "https://x/y"}), "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"),
        ("codeArtifact", json!({"uri": "s3://code/../x"}), "CodeArtifact URI must be a valid S3 URI"),
        ("codeArtifact", json!({"uri": "file:///no/such/place"}), "cannot be read"),
        ("baseImageArn", json!("arn:aws:lambda:us-east-1:aws:microvm-image:al1"), "No managed MicroVM Image with arn arn:aws:lambda:us-east-1:aws:microvm-image:al1"),
        ("baseImageVersion", json!("999"), "and version 999 is available"),
        ("resources", json!([{"minimumMemoryInMiB": 100}]), "The requested memory size of 100 MiB is not supported by base MicroVM image arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1. Supported memory sizes in MiB are: [512, 1024, 2048, 4096, 8192]."),
        ("hooks", json!({"port": 9000, "microvmHooks": {"run": "ENABLED"}}), "hooks.microvmHooks.run is enabled, so the ready hook must be enabled too"),
        ("hooks", json!({"microvmImageHooks": {"ready": "ENABLED"}}), "hooks.port is required"),
        ("cpuConfigurations", json!([{"architecture": "ARM_64"}]), "cpuConfigurations"),
        ("egressNetworkConnectors", json!(["INTERNET_EGRESS"]), "Malformed network connector ARN"),
        ("environmentVariables", json!({"A=B": "x"}), "environmentVariables"),
        ("environmentVariables", json!({"A": "x\u{0}"}), "environmentVariables"),
        ("buildRoleArn", Value::Null, "Value null at 'buildRoleArn' failed to satisfy constraint: Member must not be null"),
    ] {
        let mut request = good.clone();
        request[member] = value;
        let got = bench.post(IMAGES, request.clone()).await;
        assert_eq!((got.status.as_u16(), got.kind()), (400, "ValidationException"), "{request}: {got:?}");
        assert!(got.message().contains(told), "{request}: {}", got.message());
    }
    assert_eq!(bench.images.catalog.images().len(), 1);
    let closed = Bench::with(|config| config.allow_file_artifacts = false).await;
    assert!(closed.post(IMAGES, good).await.message().contains("valid S3 URI"));
}

#[tokio::test]
async fn a_client_token_makes_one_image_of_many_calls() {
    let bench = Bench::new().await;
    let mut request = image_request("hello", CODE);
    request["clientToken"] = json!("t");
    let first = bench.post(IMAGES, request.clone()).await;
    let second = bench.post(IMAGES, request.clone()).await;
    assert_eq!((first.status.as_u16(), second.status.as_u16()), (201, 201));
    assert_eq!(first.body, second.body);
    request["description"] = json!("other");
    let conflict = bench.post(IMAGES, request).await;
    assert_eq!((conflict.status.as_u16(), conflict.kind()), (409, "ConflictException"));
}
