//! A request to an app of HTTP/1.1, carried to it and its answer back in one loop.
//!
//! pingora's own way there runs two futures with two channels between them, makes a peer and a connector for each request and
//! copies what its phases for caching and retries would need: half of what a small request cost (load-tests/README.md).
//! How HTTP/1.1 is read, framed and written stays with pingora's sessions, and the rules are the same calls of `service` as
//! on that way, which is still taken for HTTP/2 towards the app and for WebSockets.
//!
//! A header in which all is as usual, which is nearly every one, is written out of the other side's as it stands; any other is taken
//! apart into pingora's and put together again.
//!
//! Owns: the order of reading and writing between the two sessions, and which connection to the app is used. An app that takes
//! nothing more is read all the same: it may have answered, or read on only when its answer is taken. Never sends a
//! request to an app that may have seen it: what fails before anything was sent is tried again, and so is what was sent on a
//! connection that its app had closed by then, which the guest's agent vouches for (`Use::is_untouched`). Nothing else is.

use std::{future::poll_fn, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{self, InvalidHeaderName},
};
use pingora_core::{
    Error, ErrorSource, ErrorType,
    protocols::http::{
        HttpTask, ServerSession as ClientSession, date,
        v1::{
            client::{Answered, HttpSession as AppSession, PlainResponse, RawRequestFraming},
            server::RawResponseFraming,
        },
    },
};
use pingora_http::{HeaderNameVariant, RequestHeader};
use pingora_proxy::{ProxyHttp as _, Session};

use crate::{
    connection::Guarded,
    context::Context,
    framing, headers,
    metrics::RetryCause,
    reply::Reason,
    service::{Service, client_left},
    upstream::{
        connector::{DialFailure, Woken},
        links::{Link, Speaks, Target},
        pool::Connection,
        transport::Transport,
    },
};

type Result<T, E = Box<Error>> = std::result::Result<T, E>;

/// The most of a body that is kept until the app begins to answer, to be said again. A connection that its app has closed is found
/// out within a round trip to the guest, in which few clients send more.
const KEPT: usize = 64 * 1024;

/// How long an app that has answered may take nothing more of a request's body. Then the body is given up, and the connection with it.
const AFTER_ITS_ANSWER: Duration = Duration::from_secs(2);
/// From then on it is looked whether the client of an upload that stands still is there at all.
const STANDS_STILL: Duration = Duration::from_secs(1);

/// What the app was sent of the body, as long as it may have to be said again.
struct Passed {
    pieces: Vec<Bytes>,
    bytes: usize,
    over: bool,
    whole: bool,
}

impl Passed {
    fn nothing() -> Self {
        Self { pieces: Vec::new(), bytes: 0, over: false, whole: true }
    }

    fn pass(&mut self, piece: &Bytes) {
        if self.whole && self.bytes + piece.len() <= KEPT {
            self.bytes += piece.len();
            self.pieces.push(piece.clone());
        } else {
            self.forget();
        }
    }

    /// It is not said again.
    fn forget(&mut self) {
        (self.whole, self.pieces) = (false, Vec::new());
    }
}

/// Which connections may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connections {
    Any,
    /// None that has idled.
    New,
}

/// What comes next.
enum Event {
    /// Of the app.
    Answer(Result<Answered>),
    /// Of the client: more of its body, the body's end, or its leaving.
    Body(Result<Option<Bytes>>),
    /// The app has taken what there is of the body, or will not.
    Taken(Taken),
}

/// How the wait for an app to take more of a body ended.
enum Taken {
    Some,
    Broken(io::Error),
    ClientLeft,
    TooLate,
}

