//! The binary: the one place that knows every piece.

mod admin;
mod api_settings;
mod client;
mod doctor;
mod env;
mod files;
mod handover;
mod log;
mod node;
mod notify;
mod pki;
mod reload;
mod rotate;

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use config::Config;
use model::chain;

/// Takes a ninth of the instructions off a request at the edge (load-tests/README.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// MicroVMs that sleep when nobody talks to them and wake, memory and all, when a request arrives.
#[derive(Parser)]
#[command(version, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Parser)]
struct Place {
    /// Configuration file; `dormouse config` prints one with every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data directory; goes before node.data_dir of the configuration.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a node until SIGTERM or SIGINT. Running microVMs outlive it and are adopted by the next start. SIGHUP reads
    /// certificate, keys and limits again; SIGUSR2 starts the binary anew with --upgrade.
    Serve {
        #[command(flatten)]
        place: Place,
        /// Follow the node that runs on the data directory: take its sockets and microVMs over, without refusing a connection.
        #[arg(long)]
        upgrade: bool,
    },
    /// Print shell exports that make the aws command and every AWS SDK talk to the node: eval "$(dormouse env)".
    Env(Place),
    /// Say what this host can do, what is missing, and the command that mends it.
    Doctor(Place),
    /// Make the base image that Dockerfiles start from, if it is not there yet.
    Base(Place),
    /// Mint endpoint tokens with a fresh key from now on; a running node takes it up, and no token becomes invalid.
    RotateTokenKey(Place),
    #[command(flatten)]
    Client(client::Verb),
    /// Print a completion script for a shell: source <(dormouse completions bash).
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Print a configuration file with every key, its default and its meaning.
    Config,
}

/// What a verb does with the settings and the file that they were read from.
type Act = Box<dyn FnOnce(Config, Option<PathBuf>) -> anyhow::Result<()>>;

/// EX_USAGE of sysexits.h: the configuration is wrong.
const EXIT_CONFIG: u8 = 64;

fn main() -> ExitCode {
    let ended = |outcome: anyhow::Result<()>| match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dormouse: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    };
    let (place, act): (_, Act) = match Arguments::parse().command {
        Verb::Config => {
            print!("{}", Config::example());
            return ExitCode::SUCCESS;
        }
        Verb::Client(verb) => return ended(client::run(verb)),
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "dormouse", &mut std::io::stdout());
            return ExitCode::SUCCESS;
        }
        Verb::Serve { place, upgrade } => (place, Box::new(move |config, config_file| node::serve(node::Serve { config, config_file, upgrade }))),
        Verb::Env(place) => (place, Box::new(|config, _| node::env(config))),
        Verb::Doctor(place) => (place, Box::new(|config, _| node::doctor(config))),
        Verb::Base(place) => (place, Box::new(|config, _| node::base(config))),
        Verb::RotateTokenKey(place) => (place, Box::new(|config, _| rotate::run(&config.node.data_dir))),
    };
    let mut config = match Config::load(place.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("dormouse: {}", chain(&error));
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if let Some(data_dir) = place.data_dir {
        config.node.data_dir = data_dir;
    }
    ended(act(config, place.config))
}

