//! The ways to the host: a virtio-serial port that lasts as long as the guest, or a vsock port with a connection at a time.

use std::{
    convert::Infallible,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use protocol::guest::GuestEnd;

use crate::{
    agent::Agent,
    machine::{Doing, SetupError},
    port::{self, AgentPort},
    vsock,
};

/// What is not there by then does not come.
const LIMIT: Duration = Duration::from_secs(10);

/// The way of this machine.
pub(crate) enum Host {
    Port(AgentPort),
    Vsock(vsock::Listener),
}

impl Host {
    /// Waits for one of them. A machine that has both means the port.
    pub async fn find() -> Result<Self, SetupError> {
        let since = Instant::now();
        loop {
            if let Some(device) = port::find() {
                return Ok(Self::Port(AgentPort::open(&device)?));
            }
            if vsock::has_device() {
                return Ok(Self::Vsock(vsock::Listener::open().doing(|| "listening on the vsock port".to_owned())?));
            }
            if since.elapsed() > LIMIT {
                let nothing = Err(io::Error::from(io::ErrorKind::NotFound));
                return nothing.doing(|| format!("waiting for a virtio port named {} or a vsock device", port::NAME));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Serves the host for the rest of the guest's life.
    pub async fn serve(self, end: GuestEnd, agent: Arc<Agent>) -> Result<Infallible, SetupError> {
        match self {
            Self::Port(port) => {
                let ended = end.run(port, agent).await;
                Err(ended.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())).doing(|| "serving the host".to_owned())
            }
            Self::Vsock(listener) => loop {
                let connection = listener.accept().await.doing(|| "accepting the host's connection".to_owned())?;
                // How it ended is the host's business: it connects again, and the streams wait for it.
                let _ = end.run(connection, agent.clone()).await;
            },
        }
    }
}
