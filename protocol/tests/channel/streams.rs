//! What a stream promises while nothing sleeps.

use std::sync::atomic::Ordering;

use model::Door;
use protocol::{
    agent::Request,
    guest::Listens,
    link::{AgentLink, LinkError, MuxStream},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::*;

#[tokio::test]
async fn an_echo_comes_back_and_both_ends_close() {
    let (link, _machine) = booted(64 * 1024).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"hello");
    assert_eq!(link.streams(), 1);
    stream.shutdown().await.unwrap();
    assert_eq!(soon("the end", stream.read(&mut back)).await.unwrap(), 0);
    drop(stream);
    assert_eq!(link.streams(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn big_transfers_arrive_whole_on_any_transport() {
    for buffer in [1, 17, 1000, 64 * 1024] {
        let (link, _machine) = booted(buffer).await;
        let len = if buffer < 100 { 300_000 } else { 5_000_000 };
        let mut transfers = tokio::task::JoinSet::new();
        for seed in 0..4 {
            let link = link.clone();
            transfers.spawn(async move {
                let sent = pattern(seed, len);
                let stream = link.open(port(ECHO), LIMIT).await.unwrap();
                let (mut read, mut write) = tokio::io::split(stream);
                let writing = async {
                    let mut rest = &sent[..];
                    let mut cut = seed as usize + 1;
                    while !rest.is_empty() {
                        cut = (cut * 7919) % 70_000 + 1;
                        let (piece, tail) = rest.split_at(cut.min(rest.len()));
                        write.write_all(piece).await.unwrap();
                        rest = tail;
                    }
                    write.shutdown().await.unwrap();
                };
                let mut back = Vec::new();
                let reading = read.read_to_end(&mut back);
                let ((), result) = tokio::join!(writing, reading);
                result.unwrap();
                assert!(back == sent, "stream {seed}: {} of {} bytes", back.len(), sent.len());
            });
        }
        soon("all transfers", async { while let Some(done) = transfers.join_next().await { done.unwrap() } }).await;
        assert_eq!(link.streams(), 0);
    }
}

#[tokio::test]
async fn each_direction_closes_by_itself() {
    let (link, mut machine) = booted(4096).await;
    // The host ends first.
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    stream.write_all(b"request").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut request = String::new();
    soon("the request", app.read_to_string(&mut request)).await.unwrap();
    assert_eq!(request, "request");
    app.write_all(b"answer").await.unwrap();
    drop(app);
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "answer");

    // The app ends first.
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    app.write_all(b"greeting").await.unwrap();
    app.shutdown().await.unwrap();
    let mut greeting = String::new();
    soon("the greeting", stream.read_to_string(&mut greeting)).await.unwrap();
    assert_eq!(greeting, "greeting");
    stream.write_all(b"still heard").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = String::new();
    soon("the rest", app.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "still heard");
    assert_eq!(machine.guest.resets.load(Ordering::SeqCst), 0);
}

/// A stream on which an app was asked and has answered, as a host keeps it for the next question.
async fn asked_once(machine: &mut Machine, link: &std::sync::Arc<AgentLink>) -> (MuxStream, tokio::io::DuplexStream) {
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    stream.write_all(b"first").await.unwrap();
    let mut five = [0; 5];
    soon("the question", app.read_exact(&mut five)).await.unwrap();
    app.write_all(b"reply").await.unwrap();
    soon("the answer", stream.read_exact(&mut five)).await.unwrap();
    assert_eq!(stream.written(), 5);
    (stream, app)
}

async fn untouched(stream: &MuxStream, from: u64) -> bool {
    soon("the verdict", std::future::poll_fn(|cx| stream.poll_untouched(cx, from))).await
}

#[tokio::test]
async fn what_an_app_that_has_closed_was_not_given_is_known() {
    let (link, mut machine) = booted(4096).await;
    let (mut stream, app) = asked_once(&mut machine, &link).await;
    *machine.guest.listens.lock() = Listens::No;
    // The end and the next question cross.
    drop(app);
    stream.write_all(b"second").await.unwrap();
    assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    assert!(untouched(&stream, 5).await && !untouched(&stream, 4).await);
}

#[tokio::test]
async fn what_an_app_refuses_was_not_given_to_it() {
    let (link, mut machine) = booted(4096).await;
    let (mut stream, mut app) = asked_once(&mut machine, &link).await;
    machine.guest.refuses.store(true, Ordering::SeqCst);
    stream.write_all(b"second").await.unwrap();
    // It has gone that far once the app has it, which one that refuses would not.
    soon("the question", app.read_exact(&mut [0; 6])).await.unwrap();
    drop(app);
    assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    assert!(untouched(&stream, 5).await);
}

#[tokio::test]
async fn what_an_app_may_have_read_is_never_called_untouched() {
    let (link, mut machine) = booted(4096).await;
    // It was asked, and hangs up.
    let (mut stream, mut app) = asked_once(&mut machine, &link).await;
    stream.write_all(b"second").await.unwrap();
    soon("the question", app.read_exact(&mut [0; 6])).await.unwrap();
    drop(app);
    assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    assert!(!untouched(&stream, 5).await);

    // It says no more, and listens.
    let (mut stream, mut app) = asked_once(&mut machine, &link).await;
    *machine.guest.listens.lock() = Listens::Perhaps;
    machine.guest.refuses.store(true, Ordering::SeqCst);
    app.shutdown().await.unwrap();
    stream.write_all(b"second").await.unwrap();
    assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    soon("the question", app.read_exact(&mut [0; 6])).await.unwrap();
    not_yet("the verdict", std::future::poll_fn(|cx| stream.poll_untouched(cx, 5))).await;
    drop(app);
    stream.write_all(b"third").await.unwrap();
    assert!(!untouched(&stream, 5).await);
}

#[tokio::test(start_paused = true)]
async fn an_app_that_closes_in_two_steps_is_not_given_what_comes_between_them() {
    let (link, mut machine) = booted(4096).await;
    let (mut stream, mut app) = asked_once(&mut machine, &link).await;
    *machine.guest.listens.lock() = Listens::Perhaps;
    app.shutdown().await.unwrap();
    stream.write_all(b"second").await.unwrap();
    assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    *machine.guest.listens.lock() = Listens::No;
    assert!(untouched(&stream, 5).await);
    assert_eq!(soon("nothing", app.read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_closed_port_refuses() {
    let (link, _machine) = booted(4096).await;
    let refused = soon("the refusal", link.open(port(CLOSED), LIMIT)).await;
    assert!(matches!(refused, Err(LinkError::Refused(which)) if which == port(CLOSED)), "{refused:?}");
    assert_eq!(link.streams(), 0);
}

#[tokio::test]
async fn a_shell_is_no_port_and_may_be_refused() {
    let (link, mut machine) = booted(4096).await;
    let refused = soon("the refusal", link.open(Door::Shell, LIMIT)).await;
    assert!(matches!(refused, Err(LinkError::NoShell)), "{refused:?}");
    machine.guest.has_shell.store(true, Ordering::SeqCst);
    let mut stream = soon("the shell", link.open(Door::Shell, LIMIT)).await.unwrap();
    let mut shell = machine.accept().await;
    shell.write_all(b"prompt").await.unwrap();
    let mut read = [0; 6];
    soon("the prompt", stream.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"prompt");
}

#[tokio::test(start_paused = true)]
async fn a_port_that_does_not_answer_times_out_and_is_given_up_in_the_guest() {
    let (link, machine) = booted(4096).await;
    let refused = link.open(port(SILENT), LIMIT / 10).await;
    assert!(matches!(refused, Err(LinkError::Timeout(_))), "{refused:?}");
    assert_eq!(link.streams(), 0);
    // The reset is ahead of this request's answer.
    link.call(Request::Stats, LIMIT).await.unwrap();
    assert_eq!(machine.end.streams(), 0);
}

#[tokio::test]
async fn a_dropped_stream_resets_the_connection_in_the_guest() {
    let (link, mut machine) = booted(4096).await;
    let stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    drop(stream);
    let mut rest = Vec::new();
    soon("the end", app.read_to_end(&mut rest)).await.unwrap();
    soon("the reset", async { while machine.guest.resets.load(Ordering::SeqCst) == 0 { tokio::task::yield_now().await } }).await;
}

#[tokio::test]
async fn what_was_written_before_a_shutdown_arrives_though_the_stream_is_dropped() {
    let (link, mut machine) = booted(1000).await;
    let sent = pattern(3, 200_000);
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    drop(stream);
    let mut heard = Vec::new();
    soon("the upload", app.read_to_end(&mut heard)).await.unwrap();
    assert!(heard == sent, "{} of {} bytes", heard.len(), sent.len());
}

#[tokio::test]
async fn an_early_answer_to_an_upload_arrives() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    stream.write_all(&pattern(1, 100_000)).await.unwrap();
    // The app answers without reading and hangs up.
    app.write_all(b"413 too large").await.unwrap();
    drop(app);
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "413 too large");
    let broken = soon("the broken pipe", async {
        loop {
            if let Err(error) = stream.write_all(&[0; 1000]).await {
                return error;
            }
        }
    });
    assert_eq!(broken.await.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reader_that_stops_stops_its_sender_and_nobody_else() {
    let (link, mut machine) = booted(64 * 1024).await;
    let _unread = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    let flood = tokio::spawn(async move {
        let mut sent = 0;
        while app.write_all(&[7; 10_000]).await.is_ok() {
            sent += 10_000;
            assert!(sent < 10_000_000, "nothing stops the sender");
        }
    });
    let mut other = link.open(port(ECHO), LIMIT).await.unwrap();
    for _ in 0..100 {
        other.write_all(b"ping").await.unwrap();
        let mut back = [0; 4];
        soon("the echo", other.read_exact(&mut back)).await.unwrap();
    }
    assert!(!flood.is_finished());
    flood.abort();
}

#[tokio::test]
async fn a_bulk_stream_leaves_room_for_others() {
    let (link, mut machine) = booted(1000).await;
    let mut bulk = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    let drain = tokio::spawn(async move { tokio::io::copy(&mut app, &mut tokio::io::sink()).await });
    let feed = tokio::spawn(async move { while bulk.write_all(&[1; 100_000]).await.is_ok() {} });
    let mut other = link.open(port(ECHO), LIMIT).await.unwrap();
    for _ in 0..20 {
        other.write_all(b"ping").await.unwrap();
        soon("the echo beside a bulk stream", other.read_exact(&mut [0; 4])).await.unwrap();
    }
    feed.abort();
    drain.abort();
}

#[tokio::test]
async fn streams_are_bounded() {
    let (link, _machine) = booted(64 * 1024).await;
    let mut open = Vec::new();
    let refused = loop {
        match link.open(port(ECHO), LIMIT).await {
            Ok(stream) => open.push(stream),
            Err(error) => break error,
        }
        assert!(open.len() <= 4096);
    };
    assert_eq!((open.len(), link.streams()), (4096, 4096));
    assert!(matches!(refused, LinkError::Agent(_)), "{refused:?}");
    open.pop();
    soon("a place", async { while link.open(port(ECHO), LIMIT).await.is_err() { tokio::task::yield_now().await } }).await;
}
