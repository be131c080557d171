//! `dormouse run`, `ps`, `token`, `open`, `suspend`, `resume` and `rm`.

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::{
    At,
    api::{Api, encode},
    http, print,
};

const MICROVMS: &str = "/2025-09-09/microvms";
/// AWS's longest life, in seconds.
const MAX_SUSPENDED: u64 = 28_800;

/// Of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Name or ARN of the image.
    image: String,
    /// Its version; the newest that can be run, without it.
    #[arg(long)]
    version: Option<String>,
    /// Put it to sleep after so many seconds without traffic; never, without it.
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u64>,
    /// End it after so many seconds of sleep.
    #[arg(long, value_name = "SECONDS", default_value_t = MAX_SUSPENDED, requires = "idle")]
    suspended: u64,
    /// Do not let traffic wake it.
    #[arg(long, requires = "idle")]
    no_wake: bool,
    /// End it after so many seconds, awake or asleep.
    #[arg(long, value_name = "SECONDS")]
    max_duration: Option<u64>,
    /// What its run hook gets.
    #[arg(long, value_name = "TEXT")]
    payload: Option<String>,
    /// Let `dormouse shell` into it.
    #[arg(long)]
    shell: bool,
    #[command(flatten)]
    at: At,
}

/// Of `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that have ended.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    at: At,
}

/// Of `token` and `open`.
#[derive(Debug, Args)]
pub struct Token {
    /// Its id or the beginning of it.
    microvm: String,
    /// A port, a range such as 3000-3010, or all; may be given several times. 8080, without it.
    #[arg(long)]
    port: Vec<String>,
    /// How long it is good, 1 to 60.
    #[arg(long, default_value_t = 15)]
    minutes: u32,
    #[command(flatten)]
    at: At,
}

/// Of `suspend` and `resume`.
#[derive(Debug, Args)]
pub struct Name {
    /// Its id or the beginning of it.
    microvm: String,
    #[command(flatten)]
    at: At,
}

/// Of `rm`.
#[derive(Debug, Args)]
pub struct Names {
    /// Their ids or the beginnings of them.
    #[arg(required = true)]
    microvms: Vec<String>,
    #[command(flatten)]
    at: At,
}

pub async fn run(asked: Run) -> Result<()> {
    let api = asked.at.api()?;
    let mut request = json!({"imageIdentifier": asked.image});
    if let Some(version) = &asked.version {
        request["imageVersion"] = json!(version);
    }
    if let Some(idle) = asked.idle {
        let (suspended, wakes) = (asked.suspended, !asked.no_wake);
        request["idlePolicy"] = json!({"maxIdleDurationSeconds": idle, "suspendedDurationSeconds": suspended, "autoResumeEnabled": wakes});
    }
    if let Some(seconds) = asked.max_duration {
        request["maximumDurationInSeconds"] = json!(seconds);
    }
    if let Some(payload) = &asked.payload {
        request["runHookPayload"] = json!(payload);
    }
    if asked.shell {
        let connector = |name: &str| format!("arn:aws:lambda:{}:aws:network-connector:aws-network-connector:{name}", api.place.region);
        request["ingressNetworkConnectors"] = json!([connector("HTTP_INGRESS"), connector("SHELL_INGRESS")]);
    }
    let begun = api.call("POST", MICROVMS, Some(request)).await?;
    let id = begun["microvmId"].as_str().context("the node did not say the microVM's id")?;
    eprintln!("{id} is {}", print::text(&begun, "state"));
    let view = api.reaches(id, "RUNNING").await?;
    eprintln!("it runs at https://{}; to call it: dormouse open {}", print::text(&view, "endpoint"), &id[..id.len().min(16)]);
    if asked.at.json { print::json(&view) } else { print::line(id) }
}

pub async fn ps(asked: Ps) -> Result<()> {
    let mut items = asked.at.api()?.list(MICROVMS).await?;
    items.retain(|item| asked.all || item["state"] != "TERMINATED");
    if asked.at.json {
        return print::json(&json!(items));
    }
    let row = |item: &Value| {
        let image = print::text(item, "imageArn").rsplit(':').next().unwrap_or_default().to_owned();
        [print::text(item, "microvmId"), image, print::text(item, "imageVersion"), print::text(item, "state"), print::ago(item["startedAt"].as_f64())]
    };
    print::table(["ID", "IMAGE", "VERSION", "STATE", "AGE"], &items.iter().map(row).collect::<Vec<_>>())
}

/// The name of a header and the token.
async fn mint(api: &Api, id: &str, asked: &Token) -> Result<(String, String)> {
    let ports = if asked.port.is_empty() { vec![json!({"port": 8080})] } else { asked.port.iter().map(|port| scope(port)).collect::<Result<_>>()? };
    let request = json!({"expirationInMinutes": asked.minutes, "allowedPorts": ports});
    let answer = api.call("POST", &format!("{MICROVMS}/{}/auth-token", encode(id)), Some(request)).await?;
    header(&answer)
}

/// The one header of an answer with a token.
pub(super) fn header(answer: &Value) -> Result<(String, String)> {
    let headers = answer["authToken"].as_object().context("the node's answer has no token")?;
    let (name, token) = headers.iter().next().context("the node's answer has no token")?;
    Ok((name.clone(), token.as_str().unwrap_or_default().to_owned()))
}

fn scope(text: &str) -> Result<Value> {
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0).with_context(|| format!("{text} is no port; a port is 1 to 65535, a range such as 3000-3010, or all"));
    if text == "all" {
        return Ok(json!({"allPorts": {}}));
    }
    match text.split_once('-') {
        Some((first, last)) => Ok(json!({"range": {"startPort": number(first)?, "endPort": number(last)?}})),
        None => Ok(json!({"port": number(text)?})),
    }
}

