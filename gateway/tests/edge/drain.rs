//! How the gateway takes leave: what is under way is finished, what only idles is told and closed, and another process that
//! listens on the same socket goes on (case 47).

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt as _;
use gateway::Microvms;
use model::{MicrovmState, PortScope};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _, protocol::frame::coding::CloseCode};

use crate::{
    app::{App, read_header, scripted},
    rig::{H2, Rig, full, get, h2_request, until, within},
};

/// Longer than any test: what ends before it did not end by it.
const NEVER: Duration = Duration::from_secs(3600);

/// A gateway whose grace is longer than any test.
async fn patient() -> Rig {
    Rig::with(|config| config.grace = NEVER).await
}

/// Reads to the end; whether that was in order, with TLS's own end.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let ended = within("the close", stream.read_to_end(&mut bytes)).await;
    (bytes, ended.is_ok())
}

/// The frames of an HTTP/2 connection until its end: type, flags, payload.
async fn frames(stream: &mut (impl AsyncRead + Unpin)) -> (Vec<(u8, u8, Vec<u8>)>, bool) {
    let (bytes, in_order) = rest(stream).await;
    let (mut frames, mut left) = (Vec::new(), &bytes[..]);
    while let Some((header, after)) = left.split_at_checked(9) {
        let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        frames.push((header[3], header[4], after[..length].to_vec()));
        left = &after[length..];
    }
    (frames, in_order)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const GOAWAY: u8 = 7;
const NO_ERROR: &[u8] = &[0; 4];

/// Asserts that the last word was GOAWAY without an error.
fn assert_goaway(frames: &[(u8, u8, Vec<u8>)]) {
    let goaways: Vec<_> = frames.iter().filter(|(kind, ..)| *kind == GOAWAY).collect();
    assert!(!goaways.is_empty(), "{frames:?}");
    for (_, _, payload) in goaways {
        assert_eq!(&payload[4..8], NO_ERROR, "{frames:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_h2_connection_reads_goaway_when_its_time_is_over() {
    let rig = Rig::with(|config| config.keepalive = Duration::from_secs(1)).await;
    // This client never answers the ping that comes with it, and is closed all the same.
    let mut tls = rig.tls(&["h2"]).await;
    tls.write_all(PREFACE).await.unwrap();
    let (frames, in_order) = frames(&mut tls).await;
    assert_goaway(&frames);
    assert!(in_order, "the close came without the end of TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_tells_idle_connections_and_does_not_wait_for_them() {
    let mut rig = patient().await;
    let mut h2 = rig.tls(&["h2"]).await;
    h2.write_all(PREFACE).await.unwrap();
    // Never says anything; has had an answer; has begun no handshake.
    let mut new = rig.tls(&["http/1.1"]).await;
    let mut kept = rig.h1().await;
    assert_eq!(kept.send(get("x", "/", &[])).await.status, 403);
    let mut bare = TcpStream::connect(rig.address).await.unwrap();
    until("all to be counted", || rig.metric("edge_connections", &[]) == 4.0).await;

    rig.stop.cancel();
    within("the end", rig.served.take().unwrap()).await.unwrap();
    let (frames, in_order) = frames(&mut h2).await;
    assert_goaway(&frames);
    assert!(in_order, "HTTP/2: the close came without the end of TLS");
    assert_eq!(rest(&mut new).await, (Vec::new(), true), "HTTP/1.1: the close came without the end of TLS");
    assert_eq!(rest(&mut bare).await.0, b"");
    until("the kept one to be closed", || kept.0.is_closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_while_the_gateway_drains_is_served() {
    let mut rig = patient().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let auth = [("x-aws-proxy-auth", &*rig.token(&vm, PortScope::All))];
    // A drain that has something to wait for.
    let (mut busy, request) = (rig.h1().await, get(&vm.host, "/slow", &auth));
    let slow = tokio::spawn(async move { busy.send(request).await });
    let (mut new, mut kept, mut h2) = (rig.h1().await, rig.h1().await, rig.h2().await);
    assert_eq!(kept.send(get(&vm.host, "/", &auth)).await.status, 200);
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &auth, full(""))).await.status, 200);
    until("the requests to reach the app", || app.requests.load(Ordering::SeqCst) == 3).await;

    rig.stop.cancel();
    for h1 in [&mut new, &mut kept] {
        let answer = h1.send(get(&vm.host, "/", &auth)).await;
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    }
    // This one has read GOAWAY by now, or reads it before its answer.
    until("the h2 connection to be told", || !h2.0.is_ready()).await;
    app.go.notify_one();
    assert_eq!(slow.await.unwrap().text(), "at last");
    within("the end", rig.served.take().unwrap()).await.unwrap();
    let cuts = ["silent", "grace"].map(|cause| rig.metric("edge_drain_cuts_total", &[("cause", cause)]));
    assert_eq!(cuts, [0.0; 2], "nothing was cut");
}

/// One thread: nothing is accepted before the drain begins.
#[tokio::test]
async fn connections_that_only_the_kernel_has_taken_are_served() {
    let mut rig = patient().await;
    let connections: Vec<_> = (0..5).map(|_| std::net::TcpStream::connect(rig.address).unwrap()).collect();
    rig.stop.cancel();
    for tcp in connections {
        tcp.set_nonblocking(true).unwrap();
        let mut tls = rig.tls_over(TcpStream::from_std(tcp).unwrap(), "x.microvm.localhost", &["http/1.1"]).await;
        tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let (answer, in_order) = rest(&mut tls).await;
        assert!(answer.starts_with(b"HTTP/1.1 403 ") && in_order, "{}", String::from_utf8_lossy(&answer));
    }
    within("the end", rig.served.take().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_wake_is_finished() {
    let mut rig = patient().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let hold = rig.engine.hold_restores();
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let (mut h1, one, mut h2, two) =
        (rig.h1().await, get(&vm.host, "/", &auth), rig.h2().await, h2_request("GET", &vm.host, "/", &auth, full("")));
    let (one, two) = (tokio::spawn(async move { h1.send(one).await.status }), tokio::spawn(async move { h2.send(two).await.status }));
    within("the restore to begin", hold.arrived(1)).await;
    let open = |kind: &str| rig.metric("edge_open_streams", &[("kind", kind)]);
    until("both requests to be held", || (open("h1"), open("h2")) == (1.0, 1.0)).await;
    rig.stop.cancel();
    let mut served = rig.served.take().unwrap();
    // Longer than a moment, in which what only idles is closed.
    assert!(tokio::time::timeout(Duration::from_millis(2500), &mut served).await.is_err(), "it did not wait for them");
    hold.release();
    assert_eq!((one.await.unwrap(), two.await.unwrap()), (200, 200));
    within("the end", served).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_does_not_hold_a_drain_and_one_that_speaks_does() {
    let mut rig = patient().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let auth = [("x-aws-proxy-auth", &*rig.token(&vm, PortScope::All))];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    let events = [
        within("the answer", h1.0.send_request(get(&vm.host, "/events", &auth))).await.unwrap(),
        within("the answer", h2.0.send_request(h2_request("GET", &vm.host, "/events", &auth, full("")))).await.unwrap(),
    ];
    let busy = tokio::spawn({
        let (mut h2, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, "/slow", &auth, full("")));
        async move { h2.send(request).await }
    });
    until("all to reach the app", || app.requests.load(Ordering::SeqCst) == 3).await;
    rig.stop.cancel();
    let mut served = rig.served.take().unwrap();
    until("the silent stream that is alone to be cut", || rig.metric("edge_connections", &[]) == 1.0).await;
    // The other one shares its connection with a request.
    assert!(tokio::time::timeout(Duration::from_millis(2500), &mut served).await.is_err(), "a request was cut");
    assert_eq!((rig.metric("edge_draining", &[]), rig.observations("edge_drain_seconds", &[])), (1.0, 0));
    app.go.notify_waiters();
    assert_eq!(busy.await.unwrap().text(), "at last");
    within("the end", served).await.unwrap();
    drop(events);
    assert_eq!((rig.metric("edge_draining", &[]), rig.observations("edge_drain_seconds", &[])), (0.0, 1));
    // The second stream has ended by itself.
    let cuts = ["silent", "grace"].map(|cause| rig.metric("edge_drain_cuts_total", &[("cause", cause)]));
    assert_eq!(cuts, [1.0, 0.0]);
}

/// What a guest of the WebSocket tests does next.
enum Do {
    Say(&'static [u8]),
    ReadClose,
}

/// An app that answers the handshake and then does as it is told. Says what it has read.
async fn told() -> (std::net::SocketAddr, mpsc::UnboundedSender<Do>, mpsc::UnboundedReceiver<Vec<u8>>) {
    let (tell, told) = mpsc::unbounded_channel();
    let (say, said) = mpsc::unbounded_channel();
    let told = std::sync::Arc::new(tokio::sync::Mutex::new(told));
    let address = scripted(move |mut tcp| {
        let (told, say) = (told.clone(), say.clone());
        async move {
            let header = read_header(&mut tcp).await;
            let key = header.lines().find_map(|line| line.to_lowercase().starts_with("sec-websocket-key").then(|| line.split_once(": ").unwrap().1)).unwrap();
            let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.trim().as_bytes());
            let answer = format!("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n\r\n");
            tcp.write_all(answer.as_bytes()).await.unwrap();
            while let Some(next) = told.lock().await.recv().await {
                match next {
                    Do::Say(bytes) => tcp.write_all(bytes).await.unwrap(),
                    Do::ReadClose => {
                        // Header, mask, status.
                        let mut frame = vec![0; 8];
                        let _ = tcp.read_exact(&mut frame).await;
                        say.send(frame).unwrap();
                        return;
                    }
                }
            }
        }
    })
    .await;
    (address, tell, said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_reads_close_1001_between_two_frames_and_its_app_learns_of_it() {
    let mut rig = patient().await;
    let (address, tell, mut said) = told().await;
    let vm = rig.microvm(address).await;
    let mut request = format!("wss://{}/chat", vm.host).into_client_request().unwrap();
    request.headers_mut().insert("x-aws-proxy-auth", rig.token(&vm, PortScope::All).parse().unwrap());
    let (mut socket, _) = within("the handshake", tokio_tungstenite::client_async(request, rig.tls(&["http/1.1"]).await)).await.unwrap();

    // The drain comes in the middle of a frame.
    tell.send(Do::Say(b"\x81\x05hel")).unwrap();
    until("it to pass", || rig.metric("edge_bytes_total", &[("direction", "out")]) >= 5.0).await;
    rig.stop.cancel();
    assert!(tokio::time::timeout(Duration::from_millis(1500), socket.next()).await.is_err(), "something came in the middle of a frame");
    tell.send(Do::Say(b"lo")).unwrap();
    assert_eq!(within("the rest", socket.next()).await.unwrap().unwrap(), Message::text("hello"));
    tell.send(Do::ReadClose).unwrap();
    let Message::Close(Some(close)) = within("the close", socket.next()).await.unwrap().unwrap() else { panic!("no Close") };
    assert_eq!(close.code, CloseCode::Away);
    // tungstenite answers it by itself when it is polled again.
    assert!(within("the end", socket.next()).await.is_none_or(|last| last.is_err()));
    let frame = within("the app to read the client's Close", said.recv()).await.unwrap();
    let status: Vec<u8> = frame[6..].iter().zip(&frame[2..4]).map(|(byte, mask)| byte ^ mask).collect();
    assert_eq!((frame[0], frame[1], &status[..]), (0x88, 0x82, &1001_u16.to_be_bytes()[..]));
    within("the end", rig.served.take().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_of_a_sleeping_microvm_is_closed_without_a_wake() {
    let mut rig = patient().await;
    let (address, tell, _said) = told().await;
    let vm = rig.microvm(address).await;
    let mut request = format!("wss://{}/chat", vm.host).into_client_request().unwrap();
    request.headers_mut().insert("x-aws-proxy-auth", rig.token(&vm, PortScope::All).parse().unwrap());
    let (mut socket, _) = within("the handshake", tokio_tungstenite::client_async(request, rig.tls(&["http/1.1"]).await)).await.unwrap();
    tell.send(Do::Say(b"\x81\x02hi")).unwrap();
    assert_eq!(within("a message", socket.next()).await.unwrap().unwrap(), Message::text("hi"));
    rig.suspend(&vm).await;
    rig.stop.cancel();
    let Message::Close(Some(close)) = within("the close", socket.next()).await.unwrap().unwrap() else { panic!("no Close") };
    assert_eq!(close.code, CloseCode::Away);
    assert!(within("the end", socket.next()).await.is_none_or(|last| last.is_err()));
    within("the end", rig.served.take().unwrap()).await.unwrap();
    assert_eq!((vm.state(), rig.engine.counts().restores), (MicrovmState::Suspended, 0));
}

/// What a new process does while the old one drains: takes connections at once, and holds their requests.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_its_microvms_holds_requests_and_serves_them_when_they_are_there() {
    let mut rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let auth = [("x-aws-proxy-auth", &*rig.token(&vm, PortScope::All))];
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    rig.move_to(listener.try_clone().unwrap(), rig.controller.clone());
    let (mut before, mut old, stop_old) = (rig.h1().await, rig.served.take().unwrap(), rig.stop.clone());
    assert_eq!(before.send(get(&vm.host, "/", &auth)).await.status, 200);

    let microvms = Microvms::awaited();
    rig.move_to(listener, microvms.clone());
    stop_old.cancel();
    within("the end of the old one", &mut old).await.unwrap();
    let (mut h1, one, mut h2, two) =
        (rig.h1().await, get(&vm.host, "/", &auth), rig.h2().await, h2_request("POST", &vm.host, "/", &auth, full("body")));
    let (one, two) = (tokio::spawn(async move { h1.send(one).await }), tokio::spawn(async move { h2.send(two).await }));
    let mut leaves = rig.h1().await;
    let left = tokio::spawn({
        let request = get(&vm.host, "/", &auth);
        async move { leaves.0.send_request(request).await.is_ok() }
    });
    let open = |kind: &str| rig.metric("edge_open_streams", &[("kind", kind)]);
    until("all requests to be held", || (open("h1"), open("h2")) == (2.0, 1.0)).await;
    left.abort();
    until("the place of one that left to be free", || open("h1") == 1.0).await;
    microvms.arrive(rig.controller.clone());
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    assert_eq!((one.status, two.status), (200, 200));
    assert!(two.text().ends_with("body"));
}
