//! `dormouse env`: shell exports that make plain `aws` and every SDK talk to this node.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::files;

/// `<data>/node.json`: how to reach the node that uses this data directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct NodeFile {
    /// Process id of `dormouse serve`.
    pub pid: u32,
    /// Address of the edge.
    pub edge: String,
    /// Address of the control API and S3.
    pub api: String,
    /// Address of metrics and health.
    pub admin: String,
    /// Region in ARNs and signatures.
    pub region: String,
    /// Endpoints are `<uuid>.<this>`.
    pub domain_suffix: String,
    /// The CA certificate, as an absolute path.
    pub ca: String,
}

impl NodeFile {
    /// Its name in the data directory.
    pub const NAME: &'static str = "node.json";

    /// Reads it.
    pub fn read(data_dir: &Path) -> Result<Self> {
        let path = data_dir.join(Self::NAME);
        let text = files::read_text(&path).with_context(|| format!("no node has used the data directory {} yet; start one with: dormouse serve --data-dir {0}", data_dir.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged; a start of the node writes it anew", path.display()))
    }

    /// Writes it.
    pub fn write(&self, data_dir: &Path) -> Result<()> {
        files::write_public(&data_dir.join(Self::NAME), serde_json::to_string_pretty(self)?.as_bytes())
    }
}

/// The exports, one a line.
pub fn exports(node: &NodeFile, key_id: &str, secret: &str) -> String {
    let api = format!("http://{}", node.api);
    let pairs = [
        ("AWS_ENDPOINT_URL_LAMBDA_MICROVMS", api.as_str()),
        ("AWS_ENDPOINT_URL_S3", api.as_str()),
        ("AWS_ACCESS_KEY_ID", key_id),
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_REGION", node.region.as_str()),
        ("AWS_DEFAULT_REGION", node.region.as_str()),
        ("DORMOUSE_CA_BUNDLE", node.ca.as_str()),
        ("DORMOUSE_EDGE", node.edge.as_str()),
    ];
    let mut text = String::from("unset AWS_SESSION_TOKEN AWS_PROFILE\n");
    for (name, value) in pairs {
        text.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    text
}

/// In single quotes, as a POSIX shell reads them.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for value in ["plain", "with space", "it's", "$HOME `id` \\", ""] {
            let output = std::process::Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(value))).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
        }
    }
}
