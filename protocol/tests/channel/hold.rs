//! Streams of the time before a sleep move no byte until they are let go on.

use protocol::link::AgentLink;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::*;

async fn echoes(link: &std::sync::Arc<AgentLink>) {
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    stream.write_all(b"alone").await.unwrap();
    soon("the echo", stream.read_exact(&mut [0; 5])).await.unwrap();
}

#[tokio::test]
async fn after_a_restore_only_new_streams_flow() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(APP), LIMIT).await.unwrap();
    let mut app = machine.accept().await;
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    stream.write_all(b"to the app").await.unwrap();
    app.write_all(b"from the app").await.unwrap();
    machine.attach_holding(&link, restored()).await.unwrap();
    echoes(&link).await;
    stream.write_all(b", twice").await.unwrap();
    let (mut heard, mut got) = ([0; 17], [0; 12]);
    not_yet("a byte at the app", app.read(&mut heard)).await;
    not_yet("a byte at the client", stream.read(&mut got)).await;
    link.release_streams();
    soon("what was held", app.read_exact(&mut heard)).await.unwrap();
    soon("what was kept back", stream.read_exact(&mut got)).await.unwrap();
    assert_eq!((&heard, &got), (b"to the app, twice", b"from the app"));
    assert!(!link.park_again(), "its streams have gone on");
    echoes(&link).await;
}

#[tokio::test]
async fn after_a_quiesce_that_was_taken_back_too_and_ends_are_held_as_well() {
    let (link, mut machine) = booted(1000).await;
    let mut written = link.open(port(APP), LIMIT).await.unwrap();
    let mut written_app = machine.accept().await;
    let dropped = link.open(port(APP), LIMIT).await.unwrap();
    let mut dropped_app = machine.accept().await;
    let mut ended = link.open(port(APP), LIMIT).await.unwrap();
    let mut ended_app = machine.accept().await;
    link.quiesce(LIMIT).await.unwrap();
    link.unquiesce(LIMIT).await.unwrap();
    written.write_all(b"later").await.unwrap();
    drop(dropped);
    ended_app.write_all(b"last words").await.unwrap();
    drop(ended_app);
    echoes(&link).await;
    not_yet("bytes", written_app.read(&mut [0; 5])).await;
    not_yet("the end in the guest", dropped_app.read(&mut [0; 1])).await;
    not_yet("the end at the client", ended.read(&mut [0; 1])).await;
    link.release_streams();
    soon("bytes", written_app.read_exact(&mut [0; 5])).await.unwrap();
    assert_eq!(soon("the end in the guest", dropped_app.read(&mut [0; 1])).await.unwrap(), 0);
    let mut words = String::new();
    soon("the end at the client", ended.read_to_string(&mut words)).await.unwrap();
    assert_eq!(words, "last words");
}

#[tokio::test]
async fn a_restored_guest_can_be_thrown_away_as_if_it_had_never_been() {
    let (link, mut machine) = booted(1000).await;
    let mut stream = link.open(port(ECHO), LIMIT).await.unwrap();
    link.quiesce(LIMIT).await.unwrap();
    link.detach();
    stream.write_all(b"once").await.unwrap();
    for lost in [false, true] {
        machine.attach_holding(&link, restored()).await.unwrap();
        let mut of_this_one = link.open(port(ECHO), LIMIT).await.unwrap();
        if lost {
            drop(machine.plug().await);
            soon("the loss", link.lost()).await;
        }
        assert!(link.park_again());
        assert!(soon("its reset", of_this_one.read(&mut [0; 1])).await.is_err());
        soon("parked_write", link.parked_write()).await;
    }
    machine.attach(&link, restored()).await.unwrap();
    let mut back = [0; 4];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"once");
    not_yet("it again", stream.read(&mut back)).await;
}

#[tokio::test]
async fn a_guest_that_went_on_is_not_thrown_away() {
    let (link, _machine) = booted(1000).await;
    assert!(!link.park_again());
    link.quiesce(LIMIT).await.unwrap();
    link.unquiesce(LIMIT).await.unwrap();
    assert!(!link.park_again(), "it is the guest that was always there");
}
