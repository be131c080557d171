//! How fast the channel is by itself: one stream over a transport in memory, each way. Run with `--release`.

use std::{io, sync::Arc, time::Instant};

use model::{Door, Port};
use protocol::{
    agent::{Reply, Request, Restored},
    guest::{Guest, GuestEnd},
    link::{AgentLink, Attach},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};

const MIB: usize = 256;

struct App;

impl Guest for App {
    type Conn = DuplexStream;

    /// Port 1 swallows, port 2 floods.
    async fn connect(&self, door: Door) -> io::Result<DuplexStream> {
        let (near, far) = duplex(256 * 1024);
        tokio::spawn(async move { if Some(door) == Port::new(1).map(Door::Port) { drain(far).await } else { flood(far).await } });
        Ok(near)
    }
    fn reset(&self, _connection: DuplexStream) {}
    async fn request(&self, _request: Request) -> Reply {
        Reply::Done
    }
    async fn freeze(&self) -> Result<(), String> {
        Ok(())
    }
    async fn thaw(&self) -> Result<(), String> {
        Ok(())
    }
    async fn restored(&self, _restored: &Restored) -> Result<(), String> {
        Ok(())
    }
}

/// Reads to the end, then ends as well.
async fn drain(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut piece = vec![0; 64 * 1024];
    while stream.read(&mut piece).await.expect("the stream is whole") > 0 {}
    stream.shutdown().await.expect("the stream is whole");
}

async fn flood(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let piece = vec![7; 64 * 1024];
    for _ in 0..MIB * 16 {
        stream.write_all(&piece).await.expect("the stream is whole");
    }
    stream.shutdown().await.expect("the stream is whole");
    drain(stream).await;
}

#[tokio::main]
async fn main() {
    let link = AgentLink::new(Box::new(|_| {}));
    let (host, guest) = duplex(256 * 1024);
    tokio::spawn(async move { GuestEnd::new().run(guest, Arc::new(App)).await });
    let limit = std::time::Duration::from_secs(60);
    link.attach(host, Attach::Boot, limit).await.expect("the agent answers");
    for (port, direction) in [(1, "host to guest"), (2, "guest to host")] {
        let stream = link.open(Port::new(port).expect("a port"), limit).await.expect("the app answers");
        let since = Instant::now();
        if port == 1 { flood(stream).await } else { drain(stream).await }
        println!("{direction}: {:.0} MiB/s", MIB as f64 / since.elapsed().as_secs_f64());
    }
}
