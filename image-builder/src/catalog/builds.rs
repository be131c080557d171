//! Builds under way: each waits for its place, runs to its end, and is written down.
//!
//! Owns: the record of a version from PENDING to SUCCESSFUL or FAILED, and what the build leaves behind.

use std::{sync::Arc, time::SystemTime};

use model::Port;

use super::{Inner, blocking};
use crate::{
    BuildRequest, BuildState, ImageRecord, VERSION_VARIABLE,
    container::Workspace,
    failure::{self, Stop},
    job::Job,
    sandbox,
};

/// Writes the end of a build into its record.
pub(super) fn settle(record: &mut ImageRecord, outcome: Result<Port, Stop>) {
    record.updated_at = SystemTime::now().max(record.created_at);
    match outcome {
        Ok(port) => {
            record.state = BuildState::Successful;
            record.ready_port = Some(port);
        }
        Err(Stop::Failed(failure)) => {
            record.state = BuildState::Failed;
            record.failure = Some(failure);
        }
        Err(Stop::Cancelled) => settle(record, Err(failure::internal("the node was stopped while this image was being built; build it again"))),
    }
}

impl Inner {
    /// Runs a build to its end. Never fails: what goes wrong is in the record.
    pub(super) async fn build(self: Arc<Self>, mut request: BuildRequest, mut record: ImageRecord) {
        request.environment.insert(VERSION_VARIABLE.to_owned(), record.version.to_string());
        let place = tokio::select! {
            biased;
            () = self.cancel.cancelled() => None,
            // The semaphore is never closed.
            place = self.places.acquire() => place.ok(),
        };
        let outcome = if place.is_some() {
            record.state = BuildState::InProgress;
            record.updated_at = SystemTime::now().max(record.created_at);
            if let Err(error) = self.put(&record).await {
                tracing::error!(image = %record.name, %error, "the record of a build cannot be written");
            }
            tracing::info!(image = %record.name, version = %record.version, "building an image");
            let (inner, build) = (Arc::clone(&self), record.clone());
            // A task of its own: a panic in a build is the end of that build only.
            let attempt = self.tasks.spawn(async move { inner.attempt(&request, build).await });
            match attempt.await {
                Ok((outcome, facts)) => {
                    record.build = facts;
                    outcome
                }
                Err(error) => Err(failure::internal(format!("the build ended unexpectedly: {error}"))),
            }
        } else {
            Err(Stop::Cancelled)
        };
        let workspace = self.workspace(&record);
        if let Err(error) = sandbox::remove_dir(workspace.dir.clone()).await {
            tracing::warn!(path = %workspace.dir.display(), %error, "what a build left cannot be removed");
        }
        settle(&mut record, outcome);
        match &record.failure {
            None => tracing::info!(image = %record.name, version = %record.version, "an image was built"),
            Some(failure) => tracing::warn!(image = %record.name, version = %record.version, code = failure.code, reason = failure.message, "an image was not built"),
        }
        self.scrub(&record).await;
        if let Err(error) = self.put(&record).await {
            tracing::error!(image = %record.name, %error, "the record of a build cannot be written");
            // What is only in memory would be gone with this process, so it is not called done.
            settle(&mut record, Err(failure::internal(format!("the record of the build could not be written: {error}"))));
            record.ready_port = None;
            self.publish(&record.name.clone(), |entry| entry.put(record));
        }
    }

    async fn attempt(&self, request: &BuildRequest, record: ImageRecord) -> (Result<Port, Stop>, crate::BuildFacts) {
        let workspace = self.workspace(&record);
        let mut facts = record.build.clone();
        let job = Job {
            request,
            record: &record,
            facts: &mut facts,
            workspace: &workspace,
            snapshot: self.layout.snapshot(&record.name, record.version),
            log: self.layout.log(&record.name, record.version),
            cancel: &self.cancel,
        };
        let built = self.builder.build(job).await;
        (built, facts)
    }

    /// Removes what the build has left beside its record: the halves of a snapshot, or a whole one that came too late.
    async fn scrub(&self, record: &ImageRecord) {
        let (layout, scrubbed) = (self.layout.clone(), record.clone());
        if let Err(error) = blocking(move || layout.scrub(&scrubbed)).await {
            tracing::warn!(image = %record.name, version = %record.version, %error, "what a build left beside its record cannot be removed");
        }
    }

    fn workspace(&self, record: &ImageRecord) -> Workspace {
        Workspace { dir: self.layout.work().join(format!("{}-{}", record.name, record.version)) }
    }
}
