//! Requests, events, output, and guests that break the protocol.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use protocol::{
    VERSION,
    agent::{AppSpec, Event, Reply, Request},
    frame::{Kind, MARKER, put_frame},
    link::{AgentLink, Attach, LinkError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::*;

fn spec(argument: String) -> AppSpec {
    AppSpec { argv: vec![argument], env: vec![], workdir: "/".to_owned(), user: String::new(), exposed: vec![], rights: Default::default() }
}

#[tokio::test]
async fn requests_are_answered_also_long_ones() {
    let (link, _machine) = booted(1000).await;
    assert!(matches!(link.call(Request::Stats, LIMIT).await, Ok(Reply::Stats { .. })));
    let long = link.call(Request::Start(spec("x".repeat(300_000))), LIMIT).await;
    assert!(matches!(&long, Err(LinkError::Agent(why)) if why == "300000 bytes of argv"), "{long:?}");
    let too_long = link.call(Request::Start(spec("x".repeat(2_000_000))), LIMIT).await;
    assert!(matches!(too_long, Err(LinkError::Protocol(_))), "{too_long:?}");
    assert!(link.call(Request::Stats, LIMIT).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_times_out() {
    let (link, _machine) = booted(1000).await;
    let waiting = link.call(Request::AwaitReady { exposed: vec![], limit_ms: 1 }, Duration::from_secs(1)).await;
    assert!(matches!(waiting, Err(LinkError::Timeout(_))), "{waiting:?}");
}

#[tokio::test]
async fn an_event_is_delivered_once() {
    let (link, machine) = booted(1000).await;
    machine.end.app_exited(137);
    assert_eq!(soon("the event", link.event()).await, Event::AppExited { code: 137 });
    not_yet("a second event", link.event()).await;
}

#[tokio::test]
async fn a_later_host_hears_of_an_exit_too_and_once() {
    let (first, mut machine) = booted(1000).await;
    machine.end.app_exited(3);
    assert_eq!(soon("the event", first.event()).await, Event::AppExited { code: 3 });
    first.detach();
    let second = link();
    machine.attach(&second, Attach::Adopted).await.unwrap();
    assert_eq!(soon("the event", second.event()).await, Event::AppExited { code: 3 });
    second.call(Request::Stats, LIMIT).await.unwrap();
    not_yet("a second event", second.event()).await;
}

#[tokio::test]
async fn output_arrives_in_order_and_what_is_dropped_is_counted() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = heard.clone();
    let link = AgentLink::new(Box::new(move |output| keep.lock().extend_from_slice(output)));
    let mut machine = Machine::new(1000);
    // Before any host: the first part is kept, the rest is dropped, nobody waits for ever.
    let sent = pattern(1, 500_000);
    for piece in sent.chunks(10_000) {
        soon("output without a host", machine.end.output(piece, Duration::ZERO)).await;
    }
    machine.attach(&link, Attach::Boot).await.unwrap();
    let kept = soon("the kept output", async {
        loop {
            link.call(Request::Stats, LIMIT).await.unwrap();
            let len = heard.lock().len();
            if len >= 200_000 {
                return len;
            }
        }
    })
    .await;
    assert!(heard.lock()[..] == sent[..kept]);
    machine.end.output(b"later", LIMIT).await;
    let note = format!("\n[dormouse: {} bytes of output were dropped here]\nlater", sent.len() - 260_000);
    soon("the note", async { while !heard.lock().ends_with(note.as_bytes()) { tokio::task::yield_now().await } }).await;
}

/// A guest that shakes hands properly, sends `at_once`, and `later` when it has got another frame.
async fn rogue(at_once: Vec<u8>, later: Vec<u8>) -> (Arc<AgentLink>, tokio::task::JoinHandle<()>) {
    let link = link();
    let (host, mut guest) = tokio::io::duplex(100_000);
    let task = tokio::spawn(async move {
        let mut syn = Vec::new();
        let epoch = loop {
            syn.push(guest.read_u8().await.unwrap());
            if let Some((_, rest)) = String::from_utf8_lossy(&syn).split_once("\"epoch\":")
                && let Some((number, _)) = rest.split_once(',')
            {
                break number.to_owned();
            }
        };
        let mut ack = bytes::BytesMut::from(&MARKER[..]);
        let message = format!("{{\"version\":{VERSION},\"epoch\":{epoch},\"exited\":null,\"failed\":null,\"again\":null}}");
        put_frame(&mut ack, Kind::Ack, 0, message.as_bytes());
        ack.extend_from_slice(&at_once);
        guest.write_all(&ack).await.unwrap();
        if !later.is_empty() {
            // The rest of the SYN is on its way too; an OPEN is what carries the port.
            let mut seen = Vec::new();
            while !seen.windows(2).any(|window| window == APP.to_le_bytes()) {
                seen.push(guest.read_u8().await.unwrap());
            }
            guest.write_all(&later).await.unwrap();
        }
        let _ = guest.read_to_end(&mut Vec::new()).await;
    });
    link.attach(host, Attach::Boot, LIMIT).await.unwrap();
    (link, task)
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_loses_its_channel_and_nothing_else_happens() {
    let mut cases = vec![b"garbage that is longer than a header".to_vec(), MARKER.to_vec()];
    for (kind, stream, payload) in [
        (Kind::Open, 1, &b"\x50\x00"[..]),
        (Kind::Syn, 0, b"{}"),
        (Kind::Ack, 0, b"{}"),
        (Kind::Control, 0, b"not json"),
        (Kind::Control, 0, b"{\"Call\":{}}"),
    ] {
        let mut frame = bytes::BytesMut::new();
        put_frame(&mut frame, kind, stream, payload);
        cases.push(frame.to_vec());
    }
    for case in cases {
        let (link, guest) = rogue(case.clone(), Vec::new()).await;
        soon(&format!("the end after {case:?}"), link.lost()).await;
        assert!(matches!(link.call(Request::Stats, LIMIT).await, Err(LinkError::Closed)));
        assert!(matches!(link.open(port(APP), LIMIT).await, Err(LinkError::Closed)));
        soon("the guest's end", guest).await.unwrap();
    }
}

#[tokio::test]
async fn frames_of_unknown_streams_and_answers_to_nobody_are_ignored() {
    let mut frames = bytes::BytesMut::new();
    for (kind, payload) in [(Kind::Data, &b"data"[..]), (Kind::Fin, b""), (Kind::Reset, b""), (Kind::Credit, b"\xff\xff\xff\xff"), (Kind::Opened, b""), (Kind::Refused, b"")] {
        put_frame(&mut frames, kind, 77, payload);
    }
    put_frame(&mut frames, Kind::Control, 0, b"{\"Reply\":{\"id\":99,\"reply\":\"Done\"}}");
    put_frame(&mut frames, Kind::Control, 0, b"{\"Quiesced\":{\"seq\":99}}");
    put_frame(&mut frames, Kind::Control, 0, b"{\"Event\":{\"AppExited\":{\"code\":5}}}");
    let (link, guest) = rogue(frames.to_vec(), Vec::new()).await;
    assert_eq!(soon("the event after them", link.event()).await, Event::AppExited { code: 5 });
    not_yet("the end", link.lost()).await;
    guest.abort();
}

#[tokio::test]
async fn a_guest_that_ignores_its_window_loses_its_channel() {
    let mut flood = bytes::BytesMut::new();
    put_frame(&mut flood, Kind::Opened, 1, b"");
    for _ in 0..9 {
        put_frame(&mut flood, Kind::Data, 1, &[0; 32 * 1024]);
    }
    let (link, guest) = rogue(Vec::new(), flood.to_vec()).await;
    // Eight frames are a window: kept until the stream is dropped. The ninth is the end.
    let stream = link.open(port(APP), LIMIT).await;
    soon("the end", link.lost()).await;
    drop(stream);
    guest.abort();
}

#[tokio::test]
async fn a_lost_transport_resets_streams_and_ends_calls() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let _app = machine.accept().await;
    let call = link.call(Request::AwaitReady { exposed: vec![], limit_ms: 1 }, LIMIT);
    let pull = async {
        tokio::task::yield_now().await;
        drop(machine.plug().await);
    };
    let (call, ()) = tokio::join!(call, pull);
    assert!(matches!(call, Err(LinkError::Closed)), "{call:?}");
    soon("the loss", link.lost()).await;
    assert_eq!(soon("the reset", stream.read(&mut [0; 1])).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(link.streams(), 0);
}

#[tokio::test]
async fn a_closed_link_stays_closed() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    link.close();
    assert!(soon("the reset", stream.read(&mut [0; 1])).await.is_err());
    assert!(matches!(machine.attach(&link, Attach::Boot).await, Err(LinkError::Closed)));
}
