//! WebSockets (cases 29 and 30): the handshake table, echo, silence, and the race of pingora issue #946.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::{SinkExt as _, StreamExt as _};
use model::{Generation, MicrovmState, PortScope};
use tokio::{io::{AsyncReadExt as _, AsyncWriteExt as _}, net::TcpStream, sync::Notify};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest as _,
        handshake::server::{Request, Response},
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use vmm_runtime::loopback::LoopbackEngine;

use crate::{
    app::{read_header, scripted, speaking_first},
    eager::{Dials, EagerEngine},
    rig::{Microvm, Rig, until, within},
};

/// An app that picks this subprotocol and echoes. It sends what it was offered as its first message.
async fn echo(picks: Option<&'static str>) -> SocketAddr {
    scripted(move |tcp| async move {
        let mut offered = String::new();
        #[expect(clippy::result_large_err, reason = "tungstenite's own type")]
        let callback = |request: &Request, mut response: Response| {
            let lists: Vec<_> = request.headers().get_all("sec-websocket-protocol").iter().map(|list| list.to_str().unwrap()).collect();
            offered = lists.join("|");
            if let Some(picks) = picks {
                response.headers_mut().insert("sec-websocket-protocol", picks.parse().unwrap());
            }
            Ok(response)
        };
        let Ok(mut socket) = tokio_tungstenite::accept_hdr_async(tcp, callback).await else { return };
        let _ = socket.send(Message::text(format!("offered: {offered}"))).await;
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Text(_) | Message::Binary(_) => drop(socket.send(message).await),
                _ => {}
            }
        }
    })
    .await
}

