//! Quiesce, park, and go on in another process.

use std::{sync::atomic::Ordering, time::Duration};

use protocol::{
    agent::Request,
    link::{Attach, LinkError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::*;

#[tokio::test]
async fn a_quiesce_freezes_and_an_unquiesce_thaws() {
    let (link, machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    link.quiesce(LIMIT).await.unwrap();
    assert!(machine.guest.frozen.load(Ordering::SeqCst));
    assert!(matches!(link.open(port(ECHO), LIMIT).await, Err(LinkError::Closed)));
    assert!(matches!(link.call(Request::Stats, LIMIT).await, Err(LinkError::Closed)));
    assert!(matches!(link.quiesce(LIMIT).await, Err(LinkError::Closed)));
    link.unquiesce(LIMIT).await.unwrap();
    link.release_streams();
    assert!(!machine.guest.frozen.load(Ordering::SeqCst));
    stream.write_all(b"on").await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 2])).await.unwrap();
    assert_eq!(*machine.guest.said.lock(), ["thaw", "freeze", "thaw"]);
}

#[tokio::test]
async fn a_restored_guest_is_set_right_before_it_is_thawed() {
    let (link, mut machine) = booted(1000).await;
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    machine.attach(&link, restored()).await.unwrap();
    assert_eq!(*machine.guest.said.lock(), ["thaw", "freeze", "restored", "thaw"]);
}

