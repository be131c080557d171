//! A root directory with nothing in it.

use std::{env, ffi::CStr, io};

use rustix::{
    fs::Mode,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount},
    process::{chdir, pivot_root},
};

/// Two inodes and one page are the least that tmpfs takes; the root directory itself is one.
const OPTIONS: &CStr = c"size=4k,nr_inodes=2,mode=0555";

/// Puts an empty read-only file system where the root was, and lets go of everything that was mounted. The process must be
/// in a mount namespace of its own; other processes in it get the new root as well. Working directory: anything with a name.
pub fn empty() -> Result<(), String> {
    let step = |what: &str| {
        let what = what.to_owned();
        move |error: rustix::io::Errno| format!("{what}: {}", io::Error::from(error))
    };
    let at = env::current_dir().map_err(|error| format!("the name of the working directory: {error}"))?;
    // What is done here must not show in the host's namespace.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).map_err(step("making mounts private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", &at, "tmpfs", flags, OPTIONS).map_err(step("mounting an empty file system"))?;
    // By its name again: `.` is still the directory under the new file system.
    chdir(&at).map_err(step("entering the empty file system"))?;
    // The old root is then mounted over the new one; it is the topmost at `.` and goes first.
    pivot_root(".", ".").map_err(step("changing the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("letting go of the old root"))?;
    chdir("/").map_err(step("entering the new root"))?;
    mount_remount("/", flags | MountFlags::RDONLY, "").map_err(step("making the root read-only"))?;
    // Says that it worked, instead of believing it.
    let root = rustix::fs::open("/", rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC, Mode::empty())
        .map_err(step("opening the new root"))?;
    let entries = rustix::fs::Dir::read_from(&root).map_err(step("reading the new root"))?;
    match entries.flatten().find(|entry| !matches!(entry.file_name().to_bytes(), b"." | b"..")) {
        Some(entry) => Err(format!("the new root is not empty: it holds {:?}", entry.file_name())),
        None => Ok(()),
    }
}
