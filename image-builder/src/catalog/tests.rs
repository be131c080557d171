//! The catalog's rules and what it makes of every state that a crash can leave, with builds whose ends the test decides.

use std::{collections::BTreeMap, fs, path::PathBuf};

use model::MemorySize;
use serde_json::json;
use vmm_runtime::loopback::LoopbackEngine;

use super::*;
use crate::{Artifact, BuildFailure, BuildState, image::BuildFacts, scripted::ScriptedBuilds};

struct Bench {
    dir: tempfile::TempDir,
    builds: ScriptedBuilds,
    catalog: Catalog,
}

const V1: ImageVersion = ImageVersion::FIRST;
const V2: ImageVersion = ImageVersion { major: 2, minor: 0 };
const V3: ImageVersion = ImageVersion { major: 3, minor: 0 };

fn image(name: &str) -> ImageName {
    name.parse().unwrap()
}

fn request(name: &str) -> BuildRequest {
    BuildRequest {
        name: image(name),
        artifact: Artifact::Directory("/nowhere".into()),
        memory: MemorySize::from_mib(512).unwrap(),
        environment: BTreeMap::new(),
        rights: Default::default(),
        hooks: None,
        tags: tags(name),
        request: json!({"asked": name}),
    }
}

fn tags(value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("team".to_owned(), value.to_owned())])
}

impl Bench {
    async fn new() -> Self {
        let (dir, builds) = (tempfile::tempdir().unwrap(), ScriptedBuilds::default());
        let catalog = Self::open(&builds, dir.path()).await;
        Self { dir, builds, catalog }
    }

    async fn open(builds: &ScriptedBuilds, dir: &Path) -> Catalog {
        builds.catalog(ScriptedBuilds::config(dir), Arc::new(LoopbackEngine::new())).await.unwrap()
    }

    /// What the next process finds, as if this one had been killed.
    async fn again(&mut self) {
        self.catalog = Self::open(&self.builds, self.dir.path()).await;
    }

    async fn built(&self, name: &str) {
        self.catalog.create(request(name)).await.unwrap();
        self.builds.end(&self.catalog, name, V1, None).await;
    }

    async fn updated(&self, name: &str, version: ImageVersion) {
        self.catalog.update(request(name)).await.unwrap();
        self.builds.end(&self.catalog, name, version, None).await;
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn change_json(&self, path: &str, member: &str, value: serde_json::Value) {
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(self.at(path)).unwrap()).unwrap();
        json[member] = value;
        fs::write(self.at(path), json.to_string()).unwrap();
    }

    fn versions(&self, name: &str) -> Vec<String> {
        self.catalog.image(&image(name)).map(|image| image.versions.iter().map(|record| record.version.to_string()).collect()).unwrap_or_default()
    }

    /// Files and directories of an image, but for those that it must have.
    fn odd(&self, name: &str) -> Vec<String> {
        let mut odd = Vec::new();
        for entry in fs::read_dir(self.at(name)).unwrap().flatten() {
            let file = entry.file_name().into_string().unwrap();
            if entry.path().is_dir() {
                odd.extend(fs::read_dir(entry.path()).unwrap().flatten().map(|inner| format!("{file}/{}", inner.file_name().display())));
            } else {
                odd.push(file);
            }
        }
        odd.retain(|path| path != "image.json" && !path.ends_with("/record.json") && !path.ends_with("/build.log"));
        odd.sort();
        odd
    }

    async fn trash_is_empty(&self) {
        self.catalog.inner.empty_trash().await;
        assert_eq!(fs::read_dir(self.at(".trash")).map(|entries| entries.count()).unwrap_or(0), 0);
    }
}

fn failure() -> Option<BuildFailure> {
    Some(BuildFailure { code: "CONTAINER_BUILD_FAILED".to_owned(), message: "no".to_owned() })
}

