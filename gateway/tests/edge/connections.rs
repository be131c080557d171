//! Connections themselves: handshakes, limits, slow clients, keepalive, drain, and a new certificate (cases 23, 34, 37, 47).

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use model::PortScope;
use rustls::HandshakeKind;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::App,
    rig::{H2, Rig, full, get, h2_request, until, within},
};

#[tokio::test(flavor = "multi_thread")]
async fn case_23_what_is_negotiated() {
    let rig = Rig::new().await;
    for (offered, chosen) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1", "h2"], Some(b"h2")),
        (&["h2"], Some(b"h2")),
        (&["http/1.1"], Some(b"http/1.1")),
        (&[], None),
    ] {
        let tls = rig.tls(offered).await;
        assert_eq!(tls.get_ref().1.alpn_protocol(), chosen, "{offered:?}");
    }
    // Without any: HTTP/1.1.
    let mut tls = rig.tls(&[]).await;
    tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut start = [0; 12];
    within("the answer", tls.read_exact(&mut start)).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 403");
    // A name that is none of ours, and none at all (an address is not sent as one): the Host decides.
    for name in ["unknown.example", "127.0.0.1"] {
        let mut tls = rig.tls_as(name, &["http/1.1"]).await;
        tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        within("the answer", tls.read_exact(&mut start)).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 403", "{name}");
    }
    // Nothing in common: a clean alert.
    let refused = rig.try_tls("anything.microvm.localhost", &["spdy/3"]).await.unwrap_err();
    assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
}

