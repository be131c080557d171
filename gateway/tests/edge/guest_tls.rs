//! TLS between the gateway and the app: found out by itself, once, and then carried for every protocol.

use std::sync::{Arc, atomic::{AtomicBool, AtomicUsize, Ordering}};

use futures::{SinkExt as _, StreamExt as _};
use model::PortScope;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

use crate::{
    app::{App, read_header, says_hello, self_signed},
    rig::{H2, Rig, full, get, h2_request, within},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_app_of_tls_is_spoken_to_in_tls_with_what_it_picks() {
    let rig = Rig::new().await;
    for (alpn, h1, h2) in [
        (&["h2", "http/1.1"][..], "HTTP/2.0", "HTTP/2.0"),
        (&["http/1.1", "h2"], "HTTP/1.1", "HTTP/2.0"),
        (&["http/1.1"], "HTTP/1.1", "502"),
        (&["h2"], "HTTP/2.0", "HTTP/2.0"),
        // Without ALPN nobody says no to HTTP/2.
        (&[], "HTTP/1.1", "HTTP/2.0"),
    ] {
        let (app, address) = App::start_tls(alpn).await;
        let vm = rig.microvm(address).await;
        let token = rig.token(&vm, PortScope::All);
        let auth = [("x-aws-proxy-auth", token.as_str())];
        let forced = [auth[0], ("x-aws-proxy-force-h2", "true")];
        for round in 0..2 {
            for (fields, expected) in [(&auth[..], h1), (&forced[..], h2)] {
                let answer = rig.h1().await.send(get(&vm.host, "/", fields)).await;
                let over_h2 = rig.h2().await.send(h2_request("POST", &vm.host, "/", fields, full("body"))).await;
                if expected == "502" {
                    assert_eq!((answer.status, answer.reason()), (502, "guest-answer-broken"), "{alpn:?}");
                    continue;
                }
                assert!(answer.text().starts_with(&format!("GET / {expected}\n")), "{alpn:?}: {}", answer.text());
                assert!(over_h2.text().starts_with(&format!("POST / {expected}\n")) && over_h2.text().ends_with("body"), "{alpn:?}");
            }
            if round == 0 {
                rig.suspend(&vm).await;
            }
        }
        assert!(app.hellos.load(Ordering::SeqCst) > 0);
    }
}

/// Connections that ask, for a plain app: one, however many come at once, and none after a sleep.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_is_asked_once() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let h2 = rig.h2().await;
    let all = (0..50).map(|_| {
        let mut h2 = H2(h2.0.clone());
        let request = h2_request("GET", &vm.host, "/", &[("x-aws-proxy-auth", &token)], full(""));
        async move { assert_eq!(h2.send(request).await.status, 200) }
    });
    within("all answers", futures::future::join_all(all)).await;
    rig.suspend(&vm).await;
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await.status, 200);
    assert_eq!(app.hellos.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_keep_their_trailers_and_a_websocket_its_messages_inside_tls() {
    let rig = Rig::new().await;
    let (_app, address) = App::start_tls(&["h2", "http/1.1"]).await;
    let vm = rig.microvm(address).await;
    let socket_port = model::Port::new(9000).unwrap();
    rig.engine.listen(socket_port, websocket_app().await);
    let token = rig.token(&vm, PortScope::All);
    for _ in 0..2 {
        let fields = [("x-aws-proxy-auth", token.as_str()), ("content-type", "application/grpc"), ("te", "trailers")];
        let request = h2_request("POST", &vm.host, "/duplex", &fields, full("message"));
        let response = within("the answer", rig.h2().await.0.send_request(request)).await.unwrap();
        let body = within("the body", http_body_util::BodyExt::collect(response.into_body())).await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        assert_eq!(body.to_bytes(), "message");

        let mut request = format!("wss://{}/", vm.host).into_client_request().unwrap();
        request.headers_mut().insert("x-aws-proxy-auth", token.parse().unwrap());
        request.headers_mut().insert("x-aws-proxy-port", "9000".parse().unwrap());
        let (mut socket, _) =
            within("the handshake", tokio_tungstenite::client_async(request, rig.tls(&["http/1.1"]).await)).await.unwrap();
        let message = Message::binary(vec![7; 300_000]);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(within("the echo", socket.next()).await.unwrap().unwrap(), message);
        rig.suspend(&vm).await;
        socket.send(Message::Ping("asleep?".into())).await.unwrap();
        assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Message::Pong("asleep?".into()));
        socket.send(message.clone()).await.unwrap();
        assert_eq!(within("the echo after a sleep", socket.next()).await.unwrap().unwrap(), message);
        rig.suspend(&vm).await;
    }
}

async fn websocket_app() -> std::net::SocketAddr {
    let tls = self_signed(&["http/1.1"]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let Ok(tls) = tls.accept(tcp).await else { return };
                let Ok(mut socket) = tokio_tungstenite::accept_async(tls).await else { return };
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_binary() {
                        let _ = socket.send(message).await;
                    }
                }
            });
        }
    });
    address
}

/// One that takes a ClientHello and says nothing, and one that changes its mind.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_answer_the_question_is_plain_and_a_change_is_noticed() {
    let rig = Rig::new().await;
    let (asked, speaks_tls) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn({
        let (asked, speaks_tls, tls) = (asked.clone(), speaks_tls.clone(), self_signed(&[]));
        async move {
            const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
            while let Ok((mut tcp, _)) = listener.accept().await {
                let (asked, speaks_tls, tls) = (asked.clone(), speaks_tls.clone(), tls.clone());
                tokio::spawn(async move {
                    if speaks_tls.load(Ordering::SeqCst) {
                        let Ok(mut tls) = tls.accept(tcp).await else { return };
                        let _ = tls.read(&mut [0; 4096]).await;
                        let _ = tls.write_all(OK).await;
                        let _ = tls.shutdown().await;
                    } else if says_hello(&tcp).await {
                        if asked.fetch_add(1, Ordering::SeqCst) == 0 {
                            std::future::pending::<()>().await;
                        }
                    } else {
                        read_header(&mut tcp).await;
                        let _ = tcp.write_all(OK).await;
                    }
                });
            }
        }
    });
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let mut h2 = rig.h2().await;
    let mut status = async || {
        let answer = h2.send(h2_request("GET", &vm.host, "/", &[("x-aws-proxy-auth", &token)], full(""))).await;
        assert!(answer.status == 200 || answer.reason() == "guest-answer-broken", "{answer:?}");
        answer.status
    };
    assert_eq!((status().await, status().await), (200, 200));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    speaks_tls.store(true, Ordering::SeqCst);
    assert_eq!((status().await, status().await), (502, 200), "a request is not sent twice; the next one asks");
    speaks_tls.store(false, Ordering::SeqCst);
    assert_eq!((status().await, status().await), (502, 200));
}
