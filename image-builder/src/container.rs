//! The container build: a context and a Dockerfile become an image in a store that belongs to this build alone.
//!
//! Owns: how FROM finds its image, the run of buildah, and the sentence that says which line failed. Never decides where
//! things lie (see [`Workspace`]) or what becomes of the image.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    base::{BUILDAH, BaseError, SharedStore},
    build_log::{BuildLog, Tail},
    dockerfile::{self, Dockerfile, ImageUse, Step},
    failure::{self, Stop},
    reference::Reference,
    sandbox::{self, Ended, Job, Network},
};

/// Name of the result in the build's own store.
pub(crate) const IMAGE: &str = "localhost/dormouse/build:1";
/// How buildah's error begins if a step failed; the step follows, quoted.
const AT_STEP: &str = "building at STEP \"";
/// Lines of a failed step's output that go into the failure.
const SHOWN_LINES: usize = 15;
/// `$1` context, `$2` Dockerfile, `$3` the result, `$4` a named context (`name=directory`) or nothing, `$5` the Debian base, `$6…` names
/// it stands in for. They are tagged at once: a second tag would begin again with the names that the shared store knows.
///
/// Docker's format keeps what OCI's has no place for and later stages inherit: ONBUILD and SHELL.
const BUILD: &str = r#"
context=$1 dockerfile=$2 image=$3 named=$4 base=$5
shift 5
[ $# = 0 ] || b tag "$base" "$@"
b bud --isolation chroot --cap-drop CAP_NET_RAW --cap-drop CAP_NET_ADMIN --pull-never --no-cache --format docker \
    ${named:+--build-context "$named"} --tag "$image" --file "$dockerfile" "$context"
"#;

/// Where one build keeps its things. All of it goes when the build ends.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    pub dir: PathBuf,
}

impl Workspace {
    pub fn context(&self) -> PathBuf {
        self.dir.join("context")
    }
    pub fn dockerfile(&self) -> PathBuf {
        self.dir.join("Dockerfile")
    }
    pub fn here_documents(&self) -> PathBuf {
        self.dir.join("here-documents")
    }
    pub fn boot(&self) -> PathBuf {
        self.dir.join("boot")
    }
    pub fn root_disk(&self) -> PathBuf {
        self.dir.join("root.raw")
    }
    pub fn validation(&self) -> PathBuf {
        self.dir.join("validation")
    }
}

/// What every step of a build is given.
pub(crate) struct Build<'a> {
    pub store: &'a SharedStore,
    pub workspace: &'a Workspace,
    pub log: &'a mut BuildLog,
    /// Which network RUN steps have.
    pub network: Network<'a>,
    /// How long the build has, counted from when its base images are there.
    pub limit: Duration,
    pub deadline: Instant,
    pub cancel: &'a CancellationToken,
}

impl Build<'_> {
    /// Runs a script with [`BUILDAH`] on this build's own store, stacked on the shared one.
    pub async fn run(&mut self, script: &str, args: Vec<OsString>, network: Network<'_>, line: &mut (dyn FnMut(&str) + Send)) -> Result<Ended, Stop> {
        let script = format!("{BUILDAH}{script}");
        let dir: &Path = &self.workspace.dir;
        let env = vec![
            ("STORE", dir.join("store").into()),
            ("RUN_DIR", dir.join("run").into()),
            ("DRIVER", self.store.driver().into()),
            ("SHARED", self.store.storage().into()),
        ];
        let job = Job { script: &script, args, env, dir, network, deadline: self.deadline, cancel: self.cancel };
        let log = &mut *self.log;
        let ended = sandbox::run(job, &mut |text| {
            log.line(text);
            line(text);
        })
        .await?;
        match ended {
            Ended::Cancelled => Err(Stop::Cancelled),
            Ended::DiskFull => Err(failure::disk_full("the build was ended because the disk of this node is nearly full")),
            other => Ok(other),
        }
    }
}

