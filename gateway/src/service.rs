//! pingora's phases, one call each. The rules are elsewhere; this says in which order they apply.
//!
//! `request_filter`: framing → handshake → route → permit → wake → `exchange`, where the app speaks HTTP/1.1.
//! `upstream_peer`: awake → peer, for what is left. The filters after it change headers, count bytes and report activity.
//! An error of ours carries its [`Reason`] in the context; what pingora finds by itself is mapped in
//! [`Service::reason_of`].

use std::{
    future::poll_fn,
    net::Ipv4Addr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Version, header};
use idle_controller::Awake;
use model::{Clock as _, MicrovmId, SystemClock};
use pingora_core::{
    Error, ErrorSource, ErrorType, Result, RetryType,
    modules::http::HttpModules,
    protocols::{Digest, http::ServerSession as HttpSession, l4::socket::SocketAddr},
    upstreams::peer::HttpPeer,
};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use rustls::pki_types::ServerName;
use time::OffsetDateTime;
use token::KeyRing;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    Limits, Microvms,
    access_log::{AccessLog, Entry},
    auth::permit::{Door, Permit},
    connection::Guarded,
    context::{Context, Watch},
    crowd::Crowd,
    drain::{STREAM_SILENCE, Traffic},
    framing,
    headers::{self, AnswerKind},
    held::{self, Ledger},
    metrics::{HoldEnd, Metrics, Protocol, RetryCause, StreamKind},
    neighbourhood::Rate,
    reply::{Asker, Reason},
    route::Route,
    tally::{Share, Tally},
    upstream::{
        connector::{DialFailure, FailureSlot, Peers, TunnelSlot, Woken},
        links::{Link, Speaks, Target, Use},
        transport::Transport,
        tunnel::{self, Way},
    },
    wake::{self, NotAwake},
    websocket::{self, Handshake},
};

/// A microVM that falls asleep between wake and dial is woken again this often; then the request is given up.
const MAX_FOUND_ASLEEP: u8 = 3;
/// Interim answers (1xx) passed on per request; a guest that sends more is broken.
const MAX_INTERIM: u8 = 16;
/// Fields of a guest's answer. An app sets a few dozen; pingora's own limit for HTTP/1.1 is 256, and for HTTP/2 there is none.
const MAX_ANSWER_FIELDS: usize = 200;
/// How often within the deadline for a body's next bytes it is looked whether some came.
const UPLOAD_LOOKS: u32 = 4;
/// The body of a refused request is read and thrown away up to this size and time, so that its connection can go on.
const MAX_SWALLOWED: usize = 64 * 1024;
const SWALLOW_TIME: Duration = Duration::from_secs(2);

/// The gateway's service.
pub(crate) struct Service {
    /// Endpoints are `<uuid>.<domain_suffix>`.
    pub domain_suffix: String,
    /// The limits in force.
    pub limits: Limits,
    /// What the requests occupy that wait for wakes.
    pub held: Arc<Ledger>,
    /// Tokens a second, by address.
    pub tokens: Rate,
    /// Shells that are open.
    pub shells: Arc<Tally<MicrovmId>>,
    /// The microVMs.
    pub microvms: Microvms,
    /// Opens tokens.
    pub keys: KeyRing,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The access log.
    pub log: AccessLog,
    /// Connections to guests.
    pub peers: Peers,
    /// The requests that are being carried.
    pub crowd: Crowd,
}

/// What becomes of the client's connection after an answer of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    /// It goes on if the request's body can be got out of the way.
    KeepIfClean,
    /// It is closed: where the next request begins cannot be known, or must not be relied on.
    Close,
}

impl Service {
    /// Everything that is decided before any state is touched.
    fn permit(&self, session: &Session, ctx: &Context) -> Result<Permit, Reason> {
        let request = session.req_header();
        let may_open = || match (ctx.limits.max_tokens_per_second, session.client_addr()) {
            (Some(rate), Some(SocketAddr::Inet(client))) => self.tokens.take(client.ip(), rate, Instant::now()),
            _ => true,
        };
        let controller = self.microvms.get().ok_or(Reason::Internal)?;
        let route = Route::of(&request.uri, &request.headers, &self.domain_suffix);
        let timer = self.metrics.token_open_seconds.start_timer();
        let permit = Permit::check(&self.keys, controller, route, &request.headers, ctx.handshake.as_ref(), SystemClock.wall(), may_open);
        timer.observe_duration();
        permit
    }

    fn check_body(ctx: &Context, headers: &HeaderMap) -> Result<(), Reason> {
        match (ctx.limits.max_body_bytes, framing::stated_length(headers)) {
            (Some(limit), Some(length)) if length > limit => Err(Reason::BodyTooLarge),
            _ => Ok(()),
        }
    }