#[tokio::test]
async fn versions_survive_and_numbers_never_come_twice() {
    let mut bench = Bench::new().await;
    bench.built("a").await;
    bench.updated("a", V2).await;
    assert_eq!(bench.catalog.delete_version(image("a"), V2, || false).await.unwrap(), VersionState::Deleting);
    assert!(bench.catalog.version_gone(&image("a"), V2).await.is_none());
    bench.catalog.set_status(image("a"), V1, VersionStatus::Inactive).await.unwrap();
    bench.catalog.set_tags(image("a"), tags("new")).await.unwrap();
    let before = bench.catalog.image(&image("a")).unwrap();

    bench.again().await;
    let after = bench.catalog.image(&image("a")).unwrap();
    assert_eq!((after.facts.id.clone(), after.facts.last_version, after.facts.tags.clone()), (before.facts.id, V2, tags("new")));
    assert_eq!((after.versions[0].status, after.versions[0].build.clone()), (VersionStatus::Inactive, before.versions[0].build.clone()));
    assert_eq!(bench.catalog.lease(&image("a"), None).err(), Some(NotRunnable::NotActive));
    assert_eq!(bench.catalog.delete_version(image("a"), V2, || false).await.unwrap(), VersionState::Deleted);
    assert_eq!(bench.catalog.update(request("a")).await.unwrap().facts.last_version, V3);
    bench.builds.end(&bench.catalog, "a", V3, failure()).await;
    assert_eq!(bench.catalog.image(&image("a")).unwrap().state(), ImageState::UpdateFailed);
    assert_eq!(bench.odd("a"), ["1.0/snapshot"], "a failed build leaves its record and its log");
}

#[tokio::test]
async fn a_lease_keeps_a_version_and_its_image() {
    let bench = Bench::new().await;
    bench.built("a").await;
    bench.updated("a", V2).await;
    let lease = bench.catalog.lease(&image("a"), Some(V1)).ok().unwrap();
    assert!(matches!(bench.catalog.delete_version(image("a"), V1, || false).await, Err(CatalogError::VersionInUse)));
    assert!(matches!(bench.catalog.delete(image("a"), || false).await, Err(CatalogError::InUse)));
    assert_eq!(bench.catalog.delete_version(image("a"), V2, || false).await.unwrap(), VersionState::Deleting, "the other one is free");
    bench.catalog.version_gone(&image("a"), V2).await;
    assert!(lease.snapshot_dir().join("manifest.json").is_file());
    drop(lease);
    assert!(matches!(bench.catalog.delete(image("a"), || true).await, Err(CatalogError::InUse)), "a microVM of it is left");
    assert_eq!(bench.catalog.delete(image("a"), || false).await.unwrap(), ImageState::Deleting);
    assert!(bench.catalog.lease(&image("a"), None).is_err());
    assert!(bench.catalog.gone(&image("a")).await.is_none());
    assert_eq!(bench.catalog.lease(&image("a"), None).err(), Some(NotRunnable::UnknownImage));
}

#[tokio::test]
async fn a_deletion_that_a_crash_cut_off_is_finished() {
    let mut bench = Bench::new().await;
    bench.built("whole").await;
    bench.built("part").await;
    bench.updated("part", V2).await;
    // What is written before the caller is told.
    bench.change_json("whole/image.json", "deletion", json!("UNDER_WAY"));
    bench.change_json("part/1.0/record.json", "deletion", json!("UNDER_WAY"));
    bench.again().await;
    assert!(bench.catalog.image(&image("whole")).is_none() && !bench.at("whole").exists());
    assert_eq!(bench.versions("part"), ["2.0"]);
    assert!(!bench.at("part/1.0").exists());
    bench.trash_is_empty().await;
    assert_eq!(bench.catalog.delete(image("whole"), || false).await.unwrap(), ImageState::Deleted);
    // Crashed between the two renames of a deletion: the name is remembered and the files are there.
    bench.built("late").await;
    bench.change_json("late/image.json", "deletion", json!("UNDER_WAY"));
    fs::write(bench.at(".deleted/late"), "").unwrap();
    bench.again().await;
    assert!(bench.catalog.image(&image("late")).is_none());
    bench.built("late").await;
    assert!(!bench.at(".deleted/late").exists());
}

