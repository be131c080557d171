//! The listener of the API: plain HTTP/1.1 and HTTP/2.
//!
//! Owns: connections, their number and their end. Never looks into a request.

use std::{io, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::extras::Closing;

/// Each may hold one request body of 1 MiB; S3 uploads are streamed.
const MAX_CONNECTIONS: usize = 1_024;
/// From the first byte of a connection, or of the next request on it, to the end of the header.
const HEADER_DEADLINE: Duration = Duration::from_secs(30);
/// Requests of one HTTP/2 connection at a time.
const MAX_H2_STREAMS: u32 = 128;
/// How long to wait after the system could not accept, so that a shortage of descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown`; then takes nothing new and gives what runs at most `grace`.
pub async fn serve(listener: TcpListener, router: axum::Router, shutdown: CancellationToken, grace: Duration) -> io::Result<()> {
    let router = router.layer(axum::Extension(Closing(shutdown.clone())));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Both arms lose nothing when the other wins: a place is given back, a connection not accepted stays queued.
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let connection = connection(stream, router.clone(), shutdown.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the API could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = timeout(grace, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(n_connections = connections.len(), "API requests were cut off at the end of the grace period");
        connections.shutdown().await;
    }
    Ok(())
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn connection(stream: TcpStream, router: axum::Router, shutdown: CancellationToken) {
    // Answers are small; waiting to fill a packet would cost a round trip.
    let _ = stream.set_nodelay(true);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(MAX_H2_STREAMS).keep_alive_interval(HEADER_DEADLINE);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an API connection ended early");
    }
}