pub async fn token(asked: Token) -> Result<()> {
    let api = asked.at.api()?;
    let id = api.microvm(&asked.microvm).await?;
    let (name, token) = mint(&api, &id, &asked).await?;
    if asked.at.json { print::json(&json!({"microvmId": id, "header": name, "token": token})) } else { print::line(&token) }
}

pub async fn open(asked: Token) -> Result<()> {
    let api = asked.at.api()?;
    let id = api.microvm(&asked.microvm).await?;
    let endpoint = print::text(&api.get_microvm(&id).await?, "endpoint");
    let (name, token) = mint(&api, &id, &asked).await?;
    let mut command = vec!["curl".to_owned()];
    if let Some(ca) = &api.place.ca {
        command.extend(["--cacert".to_owned(), quoted(&ca.to_string_lossy())]);
    }
    if let Some(resolve) = resolve(&endpoint, api.place.edge.as_deref())? {
        command.extend(["--resolve".to_owned(), quoted(&resolve)]);
    }
    // On the command's standard input: what stands on a command line is read by everybody who runs ps.
    command.extend(["-H".to_owned(), "@-".to_owned()]);
    let mut headers = vec![format!("{name}: {token}")];
    // A token for other ports than the usual one is for the first of them.
    if let Some(port) = asked.port.first().and_then(|port| port.split('-').next()).filter(|port| *port != "all" && *port != "8080") {
        headers.push(format!("X-aws-proxy-port: {port}"));
    }
    command.push(quoted(&format!("https://{endpoint}/")));
    // No header has a line that is the mark of the end: a token is one word of other letters.
    let command = format!("{} <<'EOF'\n{}\nEOF", command.join(" "), headers.join("\n"));
    if asked.at.json { print::json(&json!({"microvmId": id, "endpoint": endpoint, "curl": command})) } else { print::line(&command) }
}

/// curl knows by itself where names under .localhost are; for others the edge's address is told, unless it is every address.
fn resolve(endpoint: &str, edge: Option<&str>) -> Result<Option<String>> {
    let (host, port) = http::split(endpoint, 443)?;
    let Some(edge) = edge.and_then(|edge| edge.parse::<std::net::SocketAddr>().ok()) else { return Ok(None) };
    let elsewhere = !host.ends_with(".localhost") && !edge.ip().is_unspecified();
    Ok(elsewhere.then(|| format!("{host}:{port}:{}", edge.ip())))
}

/// In single quotes, if a POSIX shell would take it apart.
fn quoted(text: &str) -> String {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./:@%+=,".contains(&byte));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

pub async fn suspend(asked: Name) -> Result<()> {
    change(asked, "suspend", "SUSPENDED").await
}

pub async fn resume(asked: Name) -> Result<()> {
    change(asked, "resume", "RUNNING").await
}

async fn change(asked: Name, operation: &str, state: &str) -> Result<()> {
    let api = asked.at.api()?;
    let id = api.microvm(&asked.microvm).await?;
    api.call("POST", &format!("{MICROVMS}/{}/{operation}", encode(&id)), Some(json!({}))).await?;
    let view = api.reaches(&id, state).await?;
    if asked.at.json { print::json(&view) } else { print::line(&id) }
}

pub async fn rm(asked: Names) -> Result<()> {
    let api = asked.at.api()?;
    // All are found before one is ended.
    let mut ids = Vec::new();
    for named in &asked.microvms {
        ids.push(api.microvm(named).await?);
    }
    let (mut ended, mut failed) = (Vec::new(), 0);
    for id in ids {
        let done = async {
            api.call("DELETE", &format!("{MICROVMS}/{}", encode(&id)), None).await?;
            api.reaches(&id, "TERMINATED").await
        };
        match done.await {
            Ok(view) if asked.at.json => ended.push(view),
            Ok(_) => print::line(&id)?,
            Err(error) => {
                eprintln!("dormouse: {id}: {}", model::chain(error.as_ref()));
                failed += 1;
            }
        }
    }
    if asked.at.json {
        print::json(&json!(ended))?;
    }
    if failed > 0 { bail!("{failed} of {} could not be ended", asked.microvms.len()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_many_or_all() {
        assert_eq!(scope("80").unwrap(), json!({"port": 80}));
        assert_eq!(scope("3000-3010").unwrap(), json!({"range": {"startPort": 3000, "endPort": 3010}}));
        assert_eq!(scope("all").unwrap(), json!({"allPorts": {}}));
        for wrong in ["", "0", "65536", "x", "1-", "-1", "1-2-3"] {
            assert!(scope(wrong).unwrap_err().to_string().contains("is no port"), "{wrong}");
        }
    }

    #[test]
    fn curl_is_told_where_only_if_it_cannot_know() {
        assert_eq!(resolve("a.microvm.localhost:8443", Some("127.0.0.1:8443")).unwrap(), None);
        assert_eq!(resolve("a.vm.example", Some("10.0.0.1:443")).unwrap(), Some("a.vm.example:443:10.0.0.1".to_owned()));
        assert_eq!(resolve("a.vm.example:8443", Some("0.0.0.0:8443")).unwrap(), None);
        assert_eq!(resolve("a.vm.example", None).unwrap(), None);
    }

    #[test]
    fn what_is_printed_survives_a_shell() {
        assert_eq!(quoted("/plain/path"), "/plain/path");
        assert_eq!(quoted("a b'c"), r"'a b'\''c'");
    }
}
