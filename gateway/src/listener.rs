//! The accept loop: who may connect, for how long a handshake may take, and how the gateway stops.
//!
//! pingora's own listeners have no limit of connections, a fixed handshake timeout and a shutdown that always sleeps its
//! whole grace period; so this takes their place and hands each connection to pingora's proxy.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use pingora_core::{
    apps::ServerApp as _,
    listeners::tls::Acceptor,
    protocols::{ALPN, Ssl as _, tls::TlsStream},
};
use pingora_proxy::HttpProxy;
use rustix::io::Errno;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connection::{GuardSettings, Guarded},
    descriptors,
    drain::{Drain, MOMENT, Traffic},
    metrics::{DrainCut, Metrics, Open},
    neighbourhood::{Crowd, Member},
    reply::Reason,
    service::Service,
    socket::Socket,
    tls::Tls,
};

/// After an accept that failed for want of descriptors or memory: twice as long each time, until one succeeds.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Connections over a limit that are told so, at a time; more are closed without a word or wait in the kernel's backlog.
/// Each costs a handshake, so that their number bounds what those who may not come in can take from those who are.
const TURNED_AWAY: usize = 64;

/// Takes connections until `stop` fires, then drains.
pub(crate) async fn serve(
    listener: TcpListener,
    proxy: Arc<HttpProxy<Service>>,
    tls: Tls,
    guard: GuardSettings,
    drain: Drain,
    stop: CancellationToken,
) {
    let crowd = Crowd::default();
    let metrics = guard.metrics.clone();
    let connection = |member| Connection {
        _member: member,
        _open: Open::new(&metrics.connections),
        guard: guard.clone(),
        drain: drain.clone(),
    };
    let mut changed = guard.limits.watch();
    let carried = descriptors::connections();
    let wanted = guard.limits.load().max_connections;
    if carried < wanted {
        tracing::warn!(wanted, carried, "the limit of open files carries fewer connections than edge.max_connections; raise it (LimitNOFILE=, ulimit -n)");
    }
    let mut connections = JoinSet::new();
    let mut turned_away = JoinSet::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let places = guard.limits.load().max_connections.min(carried);
        let accepted = tokio::select! {
            // Stopping comes first; reaping never waits. All arms may be dropped at any await.
            biased;
            () = stop.cancelled() => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                report(&ended);
                continue;
            }
            Some(ended) = turned_away.join_next(), if !turned_away.is_empty() => {
                report(&ended);
                continue;
            }
            Ok(()) = changed.changed() => continue,
            accepted = listener.accept(), if connections.len() < places || turned_away.len() < TURNED_AWAY => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                pause = FIRST_PAUSE;
                let limits = guard.limits.load();
                let member = (connections.len() < places).then(|| crowd.admit(peer.ip(), limits.max_connections_per_address)).flatten();
                drop(limits);
                match member {
                    Some(member) => drop(connections.spawn(connection(member).run(Accepted::new(tcp, peer, &guard), tls.acceptor(), proxy.clone()))),
                    None => {
                        metrics.connections_refused.inc();
                        if turned_away.len() < TURNED_AWAY {
                            turned_away.spawn(turn_away(Accepted::new(tcp, peer, &guard), guard.clone(), drain.clone(), tls.acceptor()));
                        }
                    }
                }
            }
            Err(error) if is_shortage(&error) => {
                metrics.accept_failures.inc();
                tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "no connection can be accepted for now");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => break,
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            // The client of that one connection was gone before we came to it.
            Err(error) => tracing::debug!(error = %error, "a connection was gone before it was accepted"),
        }
    }
    // What the kernel has taken from clients on our behalf is ours: closing the listener would reset it. Two listeners of
    // one socket (this process's and its successor's) may both do this; each connection comes out of one of them.
    let begun = Instant::now();
    metrics.draining.set(1);
    drain.begin();
    if let Ok(listener) = listener.into_std() {
        let end = Instant::now() + MOMENT;
        while Instant::now() < end
            && connections.len() < guard.limits.load().max_connections.min(carried)
            && let Ok((tcp, peer)) = listener.accept()
        {
            let Some(member) = crowd.admit(peer.ip(), guard.limits.load().max_connections_per_address) else { continue };
            if let Ok(tcp) = tcp.set_nonblocking(true).and_then(|()| TcpStream::from_std(tcp)) {
                connections.spawn(connection(member).run(Accepted::new(tcp, peer, &guard), tls.acceptor(), proxy.clone()));
            }
        }
    }
    let grace = guard.limits.load().grace;
    finish(connections, grace, &metrics).await;
    metrics.drain_seconds.observe(begun.elapsed().as_secs_f64());
    metrics.draining.set(0);
}

