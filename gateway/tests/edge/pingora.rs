//! What pingora 0.9.1 does wrong or too kindly for an edge, one test each; every one fails without what we do about it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use model::PortScope;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    app::{read_header, scripted},
    rig::{Rig, full, get, h2_request, request, within},
};

/// An app of HTTP/2 that does with each request what the test says: the arguments are its number, from 0, and its answer.
async fn h2_app<F>(each: F) -> SocketAddr
where
    F: Fn(usize, h2::server::SendResponse<Bytes>) + Clone + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (each, requests) = (each.clone(), requests.clone());
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, respond))) = connection.accept().await {
                    each(requests.fetch_add(1, Ordering::SeqCst), respond);
                }
            });
        }
    });
    address
}

fn answer_ok(mut respond: h2::server::SendResponse<Bytes>) {
    // Whoever asked may be gone.
    if let Ok(mut body) = respond.send_response(http::Response::new(()), false) {
        let _ = body.send_data(Bytes::from_static(b"ok"), true);
    }
}

/// Reads one request with a body of `length` bytes; its header, or nothing at the end of the connection.
async fn read_request(tcp: &mut TcpStream, length: usize) -> String {
    let header = read_header(tcp).await;
    let mut body = vec![0; if header.starts_with("PUT") { length } else { 0 }];
    let _ = tcp.read_exact(&mut body).await;
    header
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_was_sent_is_never_sent_again() {
    // The app answers the first request of each connection; it takes the second one and then closes, or is silent until
    // the gateway loses its patience.
    for closes in [true, false] {
        let rig = Rig::with(|config| config.first_byte_deadline = Some(Duration::from_millis(300))).await;
        let seen = Arc::new(AtomicUsize::new(0));
        let counted = seen.clone();
        let address = scripted(move |mut tcp| {
            let seen = counted.clone();
            async move {
                if read_request(&mut tcp, 4).await.is_empty() {
                    return;
                }
                seen.fetch_add(1, Ordering::SeqCst);
                let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                if !read_request(&mut tcp, 4).await.is_empty() {
                    seen.fetch_add(1, Ordering::SeqCst);
                    if !closes {
                        while tcp.read(&mut [0; 100]).await.is_ok_and(|read| read > 0) {}
                    }
                }
            }
        })
        .await;
        let vm = rig.microvm(address).await;
        let token = rig.token(&vm, PortScope::All);
        let auth = [("x-aws-proxy-auth", token.as_str())];
        let mut sent = 0;
        for method in ["GET", "PUT", "DELETE", "OPTIONS"] {
            // A client may be faster with its next request than the gateway with putting the connection away, so more than
            // one may be answered.
            let refused = loop {
                let body = if method == "PUT" { full("body") } else { full("") };
                let answer = rig.h1().await.send(request(method, &vm.host, "/", &auth, body)).await;
                sent += 1;
                if answer.status != 200 {
                    break answer;
                }
                assert!(sent < 200, "no connection is ever used again");
            };
            let expected = if closes { (502, "guest-answer-broken") } else { (504, "guest-silent") };
            assert_eq!((refused.status, refused.reason()), expected, "{method}");
            assert_eq!(seen.load(Ordering::SeqCst), sent, "{method}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_tried_again_only_if_the_app_says_that_it_did_not_look() {
    for (code, again) in [(h2::Reason::REFUSED_STREAM, true), (h2::Reason::INTERNAL_ERROR, false), (h2::Reason::CANCEL, false)] {
        let rig = Rig::with(|config| config.max_body_bytes = Some(6)).await;
        let seen = Arc::new(AtomicUsize::new(0));
        let counted = seen.clone();
        let address = h2_app(move |number, mut respond| {
            counted.fetch_add(1, Ordering::SeqCst);
            if number == 1 { respond.send_reset(code) } else { answer_ok(respond) }
        })
        .await;
        let vm = rig.microvm(address).await;
        let token = rig.token(&vm, PortScope::All);
        let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
        let mut h2 = rig.h2().await;
        assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await.status, 200);
        let answer = h2.send(h2_request("PUT", &vm.host, "/", &fields, full("body"))).await;
        // Counted once, or the second try would be over the limit of the body.
        assert_eq!((answer.status, answer.reason()), if again { (200, "") } else { (502, "guest-answer-broken") }, "{code:?}");
        assert_eq!(seen.load(Ordering::SeqCst), if again { 3 } else { 2 }, "{code:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_on_a_connection_of_h2_that_ends_is_not_sent_again() {
    let rig = Rig::new().await;
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let seen = counted.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, respond))) = connection.accept().await {
                    if seen.fetch_add(1, Ordering::SeqCst) == 1 {
                        return;
                    }
                    answer_ok(respond);
                }
            });
        }
    });
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
    let mut h1 = rig.h1().await;
    assert_eq!(within("the answer", h1.send(get(&vm.host, "/", &fields))).await.status, 200);
    let answer = h1.send(get(&vm.host, "/", &fields)).await;
    assert_eq!((answer.status, answer.reason(), seen.load(Ordering::SeqCst)), (502, "guest-answer-broken", 2));
}
