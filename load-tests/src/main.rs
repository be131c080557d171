//! What the engines cost, side by side in one run: restore (pool and page cache warm), suspend by dirty memory, private memory.
//!
//! Owns: the processes and files that it makes, all under one temporary directory. Measures and reports; judges nothing.
//!
//! ```text
//! vmm.rs      real `dormouse-vmm` processes through their control protocol, with a guest of a few instructions (tiny.rs)
//! engine.rs   an engine as `serve` uses it, with Debian's kernel, our agent and an app: qemu; kvm where KVM is hardware
//! figures.rs  raw data (JSON lines) and the table
//! ```
#![forbid(unsafe_code)]

mod engine;
mod figures;
mod tiny;
mod vmm;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use vmm_runtime::kvm::{Probe, probe};

use crate::figures::Figures;

const MUSL: &str = "x86_64-unknown-linux-musl";

/// Measures restores, suspends and memory of both engines.
#[derive(Debug, Parser)]
struct Arguments {
    /// Restores to measure, of each kind.
    #[arg(long, default_value_t = 100)]
    rounds: usize,
    /// Suspends to measure, of each size.
    #[arg(long, default_value_t = 10)]
    suspends: usize,
    /// Microvms that are awake at the same time, to look at their memory.
    #[arg(long, default_value_t = 8)]
    clones: usize,
    /// Where cargo puts what it builds; `dormouse-vmm` and `guest-agent` (release, musl) are taken from there.
    #[arg(long, default_value = "target")]
    target_dir: PathBuf,
    /// The unpacked kernel package of guests; `~/.cache/dormouse/kernel`, if not given.
    #[arg(long)]
    kernel_dir: Option<PathBuf>,
    /// Where guests, snapshots and processes live during the run.
    #[arg(long)]
    work_dir: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results"))]
    results: PathBuf,
    /// Name of the report's two files.
    #[arg(long, default_value = "engines")]
    name: String,
    /// Also run the kvm engine with a real guest. Without it: if the probe finds hardware.
    #[arg(long)]
    kvm_engine: bool,
    /// Leave the qemu engine out.
    #[arg(long)]
    no_qemu: bool,
    /// Leave the bare VMM processes out.
    #[arg(long)]
    no_vmm: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let built = |name: &str| arguments.target_dir.join(MUSL).join("release").join(name);
    let (vmm, agent) = (built("dormouse-vmm"), built("guest-agent"));
    let dir = match &arguments.work_dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    }
    .context("making a work directory")?;
    let kernel_dir = arguments.kernel_dir.clone().or_else(|| Some(std::env::home_dir()?.join(".cache/dormouse/kernel"))).context("no --kernel-dir and no home directory")?;

    let found = probe(&vmm).await.with_context(|| format!("probing with {}", vmm.display()))?;
    let kvm = match &found {
        Probe::Hardware => "a hardware KVM".to_owned(),
        Probe::Software { why } => format!("a software KVM ({why})"),
        Probe::Missing { why } => format!("no KVM ({why})"),
    };
    let mut figures = Figures::create(&arguments.results, &arguments.name, &kvm, dir.path())?;

    if !arguments.no_vmm && !matches!(found, Probe::Missing { .. }) {
        let bench = vmm::Bench::new(&vmm, dir.path())?;
        bench.restores(&mut figures, arguments.rounds)?;
        bench.suspends(&mut figures, arguments.suspends)?;
        bench.memory(&mut figures, arguments.clones)?;
    }
    let guests = engine::Guests { kernel_dir, agent, dir: dir.path().to_owned() };
    if arguments.kvm_engine || matches!(found, Probe::Hardware) {
        let engine = guests.kvm(&vmm).await?;
        engine::measure(&engine, &guests, &mut figures, arguments.rounds, arguments.suspends, arguments.clones).await?;
    }
    if !arguments.no_qemu {
        let engine = guests.qemu().await?;
        engine::measure(&engine, &guests, &mut figures, arguments.rounds, arguments.suspends, arguments.clones).await?;
    }
    let report = figures.finish()?;
    println!("{report}");
    Ok(())
}
