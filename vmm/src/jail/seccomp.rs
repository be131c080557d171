//! System call filters: one for each class of threads.
//!
//! Owns: which filter a thread gets and what a forbidden call does. The lists themselves are in [`rules`] and [`ioctls`].
//! A filter holds for the thread that installs it, and nothing takes it off again.

mod ioctls;
mod rules;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::supervisor;
use crate::{
    log,
    machine::{Confine, ThreadKind},
};

/// What a forbidden call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Ends the process (`SECCOMP_RET_KILL_PROCESS`); its parent says so in the log.
    Kill,
    /// Is done, and named in the kernel's log. For finding out what is missing from a list.
    Log,
    /// There are no filters. What tests of single functions get.
    Off,
}

/// Threads that do the same things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The main thread: control socket, devices, save and restore.
    Main,
    /// Runs guest code.
    Vcpu,
    /// Reads and writes the disk.
    Block,
    /// The parent of the jailed process.
    Supervisor,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Main, Self::Vcpu, Self::Block, Self::Supervisor];
}

impl From<ThreadKind> for Class {
    fn from(kind: ThreadKind) -> Self {
        match kind {
            ThreadKind::Vcpu => Self::Vcpu,
            ThreadKind::Block => Self::Block,
        }
    }
}

static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);

/// Decides for the whole process what forbidden calls do; before the first [`install`].
pub fn set_mode(mode: Mode) {
    MODE.store(mode as u8, Ordering::SeqCst);
}

fn mode() -> Mode {
    match MODE.load(Ordering::SeqCst) {
        mode if mode == Mode::Kill as u8 => Mode::Kill,
        mode if mode == Mode::Log as u8 => Mode::Log,
        _ => Mode::Off,
    }
}

/// The filter of a class, as the kernel takes it.
pub fn program(class: Class, forbidden: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = rules::of(class)?;
    SeccompFilter::new(rules, forbidden, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Numbers of the calls that a class may make, some of them with certain arguments only.
pub fn calls(class: Class) -> Result<Vec<i64>, seccompiler::BackendError> {
    Ok(rules::of(class)?.into_keys().collect())
}

/// Puts the calling thread under the filter of its class, for good.
pub fn install(class: Class) -> io::Result<()> {
    let forbidden = match mode() {
        Mode::Kill => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    let program = program(class, forbidden).map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// For [`crate::machine::Shell`]: each thread is put under its filter, or the process ends.
pub fn confine() -> Confine {
    Arc::new(|kind| {
        if let Err(error) = install(kind.into()) {
            // A thread without its filter must not reach the guest, whatever its maker would make of an error.
            log::line(&format!("error: the filter of a {kind:?} thread cannot be installed ({error}); the VMM ends"));
            supervisor::exit(1);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_is_short_enough_for_the_kernel() {
        for class in Class::ALL {
            let length = program(class, SeccompAction::KillProcess).unwrap().len();
            // BPF_MAXINSNS.
            assert!((8..4096).contains(&length), "{class:?}: {length} instructions");
        }
    }
}
