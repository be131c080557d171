//! One build from its artifact to its snapshot.
//!
//! Owns: the order of the steps and what each is told. Never touches records, and leaves its workspace to the caller to remove.
//!
//! ```text
//! artifact ──► context ──► Dockerfile ──► container image ──► root disk + AppSpec ──► booted guest ──► ready ──► snapshot
//!                                                                                        (/validate, on a clone) ◄──┘
//! ```
//!
//! Ready is what the app's `/ready` hook says, if it has one; without, an app that listens.

use std::{
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hooks::{HookFailed, Outcome};
use model::{Hook, Hooks, MicrovmId, Port, Shape};
use protocol::agent::AppSpec;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vmm_runtime::engine::{BootSpec, Engine, EngineError, Exit, LaunchSpec, Vm};

use crate::{
    BuildRequest,
    archive::{self, Limits},
    base::SharedStore,
    build_log::{BuildLog, Tail},
    container::{self, Build, Workspace},
    dockerfile::Dockerfile,
    failure::{self, Stop},
    image::BuildFacts,
    image_config,
    rootfs,
    sandbox::{self, Network},
};

/// Where an engine keeps what the app printed, below the directory of a boot. An engine that does not is no trouble.
const APP_LOG: &str = "log/app.log";
/// Of the app's output, this much goes into the build log.
const APP_LOG_BYTES: u64 = 1 << 20;
/// Lines of the app's output that go into a failure.
const SHOWN_LINES: usize = 15;

/// What a build needs.
pub(crate) struct Inputs<'a> {
    pub request: &'a BuildRequest,
    pub shape: Shape,
    pub store: &'a SharedStore,
    pub engine: &'a Arc<dyn Engine>,
    pub workspace: &'a Workspace,
    pub log: &'a mut BuildLog,
    /// Names the build in logs.
    pub label: String,
    /// Where the snapshot goes; does not exist yet.
    pub snapshot: PathBuf,
    /// What is found out on the way.
    pub facts: &'a mut BuildFacts,
    /// Which network RUN steps have.
    pub network: Network<'a>,
    pub build_timeout: Duration,
    pub ready_timeout: Duration,
    pub cancel: &'a CancellationToken,
}

/// Returns the port that listened when the snapshot was taken.
pub(crate) async fn run(inputs: Inputs<'_>) -> Result<Port, Stop> {
    let Inputs { request, shape, store, engine, workspace, log, label, snapshot, facts, network, build_timeout, ready_timeout, cancel } = inputs;
    let begun = Instant::now();
    let context = workspace.context();
    for dir in [&context, &workspace.boot()] {
        std::fs::create_dir_all(dir).map_err(|error| failure::internal(format!("making {} failed: {error}", dir.display())))?;
    }
    let dockerfile = unpack(request, &context, cancel).await?;
    log.note(&format!("The archive was unpacked ({:.1} s).", begun.elapsed().as_secs_f64()));

    let step = Instant::now();
    let mut build = Build { store, workspace, log, network, limit: build_timeout, deadline: Instant::now() + build_timeout, cancel };
    container::build(&mut build, &dockerfile).await?;
    build.log.note(&format!("The container image was built ({:.1} s).", step.elapsed().as_secs_f64()));

    let step = Instant::now();
    let mut root = rootfs::export(&mut build, shape, &dockerfile.exposed).await?;
    build.log.note(&format!(
        "The root disk was written: {} MiB of data on {} GiB ({:.1} s).",
        root.disk_bytes >> 20,
        shape.disk_gib,
        step.elapsed().as_secs_f64()
    ));
    facts.code_bytes = Some(root.disk_bytes);
    for (name, value) in &request.environment {
        image_config::set(&mut root.app.env, name, value);
    }
    root.app.rights = request.rights;
    let app = root.app;
    let mut guest = Guest { engine, workspace, log, app: &app, hooks: request.hooks, facts, cancel };
    let port = guest.boot_and_capture(label, shape, snapshot.clone(), ready_timeout).await?;
    if let Some(hooks) = request.hooks.filter(|hooks| hooks.validate.is_some())
        && let Err(stop) = guest.validate(&hooks, &snapshot).await
    {
        // What is not valid is not there, and nothing waits ready for it.
        engine.forget(snapshot.clone()).await;
        if let Err(error) = sandbox::remove_dir(snapshot.clone()).await {
            tracing::warn!(path = %snapshot.display(), %error, "a snapshot that is not valid cannot be removed");
        }
        return Err(stop);
    }
    Ok(port)
}