    /// A place among the shells of its microVM, if the request is one.
    fn shell(&self, ctx: &Context, permit: &Permit) -> Result<Option<Share<MicrovmId>>, Reason> {
        match permit.door() {
            Door::Port(_) => Ok(None),
            Door::Shell => {
                let limit = ctx.limits.max_shells_per_microvm;
                self.shells.take(permit.microvm().id(), 1, limit).map(Some).ok_or(Reason::TooManyShells)
            }
        }
    }

    /// Waits until an earlier process has let go of the microVMs, which takes its grace and a little, and as long as this
    /// process holds requests at all.
    async fn microvms_come(&self, session: &mut Session, ctx: &mut Context) -> Result<(), NotAwake> {
        let (hold, grace) = (ctx.limits.hold, ctx.limits.grace);
        tokio::select! {
            biased;
            () = self.microvms.there() => {}
            () = client_left(session) => return Err(NotAwake::ClientLeft),
            () = tokio::time::sleep(grace + hold) => return Err(NotAwake::Refused(Reason::WakeTimeout)),
        }
        // Its wake has as long as any other's.
        ctx.hold_until = Instant::now() + hold;
        Ok(())
    }

    /// Keeps a hold on the microVM in the context; waits for it where it is not awake.
    async fn wake(&self, session: &mut Session, ctx: &mut Context) -> Result<(), NotAwake> {
        match ctx.permit.as_ref().and_then(|permit| permit.microvm().awake_already()) {
            Some(awake) => ctx.awake = Some(Arc::new(awake)),
            // In a box, as is all that few requests come to: each request's future has room for what stands in it.
            None => Box::pin(self.wait_for(session, ctx)).await?,
        }
        Ok(())
    }

    /// Waits for the microVM and keeps its hold in the context.
    async fn wait_for(&self, session: &mut Session, ctx: &mut Context) -> Result<(), NotAwake> {
        let permit = ctx.permit.as_ref().ok_or(NotAwake::Refused(Reason::Internal))?;
        let left = async {
            let limits = &ctx.limits;
            let Some(_held) = self.held.enter(permit.microvm().id(), held::weight(session, limits), limits) else {
                return NotAwake::Refused(Reason::TooManyHeldBytes);
            };
            client_left(session).await;
            NotAwake::ClientLeft
        };
        let awake = match wake::held(permit, ctx.hold_until, left).await {
            Ok(awake) => awake,
            Err((why, report)) => {
                // One who was refused at once was not held.
                if !report.waited.is_zero() {
                    self.metrics.hold(if why == NotAwake::ClientLeft { HoldEnd::Left } else { HoldEnd::Refused }, report.waited);
                    ctx.waited(&report);
                }
                return Err(why);
            }
        };
        if let Some(report) = awake.woke() {
            self.metrics.hold(HoldEnd::Awake, report.waited);
            ctx.waited(report);
        }
        ctx.awake = Some(Arc::new(awake));
        Ok(())
    }

    /// Answers by itself, by hand: pingora's own way closes the connection each time.
    async fn refuse(&self, session: &mut Session, ctx: &mut Context, reason: Reason, afterwards: Afterwards) -> Result<()> {
        ctx.reason = Some(reason);
        if afterwards == Afterwards::Close || self.peers.links().drain().has_begun() || !(session.is_http2() || swallow_body(session).await) {
            session.set_keepalive(None);
        }
        let reply = reason.reply();
        let mut answer = ResponseHeader::build(reply.status, Some(8))?;
        for (name, value) in reply.fields(&ctx.request_id, ctx.asker) {
            answer.insert_header(name, value.as_ref())?;
        }
        let body = reply.body(ctx.asker);
        if ctx.asker == Asker::Plain {
            answer.insert_header(header::CONTENT_LENGTH, body.len())?;
        }
        let has_body = !body.is_empty() && session.req_header().method != Method::HEAD;
        let downstream = session.as_downstream_mut();
        match downstream {
            // The header ends the stream: gRPC clients take a status in it for theirs only then.
            HttpSession::H2(stream) if !has_body => stream.write_response_header(Box::new(answer), true)?,
            _ => downstream.write_response_header(Box::new(answer)).await?,
        }
        if has_body {
            downstream.write_response_body(Bytes::from_static(body.as_bytes()), true).await?;
        }
        downstream.finish_body().await?;
        if session.is_http2() {
            // A stream that ends under a client which is still sending is reset, and curl then shows the reset and not the answer.
            swallow_body(session).await;
        }
        Ok(())
    }

