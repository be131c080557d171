//! What can be wrong with a configuration.

use std::{fmt, path::PathBuf};

/// One thing wrong, with its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `section.key`, or empty if the text is not TOML at all.
    pub key: String,
    /// A sentence without its full stop.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() { f.write_str(&self.what) } else { write!(f, "{}: {}", self.key, self.what) }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file can be read and is wrong; all that is wrong is listed.
    #[error("the configuration {path} has {} problem(s):{}", problems.len(), list(problems))]
    Problems {
        /// The file.
        path: PathBuf,
        /// In the order of the file's sections.
        problems: Vec<Problem>,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}
