//! Runs buildah and its kind where they can do no harm to the host and leave nothing behind.
//!
//! Owns: the namespaces, the clean environment, the time limit, the watch on disk space, and the certainty that when a
//! [`run`] has returned no process and no mount of it is left. Never knows what is run.
//!
//! buildah's `chroot` isolation alone shows a RUN step the host's `/dev` and process ids. So everything runs in mount, pid,
//! ipc and uts namespaces of its own, with a `/dev` of seven harmless devices; seccomp and the reduced capabilities are buildah's.
//! The network is what the job asks for (see [`network`]).
//!
//! There are two pid namespaces, one in the other. In the outer one are its first process (a shell) and slirp4netns, which has the
//! host's network and few powers; in the inner one is the job, which therefore cannot see them, trace them or borrow their network.
//!
//! The outer shell holds the *lifeline*: a pipe from this process. When the pipe closes, because a build is cancelled or because
//! this process was killed, the shell ends, and with it the kernel ends every process of both namespaces; their mounts go
//! with the last of them.

mod network;

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{io::AsyncReadExt, process::Command, time::Instant};
use tokio_util::sync::CancellationToken;

pub(crate) use self::network::Network;

/// Disk space that a build must leave to the host.
const RESERVE_BYTES: u64 = 1 << 30;
const DISK_CHECK_EVERY: Duration = Duration::from_secs(1);
/// How long the namespace has to end once its lifeline is cut. It is a SIGKILL; only a stuck disk takes longer.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Longer lines are broken.
const MAX_LINE_BYTES: usize = 4096;
/// Says that the sandbox stands and that what follows is the output of the job.
const READY: &str = "\u{1}sandbox-ready";

/// Runs as the first process of the outer namespaces: `$1` is the sandbox's directory, `$2` says which network the job has, the rest is
/// for [`INNER`].
const OUTER: &str = r#"
set -eu
exec 3<&0 </dev/null 2>&1
echo 500 >/proc/self/oom_score_adj || :
dir=$1 network=$2; shift 2
inside() { if [ "$network" = host ]; then "$@"; else nsenter --net="$dir/net" -- "$@"; fi; }
if [ "$network" != host ]; then
    : >"$dir/net"
    unshare --net="$dir/net" true
    inside ip link set lo up
fi
if [ "$network" = internet ]; then
    mkfifo "$dir/ready"
    slirp4netns --configure --mtu=65520 --disable-host-loopback --enable-sandbox --enable-seccomp --ready-fd=4 --netns-type=path \
        "$dir/net" tap0 3<&- 4>"$dir/ready" >"$dir/slirp.log" 2>&1 &
    [ "$(head -c 1 "$dir/ready")" = 1 ] || { cat "$dir/slirp.log"; echo 'slirp4netns did not start'; exit 1; }
    inside ip -batch "$dir/routes"
fi
inside unshare --mount --propagation private --pid --fork --mount-proc --ipc --uts "$@" 3<&- & job=$!
{ cat <&3 >/dev/null; kill -KILL "$job"; } &
exec 3<&-
wait "$job"
"#;

/// Runs as the first process of the inner namespaces: `$1` is the sandbox's directory, the rest is the job.
const INNER: &str = r#"
set -eu
dir=$1 dev=$1/dev; shift
mount -t tmpfs -o mode=755,nosuid,noexec,size=64k dev "$dev"
for name in null zero full random urandom tty; do : >"$dev/$name"; mount --bind "/dev/$name" "$dev/$name"; done
mkdir "$dev/pts" "$dev/shm" "$dev/mqueue"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev,size=64m shm "$dev/shm"
ln -s pts/ptmx "$dev/ptmx"
ln -s /proc/self/fd "$dev/fd"
ln -s fd/0 "$dev/stdin"; ln -s fd/1 "$dev/stdout"; ln -s fd/2 "$dev/stderr"
mount --move "$dev" /dev
# The one of the host shows the host's network cards.
[ ! -e "$dir/net" ] || mount -t sysfs -o ro,nosuid,nodev,noexec sysfs /sys
if [ -e "$dir/resolv.conf" ] && [ -e /etc/resolv.conf ]; then mount --bind "$dir/resolv.conf" /etc/resolv.conf; fi
printf '\001sandbox-ready\n'
"$@" & wait "$!"
"#;

/// Where programs are looked for.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables that decide how the outside world is reached; nothing else of this process's environment gets in.
const PASSED_ON: [&str; 6] = ["http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"];

/// What to run.
pub(crate) struct Job<'a> {
    /// For `sh -eu`; its `$1…` are `args`.
    pub script: &'a str,
    pub args: Vec<OsString>,
    /// Added to the clean environment.
    pub env: Vec<(&'static str, OsString)>,
    /// Belongs to this job alone: the sandbox keeps its home, its temporary files and its own things in it.
    pub dir: &'a Path,
    pub network: Network<'a>,
    pub deadline: Instant,
    pub cancel: &'a CancellationToken,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By itself; 128 + signal for a signal.
    Exit(i32),
    DeadlinePassed,
    Cancelled,
    /// It was ended because the host's disk was nearly full.
    DiskFull,
}

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("{doing} failed")]
    Io { doing: String, source: io::Error },
    #[error(
        "the sandbox for builds could not be set up ({output}); builds need root, util-linux and a kernel with namespaces and, \
         where build.network is not \"host\", iproute2, slirp4netns and /dev/net/tun"
    )]
    Setup { output: String },
}

