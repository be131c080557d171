//! The jail of one VMM process.
//!
//! Owns: what the process may still do after each step, and the words in which a layer that the host refuses is told. Never
//! decides what the machine does. Nothing of it can be undone.
//!
//! ```text
//! start    other descriptors closed, cgroup joined, sockets bound          (the last things done by name)
//! become   root turns into an ordinary user, keeping capabilities until the namespaces are made
//! unshare  user, mount, pid, network, ipc, uts, cgroup namespace           [namespaces]
//! fork     the parent waits for the child and says how it ended            [supervisor]
//! child    empty root, no capabilities, no new privileges, not dumpable, Landlock without a single right, limits
//! Prepare  threads are made; each installs its filter first                [seccomp]
//!          the main thread installs its own; then the request is answered
//! ```
//!
//! Everything but the filters precedes the threads, because namespaces, capabilities and Landlock belong to a thread, and a
//! thread inherits them from the one that makes it.

pub mod descriptors;
pub mod landlock;
pub mod namespaces;
pub mod privileges;
pub mod root;
pub mod seccomp;
pub mod supervisor;

use std::{fs::File, io};

/// A part of the jail that a host may refuse. What is not listed here is never refused by a Linux that has KVM, and its
/// failure ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Not root: for a process that root has started. Refused in a container that has no other user.
    Identity,
    /// User namespace: the user and its capabilities mean nothing outside.
    User,
    /// Mount namespace.
    Mount,
    /// Pid namespace: no other process can be named.
    Pid,
    /// Network namespace: no interface at all.
    Network,
    /// IPC namespace.
    Ipc,
    /// Host name namespace.
    Uts,
    /// Cgroup namespace.
    Cgroup,
    /// Root directory without a single entry, read-only.
    Root,
    /// Landlock.
    Landlock,
}

impl Layer {
    /// All of them, in the order in which they are entered.
    pub const ALL: [Self; 10] =
        [Self::Identity, Self::User, Self::Mount, Self::Pid, Self::Network, Self::Ipc, Self::Uts, Self::Cgroup, Self::Root, Self::Landlock];

    /// As on the command line and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::User => "user",
            Self::Mount => "mount",
            Self::Pid => "pid",
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
            Self::Root => "root",
            Self::Landlock => "landlock",
        }
    }
}

/// What the jail is made of on this host.
#[derive(Debug, Default)]
pub struct Report {
    /// Layers that hold.
    pub held: Vec<Layer>,
    /// Layers that the host refused, and why.
    pub refused: Vec<(Layer, String)>,
}

impl Report {
    /// Notes how it went with a layer.
    pub fn note(&mut self, layer: Layer, outcome: Result<(), impl ToString>) {
        match outcome {
            Ok(()) => self.held.push(layer),
            Err(why) => self.refused.push((layer, why.to_string())),
        }
    }

    /// Whether a layer holds.
    pub fn holds(&self, layer: Layer) -> bool {
        self.held.contains(&layer)
    }

    /// Says in the log what holds and what does not; an error if something is missing that was required.
    pub fn tell(&self, required: &[Layer]) -> Result<(), JailError> {
        let held: Vec<_> = self.held.iter().map(|layer| layer.name()).collect();
        tracing::info!(layers = %held.join(","), "the process is in its jail; system call filters follow when the machine is made");
        for (layer, why) in &self.refused {
            tracing::warn!(layer = layer.name(), %why, "this host refuses a layer of the jail; the others hold");
        }
        match self.refused.iter().find(|(layer, _)| required.contains(layer)) {
            Some((layer, why)) => Err(JailError { doing: format!("entering the required layer {:?}", layer.name()), source: io::Error::other(why.clone()) }),
            None => Ok(()),
        }
    }
}

/// Why the jail could not be entered. The process ends.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed: {source}")]
pub struct JailError {
    /// What was tried.
    pub doing: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// Adds what was tried to an error of the kernel.
pub(crate) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, JailError> {
        self.map_err(|error| JailError { doing: what.to_owned(), source: error.into() })
    }
}

/// Files of `/proc/self` that are needed when there is no `/proc` any more.
#[derive(Debug)]
pub struct ProcessFiles {
    /// For `PAGEMAP_SCAN` and reading. A kernel may have none, and a host may forbid it.
    pub pagemap: Option<File>,
    /// Read anew with `pread` at 0.
    pub status: File,
}

impl ProcessFiles {
    /// Opens them for the calling process; a child has to open its own.
    pub fn open() -> io::Result<Self> {
        Ok(Self { pagemap: File::open("/proc/self/pagemap").ok(), status: File::open("/proc/self/status")? })
    }
}

/// The child's half of the jail, after the fork.
pub fn enter(report: &mut Report) -> Result<(), JailError> {
    if report.holds(Layer::Mount) {
        report.note(Layer::Root, root::empty());
    } else {
        report.note(Layer::Root, Err("there is no mount namespace to make it in"));
    }
    privileges::drop_all()?;
    report.note(Layer::Landlock, landlock::no_access());
    privileges::limit(report.holds(Layer::User))
}
