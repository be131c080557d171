//! What the edge costs beside nginx and haproxy: requests per second and CPU per request on one core, latency, new
//! connections, memory of idle connections.
//!
//! All three forward TLS to the same upstream on loopback, with the same P-256 certificate, pinned to one core; the load
//! and the upstream are on the other one. They take turns in every round, so that whatever else the machine does meets
//! all of them. The gateway is the real one (token check, idle accounting, metrics, all limits) over an engine whose guest
//! streams are bare TCP connections; nginx and haproxy check nothing and are sent no token. The gateway writes its access
//! log into a file, as it always does; the others write none, unless `--log` says so.

mod gateway_node;
mod idle;
mod load;
mod report;
mod subject;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::{
    load::{Load, Outcome},
    report::Report,
    subject::{Bench, Kind, Subject},
};

/// As in `dormouse`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How the subjects are loaded.
#[derive(Parser)]
#[command(max_term_width = 120)]
struct Arguments {
    /// Rounds; in each, every subject has its turn with every load.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each throughput run.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Idle connections opened for the memory figures (a quarter as many WebSockets).
    #[arg(long, default_value_t = 1000)]
    idle: usize,
    /// Another build of this program whose gateway takes part, as NAME=PATH. May be repeated.
    #[arg(long, value_name = "NAME=PATH")]
    also: Vec<String>,
    /// Which subjects: all but those of `--also`.
    #[arg(long, value_delimiter = ',', default_value = "nginx,haproxy,gateway")]
    subjects: Vec<String>,
    /// Which loads (see `load.rs`), `idle` for the memory figures.
    #[arg(long, value_delimiter = ',', default_value = "h1,h2,h1-one,h2-latency,connect,idle")]
    loads: Vec<String>,
    /// Let nginx and haproxy write an access log too.
    #[arg(long)]
    log: bool,
    /// Count instructions in user space under callgrind instead of measuring time: this many requests for each load.
    #[arg(long, value_name = "REQUESTS")]
    instructions: Option<u64>,
    /// Where the report goes.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results"))]
    results: PathBuf,
    /// Name of the report's two files.
    #[arg(long, default_value = "edge")]
    name: String,
    /// Be the gateway under test; the program starts itself so.
    #[arg(long, hide = true, value_name = "DIR")]
    gateway: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(dir) = &arguments.gateway {
        return gateway_node::run(dir);
    }
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        bail!("two cores are needed: one for the subject, one for the load");
    }
    let dir = tempfile::tempdir_in("/tmp").context("making a work directory")?;
    let bench = Bench::new(dir.path(), arguments.log)?;
    let mut subjects = Vec::new();
    for name in &arguments.subjects {
        subjects.push(match name.as_str() {
            "nginx" => Kind::Nginx,
            "haproxy" => Kind::Haproxy,
            "gateway" => Kind::Gateway { name: "gateway".to_owned(), program: std::env::current_exe().context("finding this program")? },
            other => bail!("--subjects: `{other}` is not nginx, haproxy or gateway"),
        });
    }
    for also in &arguments.also {
        let (name, program) = also.split_once('=').with_context(|| format!("--also: `{also}` is not NAME=PATH"))?;
        subjects.push(Kind::Gateway { name: name.to_owned(), program: program.into() });
    }
    let mut report = Report::create(&arguments.results, &arguments.name)?;
    let loads = arguments.loads.iter().filter(|name| *name != "idle").map(|name| Load::named(name)).collect::<Result<Vec<_>>>()?;
    if let Some(requests) = arguments.instructions {
        for kind in &subjects {
            for load in loads.iter().filter(|load| load.is_throughput() && load.keeps_connections()) {
                let subject = bench.start_under_callgrind(kind)?;
                let counted = subject.instructions(&bench, load, requests)?;
                report.add(kind.name(), load.name, "instructions", counted)?;
            }
        }
        println!("{}", report.finish()?);
        return Ok(());
    }
    measure(&arguments, &bench, &subjects, &loads, &mut report)?;
    if arguments.loads.iter().any(|name| name == "idle") {
        for kind in &subjects {
            idle::measure(&bench, kind, arguments.idle, &mut report)?;
        }
    }
    println!("{}", report.finish()?);
    Ok(())
}

fn measure(arguments: &Arguments, bench: &Bench, subjects: &[Kind], loads: &[Load], report: &mut Report) -> Result<()> {
    let running = subjects.iter().map(|kind| bench.start(kind)).collect::<Result<Vec<Subject>>>()?;
    for subject in &running {
        for load in loads {
            load.run(subject, 1).with_context(|| format!("warming {} up with {}", subject.name, load.name))?;
        }
    }
    for round in 0..arguments.rounds {
        for load in loads {
            // Another one begins each time, so that none always follows the same one.
            for turn in 0..running.len() {
                let subject = &running[(turn + round) % running.len()];
                let before = subject.cpu_micros()?;
                let Outcome { requests, seconds, p50_us, p99_us } =
                    load.run(subject, arguments.seconds).with_context(|| format!("loading {} with {}", subject.name, load.name))?;
                let cpu = (subject.cpu_micros()? - before) as f64;
                if load.is_throughput() {
                    report.add(&subject.name, load.name, "requests/s", requests as f64 / seconds)?;
                    report.add(&subject.name, load.name, "core used", cpu / seconds / 1e6)?;
                }
                report.add(&subject.name, load.name, "CPU µs", cpu / requests.max(1) as f64)?;
                if let Some(p50) = p50_us {
                    report.add(&subject.name, load.name, "p50 µs", p50)?;
                }
                if let Some(p99) = p99_us {
                    report.add(&subject.name, load.name, "p99 µs", p99)?;
                }
            }
        }
    }
    Ok(())
}