    /// Whose fault an error is, and what the client reads.
    fn reason_of(&self, error: &Error, ctx: &Context) -> Option<Reason> {
        if let Some(reason) = ctx.reason {
            return Some(reason);
        }
        if let Some(reason) = ctx.cut.get() {
            return Some(*reason);
        }
        if ctx.link.as_ref().is_some_and(|link| link.is_oversized()) {
            return Some(Reason::GuestHeaderTooLarge);
        }
        match (error.esource(), error.etype()) {
            (ErrorSource::Downstream, ErrorType::ReadTimedout) => Some(Reason::BodyTimeout),
            (ErrorSource::Downstream, ErrorType::InvalidHTTPHeader) => Some(Reason::MalformedRequest),
            // pingora's names for a body whose chunks or trailers cannot be told apart.
            (ErrorSource::Downstream, kind) if ["InvalidChunk", "InvalidTrailerEnd"].contains(&kind.as_str()) => Some(Reason::MalformedRequest),
            // The client is gone, or breaks the rules of HTTP/2 and has been told so by a reset.
            (ErrorSource::Downstream, _) => None,
            (ErrorSource::Upstream, ErrorType::ConnectTimedout) => Some(Reason::GuestTimeout),
            (ErrorSource::Upstream, ErrorType::WriteTimedout) => Some(Reason::GuestTakesNothing),
            (ErrorSource::Upstream, _) => Some(Reason::GuestBroke),
            (ErrorSource::Internal | ErrorSource::Unset, _) => Some(Reason::Internal),
        }
    }

    /// Looks so many times within `limit` whether more has come, and does `then` once nothing has for all of it. A look at
    /// which it is `excused` does not count.
    fn watch_silence(&self, limit: Duration, looks: u32, excused: impl Fn() -> bool + Send + 'static, then: impl FnOnce() + Send + 'static) -> Watch {
        let progress = Arc::new(AtomicU64::new(0));
        let watched = progress.clone();
        let task = self.peers.links().watch(async move {
            let (mut seen, mut silent) = (0, 0);
            while silent < looks {
                tokio::time::sleep(limit / looks).await;
                let now = watched.load(Ordering::Relaxed);
                silent = if now == seen && !excused() { silent + 1 } else { 0 };
                seen = now;
            }
            then();
        });
        Watch { progress, _task: AbortOnDropHandle::new(task) }
    }

    /// Takes an answer whose length nobody knows for an open stream once nothing has come of it for [`STREAM_SILENCE`].
    fn watch(&self, awake: Arc<Awake>) -> Watch {
        self.watch_silence(STREAM_SILENCE, 1, || false, move || awake.streaming())
    }

    /// Carries a WebSocket from its 101 to its end. The error tells pingora that there is nothing left to do.
    async fn tunnel(&self, session: &mut Session, answer: &ResponseHeader, ctx: &mut Context) -> Result<()> {
        let Some(guest) = ctx.tunnel.get().cloned() else {
            return Err(Self::fail(ctx, Reason::Internal));
        };
        session.as_downstream_mut().write_response_header(Box::new(answer.clone())).await?;
        // What came in one piece with the handshake waits in pingora.
        let early = {
            let mut early = std::pin::pin!(session.as_downstream_mut().read_request_body());
            poll_fn(|cx| Poll::Ready(early.as_mut().poll(cx))).await
        };
        let early = match early {
            Poll::Ready(early) => early?,
            Poll::Pending => Some(Bytes::new()),
        };
        if let (Some(early), Some(client)) = (early, Guarded::of(session)) {
            let came = |way, length| {
                let length = length as u64;
                let (sum, total) = match way {
                    Way::In => (&mut ctx.bytes_in, &self.metrics.bytes_in),
                    Way::Out => (&mut ctx.bytes_out, &self.metrics.bytes_out),
                };
                *sum += length;
                total.inc_by(length);
                if let Some(awake) = &ctx.awake {
                    awake.touch();
                }
            };
            if let Err(error) = tunnel::carry(client, &guest, early, came).await {
                tracing::debug!(request.id = ctx.request_id, kind = ?error.kind(), "a WebSocket broke off");
            }
        }
        session.as_downstream_mut().shutdown().await;
        Err(Error::new_down(ErrorType::ConnectionClosed))
    }

