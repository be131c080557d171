//! What crosses the edge once a request is let in: bodies, streams, trailers, cookies, and reuse of connections.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use model::{Port, PortScope};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};

use crate::{
    app::{App, read_header, scripted},
    rig::{Answer, Body, H2, Rig, full, get, h2_request, request, until, within},
};

/// A request body that a test feeds piece by piece.
fn fed() -> (mpsc::Sender<Bytes>, Body) {
    let (send, receive) = mpsc::channel::<Bytes>(1);
    let pieces = futures::stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) });
    (send, BodyExt::boxed(StreamBody::new(pieces.map(|bytes| Ok(Frame::data(bytes))))))
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_paths_and_bodies_pass_unchanged() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        for path in ["/a/../b", "/%2e%2e/x", "//double", "/a;b=c", "/%00%2f"] {
            let one = h1.send(request(method, &vm.host, path, &auth, full("body"))).await;
            let two = h2.send(h2_request(method, &vm.host, path, &auth, full("body"))).await;
            for answer in [one, two] {
                assert_eq!(answer.status, 200);
                assert!(answer.text().starts_with(&format!("{method} {path} HTTP/1.1\n")), "{}", answer.text());
                assert!(answer.text().ends_with("\nbody"), "{}", answer.text());
            }
        }
    }
    assert_eq!(h1.send(request("HEAD", &vm.host, "/", &auth, full(""))).await.text(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_both_ways_and_are_counted() {
    const SIZE: usize = 8 << 20;
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let body = Bytes::from(vec![b'x'; SIZE]);
    let one = rig.h1().await.send(request("POST", &vm.host, "/echo", &auth, full(body.clone()))).await;
    let two = rig.h2().await.send(h2_request("POST", &vm.host, "/echo", &auth, full(body.clone()))).await;
    let forced = [auth[0], ("x-aws-proxy-force-h2", "true")];
    let three = rig.h2().await.send(h2_request("POST", &vm.host, "/echo", &forced, full(body))).await;
    for answer in [one, two, three] {
        assert_eq!(answer.status, 200);
        assert!(answer.body.len() > SIZE && answer.body.ends_with(&[b'x'; SIZE]));
    }
    assert!(rig.metric("edge_bytes_total", &[("direction", "in")]) >= 3.0 * SIZE as f64);
    assert!(rig.metric("edge_bytes_total", &[("direction", "out")]) >= 3.0 * SIZE as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_not_held_back_and_a_leaving_client_is_noticed() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let forced = [auth[0], ("x-aws-proxy-force-h2", "true")];
    let mut h2 = rig.h2().await;
    for (place, fields) in [&auth[..], &forced[..]].into_iter().enumerate() {
        let response = within("the answer", h2.0.send_request(h2_request("GET", &vm.host, "/events", fields, full("")))).await.unwrap();
        let mut body = response.into_body();
        let first = within("the first event", body.frame()).await.unwrap().unwrap();
        assert_eq!(first.into_data().unwrap(), "data: 1\n\n");
        app.go.notify_one();
        let second = within("the second event", body.frame()).await.unwrap().unwrap();
        assert_eq!(second.into_data().unwrap(), "data: 2\n\n");

        let response = within("the answer", h2.0.send_request(h2_request("GET", &vm.host, "/events", fields, full("")))).await.unwrap();
        let mut body = response.into_body();
        within("the first event", body.frame()).await.unwrap().unwrap();
        drop(body);
        until("the app to notice", || app.dropped.load(Ordering::SeqCst) == place + 1).await;
    }
    until("no stream to be open", || rig.metric("edge_open_streams", &[("kind", "h2")]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_like_calls_stream_both_ways_and_keep_their_trailers() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let grpc = [("x-aws-proxy-auth", token.as_str()), ("content-type", "application/grpc+proto"), ("te", "trailers")];
    let forced = [grpc[0], grpc[1], grpc[2], ("x-aws-proxy-force-h2", "TRUE")];
    let mut h2 = rig.h2().await;
    for fields in [&grpc[..], &forced[..]] {
        let (feed, body) = fed();
        let response = within("the answer", h2.0.send_request(h2_request("POST", &vm.host, "/duplex", fields, body))).await.unwrap();
        assert_eq!(response.status(), 200);
        let mut answer = response.into_body();
        for message in ["one", "two", "three"] {
            feed.send(Bytes::from_static(message.as_bytes())).await.unwrap();
            let frame = within("the echo", answer.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), message);
        }
        drop(feed);
        let trailers = loop {
            let frame = within("the trailers", answer.frame()).await.expect("trailers").unwrap();
            if let Ok(trailers) = frame.into_trailers() {
                break trailers;
            }
        };
        assert_eq!((&trailers["grpc-status"], &trailers["grpc-message"]), (&"0".parse().unwrap(), &"fine".parse().unwrap()));
    }
    until("both calls to be counted", || rig.metric("edge_requests_total", &[("protocol", "grpc"), ("status_class", "2xx")]) == 2.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_of_http_1_answers_502_where_h2_was_forced() {
    let rig = Rig::new().await;
    let address = scripted(|mut tcp| async move {
        let _ = tcp.read(&mut [0; 100]).await;
        let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    })
    .await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
    let answer = rig.h2().await.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
    assert_eq!((answer.status, answer.text(), answer.reason()), (502, "", "guest-answer-broken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_the_app_are_used_again_within_one_generation_only() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let forced = [auth[0], ("x-aws-proxy-force-h2", "true")];
    let made = || app.connections.load(Ordering::SeqCst);
    let mut h1 = rig.h1().await;
    // A client may be faster with its next request than the gateway with putting the connection away, so a few more than
    // one may be made; never one for each request.
    for fields in [&auth[..], &forced[..]] {
        let before = made();
        for _ in 0..20 {
            assert_eq!(h1.send(get(&vm.host, "/", fields)).await.status, 200);
        }
        assert!((1..10).contains(&(made() - before)), "{} connections for 20 requests", made() - before);
    }
    let before = made();
    rig.suspend(&vm).await;
    assert_eq!(h1.send(get(&vm.host, "/", &auth)).await.status, 200);
    assert_eq!(h1.send(get(&vm.host, "/", &forced)).await.status, 200);
    assert_eq!(made() - before, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_32_two_microvms_and_two_ports_never_share_a_connection() {
    let rig = Rig::new().await;
    let (first, first_address) = App::start().await;
    let (second, second_address) = App::start().await;
    let a = rig.microvm(first_address).await;
    let b = rig.microvm(first_address).await;
    rig.engine.listen(Port::new(9000).unwrap(), second_address);
    let (for_a, for_b) = (rig.token(&a, PortScope::All), rig.token(&b, PortScope::All));
    let mut h2 = rig.h2().await;
    for _ in 0..25 {
        for (vm, token) in [(&a, &for_a), (&b, &for_b)] {
            for port in ["8080", "9000"] {
                let answer = h2.send(h2_request("GET", &vm.host, "/", &[("x-aws-proxy-auth", token), ("x-aws-proxy-port", port)], full(""))).await;
                assert!(answer.text().contains(&format!("host: {}", vm.host)), "{}", answer.text());
            }
        }
    }
    for app in [first, second] {
        assert_eq!((app.requests.load(Ordering::SeqCst), app.mixed.load(Ordering::SeqCst)), (50, 0));
        // At least one for each microVM, and they are used again.
        assert!((2..25).contains(&app.connections.load(Ordering::SeqCst)));
    }
}

/// A guest that records what it reads, up to a quiet moment after it has answered.
async fn recording() -> (std::net::SocketAddr, mpsc::UnboundedReceiver<String>) {
    let (send, receive) = mpsc::unbounded_channel();
    let address = scripted(move |mut tcp| {
        let send = send.clone();
        async move {
            let mut seen = read_header(&mut tcp).await;
            let mut rest = vec![0; 4096];
            loop {
                match tokio::time::timeout(Duration::from_millis(200), tcp.read(&mut rest)).await {
                    Ok(Ok(read)) if read > 0 => seen.push_str(&String::from_utf8_lossy(&rest[..read])),
                    _ => break,
                }
            }
            let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            let _ = send.send(seen);
        }
    })
    .await;
    (address, receive)
}

#[tokio::test(flavor = "multi_thread")]
async fn pingora_935_an_empty_last_frame_of_h2_ends_the_body_once() {
    let rig = Rig::new().await;
    let (address, mut seen) = recording().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    // hyper ends a streamed body with an empty DATA frame.
    let (feed, body) = fed();
    let mut h2 = rig.h2().await;
    let request = h2_request("POST", &vm.host, "/", &[("x-aws-proxy-auth", &token)], body);
    let answer = tokio::spawn(async move { h2.send(request).await });
    feed.send(Bytes::from_static(b"hello")).await.unwrap();
    drop(feed);
    assert_eq!(answer.await.unwrap().text(), "ok");
    let seen = seen.recv().await.unwrap();
    assert!(seen.to_lowercase().contains("transfer-encoding: chunked"), "{seen}");
    assert!(seen.ends_with("\r\n\r\n5\r\nhello\r\n0\r\n\r\n"), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pingora_892_cookie_crumbs_of_h2_are_one_field_for_the_app() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("cookie", "a=1"), ("cookie", "b=2")];
    let answer = rig.h2().await.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
    assert!(answer.text().contains("\ncookie: a=1; b=2\n"), "{}", answer.text());
    assert_eq!(answer.text().matches("cookie:").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_100_continue_is_answered_for_both_kinds_of_app() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    for force in ["false", "true"] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        let header = format!(
            "POST /x HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\nx-aws-proxy-force-h2: {force}\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n",
            vm.host
        );
        tls.write_all(header.as_bytes()).await.unwrap();
        let mut read = Vec::new();
        within("the interim answer", async {
            while !read.ends_with(b"\r\n\r\n") {
                read.push(tls.read_u8().await.unwrap());
            }
        })
        .await;
        assert!(read.starts_with(b"HTTP/1.1 100 "), "{force}: {}", String::from_utf8_lossy(&read));
        tls.write_all(b"body").await.unwrap();
        let mut answer = vec![0; 4096];
        let length = within("the answer", tls.read(&mut answer)).await.unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer[..length]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_413_whether_announced_or_not() {
    let rig = Rig::with(|config| config.max_body_bytes = Some(1000)).await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let fits = rig.h1().await.send(request("POST", &vm.host, "/length", &auth, full(vec![0; 1000]))).await;
    assert_eq!(fits.text(), "Ok(1000)");
    let announced = rig.h1().await.send(request("POST", &vm.host, "/length", &auth, full(vec![0; 1001]))).await;
    assert_eq!((announced.status, announced.reason()), (413, "body-too-large"));
    let to_h2 = [auth[0], ("x-aws-proxy-force-h2", "true")];
    for fields in [&auth[..], &to_h2] {
        let (feed, body) = fed();
        let mut h2 = rig.h2().await;
        let response = h2.0.send_request(h2_request("POST", &vm.host, "/length", fields, body));
        feed.send(Bytes::from(vec![0; 900])).await.unwrap();
        let _ = feed.send(Bytes::from(vec![0; 900])).await;
        let answer = Answer::read(within("the answer", response).await.unwrap()).await;
        assert_eq!((answer.status, answer.reason()), (413, "body-too-large"), "{fields:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_on_one_connection_do_not_mix() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let mut h2 = rig.h2().await;
    // Our settings, with the limit of streams at a time, have come when this is answered.
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &[], full(""))).await.status, 403);
    let all = (0..200).map(|place| {
        let mut h2 = H2(h2.0.clone());
        let path = format!("/{place}");
        let force = if place % 2 == 0 { "true" } else { "false" };
        let request = h2_request("POST", &vm.host, &path, &[("x-aws-proxy-auth", &token), ("x-aws-proxy-force-h2", force)], full(path.clone()));
        async move {
            let answer = h2.send(request).await;
            assert!(answer.text().starts_with(&format!("POST {path} ")) && answer.text().ends_with(&path), "{}", answer.text());
        }
    });
    within("all answers", futures::future::join_all(all)).await;
}
