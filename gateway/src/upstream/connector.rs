//! Awake microVM and port → pingora's peer, and how a connection to it is made.

use std::{
    fmt,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use idle_controller::{Awake, MicrovmHandle};
use pingora_core::{
    Error, ErrorType, Result,
    connectors::L4Connect,
    protocols::l4::{socket::SocketAddr, stream::Stream as L4Stream, virt::VirtualSocketStream},
    upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy},
};
use rustls::pki_types::ServerName;
use vmm_runtime::engine::GuestStream;

use super::{
    deferred::Deferring,
    guest_socket::{GuestEnd, GuestSocket},
    h2_headers::{Bounded, Bounds},
    links::{Asleep, Links, Speaks, Target, Tied},
    pool::{Connection, Pool},
    transport::{self, Transports},
    turns::Turns,
};
use crate::{Limits, reply::Reason, socket::Socket};

/// Streams at a time on one HTTP/2 connection to an app; pingora's default is 1.
const STREAMS: usize = 100;
/// What a guest may send ahead of its client, per stream and per connection: the bound on what is held in memory for a
/// client that reads slowly. pingora's default is 8 MiB each.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 22;
/// Fields of a guest's header over HTTP/2, before anything of it is unpacked: pingora's limit for HTTP/1.1.
const MAX_FIELDS: usize = 256;

/// pingora wants an address; nobody ever connects to it.
const GUEST: &str = "/guest";

/// Why no connection could be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DialFailure {
    /// It fell asleep in between. Nothing was sent, so it may be woken and dialled again.
    Asleep,
    /// The client is told.
    Final(Reason),
    /// There is no client any more.
    ClientLeft,
}

/// Where a connector leaves why it failed, for the request that asked.
pub(crate) type FailureSlot = Arc<OnceLock<DialFailure>>;

/// Where a connector leaves its end of a WebSocket's stream.
pub(crate) type TunnelSlot = Arc<OnceLock<GuestEnd>>;

/// Makes peers and connections to them.
pub(crate) struct Peers {
    links: Arc<Links>,
    pool: Arc<Pool>,
    turns: Arc<Turns>,
    transports: Arc<Transports>,
    keys: RandomState,
    limits: Limits,
}

impl Peers {
    /// Peers whose connections are tied in `links`, and wait in `pool`.
    pub fn new(links: Arc<Links>, pool: Arc<Pool>, limits: Limits) -> Self {
        Self { links, pool, turns: Arc::default(), transports: Arc::new(Transports::new(limits.clone())), keys: RandomState::new(), limits }
    }

    /// What is known of the apps.
    pub fn transports(&self) -> &Transports {
        &self.transports
    }

    /// The turns of those who want a stream of HTTP/2.
    pub fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// The links of all connections made.
    pub fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// Connections of HTTP/1.1 that wait for a request.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// A new connection of HTTP/1.1. `name` is what an app of TLS is asked for; `None` for one without.
    pub async fn connection(&self, target: Target, name: Option<ServerName<'static>>, woken: Woken<'_>) -> Result<Connection, DialFailure> {
        let way = self.way(target, name, woken, self.limits.load().dial_deadline);
        let tied = way.tie(way.dial().await?);
        Ok(Connection { link: tied.link().clone(), stream: Box::new(tied) })
    }

    fn way(&self, target: Target, name: Option<ServerName<'static>>, woken: Woken<'_>, deadline: Duration) -> Way {
        Way { links: self.links.clone(), transports: self.transports.clone(), target, name, microvm: woken.microvm.clone(), awake: woken.awake.clone(), deadline }
    }

