//! `dormouse usage`.

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::{At, api::encode, print};

/// Of `usage`.
#[derive(Debug, Args)]
pub struct Of {
    /// Its id or the beginning of it; all microVMs and images, without it.
    microvm: Option<String>,
    #[command(flatten)]
    at: At,
}

/// Does it.
pub async fn run(asked: Of) -> Result<()> {
    let api = asked.at.api()?;
    if let Some(named) = &asked.microvm {
        let id = api.microvm(named).await?;
        let told = api.call("GET", &format!("/dormouse/v1/microvms/{}/usage", encode(&id)), None).await?;
        return if asked.at.json { print::json(&told) } else { one(&told) };
    }
    let told = api.call("GET", "/dormouse/v1/usage", None).await?;
    if asked.at.json {
        return print::json(&told);
    }
    let rows = |list: &str, name: &str| -> Vec<_> { told[list].as_array().into_iter().flatten().map(|used| row(&print::text(used, name), used)).collect() };
    let mut images = rows("images", "image");
    images.push(row("all", &told["total"]));
    print::table(["MICROVM", "RUNNING", "VCPU-S", "GB-S", "BURST", "SNAPSHOTS", "STORED", "SENT", "COST"], &rows("microvms", "microvmId"))?;
    print::line("")?;
    print::table(["IMAGE", "RUNNING", "VCPU-S", "GB-S", "BURST", "SNAPSHOTS", "STORED", "SENT", "COST"], &images)
}

fn number(value: &Value, member: &str) -> f64 {
    value[member].as_f64().unwrap_or_default()
}

fn row(name: &str, used: &Value) -> [String; 9] {
    let usage = &used["usage"];
    let snapshots = number(usage, "snapshotReadBytes") + number(usage, "snapshotWrittenBytes");
    let sent = number(usage, "endpointSentBytes") + number(usage, "networkSentBytes");
    [
        name.to_owned(),
        format!("{:.0} s", number(usage, "runningSeconds")),
        format!("{:.1}", number(usage, "baselineVcpuSeconds")),
        format!("{:.1}", number(usage, "baselineGbSeconds")),
        format!("{:.1} vCPU-s {:.1} GB-s", number(usage, "burstVcpuSeconds"), number(usage, "burstGbSeconds")),
        print::bytes(snapshots),
        format!("{:.4} GB-h", number(usage, "storageGbHours")),
        print::bytes(sent),
        dollars(number(&used["cost"], "total")),
    ]
}

fn dollars(amount: f64) -> String {
    format!("${amount:.6}")
}

fn one(told: &Value) -> Result<()> {
    let (usage, cost) = (&told["usage"], &told["cost"]);
    let used = |member: &str| number(usage, member);
    let rows = [
        ["running", &format!("{:.1} s", used("runningSeconds")), ""],
        ["vCPU", &format!("{:.1} s at the baseline, {:.1} s above it", used("baselineVcpuSeconds"), used("burstVcpuSeconds")), ""],
        ["memory", &format!("{:.1} GB-s at the baseline, {:.1} GB-s above it", used("baselineGbSeconds"), used("burstGbSeconds")), &dollars(number(cost, "compute"))],
        ["snapshots", &format!("{} read, {} written", print::bytes(used("snapshotReadBytes")), print::bytes(used("snapshotWrittenBytes"))), &dollars(number(cost, "snapshots"))],
        ["storage", &format!("{:.6} GB-h", used("storageGbHours")), &dollars(number(cost, "storage"))],
        ["endpoint", &format!("{} sent, {} received", print::bytes(used("endpointSentBytes")), print::bytes(used("endpointReceivedBytes"))), &dollars(number(cost, "transfer"))],
        ["network", &format!("{} sent, {} received", print::bytes(used("networkSentBytes")), print::bytes(used("networkReceivedBytes"))), ""],
        ["in all", "", &dollars(number(cost, "total"))],
    ];
    let header = [print::text(told, "microvmId"), format!("{} {}", print::text(told, "image"), print::text(told, "imageVersion")), print::text(told, "state")];
    print::table(std::array::from_fn(|column| header[column].as_str()), &rows.map(|row| row.map(str::to_owned)))
}
