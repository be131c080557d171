//! The base images this node holds.
//!
//! Owns: the shared store below `base_dir` (containers/storage, written by buildah), the Debian 12 base that is made once by
//! mmdebstrap, and pulls from registries. Builds only read the shared store: each has a store of its own that is stacked on
//! top, so they never wait for each other and leave nothing here. Never runs anything of a Dockerfile.
//!
//! ```text
//! <base_dir>/storage   images: localhost/dormouse/base-debian12:<recipe>, and what was pulled
//! <base_dir>/driver    `overlay`, or `vfs` where the file system cannot carry overlays
//! <base_dir>/lock      held by whoever adds an image
//! <base_dir>/work-*    an addition under way
//! ```

use std::{
    fmt::Write as _,
    fs::File,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    build_log::Tail,
    reference::Reference,
    sandbox::{self, Ended, Job, Network, SandboxError},
};

/// Small, and with what a Dockerfile for AWS's base or for `python` expects: Python, pip, certificates, curl.
const PACKAGES: &str = "ca-certificates,curl,python3,python3-pip";
const DNF: &str = include_str!("base/dnf");
const CUSTOMISE: &str = include_str!("base/customise.sh");

/// One minute on a slow machine; the rest is for a slow mirror.
const MAKE_LIMIT: Duration = Duration::from_secs(20 * 60);
/// A pull is part of a build; this only keeps a stuck registry from holding the lock for ever.
const PULL_LIMIT: Duration = Duration::from_secs(10 * 60);
const QUICK_LIMIT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(100);

/// Shell functions for every script that runs buildah. STORE, RUN_DIR, DRIVER and (for builds) SHARED are variables.
pub(crate) const BUILDAH: &str = r#"
b() {
    if [ -n "${SHARED:-}" ]; then
        buildah --root "$STORE" --runroot "$RUN_DIR" --storage-driver "$DRIVER" --storage-opt "additionalimagestore=$SHARED" "$@"
    else
        buildah --root "$STORE" --runroot "$RUN_DIR" --storage-driver "$DRIVER" "$@"
    fi
}
"#;

const MAKE: &str = r#"
export CUSTOMISE="$1" DNF_DIR="$2"
name=$3 packages=$4
proxy=$(apt-config dump --format '%v' Acquire::http::Proxy 2>/dev/null || :)
set --
[ -z "$proxy" ] || set -- "--aptopt=Acquire::http::Proxy \"$proxy\""
mmdebstrap --mode=root --variant=minbase --include="$packages" "$@" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='sh "$CUSTOMISE" "$1" "$DNF_DIR"' \
    bookworm "$TMPDIR/base.tar"
echo 'I: importing the root into the image store'
container=$(b from scratch)
b add --quiet "$container" "$TMPDIR/base.tar" / >/dev/null
chmod 755 "$(b mount "$container")"
b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 --cmd '["/bin/sh"]' "$container"
b commit --quiet --rm "$container" "$name" >/dev/null
"#;

