//! Every limit gone over: what the client reads, and that its neighbour does not feel it. The limits of header and body
//! sizes and of the first byte are in `hostile` and `forwarding`, that of the hold in `lifecycle`, that of the TLS handshake
//! in `connections`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use config::EdgeLimits;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use model::{MicrovmState, PortScope};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
};

use crate::{
    app::{App, canned, read_header, scripted},
    rig::{Answer, Body, H2, Microvm, Rig, full, get, h2_request, request, until, within},
};

/// Another client than the tests', which come from 127.0.0.1.
const NEIGHBOUR: &str = "127.0.0.2";

async fn rig(change: impl FnOnce(&mut EdgeLimits)) -> (Rig, App, Microvm, String) {
    let rig = Rig::with(change).await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    (rig, app, vm, token)
}

fn auth(token: &str) -> [(&str, &str); 1] {
    [("x-aws-proxy-auth", token)]
}

/// Everything until the gateway closes.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    within("the close", async {
        let mut piece = vec![0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut piece).await {
            all.extend_from_slice(&piece[..read]);
        }
    })
    .await;
    all
}

/// A body that is sent piece by piece, and ends when the sender is dropped.
fn body_by_hand() -> (mpsc::Sender<Bytes>, Body) {
    let (send, receive) = mpsc::channel::<Bytes>(1);
    let frames = futures::stream::unfold(receive, |mut receive| async move { Some((Ok(Frame::data(receive.recv().await?)), receive)) });
    (send, BodyExt::boxed(StreamBody::new(frames)))
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_replaced_while_it_runs() {
    let rig = Rig::with(|limits| limits.max_connections = 1).await;
    let mut first = rig.h1().await;
    let many = [("a", "1"); 20];
    assert_eq!(first.send(get("x", "/", &many)).await.status, 403);
    assert_eq!(rig.h1().await.send(get("x", "/", &[])).await.status, 503);

    let mut limits = config::Config::defaults().edge.limits;
    limits.max_header_fields = 16;
    rig.limits.replace(limits);
    // On a connection that is open, and for one more than there was a place for.
    let answer = first.send(get("x", "/", &many)).await;
    assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
    assert_eq!(rig.h1().await.send(get("x", "/", &[])).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_more_than_its_address_may_have_is_told_so() {
    let (rig, _app, vm, token) = rig(|limits| limits.max_connections_per_address = 2).await;
    let (mut first, second) = (rig.h1().await, rig.h2().await);
    until("both to be counted", || rig.metric("edge_connections", &[]) == 2.0).await;

    let answer = rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await;
    assert_eq!((answer.status, answer.reason(), answer.text()), (503, "too-many-connections", ""));
    assert_eq!((answer.header("retry-after"), answer.header("connection")), (Some("1"), Some("close")));
    // Over HTTP/2 the connection is told, before any stream: GOAWAY with stream 0, ENHANCE_YOUR_CALM and the reason.
    let mut tls = rig.tls(&["h2"]).await;
    let mut expected = vec![0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 28, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xb];
    expected.extend_from_slice(b"too-many-connections");
    assert_eq!(rest(&mut tls).await, expected);
    let (mut h2, connection) = h2::client::handshake(rig.tls(&["h2"]).await).await.unwrap();
    let ended = tokio::spawn(connection);
    let _ = h2.send_request(http::Request::get(format!("https://{}/", vm.host)).body(()).unwrap(), true);
    let error = within("the end", ended).await.unwrap().unwrap_err();
    assert_eq!((error.is_go_away(), error.reason()), (true, Some(h2::Reason::ENHANCE_YOUR_CALM)));

    // Neither the others of that address nor other addresses feel it, and a place that is freed is given again.
    assert_eq!(first.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    assert_eq!(rig.h1_from(NEIGHBOUR).await.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    assert_eq!(rig.metric("edge_connections_refused_total", &[]), 3.0);
    assert_eq!(rig.metric("edge_refusals_total", &[("reason", "too-many-connections")]), 3.0);
    drop(second);
    until("one to be gone", || rig.metric("edge_connections", &[]) < 2.0).await;
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_more_than_there_is_place_for_is_told_so() {
    let (rig, _app, vm, token) = rig(|limits| limits.max_connections = 1).await;
    let mut first = rig.h1().await;
    until("it to be counted", || rig.metric("edge_connections", &[]) == 1.0).await;
    for source in ["127.0.0.1", NEIGHBOUR] {
        let answer = rig.h1_from(source).await.send(get(&vm.host, "/", &auth(&token))).await;
        assert_eq!((answer.status, answer.reason()), (503, "too-many-connections"), "{source}");
    }
    // However many there are and whatever they do, who has a place is served, and the next place goes to a newcomer.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(rig.address).await.unwrap());
    }
    assert_eq!(first.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    drop((first, crowd));
    // Those of the crowd who gave up in the backlog have the place for a moment each.
    let served = async { while rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await.status != 200 {} };
    within("a newcomer to be served", served).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_does_not_end_in_time_is_told_so() {
    let (rig, app, vm, token) = rig(|limits| limits.header_deadline = Duration::from_millis(300)).await;
    let mut neighbour = rig.h1_from(NEIGHBOUR).await;
    assert_eq!(neighbour.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    let served = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    for before in ["", served] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        if !before.is_empty() {
            tls.write_all(before.as_bytes()).await.unwrap();
            assert!(within("the answer", tls.read(&mut vec![0; 4096])).await.unwrap() > 0);
        }
        tls.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n").await.unwrap();
        let answer = String::from_utf8(rest(&mut tls).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{answer}");
        assert!(answer.contains("\r\nx-dormouse-reason: header-timeout\r\n") && answer.contains("\r\nconnection: close\r\n"), "{answer}");
    }
    // Of whom nothing has come reads nothing, lest it take that for the answer to what it is about to ask.
    assert_eq!(rest(&mut rig.tls(&["http/1.1"]).await).await, b"");
    assert_eq!(neighbour.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    assert_eq!(app.requests.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_h2_that_does_not_begin_is_cut() {
    let (rig, _app, vm, token) = rig(|limits| limits.header_deadline = Duration::from_millis(300)).await;
    let mut neighbour = rig.h2().await;
    for begun in [&b""[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n"] {
        let mut tls = rig.tls(&["h2"]).await;
        tls.write_all(begun).await.unwrap();
        rest(&mut tls).await;
    }
    until("both to be gone", || rig.metric("edge_connections", &[]) == 1.0).await;
    // Longer open than that deadline, and none of its business.
    assert_eq!(neighbour.send(h2_request("GET", &vm.host, "/", &auth(&token), full(""))).await.status, 200);
}

/// A guest that takes a request's header, then nothing until it is told to, and answers with the length of the body.
async fn reluctant(go: Arc<Semaphore>, asked: Arc<AtomicUsize>, length: usize) -> SocketAddr {
    scripted(move |mut tcp| {
        let (go, asked) = (go.clone(), asked.clone());
        async move {
            read_header(&mut tcp).await;
            asked.fetch_add(1, Ordering::SeqCst);
            go.acquire().await.unwrap().forget();
            let mut left = length;
            let mut piece = vec![0; 65_536];
            while left > 0 {
                match tcp.read(&mut piece[..left.min(65_536)]).await {
                    Ok(read @ 1..) => left -= read,
                    _ => return,
                }
            }
            let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_stops_is_told_so() {
    let (rig, app, vm, token) = rig(|limits| limits.body_deadline = Duration::from_millis(400)).await;
    // HTTP/1.1.
    let mut tls = rig.tls(&["http/1.1"]).await;
    tls.write_all(format!("POST /length HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\ncontent-length: 10\r\n\r\nhello", vm.host).as_bytes()).await.unwrap();
    let answer = String::from_utf8(rest(&mut tls).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.to_lowercase().contains("\r\nx-dormouse-reason: body-timeout\r\n"), "{answer}");
    // HTTP/2, whose other streams go on.
    let mut h2 = rig.h2().await;
    let neighbour = tokio::spawn({
        let (mut h2, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, "/slow", &auth(&token), full("")));
        async move { h2.send(request).await }
    });
    let (send, body) = body_by_hand();
    send.send(Bytes::from_static(b"hello")).await.unwrap();
    let answer = h2.send(h2_request("POST", &vm.host, "/length", &auth(&token), body)).await;
    assert_eq!((answer.status, answer.reason()), (408, "body-timeout"));
    app.go.notify_one();
    assert_eq!(neighbour.await.unwrap().text(), "at last");
    // One that goes on slowly, for longer than the deadline in all.
    let (send, body) = body_by_hand();
    let answer = tokio::spawn({
        let (mut h2, request) = (H2(h2.0.clone()), h2_request("POST", &vm.host, "/length", &auth(&token), body));
        async move { h2.send(request).await }
    });
    for _ in 0..10 {
        send.send(Bytes::from_static(b"x")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(send);
    assert_eq!(answer.await.unwrap().text(), "Ok(10)");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_its_guest_does_not_take_is_not_the_clients_fault() {
    // Long enough for a client that waits for its turn on a busy machine: once the guest takes its body, it has to go on in time.
    let rig = Rig::with(|limits| limits.body_deadline = Duration::from_secs(2)).await;
    let (go, asked) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let length = 16 << 20;
    let vm = rig.microvm(reluctant(go.clone(), asked.clone(), length).await).await;
    let token = rig.token(&vm, PortScope::All);
    let answers = [1, 2].map(|version| {
        let body = full(vec![7; length]);
        let (one, two) = (request("POST", &vm.host, "/", &auth(&token), body), h2_request("POST", &vm.host, "/", &auth(&token), full(vec![7; length])));
        let rig = &rig;
        async move { if version == 1 { rig.h1().await.send(one).await } else { rig.h2().await.send(two).await } }
    });
    let released = async {
        until("both requests to reach the guest", || asked.load(Ordering::SeqCst) == 2).await;
        // Two deadlines, in which nothing can be sent.
        tokio::time::sleep(Duration::from_secs(4)).await;
        go.add_permits(2);
    };
    let [one, two] = answers;
    let (one, two, ()) = tokio::join!(one, two, released);
    assert_eq!((one.text(), two.text()), ("ok", "ok"));
}

/// A guest that sends without end; counts those of its connections that are broken.
async fn talkative(head: &'static str, broken: Arc<AtomicUsize>) -> SocketAddr {
    scripted(move |mut tcp| {
        let broken = broken.clone();
        async move {
            let key = read_header(&mut tcp).await;
            let accept = key.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ").or_else(|| line.strip_prefix("Sec-WebSocket-Key: ")));
            let head = match accept {
                Some(key) => head.replace("{}", &tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.trim().as_bytes())),
                None => head.to_owned(),
            };
            let _ = tcp.write_all(head.as_bytes()).await;
            // Frames of 16 KiB, in case it is a WebSocket.
            let mut frame = vec![0x82, 126, 0x40, 0];
            frame.resize(4 + 16_384, 0);
            while tcp.write_all(&frame).await.is_ok() {}
            broken.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_cut() {
    let rig = Rig::with(|limits| limits.write_deadline = Duration::from_millis(500)).await;
    let plain = "HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
    let socket = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {}\r\n\r\n";
    let handshake = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let (app, address) = App::start().await;
    let other = rig.microvm(address).await;
    let other_token = rig.token(&other, PortScope::All);
    for (head, fields, status) in [(plain, "", "200"), (socket, handshake, "101")] {
        let broken = Arc::new(AtomicUsize::new(0));
        let vm = rig.microvm(talkative(head, broken.clone()).await).await;
        let token = rig.token(&vm, PortScope::All);
        let mut tls = rig.tls(&["http/1.1"]).await;
        tls.write_all(format!("GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n{fields}\r\n", vm.host).as_bytes()).await.unwrap();
        let mut begin = [0; 12];
        tls.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin[9..], status.as_bytes());
        until("the guest to be let go", || broken.load(Ordering::SeqCst) == 1).await;
        until("the connection to be gone", || rig.metric("edge_connections", &[]) == 0.0).await;
    }
    // HTTP/2: a stream whose window stays shut is reset, its neighbour goes on; a connection that is not read is cut.
    rig.engine.listen(model::Port::DEFAULT, address);
    let broken = Arc::new(AtomicUsize::new(0));
    let vm = rig.microvm(talkative(plain, broken.clone()).await).await;
    let token = rig.token(&vm, PortScope::All);
    let mut h2 = rig.h2().await;
    let unread = within("the begin", h2.0.send_request(h2_request("GET", &vm.host, "/", &auth(&token), full("")))).await.unwrap();
    until("the guest to be let go", || broken.load(Ordering::SeqCst) == 1).await;
    rig.engine.listen(model::Port::DEFAULT, address);
    assert_eq!(h2.send(h2_request("GET", &other.host, "/", &auth(&other_token), full(""))).await.status, 200);
    assert!(within("the reset", unread.into_body().collect()).await.is_err());
    assert_eq!(app.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_h2_connection_that_is_not_read_is_cut() {
    let rig = Rig::with(|limits| limits.write_deadline = Duration::from_millis(500)).await;
    let broken = Arc::new(AtomicUsize::new(0));
    let vm = rig.microvm(talkative("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n", broken.clone()).await).await;
    let token = rig.token(&vm, PortScope::All);
    // Windows that never shut, so that only the socket is in the way.
    let (mut h2, connection) = h2::client::Builder::new()
        .initial_window_size((1 << 31) - 1)
        .initial_connection_window_size((1 << 31) - 1)
        .handshake::<_, Bytes>(rig.tls(&["h2"]).await)
        .await
        .unwrap();
    let request = http::Request::get(format!("https://{}/", vm.host)).header("x-aws-proxy-auth", &token).body(()).unwrap();
    let (answer, _) = h2.send_request(request, true).unwrap();
    // Only driven until the answer has begun, and not closed.
    tokio::pin!(connection);
    tokio::select! {
        _ = &mut connection => panic!("it ended"),
        answer = answer => assert_eq!(answer.unwrap().status(), 200),
    }
    until("the connection to be gone", || rig.metric("edge_connections", &[]) == 0.0).await;
    until("the guest to be let go", || broken.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_even_take_a_header_is_cut() {
    let rig = Rig::with(|limits| (limits.write_deadline, limits.max_answer_header_bytes) = (Duration::from_millis(500), 1 << 20)).await;
    // Ten of them are more than the sockets hold; pingora writes headers without a deadline.
    let answer = format!("HTTP/1.1 200 OK\r\na: {}\r\ncontent-length: 0\r\n\r\n", "x".repeat(900_000));
    let vm = rig.microvm(canned(answer).await).await;
    let token = rig.token(&vm, PortScope::All);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut tls = rig.tls_over(socket.connect(rig.address).await.unwrap(), "anything.microvm.localhost", &["http/1.1"]).await;
    tls.write_all(format!("GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host).repeat(10).as_bytes()).await.unwrap();
    let mut begin = [0; 12];
    within("the begin", tls.read_exact(&mut begin)).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    until("the connection to be gone", || rig.metric("edge_connections", &[]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_client_in_the_middle_of_a_large_upload() {
    let (rig, app, vm, token) = rig(|limits| limits.max_body_bytes = Some(1 << 20)).await;
    // Refused by what it states, by what comes, and for want of a token; the client looks up only when all is sent.
    let chunk = format!("100000\r\n{}\r\n", "x".repeat(1 << 20));
    for (fields, body, pieces, status) in [
        (format!("x-aws-proxy-auth: {token}\r\ncontent-length: {}\r\n", 32 << 20), "x".repeat(1 << 20), 32, "413"),
        (format!("x-aws-proxy-auth: {token}\r\ntransfer-encoding: chunked\r\n"), chunk, 32, "413"),
        (format!("content-length: {}\r\n", 32 << 20), "x".repeat(1 << 20), 32, "403"),
    ] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        tls.write_all(format!("POST /length HTTP/1.1\r\nhost: {}\r\n{fields}\r\n", vm.host).as_bytes()).await.unwrap();
        for _ in 0..pieces {
            within("the upload", tls.write_all(body.as_bytes())).await.unwrap();
        }
        let answer = String::from_utf8(rest(&mut tls).await).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{fields}: {answer}");
    }
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    let _ = app;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_those_that_may_wait_are_told_so() {
    let (rig, app, vm, token) = rig(|_| {}).await;
    let other = rig.run(None).await;
    let other_token = rig.token(&other, PortScope::All);
    rig.suspend(&vm).await;
    let hold = rig.engine.hold_restores();
    let h2 = rig.h2().await;
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let (mut h2, request) = (H2(h2.0.clone()), h2_request("GET", &vm.host, "/", &auth(&token), full("")));
            tokio::spawn(async move { h2.send(request).await.status })
        })
        .collect();
    until("all to wait", || rig.metric("idle_requests_waiting", &[]) == 100.0).await;
    within("the restore to begin", hold.arrived(1)).await;
    // The places are the rig's: 100.
    let answer = rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await;
    assert_eq!((answer.status, answer.reason(), answer.header("retry-after")), (503, "too-many-waiting", Some("1")));
    assert_eq!(rig.h1().await.send(get(&other.host, "/", &auth(&other_token))).await.status, 200);
    hold.release();
    for status in waiting {
        assert_eq!(status.await.unwrap(), 200);
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), 101);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_wakes_is_bounded_in_all_and_for_each_microvm() {
    // Each request may hold 100 KiB of body: two of them fit one microvm, three fit in all.
    let (rig, app, first, token) = rig(|limits| (limits.max_held_bytes_per_microvm, limits.max_held_bytes) = (250 << 10, 400 << 10)).await;
    let policy = Some(model::IdlePolicy { max_idle: Duration::from_secs(600), suspended: Duration::from_secs(600), auto_resume: true });
    let (second, third) = (rig.run(policy).await, rig.run(policy).await);
    let [second_token, third_token] = [&second, &third].map(|vm| rig.token(vm, PortScope::All));
    rig.suspend(&first).await;
    rig.suspend(&second).await;
    let hold = rig.engine.hold_restores();
    let body = || full(vec![b'x'; 100 << 10]);
    let mut waiting = Vec::new();
    let mut wait = async |vm: &Microvm, token: &str| {
        let (mut h2, request) = (rig.h2().await, h2_request("POST", &vm.host, "/length", &auth(token), body()));
        waiting.push(tokio::spawn(async move { h2.send(request).await }));
        until("it to wait", || rig.metric("idle_requests_waiting", &[]) == waiting.len() as f64).await;
    };
    wait(&first, &token).await;
    wait(&first, &token).await;
    within("the restore to begin", hold.arrived(1)).await;
    let refused = |answer: Answer| assert_eq!((answer.status, answer.reason(), answer.header("retry-after")), (503, "too-many-held-bytes", Some("1")));
    refused(rig.h2().await.send(h2_request("POST", &first.host, "/length", &auth(&token), body())).await);
    // A neighbour has room of its own, up to what all may have; who is awake needs none.
    wait(&second, &second_token).await;
    within("the second restore to begin", hold.arrived(2)).await;
    refused(rig.h2().await.send(h2_request("POST", &second.host, "/length", &auth(&second_token), body())).await);
    assert_eq!(rig.h2().await.send(h2_request("POST", &third.host, "/length", &auth(&third_token), body())).await.text(), "Ok(102400)");
    hold.release();
    for answer in waiting {
        assert_eq!(answer.await.unwrap().text(), "Ok(102400)");
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), 4);
    // All room is free again.
    rig.suspend(&first).await;
    assert_eq!(rig.h2().await.send(h2_request("POST", &first.host, "/length", &auth(&token), body())).await.text(), "Ok(102400)");
    assert_eq!(first.state(), MicrovmState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_tokens_a_second() {
    let (rig, app, vm, token) = rig(|limits| limits.max_tokens_per_second = Some(5)).await;
    let forged = format!("{}AAAA", &token[..token.len() - 4]);
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    let mut refused = None;
    for _ in 0..200 {
        let answer = h1.send(get(&vm.host, "/", &auth(&forged))).await;
        if answer.status != 403 {
            refused = Some(answer);
            break;
        }
    }
    let answer = refused.expect("two hundred tokens in forty seconds' share of them");
    assert_eq!((answer.status, answer.reason(), answer.header("retry-after")), (429, "too-many-tokens", Some("1")));
    // Requests without a token cost none, and read what they always read.
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &[], full(""))).await.reason(), "token-missing");
    assert_eq!(rig.h1_from(NEIGHBOUR).await.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
    // The address comes back with time.
    within("its share", async { while h2.send(h2_request("GET", &vm.host, "/", &auth(&token), full(""))).await.status != 200 {} }).await;
    assert_eq!(app.requests.load(Ordering::SeqCst), 2);
}

/// A field of HPACK that is not indexed (RFC 7541 §6.2.2).
fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        let mut length = text.len();
        if length < 127 {
            field.push(length as u8);
        } else {
            field.push(127);
            length -= 127;
            while length >= 128 {
                field.push((length % 128) as u8 | 128);
                length /= 128;
            }
            field.push(length as u8);
        }
        field.extend_from_slice(text.as_bytes());
    }
    field
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_beyond_the_limit_are_refused_one_by_one() {
    let (rig, app, vm, token) = rig(|_| {}).await;
    let mut tls = rig.tls(&["h2"]).await;
    // A client that does not heed our settings: 100 streams that wait, and three more.
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    let header: Vec<u8> =
        [(":method", "GET"), (":scheme", "https"), (":path", "/slow"), (":authority", vm.host.as_str()), ("x-aws-proxy-auth", &token)]
            .iter()
            .flat_map(|(name, value)| literal(name, value))
            .collect();
    for number in 0..103 {
        bytes.extend(frame(1, 5, 2 * number + 1, &header));
    }
    tls.write_all(&bytes).await.unwrap();
    // RST_STREAM with REFUSED_STREAM for each of the three, and no GOAWAY.
    let mut refused = Vec::new();
    while refused.len() < 3 {
        let mut head = [0; 9];
        within("a frame", tls.read_exact(&mut head)).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        within("its payload", tls.read_exact(&mut payload)).await.unwrap();
        assert_ne!(head[3], 7, "GOAWAY {payload:?}");
        if head[3] == 3 {
            assert_eq!(payload, [0, 0, 0, 7]);
            refused.push(u32::from_be_bytes(head[5..].try_into().unwrap()));
        }
    }
    assert_eq!(refused, [201, 203, 205]);
    until("the refusals to be counted", || rig.metric("edge_refusals_total", &[("reason", "too-many-streams")]) == 3.0).await;
    until("the others to reach the app", || app.requests.load(Ordering::SeqCst) == 100).await;
    assert_eq!(rig.h2().await.send(h2_request("GET", &vm.host, "/", &auth(&token), full(""))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_layer_of_h2_refuses_is_counted_and_logged() {
    let (rig, _app, vm, token) = rig(|_| {}).await;
    let header: Vec<u8> =
        [(":method", "GET"), (":scheme", "https"), (":path", "/slow"), (":authority", vm.host.as_str()), ("x-aws-proxy-auth", &token)]
            .iter()
            .flat_map(|(name, value)| literal(name, value))
            .collect();
    let bad_length = [header.clone(), literal("content-length", "1x")].concat();
    let resets: Vec<u8> = (0..300).flat_map(|number| [frame(1, 5, 2 * number + 1, &header), frame(3, 0, 2 * number + 1, &[0, 0, 0, 8])].concat()).collect();
    for (what, bytes, word) in [
        ("data of no stream", frame(0, 0, 0, b"x"), "h2-violation"),
        ("a length that is none", frame(1, 5, 1, &bad_length), "h2-violation"),
        ("a header that cannot be unpacked", frame(1, 5, 1, &[0xff; 20]), "h2-violation"),
        ("a frame that is too large", frame(0, 0, 1, &[0; 20_000]), "h2-violation"),
        ("streams that are reset as soon as they are there", resets, "h2-flood"),
    ] {
        let count = || rig.metric("edge_refusals_total", &[("reason", word)]);
        let lines = || rig.log().iter().filter(|line| line["reason"] == word && line["status"].is_null() && line["protocol"] == "h2").count();
        let (counted, logged) = (count(), lines());
        let mut tls = rig.tls(&["h2"]).await;
        // Whoever is cut off in the middle of this was refused as well.
        let _ = tls.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &frame(4, 0, 0, &[])[..], &bytes].concat()).await;
        until(what, || count() > counted && lines() > logged).await;
    }
    let text = std::fs::read_to_string(&rig.access_log).unwrap();
    assert!(!text.contains(&token) && !text.contains("/slow"), "{text}");
    // What is only wrong with a request is answered.
    let answer = rig.h2().await.send(h2_request("GET", &vm.host, "/", &[("host", "a"), ("host", "b")], full(""))).await;
    assert_eq!((answer.status, answer.reason()), (400, "malformed-request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_of_h2_within_our_limits_is_never_refused_by_the_parser() {
    let (rig, _app, vm, token) = rig(|_| {}).await;
    let mut h2 = rig.h2().await;
    // 24 KiB in 90 fields: each counts 32 bytes more in HTTP/2's own measure (RFC 9113 §6.5.2).
    let value = "x".repeat(220);
    let fields: Vec<_> = auth(&token).into_iter().chain([("a", value.as_str()); 90]).collect();
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await.status, 200);
    let value = "x".repeat(405);
    let fields: Vec<_> = auth(&token).into_iter().chain([("a", value.as_str()); 60]).collect();
    let answer = h2.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
    assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_backlog_is_full_is_a_guest_timeout() {
    let (rig, _app, vm, token) = rig(|limits| limits.dial_deadline = Duration::from_millis(300)).await;
    // Nobody accepts, and the kernel takes no more.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let _full = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
    let port = model::Port::new(9000).unwrap();
    rig.engine.listen(port, address);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-port", "9000")];
    let answer = rig.h1().await.send(get(&vm.host, "/", &fields)).await;
    assert_eq!((answer.status, answer.reason(), answer.text()), (502, "guest-timeout", ""));
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth(&token))).await.status, 200);
}
