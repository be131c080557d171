//! Raw data as JSON lines, and a table of percentiles made from them.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;

/// Names of steps and the microseconds that each took, in order.
pub type Phases = Vec<(String, u64)>;

/// Microseconds of a duration.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One operation, many times.
struct Series {
    subject: String,
    what: String,
    /// Dirty memory, where the operation has any.
    dirty_mib: Option<f64>,
    rounds: Vec<(Phases, u64)>,
}

/// One number about memory or the like.
struct Fact {
    subject: String,
    what: String,
    kib: Vec<u64>,
}

/// Collects everything of a run.
pub struct Figures {
    raw: File,
    table: PathBuf,
    head: String,
    series: Vec<Series>,
    facts: Vec<Fact>,
    notes: Vec<String>,
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn load() -> String {
    text("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Nearest rank.
fn percentile(sorted: &[u64], share: f64) -> u64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0)
}

fn sorted(values: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut values: Vec<u64> = values.into_iter().collect();
    values.sort_unstable();
    values
}

fn ms(us: u64) -> String {
    format!("{:.2}", us as f64 / 1000.0)
}

impl Figures {
    /// Starts `<results>/<name>.{jsonl,md}`.
    pub fn create(results: &Path, name: &str, kvm: &str, work_dir: &Path) -> Result<Self> {
        fs::create_dir_all(results).with_context(|| format!("creating {}", results.display()))?;
        let raw = results.join(format!("{name}.jsonl"));
        let cpuinfo = text("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, model)| model);
        let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let file_system = rustix::fs::statfs(work_dir).map_or("?", |status| match status.f_type {
            0xef53 => "ext4",
            0x0102_1994 => "tmpfs",
            0x5846_5342 => "xfs",
            0x9123_683e => "btrfs",
            _ => "another file system",
        });
        let head = format!(
            "Host: {model}, {cpus} CPUs, Linux {}; files on {file_system}. KVM: **{kvm}**. Load average at the start: {}.",
            text("/proc/sys/kernel/osrelease"),
            load()
        );
        let mut figures = Self {
            raw: File::create(&raw).with_context(|| format!("creating {}", raw.display()))?,
            table: results.join(format!("{name}.md")),
            head,
            series: Vec::new(),
            facts: Vec::new(),
            notes: Vec::new(),
        };
        let line = json!({ "run": { "kvm": kvm, "cpu": model, "cpus": cpus, "kernel": text("/proc/sys/kernel/osrelease"), "load": load(), "files": file_system } });
        figures.line(&line)?;
        Ok(figures)
    }

    fn line(&mut self, line: &serde_json::Value) -> Result<()> {
        writeln!(self.raw, "{line}").context("writing raw data")
    }

    /// One round of an operation.
    pub fn round(&mut self, subject: &str, what: &str, dirty_mib: Option<f64>, phases: Phases, total_us: u64) -> Result<()> {
        self.line(&json!({ "subject": subject, "what": what, "dirty_mib": dirty_mib, "phases_us": phases, "total_us": total_us }))?;
        let series = match self.series.iter().position(|series| (series.subject.as_str(), series.what.as_str()) == (subject, what)) {
            Some(at) => &mut self.series[at],
            None => {
                self.series.push(Series { subject: subject.to_owned(), what: what.to_owned(), dirty_mib, rounds: Vec::new() });
                self.series.last_mut().expect("just pushed")
            }
        };
        series.rounds.push((phases, total_us));
        Ok(())
    }

    /// A number of KiB.
    pub fn memory(&mut self, subject: &str, what: &str, kib: u64) -> Result<()> {
        self.line(&json!({ "subject": subject, "what": what, "kib": kib }))?;
        match self.facts.iter_mut().find(|fact| (fact.subject.as_str(), fact.what.as_str()) == (subject, what)) {
            Some(fact) => fact.kib.push(kib),
            None => self.facts.push(Fact { subject: subject.to_owned(), what: what.to_owned(), kib: vec![kib] }),
        }
        Ok(())
    }

    /// A sentence for the report.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Writes the table and answers it.
    pub fn finish(mut self) -> Result<String> {
        let mut out = format!("# What the engines cost\n\n{}\nLoad average at the end: {}.\n\n", self.head, load());
        for note in std::mem::take(&mut self.notes) {
            writeln!(out, "- {note}")?;
        }
        out.push_str(TARGETS);
        self.restores(&mut out)?;
        self.suspends(&mut out)?;
        self.private(&mut out)?;
        fs::write(&self.table, &out).with_context(|| format!("writing {}", self.table.display()))?;
        Ok(out)
    }

    fn totals(series: &Series) -> Vec<u64> {
        sorted(series.rounds.iter().map(|(_, total)| *total))
    }

    fn restores(&self, out: &mut String) -> Result<()> {
        writeln!(out, "\n## Restore (process ready, page cache warm)\n\n| subject | restore | rounds | p50 ms | p99 ms | max ms | p50, times the first row |\n|---|---|---:|---:|---:|---:|---:|")?;
        let restores: Vec<&Series> = self.series.iter().filter(|series| !series.what.starts_with("suspend")).collect();
        let Some(base) = restores.first().map(|series| percentile(&Self::totals(series), 0.5)) else { return Ok(()) };
        for series in &restores {
            let totals = Self::totals(series);
            let p50 = percentile(&totals, 0.5);
            let ratio = p50 as f64 / base.max(1) as f64;
            let (p50, p99, max) = (ms(p50), ms(percentile(&totals, 0.99)), ms(percentile(&totals, 1.0)));
            writeln!(out, "| {} | {} | {} | {p50} | {p99} | {max} | {ratio:.1} |", series.subject, series.what, totals.len())?;
        }
        writeln!(out, "\nBy phase, p50 / p99 in ms, and the phase's share of all the time:\n")?;
        for series in &restores {
            writeln!(out, "- {}, {}: {}", series.subject, series.what, Self::phases(series))?;
        }
        Ok(())
    }

    fn phases(series: &Series) -> String {
        let all: u64 = series.rounds.iter().map(|(_, total)| *total).sum();
        let mut names: Vec<&str> = Vec::new();
        for (phases, _) in &series.rounds {
            for (name, _) in phases {
                if !names.contains(&name.as_str()) {
                    names.push(name);
                }
            }
        }
        let parts = names.into_iter().map(|name| {
            let of_round = |phases: &Phases| phases.iter().filter(|(found, _)| found == name).map(|(_, us)| *us).sum::<u64>();
            let values = sorted(series.rounds.iter().map(|(phases, _)| of_round(phases)));
            let share = values.iter().sum::<u64>() as f64 * 100.0 / all.max(1) as f64;
            format!("{name} {} / {} ({share:.0} %)", ms(percentile(&values, 0.5)), ms(percentile(&values, 0.99)))
        });
        parts.collect::<Vec<_>>().join("; ")
    }

    fn suspends(&self, out: &mut String) -> Result<()> {
        writeln!(out, "\n## Suspend, by dirty memory\n\n| subject | dirty MiB | rounds | p50 ms | max ms | ms per MiB more than the smallest | by phase, p50 / p99 ms |\n|---|---:|---:|---:|---:|---:|---|")?;
        let mut smallest: Option<(&str, f64, u64)> = None;
        for series in self.series.iter().filter(|series| series.what.starts_with("suspend")) {
            let totals = Self::totals(series);
            let (p50, dirty) = (percentile(&totals, 0.5), series.dirty_mib.unwrap_or(0.0));
            let base = match smallest {
                Some(base) if base.0 == series.subject => base,
                _ => *smallest.insert((&series.subject, dirty, p50)),
            };
            let each = if dirty > base.1 { format!("{:.2}", (p50 as f64 - base.2 as f64) / 1000.0 / (dirty - base.1)) } else { "–".to_owned() };
            writeln!(out, "| {} | {dirty:.2} | {} | {} | {} | {each} | {} |", series.subject, totals.len(), ms(p50), ms(percentile(&totals, 1.0)), Self::phases(series))?;
        }
        Ok(())
    }

    fn private(&self, out: &mut String) -> Result<()> {
        writeln!(out, "\n## Private memory\n\n| subject | what | microVMs | median MiB | largest MiB |\n|---|---|---:|---:|---:|")?;
        let mib = |kib: u64| format!("{:.2}", kib as f64 / 1024.0);
        for fact in &self.facts {
            let values = sorted(fact.kib.iter().copied());
            writeln!(out, "| {} | {} | {} | {} | {} |", fact.subject, fact.what, values.len(), mib(percentile(&values, 0.5)), mib(percentile(&values, 1.0)))?;
        }
        Ok(())
    }
}

const TARGETS: &str = "
Targets of issue 3, for hardware KVM and a guest of 512 MiB: restore to the first run of a vCPU at most 3 ms p50 and 8 ms p99 (page
cache warm); a stop window of at most 30 ms with 30 MiB dirty; private memory of a VMM at most 5 MiB. **Not measured on hardware here**,
unless the line above says that the KVM is a hardware one.
";
