//! `dormouse image …`.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use futures::TryStreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};

use super::{
    At,
    api::{self, Api, encode, is_not_found},
    archive, http::{self, Body, Service},
    logs, print,
};

/// Where zips are put, in the node's S3.
const BUCKET: &str = "dormouse-builds";
const IMAGES: &str = "/2025-09-09/microvm-images";
const POLL: Duration = Duration::from_millis(500);
/// Of an upload, read at a time.
const PIECE: usize = 256 << 10;

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Build an image from a directory with a Dockerfile; a new version, if there is an image of that name.
    Build(Build),
    /// List images.
    Ls(At),
    /// Remove an image and all its versions.
    Rm(Named),
    /// Print what the build of an image said.
    Logs(LogsOf),
}

/// Of `image build`.
#[derive(Debug, Args)]
pub struct Build {
    /// The directory. What its .dockerignore names is left out.
    dir: PathBuf,
    /// Name of the image: letters, digits, - and _.
    #[arg(long)]
    name: String,
    /// Baseline memory in MiB: 512, 1024, 2048, 4096 or 8192.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// A variable of the app's environment; may be given several times.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    #[command(flatten)]
    at: At,
}

/// Of `image rm`.
#[derive(Debug, Args)]
pub struct Named {
    /// Name of the image.
    image: String,
    #[command(flatten)]
    at: At,
}

/// Of `image logs`.
#[derive(Debug, Args)]
pub struct LogsOf {
    /// Name of the image.
    image: String,
    /// Its version; the newest, without it.
    #[arg(long)]
    version: Option<String>,
    #[command(flatten)]
    part: logs::Part,
    #[command(flatten)]
    at: At,
}

/// Does it.
pub async fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Build(asked) => build(asked).await,
        Verb::Ls(at) => ls(&at).await,
        Verb::Rm(asked) => rm(asked).await,
        Verb::Logs(asked) => {
            let mut target = format!("/dormouse/v1/images/{}/logs", encode(&asked.image));
            if let Some(version) = &asked.version {
                target.push_str(&format!("?version={}", encode(version)));
            }
            logs::print(&asked.at.api()?, &target, &asked.part, &mut std::io::stdout()).await
        }
    }
}

async fn ls(at: &At) -> Result<()> {
    let images = at.api()?.list(IMAGES).await?;
    if at.json {
        return print::json(&json!(images));
    }
    let row = |image: &Value| {
        let version = image["latestActiveImageVersion"].as_str().unwrap_or("-").to_owned();
        [print::text(image, "name"), print::text(image, "state"), version, print::ago(image["createdAt"].as_f64())]
    };
    print::table(["NAME", "STATE", "VERSION", "AGE"], &images.iter().map(row).collect::<Vec<_>>())
}

async fn rm(asked: Named) -> Result<()> {
    let api = asked.at.api()?;
    let target = image(&asked.image);
    let answer = api.call("DELETE", &target, None).await?;
    loop {
        match api.call("GET", &target, None).await {
            Err(error) if is_not_found(&error) => break,
            Err(error) => return Err(error),
            Ok(now) => match now["state"].as_str().unwrap_or_default() {
                "DELETED" => break,
                "DELETE_FAILED" => bail!("the image {} could not be removed; the node's log says why", asked.image),
                _ => tokio::time::sleep(POLL).await,
            },
        }
    }
    if asked.at.json { print::json(&answer) } else { print::line(&asked.image) }
}

/// A bare name is as good as an ARN.
fn image(name: &str) -> String {
    format!("{IMAGES}/{}", encode(name))
}