/// Why a base image could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The host lacks programs.
    #[error("building images needs {programs}, which this host does not have; install them with: apt-get install {packages}")]
    MissingPrograms {
        /// Their names.
        programs: String,
        /// The Debian packages they are in.
        packages: String,
    },
    /// The host lacks programs for the network of RUN steps, and there is none that they get instead.
    #[error(
        "the network that RUN steps have here needs {programs}, which this host does not have; install them with: apt-get install {packages} \
         (or build without a network: network = \"none\" in [build])"
    )]
    NoNetwork {
        /// Their names.
        programs: String,
        /// The Debian packages they are in.
        packages: String,
    },
    /// A program ran and failed.
    #[error("{doing} failed; the last lines of its output:\n{output}")]
    Failed {
        /// What was tried.
        doing: String,
        /// The end of what it printed.
        output: String,
    },
    /// The file system failed.
    #[error("{doing} failed")]
    Io {
        /// What was tried, on what.
        doing: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The sandbox could not be set up.
    #[error("the sandbox for builds failed")]
    Sandbox(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There was not enough time.
    #[error("{doing} did not end in time")]
    Timeout {
        /// What was tried.
        doing: String,
    },
    /// The host's disk is nearly full.
    #[error("{doing} was ended because the disk is nearly full")]
    DiskFull {
        /// What was tried.
        doing: String,
    },
    /// Asked to stop.
    #[error("{doing} was cancelled")]
    Cancelled {
        /// What was tried.
        doing: String,
    },
}

/// Where `ensure_base` and pulls say how far they are.
pub(crate) type Progress<'a> = &'a mut (dyn FnMut(&str) + Send);

/// Makes the Debian base image unless the node holds it (48–60 s and about 60 MB of packages), telling `progress` line by line.
/// Safe to call from several processes at once: one makes it, the others wait.
pub async fn ensure_base(base_dir: &Path, progress: &(dyn Fn(&str) + Send + Sync)) -> Result<(), BaseError> {
    let store = SharedStore::open(base_dir).await?;
    store.ensure_debian(&mut |line| progress(line), &CancellationToken::new()).await?;
    Ok(())
}

/// The store of base images.
#[derive(Debug, Clone)]
pub(crate) struct SharedStore {
    dir: PathBuf,
    driver: String,
}

impl SharedStore {
    /// Finds out, once per `base_dir`, how layers can be stored there.
    pub async fn open(base_dir: &Path) -> Result<Self, BaseError> {
        check_programs(&PROGRAMS)?;
        std::fs::create_dir_all(base_dir).map_err(io_error(|| format!("making {}", base_dir.display())))?;
        let dir = base_dir.canonicalize().map_err(io_error(|| format!("finding {}", base_dir.display())))?;
        let lock = Lock::take(&dir, &CancellationToken::new()).await?;
        let path = dir.join("driver");
        let driver = match std::fs::read_to_string(&path) {
            Ok(known) => known.trim().to_owned(),
            Err(_) => {
                let probe = Self { dir: dir.clone(), driver: "overlay".to_owned() };
                let works = probe.quick("b info >/dev/null", Vec::new(), "asking buildah for its storage").await.is_ok();
                let driver = if works { "overlay" } else { "vfs" };
                std::fs::write(&path, driver).map_err(io_error(|| format!("writing {}", path.display())))?;
                driver.to_owned()
            }
        };
        drop(lock);
        Ok(Self { dir, driver })
    }

    pub fn driver(&self) -> &str {
        &self.driver
    }

    pub fn storage(&self) -> PathBuf {
        self.dir.join("storage")
    }

    /// Full names of all images, sorted.
    pub async fn held(&self) -> Result<Vec<String>, BaseError> {
        if !self.storage().is_dir() {
            return Ok(Vec::new());
        }
        let output = self.quick("b images --format '{{.Name}}:{{.Tag}}'", Vec::new(), "listing the base images").await?;
        let mut names: Vec<String> = output.lines().filter(|name| !name.contains("<none>")).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// The name of the Debian base, which is made first if need be.
    pub async fn ensure_debian(&self, progress: Progress<'_>, cancel: &CancellationToken) -> Result<String, BaseError> {
        let name = debian_name();
        if self.held().await?.contains(&name) {
            return Ok(name);
        }
        progress("Waiting for the lock of the base images.");
        let lock = Lock::take(&self.dir, cancel).await?;
        // Somebody else may have made it meanwhile.
        if self.held().await?.contains(&name) {
            return Ok(name);
        }
        progress("Making the Debian 12 base image with mmdebstrap; this is done once on this host.");
        let work = self.work_dir(&lock)?;
        let (customise, dnf) = (work.path().join("customise.sh"), work.path().join("dnf"));
        std::fs::write(&customise, CUSTOMISE).map_err(io_error(|| format!("writing {}", customise.display())))?;
        std::fs::write(&dnf, DNF).map_err(io_error(|| format!("writing {}", dnf.display())))?;
        let begun = Instant::now();
        let args = sandbox::args([&customise, &work.path(), &name, &PACKAGES]);
        self.run(MAKE, args, work.path(), MAKE_LIMIT, cancel, "making the Debian 12 base image with mmdebstrap", progress).await?;
        progress(&format!("The base image {name} was made in {:.0} s.", begun.elapsed().as_secs_f64()));
        Ok(name)
    }

    /// Pulls an image into the store.
    pub async fn pull(&self, reference: &Reference, progress: Progress<'_>, cancel: &CancellationToken) -> Result<(), BaseError> {
        let lock = Lock::take(&self.dir, cancel).await?;
        let work = self.work_dir(&lock)?;
        let name = reference.to_string();
        let args = sandbox::args([&name]);
        // Retries would only make a wrong name slow.
        self.run("b pull --retry 1 \"$1\"", args, work.path(), PULL_LIMIT, cancel, &format!("pulling {name}"), progress).await?;
        Ok(())
    }

    /// A directory for an addition. Additions hold the lock, so what others left here is of a process that was killed.
    fn work_dir(&self, _held: &Lock) -> Result<tempfile::TempDir, BaseError> {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("work-")
                && let Err(error) = std::fs::remove_dir_all(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "what a killed process left cannot be removed");
            }
        }
        tempfile::Builder::new().prefix("work-").tempdir_in(&self.dir).map_err(io_error(|| format!("making a directory in {}", self.dir.display())))
    }

    async fn quick(&self, script: &str, args: Vec<std::ffi::OsString>, doing: &str) -> Result<String, BaseError> {
        let work = tempfile::tempdir().map_err(io_error(|| "making a temporary directory".to_owned()))?;
        self.run(script, args, work.path(), QUICK_LIMIT, &CancellationToken::new(), doing, &mut |_| {}).await
    }

    #[expect(clippy::too_many_arguments, reason = "one private function, and each argument differs between its callers")]
    async fn run(
        &self,
        script: &str,
        args: Vec<std::ffi::OsString>,
        work: &Path,
        limit: Duration,
        cancel: &CancellationToken,
        doing: &str,
        progress: Progress<'_>,
    ) -> Result<String, BaseError> {
        let script = format!("{BUILDAH}{script}");
        let env = vec![("STORE", self.storage().into()), ("RUN_DIR", work.join("run").into()), ("DRIVER", (&self.driver).into())];
        let job = Job { script: &script, args, env, dir: work, network: Network::Host, deadline: Instant::now() + limit, cancel };
        let mut output = Tail::default();
        let ended = sandbox::run(job, &mut |line| {
            output.push(line);
            progress(line);
        })
        .await
        .map_err(|error: SandboxError| BaseError::Sandbox(Box::new(error)))?;
        let doing = doing.to_owned();
        match ended {
            Ended::Exit(0) => Ok(output.last(Tail::LINES)),
            Ended::Exit(_) => Err(BaseError::Failed { doing, output: output.last(20) }),
            Ended::DeadlinePassed => Err(BaseError::Timeout { doing }),
            Ended::Cancelled => Err(BaseError::Cancelled { doing }),
            Ended::DiskFull => Err(BaseError::DiskFull { doing }),
        }
    }
}

