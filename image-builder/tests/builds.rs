//! Real builds: buildah, the Debian base, mkfs; only the guest is missing.

mod support;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use image_builder::{Artifact, BuildRequest, BuildState, Catalog, CatalogError, ImageRecord};
use model::{Hook, Hooks, ImageVersion};
use support::{Bench, can_build, config, image, port, processes_of, request, within, zip};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

/// The article's app, unchanged.
const APP: &str = include_str!("../../demo/app/app.py");
const DOCKERFILE: &str = include_str!("../../demo/app/Dockerfile");

#[tokio::test(flavor = "multi_thread")]
async fn the_articles_app_becomes_a_snapshot() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    let record = bench.build("hello", &[("Dockerfile", DOCKERFILE), ("app.py", APP)]).await;
    assert_eq!((record.state, record.failure.clone()), (BuildState::Successful, None), "{}", bench.log("hello"));
    assert_eq!(record.ready_port, Some(port(8080)));
    assert_eq!((record.shape.memory_mib, record.shape.vcpus, record.shape.disk_gib), (2048, 1, 8));
    assert_eq!(record.request, serde_json::json!({"description": "kept as it is"}));

    let boot = bench.engine.last_boot();
    assert_eq!(boot.app.argv, ["python3", "app.py"]);
    assert_eq!((boot.app.workdir.as_str(), boot.app.user.as_str(), &boot.app.exposed[..]), ("/app", "", &[port(8080)][..]));
    assert_eq!(boot.shape, record.shape);
    let env = |name: &str| boot.app.env.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    assert_eq!((env("FROM_REQUEST"), env("HOME")), (Some("yes"), Some("/root")));
    assert!(env("PATH").is_some_and(|path| path.contains("/usr/bin")));

    assert_eq!(bench.on_disk("hello", "cat /app/app.py"), APP);
    assert!(bench.on_disk("hello", "stats").contains("Filesystem volume name:   dormouse"));
    assert!(!bench.on_disk("hello", "features").contains("has_journal"));
    assert!(bench.on_disk("hello", "ls -p /").contains("/proc/"));
    let log = bench.log("hello");
    for part in ["is this node's Debian 12 base image", "STEP 2/6: RUN dnf install", "Already installed: python3", "The app listens on port 8080", "The image is ready."] {
        assert!(log.contains(part), "{part} is not in the log:\n{log}");
    }
    bench.assert_clean();

    // The next process finds it.
    let again = Catalog::open(config(bench.dir.path()), Arc::new(bench.engine.clone())).await.unwrap();
    let lease = again.lease(&image("hello"), None).ok().unwrap();
    assert_eq!((lease.record().state, lease.record().ready_port), (BuildState::Successful, Some(port(8080))));
    assert!(lease.snapshot_dir().join("manifest.json").is_file());
    let facts = &lease.record().build;
    assert!(facts.id.starts_with("build-") && facts.code_bytes.is_some_and(|bytes| bytes > 50 << 20) && facts.memory_bytes.is_some(), "{facts:?}");
    let taken = again.create(request("hello", Artifact::Directory("/nowhere".into()))).await;
    assert!(matches!(taken, Err(CatalogError::NameTaken(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_images_configuration_reaches_the_guest() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    bench.engine.inner.listen(port(9000), "127.0.0.1:9".parse().unwrap());
    let dockerfile = r#"ARG TAG=bookworm-slim
FROM --platform=linux/arm64 debian:${TAG} AS build
RUN echo made > /made
FROM docker.io/library/python:3.11-slim
COPY --from=build /made /srv/made
RUN <<EOF
useradd --create-home --uid 1234 web
echo "from a here-document" > /srv/doc
EOF
ENV A=1 OVERRIDDEN=image
WORKDIR /srv
COPY --chown=web . .
USER web
EXPOSE 9000 8080/tcp 53/udp
ENTRYPOINT ["python", "-m"]
CMD ["http.server"]
"#;
    let project = bench.dir.path().join("project");
    std::fs::create_dir(&project).unwrap();
    std::fs::write(project.join("Dockerfile"), dockerfile).unwrap();
    std::fs::write(project.join(".dockerignore"), "secret\n").unwrap();
    std::fs::write(project.join("secret"), "x").unwrap();
    let record = bench.build_artifact("mapped", Artifact::Directory(project)).await;
    assert_eq!(record.failure, None, "{}", bench.log("mapped"));
    let app = bench.engine.last_boot().app;
    assert_eq!(app.argv, ["python", "-m", "http.server"]);
    assert_eq!((app.workdir.as_str(), app.user.as_str()), ("/srv", "web"));
    assert_eq!(app.exposed, [port(9000), port(8080)]);
    let env = |name: &str| app.env.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    assert_eq!((env("A"), env("OVERRIDDEN"), env("HOME"), env("LANG")), (Some("1"), Some("by the request"), Some("/home/web"), Some("C.UTF-8")));
    assert_eq!(bench.on_disk("mapped", "cat /srv/made"), "made\n");
    assert_eq!(bench.on_disk("mapped", "cat /srv/doc"), "from a here-document\n");
    assert!(bench.on_disk("mapped", "stat /srv/Dockerfile").contains("User:  1234"));
    assert_eq!(bench.on_disk("mapped", "cat /srv/secret"), "", "left out by .dockerignore");
    assert!(bench.log("mapped").contains("--platform=linux/arm64 is left out"));
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_say_what_to_mend() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    let failing = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n\n# why\nRUN echo before && \\\n    echo the reason >&2 && exit 3\nCMD x\n";
    // buildah 1.28 reads a command's two streams from two pipes, in no order, and does not wait until both are read when the command
    // ends: the lines of the two may change places, and (seen once in some dozens of runs on a busy machine) some may be missing.
    let told = ["before\nthe reason", "the reason\nbefore"]
        .map(|output| format!("Dockerfile line 4 (RUN echo before && …) failed with exit status 3; the last lines of its output:\n{output}"));
    let mut message = String::new();
    for name in ["run", "run-again", "run-once-more"] {
        let (code, heard) = bench.failure(name, &[("Dockerfile", failing)]).await;
        assert_eq!(code, "CONTAINER_BUILD_FAILED");
        assert!(told.iter().any(|told| told.starts_with(&heard)), "{heard}");
        message = heard;
        if told.contains(&message) {
            break;
        }
    }
    assert!(told.contains(&message), "{message}");

    let (code, message) = bench.failure("copy", &[("Dockerfile", "FROM debian\nCOPY nope /x\nCMD x\n")]).await;
    assert_eq!(code, "CONTAINER_BUILD_FAILED");
    assert!(message.starts_with("Dockerfile line 2 (COPY nope /x) failed: ") && message.contains("no such file"), "{message}");

    let (code, message) = bench.failure("from", &[("Dockerfile", "\nFROM nowhere.invalid/x:1\nCMD x\n")]).await;
    assert_eq!(code, "CONTAINER_BUILD_FAILED");
    assert!(message.starts_with("Dockerfile line 2: the image nowhere.invalid/x:1 is not held by this node and could not be pulled ("), "{message}");
    assert!(message.contains("This node holds: ") && message.contains("debian:12"), "{message}");

    let (code, message) = bench.failure("nothing", &[("app.py", "")]).await;
    assert_eq!(code, "ARCHIVE_DOCKERFILE_NOT_FOUND");
    assert_eq!(message, "there is no Dockerfile at the root of the archive");

    let (code, message) = bench.failure("idle", &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]).await;
    assert_eq!(code, "CONTAINER_BUILD_FAILED");
    assert!(message.contains("needs a CMD or an ENTRYPOINT"), "{message}");

    let (code, message) = bench.failure("dnf", &[("Dockerfile", "FROM amazonlinux:2023\nRUN dnf groupinstall -y 'Development Tools'\n")]).await;
    assert_eq!(code, "CONTAINER_BUILD_FAILED");
    assert!(message.contains("line 2") && message.contains("groupinstall is not known here"), "{message}");

    let path = bench.dir.path().join("bad.zip");
    std::fs::write(&path, &zip(&[("Dockerfile", "FROM debian")])[..40]).unwrap();
    let failure = bench.build_artifact("bad", Artifact::Zip(path)).await.failure.unwrap();
    assert_eq!(failure.code, "ARCHIVE_INVALID");
    let bucket = bench.dir.path().join("bucket");
    std::fs::create_dir_all(bucket.join("prefix")).unwrap();
    std::fs::write(bucket.join("empty.zip"), "").unwrap();
    for (name, bucket, key, code) in [
        ("no-key", &bucket, "gone.zip", "S3_NO_SUCH_KEY"),
        ("prefix", &bucket, "prefix", "S3_NO_SUCH_KEY"),
        ("no-bucket", &bench.dir.path().join("none"), "gone.zip", "S3_NO_SUCH_BUCKET"),
        ("empty", &bucket, "empty.zip", "S3_INVALID_OBJECT"),
    ] {
        let artifact = Artifact::Object { uri: format!("s3://bucket/{key}"), bucket: bucket.clone(), object: bucket.join(key) };
        let failure = bench.build_artifact(name, artifact).await.failure.unwrap();
        assert!(failure.code == code && failure.message.contains(&format!("s3://bucket/{key}")), "{name}: {failure:?}");
    }
    let failure = bench.build_artifact("gone", Artifact::Zip(bench.dir.path().join("gone.zip"))).await.failure.unwrap();
    assert!(failure.message.contains("gone.zip cannot be read"), "{failure:?}");
    assert_eq!(bench.engine.boots.borrow().len(), 0, "nothing of this was booted");
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_come_up_fails_the_build() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    let files = [("Dockerfile", "FROM debian\nEXPOSE 7000\nCMD [\"/bin/app\"]\n")];
    *bench.engine.fail_boot.lock().unwrap() = Some((3, "Traceback\nImportError: nope\n"));
    let (code, message) = bench.failure("crash", &files).await;
    assert_eq!(code, "CONTAINER_BUILD_FAILED");
    assert_eq!(message, "the app (/bin/app) ended with exit code 3 before the snapshot was taken; the last lines of its output:\nTraceback\nImportError: nope");
    assert!(bench.log("crash").contains("\nImportError: nope\n"));
    assert!(bench.catalog.lease(&image("crash"), None).is_err());
    let facts = bench.catalog.get(&image("crash"), ImageVersion::FIRST).unwrap().build;
    assert!(facts.code_bytes.is_some() && facts.memory_bytes.is_none(), "the container was built, the snapshot was not taken: {facts:?}");

    // Nobody listens on 7000, so this one waits for its limit.
    let dir = tempfile::tempdir().unwrap();
    let limits = image_builder::BuilderConfig { ready_timeout: Duration::from_secs(1), ..config(dir.path()) };
    let catalog = Catalog::open(limits, Arc::new(bench.engine.clone())).await.unwrap();
    let path = dir.path().join("a.zip");
    std::fs::write(&path, zip(&files)).unwrap();
    catalog.create(request("silent", Artifact::Zip(path))).await.unwrap();
    let failure = within(catalog.finished(&image("silent"), ImageVersion::FIRST)).await.unwrap().failure.unwrap();
    assert_eq!(failure.code, "CONTAINER_BUILD_FAILED");
    assert!(failure.message.contains("did not listen on port 7000, which the Dockerfile EXPOSEs, within 1 s"), "{failure:?}");
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_run_side_by_side_up_to_the_limit() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    bench.engine.permits.forget_permits(usize::MAX >> 4);
    let path = bench.dir.path().join("a.zip");
    std::fs::write(&path, zip(&[("Dockerfile", "FROM debian\nEXPOSE 8080\nCMD x\n")])).unwrap();
    let names = ["a", "b", "c", "d"];
    for name in names {
        let image = bench.catalog.create(request(name, Artifact::Zip(path.clone()))).await.unwrap();
        assert!(matches!(image.versions[0].state, BuildState::Pending | BuildState::InProgress));
    }
    // Of two callers with one name, one is refused.
    assert!(matches!(bench.catalog.create(request("a", Artifact::Zip(path.clone()))).await, Err(CatalogError::NameTaken(_))));

    let mut boots = bench.engine.boots.subscribe();
    within(boots.wait_for(|boots| boots.len() == 2)).await.unwrap();
    let states = |wanted: BuildState| records(&bench.catalog).iter().filter(|record| record.state == wanted).count();
    assert_eq!((states(BuildState::InProgress), states(BuildState::Pending)), (2, 2));
    bench.engine.permits.add_permits(4);
    for name in names {
        let record = within(bench.catalog.finished(&image(name), ImageVersion::FIRST)).await.unwrap();
        assert_eq!(record.failure, None);
    }
    assert_eq!(bench.engine.most_under_way.load(Ordering::SeqCst), 2);
    assert_eq!(records(&bench.catalog).iter().map(|record| record.name.to_string()).collect::<Vec<_>>(), names);
    bench.assert_clean();
}

/// The newest version of every image, by name.
fn records(catalog: &Catalog) -> Vec<ImageRecord> {
    catalog.images().into_iter().filter_map(|mut image| image.versions.pop()).collect()
}

/// A build that prints `sleeping` and then does not end by itself.
const SLEEPER: &str = "FROM debian\nRUN echo sleeping; setsid sh -c 'trap \"\" TERM; sleep 100000' & sleep 100000\nCMD x\n";

async fn sleeping(catalog: &Catalog, name: &str) {
    let log = catalog.build_log(&image(name), ImageVersion::FIRST);
    let asleep = async {
        while !std::fs::read_to_string(&log).is_ok_and(|text| text.contains("\nsleeping\n")) {
            tokio::task::yield_now().await;
        }
    };
    within(asleep).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_cancels_what_runs_and_what_waits() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    let path = bench.dir.path().join("a.zip");
    std::fs::write(&path, zip(&[("Dockerfile", SLEEPER)])).unwrap();
    for name in ["a", "b", "c"] {
        bench.catalog.create(request(name, Artifact::Zip(path.clone()))).await.unwrap();
    }
    let mut running = Vec::new();
    while running.len() < 2 {
        running = records(&bench.catalog).into_iter().filter(|record| record.state == BuildState::InProgress).collect();
        tokio::task::yield_now().await;
    }
    for record in &running {
        sleeping(&bench.catalog, record.name.as_str()).await;
    }
    within(bench.catalog.close(CancellationToken::new())).await;
    for record in records(&bench.catalog) {
        let failure = record.failure.expect("it was cancelled");
        assert_eq!((record.state, failure.code.as_str()), (BuildState::Failed, "INTERNAL_PLATFORM_ERROR"));
        assert!(failure.message.contains("the node was stopped"), "{failure:?}");
    }
    assert!(bench.catalog.create(request("late", Artifact::Zip(path))).await.is_err());
    bench.assert_clean();
}

#[test]
fn a_crash_leaves_failed_records_and_nothing_else() {
    if !can_build() {
        return;
    }
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let first = runtime();
    let bench = first.block_on(async {
        let bench = Bench::new().await;
        let path = bench.dir.path().join("a.zip");
        std::fs::write(&path, zip(&[("Dockerfile", SLEEPER)])).unwrap();
        bench.catalog.create(request("cut", Artifact::Zip(path))).await.unwrap();
        sleeping(&bench.catalog, "cut").await;
        bench
    });
    assert!(!processes_of(bench.dir.path()).is_empty());
    // No task of it runs on: as far as the disk and the build's processes can tell, this process was killed.
    first.shutdown_background();

    runtime().block_on(async {
        let catalog = Catalog::open(config(bench.dir.path()), Arc::new(bench.engine.clone())).await.unwrap();
        let record = catalog.get(&image("cut"), ImageVersion::FIRST).unwrap();
        assert_eq!(record.state, BuildState::Failed);
        assert!(record.failure.unwrap().message.contains("the node stopped while"));
        // What is finished is finished at once.
        assert!(within(catalog.finished(&image("cut"), ImageVersion::FIRST)).await.is_some());
        assert!(within(catalog.finished(&image("never"), ImageVersion::FIRST)).await.is_none());
    });
    bench.assert_clean();
}

/// An app whose hooks answer these statuses, one after the other; the paths it was asked for.
async fn hook_app(bench: &Bench, statuses: &[u16]) -> Arc<Mutex<Vec<String>>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    bench.engine.inner.listen(port(9000), listener.local_addr().unwrap());
    let (mut statuses, asked) = (VecDeque::from(statuses.to_vec()), Arc::new(Mutex::new(Vec::new())));
    let heard = Arc::clone(&asked);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let n = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            heard.lock().unwrap().push(request.split(' ').nth(1).unwrap().rsplit('/').next().unwrap().to_owned());
            let answer = format!("HTTP/1.1 {} x\r\ncontent-length: 0\r\n\r\n", statuses.pop_front().unwrap_or(599));
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    asked
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_say_when_a_snapshot_is_taken_and_whether_it_is_good() {
    if !can_build() {
        return;
    }
    let bench = Bench::new().await;
    let artifact = bench.dir.path().join("code.zip");
    std::fs::write(&artifact, zip(&[("Dockerfile", "FROM debian:bookworm-slim\nCMD [\"sleep\", \"9\"]\n")])).unwrap();
    let mut hooks = Hooks::none(port(9000));
    hooks.enable(Hook::Ready, Duration::from_secs(60));
    hooks.enable(Hook::Validate, Duration::from_secs(60));
    let build = async |name: &str, hooks| {
        let request = BuildRequest { hooks: Some(hooks), ..request(name, Artifact::Zip(artifact.clone())) };
        let record = bench.catalog.create(request).await.unwrap().versions.remove(0);
        within(bench.catalog.finished(&record.name, record.version)).await.unwrap()
    };
    let snapshot = |name: &str| bench.catalog.snapshot_dir(&image(name), ImageVersion::FIRST);

    let asked = hook_app(&bench, &[503, 503, 200, 503, 200]).await;
    let record = build("good", hooks).await;
    assert_eq!((record.state, record.failure.clone()), (BuildState::Successful, None), "{}", bench.log("good"));
    assert_eq!((record.ready_port, record.hooks), (Some(port(9000)), Some(hooks)));
    assert_eq!(*asked.lock().unwrap(), ["ready", "ready", "ready", "validate", "validate"]);
    let counts = bench.engine.inner.counts();
    assert_eq!((counts.captures, counts.launches, bench.engine.inner.running().len()), (1, 1, 0), "a clone was asked, and thrown away");
    assert!(bench.log("good").contains("The app's validate hook answered 200 on a clone of the snapshot"));

    // Not good: there is no such snapshot.
    hook_app(&bench, &[200, 500]).await;
    let record = build("invalid", hooks).await;
    assert_eq!(record.state, BuildState::Failed);
    assert_eq!(record.failure.unwrap().message, "Validate hook check failed: the application returned a server error (HTTP 5xx) response");
    assert!(!snapshot("invalid").exists() && bench.engine.inner.running().is_empty());

    // Never asked whether it is good.
    let asked = hook_app(&bench, &[500, 200, 200]).await;
    let record = build("never-ready", hooks).await;
    assert_eq!(record.failure.unwrap().message, "Ready hook check failed: the application returned a server error (HTTP 5xx) response");
    assert_eq!(*asked.lock().unwrap(), ["ready"]);
    assert!(!snapshot("never-ready").exists());

    bench.engine.inner.unlisten(port(9000));
    let record = build("deaf", Hooks { ready: Some(Duration::from_secs(1)), ..hooks }).await;
    assert_eq!(record.failure.unwrap().message, "Ready hook invocation timed out after PT1S");
    assert!(bench.log("deaf").contains("The ready hook did not answer 200 within 1 s: nobody listened on the hook port."));
    bench.assert_clean();
}
