//! How a request is carried to an app of HTTP/1.1 and its answer back: what is held together and what is not, which connection
//! is used, and what becomes of bodies that cross each other.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http_body_util::BodyExt as _;
use model::PortScope;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::Semaphore,
};

use vmm_runtime::loopback::LoopbackEngine;

use crate::{
    app::{App, read_header, says_hello, scripted},
    eager::{Dials, EagerEngine},
    rig::{Microvm, Rig, full, get, h2_request, request, until, within},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_begins_when_its_app_begins_it() {
    let rig = Rig::new().await;
    let goes_on = Arc::new(Semaphore::new(0));
    let may = goes_on.clone();
    let address = scripted(move |mut tcp| {
        let may = may.clone();
        async move {
            read_header(&mut tcp).await;
            let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await;
            for half in [b"on", b"ce"] {
                may.acquire().await.unwrap().forget();
                let _ = tcp.write_all(half).await;
            }
        }
    })
    .await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    let first = async { within("the header over HTTP/1.1", h1.0.send_request(get(&vm.host, "/", &auth))).await.unwrap() };
    let second = async { within("the header over HTTP/2", h2.0.send_request(h2_request("GET", &vm.host, "/", &auth, full("")))).await.unwrap() };
    let (first, second) = (first.await, second.await);
    goes_on.add_permits(4);
    for response in [first, second] {
        assert_eq!(response.headers()["content-length"], "4");
        assert_eq!(within("the body", response.into_body().collect()).await.unwrap().to_bytes(), "once");
    }
}

/// An app that serves one connection at a time and keeps it, as simple servers do. How many requests and how many
/// connections it had.
async fn one_at_a_time() -> (std::net::SocketAddr, Arc<[AtomicUsize; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counted = counts.clone();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            if says_hello(&tcp).await {
                continue;
            }
            counted[1].fetch_add(1, Ordering::SeqCst);
            loop {
                let header = read_header(&mut tcp).await;
                if header.is_empty() {
                    break;
                }
                if header.contains("content-length: 4") {
                    tcp.read_exact(&mut [0; 4]).await.unwrap();
                }
                counted[0].fetch_add(1, Ordering::SeqCst);
                let length = if header.starts_with("HEAD") { "" } else { "ok" };
                tcp.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{length}").as_bytes()).await.unwrap();
            }
        }
    });
    (address, counts)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_serves_one_connection_at_a_time_is_not_kept_waiting_by_an_idle_one() {
    let rig = Rig::new().await;
    let (address, counts) = one_at_a_time().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let mut h1 = rig.h1().await;
    let absolute = format!("http://{}/x", vm.host);
    for (method, path, body) in [("GET", "/", ""), ("POST", "/", "body"), ("HEAD", "/", ""), ("OPTIONS", "*", ""), ("GET", absolute.as_str(), ""), ("PUT", "/", "body"), ("DELETE", "/", "")] {
        assert_eq!(h1.send(request(method, &vm.host, path, &auth, full(body))).await.status, 200, "{method} {path}");
    }
    // A client may be faster with its next request than the gateway with putting the connection away; then there is one more,
    // and the one before it is ended.
    assert_eq!(counts[0].load(Ordering::SeqCst), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_refuses_a_body_half_way_is_heard() {
    const SIZE: usize = 16 << 20;
    let rig = Rig::new().await;
    let address = scripted(|mut tcp| async move {
        read_header(&mut tcp).await;
        let _ = tcp.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno").await;
        let _ = tcp.shutdown().await;
        // Takes what comes until the gateway ends it: a reset would overtake the answer.
        while tcp.read(&mut [0; 65536]).await.is_ok_and(|read| read > 0) {}
    })
    .await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let body = vec![b'x'; SIZE];
    let answer = rig.h2().await.send(h2_request("POST", &vm.host, "/", &auth, full(body))).await;
    assert_eq!((answer.status, answer.text()), (413, "no"));
}

/// An app, and what closes its connection at its next use.
async fn hasty(certain: bool, late: u64) -> (Rig, App, Microvm, Arc<AtomicBool>) {
    let (app, address) = App::start().await;
    let engine = LoopbackEngine::new();
    let closes = Arc::new(AtomicBool::new(false));
    let rig = Rig::over(engine.clone(), Arc::new(EagerEngine(engine, Dials::Closing { closes: closes.clone(), certain, late })), |_| {}).await;
    let vm = rig.microvm(address).await;
    (rig, app, vm, closes)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_app_that_has_just_closed_did_not_see_is_said_to_it_again() {
    let (rig, app, vm, closes) = hasty(true, 0).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    let small = vec![b'x'; 30_000];
    let chunked = || {
        let pieces = [small[..10].to_vec(), small[10..].to_vec()].map(|piece| Ok(hyper::body::Frame::data(bytes::Bytes::from(piece))));
        http_body_util::BodyExt::boxed(http_body_util::StreamBody::new(futures::stream::iter(pieces)))
    };
    let mut sent = 0;
    for again in 1..=2 {
        for (method, path, body) in [("GET", "/", full("")), ("POST", "/length", full(small.clone())), ("POST", "/length", chunked())] {
            // One connection waits.
            assert_eq!(h1.send(get(&vm.host, "/", &auth)).await.status, 200);
            until("the connection to be put away", || rig.metric("edge_open_streams", &[("kind", "h1")]) == 0.0).await;
            closes.store(true, Ordering::SeqCst);
            let answer = match again {
                1 => h1.send(request(method, &vm.host, path, &auth, body)).await,
                _ => h2.send(h2_request(method, &vm.host, path, &auth, body)).await,
            };
            assert_eq!(answer.status, 200, "{method} {}", answer.reason());
            if method == "POST" {
                assert_eq!(answer.text(), "Ok(30000)");
            }
            sent += 2;
            assert_eq!(app.requests.load(Ordering::SeqCst), sent, "each came once");
            assert!(!closes.load(Ordering::SeqCst), "nothing crossed the close");
        }
    }
    assert_eq!(rig.metric("edge_retries_total", &[("cause", "untouched")]), 6.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_may_have_seen_or_is_not_at_hand_any_more_is_not() {
    for (certain, late, body) in [(false, 0, "x".to_owned()), (true, 100_000, "x".repeat(200_000))] {
        let (rig, app, vm, closes) = hasty(certain, late).await;
        let token = rig.token(&vm, PortScope::All);
        let auth = [("x-aws-proxy-auth", token.as_str())];
        assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth)).await.status, 200);
        until("the connection to be put away", || rig.metric("edge_open_streams", &[("kind", "h1")]) == 0.0).await;
        closes.store(true, Ordering::SeqCst);
        let answer = rig.h1().await.send(request("POST", &vm.host, "/", &auth, full(body))).await;
        assert!(!closes.load(Ordering::SeqCst), "nothing crossed the close");
        assert_eq!((answer.status, answer.reason()), (502, "guest-answer-broken"), "certain: {certain}");
        assert_eq!(app.requests.load(Ordering::SeqCst), 1, "certain: {certain}");
    }
}

/// More than all buffers on the way hold together.
const MUCH: usize = 32 << 20;

/// An app that says what it has to say to a header, and then neither reads nor closes. Has a permit for each header that it has read.
async fn takes_no_body(says: fn(&str) -> &'static str) -> (std::net::SocketAddr, Arc<Semaphore>) {
    let heard = Arc::new(Semaphore::new(0));
    let hears = heard.clone();
    let address = scripted(move |mut tcp| {
        let hears = hears.clone();
        async move {
            let header = read_header(&mut tcp).await;
            hears.add_permits(1);
            let _ = tcp.write_all(says(&header).as_bytes()).await;
            std::future::pending().await
        }
    })
    .await;
    (address, heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_answers_early_and_takes_no_more_is_heard() {
    let rig = Rig::new().await;
    let (address, heard) = takes_no_body(|header| match header.starts_with("GET") {
        true => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        false => "HTTP/1.1 413 Too Much\r\ncontent-length: 8\r\n\r\ntoo much",
    })
    .await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    for _ in 0..2 {
        let answer = rig.h1().await.send(request("POST", &vm.host, "/", &auth, full(vec![7; MUCH]))).await;
        assert_eq!((answer.status, answer.text()), (413, "too much"));
        let answer = rig.h2().await.send(h2_request("POST", &vm.host, "/", &auth, full(vec![7; MUCH]))).await;
        assert_eq!((answer.status, answer.text()), (413, "too much"));
    }
    until("the requests to be over, and not only answered", || rig.log().len() == 4).await;
    // What is left of such a body is no other request's.
    let before = heard.available_permits();
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth)).await.text(), "ok");
    assert_eq!(heard.available_permits(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_answers_while_it_reads_is_read_while_it_is_written_to() {
    let rig = Rig::new().await;
    let address = scripted(|mut tcp| async move {
        read_header(&mut tcp).await;
        let _ = tcp.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {MUCH}\r\n\r\n").as_bytes()).await;
        let (mut left, mut piece) = (MUCH, vec![0; 1 << 20]);
        while left > 0 {
            // It does not read on before what it has read is written.
            let read = tcp.read(&mut piece).await.unwrap();
            tcp.write_all(&piece[..read]).await.unwrap();
            left -= read;
        }
    })
    .await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let body: Vec<u8> = (0..MUCH).map(|place| (place % 251) as u8).collect();
    let answer = rig.h1().await.send(request("POST", &vm.host, "/", &auth, full(body.clone()))).await;
    assert!(answer.status == 200 && answer.body == body, "{} bytes of {MUCH} came back", answer.body.len());
    let answer = rig.h2().await.send(h2_request("POST", &vm.host, "/", &auth, full(body.clone()))).await;
    assert!(answer.status == 200 && answer.body == body, "{} bytes of {MUCH} came back", answer.body.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_takes_nothing_and_says_nothing_is_a_504() {
    let rig = Rig::with(|limits| limits.guest_body_deadline = Some(std::time::Duration::from_millis(500))).await;
    let (address, _heard) = takes_no_body(|_| "").await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let answer = rig.h1().await.send(request("POST", &vm.host, "/", &auth, full(vec![7; MUCH]))).await;
    assert_eq!((answer.status, answer.reason()), (504, "guest-takes-nothing"));
    let answer = rig.h2().await.send(h2_request("POST", &vm.host, "/", &auth, full(vec![7; MUCH]))).await;
    assert_eq!((answer.status, answer.reason()), (504, "guest-takes-nothing"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_an_upload_which_stands_still_is_missed() {
    let rig = Rig::new().await;
    let (address, heard) = takes_no_body(|_| "").await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let missed = async |requests: usize| until("the end of the request", || rig.log().iter().filter(|line| line["status"].is_null()).count() == requests).await;
    // One that breaks off: an end in order would wait behind what nobody takes.
    let mut tls = rig.tls(&["http/1.1"]).await;
    let header = format!("POST / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\ncontent-length: {MUCH}\r\n\r\n", vm.host);
    tls.write_all(header.as_bytes()).await.unwrap();
    let stands_still = tokio::time::timeout(std::time::Duration::from_secs(1), tls.write_all(&vec![7; MUCH])).await;
    assert!(stands_still.is_err(), "the app took it all");
    tls.get_ref().0.set_zero_linger().unwrap();
    drop(tls);
    missed(1).await;

    let mut h2 = rig.h2().await;
    let mut leaving = Box::pin(h2.0.send_request(h2_request("POST", &vm.host, "/", &auth, full(vec![7; MUCH]))));
    tokio::select! {
        _ = &mut leaving => panic!("nobody answers"),
        begun = heard.acquire_many(2) => begun.unwrap().forget(),
    }
    drop(leaving);
    missed(2).await;
}