/// Runs a job to its end, giving its output (both streams) away line by line.
pub(crate) async fn run(job: Job<'_>, line: &mut (dyn FnMut(&str) + Send)) -> Result<Ended, SandboxError> {
    let io = |doing: &str| {
        let doing = doing.to_owned();
        move |source| SandboxError::Io { doing, source }
    };
    let (home, tmp) = (job.dir.join("home"), job.dir.join("tmp"));
    for dir in [&home, &tmp] {
        std::fs::create_dir_all(dir).map_err(io("making directories for the sandbox"))?;
    }
    // A fresh one for each job in the directory.
    let own = tempfile::Builder::new().prefix("sandbox-").tempdir_in(job.dir).map_err(io("making a directory for the sandbox"))?;
    std::fs::create_dir(own.path().join("dev")).map_err(io("making directories for the sandbox"))?;
    job.network.prepare(own.path()).await?;
    let mut child = command(&job, own.path(), &home, &tmp).spawn().map_err(io("starting unshare(1)"))?;
    // Both are piped, so both are there.
    let (Some(lifeline), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(SandboxError::Setup { output: "unshare(1) has no pipes".to_owned() });
    };

    let mut lines = Lines::default();
    let (mut ready, mut before) = (false, String::new());
    let mut give = |text: &str| {
        if ready {
            line(text);
        } else if text == READY {
            ready = true;
        } else if before.len() < MAX_LINE_BYTES {
            before.push_str(text);
        }
    };
    let mut disk_check = tokio::time::interval(DISK_CHECK_EVERY);
    let mut buffer = vec![0; 16 << 10];
    // Every arm can be dropped without loss: a read either has taken bytes and wins, or has taken none.
    let stopped = loop {
        tokio::select! {
            read = output.read(&mut buffer) => match read {
                Ok(0) => break None,
                Ok(n) => lines.feed(&buffer[..n], &mut give),
                Err(source) => return Err(SandboxError::Io { doing: "reading the output of a build".to_owned(), source }),
            },
            () = job.cancel.cancelled() => break Some(Ended::Cancelled),
            () = tokio::time::sleep_until(job.deadline) => break Some(Ended::DeadlinePassed),
            _ = disk_check.tick() => if free_bytes(job.dir).is_some_and(|free| free < RESERVE_BYTES) { break Some(Ended::DiskFull) },
        }
    };
    drop(lifeline);
    let status = match tokio::time::timeout(END_LIMIT, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.start_kill().map_err(io("killing unshare(1)"))?;
            child.wait().await
        }
    };
    let status = status.map_err(io("waiting for unshare(1)"))?;
    lines.finish(&mut give);
    if !ready && stopped.is_none() {
        return Err(SandboxError::Setup { output: before });
    }
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
    Ok(stopped.unwrap_or(Ended::Exit(code)))
}

fn command(job: &Job<'_>, own: &Path, home: &Path, tmp: &Path) -> Command {
    // A build must not take the CPU from microVMs that answer requests. The outer shell joins the two streams.
    let unshare = "exec nice -n 10 unshare --mount --propagation private --pid --fork --kill-child --mount-proc \"$@\" 2>&1";
    let mut command = Command::new("sh");
    command.args(["-c", unshare, "dormouse-build", "sh", "-c", OUTER, "dormouse-build"]).arg(own).arg(job.network.word());
    command.args(["sh", "-c", INNER, "dormouse-build"]).arg(own);
    command.args(["sh", "-euc", job.script, "dormouse-build"]).args(&job.args);
    command.env_clear();
    command.env("PATH", PATH).env("LANG", "C.UTF-8");
    command.env("HOME", home).env("TMPDIR", tmp).env("XDG_RUNTIME_DIR", tmp);
    for name in PASSED_ON {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.envs(job.env.iter().map(|(name, value)| (OsStr::new(*name), value)));
    // The directory of a build may be gone at any time; `/` is not.
    command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    // Ctrl-C in a terminal is for `serve`, which then cancels the build in order.
    command.process_group(0);
    command
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Cuts bytes into lines of bounded length.
#[derive(Default)]
struct Lines {
    held: Vec<u8>,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8], give: &mut impl FnMut(&str)) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n' || *byte == b'\r') {
            self.held.extend_from_slice(part);
            let ends = part.ends_with(b"\n") || part.ends_with(b"\r");
            if ends || self.held.len() >= MAX_LINE_BYTES {
                self.finish(give);
            }
        }
    }

    /// Gives what is held, if it is more than an empty end of line.
    fn finish(&mut self, give: &mut impl FnMut(&str)) {
        let held = std::mem::take(&mut self.held);
        for part in held.chunks(MAX_LINE_BYTES) {
            let text = String::from_utf8_lossy(part);
            let text = text.trim_end_matches(['\n', '\r']);
            if !text.is_empty() {
                give(text);
            }
        }
    }
}

/// Arguments for [`Job::args`].
pub(crate) fn args<const N: usize>(args: [&dyn AsRef<OsStr>; N]) -> Vec<OsString> {
    args.iter().map(|arg| arg.as_ref().to_owned()).collect()
}

/// Removes a directory of a job. One that was cut off a moment ago may still hold processes that are ending.
pub(crate) async fn remove_dir(dir: PathBuf) -> io::Result<()> {
    let mut tries_left = 20;
    loop {
        let path = dir.clone();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(path)).await.unwrap_or_else(|error| Err(io::Error::other(error)));
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if tries_left > 0 => {
                tries_left -= 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests;
