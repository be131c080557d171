//! A `serve` that was killed at any byte, and the next one on the same channel.

use protocol::{agent::Request, link::Attach};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, copy, split};

use crate::machine::*;

/// Carries bytes between an old host and the channel until so many have gone either way, then ends in the middle of
/// whatever frames that was. The channel is left as it is.
async fn carry(host: DuplexStream, channel: &mut DuplexStream, to_guest: u64, to_host: u64) {
    let (host_read, mut host_write) = split(host);
    let (channel_read, mut channel_write) = split(channel);
    let mut down = host_read.take(to_guest);
    let mut up = channel_read.take(to_host);
    tokio::select! {
        _ = copy(&mut down, &mut channel_write) => {}
        _ = copy(&mut up, &mut host_write) => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_host_takes_over_in_the_middle_of_any_frame() {
    // The handshake is about 150 bytes each way; then frames of all lengths.
    for round in 0..60u64 {
        let (to_guest, to_host) = (400 + round * 7919 % 150_000, 400 + round * 104_729 % 150_000);
        let first = link();
        let mut machine = Machine::new(if round % 2 == 0 { 1000 } else { 64 * 1024 });
        let mut channel = machine.plug().await;
        let (near, far) = tokio::io::duplex(3000);
        let old_host = async {
            first.attach(near, Attach::Boot, LIMIT).await.unwrap();
            let mut work = tokio::task::JoinSet::new();
            for seed in 0..3 {
                let first = first.clone();
                work.spawn(async move {
                    let Ok(stream) = first.open(port(ECHO), LIMIT).await else { return };
                    let (mut read, mut write) = split(stream);
                    let sent = pattern(seed, 2_000_000);
                    let reading = async {
                        // What comes back before the cut is what was sent, to the last byte: no padding, no gap.
                        let (mut at, mut piece) = (0, vec![0; 10_000]);
                        while let Ok(n @ 1..) = read.read(&mut piece).await {
                            assert!(sent[at..at + n] == piece[..n], "at {at}");
                            at += n;
                        }
                    };
                    let _ = tokio::join!(write.write_all(&sent), reading);
                });
            }
            while let Some(done) = work.join_next().await {
                done.unwrap();
            }
        };
        soon("the old host", async { tokio::join!(old_host, carry(far, &mut channel, to_guest, to_host)) }).await;
        drop(first);

        let second = link();
        second.attach(channel, Attach::Adopted, LIMIT).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        second.call(Request::Stats, LIMIT).await.unwrap();
        let mut stream = second.open(port(ECHO), LIMIT).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        soon("the echo", stream.read_exact(&mut back)).await.unwrap();
        assert_eq!(&back, b"hello");
        soon("the old streams' end", async { while machine.end.streams() > 1 { tokio::task::yield_now().await } }).await;
    }
}

#[tokio::test]
async fn a_host_killed_while_the_guest_was_quiesced_leaves_a_guest_that_can_be_adopted() {
    let (first, mut machine) = booted(1000).await;
    first.quiesce(LIMIT).await.unwrap();
    drop(first);
    let second = link();
    machine.attach(&second, Attach::Adopted).await.unwrap();
    assert_eq!(*machine.guest.said.lock(), ["thaw", "freeze", "thaw"]);
    second.call(Request::Stats, LIMIT).await.unwrap();
}

/// What the guest's app reads must be a prefix of what was sent, also when the sender was cut off in a frame.
#[tokio::test]
async fn no_padding_reaches_the_app() {
    for cut in (20_000..70_000).step_by(1013) {
        let first = link();
        let mut machine = Machine::new(64 * 1024);
        let mut channel = machine.plug().await;
        let (near, far) = tokio::io::duplex(1000);
        let sent = pattern(cut, 100_000);
        let old_host = async {
            first.attach(near, Attach::Boot, LIMIT).await.unwrap();
            let mut stream = first.open(port(APP), LIMIT).await.unwrap();
            stream.write_all(&sent).await.unwrap();
            soon("the cut", first.lost()).await;
        };
        let carrying = async {
            let (host_read, mut host_write) = split(far);
            let (mut channel_read, mut channel_write) = split(&mut channel);
            let mut down = host_read.take(cut);
            tokio::select! {
                _ = copy(&mut down, &mut channel_write) => {}
                _ = copy(&mut channel_read, &mut host_write) => {}
            }
        };
        tokio::join!(old_host, carrying);
        let mut app = machine.accept().await;
        let second = link();
        let mut heard = Vec::new();
        let (attached, read) = tokio::join!(second.attach(channel, Attach::Adopted, LIMIT), soon("the reset", app.read_to_end(&mut heard)));
        attached.unwrap();
        read.unwrap();
        assert!(sent.starts_with(&heard), "cut at {cut}: {} bytes", heard.len());
    }
}
