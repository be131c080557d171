//! A shell in the app's world, on a terminal of its own, for a client that speaks WebSocket (aws-behaviour §2.1).
//!
//! ```text
//! client ── text, binary: what is typed; text {"type":"resize",…} ──► terminal ◄──► bash, or sh
//!        ◄── text {"type":"session_init",…}, then binary: what is printed ──┘
//! ```
//!
//! The shell is root and lives where the app does: its root file system, PID namespace and cgroup, so that one sees the app's
//! processes and falls asleep with them. Owns a session from the handshake to its end. Never trusts what the client sends
//! beyond a frame's size; the gateway has checked who it is. How many there may be is the gateway's to say.

use std::{io, os::fd::OwnedFd, path::Path, pin::pin, sync::Arc, time::Duration};

use futures::{SinkExt, Stream, StreamExt};
use protocol::agent::AppSpec;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::{
    accept_async_with_config,
    tungstenite::{
        self, Bytes, Message,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    app::{self, StartError},
    cgroup::AppCgroup,
    pipe::{self, Pipe},
    sys::{self, Role},
    terminal::Terminal,
};

/// Shells of the image, in the order of preference, and what they are called.
const SHELLS: [(&str, &str); 5] = [
    ("/bin/bash", "bash"),
    ("/usr/bin/bash", "bash"),
    ("/usr/local/bin/bash", "bash"),
    ("/bin/sh", "sh"),
    ("/usr/bin/sh", "sh"),
];
/// AWS's. Images whose shells read a start-up file may set another one.
const PROMPT: &str = "λ $ ";
/// What a client may type or paste in one message.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Of what is printed, this much goes into a message: what the kernel hands out at a time.
const PIECE_BYTES: usize = 4096;
/// The stream towards the host.
const STREAM_BYTES: usize = 16 * 1024;
/// What client and gateway have for the handshake, and for the answer to a Close.
const PATIENCE: Duration = Duration::from_secs(10);
/// From the hang-up to the kill.
const GRACE: Duration = Duration::from_secs(5);
/// A close reason's room (RFC 6455 §5.5: 125 bytes with its code).
const MAX_REASON_BYTES: usize = 123;

/// What a shell is started in.
pub(crate) struct World {
    pub app: OwnedFd,
    pub cgroup: OwnedFd,
    pub spec: Arc<AppSpec>,
}

impl World {
    /// The world of the app with this process id.
    pub fn of(app: Pid, cgroup: &AppCgroup, spec: Arc<AppSpec>) -> io::Result<Self> {
        let cgroup = cgroup.open_of(app).map_err(|error| error.source)?;
        Ok(Self { app: rustix::process::pidfd_open(app, PidfdFlags::empty())?, cgroup, spec })
    }
}

/// A client's connection to a new shell, and what serves it.
pub(crate) fn open(world: World) -> (Pipe, impl Future<Output = ()>) {
    let (theirs, ours) = pipe::pair(STREAM_BYTES);
    (theirs, async move {
        if let Err(error) = serve(ours, world).await {
            crate::say!("a shell's client broke off: {error}");
        }
    })
}

async fn serve(io: Pipe, world: World) -> tungstenite::Result<()> {
    let config = WebSocketConfig::default()
        .read_buffer_size(PIECE_BYTES)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let handshake = tokio::time::timeout(PATIENCE, accept_async_with_config(io, Some(config))).await;
    let mut socket = handshake.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))?;
    socket.send(Message::text(format!(r#"{{"type":"session_init","session_id":"{}"}}"#, session_id()?))).await?;

    let close = match start(world).await {
        Ok(shell) => {
            let (mut to_client, mut from_client) = socket.split();
            let carried = tokio::select! {
                // Either side's end is the end, and what the other was doing is of no use any more.
                printed = print(&shell.terminal, &mut to_client) => printed.map(|()| Some((CloseCode::Normal, "shell exited".to_owned()))),
                typed = type_in(&shell.terminal, &mut from_client) => typed.map(|()| None),
            };
            shell.hang_up().await;
            socket = to_client.reunite(from_client).expect("they are halves of one socket");
            match carried {
                Ok(close) => close,
                Err(tungstenite::Error::Capacity(_)) => Some((CloseCode::Size, format!("a message may have {MAX_MESSAGE_BYTES} bytes"))),
                Err(error) => return Err(error),
            }
        }
        Err(error) => Some((CloseCode::Error, error.to_string())),
    };
    if let Some((code, reason)) = close {
        socket.send(Message::Close(Some(CloseFrame { code, reason: shortened(reason).into() }))).await?;
    }
    // Until the client has answered, or the answer to its own Close is out; and then until it has left, so that it reads the
    // Close and not a reset, even in the middle of a message.
    let farewell = async {
        while let Some(Ok(_)) = socket.next().await {}
        let mut io = socket.into_inner();
        io.shutdown().await?;
        tokio::io::copy(&mut io, &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(PATIENCE, farewell).await;
    Ok(())
}

/// Not of a generator in this process's memory, which clones of a snapshot would share.
fn session_id() -> io::Result<uuid::Uuid> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(uuid::Builder::from_random_bytes(random).into_uuid())
}

/// What is printed, to the client, until no program has the terminal any more.
async fn print(terminal: &Terminal, client: &mut (impl SinkExt<Message, Error = tungstenite::Error> + Unpin)) -> tungstenite::Result<()> {
    let mut piece = [0; PIECE_BYTES];
    while let Ok(read) = terminal.read(&mut piece).await {
        client.send(Message::Binary(Bytes::copy_from_slice(&piece[..read]))).await?;
    }
    Ok(())
}

/// What the client types, until it leaves.
async fn type_in(terminal: &Terminal, client: &mut (impl Stream<Item = tungstenite::Result<Message>> + Unpin)) -> tungstenite::Result<()> {
    while let Some(message) = client.next().await {
        let typed = match message? {
            Message::Text(text) => match Resize::read(&text) {
                Some(Resize { cols, rows, .. }) => terminal.resize(cols, rows).map(|()| None)?,
                None => Some(Bytes::from(text)),
            },
            Message::Binary(bytes) => Some(bytes),
            // A ping is answered by the library.
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => None,
            Message::Close(_) => return Ok(()),
        };
        if let Some(typed) = typed
            && terminal.write_all(&typed).await.is_err()
        {
            // The terminal is gone; that is the printing side's to say.
            std::future::pending::<()>().await;
        }
    }
    Ok(())
}

/// The one message that is not typed. Any other JSON is.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Resize {
    #[serde(rename = "type")]
    kind: Kind,
    cols: u16,
    rows: u16,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Resize,
}

impl Resize {
    fn read(text: &str) -> Option<Self> {
        text.trim_start().starts_with('{').then(|| serde_json::from_str(text).ok()).flatten()
    }
}

fn shortened(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
    reason
}

/// A running shell.
struct Shell {
    terminal: Terminal,
    leader: OwnedFd,
}

async fn start(world: World) -> Result<Shell, StartError> {
    let (terminal, theirs) = Terminal::open().map_err(app::system("making a terminal"))?;
    let there = |(path, _): &&(&str, &str)| Path::new(path).exists();
    let (path, name) = SHELLS.iter().find(there).ok_or_else(|| StartError::Program { what: "a shell".to_owned(), why: "the image has neither bash nor sh".to_owned() })?;
    let env = environment(&world.spec);
    let spec = AppSpec { argv: vec![(*name).to_owned()], env, user: String::new(), ..AppSpec::clone(&world.spec) };
    let role = Role::Shell { app: world.app, terminal: theirs };
    let pid = app::run(&spec, (*path).to_owned(), role, world.cgroup).await?;
    let leader = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| app::system("watching the shell")(error.into()))?;
    Ok(Shell { terminal, leader })
}

/// The app's variables, and what a terminal wants.
fn environment(spec: &AppSpec) -> Vec<(String, String)> {
    let ours = [("TERM", "xterm"), ("HOME", "/root"), ("PS1", PROMPT)].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let theirs = spec.env.iter().filter(|(key, _)| ours.iter().all(|(our, _)| our != key)).cloned();
    theirs.chain(ours.clone()).collect()
}

impl Shell {
    /// Ends the terminal, upon which the kernel sends SIGHUP to the shell, and the shell to its jobs; what was started to
    /// outlive it (`nohup`, `setsid`) does. A shell that stays is killed, and its foreground job reads the hang-up then.
    async fn hang_up(self) {
        drop(self.terminal);
        let Ok(leader) = sys::watch_readable(self.leader) else { return };
        let mut gone = pin!(leader.readable());
        if tokio::time::timeout(GRACE, &mut gone).await.is_err() {
            // It fails only if the shell has just ended.
            let _ = rustix::process::pidfd_send_signal(leader.get_ref(), Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_resize_is_not_typed() {
        assert_eq!(Resize::read(r#"{"type":"resize","cols":80,"rows":24}"#), Some(Resize { kind: Kind::Resize, cols: 80, rows: 24 }));
        assert_eq!(Resize::read(r#" {"rows":1,"type":"resize","cols":65535,"more":[]}"#), Some(Resize { kind: Kind::Resize, cols: 65535, rows: 1 }));
        for typed in [
            "ls\n",
            "{",
            "{}",
            r#"{"type":"resize"}"#,
            r#"{"type":"resize","cols":-1,"rows":24}"#,
            r#"{"type":"resize","cols":80,"rows":65536}"#,
            r#"{"type":"size","cols":80,"rows":24}"#,
            r#"[{"type":"resize","cols":80,"rows":24}]"#,
        ] {
            assert_eq!(Resize::read(typed), None, "{typed}");
        }
    }

    #[test]
    fn the_apps_variables_are_the_shells() {
        let env = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<Vec<_>>();
        let spec = AppSpec {
            argv: Vec::new(),
            env: env(&[("PATH", "/opt/bin:/bin"), ("HOME", "/home/web"), ("TERM", "dumb"), ("AWS_REGION", "eu-west-1")]),
            workdir: "/srv".to_owned(),
            user: "web".to_owned(),
            exposed: Vec::new(),
            rights: Default::default(),
        };
        let expected = [("PATH", "/opt/bin:/bin"), ("AWS_REGION", "eu-west-1"), ("TERM", "xterm"), ("HOME", "/root"), ("PS1", "λ $ ")];
        assert_eq!(environment(&spec), env(&expected));
    }

    #[test]
    fn a_reason_fits_into_a_close() {
        let long = "λ".repeat(100);
        assert_eq!(shortened(long).len(), 122);
        assert_eq!(shortened("short".to_owned()), "short");
    }
}
