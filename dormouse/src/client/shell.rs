//! `dormouse shell`: the local terminal at one end of a WebSocket, a terminal in the guest at the other (aws-behaviour §2.1).
//!
//! Owns: the local terminal's mode, put back whatever happens. Never looks into what is typed, but for the key that leaves.

use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::fd::AsFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use futures::{SinkExt as _, StreamExt as _};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::{
    Error, Message,
    client::IntoClientRequest as _,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::{At, api::encode, http, microvm, print};

/// Ctrl-], as telnet has it: no shell and no editor of note is left without it.
const LEAVE: u8 = 0x1d;
/// Ctrl-D: what a terminal says at the end of its input.
const END: u8 = 0x04;
/// How long the shell has to hear it.
const END_AGAIN: Duration = Duration::from_secs(1);
/// A token is looked at when the connection begins, and never again.
const TOKEN_MINUTES: u32 = 1;

/// Of `shell`.
#[derive(Debug, Args)]
pub struct Of {
    /// Its id or the beginning of it.
    microvm: String,
    #[command(flatten)]
    at: At,
}

/// Does it.
pub async fn run(asked: Of) -> Result<()> {
    if asked.at.json {
        bail!("a shell has no JSON; leave out --json");
    }
    let api = asked.at.api()?;
    let id = api.microvm(&asked.microvm).await?;
    let endpoint = print::text(&api.get_microvm(&id).await?, "endpoint");
    let answer = api.call("POST", &format!("/2025-09-09/microvms/{}/shell-auth-token", encode(&id)), Some(json!({"expirationInMinutes": TOKEN_MINUTES}))).await?;
    let (_, token) = microvm::header(&answer)?;
    let stream = http::to_edge(&api.place, &endpoint).await?;

    let mut request = format!("wss://{endpoint}/").into_client_request().context("making a WebSocket request")?;
    let protocols = format!("lambda-microvms, lambda-microvms.authentication.{token}");
    let protocols = protocols.parse().map_err(|_| anyhow!("the node's token cannot stand in a header"))?;
    request.headers_mut().insert("sec-websocket-protocol", protocols);
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.map_err(refused)?;

    let terminal = Terminal::raw()?;
    let mut resized = signal(SignalKind::window_change()).context("watching the terminal's size")?;
    let mut typed = typed();
    if let Some(size) = terminal.size() {
        socket.send(size).await?;
    }
    loop {
        // Every arm is a channel's or a stream's own next: none loses anything when another wins.
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    let mut out = io::stdout().lock();
                    out.write_all(&bytes)?;
                    out.flush()?;
                }
                // The session's id; nothing else comes as text.
                Some(Ok(Message::Text(text))) if is_session(&text) => {}
                Some(Ok(Message::Text(text))) => write!(io::stdout().lock(), "{text}")?,
                Some(Ok(Message::Close(frame))) => return ended(terminal, frame),
                Some(Ok(_)) => {}
                Some(Err(Error::ConnectionClosed)) | None => return ended(terminal, None),
                Some(Err(error)) => {
                    drop(terminal);
                    return Err(error).context("the connection to the shell broke");
                }
            },
            bytes = typed.recv() => match bytes {
                Some(bytes) if terminal.is_one() && bytes.contains(&LEAVE) => {
                    let _ = socket.close(None).await;
                    drop(terminal);
                    eprintln!("left the shell");
                    return Ok(());
                }
                Some(bytes) => socket.send(Message::Binary(bytes.into())).await?,
                // What was piped in has ended, and the shell says the rest. It is told until it has heard: a program that changes
                // its terminal's mode while the key is on its way loses it.
                None => {
                    socket.send(Message::Binary(vec![END].into())).await?;
                    typed = nothing_for_a_while();
                }
            },
            _ = resized.recv() => if let Some(size) = terminal.size() { socket.send(size).await? },
        }
    }
}

fn is_session(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|message| message["type"] == "session_init")
}

fn ended(terminal: Terminal, frame: Option<CloseFrame>) -> Result<()> {
    drop(terminal);
    match frame {
        Some(frame) if frame.code == CloseCode::Normal => Ok(()),
        Some(frame) => Err(anyhow!("the shell was closed: {} ({})", frame.reason, u16::from(frame.code))),
        None => Err(anyhow!("the connection to the shell ended without a word; did the microVM end?")),
    }
}

/// Why there is no WebSocket.
fn refused(error: Error) -> anyhow::Error {
    match error {
        Error::Http(response) => {
            let reason = response.headers().get("x-dormouse-reason").and_then(|reason| reason.to_str().ok()).unwrap_or("no reason given").to_owned();
            anyhow!("the edge refused the shell with {}: {reason}", response.status())
        }
        error => anyhow::Error::new(error).context("opening the shell"),
    }
}

/// What is typed, read on a thread of its own: a terminal cannot be polled in the same way as a file or a pipe.
fn typed() -> mpsc::Receiver<Vec<u8>> {
    let (keys, typed) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(read @ 1..) = io::stdin().lock().read(&mut piece) {
            if keys.blocking_send(piece[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    typed
}

/// A receiver that says nothing, and ends a little later.
fn nothing_for_a_while() -> mpsc::Receiver<Vec<u8>> {
    let (keys, typed) = mpsc::channel(1);
    tokio::spawn(async move {
        tokio::time::sleep(END_AGAIN).await;
        drop(keys);
    });
    typed
}

/// The local terminal, raw while this lives.
struct Terminal {
    before: Option<Termios>,
}

impl Terminal {
    fn raw() -> Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(stdin.as_fd()).context("reading the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        // At once, and not flushed: what was typed ahead is for the shell.
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).context("setting the terminal's mode")?;
        Ok(Self { before: Some(before) })
    }

    fn is_one(&self) -> bool {
        self.before.is_some()
    }

    /// As the message that sets the size of the guest's terminal.
    fn size(&self) -> Option<Message> {
        self.before.as_ref()?;
        let size = tcgetwinsize(io::stdin().as_fd()).ok()?;
        Some(Message::Text(json!({"type": "resize", "cols": size.ws_col, "rows": size.ws_row}).to_string().into()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // There is nobody to tell, and nothing else to do.
            let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, before);
        }
    }
}
