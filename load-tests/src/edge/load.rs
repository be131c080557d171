//! The loads: wrk for HTTP/1.1, h2load for HTTP/2, each on the load's core.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::subject::{LOAD_CORE, Subject};

/// One way to load a subject.
pub struct Load {
    /// As on the command line and in the report.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    by: By,
}

enum By {
    /// wrk with so many connections, each used for ever or for one request.
    Wrk { connections: u32, keep_alive: bool },
    /// h2load with so many connections and streams on each; with a log of every request, where latency is asked.
    H2load { connections: u32, streams: u32, latency: bool },
}

/// All of them.
pub const LOADS: [Load; 5] = [
    Load { name: "h1", what: "HTTP/1.1, 32 connections kept alive", by: By::Wrk { connections: 32, keep_alive: true } },
    Load { name: "h2", what: "HTTP/2, 8 connections of 8 streams", by: By::H2load { connections: 8, streams: 8, latency: false } },
    Load { name: "h1-one", what: "HTTP/1.1, one connection: latency without queues", by: By::Wrk { connections: 1, keep_alive: true } },
    Load { name: "h2-latency", what: "HTTP/2, 8 connections of 8 streams, each request timed", by: By::H2load { connections: 8, streams: 8, latency: true } },
    Load { name: "connect", what: "a new TLS 1.3 connection for each request (no resumption)", by: By::Wrk { connections: 8, keep_alive: false } },
];

/// What came of a run.
pub struct Outcome {
    pub requests: u64,
    pub seconds: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
}

impl Load {
    /// One by its name.
    pub fn named(name: &str) -> Result<Self> {
        LOADS.into_iter().find(|load| load.name == name).with_context(|| format!("--loads: there is no `{name}`"))
    }

    /// Whether the subject's core is meant to be full.
    pub fn is_throughput(&self) -> bool {
        !matches!(self.by, By::Wrk { connections: 1, .. } | By::H2load { latency: true, .. })
    }

    /// Whether its connections carry more than one request; the instructions of others are not counted.
    pub fn keeps_connections(&self) -> bool {
        !matches!(self.by, By::Wrk { keep_alive: false, .. })
    }

    /// Loads for so many seconds. Every answer must be a 200.
    pub fn run(&self, subject: &Subject, seconds: u64) -> Result<Outcome> {
        match self.by {
            By::Wrk { connections, keep_alive } => {
                let mut wrk = pinned("wrk");
                wrk.args(["-t1", "--latency", "-c", &connections.to_string(), "-d", &format!("{seconds}s")]);
                for field in fields(subject) {
                    wrk.args(["-H", &field]);
                }
                wrk.args(["-H", &format!("Host: {}", subject.host)]);
                if !keep_alive {
                    wrk.args(["-H", "Connection: close"]);
                }
                of_wrk(&output(wrk.arg(format!("https://{}/", subject.address)))?)
            }
            By::H2load { connections, streams, latency } => {
                let log = tempfile::NamedTempFile::new_in("/tmp")?;
                let mut h2load = h2load(subject, connections, streams);
                h2load.args(["-D", &seconds.to_string()]);
                if latency {
                    h2load.arg(format!("--log-file={}", log.path().display()));
                }
                let said = output(h2load.arg(url(subject)))?;
                let (requests, seconds) = of_h2load(&said)?;
                let mut outcome = Outcome { requests, seconds, p50_us: None, p99_us: None };
                if latency {
                    // Start, status, microseconds.
                    let text = std::fs::read_to_string(log.path())?;
                    let mut times: Vec<u64> = text.lines().filter_map(|line| line.split('\t').nth(2)?.parse().ok()).collect();
                    times.sort_unstable();
                    ensure!(!times.is_empty(), "h2load logged no request");
                    outcome.p50_us = Some(times[times.len() / 2] as f64);
                    outcome.p99_us = Some(times[times.len() * 99 / 100] as f64);
                }
                Ok(outcome)
            }
        }
    }