/// Waits until the app has taken more.
async fn taken(link: &Arc<Link>, session: &mut Session, deadline: Option<Duration>) -> Taken {
    let taken = poll_fn(|cx| link.poll_taken(cx));
    tokio::pin!(taken);
    let said = |result: io::Result<()>| result.map_or_else(Taken::Broken, |()| Taken::Some);
    // Both arms may be dropped at any await.
    tokio::select! {
        biased;
        result = &mut taken => return said(result),
        () = tokio::time::sleep(deadline.unwrap_or(STANDS_STILL).min(STANDS_STILL)) => {}
    }
    let rest = deadline.map(|deadline| deadline.saturating_sub(STANDS_STILL));
    tokio::select! {
        biased;
        result = taken => said(result),
        () = client_left(session) => Taken::ClientLeft,
        () = tokio::time::sleep(rest.unwrap_or_default()), if rest.is_some() => Taken::TooLate,
    }
}

impl Service {
    /// Carries a request that may pass, if it is one for this way. Whether it was.
    pub(crate) async fn exchange(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        if ctx.speaks != Speaks::Http1 || !has_plain_target(session.req_header()) {
            return Ok(false);
        }
        let (mut passed, mut connections) = (Passed::nothing(), Connections::Any);
        let (mut app, link, reusable) = loop {
            let Connection { stream, link } = match self.connection(session, ctx, connections).await {
                Ok(Some(connection)) => connection,
                Ok(None) if connections == Connections::Any => return Ok(false),
                // It speaks something else than it did a moment ago.
                Ok(None) => return Err(Self::fail(ctx, Reason::GuestBroke)),
                // Nothing was sent.
                Err(error) if error.retry() => continue,
                Err(error) => return Err(error),
            };
            ctx.bytes_in = passed.bytes as u64;
            // Boxed: it would be in the future of each request twice.
            let mut app = Box::new(AppSession::new(stream));
            app.set_preserve_case(!session.is_http2());
            app.set_plain_responses(matches!(session.req_header().version, Version::HTTP_11 | Version::HTTP_2));
            match self.converse(session, &mut app, &link, ctx, &mut passed).await {
                Ok(reusable) => break (app, link, reusable),
                Err(error) if passed.whole && Box::pin(self.is_unseen(ctx, &error)).await => {
                    ctx.retries = ctx.retries.saturating_add(1);
                    self.metrics.retry(RetryCause::Untouched);
                    connections = Connections::New;
                }
                Err(error) => {
                    release(session.as_downstream()).await;
                    return Err(error);
                }
            }
        };
        ctx.link = None;
        if reusable {
            app.respect_keepalive();
            if let Some(stream) = app.reuse().await {
                self.peers.pool().give_back(Connection { stream, link });
            }
        }
        Ok(true)
    }

    /// Whether the app had closed the connection, which was used before, when the request was sent on it, and has seen nothing of it.
    async fn is_unseen(&self, ctx: &Context, error: &Error) -> bool {
        let is_the_apps = ctx.reused && ctx.reason.is_none() && *error.esource() == ErrorSource::Upstream;
        match &ctx.link {
            // Whatever cut the connection meanwhile says what the client is told.
            Some(link) if is_the_apps => link.is_untouched().await && ctx.cut.get().is_none(),
            _ => false,
        }
    }

    /// A connection to the app, taken up for this request; `None` if the app speaks HTTP/2.
    async fn connection(&self, session: &mut Session, ctx: &mut Context, connections: Connections) -> Result<Option<Connection>> {
        let target = self.target(session, ctx).await?;
        if target.speaks != Speaks::Http1 {
            return Ok(None);
        }
        if connections == Connections::Any
            && let Some((connection, taken)) = self.peers.pool().take(target)
        {
            ctx.reused = true;
            self.begin_use(session, ctx, &connection.link, taken);
            return Ok(Some(connection));
        }
        Box::pin(self.new_connection(session, ctx, target)).await.map(Some)
    }

