//! Namespaces of the process's own: none of them holds anything.
//!
//! An ordinary user gets them through a user namespace; root, who has become an ordinary user by then and still has its
//! capabilities (see [`super::privileges::become_user`]), gets them either way. Each is asked for by itself, so that a host
//! that refuses one still gives the others.

use std::{fs, io};

use rustix::{
    process::{getegid, geteuid},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::{Doing, JailError, Layer, Report};

/// Unshares what the host permits. The pid namespace takes its first process at the next fork.
///
/// The process must have a single thread.
pub fn unshare(report: &mut Report) -> Result<(), JailError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let made = new(UnshareFlags::NEWUSER);
    if made.is_ok() {
        // The user keeps its number inside. Without a map it would be nobody's, and files could not be opened.
        map("setgroups", "deny")?;
        map("uid_map", &format!("{uid} {uid} 1"))?;
        map("gid_map", &format!("{gid} {gid} 1"))?;
    }
    report.note(Layer::User, made.map_err(|error| told(&error, "user.max_user_namespaces or kernel.unprivileged_userns_clone may be 0")));
    for (layer, flag) in [
        (Layer::Mount, UnshareFlags::NEWNS),
        (Layer::Pid, UnshareFlags::NEWPID),
        (Layer::Network, UnshareFlags::NEWNET),
        (Layer::Ipc, UnshareFlags::NEWIPC),
        (Layer::Uts, UnshareFlags::NEWUTS),
        (Layer::Cgroup, UnshareFlags::NEWCGROUP),
    ] {
        report.note(layer, new(flag).map_err(|error| told(&error, "an ordinary user needs a user namespace for it")));
    }
    Ok(())
}

fn new(flag: UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags passed here never include `FILES`, the only one that this is unsafe for.
    unsafe { unshare_unsafe(flag) }.map_err(io::Error::from)
}

fn told(error: &io::Error, hint: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSPC) => format!("{error} ({hint})"),
        _ => error.to_string(),
    }
}

fn map(file: &str, text: &str) -> Result<(), JailError> {
    fs::write(format!("/proc/self/{file}"), text).doing(&format!("writing {text:?} to /proc/self/{file}"))
}
