//! What the node says on standard error, and that nobody waits for it.
//!
//! Owns: the filter that keeps other people's secrets and floods out, the thread that writes, and the counters of what was
//! dropped and of panics. The access log is the gateway's.

use std::{panic, sync::LazyLock};

use anyhow::{Context as _, Result};
use config::Config;
use prometheus::{IntCounter, PullingGauge, Registry};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Libraries that show whole requests, and so tokens, in what they say for their own debugging, or in which any client can
/// cause a line for each mistake it makes; this level and above is all that is let through, whatever the configuration says.
const QUIET: [&str; 9] = [
    "pingora_core=off",
    "pingora_proxy=off",
    "pingora_pool=off",
    "pingora_http=off",
    "pingora_cache=off",
    "h2=error",
    "hyper=warn",
    "s3s=warn",
    "rustls=error",
];

/// Lines that wait for the writer.
const QUEUE: usize = 8192;

static PANICS: LazyLock<IntCounter> =
    LazyLock::new(|| IntCounter::new("node_panics_total", "Panics of threads and tasks; each is a fault of ours.").expect("a good name"));

/// The log; its drop waits a moment for the last lines.
pub struct Log {
    dropped: ErrorCounter,
    _writer: WorkerGuard,
}

impl Log {
    /// Starts it. A reader of standard error that stalls costs lines, and stalls nobody.
    pub fn start(config: &Config) -> Result<Self> {
        let mut filter = EnvFilter::try_new(&config.log.filter).with_context(|| format!("log.filter: `{}` is not a tracing filter", config.log.filter))?;
        for quiet in QUIET {
            filter = filter.add_directive(quiet.parse().with_context(|| format!("our own filter `{quiet}`"))?);
        }
        let (writer, guard) = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE).finish(std::io::stderr());
        let dropped = writer.error_counter();
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
        // Both bridge the `log` crate, through which pingora speaks.
        if config.log.json { builder.json().init() } else { builder.init() }
        let say = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            PANICS.inc();
            say(panic);
        }));
        Ok(Self { dropped, _writer: guard })
    }

    /// Shows the counters.
    pub fn register(&self, metrics: &Registry) -> Result<()> {
        let dropped = self.dropped.clone();
        let lost = PullingGauge::new(
            "node_log_lines_lost",
            "Lines of standard error dropped since the start because its reader was too slow.",
            Box::new(move || dropped.dropped_lines() as f64),
        )?;
        metrics.register(Box::new(lost))?;
        metrics.register(Box::new(PANICS.clone()))?;
        Ok(())
    }
}