    async fn new_connection(&self, session: &mut Session, ctx: &mut Context, target: Target) -> Result<Connection> {
        ctx.reused = false;
        let (Some(awake), Some(permit)) = (ctx.awake.clone(), &ctx.permit) else {
            return Err(Self::fail(ctx, Reason::Internal));
        };
        let microvm = permit.microvm().clone();
        let name = (target.transport != Transport::Plain).then(|| self.name_inside(session.req_header()));
        let dialled = tokio::select! {
            // In this order: a dial that is done at once costs no watch. Either arm may be dropped at any await.
            biased;
            dialled = self.peers.connection(target, name, Woken { microvm: &microvm, awake: &awake }) => dialled,
            () = client_left(session) => Err(DialFailure::ClientLeft),
        };
        match dialled {
            Ok(connection) => match connection.link.take_up() {
                Some(taken) => {
                    self.begin_use(session, ctx, &connection.link, taken);
                    Ok(connection)
                }
                // The gateway ends.
                None => Err(Self::fail(ctx, Reason::Internal)),
            },
            Err(failure) => {
                let mut error = Error::new_up(ErrorType::ConnectError);
                self.give_up_or_retry(ctx, failure, &mut error);
                Err(error)
            }
        }
    }

    /// Carries both bodies until both are over. Whether the connection to the app may serve another request.
    async fn converse(
        &self,
        session: &mut Session,
        app: &mut AppSession,
        link: &Arc<Link>,
        ctx: &mut Context,
        passed: &mut Passed,
    ) -> Result<bool> {
        let bodyless = session.as_downstream_mut().is_body_empty();
        let request = session.req_header();
        let as_written = match session.as_downstream() {
            ClientSession::H1(client) => Some(client.fields_as_written()),
            ClientSession::H2(_) | ClientSession::Subrequest(_) | ClientSession::Custom(_) => None,
        };
        let Ok((wire, framing)) = request_for_app(request, as_written, bodyless, &ctx.request_id) else {
            return Err(Self::fail(ctx, Reason::MalformedRequest));
        };
        app.write_raw_request_header(&wire, request.method == Method::HEAD, framing).await.map_err(Error::into_up)?;
        for piece in &passed.pieces {
            app.write_body(piece).await.map_err(Error::into_up)?;
        }
        if passed.over {
            app.finish_body().await.map_err(Error::into_up)?;
        }
        let _member = self.crowd.join();
        let mut next = (bodyless && !passed.over).then_some(Event::Body(Ok(None)));
        let (mut asked, mut heard, mut answered, mut reusable, mut unsent) = (passed.over, false, false, true, None);
        while !asked || !answered {
            let event = match next.take() {
                Some(event) => event,
                // What the app has not taken comes before more of it; that it does not take it does not keep its answer from being read.
                None if link.is_full() => {
                    let deadline = match (heard, answered) {
                        (false, _) => ctx.limits.guest_body_deadline,
                        (true, false) => None,
                        (true, true) => Some(AFTER_ITS_ANSWER),
                    };
                    tokio::select! {
                        task = app.read_answer(), if !answered => Event::Answer(task),
                        taken = Box::pin(taken(link, session, deadline)) => Event::Taken(taken),
                    }
                }
                None => {
                    let client = session.as_downstream_mut();
                    let client = async {
                        // The app has nothing to add to what is held for the moment.
                        release(client).await;
                        client.read_body_or_idle(asked).await
                    };
                    // The app first, once it has been asked: as long as it has something to say nobody looks after the client.
                    // Before, in turns. Every arm may be dropped at any await.
                    if asked {
                        tokio::select! {
                            biased;
                            task = app.read_answer() => Event::Answer(task),
                            body = client => Event::Body(body),
                        }
                    } else {
                        tokio::select! {
                            task = app.read_answer(), if !answered => Event::Answer(task),
                            body = client => Event::Body(body),
                        }
                    }
                }
            };
            match event {
                Event::Answer(Ok(Answered::Plain(answer, over))) => {
                    (heard, answered) = (true, over);
                    passed.forget();
                    self.pass_plain_header(session, &answer, over, ctx).await?;
                }
                Event::Answer(Ok(Answered::Task(task))) => {
                    heard |= !matches!(&task, HttpTask::Header(answer, _) if answer.status.is_informational());
                    answered = task.is_end();
                    passed.forget();
                    self.pass_answer(session, task, ctx).await?;
                }
                // Why the app did not get all of the request says more than that it broke off.
                Event::Answer(Err(error)) => return Err(unsent.unwrap_or(error).into_up()),
                Event::Body(Err(error)) => return Err(error.into_down()),
                Event::Body(Ok(body)) => match self.pass_body(session, app, body, ctx, passed).await {
                    Ok(over) => asked = over,
                    Err(Unpassed::Refused(error)) => return Err(error),
                    // The app takes no more of the request. It may have said why: its answer is still passed on.
                    Err(Unpassed::Untaken(error)) => (asked, reusable, unsent) = (true, false, Some(error)),
                },
                Event::Taken(Taken::Some) => {}
                Event::Taken(Taken::Broken(error)) => {
                    let error = Error::because(ErrorType::WriteError, "while writing body", error).into_up();
                    (asked, reusable, unsent) = (true, false, Some(error));
                }
                Event::Taken(Taken::ClientLeft) => return Err(Self::gone(ctx)),
                Event::Taken(Taken::TooLate) if answered => (asked, reusable) = (true, false),
                Event::Taken(Taken::TooLate) => return Err(Self::fail(ctx, Reason::GuestTakesNothing)),
            }
        }
        reusable &= !link.is_full();
        if session.as_downstream_mut().finish_body().await.is_err() {
            session.set_keepalive(None);
        }
        Ok(reusable)
    }

