//! PID 1 in the guest: the `/init` of the initramfs, and the guest's end of the channel for the rest of the guest's life.
//!
//! Owns: mounts, kernel modules, the app's process, its cgroup and namespaces, shells beside it, the guest's clock and entropy. Never
//! trusts the app (it lives in namespaces and a cgroup of its own and cannot signal the agent), leads what
//! the app connects to out to the host and decides nothing about it, and knows nothing of snapshots but that it is told when it wakes up in one.
//!
//! One thread: everything here waits for something else. Unsafe code is in [`sys`] only.

mod agent;
mod app;
mod cgroup;
mod egress;
mod hangup;
mod host;
mod listeners;
mod machine;
mod metadata;
mod pipe;
mod port;
mod shell;
mod sys;
mod terminal;
mod users;
mod vsock;

use std::{process::ExitCode, sync::Arc};

use protocol::guest::GuestEnd;

/// One short line on the console: everything written there is slow on an emulated serial port.
macro_rules! say {
    ($($part:tt)*) => { eprintln!("dormouse-agent: {}", format_args!($($part)*)) };
}
pub(crate) use say;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("dormouse's guest agent is PID 1 of a microVM and does nothing anywhere else");
        return ExitCode::from(64);
    }
    // A guest without its agent is of no use, and the host sees a VMM that has ended sooner than one that is silent.
    let Err(error) = run();
    say!("{error}; powering off");
    sys::power_off()
}

fn run() -> Result<std::convert::Infallible, machine::SetupError> {
    machine::mount_early()?;
    machine::load_modules()?;
    machine::protect_agent();
    let setup = |doing, source| machine::SetupError { doing, source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|source| setup("starting the runtime".to_owned(), source))?;
    runtime.block_on(async {
        let host = host::Host::find().await?;
        let end = GuestEnd::new();
        let agent = Arc::new(agent::Agent::new(end.clone())?);
        let _reaper = agent.clone().reap().map_err(|source| setup("watching for ended processes".to_owned(), source))?;
        say!("ready");
        host.serve(end, agent).await
    })
}