    /// The peer of one request. `name` is what an app of TLS is asked for; `None` for one without. `client` is watched while
    /// the app is dialled, where that can be done.
    pub fn peer(
        &self,
        target: Target,
        name: Option<ServerName<'static>>,
        woken: Woken<'_>,
        client: Option<Socket>,
        failure: &FailureSlot,
        tunnel: &TunnelSlot,
    ) -> Result<HttpPeer> {
        let limits = self.limits.load();
        let mut peer = HttpPeer::new_uds(GUEST, false, String::new())?;
        let options = &mut peer.options;
        options.idle_timeout = Some(limits.upstream_keepalive);
        match target.speaks {
            Speaks::Http1 => {
                options.http_upstream_request_policy = HttpUpstreamRequestPolicy::deny_upgrades();
                // Two pools would mean two connections, and an app that serves one at a time would hang on the second.
                options.idle_timeout = Some(Duration::ZERO);
            }
            Speaks::Http2 => {
                options.set_http_version(2, 2);
                // Ends the one stream.
                options.write_timeout = limits.guest_body_deadline;
                options.max_h2_streams = STREAMS;
                options.h2_stream_window_size = Some(STREAM_WINDOW);
                options.h2_connection_window_size = Some(CONNECTION_WINDOW);
            }
            // Not kept even if the app refuses the upgrade: pingora could not reuse it and says so as an error.
            Speaks::WebSocket | Speaks::Shell => options.idle_timeout = Some(Duration::ZERO),
        }
        peer.group_key = match target.speaks {
            Speaks::WebSocket | Speaks::Shell => uuid::Uuid::new_v4().as_u64_pair().0,
            Speaks::Http1 | Speaks::Http2 => self.keys.hash_one(target),
        };
        peer.options.custom_l4 = Some(Arc::new(Connector {
            way: self.way(target, name, woken, limits.dial_deadline),
            client,
            bounds: Bounds { bytes: limits.max_answer_header_bytes, fields: MAX_FIELDS },
            failure: failure.clone(),
            tunnel: tunnel.clone(),
        }));
        Ok(peer)
    }
}

/// A microVM, and one request's leave to talk to it.
pub(crate) struct Woken<'a> {
    pub microvm: &'a MicrovmHandle,
    pub awake: &'a Arc<Awake>,
}

/// How to reach an app on behalf of one request.
struct Way {
    links: Arc<Links>,
    transports: Arc<Transports>,
    target: Target,
    name: Option<ServerName<'static>>,
    microvm: MicrovmHandle,
    awake: Arc<Awake>,
    deadline: Duration,
}

impl Way {
    async fn dial(&self) -> Result<GuestStream, DialFailure> {
        let Target { microvm, port, speaks, .. } = self.target;
        if speaks == Speaks::Shell {
            return transport::dial_shell(&self.awake, self.deadline).await;
        }
        let guest = transport::dial(&self.awake, port, self.deadline).await?;
        let Some(name) = &self.name else { return Ok(guest) };
        let failure = match tokio::time::timeout(self.deadline, self.transports.wrap(guest, speaks, name)).await {
            Ok(Ok(tls)) => return Ok(tls),
            _ if self.awake.is_asleep() => return Err(DialFailure::Asleep),
            Ok(Err(_)) => Reason::GuestBroke,
            Err(_) => Reason::GuestTimeout,
        };
        self.transports.forget(microvm, port);
        Err(DialFailure::Final(failure))
    }

    fn tie(&self, guest: GuestStream) -> Tied {
        self.links.tie(self.target, guest, self.asleep())
    }

    fn asleep(&self) -> Asleep {
        let (microvm, generation) = (self.microvm.clone(), self.target.generation);
        Box::new(move || transport::slept(&microvm, generation))
    }
}

/// What pingora asks for a connection.
struct Connector {
    way: Way,
    client: Option<Socket>,
    bounds: Bounds,
    failure: FailureSlot,
    tunnel: TunnelSlot,
}

impl Connector {
    async fn client_left(&self) {
        if let Some(client) = &self.client
            && client.closed_by_client().await.is_ok()
        {
            return;
        }
        // It cannot be watched; the deadline ends the dial.
        std::future::pending().await
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("target", &self.way.target).finish_non_exhaustive()
    }
}

#[async_trait]
impl L4Connect for Connector {
    async fn connect(&self, _address: &SocketAddr) -> Result<L4Stream> {
        let dialled = tokio::select! {
            // In this order: a dial that is done at once costs no watch. Either arm may be dropped at any await.
            biased;
            dialled = self.way.dial() => dialled,
            () = self.client_left() => Err(DialFailure::ClientLeft),
        };
        let stream = match dialled {
            Ok(stream) if self.way.target.speaks == Speaks::Http2 => {
                Box::pin(Bounded::new(Box::pin(Deferring::new(stream, Box::new(self.way.microvm.clone()))), self.bounds))
            }
            Ok(stream) => stream,
            Err(failure) => {
                let _ = self.failure.set(failure);
                return Err(Error::explain(ErrorType::ConnectError, format!("dialling {:?}: {failure:?}", self.way.target)));
            }
        };
        if self.way.target.speaks.is_tunnel() {
            let socket = GuestSocket::new(stream, self.way.awake.clone(), self.way.links.drain(), self.way.links.count_open());
            let _ = self.tunnel.set(socket.end());
            return Ok(VirtualSocketStream::new(Box::new(socket)).into());
        }
        Ok(VirtualSocketStream::new(Box::new(self.way.tie(stream))).into())
    }
}