    /// What an app of TLS is asked for: the name that its clients use.
    pub(crate) fn name_inside(&self, request: &RequestHeader) -> ServerName<'static> {
        let suffix = &self.domain_suffix;
        let endpoint = Route::of(&request.uri, &request.headers, suffix).endpoint();
        let name = endpoint.and_then(|endpoint| ServerName::try_from(format!("{endpoint}.{suffix}")).ok());
        name.unwrap_or_else(|| ServerName::IpAddress(Ipv4Addr::LOCALHOST.into()))
    }

    /// The app has begun to answer.
    pub(crate) fn answer_begins(&self, session: &mut Session, ctx: &mut Context, kind: AnswerKind) {
        if self.peers.links().drain().has_begun() {
            session.set_keepalive(None);
        }
        ctx.first_byte = None;
        let Some(awake) = &ctx.awake else { return };
        awake.touch();
        // A WebSocket takes leave by itself.
        if let (Some(in_flight), AnswerKind::Stream | AnswerKind::Unknown, None) = (&mut ctx.in_flight, kind, &ctx.handshake) {
            in_flight.streams();
        }
        match kind {
            AnswerKind::Stream => {
                ctx.stream = Some(match ctx.protocol {
                    Protocol::WebSocket => StreamKind::WebSocket,
                    Protocol::Grpc => StreamKind::Grpc,
                    Protocol::Http1 | Protocol::Http2 => StreamKind::Events,
                });
                awake.streaming();
            }
            // Still being computed until its end.
            AnswerKind::Finite => {}
            AnswerKind::Unknown => ctx.watch = Some(self.watch(awake.clone())),
        }
    }

    /// Whether an answer's header is larger than an app may send.
    pub(crate) fn answer_too_large(ctx: &Context, fields: usize, bytes: usize) -> bool {
        bytes > ctx.limits.max_answer_header_bytes || fields > MAX_ANSWER_FIELDS
    }

    /// Where the request goes, once its microVM is awake, and what is spoken there. The begin of a try.
    pub(crate) async fn target(&self, session: &mut Session, ctx: &mut Context) -> Result<Target> {
        match self.known_target(ctx) {
            Some(target) => Ok(target),
            None => Box::pin(self.find_target(session, ctx)).await,
        }
    }

    /// The same, where the microVM is awake and it is known whether its app speaks TLS.
    fn known_target(&self, ctx: &mut Context) -> Option<Target> {
        let permit = ctx.permit.as_ref().filter(|_| ctx.awake.is_some())?;
        // The agent speaks no TLS.
        let plain = (ctx.speaks == Speaks::Shell).then_some(Transport::Plain);
        let transport = plain.or_else(|| self.peers.transports().known(permit.microvm().id(), permit.port()))?;
        Self::begin_try(ctx, transport)
    }

    async fn find_target(&self, session: &mut Session, ctx: &mut Context) -> Result<Target> {
        if ctx.awake.is_none() {
            match self.wake(session, ctx).await {
                Ok(()) => {}
                Err(NotAwake::Refused(reason)) => return Err(Self::fail(ctx, reason)),
                Err(NotAwake::ClientLeft) => return Err(Self::gone(ctx)),
            }
        }
        if let Some(target) = self.known_target(ctx) {
            return Ok(target);
        }
        let (Some(awake), Some(permit)) = (ctx.awake.clone(), &ctx.permit) else {
            return Err(Self::fail(ctx, Reason::Internal));
        };
        let (microvm, port) = (permit.microvm().clone(), permit.port());
        let name = self.name_inside(session.req_header());
        let found = tokio::select! {
            // In this order: an answer that is there costs no watch. Either arm may be dropped at any await.
            biased;
            found = self.peers.transports().of(&microvm, &awake, port, || name) => found,
            () = client_left(session) => Err(DialFailure::ClientLeft),
        };
        match found {
            Ok(transport) => Self::begin_try(ctx, transport).ok_or_else(|| Self::fail(ctx, Reason::Internal)),
            Err(failure) => {
                let mut error = Error::new_up(ErrorType::ConnectError);
                self.give_up_or_retry(ctx, failure, &mut error);
                Err(error)
            }
        }
    }

    fn begin_try(ctx: &mut Context, transport: Transport) -> Option<Target> {
        let (awake, permit) = (ctx.awake.as_ref()?, ctx.permit.as_ref()?);
        let speaks = match (ctx.speaks, transport) {
            // An app of TLS has its say.
            (Speaks::Http1, Transport::Tls { h2: true }) => Speaks::Http2,
            (speaks, _) => speaks,
        };
        ctx.target = Some(Target { microvm: permit.microvm().id(), port: permit.port(), generation: awake.generation(), speaks, transport });
        // What is counted of one try does not count for the next.
        ctx.bytes_in = 0;
        ctx.interim = 0;
        ctx.target
    }

    /// The request has its connection to the app.
    pub(crate) fn begin_use(&self, session: &mut Session, ctx: &mut Context, link: &Arc<Link>, taken: Use) {
        ctx.link = Some(taken);
        let speaks = link.target.speaks;
        // A connection of HTTP/2 carries other requests too, and is not cut for one of them.
        let own = (speaks == Speaks::Http1).then(|| link.clone());
        if let Some(awake) = &ctx.awake
            && session.is_http2()
            && !session.as_downstream_mut().is_body_done()
        {
            ctx.upload = Some(self.watch_upload(ctx.limits.body_deadline, awake.clone(), own, ctx.cut.clone()));
        }
        if let (Some(limit), Speaks::Http1) = (ctx.limits.first_byte_deadline, speaks) {
            let (cut, link) = (ctx.cut.clone(), link.clone());
            ctx.first_byte = Some(AbortOnDropHandle::new(self.peers.links().watch(async move {
                tokio::time::sleep(limit).await;
                let _ = cut.set(Reason::GuestSilent);
                link.cut();
            })));
        }
    }

    /// What follows from a dial that failed. Nothing was sent, so that trying again cannot do anything twice.
    pub(crate) fn give_up_or_retry(&self, ctx: &mut Context, failure: DialFailure, error: &mut Error) {
        match failure {
            DialFailure::Asleep if ctx.found_asleep < MAX_FOUND_ASLEEP => {
                ctx.found_asleep += 1;
                ctx.awake = None;
                ctx.retries += 1;
                self.metrics.retry(RetryCause::Asleep);
                error.set_retry(true);
            }
            DialFailure::Asleep => ctx.reason = Some(Reason::WakeFailed),
            DialFailure::Final(reason) => ctx.reason = Some(reason),
            DialFailure::ClientLeft => ctx.client_left = true,
        }
    }

    /// Does for an upload over HTTP/2 what a read timeout does over HTTP/1.1: pingora has none for a stream. `link`: the
    /// connection to the guest, where it is this request's alone. One that carries other requests too is not cut; there
    /// the microVM is no longer kept awake, as for any other silent stream.
    fn watch_upload(&self, limit: Duration, awake: Arc<Awake>, link: Option<Arc<Link>>, cut: Arc<OnceLock<Reason>>) -> Watch {
        // A guest that does not read keeps its client from sending.
        let waits_for = link.clone();
        let waits_for_guest = move || waits_for.as_ref().is_some_and(|link| link.is_full());
        self.watch_silence(limit, UPLOAD_LOOKS, waits_for_guest, move || match link {
            Some(link) => {
                let _ = cut.set(Reason::BodyTimeout);
                link.cut();
            }
            None => awake.streaming(),
        })
    }

    /// There is nobody left to answer.
    pub(crate) fn gone(ctx: &mut Context) -> Box<Error> {
        ctx.client_left = true;
        Error::new_down(ErrorType::ConnectionClosed)
    }

    pub(crate) fn fail(ctx: &mut Context, reason: Reason) -> Box<Error> {
        ctx.reason = Some(reason);
        Error::explain(ErrorType::HTTPStatus(reason.reply().status.as_u16()), reason.reply().word)
    }
}

