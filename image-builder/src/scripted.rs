//! Builds whose ends a test decides, under a catalog that is otherwise the real one.

use std::{collections::HashMap, io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use model::{ImageName, ImageVersion, Port};
use tokio::sync::watch;
use vmm_runtime::engine::Engine;

use crate::{
    BuildFailure, BuildRequest, BuilderConfig, Catalog, CatalogError,
    failure::{self, Stop},
    job::{Builder, Job},
};

/// What a test tells of a build.
type Told = HashMap<(ImageName, ImageVersion), Option<BuildFailure>>;

/// Every build waits until it is told how it ends. A successful one leaves a file in its snapshot, a failed one the half of a
/// snapshot. Cheap to clone.
#[derive(Clone)]
pub struct ScriptedBuilds {
    told: Arc<watch::Sender<Told>>,
    requests: Arc<watch::Sender<Vec<BuildRequest>>>,
}

impl Default for ScriptedBuilds {
    fn default() -> Self {
        Self { told: Arc::new(watch::Sender::new(HashMap::new())), requests: Arc::new(watch::Sender::new(Vec::new())) }
    }
}

impl ScriptedBuilds {
    /// Settings for [`Self::catalog`], small enough to meet each limit.
    pub fn config(dir: &Path) -> BuilderConfig {
        BuilderConfig {
            dir: dir.to_owned(),
            base_dir: dir.to_owned(),
            max_concurrent_builds: 8,
            max_unfinished_builds: 8,
            max_images: 30,
            max_versions: 5,
            ready_timeout: Duration::from_secs(1),
            build_timeout: Duration::from_secs(1),
            size_seen: Default::default(),
            network: Default::default(),
            egress: Default::default(),
        }
    }

    /// A catalog that builds so.
    pub async fn catalog(&self, config: BuilderConfig, engine: Arc<dyn Engine>) -> Result<Catalog, CatalogError> {
        Catalog::open_with(config, engine, Arc::new(self.clone())).await
    }

    /// Ends a build, now or when it has begun; returns when the catalog has written that down.
    pub async fn end(&self, catalog: &Catalog, name: &str, version: ImageVersion, failure: Option<BuildFailure>) {
        let name: ImageName = name.parse().expect("a test names its images rightly");
        self.told.send_modify(|told| drop(told.insert((name.clone(), version), failure)));
        catalog.finished(&name, version).await;
        self.told.send_modify(|told| drop(told.remove(&(name, version))));
    }

    /// What was asked to be built and has begun, oldest first, once it is at least so much.
    pub async fn requests(&self, at_least: usize) -> Vec<BuildRequest> {
        let mut requests = self.requests.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        requests.wait_for(|requests| requests.len() >= at_least).await.map(|requests| requests.clone()).unwrap_or_default()
    }
}

#[async_trait]
impl Builder for ScriptedBuilds {
    async fn build(&self, job: Job<'_>) -> Result<Port, Stop> {
        self.requests.send_modify(|requests| requests.push(job.request.clone()));
        let key = (job.record.name.clone(), job.record.version);
        let leave = |file: &str| -> io::Result<()> {
            std::fs::create_dir_all(&job.workspace.dir)?;
            std::fs::write(&job.log, "the log\n")?;
            let dir = if file == "manifest.json" { job.snapshot.clone() } else { job.snapshot.with_file_name("tmp-half") };
            std::fs::create_dir(&dir)?;
            std::fs::write(dir.join(file), "x")
        };
        let mut told = self.told.subscribe();
        let failure = tokio::select! {
            told = told.wait_for(|told| told.contains_key(&key)) => told.ok().and_then(|told| told.get(&key).cloned()),
            () = job.cancel.cancelled() => return Err(Stop::Cancelled),
        };
        let file = if failure == Some(None) { "manifest.json" } else { "half" };
        leave(file).map_err(|error| failure::internal(error.to_string()))?;
        match failure {
            Some(None) => {
                (job.facts.code_bytes, job.facts.memory_bytes, job.facts.disk_bytes) = (Some(1), Some(2), Some(3));
                Ok(Port::new(8080).ok_or(Stop::Cancelled)?)
            }
            Some(Some(failure)) => Err(Stop::Failed(failure)),
            None => Err(Stop::Cancelled),
        }
    }
}
