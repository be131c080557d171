//! One VMM process: started so that it outlives `serve`, known by more than its number, ended for certain.
//!
//! Owns: the process's own directory under the run directory (sockets, stdio, nothing of value), and the identity by
//! which a later `serve` finds it: process number and start time, and a command line that names that directory. A number
//! alone is never signalled; every signal goes through a pidfd whose identity was checked after it was opened.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{Mode, OFlags},
    process::{Pid, PidfdFlags, Signal},
};
use serde::{Deserialize, Serialize};

use super::cgroup;
use tokio::{io::unix::AsyncFd, net::UnixStream};

const OUTPUT: &str = "vmm.log";
/// How much of its own output is quoted.
const TAIL_BYTES: u64 = 2048;
/// Between two looks at whether a socket is there yet.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Ready processes are started with this, so that they do not compete with a wake.
const LOW_PRIORITY: i32 = 15;
/// `USER_HZ`, in which `/proc` counts; it is this on every x86 and arm64 Linux.
const TICKS_PER_SECOND: u64 = 100;

/// A process, for certain: numbers are used again, a number and a start time are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process number.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`, in clock ticks since the host booted.
    pub start_time: u64,
    /// Its own directory.
    pub dir: PathBuf,
}

/// How urgently a process is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Someone waits.
    Normal,
    /// Nobody waits.
    Low,
}

/// A process. Dropping it leaves it running.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    dir_fd: OwnedFd,
}

