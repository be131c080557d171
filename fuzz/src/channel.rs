//! The agent's channel on an in-memory transport: frames from the fuzzer's bytes, and ends that behave.
//!
//! Time does not pass by itself in here (tokio's paused clock): a wait for a message that does not come is over at once.

use std::{io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use model::{Door, Port};
use protocol::{
    agent::{Reply, Request, Restored},
    frame::{Assembler, Decoded, Decoder, Kind, MARKER, put_frame, put_message},
    guest::Guest,
    link::AgentLink,
};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::Input;

/// More than anything waits for. Time passes only when everyone waits.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Nobody listens here.
pub const CLOSED: u16 = 1;
/// Sends back what it gets.
pub const ECHO: u16 = 7;
/// Answers a connection never.
pub const SILENT: u16 = 9;
/// Bytes that may be under way on a transport, in each direction.
pub const BUFFER: usize = 64 * 1024;

const KINDS: [Kind; 12] = [
    Kind::Pad,
    Kind::Syn,
    Kind::Ack,
    Kind::Control,
    Kind::Open,
    Kind::Opened,
    Kind::Refused,
    Kind::Data,
    Kind::Credit,
    Kind::Fin,
    Kind::Reset,
    Kind::Output,
];

/// Runs a program with a clock that stands still while there is something to do.
pub fn block_on<F: Future<Output = ()>>(program: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(program);
}

/// Lets everyone else do what there is to do.
pub async fn settle() {
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
}

pub fn port(number: u16) -> Port {
    Port::new(number).unwrap_or(Port::DEFAULT)
}

/// A frame that is whole; what it says may be nonsense.
pub fn frame(input: &mut Input<'_>, wire: &mut BytesMut) -> (Kind, u32, Vec<u8>) {
    let kind = KINDS[usize::from(input.u8()) % KINDS.len()];
    let stream = match input.u8() {
        255 => input.u32(),
        number => u32::from(number % 16),
    };
    let payload = match kind {
        _ if input.u8().is_multiple_of(16) => input.bytes(255),
        Kind::Open => u16::from(input.u8()).to_le_bytes().to_vec(),
        Kind::Credit => u32::from(input.u16()).to_le_bytes().to_vec(),
        Kind::Data | Kind::Output => vec![input.u8(); usize::from(input.u16() % 0x8001)],
        Kind::Opened | Kind::Refused | Kind::Fin | Kind::Reset | Kind::Pad => Vec::new(),
        Kind::Syn | Kind::Ack | Kind::Control => input.bytes(255),
    };
    put_frame(wire, kind, stream, &payload);
    (kind, stream, payload)
}

/// A CONTROL message, or a handshake with its marker.
pub fn message(kind: Kind, message: &Value, wire: &mut BytesMut) {
    if kind != Kind::Control {
        wire.extend_from_slice(&MARKER);
    }
    let put = put_message(wire, kind, message.to_string().as_bytes());
    assert!(put, "a message of this harness is short");
}

/// The next message of one of these kinds that is read from a channel; `None` if there is none. What comes before is skipped.
pub async fn next_message<R: AsyncRead + Unpin>(io: &mut R, decoder: &mut Decoder, kind: Kind) -> Option<Value> {
    let mut messages = Assembler::default();
    loop {
        while let Some(decoded) = decoder.next() {
            let Decoded::Frame(frame) = decoded else { continue };
            if frame.kind == kind
                && let Ok(Some(message)) = messages.push(frame)
            {
                return serde_json::from_slice(&message).ok();
            }
        }
        match tokio::time::timeout(Duration::from_millis(20), io.read_buf(decoder.buffer())).await {
            Ok(Ok(1..)) => {}
            _ => return None,
        }
    }
}

/// Writes what the other side takes.
pub async fn write(io: &mut DuplexStream, bytes: &[u8]) {
    let _ = tokio::time::timeout(Duration::from_millis(1), io.write_all(bytes)).await;
}

/// Throws away what has arrived.
pub async fn drain(io: &mut (impl AsyncRead + Unpin)) {
    let mut bytes = vec![0; BUFFER];
    while let Ok(Ok(1..)) = tokio::time::timeout(Duration::from_millis(1), io.read(&mut bytes)).await {}
}

/// An answer to the SYN `syn`, right in all but what the fuzzer wants.
pub fn ack(syn: &Value, input: &mut Input<'_>) -> Value {
    let mut ack = json!({ "version": syn["version"], "epoch": syn["epoch"], "exited": null, "failed": null, "again": null });
    match input.u8() % 16 {
        0 => ack["version"] = json!(input.u32()),
        1 => ack["epoch"] = json!(input.u64()),
        2 => ack["exited"] = json!(input.u8()),
        3 => ack["failed"] = json!("it cannot"),
        4 => ack["again"] = json!(input.u64()),
        5 => ack = json!({ "version": syn["version"] }),
        _ => {}
    }
    ack
}

/// A guest with an app that behaves.
#[derive(Default)]
pub struct Good {
    /// Freezing fails.
    pub freezer_is_broken: bool,
}

impl Guest for Good {
    type Conn = DuplexStream;

    async fn connect(&self, door: Door) -> io::Result<DuplexStream> {
        let Door::Port(port) = door else { return Err(io::ErrorKind::NotFound.into()) };
        let (near, far) = duplex(10_000);
        match port.get() {
            CLOSED => return Err(io::ErrorKind::ConnectionRefused.into()),
            SILENT => std::future::pending().await,
            _ => {
                tokio::spawn(async move {
                    let (mut read, mut write) = tokio::io::split(far);
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        }
        Ok(near)
    }

    fn reset(&self, _connection: DuplexStream) {}

    async fn request(&self, request: Request) -> Reply {
        match request {
            Request::Stats => Reply::Stats { streams: 0, realtime_ns: 1 },
            Request::Role(_) => Reply::Done,
            Request::AwaitReady { .. } => std::future::pending().await,
            Request::Start(spec) => Reply::Failed(format!("{} arguments", spec.argv.len())),
        }
    }

    async fn freeze(&self) -> Result<(), String> {
        if self.freezer_is_broken { Err("the freezer is broken".to_owned()) } else { Ok(()) }
    }

    async fn thaw(&self) -> Result<(), String> {
        Ok(())
    }

    async fn restored(&self, _restored: &Restored) -> Result<(), String> {
        Ok(())
    }
}

/// An attached link does all that it is for.
pub async fn serves(link: &Arc<AgentLink>) {
    assert!(matches!(link.call(Request::Stats, LIMIT).await, Ok(Reply::Stats { .. })));
    let mut stream = link.open(port(ECHO), LIMIT).await.expect("the port is open");
    let sent = Bytes::from_static(&[0xa5; 10_000]);
    let (mut reader, mut writer) = tokio::io::split(&mut stream);
    let send = async {
        writer.write_all(&sent).await?;
        writer.shutdown().await
    };
    let mut received = Vec::new();
    let both = async { tokio::try_join!(send, reader.read_to_end(&mut received)) };
    tokio::time::timeout(LIMIT, both).await.expect("the echo answers").expect("the stream is whole");
    assert!(received == sent, "the echo changed the bytes");
}
