//! The parent of the jailed process: it waits, says how the child ended, and takes it along when it is killed.
//!
//! Why there are two: a process enters a pid namespace only by being born in it, and the node knows (and kills) the process
//! that it started. So that one stays outside, holds nothing, and may do nothing but wait; SIGKILL for it is SIGKILL for the
//! child. Whoever must know that nothing touches a file any more waits for the end of the control connection, which the
//! child holds.

use std::{convert::Infallible, io, os::fd::OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, WaitOptions, getpid, pidfd_open, set_parent_process_death_signal, waitpid},
};

use super::{Doing, JailError, descriptors, privileges, seccomp};
use crate::log;

/// The link to the parent, for the child.
#[derive(Debug)]
pub struct Parent(OwnedFd);

/// Forks. Returns in the child only; the parent ends with the child, with its exit code or 128 + signal.
///
/// The process must have a single thread.
pub fn fork() -> Result<Parent, JailError> {
    let parent = Parent(pidfd_open(getpid(), PidfdFlags::empty()).doing("opening the process by its number")?);
    // SAFETY: there is one thread (the caller's promise), so no lock is held by a thread that the child does not have.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).doing("forking"),
        0 => Ok(parent),
        child => {
            let child = Pid::from_raw(child).expect("fork answers a positive number in the parent");
            let Err(error) = supervise(child);
            // The child sees that its parent is gone and ends.
            log::line(&format!("error: {error}; the VMM ends"));
            exit(1)
        }
    }
}

impl Parent {
    /// From here on the end of the parent is the end of this process. After the last change of identity: one resets it.
    pub fn bind(self) -> Result<(), JailError> {
        set_parent_process_death_signal(Some(Signal::KILL)).doing("binding the process to its parent")?;
        // It may have ended before; a pidfd is readable then.
        let mut parent = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut parent, Some(&Timespec::default())).doing("looking at the parent")? {
            0 => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::NotFound)).doing("looking for the parent, which has ended,"),
        }
    }
}

fn supervise(child: Pid) -> Result<Infallible, JailError> {
    // SAFETY: from here on this process uses none of what it inherited, and never returns to code that owns it.
    unsafe { descriptors::close_others(None)? };
    privileges::drop_all()?;
    // No Landlock here: its scope for signals would keep the one that the child is to get at the end of this process from it.
    // The filter permits nothing that Landlock could forbid.
    seccomp::install(seccomp::Class::Supervisor).doing("installing the filter of the waiting process")?;
    loop {
        let status = match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => status,
            Ok(None) | Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).doing("waiting for the child"),
        };
        if let Some(signal) = status.terminating_signal() {
            log::line(&format!("error: {}", killed(signal)));
            exit(128 + signal);
        }
        if let Some(code) = status.exit_status() {
            if code != 0 {
                log::line(&format!("error: the VMM ended with code {code}; what it said before says why"));
            }
            exit(code);
        }
    }
}

fn killed(signal: i32) -> String {
    match signal {
        libc::SIGSYS => "the VMM made a system call that its filter forbids, and was killed: either a bug, or a guest broke into it".to_owned(),
        libc::SIGBUS => "the VMM was killed by SIGBUS: a file that it had mapped (guest memory, a memory difference) became shorter".to_owned(),
        libc::SIGKILL => "the VMM was killed by SIGKILL: by the node, or because its cgroup or the host ran out of memory".to_owned(),
        _ => format!("the VMM was killed by signal {signal}"),
    }
}

/// Ends the process without running anything of the program.
pub fn exit(code: i32) -> ! {
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(code) }
}