    /// Loads with a number of requests (h2load for both, because wrk knows no number).
    pub fn run_count(&self, subject: &Subject, requests: u64) -> Result<()> {
        let mut h2load = match self.by {
            By::Wrk { connections, keep_alive } => {
                let mut h2load = h2load(subject, connections, 1);
                h2load.arg("--h1");
                ensure!(keep_alive, "instructions of new connections are not counted");
                h2load
            }
            By::H2load { connections, streams, .. } => h2load(subject, connections, streams),
        };
        let said = output(h2load.args(["-n", &requests.to_string()]).arg(url(subject)))?;
        let (done, _) = of_h2load(&said)?;
        ensure!(done == requests, "{done} of {requests} requests were answered");
        Ok(())
    }
}

fn pinned(program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", LOAD_CORE, program]);
    command
}

fn h2load(subject: &Subject, connections: u32, streams: u32) -> Command {
    let mut h2load = pinned("h2load");
    h2load.args(["-t1", "-c", &connections.to_string(), "-m", &streams.to_string()]);
    // The host is in the URL, because it is also the name in TLS; the address is here.
    h2load.arg(format!("--connect-to={}", subject.address));
    for field in fields(subject) {
        h2load.args(["-H", &field]);
    }
    h2load
}

fn url(subject: &Subject) -> String {
    format!("https://{}/", subject.host)
}

fn fields(subject: &Subject) -> Vec<String> {
    subject.token.iter().map(|token| format!("X-aws-proxy-auth: {token}")).collect()
}

fn output(command: &mut Command) -> Result<String> {
    let said = command.output().with_context(|| format!("running {command:?} (Debian packages: wrk nghttp2-client)"))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.status.success(), "{command:?} failed: {text} {}", String::from_utf8_lossy(&said.stderr));
    Ok(text)
}

fn of_wrk(said: &str) -> Result<Outcome> {
    if let Some(line) = said.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
        bail!("not every request was answered with a 200: {}", line.trim());
    }
    // "  123456 requests in 3.00s, 20.1MB read"
    let done = said.lines().find(|line| line.contains(" requests in ")).with_context(|| format!("wrk said no sum: {said}"))?;
    let mut words = done.split_whitespace();
    let requests = words.next().context("no count")?.parse()?;
    let seconds = parse_seconds(words.nth(2).context("no time")?.trim_end_matches(','))?;
    let percentile = |wanted: &str| said.lines().find_map(|line| line.trim().strip_prefix(wanted)).map(|time| parse_seconds(time.trim())).transpose();
    Ok(Outcome { requests, seconds, p50_us: percentile("50%")?.map(|s| s * 1e6), p99_us: percentile("99%")?.map(|s| s * 1e6) })
}

fn parse_seconds(time: &str) -> Result<f64> {
    let at = time.find(|letter: char| letter.is_ascii_alphabetic()).context("a time without its unit")?;
    let factor = match &time[at..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        unit => bail!("unknown unit {unit}"),
    };
    Ok(time[..at].parse::<f64>()? * factor)
}

fn of_h2load(said: &str) -> Result<(u64, f64)> {
    // "finished in 3.00s, 74478.00 req/s, 5.91MB/s"; "status codes: 223434 2xx, 0 3xx, 0 4xx, 0 5xx"
    let time = said.lines().find_map(|line| line.strip_prefix("finished in ")).and_then(|rest| rest.split(',').next()).context("h2load said no time")?;
    let codes = said.lines().find_map(|line| line.strip_prefix("status codes: ")).context("h2load said no status")?;
    let mut counts = codes.split(',').map(|part| part.split_whitespace().next().unwrap_or("").parse::<u64>());
    let good = counts.next().context("no 2xx")??;
    for count in counts {
        ensure!(count? == 0, "not every request was answered with a 200: {codes}");
    }
    ensure!(good > 0, "no request was answered: {said}");
    Ok((good, parse_seconds(time)?))
}