    /// Passes a piece of the client's body; `None` is its end. Whether that was all.
    async fn pass_body(
        &self,
        session: &mut Session,
        app: &mut AppSession,
        mut body: Option<Bytes>,
        ctx: &mut Context,
        passed: &mut Passed,
    ) -> Result<bool, Unpassed> {
        let over = body.is_none() || session.as_downstream_mut().is_body_done();
        self.request_body_filter(session, &mut body, over, ctx).await.map_err(Unpassed::Refused)?;
        let untaken = |error: Box<Error>| Unpassed::Untaken(error.into_up());
        // An empty piece would be the end of a chunked body.
        if let Some(bytes) = body.filter(|bytes| !bytes.is_empty()) {
            if ctx.reused {
                passed.pass(&bytes);
            }
            app.write_body(&bytes).await.map_err(untaken)?;
        }
        passed.over = over;
        if over {
            app.finish_body().await.map_err(untaken)?;
        }
        Ok(over)
    }

    /// Passes the header of an answer that is as usual: written out of the app's at once, with what the edge says in it.
    async fn pass_plain_header(&self, session: &mut Session, answer: &PlainResponse, over: bool, ctx: &mut Context) -> Result<()> {
        let bytes = answer.fields().map(|(name, value)| name.len() + value.len()).sum();
        if Self::answer_too_large(ctx, answer.fields().len(), bytes) {
            return Err(Self::fail(ctx, Reason::GuestHeaderTooLarge));
        }
        let media_type = answer.fields().find(|(name, _)| name.eq_ignore_ascii_case(b"content-type"));
        let has_length = answer.content_length.is_some();
        self.answer_begins(session, ctx, headers::kind_of(answer.status, media_type.map_or(b"", |(_, value)| value), has_length));
        let framing = match answer.content_length {
            _ if !has_body(session.req_header(), answer.status) => RawResponseFraming::Length(0),
            Some(length) => RawResponseFraming::Length(length),
            None => RawResponseFraming::Chunked,
        };
        if has_length && !over && let Some(client) = Guarded::of(session) {
            client.hold_next();
        }
        let client = match session.as_downstream_mut() {
            ClientSession::H1(client) => client,
            ClientSession::H2(client) => {
                let Ok(fields) = answer_over_h2(answer, &ctx.request_id) else { return Err(Self::fail(ctx, Reason::GuestBroke)) };
                return client.write_finished_response(answer.status, fields, over).map_err(Error::into_down);
            }
            ClientSession::Subrequest(_) | ClientSession::Custom(_) => return Err(Self::fail(ctx, Reason::Internal)),
        };
        let Some(goes_on) = client.begin_raw_response(framing) else { return Ok(()) };
        let chunked_here = framing == RawResponseFraming::Chunked && !answer.chunked;
        let wire = answer_for_client(answer, &Edge { request_id: &ctx.request_id, goes_on, chunked_here });
        if over {
            self.crowd.let_others_first().await;
        }
        client.write_raw_response_header(&wire, answer.status, !has_length).await.map_err(Error::into_down)?;
        if over {
            client.finish_body().await.map_err(Error::into_down)?;
        }
        Ok(())
    }