/// Builds [`IMAGE`].
pub(crate) async fn build(build: &mut Build<'_>, dockerfile: &Dockerfile) -> Result<(), Stop> {
    for note in &dockerfile.notes {
        build.log.note(note);
    }
    let resolved = resolve(build, dockerfile).await?;
    build.deadline = Instant::now() + build.limit;
    let path = build.workspace.dockerfile();
    write(&path, &dockerfile.text)?;
    let documents = build.workspace.here_documents();
    for (name, text) in &dockerfile.files {
        write(&documents.join(name), text)?;
    }
    let named = if dockerfile.files.is_empty() { String::new() } else { format!("{}={}", dockerfile::FILES, documents.display()) };
    let context = build.workspace.context();

    let mut args = sandbox::args([&context, &path, &IMAGE, &named, &resolved.base]);
    args.extend(resolved.aliases.into_iter().map(OsString::from));
    let mut seen = Seen::default();
    match build.run(BUILD, args, build.network.clone(), &mut |line| seen.line(line)).await? {
        Ended::Exit(0) => Ok(()),
        Ended::DeadlinePassed => {
            let place = seen.step(dockerfile).map(|step| format!("; it was at {}", place(step))).unwrap_or_default();
            Err(failure::container_build(format!("the container build did not end in time{place}")))
        }
        ended => Err(seen.failure(dockerfile, ended, &context)),
    }
}

/// Writes a file, and the directory that it lies in.
fn write(path: &Path, text: &str) -> Result<(), Stop> {
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
    written.map_err(|error| failure::internal(format!("writing {} failed: {error}", path.display())))
}

struct Resolved {
    /// Empty if it is not needed.
    base: String,
    /// Names under which the base is known to this build.
    aliases: Vec<String>,
}

/// Makes sure that every image the Dockerfile names is in the shared store, or is the base under another name.
async fn resolve(build: &mut Build<'_>, dockerfile: &Dockerfile) -> Result<Resolved, Stop> {
    let mut resolved = Resolved { base: String::new(), aliases: Vec::new() };
    let mut held = build.store.held().await?;
    for image in &dockerfile.images {
        let Some(reference) = Reference::parse(&image.reference) else {
            return Err(failure::container_build(format!("Dockerfile line {}: {:?} is not the name of an image", image.line, image.reference)));
        };
        let name = reference.to_string();
        if held.contains(&name) || held.contains(&format!("localhost/{}", image.reference)) {
            continue;
        }
        if reference.is_debian_base() {
            let log = &mut *build.log;
            resolved.base = build.store.ensure_debian(&mut |line| log.note(line), build.cancel).await?;
            build.log.note(&format!("{name} is this node's Debian 12 base image ({}).", resolved.base));
            resolved.aliases.push(name);
            continue;
        }
        pull(build, image, &reference, &held).await?;
        held.push(name);
    }
    Ok(resolved)
}

async fn pull(build: &mut Build<'_>, image: &ImageUse, reference: &Reference, held: &[String]) -> Result<(), Stop> {
    build.log.note(&format!("{reference} is not held by this node; trying to pull it."));
    let (log, cancel) = (&mut *build.log, build.cancel);
    let mut show = |line: &str| log.line(line);
    let pulled = tokio::select! {
        pulled = build.store.pull(reference, &mut show, cancel) => pulled,
        () = tokio::time::sleep_until(build.deadline) => Err(BaseError::Timeout { doing: format!("pulling {reference}") }),
    };
    let why = match pulled {
        Ok(()) => return Ok(()),
        Err(BaseError::Failed { output, .. }) => {
            let last = output.lines().rev().find_map(|line| line.strip_prefix("Error: ")).unwrap_or("it gave no reason");
            last.to_owned()
        }
        Err(error @ BaseError::Timeout { .. }) => error.to_string(),
        Err(error) => return Err(error.into()),
    };
    let mut here: Vec<&str> = held.iter().map(String::as_str).filter(|name| !name.starts_with("localhost/dormouse/")).collect();
    let and = if here.is_empty() { "" } else { "and, " };
    let stand_ins = format!("{and}as its Debian 12 base, public.ecr.aws/lambda/microvms:*, amazonlinux:*, debian:12 and python:3.11");
    here.push(&stand_ins);
    Err(failure::container_build(format!(
        "Dockerfile line {}: the image {} is not held by this node and could not be pulled ({why}). This node holds: {}",
        image.line,
        image.reference,
        here.join(", ")
    )))
}

/// `Dockerfile line 2 (RUN …)`.
fn place(step: &Step) -> String {
    format!("Dockerfile line {} ({})", step.line, step.text)
}

/// What buildah's output told so far.
#[derive(Debug, Default)]
struct Seen {
    /// Stage (if there are several), step, steps, and the step's text as buildah shows it.
    at: Option<(Option<usize>, usize, usize, String)>,
    /// Output since that step began.
    output: Tail,
    /// The last line that began with `Error: `.
    error: Option<String>,
}