#[tokio::test]
async fn what_a_crash_left_of_a_build_is_cleaned_up_and_the_name_can_be_used() {
    let mut bench = Bench::new().await;
    bench.built("good").await;
    bench.catalog.create(request("cut")).await.unwrap();
    bench.catalog.update(request("good")).await.unwrap();
    bench.builds.requests(3).await;
    // A node of before made directories one by one; so did whoever restored half of a backup.
    fs::create_dir_all(bench.at("empty")).unwrap();
    fs::create_dir_all(bench.at("no-record/1.0/snapshot")).unwrap();
    fs::create_dir_all(bench.at("good/7.0")).unwrap();
    fs::write(bench.at("plain-file"), "x").unwrap();
    fs::write(bench.at("good/a-file"), "x").unwrap();
    fs::create_dir_all(bench.at(".work/new-1/1.0")).unwrap();
    fs::create_dir_all(bench.at(".trash/deep/er")).unwrap();
    // A snapshot that came after its build had been given up, halves of others, a record that was being written.
    for left in ["cut/1.0/snapshot", "cut/1.0/tmp-1", "good/1.0/tmp-2", "good/2.0/tmp-3"] {
        fs::create_dir_all(bench.at(left)).unwrap();
        fs::write(bench.at(left).join("memory"), "x").unwrap();
    }
    fs::write(bench.at("good/1.0/.tmp123"), "{").unwrap();
    fs::write(bench.at("good/.tmp123"), "{").unwrap();

    bench.again().await;
    let state = |name: &str| bench.catalog.image(&image(name)).map(|image| image.state());
    assert_eq!((state("cut"), state("good")), (Some(ImageState::CreateFailed), Some(ImageState::UpdateFailed)));
    assert!(bench.catalog.get(&image("cut"), V1).unwrap().failure.unwrap().message.contains("the node stopped while"));
    assert_eq!((bench.versions("good"), bench.odd("good"), bench.odd("cut")), (vec!["1.0".to_owned(), "2.0".to_owned()], vec!["1.0/snapshot".to_owned(), "a-file".to_owned()], vec![]));
    assert!(bench.catalog.lease(&image("good"), None).is_ok_and(|lease| lease.record().version == V1));
    bench.trash_is_empty().await;
    assert!(!bench.at(".work").exists());
    for name in ["empty", "no-record"] {
        assert!(!bench.at(name).exists(), "{name}");
        bench.built(name).await;
    }
    assert!(matches!(bench.catalog.create(request("plain-file")).await, Err(CatalogError::Storage { .. })));
    assert_eq!(fs::read_to_string(bench.at("plain-file")).unwrap(), "x");
    assert_eq!(fs::read_dir(bench.at(".work")).unwrap().count(), 0, "what could not be put in place is gone");
    bench.catalog.update(request("cut")).await.unwrap();
    bench.builds.end(&bench.catalog, "cut", V2, None).await;
    assert_eq!(bench.catalog.image(&image("cut")).unwrap().state(), ImageState::Updated);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_seen_as_failed_and_can_be_deleted() {
    let mut bench = Bench::new().await;
    for name in ["one", "both", "mixed-up", "whole"] {
        bench.built(name).await;
    }
    bench.updated("one", V2).await;
    // Cut short, of zeros as after a power failure, of another image; beside them what somebody may still need.
    fs::write(bench.at("one/1.0/record.json"), "{").unwrap();
    fs::write(bench.at("both/1.0/record.json"), [0; 64]).unwrap();
    fs::write(bench.at("both/image.json"), "").unwrap();
    fs::copy(bench.at("whole/1.0/record.json"), bench.at("mixed-up/1.0/record.json")).unwrap();
    let damaged = ["one", "both", "mixed-up"];
    let kept: Vec<String> = damaged.iter().map(|name| fs::read_to_string(bench.at(&format!("{name}/1.0/record.json"))).unwrap()).collect();

    // Twice: what the first start made of it is still what was found.
    for _ in 0..2 {
        bench.again().await;
        for (name, kept) in damaged.iter().zip(&kept) {
            let record = bench.catalog.get(&image(name), V1).unwrap();
            assert_eq!((record.state, record.shown_status()), (BuildState::Failed, VersionStatus::Inactive), "{name}");
            let why = record.failure.unwrap().message;
            assert!(why.contains("cannot be read") && why.contains(&format!("{name}/1.0")), "{why}");
            assert_eq!(bench.catalog.lease(&image(name), Some(V1)).err(), Some(NotRunnable::NotActive), "{name}");
            assert!(matches!(bench.catalog.set_status(image(name), V1, VersionStatus::Active).await, Err(CatalogError::NotActivatable(_))));
            assert_eq!(fs::read_to_string(bench.at(&format!("{name}/1.0/record.json"))).unwrap(), *kept, "{name}");
            assert!(bench.at(&format!("{name}/1.0/snapshot")).is_dir(), "a microVM may sleep on it: {name}");
        }
        assert_eq!(bench.catalog.image(&image("one")).unwrap().state(), ImageState::Updated);
        assert!(bench.catalog.lease(&image("one"), None).is_ok_and(|lease| lease.record().version == V2));
        assert_eq!(bench.odd("both").iter().filter(|file| file.starts_with("image.json.damaged-")).count(), 1);
    }

    assert!(matches!(bench.catalog.delete(image("both"), || true).await, Err(CatalogError::InUse)), "as long as something runs from it");
    for name in damaged {
        if name == "one" {
            bench.catalog.delete_version(image(name), V1, || false).await.unwrap();
            assert!(bench.catalog.version_gone(&image(name), V1).await.is_none());
            assert_eq!(bench.odd(name), ["2.0/snapshot"]);
        } else {
            bench.catalog.delete(image(name), || false).await.unwrap();
            assert!(bench.catalog.gone(&image(name)).await.is_none());
            bench.built(name).await;
        }
    }
    bench.again().await;
    assert_eq!(bench.versions("whole"), ["1.0"]);
    assert_eq!(bench.versions("one"), ["2.0"]);
}

#[tokio::test]
async fn images_of_nodes_before_updates_are_taken_over() {
    let mut bench = Bench::new().await;
    bench.built("old").await;
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(bench.at("old/1.0/record.json")).unwrap()).unwrap();
    for member in ["status", "deletion", "build"] {
        record.as_object_mut().unwrap().remove(member);
    }
    fs::write(bench.at("old/1.0/record.json"), record.to_string()).unwrap();
    fs::remove_file(bench.at("old/image.json")).unwrap();
    bench.again().await;
    let old = bench.catalog.image(&image("old")).unwrap();
    assert_eq!((old.state(), old.versions[0].build.clone(), old.facts.last_version), (ImageState::Created, BuildFacts::default(), V1));
    bench.again().await;
    assert_eq!(bench.catalog.image(&image("old")).unwrap().facts, old.facts, "it was written down");
    bench.updated("old", V2).await;
}