    /// Passes a piece of the app's answer.
    async fn pass_answer(&self, session: &mut Session, mut task: HttpTask, ctx: &mut Context) -> Result<()> {
        match &mut task {
            HttpTask::Header(answer, over) => {
                if let Some(length) = headers::length_said_again(&answer.headers) {
                    answer.insert_header(header::CONTENT_LENGTH, length)?;
                }
                self.upstream_response_filter(session, answer, ctx).await?;
                let has_length = answer.headers.contains_key(header::CONTENT_LENGTH);
                if !has_length && !*over && has_body(session.req_header(), answer.status) && !answer.headers.contains_key(header::TRANSFER_ENCODING) {
                    // Of an app of HTTP/1.0 that ends its body by closing: the client's connection can go on.
                    answer.set_version(Version::HTTP_11);
                    answer.insert_header(header::TRANSFER_ENCODING, "chunked")?;
                }
                if has_length && !*over && let Some(client) = Guarded::of(session) {
                    client.hold_next();
                }
            }
            HttpTask::Body(bytes, over) => {
                // It asks for no delay.
                let _ = self.upstream_response_body_filter(session, bytes, *over, ctx)?;
            }
            HttpTask::UpgradedBody(..) | HttpTask::Trailer(_) | HttpTask::Done | HttpTask::Failed(_) => {}
        }
        // Answers of HTTP/2 gather where their connection is written.
        if task.is_end() && !session.is_http2() {
            self.crowd.let_others_first().await;
        }
        session.as_downstream_mut().response_duplex_vec(vec![task]).await.map(|_| ())
    }
}

/// Why a piece of the client's body did not reach the app.
enum Unpassed {
    /// A rule of ours is against it.
    Refused(Box<Error>),
    /// The app did not take it.
    Untaken(Box<Error>),
}

/// The request cannot be said to an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unspeakable;