/// `localhost/dormouse/base-debian12:<hash of the recipe>`: another recipe is another image.
fn debian_name() -> String {
    let mut hash = Sha256::new();
    for part in [PACKAGES, DNF, CUSTOMISE, MAKE] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let tag = hash.finalize().iter().take(6).fold(String::new(), |mut tag, byte| {
        // Writing to a String cannot fail.
        let _ = write!(tag, "{byte:02x}");
        tag
    });
    format!("localhost/dormouse/base-debian12:{tag}")
}

fn io_error(doing: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> BaseError {
    move |source| BaseError::Io { doing: doing(), source }
}

/// Programs, and the Debian packages they are in.
const PROGRAMS: [(&str, &str); 4] =
    [("buildah", "buildah"), ("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs"), ("unshare", "util-linux")];
const NETWORK_PROGRAMS: [(&str, &str); 2] = [("slirp4netns", "slirp4netns"), ("ip", "iproute2")];

/// Whether RUN steps can have a network; there is no other one that they get instead.
pub(crate) fn check_network(network: &Network<'_>) -> Result<(), BaseError> {
    let needed = match network {
        Network::Host => &[],
        Network::Nothing => &NETWORK_PROGRAMS[1..],
        Network::Internet(_) => &NETWORK_PROGRAMS[..],
    };
    check_programs(needed).map_err(|error| match error {
        BaseError::MissingPrograms { programs, packages } => BaseError::NoNetwork { programs, packages },
        other => other,
    })
}

fn check_programs(needed: &[(&str, &str)]) -> Result<(), BaseError> {
    let there = |program: &str| sandbox::PATH.split(':').any(|dir| Path::new(dir).join(program).is_file());
    let missing: Vec<_> = needed.iter().filter(|(program, _)| !there(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let join = |pick: fn(&&(&str, &str)) -> String, by: &str| missing.iter().map(pick).collect::<Vec<_>>().join(by);
    Err(BaseError::MissingPrograms { programs: join(|pair| pair.0.to_owned(), ", "), packages: join(|pair| pair.1.to_owned(), " ") })
}

/// An advisory lock on `<base_dir>/lock`, across processes. It ends with the process that holds it.
struct Lock {
    _file: File,
}

impl Lock {
    async fn take(dir: &Path, cancel: &CancellationToken) -> Result<Self, BaseError> {
        let path = dir.join("lock");
        let doing = || format!("locking {}", path.display());
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error(doing))?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(BaseError::Io { doing: doing(), source: error.into() }),
            }
            // Polled, because a blocking flock could not be cancelled.
            tokio::select! {
                () = cancel.cancelled() => return Err(BaseError::Cancelled { doing: doing() }),
                () = tokio::time::sleep(LOCK_POLL) => {}
            }
        }
    }
}
