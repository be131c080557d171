//! The guest's end of the agent's channel, and a host that says anything.
#![no_main]

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use dormouse_fuzz::{
    Input,
    channel::{self, BUFFER, Good, LIMIT, block_on, drain, message, serves, settle, write},
};
use libfuzzer_sys::fuzz_target;
use protocol::{
    VERSION,
    frame::{Kind, padding},
    guest::GuestEnd,
    link::{AgentLink, Attach},
};
use serde_json::{Value, json};
use tokio::{
    io::{DuplexStream, duplex},
    task::JoinHandle,
};

fn call(number: u8, input: &mut Input<'_>) -> Value {
    let request = match input.u8() % 8 {
        0 => json!({ "Start": { "argv": ["/app", "x"], "env": [["PATH", "/bin"]], "workdir": "/", "user": "", "exposed": [8080] } }),
        1 => json!({ "Start": { "argv": [], "env": [], "workdir": "x".repeat(usize::from(input.u16())), "user": "", "exposed": [0] } }),
        2 => json!({ "AwaitReady": { "exposed": [], "limit_ms": input.u64() } }),
        3 => json!("Jump"),
        4 => json!({ "Role": { "credentials": null } }),
        5 => json!({ "Role": { "credentials": { "access_key_id": "a", "secret_access_key": 1, "session_token": "" } } }),
        _ => json!("Stats"),
    };
    json!({ "Call": { "id": number, "request": request } })
}

fn syn(input: &mut Input<'_>) -> Value {
    let mode = match input.u8() % 8 {
        0 => json!("Adopted"),
        1 => json!({ "Restored": { "realtime_ns": input.u64(), "entropy": "00", "generation": 1, "identity": { "a": "b" }, "egress": "internet" } }),
        2 => json!({ "Restored": { "realtime_ns": 1 } }),
        _ => json!("Boot"),
    };
    let version = if input.u8() % 16 == 0 { input.u32() } else { VERSION };
    let answers = (input.u8() % 4 == 0).then(|| u64::from(input.u8() % 4));
    json!({ "version": version, "epoch": input.u8() % 4, "mode": mode, "answers": answers })
}

struct Bench {
    end: GuestEnd,
    guest: Arc<Good>,
    run: JoinHandle<()>,
    wire: DuplexStream,
}

impl Bench {
    fn start(end: &GuestEnd, guest: &Arc<Good>) -> (JoinHandle<()>, DuplexStream) {
        let (near, wire) = duplex(BUFFER);
        let (end, guest) = (end.clone(), guest.clone());
        let run = tokio::spawn(async move {
            let _ = end.run(near, guest).await;
        });
        (run, wire)
    }

    /// The transport ends, and there is another.
    async fn again(&mut self) {
        let (run, wire) = Self::start(&self.end, &self.guest);
        drop(std::mem::replace(&mut self.wire, wire));
        let old = std::mem::replace(&mut self.run, run);
        tokio::time::timeout(LIMIT, old).await.expect("it ends with its transport").expect("no panic");
    }

    async fn step(&mut self, input: &mut Input<'_>) {
        let mut wire = BytesMut::new();
        match input.u8() % 16 {
            0 => wire.extend_from_slice(&input.bytes(64)),
            1 => wire.extend_from_slice(padding()),
            2 => return self.again().await,
            3 => drain(&mut self.wire).await,
            4 | 5 => message(Kind::Syn, &syn(input), &mut wire),
            6 => {
                let number = input.u8();
                let said = match input.u8() % 4 {
                    0 => json!({ "Unquiesce": { "seq": number } }),
                    1 => json!({ "Quiesce": { "seq": number } }),
                    2 => call(number, input),
                    _ => json!({ "Quiesce": { "seq": -1 } }),
                };
                message(Kind::Control, &said, &mut wire);
            }
            7 => {
                let (output, patience) = (vec![b'o'; usize::from(input.u16())], Duration::from_millis(1));
                self.end.output(&output, patience).await;
            }
            8 => self.end.app_exited(input.u8().into()),
            9 => {
                for _ in 0..input.u8() {
                    channel::frame(&mut Input(&input.0[..input.0.len().min(8)]), &mut wire);
                }
            }
            _ => drop(channel::frame(input, &mut wire)),
        }
        write(&mut self.wire, &wire).await;
        settle().await;
    }
}

async fn program(data: &[u8]) {
    let mut input = Input(data);
    let guest = Arc::new(Good { freezer_is_broken: input.u8() % 8 == 0 });
    let end = GuestEnd::new();
    let (run, wire) = Bench::start(&end, &guest);
    let mut bench = Bench { end, guest, run, wire };
    if input.u8() % 8 != 0 {
        let mut wire = BytesMut::new();
        message(Kind::Syn, &json!({ "version": VERSION, "epoch": 1, "mode": "Boot", "answers": null }), &mut wire);
        write(&mut bench.wire, &wire).await;
        settle().await;
    }
    let mut steps = 0;
    while !input.is_empty() && steps < 200 {
        steps += 1;
        bench.step(&mut input).await;
    }

    // A host that behaves is served, on the transport as it was left; the bytes that the last one did not take come first.
    let link = AgentLink::new(Box::new(|_| {}));
    let Bench { end, run, wire, .. } = bench;
    link.attach(wire, Attach::Adopted, LIMIT).await.expect("a guest is there for a host that behaves");
    serves(&link).await;
    link.close();
    drop(link);
    tokio::time::timeout(LIMIT, run).await.expect("it ends with its transport").expect("no panic");
    drop(end);
}

fuzz_target!(|data: &[u8]| block_on(program(data)));