/// The header that the app reads, as it is on the wire, and how the body is framed that follows it. Written out of the
/// request as it came: to change a copy of it field by field takes several times as long. `as_written`: its fields as HTTP/1.1 has
/// them; those of HTTP/2 are in `request` alone.
fn request_for_app<'a>(
    request: &RequestHeader,
    as_written: Option<impl Iterator<Item = (&'a [u8], &'a [u8])>>,
    bodyless: bool,
    request_id: &str,
) -> Result<(Vec<u8>, RawRequestFraming), Unspeakable> {
    let target = request.raw_path();
    if target.iter().any(|byte| byte.is_ascii_control() || *byte == b' ') {
        return Err(Unspeakable);
    }
    let mut dropped = headers::of_this_hop(&request.headers).map_err(|headers::BadConnection| Unspeakable)?;
    dropped.extend(headers::reserved(&request.headers));
    // A subprotocol may hold a token. The request's name is ours to give.
    dropped.extend([header::SEC_WEBSOCKET_PROTOCOL, HeaderName::from_static(headers::REQUEST_ID_FIELD)]);
    // HTTP/2 names the host in the target, HTTP/1.1 may (RFC 9113 §8.3.1, RFC 9112 §3.2.2).
    let host = request.uri.authority().map(|authority| authority.as_str());
    dropped.extend(host.map(|_| header::HOST));
    let cookie = headers::joined_cookie(&request.headers);
    dropped.extend(cookie.as_ref().map(|_| header::COOKIE));

    let mut wire = Vec::with_capacity(512);
    for piece in [request.method.as_str().as_bytes(), b" ", target, b" HTTP/1.1\r\n"] {
        wire.extend_from_slice(piece);
    }
    let mut say = |name: &[u8], value: &[u8]| [name, b": ", value, b"\r\n"].iter().for_each(|piece| wire.extend_from_slice(piece));
    if let Some(host) = host {
        say(b"Host", host.as_bytes());
    }
    let mut pass = |name: &[u8], value: &[u8]| {
        if !dropped.iter().any(|dropped| name.eq_ignore_ascii_case(dropped.as_str().as_bytes())) {
            say(name, value);
        }
    };
    match as_written {
        Some(fields) => fields.for_each(|(name, value)| pass(name, value)),
        None => {
            // HTTP/1.1's way of writing a name of HTTP/2.
            let each = request.map(|name, value| {
                match &name {
                    HeaderNameVariant::Case(name) => pass(name.as_slice(), value.as_bytes()),
                    HeaderNameVariant::Titled(name) => pass(name.as_bytes(), value.as_bytes()),
                }
                Ok(())
            });
            each.map_err(|_| Unspeakable)?;
        }
    }
    if let Some(cookie) = cookie {
        say(b"Cookie", cookie.as_bytes());
    }
    say(headers::REQUEST_ID_FIELD.as_bytes(), request_id.as_bytes());
    let framing = match request.headers.contains_key(header::CONTENT_LENGTH) {
        true => {
            let length = framing::stated_length(&request.headers).and_then(|length| usize::try_from(length).ok());
            RawRequestFraming::Length(length.ok_or(Unspeakable)?)
        }
        false if bodyless => RawRequestFraming::Length(0),
        false => {
            say(b"Transfer-Encoding", b"chunked");
            RawRequestFraming::Chunked
        }
    };
    wire.extend_from_slice(b"\r\n");
    Ok((wire, framing))
}

/// Whether the target is a path or `*`, or names its host so that it can be read.
fn has_plain_target(request: &RequestHeader) -> bool {
    request.raw_path().starts_with(b"/") || request.raw_path() == b"*" || request.uri.authority().is_some()
}

