//! The app's cgroup, and freezing it.

use std::{
    fs, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::process::Pid;

use crate::machine::{Doing, SetupError};

/// Where cgroup2 is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
const APP: &str = "/sys/fs/cgroup/app";
/// A process in an uninterruptible wait may take as long as its disk does.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// The app's cgroup, which exists from the start so that a guest without an app can be frozen as well.
pub(crate) struct AppCgroup(());

impl AppCgroup {
    pub fn create() -> Result<Self, SetupError> {
        match fs::create_dir(APP) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error).doing(|| format!("making the cgroup {APP}")),
            _ => Ok(Self(())),
        }
    }

    /// For a process to be born in it.
    pub fn open(&self) -> Result<OwnedFd, SetupError> {
        fs::File::open(APP).map(OwnedFd::from).doing(|| format!("opening the cgroup {APP}"))
    }

    /// The one that a process of the app is in now: this one or one below, which is frozen with it. An app may keep its own
    /// processes below, and then none may be born in this one.
    pub fn open_of(&self, pid: Pid) -> Result<OwnedFd, SetupError> {
        let doing = || format!("finding the cgroup of process {pid}");
        let list = fs::read_to_string(format!("/proc/{pid}/cgroup")).doing(doing)?;
        let path = list.lines().find_map(|line| line.strip_prefix("0::")).filter(|path| path.starts_with("/app"));
        let path = path.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)).doing(doing)?;
        fs::File::open(format!("{ROOT}{path}")).map(OwnedFd::from).doing(doing)
    }

    /// Returns when no process in it runs. Thaws again if that is not reached.
    pub async fn freeze(&self) -> Result<(), SetupError> {
        self.set("1")?;
        let since = Instant::now();
        let mut pause = Duration::from_micros(200);
        while !self.is_frozen()? {
            if since.elapsed() > FREEZE_LIMIT {
                self.thaw()?;
                return Err(io::Error::from(io::ErrorKind::TimedOut)).doing(|| "freezing the app".to_owned());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Lets its processes run. The kernel does it at once.
    pub fn thaw(&self) -> Result<(), SetupError> {
        self.set("0")
    }

    fn set(&self, value: &str) -> Result<(), SetupError> {
        fs::write(format!("{APP}/cgroup.freeze"), value).doing(|| format!("writing {value} to {APP}/cgroup.freeze"))
    }

    fn is_frozen(&self) -> Result<bool, SetupError> {
        let events = fs::read_to_string(format!("{APP}/cgroup.events")).doing(|| format!("reading {APP}/cgroup.events"))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }
}