async fn unpack(request: &BuildRequest, context: &Path, cancel: &CancellationToken) -> Result<Dockerfile, Stop> {
    let (artifact, context, cancel) = (request.artifact.clone(), context.to_owned(), cancel.clone());
    let unpacked = tokio::task::spawn_blocking(move || {
        archive::unpack(&artifact, &context, Limits::DEFAULT, &cancel)?;
        let path = context.join("Dockerfile");
        let bytes = std::fs::read(&path).map_err(|error| failure::internal(format!("reading {} failed: {error}", path.display())))?;
        Ok(Dockerfile::parse(&bytes)?)
    });
    unpacked.await.unwrap_or_else(|error| Err(failure::internal(format!("unpacking the archive ended unexpectedly: {error}"))))
}

/// The second half of a build: what is done with a guest.
struct Guest<'a> {
    engine: &'a Arc<dyn Engine>,
    workspace: &'a Workspace,
    log: &'a mut BuildLog,
    app: &'a AppSpec,
    hooks: Option<Hooks>,
    facts: &'a mut BuildFacts,
    cancel: &'a CancellationToken,
}

impl Guest<'_> {
    async fn boot_and_capture(&mut self, label: String, shape: Shape, snapshot: PathBuf, ready_timeout: Duration) -> Result<Port, Stop> {
        let step = Instant::now();
        self.log.note(&format!("Starting {} in a microVM of {} MiB.", shown_command(self.app), shape.memory_mib));
        let boot = self.workspace.boot();
        let spec = BootSpec { name: label, dir: boot.clone(), root_disk: self.workspace.root_disk(), shape, app: self.app.clone() };
        // Dropping a boot that is under way ends its guest: that is what a cancel needs.
        let booted = self.unless_cancelled(self.engine.boot(spec)).await?;
        let vm = booted.map_err(|error| engine_failure(&error, self.app, &copy_app_log(&boot, self.log)))?;
        let captured = self.capture_when_ready(&vm, step, snapshot, ready_timeout).await;
        if captured.is_err() {
            vm.kill().await;
        }
        captured
    }

    async fn capture_when_ready(&mut self, vm: &Arc<dyn Vm>, booted: Instant, snapshot: PathBuf, ready_timeout: Duration) -> Result<Port, Stop> {
        let boot = self.workspace.boot();
        let (port, output) = match self.hooks.filter(|hooks| hooks.ready.is_some()) {
            Some(hooks) => {
                let called = self.unless_cancelled(hooks::call(vm.as_ref(), &hooks, Hook::Ready, None)).await?;
                let output = copy_app_log(&boot, self.log);
                called.map_err(|failed| self.hook_failure(failed, &output))?;
                self.log.note(&format!("The app's ready hook answered 200 ({:.1} s).", booted.elapsed().as_secs_f64()));
                (hooks.port, output)
            }
            None => {
                let ready = self.unless_cancelled(vm.ready(ready_timeout)).await?;
                let output = copy_app_log(&boot, self.log);
                let port = ready.map_err(|error| engine_failure(&error, self.app, &output))?;
                self.log.note(&format!("The app listens on port {port} ({:.1} s).", booted.elapsed().as_secs_f64()));
                (port, output)
            }
        };
        let step = Instant::now();
        // Not given up half way: what has begun to commit would do so behind the back of a build that is already FAILED.
        let captured = self.engine.capture_image(Arc::clone(vm), snapshot).await;
        let image = captured.map_err(|error| engine_failure(&error, self.app, &output))?;
        (self.facts.memory_bytes, self.facts.disk_bytes) = (Some(image.memory_bytes), Some(image.disk_bytes));
        self.log.note(&format!(
            "The snapshot was taken: {} MiB of memory, {} MiB of disk ({:.1} s).",
            image.memory_bytes >> 20,
            image.disk_bytes >> 20,
            step.elapsed().as_secs_f64()
        ));
        Ok(port)
    }

    /// Asks a clone of the snapshot whether it is good, and throws it away.
    async fn validate(&mut self, hooks: &Hooks, snapshot: &Path) -> Result<(), Stop> {
        let step = Instant::now();
        let dir = self.workspace.validation();
        std::fs::create_dir_all(&dir).map_err(|error| failure::internal(format!("making {} failed: {error}", dir.display())))?;
        // The variables that a microVM is told at its start are in the image already.
        let spec = LaunchSpec { id: MicrovmId::random(), dir: dir.clone(), image_dir: snapshot.to_owned(), identity: Default::default(), egress: self.app.rights.egress };
        let launched = self.unless_cancelled(self.engine.launch(spec)).await?;
        let vm = launched.map_err(|error| engine_failure(&error, self.app, &copy_app_log(&dir, self.log)))?.vm;
        let called = self.unless_cancelled(hooks::call(vm.as_ref(), hooks, Hook::Validate, None)).await;
        vm.kill().await;
        let output = copy_app_log(&dir, self.log);
        called?.map_err(|failed| self.hook_failure(failed, &output))?;
        self.log.note(&format!("The app's validate hook answered 200 on a clone of the snapshot ({:.1} s).", step.elapsed().as_secs_f64()));
        Ok(())
    }

    fn hook_failure(&mut self, failed: HookFailed, output: &Tail) -> Stop {
        if let Outcome::Ended(exit) = failed.outcome {
            return engine_failure(&EngineError::Ended { step: "a hook", exit }, self.app, output);
        }
        self.log.note(&format!("The {} hook did not answer 200 within {} s: {}.", failed.hook.name(), failed.limit.as_secs(), failed.detail()));
        failure::container_build(failed.of_build())
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, Stop> {
        tokio::select! {
            done = work => Ok(done),
            () = self.cancel.cancelled() => Err(Stop::Cancelled),
        }
    }
}