async fn build(asked: Build) -> Result<()> {
    let api = asked.at.api()?;
    let dir = asked.dir.clone();
    let packed = tokio::task::spawn_blocking(move || archive::pack(&dir)).await.context("packing")??;
    eprintln!("{} files, {} as a zip", packed.files, print::bytes(packed.bytes as f64));
    let key = format!("{}/{}.zip", asked.name, packed.digest);
    upload(&api, &key, packed).await?;

    let region = &api.place.region;
    let mut request = json!({
        "codeArtifact": {"uri": format!("s3://{BUCKET}/{key}")},
        "baseImageArn": format!("arn:aws:lambda:{region}:aws:microvm-image:al2023-1"),
        "buildRoleArn": "arn:aws:iam::000000000000:role/build",
    });
    if let Some(memory) = asked.memory {
        request["resources"] = json!([{"minimumMemoryInMiB": memory}]);
    }
    for variable in &asked.env {
        let (name, value) = variable.split_once('=').with_context(|| format!("--env {variable} is not NAME=VALUE"))?;
        request["environmentVariables"][name] = json!(value);
    }
    let target = image(&asked.name);
    let begun = match api.call("GET", &target, None).await {
        Ok(_) => api.call("PUT", &target, Some(request)).await?,
        Err(error) if is_not_found(&error) => {
            request["name"] = json!(asked.name);
            api.call("POST", IMAGES, Some(request)).await?
        }
        Err(error) => return Err(error),
    };
    let version = begun["imageVersion"].as_str().context("the node did not say which version it builds")?.to_owned();
    eprintln!("building {} {version}", asked.name);
    let log = format!("/dormouse/v1/images/{}/logs?version={}", encode(&asked.name), encode(&version));
    logs::print(&api, &log, &logs::Part::FOLLOW, &mut std::io::stderr()).await?;

    let target = format!("{target}/versions/{}", encode(&version));
    let ended = loop {
        let now = api.call("GET", &target, None).await?;
        if !matches!(now["state"].as_str(), Some("PENDING" | "IN_PROGRESS")) {
            break now;
        }
        tokio::time::sleep(POLL).await;
    };
    if asked.at.json {
        print::json(&ended)?;
    }
    let state = print::text(&ended, "state");
    if state != "SUCCESSFUL" {
        let builds = api.list(&format!("{target}/builds")).await?;
        let why: Vec<String> = builds.iter().map(|build| print::text(build, "stateReason")).filter(|why| !why.is_empty()).collect();
        bail!("the build of {} {version} is {state}: {}", asked.name, if why.is_empty() { "its log says why".to_owned() } else { why.join("; ") });
    }
    if !asked.at.json {
        print::line(&format!("{} {version} {state}", asked.name))?;
    }
    Ok(())
}

async fn upload(api: &Api, key: &str, packed: archive::Archive) -> Result<()> {
    if let Err(error) = api.open(Service::S3, "PUT", &format!("/{BUCKET}"), Bytes::new()).await {
        // There from the last time.
        let there = error.downcast_ref::<api::Refusal>().is_some_and(|refusal| refusal.status == 409);
        if !there {
            return Err(error.context(format!("making the bucket {BUCKET}")));
        }
    }
    let (total, digest) = (packed.bytes, packed.digest);
    let file = tokio::fs::File::from_std(packed.file);
    let pieces = futures::stream::try_unfold((file, 0u64), move |(mut file, sent)| async move {
        let mut piece = vec![0; PIECE];
        let read = tokio::io::AsyncReadExt::read(&mut file, &mut piece).await?;
        piece.truncate(read);
        let now = sent + read as u64;
        // One line for each tenth.
        if total > (8 << 20) && sent * 10 / total != now * 10 / total {
            eprintln!("uploaded {} of {}", print::bytes(now as f64), print::bytes(total as f64));
        }
        Ok::<_, std::io::Error>((read > 0).then_some((Bytes::from(piece), (file, now))))
    });
    let body: Body = StreamBody::new(pieces.map_ok(Frame::data)).boxed_unsync();
    let path = key.split('/').map(|part| percent_encoding::utf8_percent_encode(part, KEY).to_string()).collect::<Vec<_>>().join("/");
    let sent = http::send(&api.place, Service::S3, "PUT", &format!("/{BUCKET}/{path}"), &digest, body, total).await?;
    api::accepted(sent).await.context("uploading the zip").map(|_| ())
}

/// What S3 leaves as it is in a key.
const KEY: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