#[tokio::test]
async fn what_cannot_be_deleted_says_so_and_can_be_deleted_again() {
    let bench = Bench::new().await;
    bench.built("a").await;
    bench.updated("a", V2).await;
    // Nothing can be moved there.
    fs::write(bench.at(".trash"), "x").unwrap();
    assert_eq!(bench.catalog.delete_version(image("a"), V1, || false).await.unwrap(), VersionState::Deleting);
    let failed = bench.catalog.version_gone(&image("a"), V1).await.unwrap();
    assert_eq!((failed.shown_state(), failed.shown_status()), (VersionState::DeleteFailed, VersionStatus::Inactive));
    assert_eq!(bench.catalog.lease(&image("a"), Some(V1)).err(), Some(NotRunnable::NotActive));
    assert_eq!(bench.catalog.delete(image("a"), || false).await.unwrap(), ImageState::Deleting);
    assert_eq!(bench.catalog.gone(&image("a")).await.unwrap().state(), ImageState::DeleteFailed);
    assert!(matches!(bench.catalog.update(request("a")).await, Err(CatalogError::Busy(ImageState::DeleteFailed))));
    assert_eq!(bench.catalog.lease(&image("a"), None).err(), Some(NotRunnable::NotActive));
    fs::remove_file(bench.at(".trash")).unwrap();
    assert_eq!(bench.catalog.delete(image("a"), || false).await.unwrap(), ImageState::Deleting);
    assert!(bench.catalog.gone(&image("a")).await.is_none());
    bench.built("a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_callers_at_once_one_goes_on() {
    let bench = Bench::new().await;
    let creations = futures_of(16, |_| bench.catalog.create(request("a"))).await;
    assert_eq!(creations.iter().filter(|made| made.is_ok()).count(), 1);
    assert!(creations.iter().filter_map(|made| made.as_ref().err()).all(|error| matches!(error, CatalogError::NameTaken(_))));
    bench.builds.end(&bench.catalog, "a", V1, None).await;
    let updates = futures_of(16, |_| bench.catalog.update(request("a"))).await;
    assert_eq!(updates.iter().filter(|made| made.is_ok()).count(), 1);
    assert!(updates.iter().filter_map(|made| made.as_ref().err()).all(|error| matches!(error, CatalogError::Busy(ImageState::Updating))));
    bench.builds.end(&bench.catalog, "a", V2, None).await;
    // Every deletion is told the same; status changes are either before it or refused.
    let catalog = &bench.catalog;
    let (deletions, changes) = tokio::join!(
        futures_of(8, |_| catalog.delete_version(image("a"), V1, || false)),
        futures_of(8, |n| catalog.set_status(image("a"), V2, if n % 2 == 0 { VersionStatus::Inactive } else { VersionStatus::Active })),
    );
    // A change of the version while another is being deleted is refused, and so is nothing else.
    assert!(deletions.iter().all(|told| matches!(told, Ok(VersionState::Deleting | VersionState::Deleted))), "{deletions:?}");
    assert!(changes.iter().all(|told| matches!(told, Ok(_) | Err(CatalogError::Busy(ImageState::Updating)))), "{changes:?}");
    bench.catalog.version_gone(&image("a"), V1).await;
    assert_eq!(bench.versions("a"), ["2.0"]);
}

async fn futures_of<T>(n: usize, make: impl Fn(usize) -> T) -> Vec<T::Output>
where
    T: Future + Send,
    T::Output: Send,
{
    let mut futures: Vec<_> = (0..n).map(|n| Some(Box::pin(make(n)))).collect();
    let mut done: Vec<Option<T::Output>> = (0..n).map(|_| None).collect();
    std::future::poll_fn(move |context| {
        for (slot, out) in futures.iter_mut().zip(&mut done) {
            if let Some(future) = slot
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                (*slot, *out) = (None, Some(value));
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(done.iter_mut().filter_map(Option::take).collect()) } else { std::task::Poll::Pending }
    })
    .await
}

#[tokio::test]
async fn a_node_that_stops_marks_its_builds_and_takes_nothing_new() {
    let mut bench = Bench::new().await;
    bench.built("good").await;
    bench.catalog.create(request("a")).await.unwrap();
    bench.builds.requests(2).await;
    bench.catalog.close(CancellationToken::new()).await;
    assert_eq!(bench.catalog.get(&image("a"), V1).unwrap().state, BuildState::Failed);
    assert!(bench.catalog.create(request("late")).await.is_err());
    assert!(bench.catalog.delete(image("good"), || false).await.is_err());
    bench.again().await;
    assert!(bench.catalog.lease(&image("good"), None).is_ok());
    assert!(bench.catalog.get(&image("a"), V1).unwrap().failure.unwrap().message.contains("the node was stopped"));
}
