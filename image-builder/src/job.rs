//! What one build is told, and who does it.
//!
//! A seam: the catalog's rules (what may be asked when, what a crash leaves) have nothing to do with buildah and guests, so
//! tests put another [`Builder`] there.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use model::{BuildNetwork, Egress, Port};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use vmm_runtime::engine::Engine;

use crate::{
    BuildRequest, BuilderConfig, ImageRecord,
    base::{self, SharedStore},
    build_log::BuildLog,
    container::Workspace,
    failure::{self, Stop},
    image::BuildFacts,
    pipeline::{self, Inputs},
    sandbox::Network,
};

/// One build.
pub(crate) struct Job<'a> {
    pub request: &'a BuildRequest,
    pub record: &'a ImageRecord,
    /// What is found out on the way; also of a build that fails.
    pub facts: &'a mut BuildFacts,
    /// The caller removes it.
    pub workspace: &'a Workspace,
    /// Where the snapshot goes; does not exist yet.
    pub snapshot: PathBuf,
    /// Where the log goes.
    pub log: PathBuf,
    pub cancel: &'a CancellationToken,
}

/// Does builds.
#[async_trait]
pub(crate) trait Builder: Send + Sync + 'static {
    /// From the request to a snapshot on stable storage; the port that listened when it was taken.
    async fn build(&self, job: Job<'_>) -> Result<Port, Stop>;
}

/// Builds with buildah, and boots with an engine.
pub(crate) struct RealBuilder {
    config: BuilderConfig,
    engine: Arc<dyn Engine>,
    /// Opened by the first build, so that a node without buildah can still run the images it has.
    store: OnceCell<SharedStore>,
}

impl RealBuilder {
    pub fn new(config: BuilderConfig, engine: Arc<dyn Engine>) -> Self {
        Self { config, engine, store: OnceCell::new() }
    }

    async fn logged(&self, job: Job<'_>, log: &mut BuildLog) -> Result<Port, Stop> {
        let network = match (self.config.network, job.request.rights.egress) {
            (_, Egress::Nothing) | (BuildNetwork::Nothing, _) => Network::Nothing,
            (BuildNetwork::Internet, Egress::Internet) => Network::Internet(&self.config.egress),
            (BuildNetwork::Host, Egress::Internet) => Network::Host,
        };
        base::check_network(&network)?;
        let store = self.store.get_or_try_init(|| SharedStore::open(&self.config.base_dir)).await?;
        pipeline::run(Inputs {
            request: job.request,
            shape: job.record.shape,
            store,
            engine: &self.engine,
            workspace: job.workspace,
            log,
            label: format!("{}-{}", job.record.name, job.record.version),
            snapshot: job.snapshot,
            facts: job.facts,
            network,
            build_timeout: self.config.build_timeout,
            ready_timeout: self.config.ready_timeout,
            cancel: job.cancel,
        })
        .await
    }
}

#[async_trait]
impl Builder for RealBuilder {
    async fn build(&self, job: Job<'_>) -> Result<Port, Stop> {
        let path = job.log.clone();
        let mut log = BuildLog::create(&path).map_err(|error| failure::internal(format!("making {} failed: {error}", path.display())))?;
        let built = self.logged(job, &mut log).await;
        match &built {
            Ok(_) => log.note("The image is ready."),
            Err(Stop::Failed(failure)) => log.note(&format!("The build failed. {}: {}", failure.code, failure.message)),
            Err(Stop::Cancelled) => log.note("The build was cancelled because the node is stopping."),
        }
        built
    }
}
