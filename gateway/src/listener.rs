//! The accept loop: who may connect, for how long a handshake may take, and how the gateway stops.
//!
//! pingora's own listeners have no limit of connections, a fixed handshake timeout and a shutdown that always sleeps its
//! whole grace period; so this takes their place and hands each connection to pingora's proxy.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use dashmap::DashMap;
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
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    connection::{GuardSettings, Guarded, Socket},
    drain::{Drain, MOMENT, Traffic},
    metrics::{Metrics, Open},
    service::Service,
    tls::Tls,
};

/// After an accept that failed for want of descriptors or memory: twice as long each time, until one succeeds.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Takes connections until `stop` fires, then drains.
pub(crate) async fn serve(
    listener: TcpListener,
    proxy: Arc<HttpProxy<Service>>,
    tls: Tls,
    guard: GuardSettings,
    drain: Drain,
    stop: CancellationToken,
) {
    let crowd = Arc::new(Crowd::default());
    let metrics = guard.metrics.clone();
    let connection = |member| Connection {
        _member: member,
        _open: Open::new(&metrics.connections),
        guard: guard.clone(),
        drain: drain.clone(),
    };
    let mut changed = guard.limits.watch();
    let mut connections = JoinSet::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let places = guard.limits.load().max_connections;
        let accepted = tokio::select! {
            // Stopping comes first; reaping never waits. All arms may be dropped at any await.
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            Ok(()) = changed.changed() => continue,
            accepted = listener.accept(), if connections.len() < places => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                pause = FIRST_PAUSE;
                let limits = guard.limits.load();
                let Some(member) = crowd.admit(peer.ip(), limits.max_connections_per_address) else {
                    metrics.connections_refused.inc();
                    continue;
                };
                connections.spawn(connection(member).run(tcp, peer, tls.acceptor(), proxy.clone()));
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
    drain.begin();
    if let Ok(listener) = listener.into_std() {
        let end = Instant::now() + MOMENT;
        while Instant::now() < end
            && connections.len() < guard.limits.load().max_connections
            && let Ok((tcp, peer)) = listener.accept()
        {
            let Some(member) = crowd.admit(peer.ip(), guard.limits.load().max_connections_per_address) else { continue };
            if let Ok(tcp) = tcp.set_nonblocking(true).and_then(|()| TcpStream::from_std(tcp)) {
                connections.spawn(connection(member).run(tcp, peer, tls.acceptor(), proxy.clone()));
            }
        }
    }
    let grace = guard.limits.load().grace;
    finish(connections, grace).await;
}

/// Waits for what runs: at most `grace`, and no longer than needed.
async fn finish(mut connections: JoinSet<()>, grace: Duration) {
    let (open, begun) = (connections.len(), Instant::now());
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(grace, all).await.is_ok() {
        tracing::info!(connections = open, took_ms = begun.elapsed().as_millis() as u64, "the edge is drained");
    } else {
        tracing::warn!(connections = connections.len(), grace_secs = grace.as_secs(), "the edge cuts connections that outlived the grace period");
        connections.shutdown().await;
    }
}

fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|code| shortages.iter().any(|errno| errno.raw_os_error() == code))
}

/// One client's connection: what it occupies until its end.
struct Connection {
    _member: Member,
    _open: Open,
    guard: GuardSettings,
    drain: Drain,
}

impl Connection {
    async fn run(self, tcp: TcpStream, peer: SocketAddr, acceptor: Arc<Acceptor>, proxy: Arc<HttpProxy<Service>>) {
        let _ = tcp.set_nodelay(true);
        let socket = Socket::new(tcp, peer);
        let deadline = self.guard.limits.load().handshake_deadline;
        let left_behind = async {
            self.drain.begins().await;
            tokio::time::sleep(MOMENT).await;
        };
        let shaken = tokio::select! {
            biased;
            shaken = acceptor.tls_handshake(socket.clone()) => shaken,
            () = tokio::time::sleep(deadline) => return self.failed(peer, "took too long"),
            () = left_behind => return self.failed(peer, "was not done when the gateway drained"),
        };
        match shaken {
            Ok(tls) => self.serve(tls, socket, proxy).await,
            Err(error) => self.failed(peer, &error.to_string()),
        }
    }

    /// Serves it until its end, which comes from here if the gateway drains or if HTTP/2 idles (pingora would drop that
    /// without GOAWAY): first it is told, and after a moment it ends as soon as it carries nothing.
    async fn serve(&self, tls: TlsStream<Socket>, socket: Socket, proxy: Arc<HttpProxy<Service>>) {
        let traffic = Traffic::new();
        let multiplexed = matches!(tls.selected_alpn_proto(), Some(ALPN::H2));
        let guarded = Guarded::new(tls, socket, self.guard.clone(), traffic.clone());
        let (announce, stop) = watch::channel(false);
        let mut served = proxy.process_new(Box::new(guarded), &stop);
        tokio::select! {
            biased;
            _ = &mut served => return,
            () = self.drain.begins() => {}
            () = self.idles(&traffic), if multiplexed => {}
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

    fn failed(&self, peer: SocketAddr, why: &str) {
        self.metrics().tls_failures.inc();
        tracing::debug!(client.address = %peer, why, "a TLS handshake failed");
    }

    fn metrics(&self) -> &Metrics {
        &self.guard.metrics
    }
}

/// How many connections each address has.
#[derive(Default)]
struct Crowd {
    members: DashMap<IpAddr, usize>,
}

/// A place of an address in the crowd; given back by its drop.
struct Member {
    crowd: Arc<Crowd>,
    address: IpAddr,
}

impl Crowd {
    fn admit(self: &Arc<Self>, address: IpAddr, limit: usize) -> Option<Member> {
        let address = neighbourhood(address);
        let mut count = self.members.entry(address).or_insert(0);
        if *count >= limit {
            return None;
        }
        *count += 1;
        drop(count);
        Some(Member { crowd: self.clone(), address })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let left = self.crowd.members.get_mut(&self.address).map(|mut count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            self.crowd.members.remove_if(&self.address, |_, count| *count == 0);
        }
    }
}

/// One subscriber of IPv6 has at least a /64.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_as_many_places_as_the_limit_and_leaves_no_trace() {
        let crowd = Arc::new(Crowd::default());
        let [a, near_a, b]: [IpAddr; 3] = ["2001:db8::1", "2001:db8::2", "127.0.0.1"].map(|text| text.parse().unwrap());
        let first = crowd.admit(a, 2);
        let second = crowd.admit(near_a, 2);
        assert!(first.is_some() && second.is_some());
        assert!(crowd.admit(a, 2).is_none());
        assert!(crowd.admit(b, 2).is_some());
        drop(first);
        assert!(crowd.admit(a, 2).is_some());
        drop(second);
        assert!(crowd.members.is_empty());
    }

    #[test]
    fn a_shortage_is_not_a_lost_client() {
        assert!(is_shortage(&io::Error::from_raw_os_error(Errno::MFILE.raw_os_error())));
        assert!(!is_shortage(&io::Error::from_raw_os_error(Errno::CONNABORTED.raw_os_error())));
    }
}