/// The fields of `/proc/<pid>/stat` after the name, which may hold blanks and parentheses.
fn stat_fields(pid: i32) -> io::Result<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(')').ok_or(io::ErrorKind::InvalidData)?;
    // The first is the state, a letter; it becomes 0 to keep the others in place.
    Ok(fields.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

/// Position of field `n` of proc(5) in [`stat_fields`].
const fn field(n: usize) -> usize {
    n - 3
}

fn start_time(pid: i32) -> io::Result<u64> {
    stat_fields(pid)?.get(field(22)).copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The argument by which a process of ours is known in `/proc/<pid>/cmdline`. Commas are doubled because QEMU would take
/// them for the ends of options.
pub fn name_argument(process_dir: &Path) -> String {
    format!("dormouse:{}", process_dir.display().to_string().replace(',', ",,"))
}

/// Whether the process's command line carries our name for that directory.
fn is_ours(pid: i32, dir: &Path) -> bool {
    let wanted = name_argument(dir);
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.split(|byte| *byte == 0).any(|argument| argument == wanted.as_bytes()))
}

/// The descriptor, known to tokio.
#[expect(unsafe_code, reason = "tokio cannot know that an `OwnedFd` keeps its descriptor")]
pub(crate) fn watched(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the `AsyncFd`, so it is open for as long as it is registered, and an `OwnedFd` never
    // changes its number.
    Ok(unsafe { AsyncFd::register(descriptor)? })
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

impl Process {
    /// Starts a program in a new directory of its own under `run_dir`; `arguments` is given that directory.
    pub fn start(program: &Path, run_dir: &Path, arguments: impl FnOnce(&Path) -> io::Result<Vec<String>>, priority: Priority) -> io::Result<Self> {
        let dir = run_dir.join(uuid::Uuid::new_v4().simple().to_string());
        fs::create_dir_all(&dir)?;
        let started = arguments(&dir).and_then(|arguments| Self::start_in(program, &dir, arguments, priority));
        if started.is_err() {
            // The error is the news; what cannot be removed is swept at the next start.
            cgroup::remove_process_dir(&dir);
        }
        started
    }

    fn start_in(program: &Path, dir: &Path, arguments: Vec<String>, priority: Priority) -> io::Result<Self> {
        let dir_fd = open_dir(dir)?;
        let output = File::create(dir.join(OUTPUT))?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(dir).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // A group of its own: what the keyboard of the node's terminal sends does not reach it.
        command.process_group(0);
        let mut child = tokio::process::Command::from(command).kill_on_drop(false).spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| io::Error::other("the child has no process number"))?;
        let opened = Self::open(pid, dir, dir_fd);
        if priority == Priority::Low
            && let Some(pid) = Pid::from_raw(pid)
        {
            // A kindness to others; without it everything works.
            let _ = rustix::process::setpriority_process(Some(pid), LOW_PRIORITY);
        }
        // Ends with the child, which only has to be reaped; a child that outlives this program is reaped by init.
        tokio::spawn(async move { child.wait().await });
        opened
    }

    fn open(pid: i32, dir: &Path, dir_fd: OwnedFd) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        let identity = Identity { pid, start_time: start_time(pid)?, dir: dir.to_owned() };
        let pidfd = watched(pidfd)?;
        Ok(Self { identity, pidfd, dir_fd })
    }

    /// The process of this identity, if it lives.
    pub fn find(identity: &Identity) -> io::Result<Option<Self>> {
        let found = open_dir(&identity.dir).and_then(|dir_fd| Self::open(identity.pid, &identity.dir, dir_fd));
        let found = match found {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Looked at after the pidfd was opened, so both speak of the process that the pidfd holds.
        Ok((found.identity == *identity && is_ours(identity.pid, &identity.dir) && found.is_alive()).then_some(found))
    }

    /// Every process that carries a directory under `run_dir` in its command line.
    pub fn find_all(run_dir: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        let prefix = name_argument(run_dir);
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            // A process that has gone meanwhile is not there any more, and one we may not look at is not ours.
            let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
            let name = line.split(|byte| *byte == 0).find_map(|argument| argument.strip_prefix(prefix.as_bytes())?.strip_prefix(b"/"));
            let Some(name) = name.filter(|name| !name.contains(&b'/')) else { continue };
            let dir = run_dir.join(std::ffi::OsStr::from_bytes(name));
            let opened = open_dir(&dir).or_else(|_| open_dir(run_dir)).and_then(|dir_fd| Self::open(pid, &dir, dir_fd));
            if let Ok(process) = opened
                && is_ours(pid, &dir)
            {
                found.push(process);
            }
        }
        Ok(found)
    }

    /// Which process it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its number, for `/proc`.
    pub fn pid(&self) -> i32 {
        self.identity.pid
    }

    /// Its own directory.
    pub fn dir(&self) -> &Path {
        &self.identity.dir
    }

    /// Whether it has not ended (a zombie has).
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        // A pidfd becomes readable when the process ends.
        matches!(rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        // Stays readable; an error would mean that the runtime shuts down.
        let _ = self.pidfd.readable().await;
    }

    /// Tells it to end, without waiting.
    pub fn signal_kill(&self) {
        if let Err(error) = rustix::process::pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.identity.pid, %error, "a VMM process cannot be killed");
        }
    }

    /// Ends it and waits until it is gone.
    pub async fn kill(&self, limit: Duration) {
        self.signal_kill();
        if tokio::time::timeout(limit, self.ended()).await.is_err() {
            tracing::error!(pid = self.identity.pid, ?limit, "a killed VMM process does not end; is its disk stuck?");
        }
    }

    /// Removes its directory and its cgroup. For when it has ended or was told to.
    pub fn remove_dir(&self) {
        cgroup::remove_process_dir(&self.identity.dir);
    }

    /// Gives a process that was started with [`Priority::Low`] what every other has. `false`: that is not permitted.
    pub fn raise_priority(&self) -> bool {
        // It leads its own process group since `setsid`, and the group is all its threads.
        Pid::from_raw(self.identity.pid).is_some_and(|pid| rustix::process::setpriority_pgrp(Some(pid), 0).is_ok())
    }

    /// Connects to a stream socket in its directory as soon as it is there.
    pub async fn connect(&self, socket: &str, limit: Duration) -> io::Result<UnixStream> {
        self.connect_with(socket, limit, UnixStream::connect).await
    }

    /// Connects, in a way of the caller's, to a socket in its directory as soon as it is there. The detour through
    /// `/proc/self/fd` keeps the path short: a socket address holds 108 bytes, a data directory may be longer.
    pub async fn connect_with<S, F: Future<Output = io::Result<S>>>(&self, socket: &str, limit: Duration, connect: impl Fn(PathBuf) -> F) -> io::Result<S> {
        let path = PathBuf::from(format!("/proc/self/fd/{}/{socket}", self.dir_fd.as_raw_fd()));
        let deadline = Instant::now() + limit;
        loop {
            match connect(path.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Err(error),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) if !self.is_alive() => return Err(io::Error::other(format!("the VMM ended at its start: {}", self.output_tail()))),
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// The last lines of its own output.
    pub fn output_tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(self.identity.dir.join(OUTPUT))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            let mut tail = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut tail)?;
            Ok(String::from_utf8_lossy(&tail).trim().to_owned())
        };
        read().ok().filter(|tail| !tail.is_empty()).unwrap_or_else(|| "it wrote nothing".to_owned())
    }

    /// CPU time it has used, in microseconds.
    pub fn cpu_micros(&self) -> Option<u64> {
        let fields = stat_fields(self.identity.pid).ok()?;
        let ticks = fields.get(field(14))? + fields.get(field(15))?;
        Some(ticks.saturating_mul(1_000_000 / TICKS_PER_SECOND))
    }

    /// Its anonymous memory, which is what a clone does not share with others, in bytes.
    pub fn private_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.identity.pid)).ok()?;
        let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
        Some(kib * 1024)
    }
}
