//! The commands for people without the AWS CLI: images, microVMs, tokens, logs, a shell, usage.
//!
//! Owns: what each command prints and how it ends. Never reads the node's own files but those that say how to reach it: everything
//! goes through the node's sockets, as every other client's does. What is asked for is on standard output (as JSON that stays the
//! same, with `--json`); progress and what is wrong is on standard error.

mod api;
mod archive;
mod http;
mod image;
mod logs;
mod microvm;
mod place;
mod print;
mod shell;
mod usage;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use self::api::Api;

/// Which node, and how to print.
#[derive(Debug, Args)]
pub struct At {
    /// Configuration file of the node; its node.data_dir is used.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data directory of a node of this host. Without it: the node of the variables that `dormouse env` prints, else ./data.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What can be asked of a running node. A microVM is named by its id or the beginning of it.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Build, list and remove images.
    #[command(subcommand)]
    Image(image::Verb),
    /// Run a microVM of an image and wait until it runs.
    Run(microvm::Run),
    /// List microVMs.
    Ps(microvm::Ps),
    /// Mint a token for a microVM's endpoint.
    Token(microvm::Token),
    /// Print a curl command that calls a microVM.
    Open(microvm::Token),
    /// Put a microVM to sleep, and wait until it is.
    Suspend(microvm::Name),
    /// Wake a microVM, and wait until it is awake.
    Resume(microvm::Name),
    /// End microVMs, and wait until they have ended.
    Rm(microvm::Names),
    /// Print what a microVM's app has said.
    Logs(logs::Of),
    /// A shell in a microVM that was run with --shell. Ctrl-] leaves it.
    Shell(shell::Of),
    /// What microVMs have used, and what that costs at the prices of the node's configuration.
    Usage(usage::Of),
}

/// Does it.
pub fn run(verb: Verb) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting")?;
    let outcome = runtime.block_on(async {
        match verb {
            Verb::Image(verb) => image::run(verb).await,
            Verb::Run(asked) => microvm::run(asked).await,
            Verb::Ps(asked) => microvm::ps(asked).await,
            Verb::Token(asked) => microvm::token(asked).await,
            Verb::Open(asked) => microvm::open(asked).await,
            Verb::Suspend(asked) => microvm::suspend(asked).await,
            Verb::Resume(asked) => microvm::resume(asked).await,
            Verb::Rm(asked) => microvm::rm(asked).await,
            Verb::Logs(asked) => logs::run(asked).await,
            Verb::Shell(asked) => shell::run(asked).await,
            Verb::Usage(asked) => usage::run(asked).await,
        }
    });
    // A read of standard input cannot be taken back, and nothing waits for it.
    runtime.shutdown_background();
    match outcome {
        // Whoever read what we print has seen enough.
        Err(error) if error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)) => Ok(()),
        outcome => outcome,
    }
}

impl At {
    fn api(&self) -> Result<Api> {
        Ok(Api::new(place::find(self.config.as_deref(), self.data_dir.as_deref())?))
    }
}