#[async_trait]
impl ProxyHttp for Service {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context::new(self.limits.load_full())
    }

    /// None: the default one brings compression, which we never do.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<()> {
        ctx.malformed = Guarded::of(session).and_then(Guarded::begin_request);
        ctx.in_flight = Traffic::of(session.digest()).map(Traffic::begin);
        let request = session.req_header();
        ctx.handshake = Handshake::read(&request.method, request.version, &request.headers);
        // Over HTTP/1.1 the content type means a bridge such as gRPC-Web, whose answers have bodies.
        let grpc = request.version == Version::HTTP_2 && headers::is_grpc(&request.headers);
        ctx.asker = if grpc { Asker::Grpc } else { Asker::Plain };
        ctx.protocol = match request.version {
            _ if ctx.handshake.is_some() => Protocol::WebSocket,
            _ if grpc => Protocol::Grpc,
            Version::HTTP_2 => Protocol::Http2,
            _ => Protocol::Http1,
        };
        ctx.speaks = if ctx.handshake.is_some() {
            Speaks::WebSocket
        } else if headers::forces_h2(&request.headers) || ctx.protocol == Protocol::Grpc {
            // gRPC needs trailers, which HTTP/1.1 between us and the app would lose; AWS carries it with and without
            // the header (aws-behaviour §1.4).
            Speaks::Http2
        } else {
            Speaks::Http1
        };
        ctx.open = Some(self.metrics.open(ctx.protocol));
        // Without this, a second request that comes while the first is answered aborts the first. After an upgrade
        // request there is none: what follows may be the other protocol's bytes, never a request.
        session.set_pipelining_enabled(ctx.handshake.is_none());
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(ctx.limits.keepalive.as_secs().max(1)));
        }
        // A WebSocket may be silent for as long as it likes; pingora would end it after its 60 s read timeout.
        session.set_read_timeout(ctx.handshake.is_none().then_some(ctx.limits.body_deadline));
        session.set_write_timeout(Some(ctx.limits.write_deadline));
        session.set_total_drain_timeout(Some(SWALLOW_TIME));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let raw = if session.is_http2() { Bytes::new() } else { session.to_h1_raw() };
        let request = session.req_header();
        let framed = framing::check(&request.method, &request.uri, request.version, &request.headers, &raw, framing::HeaderLimits::of(&ctx.limits));
        if let Some(reason) = ctx.malformed.or(framed.err()) {
            Box::pin(self.refuse(session, ctx, reason, Afterwards::Close)).await?;
            return Ok(true);
        }
        if self.microvms.get().is_none() {
            match Box::pin(self.microvms_come(session, ctx)).await {
                Ok(()) => {}
                Err(NotAwake::Refused(reason)) => {
                    Box::pin(self.refuse(session, ctx, reason, Afterwards::Close)).await?;
                    return Ok(true);
                }
                Err(NotAwake::ClientLeft) => return Err(Self::gone(ctx)),
            }
        }
        let request = session.req_header();
        let permit = self
            .permit(session, ctx)
            .and_then(|permit| Self::check_body(ctx, &request.headers).map(|()| permit))
            .and_then(|permit| self.shell(ctx, &permit).map(|shell| (permit, shell)));
        match permit {
            Ok((permit, shell)) => {
                if shell.is_some() {
                    ctx.speaks = Speaks::Shell;
                }
                (ctx.permit, ctx.shell) = (Some(permit), shell);
            }
            Err(reason) => {
                Box::pin(self.refuse(session, ctx, reason, Afterwards::KeepIfClean)).await?;
                return Ok(true);
            }
        }
        match self.wake(session, ctx).await {
            Ok(()) => self.exchange(session, ctx).await,
            Err(NotAwake::Refused(reason)) => {
                Box::pin(self.refuse(session, ctx, reason, Afterwards::KeepIfClean)).await?;
                Ok(true)
            }
            Err(NotAwake::ClientLeft) => Err(Self::gone(ctx)),
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Context) -> Result<Box<HttpPeer>> {
        let target = self.target(session, ctx).await?;
        let (Some(awake), Some(permit)) = (&ctx.awake, &ctx.permit) else {
            return Err(Self::fail(ctx, Reason::Internal));
        };
        ctx.dial_failure = FailureSlot::default();
        ctx.turn = None;
        ctx.tunnel = TunnelSlot::default();
        let (microvm, awake) = (permit.microvm().clone(), awake.clone());
        if target.speaks == Speaks::Http2 {
            ctx.turn = tokio::select! {
                biased;
                turn = self.peers.turns().take(target) => Some(turn),
                () = client_left(session) => return Err(Self::gone(ctx)),
            };
        }
        let name = (target.transport != Transport::Plain).then(|| self.name_inside(session.req_header()));
        let client = Guarded::of(session).map(Guarded::socket);
        self.peers.peer(target, name, Woken { microvm: &microvm, awake: &awake }, client, &ctx.dial_failure, &ctx.tunnel).map(Box::new)
    }

    fn fail_to_connect(&self, _session: &mut Session, _peer: &HttpPeer, ctx: &mut Context, mut error: Box<Error>) -> Box<Error> {
        ctx.turn = None;
        if let Some(failure) = ctx.dial_failure.get().copied() {
            self.give_up_or_retry(ctx, failure, &mut error);
        }
        error
    }

    /// pingora would send a request again whenever a connection that was used before ends without an answer; by then the
    /// app may have done what it asked for. What remains is a guest's word that it did not look at the request
    /// (REFUSED_STREAM, or GOAWAY with NO_ERROR for a later stream: RFC 9113 §8.7).
    fn error_while_proxy(&self, _peer: &HttpPeer, session: &mut Session, mut error: Box<Error>, ctx: &mut Context, _reused: bool) -> Box<Error> {
        let untouched = matches!(error.retry, RetryType::Decided(true)) && !session.as_ref().retry_buffer_truncated();
        error.set_retry(untouched);
        if untouched {
            ctx.retries = ctx.retries.saturating_add(1);
            self.metrics.retry(RetryCause::Untouched);
        }
        error
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        descriptor: std::os::fd::RawFd,
        _digest: Option<&Digest>,
        ctx: &mut Context,
    ) -> Result<()> {
        ctx.reused = reused;
        ctx.turn = None;
        let Some(wanted) = ctx.target else {
            return Err(Self::fail(ctx, Reason::Internal));
        };
        if wanted.speaks.is_tunnel() {
            return Ok(());
        }
        let links = self.peers.links();
        let Ok(link) = links.leading_to(wanted, descriptor) else {
            tracing::error!("a pooled connection leads elsewhere than asked; it was not used");
            return Err(Self::fail(ctx, Reason::Internal));
        };
        let Some((link, taken)) = link.and_then(|link| link.take_up().map(|taken| (link, taken))) else {
            // It has ended just now. Nothing was sent on it, so another one may be made.
            let mut error = Error::new_up(ErrorType::ConnectionClosed);
            error.set_retry(true);
            return Err(error);
        };
        self.begin_use(session, ctx, &link, taken);
        Ok(())
    }

    async fn upstream_request_filter(&self, session: &mut Session, request: &mut RequestHeader, ctx: &mut Context) -> Result<()> {
        for name in headers::reserved(&request.headers) {
            request.remove_header(&name);
        }
        request.insert_header(headers::REQUEST_ID_FIELD, headers::request_id(&ctx.request_id))?;
        match &ctx.handshake {
            Some(handshake) => {
                request.remove_header(&header::SEC_WEBSOCKET_PROTOCOL);
                if let Some(offer) = handshake.offer_to_app() {
                    request.insert_header(header::SEC_WEBSOCKET_PROTOCOL, offer)?;
                }
            }
            None => {
                // Without a real handshake no upgrade is forwarded, and what a client put here may hold a token.
                request.remove_header(&header::SEC_WEBSOCKET_PROTOCOL);
                request.remove_header(&header::UPGRADE);
            }
        }
        if ctx.spoken() == Speaks::Http2 {
            if framing::expects_continue(&request.headers) && !session.is_http2() {
                // An app behind HTTP/2 never gets to say 100, and the client would wait for it.
                session.as_downstream_mut().write_continue_response().await?;
            }
            request.remove_header(&header::EXPECT);
        } else if let Some(cookie) = headers::joined_cookie(&request.headers) {
            // pingora issue #892.
            request.insert_header(header::COOKIE, cookie)?;
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Context,
    ) -> Result<()> {
        let length = body.as_ref().map_or(0, Bytes::len);
        if end_of_stream {
            ctx.upload = None;
        }
        if length > 0 {
            ctx.bytes_in += length as u64;
            if let Some(upload) = &ctx.upload {
                upload.progress.store(ctx.bytes_in, Ordering::Relaxed);
            }
            self.metrics.bytes_in.inc_by(length as u64);
            ctx.touch();
            if !session.was_upgraded() && ctx.limits.max_body_bytes.is_some_and(|limit| ctx.bytes_in > limit) {
                return Err(Self::fail(ctx, Reason::BodyTooLarge));
            }
        } else if end_of_stream {
            // pingora issue #935: an empty last DATA frame of HTTP/2 would make a second end-of-body chunk on HTTP/1.1,
            // which the app reads as the begin of the next request.
            *body = None;
        }
        Ok(())
    }

    async fn upstream_response_filter(&self, session: &mut Session, answer: &mut ResponseHeader, ctx: &mut Context) -> Result<()> {
        if Self::answer_too_large(ctx, answer.headers.len(), headers::bytes(&answer.headers)) {
            return Err(Self::fail(ctx, Reason::GuestHeaderTooLarge));
        }
        if let Err(reason) = websocket::check_switch(answer.status, ctx.handshake.as_ref()) {
            return Err(Self::fail(ctx, reason));
        }
        // Ours alone: a client may rely on what it says.
        answer.remove_header(&headers::REASON_FIELD);
        if answer.status.is_informational() && answer.status != StatusCode::SWITCHING_PROTOCOLS {
            ctx.interim += 1;
            return if ctx.interim > MAX_INTERIM { Err(Self::fail(ctx, Reason::GuestBroke)) } else { Ok(()) };
        }
        if let (StatusCode::SWITCHING_PROTOCOLS, Some(handshake)) = (answer.status, &ctx.handshake) {
            match handshake.answer(&answer.headers) {
                Ok(choice) => {
                    answer.remove_header(&header::SEC_WEBSOCKET_PROTOCOL);
                    if let Some(choice) = choice {
                        answer.insert_header(header::SEC_WEBSOCKET_PROTOCOL, choice)?;
                    }
                }
                Err(reason) => return Err(Self::fail(ctx, reason)),
            }
        }
        self.answer_begins(session, ctx, headers::answer_kind(answer.status, &answer.headers));
        answer.insert_header(headers::REQUEST_ID_FIELD, headers::request_id(&ctx.request_id))?;
        if answer.status == StatusCode::SWITCHING_PROTOCOLS { self.tunnel(session, answer, ctx).await } else { Ok(()) }
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Context,
    ) -> Result<Option<Duration>> {
        let length = body.as_ref().map_or(0, Bytes::len);
        if length > 0 {
            ctx.bytes_out += length as u64;
            if let Some(watch) = &ctx.watch {
                watch.progress.store(ctx.bytes_out, Ordering::Relaxed);
            }
            self.metrics.bytes_out.inc_by(length as u64);
            if let Some(in_flight) = &ctx.in_flight {
                in_flight.speaks();
            }
            ctx.touch();
        }
        if end_of_stream && let Some(awake) = &ctx.awake {
            // The guest has done its part; how fast the client reads is no work of the guest's.
            awake.streaming();
            ctx.watch = None;
        }
        Ok(None)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Context) -> FailToProxy {
        let reason = if ctx.client_left { None } else { self.reason_of(error, ctx) };
        let begun = session.response_written().is_some_and(|answer| {
            !answer.status.is_informational() || answer.status == StatusCode::SWITCHING_PROTOCOLS
        });
        let Some(reason) = reason else {
            ctx.client_left |= !begun;
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        };
        ctx.reason = Some(reason);
        if let (Reason::GuestBroke, Some(target)) = (reason, &ctx.target) {
            // What is no HTTP may be TLS, or the other way round.
            self.peers.transports().forget(target.microvm, target.port);
        }
        if reason == Reason::Internal {
            tracing::error!(request.id = ctx.request_id, error = error.etype().as_str(), side = error.esource().as_str(), "a request failed inside the gateway");
        } else {
            // Not the error itself: it holds what the guest or the client sent.
            tracing::debug!(request.id = ctx.request_id, error = error.etype().as_str(), side = error.esource().as_str(), "a request failed");
        }
        // An answer that has begun is cut short by the close, which its client can see.
        ctx.awake = None;
        if !begun && self.refuse(session, ctx, reason, Afterwards::Close).await.is_ok() && !session.is_http2() {
            session.as_downstream_mut().shutdown().await;
        }
        FailToProxy { error_code: reason.reply().status.as_u16(), can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, _error: Option<&Error>, ctx: &mut Context) {
        let status = session.response_written().map(|answer| answer.status.as_u16());
        let duration = ctx.begun.elapsed();
        self.metrics.request(ctx.protocol, status);
        match ctx.stream {
            Some(kind) => self.metrics.stream(kind, duration),
            None => self.metrics.request_seconds.observe(duration.as_secs_f64()),
        }
        if let Some(reason) = ctx.reason {
            self.metrics.refusal(reason);
        }
        self.log.say(&Entry {
            time: OffsetDateTime::now_utc(),
            request_id: &ctx.request_id,
            client: match session.client_addr() {
                Some(SocketAddr::Inet(address)) => Some(*address),
                Some(SocketAddr::Unix(_)) | None => None,
            },
            method: Some(session.req_header().method.as_str()),
            protocol: ctx.protocol,
            status,
            reason: ctx.reason,
            microvm: ctx.permit.as_ref().map(|permit| permit.microvm().id()),
            port: ctx.permit.as_ref().map(Permit::port),
            duration: Some(duration),
            wake: ctx.wake.as_ref().map(Into::into),
            bytes_in: ctx.bytes_in,
            bytes_out: ctx.bytes_out,
            reused: ctx.reused,
            retries: ctx.retries,
        });
        if let Some(connection) = Guarded::of(session) {
            connection.end_request();
        }
        // What is left to do is between the client and us: it may take a while to look up from its upload.
        ctx.awake = None;
    }

    /// The access log says it once, without the path and host that pingora's own line would show.
    fn suppress_error_log(&self, _session: &Session, _ctx: &Context, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _session: &Session, _ctx: &Context, _error: &Error, _context: ProxyWarnLogContext) -> bool {
        true
    }
}

/// Reads what is left of a refused request's body and throws it away, within bounds. Whether the connection is clean
/// afterwards.
async fn swallow_body(session: &mut Session) -> bool {
    if session.as_downstream_mut().is_body_done() {
        return true;
    }
    let headers = &session.req_header().headers;
    // Who waits for `100 Continue` sends no body once it reads the refusal.
    if framing::expects_continue(headers) || framing::stated_length(headers).is_some_and(|length| length > MAX_SWALLOWED as u64) {
        return false;
    }
    let deadline = Instant::now() + SWALLOW_TIME;
    let mut left = MAX_SWALLOWED;
    loop {
        match tokio::time::timeout_at(deadline.into(), session.as_downstream_mut().read_request_body()).await {
            Ok(Ok(Some(bytes))) if bytes.len() <= left => left -= bytes.len(),
            Ok(Ok(None)) => return true,
            Ok(Ok(Some(_)) | Err(_)) | Err(_) => return false,
        }
    }
}

/// Ends when the client of a held request is gone, without taking anything out of its connection: the body stays in the
/// socket meanwhile. pingora itself does not notice while a phase waits.
pub(crate) async fn client_left(session: &mut Session) {
    let socket = Guarded::of(session).map(Guarded::socket);
    if let Some(socket) = socket {
        if let Err(error) = socket.closed_by_client().await {
            tracing::warn!(error = %error, "a held request's client cannot be watched; its place is kept until the deadline");
            std::future::pending::<()>().await;
        }
    } else if let Some(closed) = session.as_downstream_mut().watch_h2_stream_close() {
        let _ = closed.await;
    } else {
        std::future::pending::<()>().await;
    }
}