/// RFC 9112 §6.3.
fn has_body(request: &RequestHeader, answer: StatusCode) -> bool {
    request.method != Method::HEAD && !answer.is_informational() && !matches!(answer, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// What the edge has to say in an answer's header.
struct Edge<'a> {
    request_id: &'a str,
    /// Whether the client's connection does.
    goes_on: bool,
    /// The app ends its body by closing its connection, which the client's need not follow.
    chunked_here: bool,
}

/// The header that the client reads, as it is on the wire.
fn answer_for_client(answer: &PlainResponse, edge: &Edge<'_>) -> Vec<u8> {
    let mut wire = Vec::with_capacity(512);
    for piece in [b"HTTP/1.1 ", answer.status.as_str().as_bytes(), b" ", answer.reason(), b"\r\n"] {
        wire.extend_from_slice(piece);
    }
    let mut say = |name: &[u8], value: &[u8]| [name, b": ", value, b"\r\n"].iter().for_each(|piece| wire.extend_from_slice(piece));
    for (name, value) in answer.fields() {
        if !headers::is_said_by_the_edge(name) {
            say(name, value);
        }
    }
    if edge.chunked_here {
        say(b"Transfer-Encoding", b"chunked");
    }
    say(b"Date", date::get_cached_date().as_bytes());
    say(b"Connection", if edge.goes_on { b"keep-alive" } else { b"close" });
    say(headers::REQUEST_ID_FIELD.as_bytes(), edge.request_id.as_bytes());
    wire.extend_from_slice(b"\r\n");
    wire
}

/// The same for a client of HTTP/2.
fn answer_over_h2(answer: &PlainResponse, request_id: &str) -> Result<Vec<(HeaderName, HeaderValue)>, InvalidHeaderName> {
    let fields = answer.shared_fields();
    let mut finished = Vec::with_capacity(fields.len() + 2);
    for (name, value) in fields {
        if !headers::is_of_http_1(name) && !headers::is_said_by_the_edge(name) {
            finished.push((HeaderName::from_bytes(name)?, value));
        }
    }
    finished.push((header::DATE, date::get_cached_date()));
    finished.push((HeaderName::from_static(headers::REQUEST_ID_FIELD), headers::request_id(request_id)));
    Ok(finished)
}

/// Sends what is held of an answer that does not go on for now.
async fn release(client: &ClientSession) {
    if let Some(guarded) = Guarded::under(client) {
        // What fails here fails again, and is told, when the connection is read or written next.
        let _ = poll_fn(|cx| guarded.poll_release(cx)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a request of HTTP/2, and of the same of HTTP/1.1.
    fn said(request: &RequestHeader, bodyless: bool) -> Result<(String, RawRequestFraming), Unspeakable> {
        let mut fields = Vec::new();
        let each = request.map(|name, value| {
            let HeaderNameVariant::Case(name) = name else { return Ok(()) };
            fields.push((name.as_slice().to_vec(), value.as_bytes().to_vec()));
            Ok(())
        });
        each.unwrap();
        let as_written = fields.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
        let by_fields = request_for_app(request, Some(as_written), bodyless, "the-id");
        assert_eq!(by_fields, request_for_app(request, None::<std::iter::Empty<_>>, bodyless, "the-id"));
        by_fields.map(|(wire, framing)| (String::from_utf8(wire).unwrap(), framing))
    }

    fn request(method: &str, path: &[u8], fields: &[(&'static str, &'static str)]) -> RequestHeader {
        let mut request = RequestHeader::build(method, path, None).unwrap();
        for (name, value) in fields {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    #[test]
    fn what_concerns_the_edge_stays_there_and_the_rest_passes_as_it_was_written() {
        let fields = [
            ("Host", "h"),
            ("X-Aws-Proxy-Auth", "secret"),
            ("x_aws_proxy_port", "1"),
            ("Sec-WebSocket-Protocol", "secret"),
            ("X-Amzn-RequestId", "forged"),
            ("Connection", "keep-alive, X-Hop"),
            ("X-Hop", "1"),
            ("X-Two", "1"),
            ("X-Two", "2"),
            ("Cookie", "a=1"),
        ];
        let expected = "GET /a?b HTTP/1.1\r\nHost: h\r\nX-Two: 1\r\nX-Two: 2\r\nCookie: a=1\r\nx-amzn-requestid: the-id\r\n\r\n";
        assert_eq!(said(&request("GET", b"/a?b", &fields), true), Ok((expected.to_owned(), RawRequestFraming::Length(0))));
    }

    #[test]
    fn a_body_is_framed_once() {
        let (wire, framing) = said(&request("POST", b"/", &[("content-length", "5")]), false).unwrap();
        assert!(wire.contains("\r\ncontent-length: 5\r\n") && framing == RawRequestFraming::Length(5), "{wire}");
        let (wire, framing) = said(&request("POST", b"/", &[("transfer-encoding", "chunked")]), false).unwrap();
        assert_eq!((wire.matches("chunked").count(), framing), (1, RawRequestFraming::Chunked));
        assert_eq!(said(&request("POST", b"/", &[("content-length", "99999999999999999999")]), false), Err(Unspeakable));
    }

    #[test]
    fn a_host_in_the_target_wins_and_cookies_are_one() {
        let mut request = request("GET", b"/", &[("host", "other"), ("cookie", "a=1"), ("cookie", "b=2")]);
        request.set_uri(http::Uri::from_static("https://named/x"));
        let (wire, _) = said(&request, true).unwrap();
        assert!(wire.contains("Host: named\r\n") && !wire.contains("other") && wire.contains("Cookie: a=1; b=2\r\n"), "{wire}");
    }
}