/// A client of OpenSSL that reads in one thread and writes in another may break if it is sent them earlier.
#[tokio::test(flavor = "multi_thread")]
async fn session_tickets_come_with_the_first_answer_and_are_good() {
    let header_deadline = Duration::from_millis(300);
    let rig = Rig::with(|config| config.header_deadline = header_deadline).await;
    for protocol in ["http/1.1", "h2"] {
        let client = rig.tls_client(&[protocol]);
        let connect = async || {
            let tcp = TcpStream::connect(rig.address).await.unwrap();
            within("the TLS handshake", client.connect("anything.microvm.localhost".try_into().unwrap(), tcp)).await.unwrap()
        };
        let begun = Instant::now();
        let silent = connect().await;
        within("the end of a connection on which nothing is asked", silent.get_ref().0.readable()).await.unwrap();
        if protocol == "http/1.1" {
            assert!(begun.elapsed() >= header_deadline, "something was sent after {:?}", begun.elapsed());
        }
        let mut first = connect().await;
        assert_eq!(first.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        let request: &[u8] = if protocol == "h2" { b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0" } else { b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" };
        first.write_all(request).await.unwrap();
        assert!(within("the answer", first.read(&mut [0; 4096])).await.unwrap() > 0);
        let mut second = connect().await;
        assert_eq!(second.get_ref().1.handshake_kind(), Some(HandshakeKind::Resumed), "{protocol}");
        second.write_all(request).await.unwrap();
        assert!(within("the answer", second.read(&mut [0; 4096])).await.unwrap() > 0);
    }
}

/// Returns when the gateway has closed the connection.
async fn closed(stream: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let mut waste = [0; 1024];
    within("the close", async { while stream.read(&mut waste).await.is_ok_and(|read| read > 0) {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_34_slow_clients_are_closed() {
    let rig = Rig::with(|config| {
        config.handshake_deadline = Duration::from_millis(200);
        config.header_deadline = Duration::from_millis(300);
        config.keepalive = Duration::from_secs(1);
    })
    .await;
    // No ClientHello.
    closed(&mut TcpStream::connect(rig.address).await.unwrap()).await;
    assert_eq!(rig.metric("edge_tls_handshake_failures_total", &[]), 1.0);
    // Silence after the handshake.
    closed(&mut rig.tls(&["http/1.1"]).await).await;
    // A header that never ends, although something comes all the time; the first one and a second one.
    for before in [&b""[..], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        tls.write_all(before).await.unwrap();
        if !before.is_empty() {
            let mut answer = vec![0; 4096];
            assert!(within("the answer", tls.read(&mut answer)).await.unwrap() > 0);
        }
        let (mut read, mut write) = tokio::io::split(tls);
        let drip = async {
            loop {
                let _ = write.write_all(b"a").await;
                let _ = write.flush().await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = closed(&mut read) => {}
            () = drip => {}
        }
    }
    // Idle between two requests, and an idle HTTP/2 connection.
    let mut tls = rig.tls(&["http/1.1"]).await;
    tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    closed(&mut tls).await;
    let h2 = rig.h2().await;
    let idle = h2.0.clone();
    until("the idle h2 connection to be closed", || idle.is_closed()).await;
    until("every connection to be gone", || rig.metric("edge_connections", &[]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_connection_has_the_whole_header_deadline_again() {
    let rig = Rig::with(|config| config.header_deadline = Duration::from_millis(500)).await;
    let mut tls = rig.tls(&["http/1.1"]).await;
    let begun = tokio::time::Instant::now();
    // Longer in all than one deadline.
    while begun.elapsed() < Duration::from_millis(1500) {
        tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n").await.unwrap();
        tls.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        tls.write_all(b"\r\n").await.unwrap();
        let mut answer = vec![0; 4096];
        let length = within("the answer", tls.read(&mut answer)).await.unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 403 "));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_runs_and_takes_no_longer() {
    let mut rig = Rig::with(|config| config.grace = Duration::from_secs(60)).await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let (h2, mut busy, mut idle) = (rig.h2().await, rig.h1().await, rig.h1().await);
    assert_eq!(idle.send(get(&vm.host, "/", &auth)).await.status, 200);
    let two = tokio::spawn({
        let (mut h2, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, "/slow", &auth, full("")));
        async move { h2.send(request).await }
    });
    let one = tokio::spawn({
        let request = get(&vm.host, "/slow", &auth);
        async move { busy.send(request).await }
    });
    until("both requests to reach the app", || app.requests.load(Ordering::SeqCst) == 3).await;

    rig.stop.cancel();
    until("the idle connection to be closed", || idle.0.is_closed()).await;
    until("nothing new to be taken", || std::net::TcpStream::connect_timeout(&rig.address, Duration::from_millis(200)).is_err()).await;
    let mut served = rig.served.take().unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut served).await.is_err(), "it did not wait for what runs");
    app.go.notify_one();
    app.go.notify_one();
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    assert_eq!((one.text(), two.text()), ("at last", "at last"));
    assert_eq!(one.header("connection"), Some("close"));
    drop(h2);
    within("the end", served).await.unwrap();
    assert_eq!(rig.metric("edge_upstream_streams", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_to_new_connections() {
    let rig = Rig::new().await;
    let mut old = rig.h1().await;
    let certificate = async |rig: &Rig| rig.tls(&["h2"]).await.get_ref().1.peer_certificates().unwrap()[0].clone();
    let before = certificate(&rig).await;
    rig.renew_certificate();
    assert_ne!(certificate(&rig).await, before);
    assert_eq!(old.send(get("x", "/", &[])).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_with_its_grace() {
    let mut rig = Rig::with(|config| config.grace = Duration::from_millis(300)).await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let mut h1 = rig.h1().await;
    let request = get(&vm.host, "/slow", &[("x-aws-proxy-auth", &token)]);
    let cut = tokio::spawn(async move { h1.0.send_request(request).await.is_err() });
    until("the request to reach the app", || app.requests.load(Ordering::SeqCst) == 1).await;
    rig.stop.cancel();
    within("the end", rig.served.take().unwrap()).await.unwrap();
    assert!(within("the cut", cut).await.unwrap());
    assert_eq!(rig.metric("edge_drain_cuts_total", &[("cause", "grace")]), 1.0);
    until("the app to notice", || app.dropped.load(Ordering::SeqCst) == 1).await;
}
