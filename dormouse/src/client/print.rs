//! What is printed: tables for people, JSON for programs.

use std::io::{self, Write as _};

use anyhow::Result;
use serde_json::Value;

/// Prints a value as JSON, on several lines.
pub fn json(value: &Value) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints a line.
pub fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Prints columns, each as wide as its widest cell. The last one is not filled up.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).chain([header[column].len()]).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let header = header.map(str::to_owned);
    for row in std::iter::once(&header).chain(rows) {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{}{}", shown(cell), " ".repeat(width - cell.chars().count()))).collect();
        line(cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// Without what would move a terminal's cursor.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A text member of an object; empty if it has none.
pub fn text(value: &Value, member: &str) -> String {
    match &value[member] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// How long ago something was, from seconds since 1970.
pub fn ago(seconds: Option<f64>) -> String {
    let Some(then) = seconds else { return String::new() };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    match (now - then).max(0.0) as u64 {
        secs @ 0..=119 => format!("{secs} s"),
        secs @ 120..=7199 => format!("{} min", secs / 60),
        secs @ 7200..=172_799 => format!("{} h", secs / 3600),
        secs => format!("{} d", secs / 86_400),
    }
}

/// A number of bytes for people.
pub fn bytes(count: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_as_people_read_them() {
        assert_eq!([0.0, 1023.0, 1536.0, 3.0 * 1024.0 * 1024.0].map(bytes), ["0 B", "1023 B", "1.5 KiB", "3.0 MiB"]);
        assert_eq!(shown("a\x1b[2Jb\n"), "a?[2Jb?");
    }
}
