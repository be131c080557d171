//! One try: a connection, a request, the answer.

use std::{
    io,
    pin::{Pin, pin},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{
    Method, Request, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST},
};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use model::{Hook, Port};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_runtime::engine::{DialError, GuestStream, Vm};

use crate::Outcome;

/// Of an answer's header: more than any app sends.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Of an answer's body, so much is read before the connection is let go; only the status counts.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// A try that got no status.
pub(crate) struct Broken {
    pub outcome: Outcome,
    /// Another try is no use: the app had begun to answer, or is gone.
    pub final_word: bool,
}

/// How far a try has come, for one whose time is over.
#[derive(Default)]
pub(crate) struct Progress {
    /// The app may have the request.
    pub sent: AtomicBool,
    /// It has answered; what is outstanding is the rest of the body, which changes nothing.
    pub status: OnceLock<StatusCode>,
}

pub(crate) async fn exchange(vm: &dyn Vm, port: Port, hook: Hook, body: Option<Bytes>, progress: &Progress) -> Result<StatusCode, Broken> {
    let stream = vm.dial(port).await.map_err(|error| match error {
        DialError::Refused { .. } => Broken { outcome: Outcome::Refused, final_word: false },
        error => Broken { outcome: Outcome::Transport(error.to_string()), final_word: matches!(error, DialError::Gone) },
    })?;
    let answered = AtomicBool::new(false);
    let status = speak(Watched { stream, answered: &answered }, request(port, hook, body), progress).await;
    status.map_err(|error| Broken { outcome: Outcome::Transport(error), final_word: answered.into_inner() })
}

fn request(port: Port, hook: Hook, body: Option<Bytes>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body.clone().unwrap_or_default()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(hook.path());
    let headers = request.headers_mut();
    headers.insert(HOST, format!("localhost:{port}").try_into().expect("a number and letters are a header's value"));
    headers.insert(CONNECTION, http::HeaderValue::from_static("close"));
    // AWS's are made by a client that numbers its requests; of the others none was seen (aws-behaviour §4).
    if hook == Hook::Ready {
        let id = uuid::Uuid::new_v4().to_string();
        headers.insert("x-amzn-requestid", id.try_into().expect("a UUID is a header's value"));
    }
    match body {
        Some(_) => _ = headers.insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json")),
        None => _ = headers.insert(CONTENT_LENGTH, http::HeaderValue::from_static("0")),
    }
    request
}

async fn speak(io: Watched<'_>, request: Request<Full<Bytes>>, progress: &Progress) -> Result<StatusCode, String> {
    let broken = |error: hyper::Error| format!("the connection to the hook broke: {}", model::chain(&error));
    let mut client = http1::Builder::new();
    client.title_case_headers(true).max_buf_size(MAX_HEADER_BYTES);
    let (mut sender, connection) = client.handshake(TokioIo::new(io)).await.map_err(broken)?;
    let answer = async {
        progress.sent.store(true, Ordering::Relaxed);
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = *progress.status.get_or_init(|| answer.status());
        drain(answer.into_body()).await;
        Ok(status)
    };
    // It ends with the answer, or with an error that the answer has as well.
    let mut driving = pin!(async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    });
    tokio::select! {
        answer = answer => answer,
        () = &mut driving => Err("the connection to the hook ended".to_owned()),
    }
}

async fn drain(mut body: Incoming) {
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, Bytes::len);
        if read > MAX_BODY_BYTES {
            return;
        }
    }
}

/// A stream that remembers whether the other end has said anything.
struct Watched<'a> {
    stream: GuestStream,
    answered: &'a AtomicBool,
}

impl AsyncRead for Watched<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.answered.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Watched<'_> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
