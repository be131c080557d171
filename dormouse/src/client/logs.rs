//! `dormouse logs`: what an app has said, and says.

use std::io::Write;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::Args;
use http_body_util::BodyExt as _;
use serde_json::json;

use super::{
    At,
    api::{Api, encode},
    http::Service,
    print as out,
};

/// Of `logs`.
#[derive(Debug, Args)]
pub struct Of {
    /// Its id or the beginning of it.
    microvm: String,
    #[command(flatten)]
    part: Part,
    #[command(flatten)]
    at: At,
}

/// Which part of a log.
#[derive(Debug, Args)]
pub struct Part {
    /// Go on with what comes, until its end.
    #[arg(short, long)]
    follow: bool,
    /// Begin so many lines before the end; all that is kept, without it.
    #[arg(short = 'n', long, value_name = "LINES", value_parser = clap::value_parser!(u64).range(1..))]
    tail: Option<u64>,
}

impl Part {
    /// All of it, and what comes.
    pub const FOLLOW: Self = Self { follow: true, tail: None };
}

/// Does it.
pub async fn run(asked: Of) -> Result<()> {
    let api = asked.at.api()?;
    let id = api.microvm(&asked.microvm).await?;
    let target = format!("/dormouse/v1/microvms/{}/logs", encode(&id));
    if !asked.at.json {
        return print(&api, &target, &asked.part, &mut std::io::stdout()).await;
    }
    if asked.part.follow {
        bail!("--json prints a log in one piece; leave out --follow, or --json");
    }
    let mut log = Vec::new();
    print(&api, &target, &asked.part, &mut log).await?;
    out::json(&json!({"microvmId": id, "log": String::from_utf8_lossy(&log)}))
}

/// Writes a log as it comes.
pub async fn print(api: &Api, target: &str, part: &Part, to: &mut impl Write) -> Result<()> {
    let mut target = target.to_owned();
    let mut and = if target.contains('?') { '&' } else { '?' };
    for (name, value) in [("follow", part.follow.then_some(1)), ("tail", part.tail)] {
        if let Some(value) = value {
            target.push_str(&format!("{and}{name}={value}"));
            and = '&';
        }
    }
    let mut body = api.open(Service::Lambda, "GET", &target, Bytes::new()).await?.into_body();
    while let Some(frame) = body.frame().await {
        if let Some(piece) = frame.context("the log broke off; is the node running?")?.data_ref() {
            to.write_all(piece)?;
            to.flush()?;
        }
    }
    Ok(())
}
