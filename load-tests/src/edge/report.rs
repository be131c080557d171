//! Raw figures as JSON lines, and a table of medians beside nginx's.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::load::LOADS;

/// Collects everything of a run.
pub struct Report {
    raw: File,
    table: PathBuf,
    head: String,
    series: Vec<Series>,
}

struct Series {
    subject: String,
    load: String,
    what: String,
    values: Vec<f64>,
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn load_average() -> String {
    text("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn version(program: &str, argument: &str) -> String {
    let said = Command::new(program).arg(argument).output().map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&said).lines().next().unwrap_or("?").trim().to_owned()
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// How a subject compares with nginx: the median of what each round says, and the middle half of the rounds where they are many. The
/// two had their turns within seconds, so that a host that is slower for a while is slower for both.
fn beside(values: &[f64], nginx: &[f64]) -> String {
    let ratios = sorted(values.iter().zip(nginx).map(|(value, nginx)| value / nginx).collect());
    match ratios.len() {
        0..4 => format!("×{:.2}", median(&ratios)),
        rounds => format!("×{:.2}, {:.2}–{:.2}", median(&ratios), ratios[rounds / 4], ratios[rounds - 1 - rounds / 4]),
    }
}

impl Report {
    /// Starts `<results>/<name>.{jsonl,md}`.
    pub fn create(results: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(results).with_context(|| format!("creating {}", results.display()))?;
        let raw = results.join(format!("{name}.jsonl"));
        let cpuinfo = text("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, model)| model);
        let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let kernel = text("/proc/sys/kernel/osrelease");
        let (nginx, haproxy) = (version("nginx", "-v"), version("haproxy", "-v"));
        let head = format!("Host: {model}, {cpus} CPUs, Linux {kernel}. {nginx}; {haproxy}. Load average at the start: {}.", load_average());
        let mut report =
            Self { raw: File::create(&raw).with_context(|| format!("creating {}", raw.display()))?, table: results.join(format!("{name}.md")), head, series: Vec::new() };
        let run = json!({ "run": { "cpu": model, "cpus": cpus, "kernel": kernel, "nginx": nginx, "haproxy": haproxy, "load": load_average() } });
        writeln!(report.raw, "{run}")?;
        Ok(report)
    }

    /// One figure.
    pub fn add(&mut self, subject: &str, load: &str, what: &str, value: f64) -> Result<()> {
        writeln!(self.raw, "{}", json!({ "subject": subject, "load": load, "what": what, "value": value })).context("writing raw data")?;
        let same = |series: &&mut Series| (series.subject.as_str(), series.load.as_str(), series.what.as_str()) == (subject, load, what);
        match self.series.iter_mut().find(same) {
            Some(series) => series.values.push(value),
            None => self.series.push(Series { subject: subject.to_owned(), load: load.to_owned(), what: what.to_owned(), values: vec![value] }),
        }
        Ok(())
    }

    /// Writes the table and answers it.
    pub fn finish(self) -> Result<String> {
        let mut out = format!("# The edge beside nginx and haproxy\n\n{}\nLoad average at the end: {}.\n\n{EXPLANATION}\n", self.head, load_average());
        let mut subjects: Vec<&str> = Vec::new();
        let mut loads: Vec<&str> = Vec::new();
        for series in &self.series {
            if !subjects.contains(&series.subject.as_str()) {
                subjects.push(&series.subject);
            }
            if !loads.contains(&series.load.as_str()) {
                loads.push(&series.load);
            }
        }
        for load in loads {
            let about = LOADS.iter().find(|known| known.name == load).map_or(String::new(), |known| format!(": {}", known.what));
            let mut whats: Vec<&str> = Vec::new();
            for series in self.series.iter().filter(|series| series.load == load) {
                if !whats.contains(&series.what.as_str()) {
                    whats.push(&series.what);
                }
            }
            writeln!(out, "\n## {load}{about}\n\n| | {} |\n|---|{}", whats.join(" | "), "---:|".repeat(whats.len()))?;
            for subject in &subjects {
                let cells: Vec<String> = whats.iter().map(|what| self.cell(subject, load, what)).collect();
                writeln!(out, "| {subject} | {} |", cells.join(" | "))?;
            }
        }
        fs::write(&self.table, &out).with_context(|| format!("writing {}", self.table.display()))?;
        Ok(out)
    }

    /// The median, and how it compares with nginx's of the same rounds.
    fn cell(&self, subject: &str, load: &str, what: &str) -> String {
        let find = |subject: &str| self.series.iter().find(|series| (series.subject.as_str(), series.load.as_str(), series.what.as_str()) == (subject, load, what));
        let Some(series) = find(subject) else { return "–".to_owned() };
        let middle = median(&sorted(series.values.clone()));
        let digits = if middle >= 1000.0 { 0 } else { 2 };
        let ratio = match find("nginx") {
            Some(nginx) if subject != "nginx" => format!(" ({})", beside(&series.values, &nginx.values)),
            _ => String::new(),
        };
        format!("{middle:.digits$}{ratio}")
    }
}

const EXPLANATION: &str = "One core for each subject (one worker), the load and the upstream on the other; all in turns, in every round. Medians of the rounds; in
parentheses, times nginx's: the median over the rounds of one beside the other, and its middle half. CPU is user and kernel time of the subject's processes for each request. The gateway checks a
token on every request, keeps idle accounting, metrics and all limits and writes its access log; nginx and haproxy check nothing and, but for
`--log`, write no log.
";