/// Appends what the app of a guest printed to the build log, and keeps the end of it.
fn copy_app_log(guest_dir: &Path, log: &mut BuildLog) -> Tail {
    let mut tail = Tail::default();
    let Ok(mut file) = std::fs::File::open(guest_dir.join(APP_LOG)) else { return tail };
    let skipped = file.metadata().map(|metadata| metadata.len().saturating_sub(APP_LOG_BYTES)).unwrap_or(0);
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(skipped)).and_then(|_| file.take(APP_LOG_BYTES).read_to_end(&mut bytes)).is_err() {
        return tail;
    }
    for line in String::from_utf8_lossy(&bytes).lines() {
        log.line(line);
        tail.push(line);
    }
    tail
}

fn shown_command(app: &AppSpec) -> String {
    let command = app.argv.join(" ");
    if command.chars().count() > 120 { command.chars().take(120).chain(" …".chars()).collect() } else { command }
}

/// Whose fault it is that the engine did not get to the end.
fn engine_failure(error: &EngineError, app: &AppSpec, output: &Tail) -> Stop {
    let command = shown_command(app);
    let shown = output.last(SHOWN_LINES);
    let output = if shown.is_empty() { "; it printed nothing".to_owned() } else { format!("; the last lines of its output:\n{shown}") };
    match error {
        EngineError::Ended { exit: Exit::App { code }, .. } => {
            failure::container_build(format!("the app ({command}) ended with exit code {code} before the snapshot was taken{output}"))
        }
        EngineError::GuestTimeout { limit, .. } if !app.exposed.is_empty() => {
            let ports: Vec<String> = app.exposed.iter().map(Port::to_string).collect();
            let (noun, ports) = (if ports.len() == 1 { "port" } else { "any of the ports" }, ports.join(", "));
            failure::container_build(format!(
                "the app ({command}) did not listen on {noun} {ports}, which the Dockerfile EXPOSEs, within {} s{output}",
                limit.as_secs()
            ))
        }
        EngineError::GuestTimeout { limit, .. } => {
            failure::container_build(format!("the app ({command}) did not listen on any port within {} s{output}", limit.as_secs()))
        }
        other => failure::internal_error(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BuildFailure;

    fn message(error: EngineError, exposed: &[u16], printed: &[&str]) -> BuildFailure {
        let exposed = exposed.iter().filter_map(|port| Port::new(*port)).collect();
        let app = AppSpec { argv: vec!["python3".into(), "app.py".into()], env: vec![], workdir: "/".into(), user: String::new(), exposed, rights: Default::default() };
        let mut output = Tail::default();
        printed.iter().for_each(|line| output.push(line));
        match engine_failure(&error, &app, &output) {
            Stop::Failed(failure) => failure,
            Stop::Cancelled => panic!("nothing was cancelled"),
        }
    }

    #[test]
    fn an_app_that_ends_is_named_with_its_code_and_its_output() {
        let ended = EngineError::Ended { step: "waiting for the app", exit: Exit::App { code: 3 } };
        let failure = message(ended, &[], &["Traceback", "ImportError: nope"]);
        assert_eq!(failure.code, "CONTAINER_BUILD_FAILED");
        assert_eq!(
            failure.message,
            "the app (python3 app.py) ended with exit code 3 before the snapshot was taken; the last lines of its output:\nTraceback\nImportError: nope"
        );
    }

    #[test]
    fn silence_names_the_exposed_ports() {
        let timeout = || EngineError::GuestTimeout { step: "listen on a port", limit: Duration::from_secs(60), detail: String::new() };
        assert_eq!(
            message(timeout(), &[8080, 9000], &[]).message,
            "the app (python3 app.py) did not listen on any of the ports 8080, 9000, which the Dockerfile EXPOSEs, within 60 s; it printed nothing"
        );
        assert!(message(timeout(), &[80], &[]).message.contains("on port 80, which"));
        assert!(message(timeout(), &[], &[]).message.contains("on any port within 60 s"));
    }

    #[test]
    fn what_the_host_lacks_is_our_fault() {
        let failure = message(EngineError::Host { what: "there is no qemu-system-x86_64".to_owned() }, &[], &[]);
        assert_eq!(failure.code, "INTERNAL_PLATFORM_ERROR");
        assert!(failure.message.contains("qemu-system-x86_64"));
    }
}
