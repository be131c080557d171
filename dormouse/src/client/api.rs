//! The operations of the node, as JSON in and out.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Response, body::Incoming};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::{
    http::{self, Body, Service},
    place::Place,
};

/// An answer that is not what was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// AWS's name of the error, such as `ResourceNotFoundException`.
    pub kind: String,
    /// For people.
    pub message: String,
}

/// The largest answer that is read into memory: a list's page, or a build's record.
const MAX_ANSWER: usize = 16 << 20;
/// How often a state is asked for that is waited for.
const POLL: Duration = Duration::from_millis(250);
/// How long it may take to begin, to sleep, to wake or to end; more than any of them takes on a busy host.
const STATE_WITHIN: Duration = Duration::from_secs(180);

/// A node.
pub struct Api {
    /// Where it is.
    pub place: Place,
}

impl Api {
    pub fn new(place: Place) -> Self {
        Self { place }
    }

    /// An operation.
    pub async fn call(&self, method: &str, target: &str, body: Option<Value>) -> Result<Value> {
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let response = self.open(Service::Lambda, method, target, bytes).await?;
        let body = whole(response).await?;
        if body.is_empty() { Ok(Value::Null) } else { serde_json::from_slice(&body).context("the node's answer is not JSON") }
    }

    /// An answer to be read as it comes; a refusal is an error.
    pub async fn open(&self, service: Service, method: &str, target: &str, body: Bytes) -> Result<Response<Incoming>> {
        let (digest, length) = (hex::encode(Sha256::digest(&body)), body.len() as u64);
        let body: Body = Full::new(body).map_err(|never| match never {}).boxed_unsync();
        accepted(http::send(&self.place, service, method, target, &digest, body, length).await?).await
    }

    /// Every item of a list.
    pub async fn list(&self, target: &str) -> Result<Vec<Value>> {
        let (mut items, mut next) = (Vec::new(), None::<String>);
        loop {
            let and = if target.contains('?') { '&' } else { '?' };
            let mut page = format!("{target}{and}maxResults=50");
            if let Some(next) = &next {
                page.push_str(&format!("&nextToken={}", encode(next)));
            }
            let answer = self.call("GET", &page, None).await?;
            items.extend(answer["items"].as_array().cloned().unwrap_or_default());
            next = answer["nextToken"].as_str().map(str::to_owned);
            if next.is_none() {
                return Ok(items);
            }
        }
    }

    /// The id that begins so.
    pub async fn microvm(&self, named: &str) -> Result<String> {
        const PREFIX: &str = "microvm-";
        const WHOLE: usize = PREFIX.len() + 36;
        let prefix = if named.starts_with(PREFIX) { named.to_owned() } else { format!("{PREFIX}{named}") };
        if prefix.len() == WHOLE {
            return Ok(prefix);
        }
        let all = self.list("/2025-09-09/microvms").await?;
        let found: Vec<&str> = all.iter().filter_map(|item| item["microvmId"].as_str()).filter(|id| id.starts_with(&prefix)).collect();
        match found[..] {
            [id] => Ok(id.to_owned()),
            [] => bail!("no microVM's id begins with {named}; `dormouse ps --all` lists them"),
            _ => bail!("{} microVMs have ids that begin with {named}: {}", found.len(), found.join(", ")),
        }
    }

    /// GetMicrovm.
    pub async fn get_microvm(&self, id: &str) -> Result<Value> {
        self.call("GET", &format!("/2025-09-09/microvms/{}", encode(id)), None).await
    }

    /// Waits for a state of a microVM. One that has ended reaches no other.
    pub async fn reaches(&self, id: &str, state: &str) -> Result<Value> {
        let deadline = Instant::now() + STATE_WITHIN;
        loop {
            let view = self.get_microvm(id).await?;
            match view["state"].as_str().unwrap_or_default() {
                now if now == state => return Ok(view),
                "TERMINATED" => bail!("{id} has ended: {}", view["stateReason"].as_str().unwrap_or("nobody said why")),
                now if Instant::now() >= deadline => bail!("{id} is not {state} after {} s; it is {now}", STATE_WITHIN.as_secs()),
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }
}

/// The answer, unless it is a refusal.
pub async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    let kind = response.headers().get("x-amzn-errortype").and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
    let body = whole(response).await?;
    let told = serde_json::from_slice::<Value>(&body).ok();
    let message = told.as_ref().and_then(|told| told.get("message").or_else(|| told.get("Message"))).and_then(Value::as_str).map(str::to_owned);
    let message = message.unwrap_or_else(|| {
        let text: String = String::from_utf8_lossy(&body).chars().take(300).collect();
        format!("the node answered {status} {kind} {text}").trim_end().to_owned()
    });
    Err(Refusal { status, kind, message }.into())
}

async fn whole(response: Response<Incoming>) -> Result<Bytes> {
    let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
    Ok(body.collect().await.map_err(|error| anyhow!("reading the node's answer failed: {error}"))?.to_bytes())
}

/// As one part of a path or a query.
pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Whether the node says that there is no such thing.
pub fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refusal>().is_some_and(|refusal| refusal.status == 404)
}