async fn open(
    rig: &Rig,
    vm: &Microvm,
    protocols: &[String],
    fields: &[(&'static str, &str)],
) -> Result<(WebSocketStream<TlsStream<TcpStream>>, Option<String>), Error> {
    let mut request = format!("wss://{}/chat", vm.host).into_client_request().unwrap();
    if !protocols.is_empty() {
        request.headers_mut().insert("sec-websocket-protocol", protocols.join(", ").parse().unwrap());
    }
    for (name, value) in fields {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    let tls = rig.tls(&["http/1.1"]).await;
    let (socket, response) = within("the handshake", tokio_tungstenite::client_async(request, tls)).await?;
    Ok((socket, response.headers().get("sec-websocket-protocol").map(|value| value.to_str().unwrap().to_owned())))
}

fn refusal(error: Error) -> (u16, String) {
    match error {
        Error::Http(response) => {
            let reason = response.headers().get("x-dormouse-reason").map_or("", |value| value.to_str().unwrap());
            (response.status().as_u16(), reason.to_owned())
        }
        other => panic!("not an HTTP answer: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_30_the_subprotocol_table() {
    let rig = Rig::new().await;
    let quiet = echo(None).await;
    let chatty = echo(Some("chat")).await;
    let vm = rig.microvm(quiet).await;
    rig.engine.listen(model::Port::new(9000).unwrap(), chatty);
    let good = rig.token(&vm, PortScope::All);
    let narrow = rig.token(&vm, PortScope::single(model::Port::new(1).unwrap()));
    let shell = rig.mint(&vm, |claims| claims.shell = true);
    let base = || "lambda-microvms".to_owned();
    let auth = |token: &str| format!("lambda-microvms.authentication.{token}");
    let port = |port: u16| format!("lambda-microvms.port.{port}");
    let own = |name: &str| name.to_owned();

    // Offered, fields, then what the client gets and what the app was offered.
    type Row<'a> = (Vec<String>, Vec<(&'static str, &'a str)>, Option<&'a str>, &'a str);
    let served: Vec<Row> = vec![
        (vec![base(), auth(&good)], vec![], Some("lambda-microvms"), ""),
        (vec![auth(&good), port(8080), base()], vec![], Some("lambda-microvms"), ""),
        (vec![base(), auth(&good), own("graphql-ws")], vec![], Some("lambda-microvms"), "graphql-ws"),
        (vec![base(), auth(&good), port(9000), own("chat"), own("other")], vec![], Some("chat"), "chat, other"),
        (vec![], vec![("x-aws-proxy-auth", &good)], None, ""),
        (vec![own("chat")], vec![("x-aws-proxy-auth", &good), ("x-aws-proxy-port", "9000")], Some("chat"), "chat"),
        (vec![base(), auth(&good)], vec![("x-aws-proxy-auth", &good)], Some("lambda-microvms"), ""),
        // The header's port wins over the subprotocol's.
        (vec![base(), auth(&good), port(8080), own("chat")], vec![("x-aws-proxy-port", "9000")], Some("chat"), "chat"),
    ];
    for (protocols, fields, chosen, offered) in served {
        let (mut socket, protocol) = open(&rig, &vm, &protocols, &fields).await.unwrap_or_else(|error| panic!("{protocols:?}: {error}"));
        assert_eq!(protocol.as_deref(), chosen, "{protocols:?}");
        let first = within("the first message", socket.next()).await.unwrap().unwrap();
        assert_eq!(first.into_text().unwrap().as_str(), format!("offered: {offered}"), "{protocols:?}");
        for message in [Message::text("héllo"), Message::binary(vec![7; 100_000])] {
            socket.send(message.clone()).await.unwrap();
            assert_eq!(within("the echo", socket.next()).await.unwrap().unwrap(), message);
        }
        let farewell = CloseFrame { code: CloseCode::Library(4321), reason: "bye".into() };
        socket.close(Some(farewell.clone())).await.unwrap();
        let closed = within("the close", async {
            while let Some(message) = socket.next().await {
                if let Ok(Message::Close(frame)) = message {
                    return frame;
                }
            }
            None
        });
        assert_eq!(closed.await.map(|frame| frame.code), Some(farewell.code), "{protocols:?}");
    }

    // Offered, fields, then status and reason.
    type Refused<'a> = (Vec<String>, Vec<(&'static str, &'a str)>, u16, &'a str);
    let refused: Vec<Refused> = vec![
        (vec![], vec![], 403, "token-missing"),
        (vec![base()], vec![], 403, "token-missing"),
        (vec![auth(&good)], vec![], 403, "subprotocol-base-missing"),
        (vec![port(8080)], vec![("x-aws-proxy-auth", &good)], 403, "subprotocol-base-missing"),
        (vec![base(), auth(&good), auth(&good)], vec![], 403, "token-ambiguous"),
        (vec![base(), auth(&good)], vec![("x-aws-proxy-auth", &narrow)], 403, "token-ambiguous"),
        (vec![base(), auth("garbage")], vec![], 403, "token-unreadable"),
        (vec![base(), auth(&narrow)], vec![], 403, "port-denied"),
        (vec![base(), auth(&good), port(8080), port(8080)], vec![], 400, "port-malformed"),
        (vec![base(), auth(&good), own("lambda-microvms.port.08080")], vec![], 400, "port-malformed"),
        (vec![base(), auth(&shell)], vec![], 502, "no-shell"),
        (vec![base(), auth(&shell), port(8022)], vec![], 502, "no-shell"),
        (vec![base(), auth(&shell), port(8080)], vec![], 403, "port-denied"),
        (vec![auth(&shell)], vec![], 403, "subprotocol-base-missing"),
        (vec![base(), auth(&good), port(7)], vec![], 502, "port-not-listening"),
        // The app picks one that was not offered.
        (vec![base(), auth(&good), port(9000), own("other")], vec![], 502, "subprotocol-not-offered"),
        (vec![base(), auth(&good), port(9000)], vec![], 502, "subprotocol-not-offered"),
    ];
    for (protocols, fields, status, reason) in refused {
        let error = open(&rig, &vm, &protocols, &fields).await.err().unwrap_or_else(|| panic!("{protocols:?} was served"));
        assert_eq!(refusal(error), (status, reason.to_owned()), "{protocols:?}");
    }
    until("no tunnel to be open", || rig.metric("edge_open_streams", &[("kind", "websocket")]) == 0.0).await;
    until("no stream to be open", || rig.metric("edge_upstream_streams", &[]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_wakes_its_microvm() {
    let rig = Rig::new().await;
    let vm = rig.microvm(echo(None).await).await;
    let token = rig.token(&vm, PortScope::All);
    rig.suspend(&vm).await;
    let (mut socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    assert!(within("the first message", socket.next()).await.unwrap().is_ok());
    assert_eq!(rig.engine.counts().restores, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_29_no_tunnel_without_a_real_handshake_and_a_right_101() {
    let rig = Rig::new().await;
    let switching = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: wrong\r\n\r\ntunnel";
    let eager = scripted(move |mut tcp| async move {
        let header = read_header(&mut tcp).await;
        // Shows whether an upgrade was forwarded, and tries to switch in any case.
        assert!(!header.to_lowercase().contains("upgrade: h2c"), "{header}");
        let _ = tcp.write_all(switching.as_bytes()).await;
        let _ = tcp.read(&mut [0; 100]).await;
    })
    .await;
    let vm = rig.microvm(eager).await;
    let token = rig.token(&vm, PortScope::All);
    let key = "dGhlIHNhbXBsZSBub25jZQ==";
    for (what, fields) in [
        ("a plain request", String::new()),
        ("another version", format!("connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 8\r\nsec-websocket-key: {key}\r\n")),
        ("no key", "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n".to_owned()),
        ("h2c", "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n".to_owned()),
        ("a wrong accept", format!("connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n")),
    ] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        let text = format!("GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n{fields}\r\n", vm.host);
        tls.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = within(what, tls.read_to_string(&mut answer)).await;
        assert!(answer.starts_with("HTTP/1.1 502 "), "{what}: {answer}");
        assert!(answer.contains("x-dormouse-reason: unexpected-upgrade\r\n"), "{what}: {answer}");
        assert!(!answer.contains("tunnel"), "{what}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_refuses_the_upgrade_is_heard() {
    let rig = Rig::new().await;
    let vm = rig.microvm(crate::app::canned("HTTP/1.1 426 Upgrade Required\r\ncontent-length: 4\r\n\r\nnope").await).await;
    let token = rig.token(&vm, PortScope::All);
    let error = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.expect_err("refused");
    assert_eq!(refusal(error), (426, String::new()));
}

/// The guest answers before the (empty) request body has gone through: without the first read that yields, about half
/// of these tunnels are torn down.
#[tokio::test(flavor = "multi_thread")]
async fn pingora_946_a_fast_answer_does_not_tear_the_tunnel_down() {
    let engine = LoopbackEngine::new();
    let rig = Rig::over(engine.clone(), Arc::new(EagerEngine(engine, Dials::Eager)), |_| {}).await;
    let fast = speaking_first(|mut tcp| async move {
        // The answer waits in the socket before the request has come; its accept fits the one key of this test.
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        let _ = tcp.write_all(answer.as_bytes()).await;
        read_header(&mut tcp).await;
        let mut four = [0; 4];
        if tcp.read_exact(&mut four).await.is_ok() {
            let _ = tcp.write_all(&four).await;
        }
    })
    .await;
    let vm = rig.microvm(fast).await;
    let token = rig.token(&vm, PortScope::All);
    for round in 0..100 {
        let mut tls = rig.tls(&["http/1.1"]).await;
        let text = format!(
            "GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            vm.host
        );
        tls.write_all(text.as_bytes()).await.unwrap();
        let mut header = Vec::new();
        within("the 101", async {
            while !header.ends_with(b"\r\n\r\n") {
                header.push(tls.read_u8().await.unwrap());
            }
        })
        .await;
        assert!(header.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&header));
        tls.write_all(b"ping").await.unwrap();
        let mut four = [0; 4];
        within("the echo", tls.read_exact(&mut four)).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(&four, b"ping");
    }
}

/// pingora's read timeout counts the silence of an upgraded client as well; here it is a second instead of a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_websocket_stays_open() {
    let rig = Rig::with(|config| config.body_deadline = Duration::from_millis(300)).await;
    let vm = rig.microvm(echo(None).await).await;
    let token = rig.token(&vm, PortScope::All);
    let (mut socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    within("the first message", socket.next()).await.unwrap().unwrap();
    // Nothing comes while nothing is sent: three times the timeout passes without an end.
    assert!(tokio::time::timeout(Duration::from_millis(900), socket.next()).await.is_err());
    socket.send(Message::text("still here")).await.unwrap();
    assert_eq!(within("the echo", socket.next()).await.unwrap().unwrap(), Message::text("still here"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_is_answered_while_the_microvm_sleeps_and_wakes_nobody() {
    let rig = Rig::new().await;
    let vm = rig.microvm(echo(None).await).await;
    let token = rig.token(&vm, PortScope::All);
    let (mut socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    within("the first message", socket.next()).await.unwrap().unwrap();

    // Awake: the app answers.
    socket.send(Message::Ping("to the app".into())).await.unwrap();
    assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Message::Pong("to the app".into()));

    for round in 0..2 {
        rig.suspend(&vm).await;
        for payload in ["", "are you there?", &"x".repeat(125)] {
            socket.send(Message::Ping(payload.to_owned().into())).await.unwrap();
            assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Message::Pong(payload.to_owned().into()));
        }
        assert_eq!((vm.state(), rig.engine.counts().restores), (MicrovmState::Suspended, round));

        // A message does wake it, also right behind a ping, and nothing of what surrounds the pings is lost.
        socket.feed(Message::Ping("first".into())).await.unwrap();
        socket.feed(Message::text("then this")).await.unwrap();
        socket.flush().await.unwrap();
        assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Message::Pong("first".into()));
        assert_eq!(within("the echo", socket.next()).await.unwrap().unwrap(), Message::text("then this"));
        assert_eq!(rig.engine.counts().restores, round + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_the_app_has_begun_is_an_answer_that_it_owes() {
    const BEGUN: usize = 400;
    const FRAME: usize = 4 + 1000;
    let go = Arc::new(Notify::new());
    let goes_on = go.clone();
    let app = scripted(move |tcp| {
        let go = goes_on.clone();
        async move {
            let Ok(mut socket) = tokio_tungstenite::accept_async(tcp).await else { return };
            let mut frame = vec![b'x'; FRAME];
            frame[..4].copy_from_slice(&[0x82, 126, 0x03, 0xE8]);
            go.notified().await;
            socket.get_mut().write_all(&frame[..BEGUN]).await.unwrap();
            go.notified().await;
            socket.get_mut().write_all(&frame[BEGUN..]).await.unwrap();
            while socket.next().await.is_some_and(|message| message.is_ok()) {}
        }
    });
    let rig = Rig::new().await;
    let vm = rig.microvm(app.await).await;
    let token = rig.token(&vm, PortScope::All);
    let (mut socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    let mut read = vec![0; FRAME];
    // Not before: the client's library would take it with the answer to its handshake.
    go.notify_one();
    within("the half", socket.get_mut().read_exact(&mut read[..BEGUN])).await.unwrap();

    within("the suspend to be taken", vm.handle.suspend()).await.unwrap();
    within("the wake", vm.handle.wait_until(|view| view.generation == Generation(1) && view.state == MicrovmState::Running)).await;
    go.notify_one();
    within("the rest", socket.get_mut().read_exact(&mut read[BEGUN..])).await.unwrap();
    assert_eq!(&read[..5], [0x82, 126, 0x03, 0xE8, b'x']);

    // It owes nothing now, and sleeps on.
    rig.suspend(&vm).await;
    socket.send(Message::Ping("there?".into())).await.unwrap();
    assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Message::Pong("there?".into()));
    assert_eq!((vm.state(), rig.engine.counts().restores), (MicrovmState::Suspended, 1));
}

/// An app that keeps all that it has read until it can be said, as one with a queue between reading and writing does.
async fn patient_echo() -> SocketAddr {
    scripted(|tcp| async move {
        let Ok(socket) = tokio_tungstenite::accept_async(tcp).await else { return };
        let (mut say, mut hear) = socket.split();
        let (send, mut kept) = tokio::sync::mpsc::unbounded_channel();
        let hearing = async move { while let Some(Ok(message)) = hear.next().await && send.send(message).is_ok() {} };
        let saying = async move { while let Some(message) = kept.recv().await && say.send(message).await.is_ok() {} };
        tokio::join!(hearing, saying);
    })
    .await
}

/// More than all buffers on the way hold.
const MUCH: usize = 300;
const PIECE: usize = 256 * 1024;

/// pingora takes nothing of a client while that takes nothing of an answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_says_much_before_it_listens_is_heard() {
    let rig = Rig::new().await;
    let vm = rig.microvm(patient_echo().await).await;
    let token = rig.token(&vm, PortScope::All);
    let (mut socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    for place in 0..MUCH {
        within("the app to take a message", socket.send(Message::binary(vec![place as u8; PIECE]))).await.unwrap();
    }
    for place in 0..MUCH {
        assert_eq!(within("the echo", socket.next()).await.unwrap().unwrap(), Message::binary(vec![place as u8; PIECE]));
    }
    drop(socket);
    until("the tunnel to be over", || rig.metric("edge_open_streams", &[("kind", "websocket")]) == 0.0).await;
    assert!(rig.metric("edge_bytes_total", &[("direction", "in")]) >= (MUCH * PIECE) as f64);
    assert!(rig.metric("edge_bytes_total", &[("direction", "out")]) >= (MUCH * PIECE) as f64);
}

/// The other way round: pingora takes nothing of an app while that takes nothing of a message, which is more than all
/// buffers on the way hold.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_answers_before_it_goes_on_reading_is_heard() {
    const HUGE: usize = 15 << 20;
    let rig = Rig::new().await;
    let vm = rig.microvm(echo(None).await).await;
    let token = rig.token(&vm, PortScope::All);
    let (socket, _) = open(&rig, &vm, &[], &[("x-aws-proxy-auth", &token)]).await.unwrap();
    let (mut say, mut hear) = socket.split();
    within("the first message", hear.next()).await.unwrap().unwrap();
    let saying = tokio::spawn(async move {
        for place in 0..4 {
            say.send(Message::binary(vec![place; HUGE])).await.unwrap();
        }
        say
    });
    for place in 0..4 {
        assert_eq!(within("the echo", hear.next()).await.unwrap().unwrap().into_data(), vec![place; HUGE]);
    }
    drop(saying.await.unwrap());
}
