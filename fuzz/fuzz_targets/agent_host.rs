//! The host's end of the agent's channel, and a hostile guest.
#![no_main]

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use dormouse_fuzz::{
    Input,
    channel::{self, BUFFER, Good, LIMIT, ack, block_on, drain, message, next_message, port, serves, settle, write},
};
use libfuzzer_sys::fuzz_target;
use model::{Door, Egress, Generation};
use protocol::{
    agent::{Request, Restored},
    frame::{Decoder, Kind},
    guest::GuestEnd,
    link::{AgentLink, Attach, MuxStream},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinSet,
};

const MOST_STREAMS: usize = 8;
const MOST_CALLS: usize = 32;

/// What the node waits for.
enum Outcome {
    Opened(MuxStream),
    Other,
}

struct Bench {
    link: Arc<AgentLink>,
    /// The guest's end, while there is one.
    wire: Option<DuplexStream>,
    streams: Vec<MuxStream>,
    waits: JoinSet<Outcome>,
}

impl Bench {
    /// A new transport, with a guest that shakes hands as it likes.
    async fn attach(&mut self, input: &mut Input<'_>) {
        let how = match input.u8() % 4 {
            0 => Attach::Boot,
            1 => Attach::Adopted,
            _ => Attach::Restored(Restored { realtime_ns: 1, entropy: "00".repeat(64), generation: Generation(1), identity: Default::default(), egress: Egress::Internet, role: None }),
        };
        let (near, mut far) = duplex(BUFFER);
        let link = self.link.clone();
        let attached = tokio::spawn(async move { link.attach(near, how, Duration::from_secs(1)).await });
        if input.u8() % 8 == 0 {
            let mut noise = BytesMut::new();
            channel::frame(input, &mut noise);
            noise.extend_from_slice(&input.bytes(64));
            write(&mut far, &noise).await;
        }
        let mut decoder = Decoder::seeking();
        for _ in 0..20 {
            let Some(syn) = next_message(&mut far, &mut decoder, Kind::Syn).await else { break };
            let ack = ack(&syn, input);
            let mut wire = BytesMut::new();
            message(Kind::Ack, &ack, &mut wire);
            if input.u8() % 8 == 0 {
                // What follows is there before the handshake is over.
                channel::frame(input, &mut wire);
            }
            write(&mut far, &wire).await;
            if ack["again"].is_null() {
                break;
            }
        }
        // Ends by itself, at its limit if not before.
        let _ = attached.await.expect("no panic");
        self.wire = Some(far);
    }

    /// Something that the guest says.
    async fn say(&mut self, input: &mut Input<'_>) {
        let Some(far) = &mut self.wire else { return };
        let mut wire = BytesMut::new();
        for _ in 0..=input.u8() % 4 {
            match input.u8() % 8 {
                0 => wire.extend_from_slice(&input.bytes(64)),
                1 | 2 => {
                    let number = input.u8();
                    let said = match input.u8() % 12 {
                        0 => json!({ "Reply": { "id": number, "reply": "Done" } }),
                        1 => json!({ "Reply": { "id": number, "reply": { "Ready": input.u16() } } }),
                        2 => json!({ "Reply": { "id": number, "reply": { "Failed": "x".repeat(usize::from(input.u16())) } } }),
                        3 => json!({ "Event": { "AppExited": { "code": number } } }),
                        4 => json!({ "QuiesceFailed": { "seq": number, "why": "it cannot" } }),
                        5 => json!({ "Unquiesced": { "seq": number } }),
                        6 => json!({ "Event": null }),
                        7 => json!({ "Reply": { "id": -1, "reply": "Done" } }),
                        _ => json!({ "Quiesced": { "seq": number % 8 } }),
                    };
                    message(Kind::Control, &said, &mut wire);
                }
                _ => drop(channel::frame(input, &mut wire)),
            }
        }
        write(far, &wire).await;
    }