/// Waits for what runs: at most `grace`, and no longer than needed.
async fn finish(mut connections: JoinSet<()>, grace: Duration, metrics: &Metrics) {
    let (open, begun) = (connections.len(), Instant::now());
    let all = async { while let Some(ended) = connections.join_next().await { report(&ended); } };
    if tokio::time::timeout(grace, all).await.is_ok() {
        tracing::info!(connections = open, took_ms = begun.elapsed().as_millis() as u64, "the edge is drained");
    } else {
        tracing::warn!(connections = connections.len(), grace_secs = grace.as_secs(), "the edge cuts connections that outlived the grace period");
        metrics.drain_cut(DrainCut::Grace, connections.len());
        connections.shutdown().await;
    }
}

/// A panic is a fault of ours that would otherwise show only as a connection that broke.
fn report(ended: &Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!("the task of a connection panicked; the connection is closed, the others go on");
    }
}

fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|code| shortages.iter().any(|errno| errno.raw_os_error() == code))
}

/// A connection before its TLS handshake.
struct Accepted {
    socket: Socket,
    peer: SocketAddr,
    deadline: Duration,
}

impl Accepted {
    fn new(tcp: TcpStream, peer: SocketAddr, guard: &GuardSettings) -> Self {
        let limits = guard.limits.load();
        Self { socket: Socket::new(tcp, peer, &limits), peer, deadline: limits.handshake_deadline }
    }

    async fn handshake(self, guard: &GuardSettings, drain: &Drain, acceptor: &Acceptor) -> Option<(TlsStream<Socket>, Socket)> {
        let left_behind = async {
            drain.begins().await;
            tokio::time::sleep(MOMENT).await;
        };
        let (for_tls, end) = self.socket.for_tls();
        let failure = tokio::select! {
            biased;
            shaken = acceptor.tls_handshake(for_tls) => match shaken {
                Ok(tls) => {
                    end.reached();
                    return Some((tls, self.socket));
                }
                Err(error) => error.to_string(),
            },
            () = tokio::time::sleep(self.deadline) => "took too long".to_owned(),
            () = left_behind => "was not done when the gateway drained".to_owned(),
        };
        guard.metrics.tls_failures.inc();
        tracing::debug!(client.address = %self.peer, why = failure, "a TLS handshake failed");
        None
    }
}

/// One client's connection: what it occupies until its end.
struct Connection {
    _member: Member,
    _open: Open,
    guard: GuardSettings,
    drain: Drain,
}

impl Connection {
    async fn run(self, tcp: Accepted, acceptor: Arc<Acceptor>, proxy: Arc<HttpProxy<Service>>) {
        let traffic = Traffic::new();
        // Boxed, and so is what comes of it: the several KiB of a handshake, and of a connection on its way from one hand to the
        // next, would be part of the connection's task for all of its long life.
        let shaken = Box::pin(async {
            let (tls, socket) = tcp.handshake(&self.guard, &self.drain, &acceptor).await?;
            let multiplexed = matches!(tls.selected_alpn_proto(), Some(ALPN::H2));
            Some((Box::new(Guarded::new(tls, socket, self.guard.clone(), traffic.clone())), multiplexed))
        });
        let shaken = shaken.await;
        drop(acceptor);
        if let Some((guarded, multiplexed)) = shaken {
            self.serve(guarded, multiplexed, &traffic, proxy).await;
        }
    }

    /// Serves it until its end, which comes from here if the gateway drains or if HTTP/2 idles (pingora would drop that
    /// without GOAWAY): first it is told, and after a moment it ends as soon as it carries nothing.
    async fn serve(&self, guarded: Box<Guarded>, multiplexed: bool, traffic: &Traffic, proxy: Arc<HttpProxy<Service>>) {
        let (announce, stop) = watch::channel(false);
        let mut served = proxy.process_new(guarded, &stop);
        tokio::select! {
            biased;
            _ = &mut served => return,
            () = self.drain.begins() => {}
            () = self.idles(traffic), if multiplexed => {}
        }
        // GOAWAY; on HTTP/1.1 the next answer says `Connection: close`.
        let _ = announce.send(true);
        loop {
            tokio::select! {
                biased;
                _ = &mut served => return,
                // Whether it may end is looked up when `served` is polled, which is next.
                () = tokio::time::sleep(MOMENT) => traffic.leave(),
            }
        }
    }

    /// Ends when the connection has carried nothing for as long as it may.
    async fn idles(&self, traffic: &Traffic) {
        loop {
            let idle = traffic.idle_since().map_or(Duration::ZERO, |since| since.elapsed());
            let keepalive = self.guard.limits.load().keepalive;
            if idle >= keepalive {
                return;
            }
            tokio::time::sleep(keepalive - idle).await;
        }
    }
}

/// Says why to a connection that has no place.
async fn turn_away(tcp: Accepted, guard: GuardSettings, drain: Drain, acceptor: Arc<Acceptor>) {
    if let Some((tls, socket)) = tcp.handshake(&guard, &drain, &acceptor).await {
        Guarded::new(tls, socket, guard, Traffic::new()).turn_away(Reason::TooManyConnections).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_not_a_lost_client() {
        assert!(is_shortage(&io::Error::from_raw_os_error(Errno::MFILE.raw_os_error())));
        assert!(!is_shortage(&io::Error::from_raw_os_error(Errno::CONNABORTED.raw_os_error())));
    }
}