/// The promise of the whole crate: streams under full load in both directions go through sleeps without losing or
/// doubling a byte.
#[tokio::test(flavor = "multi_thread")]
async fn busy_streams_survive_sleeps_byte_for_byte() {
    for buffer in [100, 5000, 64 * 1024] {
        let (link, mut machine) = booted(buffer).await;
        let len = if buffer == 100 { 400_000 } else { 6_000_000 };
        let mut transfers = tokio::task::JoinSet::new();
        for seed in 0..6 {
            let link = link.clone();
            let stream = link.open(port(ECHO), LIMIT).await.unwrap();
            transfers.spawn(async move {
                let sent = pattern(seed, len);
                let (mut read, mut write) = tokio::io::split(stream);
                let writing = async {
                    for piece in sent.chunks(seed as usize * 3000 + 777) {
                        write.write_all(piece).await.unwrap();
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
        let mut sleeps = 0;
        let all = async {
            while !transfers.is_empty() {
                link.quiesce(LIMIT).await.unwrap();
                sleeps += 1;
                if sleeps % 3 == 0 {
                    link.unquiesce(LIMIT).await.unwrap();
                    link.release_streams();
                } else {
                    link.detach();
                    machine.attach(&link, restored()).await.unwrap();
                }
                while let Some(done) = transfers.try_join_next() {
                    done.unwrap();
                }
            }
        };
        soon("all transfers", all).await;
        assert!(sleeps > 3, "{sleeps} sleeps say little");
    }
}

#[tokio::test]
async fn received_bytes_are_readable_while_parked_and_the_rest_waits() {
    let (link, mut machine) = booted(64 * 1024).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    app.write_all(b"before ").await.unwrap();
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    let mut got = [0; 7];
    soon("what had arrived", stream.read_exact(&mut got)).await.unwrap();
    app.write_all(b"after").await.unwrap();
    not_yet("a read while parked", stream.read(&mut got)).await;
    machine.attach(&link, restored()).await.unwrap();
    let mut rest = [0; 5];
    soon("the rest", stream.read_exact(&mut rest)).await.unwrap();
    assert_eq!(&rest, b"after");
}

#[tokio::test]
async fn a_parked_write_is_noticed_and_arrives() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    not_yet("parked_write while awake", link.parked_write()).await;
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    not_yet("parked_write without a write", link.parked_write()).await;
    let noticed = link.parked_write();
    let write = async {
        tokio::task::yield_now().await;
        stream.write_all(b"wake up").await.unwrap();
    };
    soon("the notice", async { tokio::join!(noticed, write) }).await;
    // Level, not edge.
    soon("the notice again", link.parked_write()).await;
    machine.attach(&link, restored()).await.unwrap();
    let mut heard = [0; 7];
    soon("the bytes", app.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"wake up");
    not_yet("parked_write after the wake", link.parked_write()).await;
}

#[tokio::test]
async fn a_parked_writer_is_held_at_the_window() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    let sent = pattern(5, 1_000_000);
    let mut writing = Box::pin(async {
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    not_yet("a write beyond the window", writing.as_mut()).await;
    machine.attach(&link, restored()).await.unwrap();
    let mut heard = Vec::new();
    soon("the upload", async { tokio::join!(writing, app.read_to_end(&mut heard)) }).await.1.unwrap();
    assert!(heard == sent);
}

#[tokio::test]
async fn the_end_of_a_parked_stream_is_remembered_and_wakes_nobody() {
    let (link, mut machine) = booted(1000).await;
    let mut finished = link.open(port(APP), LIMIT).await.unwrap();
    let mut finished_app = machine.accept().await;
    let dropped = link.open(port(APP), LIMIT).await.unwrap();
    let mut dropped_app = machine.accept().await;
    let mut written_and_dropped = link.open(port(APP), LIMIT).await.unwrap();
    let mut third_app = machine.accept().await;
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    finished.shutdown().await.unwrap();
    drop(dropped);
    // Bytes of a client that has left wake nobody either.
    written_and_dropped.write_all(b"never mind").await.unwrap();
    drop(written_and_dropped);
    not_yet("parked_write", link.parked_write()).await;
    not_yet("the end in the guest", finished_app.read(&mut [0; 1])).await;
    machine.attach(&link, restored()).await.unwrap();
    assert_eq!(soon("the end", finished_app.read(&mut [0; 1])).await.unwrap(), 0);
    assert_eq!(soon("the reset", dropped_app.read(&mut [0; 1])).await.unwrap(), 0);
    assert_eq!(soon("the reset", third_app.read(&mut [0; 99])).await.unwrap(), 0);
    finished_app.write_all(b"bye").await.unwrap();
    drop(finished_app);
    let mut rest = String::new();
    soon("the answer", finished.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "bye");
}

#[tokio::test(start_paused = true)]
async fn a_quiesce_without_an_answer_leaves_everything_as_it_was() {
    let (link, machine) = booted(64 * 1024).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    machine.guest.freeze_hangs.store(true, Ordering::SeqCst);
    let limit = Duration::from_secs(1);
    assert!(matches!(link.quiesce(limit).await, Err(LinkError::Timeout(_))));
    link.release_streams();
    stream.write_all(b"kept").await.unwrap();
    not_yet("parked_write after a quiesce that failed", link.parked_write()).await;
    assert_eq!(link.streams(), 1);
}

#[tokio::test]
async fn a_quiesce_that_the_agent_refuses_or_the_host_drops_leaves_everything_as_it_was() {
    let (link, machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    machine.guest.freeze_fails.store(true, Ordering::SeqCst);
    let refused = link.quiesce(LIMIT).await;
    assert!(matches!(&refused, Err(LinkError::Agent(why)) if why == "the freezer is broken"), "{refused:?}");
    machine.guest.freeze_fails.store(false, Ordering::SeqCst);
    not_yet_and_dropped(link.quiesce(LIMIT)).await;
    link.release_streams();
    stream.write_all(b"on").await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 2])).await.unwrap();
    assert!(!machine.guest.frozen.load(Ordering::SeqCst));
    // And a later one is not confused by answers to the earlier ones.
    link.quiesce(LIMIT).await.unwrap();
    assert!(machine.guest.frozen.load(Ordering::SeqCst));
}

async fn not_yet_and_dropped<T>(future: impl Future<Output = T>) {
    let mut future = std::pin::pin!(future);
    assert!(futures::poll!(future.as_mut()).is_pending());
}

#[tokio::test]
async fn a_guest_that_ends_after_its_quiesce_keeps_its_streams_parked() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    link.quiesce(LIMIT).await.unwrap();
    drop(machine.plug().await);
    soon("the loss", link.lost()).await;
    machine.attach(&link, restored()).await.unwrap();
    not_yet("a loss of the new transport", link.lost()).await;
    stream.write_all(b"on").await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 2])).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_restore_keeps_streams_parked_for_the_next() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    stream.write_all(b"on").await.unwrap();
    // A VMM that dies at once, one that never answers.
    let (host, guest) = tokio::io::duplex(1000);
    drop(guest);
    assert!(matches!(link.attach(host, restored(), LIMIT).await, Err(LinkError::Closed)));
    let (host, _mute) = tokio::io::duplex(1000);
    assert!(matches!(link.attach(host, restored(), LIMIT).await, Err(LinkError::Timeout(_))));
    soon("parked_write", link.parked_write()).await;
    machine.attach(&link, restored()).await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 2])).await.unwrap();
}

#[tokio::test]
async fn another_host_resets_the_streams_the_guest_remembers() {
    let (first, mut machine) = booted(1000).await;
    let mut stream = first.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    first.quiesce(LIMIT).await.unwrap();
    first.detach();
    stream.write_all(b"of an old epoch").await.unwrap();
    let second = link();
    machine.attach(&second, restored()).await.unwrap();
    assert_eq!(soon("the reset", app.read(&mut [0; 9])).await.unwrap(), 0);
    soon("the stream's end", async { while machine.end.streams() > 0 { tokio::task::yield_now().await } }).await;
    let mut other = second.open(port(ECHO), LIMIT).await.unwrap();
    other.write_all(b"new").await.unwrap();
    soon("the echo", other.read_exact(&mut [0; 3])).await.unwrap();
}

#[tokio::test]
async fn a_restore_to_a_state_the_link_did_not_quiesce_resets_its_streams() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    machine.attach(&link, restored()).await.unwrap();
    assert!(soon("the reset here", stream.read(&mut [0; 1])).await.is_err());
    assert_eq!(soon("the reset there", app.read(&mut [0; 1])).await.unwrap(), 0);
    assert!(matches!(machine.attach(&link, Attach::Adopted).await, Ok(())));
}