    /// Something that the node does.
    async fn act(&mut self, input: &mut Input<'_>) {
        let limit = Duration::from_millis(50);
        let link = self.link.clone();
        let busy = self.waits.len() >= MOST_CALLS;
        match input.u8() % 12 {
            0..3 if self.streams.len() < MOST_STREAMS && !busy => {
                // Two numbers that no good guest listens on stand for what is no port.
                let door = match input.u8() {
                    254 => Door::Shell,
                    255 => Door::Egress,
                    number => port(u16::from(number)).into(),
                };
                self.waits.spawn(async move { link.open(door, limit).await.map_or(Outcome::Other, Outcome::Opened) });
            }
            3 if !busy => {
                self.waits.spawn(async move {
                    let _ = link.call(Request::Stats, limit).await;
                    Outcome::Other
                });
            }
            4 if !busy => {
                self.waits.spawn(async move {
                    let _ = link.quiesce(limit).await;
                    Outcome::Other
                });
            }
            5 if !busy => {
                self.waits.spawn(async move {
                    let _ = link.unquiesce(limit).await;
                    Outcome::Other
                });
            }
            6 => self.link.detach(),
            7 => {
                let _ = tokio::time::timeout(Duration::from_millis(1), self.link.event()).await;
                let _ = tokio::time::timeout(Duration::from_millis(1), self.link.parked_write()).await;
            }
            8 => drop(self.streams.pop()),
            9 => {
                if let Some(stream) = self.streams.last_mut() {
                    let _ = stream.shutdown().await;
                }
            }
            10 => {
                if let Some(stream) = self.streams.last_mut() {
                    let _ = tokio::time::timeout(Duration::from_millis(1), stream.write_all(&vec![1; usize::from(input.u16())])).await;
                }
            }
            _ => {
                if let Some(stream) = self.streams.first_mut() {
                    let mut bytes = vec![0; usize::from(input.u16())];
                    let _ = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut bytes)).await;
                }
            }
        }
    }
}

async fn program(data: &[u8]) {
    let mut input = Input(data);
    let mut bench = Bench { link: AgentLink::new(Box::new(|_| {})), wire: None, streams: Vec::new(), waits: JoinSet::new() };
    bench.attach(&mut input).await;
    let mut steps = 0;
    while !input.is_empty() && steps < 200 {
        steps += 1;
        match input.u8() % 16 {
            0 => bench.wire = None,
            1 => bench.attach(&mut input).await,
            2 => {
                if let Some(far) = &mut bench.wire {
                    drain(far).await;
                }
            }
            3..9 => bench.act(&mut input).await,
            _ => bench.say(&mut input).await,
        }
        settle().await;
        while let Some(done) = bench.waits.try_join_next() {
            if let Outcome::Opened(stream) = done.expect("no panic") {
                bench.streams.push(stream);
            }
        }
        assert!(bench.link.streams() <= MOST_STREAMS + 2 * MOST_CALLS, "the guest makes no streams");
    }

    // A guest that behaves is served, whatever the one before it did, and streams of that one end.
    let Bench { link, wire, mut streams, mut waits } = bench;
    drop(wire);
    let (near, far) = duplex(BUFFER);
    let guest = tokio::spawn(async move { GuestEnd::new().run(far, Arc::new(Good::default())).await });
    link.attach(near, Attach::Boot, LIMIT).await.expect("a guest that behaves is attached");
    while let Some(done) = tokio::time::timeout(LIMIT, waits.join_next()).await.expect("every wait ends") {
        if let Outcome::Opened(stream) = done.expect("no panic") {
            streams.push(stream);
        }
    }
    for stream in &mut streams {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "a stream of a guest that is gone does not end");
    }
    serves(&link).await;
    drop(streams);
    link.close();
    assert_eq!(link.streams(), 0);
    guest.abort();
}

fuzz_target!(|data: &[u8]| block_on(program(data)));
