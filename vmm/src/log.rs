//! The process's log: `tracing` events as lines on standard error, which the node made a file of before it started us.
//!
//! Owns: the format and the ceiling. A guest can cause log lines, so their sum is bounded: the file cannot fill a disk.

use std::{
    fmt::{Debug, Write as _},
    sync::atomic::{AtomicUsize, Ordering},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// Bytes that one process may log in its life; about ten thousand lines, a thousand times what a quiet one says.
const CEILING_BYTES: usize = 1 << 20;
/// Beyond that ceiling there is room for what a process says of its own end: a guest that has filled the log must not hide it.
const LAST_WORDS_BYTES: usize = 16 << 10;
/// A line is cut here.
const MAX_LINE_BYTES: usize = 2048;

static WRITTEN: AtomicUsize = AtomicUsize::new(0);

/// Sends all events of level info and above to standard error. Once; a second call changes nothing.
pub fn to_stderr() {
    // Fails only when there is a subscriber already.
    let _ = tracing::subscriber::set_global_default(Lines);
}

/// Writes one line, without `tracing`: for a process that is about to end, and for the panic hook.
pub fn line(text: &str) {
    write(text, CEILING_BYTES + LAST_WORDS_BYTES);
}

fn write(text: &str, ceiling: usize) {
    let mut line: String = text.chars().take(MAX_LINE_BYTES).map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.push('\n');
    // Only what is written counts, so that refused lines do not use up the room for others.
    let counted = WRITTEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| (before < ceiling).then_some(before + line.len()));
    let Ok(before) = counted else { return };
    if before + line.len() >= ceiling {
        "the log has reached its ceiling; nothing more is logged\n".clone_into(&mut line);
    }
    // One write keeps lines whole. If it fails there is nobody left to tell.
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        // One process is one microVM: there is nothing that spans would tell apart.
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(event.metadata().level().as_str().to_ascii_lowercase());
        event.record(&mut text);
        write(&text.0, CEILING_BYTES);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, format_args!("{value:?}"));
    }
}

impl Text {
    fn add(&mut self, field: &Field, value: std::fmt::Arguments<'_>) {
        // Writing into a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, ": {value}"),
            name => write!(self.0, " {name}={value}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard error is not looked at: what counts is counted.
    #[test]
    fn a_full_log_has_room_for_the_end() {
        WRITTEN.store(CEILING_BYTES, Ordering::Relaxed);
        write("a guest's noise", CEILING_BYTES);
        assert_eq!(WRITTEN.load(Ordering::Relaxed), CEILING_BYTES);
        line("the end");
        assert_eq!(WRITTEN.load(Ordering::Relaxed), CEILING_BYTES + "the end\n".len());
        for _ in 0..LAST_WORDS_BYTES / 1024 {
            line(&"x".repeat(MAX_LINE_BYTES));
        }
        assert!(WRITTEN.load(Ordering::Relaxed) < CEILING_BYTES + LAST_WORDS_BYTES + MAX_LINE_BYTES);
        WRITTEN.store(0, Ordering::Relaxed);
    }
}