impl Seen {
    fn line(&mut self, line: &str) {
        if let Some(at) = parse_step(line) {
            self.at = Some(at);
            self.output.clear();
            self.error = None;
        } else if let Some(error) = line.strip_prefix("Error: ") {
            self.error = Some(error.to_owned());
        } else if let Some(error) = self.error.as_mut().filter(|error| error.starts_with(AT_STEP)) {
            // The last that buildah says, and it quotes the step with all its lines.
            error.push('\n');
            error.push_str(line);
        } else if !is_noise(line) {
            self.output.push(line);
        }
    }

    fn step<'d>(&self, dockerfile: &'d Dockerfile) -> Option<&'d Step> {
        let (stage, step, total, _) = self.at.as_ref()?;
        dockerfile.step(*stage, *step, *total)
    }

    fn failure(&self, dockerfile: &Dockerfile, ended: Ended, context: &Path) -> Stop {
        let error = self.error.as_deref().unwrap_or_default();
        let full = |line: &str| line.to_ascii_lowercase().contains("no space left on device");
        let cause = self.cause(error, ended).replace(&*context.to_string_lossy(), "the archive");
        let shown = self.output.last(SHOWN_LINES);
        let output = if shown.is_empty() { String::new() } else { format!("; the last lines of its output:\n{shown}") };
        let unread = unresolved(error);
        let cause = unread.map_or(cause, |(_, why)| format!(": {why}"));
        let message = match unread.and_then(|(line, _)| dockerfile.step_on(line)).or_else(|| self.step(dockerfile)) {
            Some(step) => format!("{} failed{cause}{output}", place(step)),
            None => format!("the container build failed{cause}{output}"),
        };
        if full(error) || self.output.iter().rev().take(SHOWN_LINES).any(full) {
            failure::disk_full(message)
        } else if self.at.is_none() && error.is_empty() {
            // buildah did not even begin: nothing that was asked for is to blame.
            failure::internal(message)
        } else {
            failure::container_build(message)
        }
    }

    /// ` with exit status 1`, or `: <what buildah says>`.
    fn cause(&self, error: &str, ended: Ended) -> String {
        let text = self.at.as_ref().map(|(.., text)| text.as_str()).unwrap_or_default();
        let cause = match error.strip_prefix(AT_STEP) {
            // A script may quote anything, but this is how it ended.
            Some(quoted) if quoted.contains("\": exit status ") => &quoted[quoted.rfind("exit status ").unwrap_or_default()..],
            Some(quoted) => quoted.strip_prefix(&format!("{text}\": ")).or_else(|| quoted.split_once("\": ").map(|(_, cause)| cause)).unwrap_or(quoted),
            None => error,
        };
        match (cause, ended) {
            ("", Ended::Exit(code)) => format!(" with exit status {code}"),
            (cause, _) if cause.starts_with("exit status ") => format!(" with {cause}"),
            (cause, _) => format!(": {cause}"),
        }
    }
}

/// Of an instruction that buildah cannot read it says `resolving step {… StartLine:3 EndLine:3}: why`, while the step before it is
/// the last that it has named.
fn unresolved(error: &str) -> Option<(usize, &str)> {
    let (line, rest) = error.strip_prefix("resolving step {")?.rsplit_once(" StartLine:")?.1.split_once(" EndLine:")?;
    Some((line.parse().ok()?, rest.split_once("}: ")?.1))
}

/// Lines of buildah about what the failing command's output and the error line say better.
fn is_noise(line: &str) -> bool {
    line.starts_with("subprocess exited ") || (line.starts_with("time=\"") && line.contains("level="))
}

/// Reads `STEP 2/6: RUN x` and `[1/2] STEP 2/6: RUN x`.
fn parse_step(line: &str) -> Option<(Option<usize>, usize, usize, String)> {
    let (stage, rest) = match line.strip_prefix('[') {
        Some(rest) => {
            let (stage, rest) = rest.split_once("] ")?;
            (Some(stage.split_once('/')?.0.parse().ok()?), rest)
        }
        None => (None, line),
    };
    let (numbers, text) = rest.strip_prefix("STEP ")?.split_once(": ")?;
    let (step, total) = numbers.split_once('/')?;
    Some((stage, step.parse().ok()?, total.parse().ok()?, text.to_owned()))
}

#[cfg(test)]
mod tests;
