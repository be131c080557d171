//! What pingora 0.9.1 does wrong or too kindly for an edge, one test each; every one fails without what we do about it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use model::PortScope;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use vmm_runtime::loopback::LoopbackEngine;

use crate::{
    app::{App, read_header, scripted},
    eager::{Dials, EagerEngine},
    rig::{H2, Rig, full, get, h2_request, request, until, within},
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
                // The first connection may be the gateway's question whether the app speaks TLS.
                let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
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
async fn an_app_that_answers_the_second_try_without_its_body_is_heard() {
    // It shuts its window once it has the first body, so that the second one waits until NO_ERROR says that nobody wants it.
    let rig = Rig::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                // The first connection is the gateway's question whether the app speaks TLS.
                let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    if counted.fetch_add(1, Ordering::SeqCst) > 0 {
                        answer_ok(respond);
                        continue;
                    }
                    let mut body = request.into_body();
                    tokio::select! {
                        piece = body.data() => assert_eq!(&piece.unwrap().unwrap()[..], b"body"),
                        _ = connection.accept() => return,
                    }
                    connection.set_initial_window_size(0).unwrap();
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                }
            });
        }
    });
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
    let answer = rig.h2().await.send(h2_request("PUT", &vm.host, "/", &fields, full("body"))).await;
    assert_eq!((answer.status, answer.text(), requests.load(Ordering::SeqCst)), (200, "ok", 2), "{}", answer.reason());
}

/// An app of HTTP/2 that gives bodies a window of 64 KiB and no more. It answers early to `/early`, at once to `/`, else never.
/// Counts its connections and the bodies that were broken off.
async fn takes_nothing() -> (SocketAddr, Arc<[AtomicUsize; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counted = counts.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                // The first connection is the gateway's question whether the app speaks TLS.
                let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
                counted[0].fetch_add(1, Ordering::SeqCst);
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let (path, mut body, counted) = (request.uri().path().to_owned(), request.into_body(), counted.clone());
                    tokio::spawn(async move {
                        if path == "/early" || path == "/" {
                            let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
                            answer.send_data(Bytes::from_static(b"ok"), true).unwrap();
                        }
                        // Read without giving any window back.
                        while let Some(piece) = body.data().await {
                            if piece.is_err() {
                                counted[1].fetch_add(1, Ordering::SeqCst);
                                return;
                            }
                        }
                        drop(respond);
                    });
                }
            });
        }
    });
    (address, counts)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_of_h2_that_takes_no_body_is_heard_and_if_it_says_nothing_its_stream_alone_is_reset() {
    for (deadline, path) in [(Duration::from_secs(3600), "/early"), (Duration::from_millis(500), "/early"), (Duration::from_millis(500), "/never")] {
        let rig = Rig::with(|limits| limits.guest_body_deadline = Some(deadline)).await;
        let (address, counts) = takes_nothing().await;
        let vm = rig.microvm(address).await;
        let token = rig.token(&vm, PortScope::All);
        let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
        for version in [1, 2] {
            let body = full(vec![7; 1 << 20]);
            let answer = match version {
                1 => rig.h1().await.send(request("POST", &vm.host, path, &fields, body)).await,
                _ => rig.h2().await.send(h2_request("POST", &vm.host, path, &fields, body)).await,
            };
            let expected = if path == "/early" { (200, "ok", "") } else { (504, "", "guest-takes-nothing") };
            assert_eq!((answer.status, answer.text(), answer.reason()), expected, "HTTP/{version} {path}");
            if deadline < Duration::from_secs(1) {
                until("the stream to be reset", || counts[1].load(Ordering::SeqCst) == version).await;
            }
            assert_eq!(rig.h1().await.send(get(&vm.host, "/", &fields)).await.status, 200);
            assert_eq!(counts[0].load(Ordering::SeqCst), 1, "the connection goes on");
        }
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
                let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
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

#[tokio::test(flavor = "multi_thread")]
async fn a_request_shorter_than_the_peek_for_h2_is_answered() {
    // pingora looks for HTTP/2 by reading 24 bytes without a deadline where it is not negotiated. Ours always is.
    let rig = Rig::new().await;
    for alpn in [&["http/1.1"][..], &[]] {
        let mut tls = rig.tls(alpn).await;
        tls.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        within("the answer", tls.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 403");
    }
    // Nor is HTTP/2 spoken where HTTP/1.1 was negotiated.
    let mut tls = rig.tls(&["http/1.1"]).await;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    within("the answer", tls.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_pass_only_where_both_sides_speak_h2() {
    // A limit that the documentation names (docs/behaviour): pingora drops them where HTTP/1.1 is on a side.
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let forced = [auth[0], ("x-aws-proxy-force-h2", "true")];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    for (fields, of_h2) in [(&auth[..], false), (&forced[..], true)] {
        let from_h2 = within("the answer", h2.0.send_request(h2_request("POST", &vm.host, "/duplex", fields, full("x")))).await.unwrap();
        let from_h2 = within("the body", from_h2.into_body().collect()).await.unwrap();
        assert_eq!(from_h2.trailers().is_some(), of_h2, "{fields:?}");
        assert_eq!(from_h2.to_bytes(), "x");
        let from_h1 = within("the answer", h1.0.send_request(request("POST", &vm.host, "/duplex", fields, full("x")))).await.unwrap();
        let from_h1 = within("the body", from_h1.into_body().collect()).await.unwrap();
        assert!(from_h1.trailers().is_none(), "{fields:?}");
        assert_eq!(from_h1.to_bytes(), "x");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_burst_of_streams_opens_one_connection_to_the_app() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
    let h2 = rig.h2().await;
    // The app is known, so that nobody asks it what it speaks; its connections are of an older generation after the sleep.
    assert_eq!(H2(h2.0.clone()).send(h2_request("GET", &vm.host, "/", &fields, full(""))).await.status, 200);
    for _ in 0..3 {
        rig.suspend(&vm).await;
        let before = app.connections.load(Ordering::SeqCst);
        let burst = (0..50).map(|_| {
            let mut h2 = H2(h2.0.clone());
            let request = h2_request("GET", &vm.host, "/", &fields, full(""));
            async move { assert_eq!(h2.send(request).await.status, 200) }
        });
        within("all answers", futures::future::join_all(burst)).await;
        assert_eq!(app.connections.load(Ordering::SeqCst) - before, 1);
    }
}

/// One frame of HTTP/2 on the first stream, or on none.
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let stream = u8::from(matches!(kind, HEADERS | DATA | CONTINUATION | RST_STREAM));
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Fields as HPACK writes them without its table.
fn packed(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let text = |text: &[u8]| {
        let mut length = vec![text.len().min(127) as u8];
        if text.len() >= 127 {
            let mut rest = text.len() - 127;
            while rest >= 128 {
                length.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            length.push(rest as u8);
        }
        [length, text.to_vec()].concat()
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What the gateway says to these frames: `answer`, `reset` or `goaway` with its code.
async fn says(rig: &Rig, frames: &[u8]) -> (&'static str, u32) {
    let mut tls = rig.tls(&["h2"]).await;
    let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, &[]), frames].concat();
    tls.write_all(&hello).await.unwrap();
    within("a word about it", async {
        loop {
            let mut header = [0; 9];
            if tls.read_exact(&mut header).await.is_err() {
                return ("close", 0);
            }
            let mut payload = vec![0; usize::from(header[1]) << 8 | usize::from(header[2])];
            tls.read_exact(&mut payload).await.unwrap();
            let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match header[3] {
                HEADERS => return ("answer", 0),
                RST_STREAM => return ("reset", code(0)),
                GOAWAY => return ("goaway", code(4)),
                _ => {}
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn case_27_what_http_1_could_read_otherwise_never_leaves_http_2() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let (host, token) = (vm.host.as_bytes(), token.as_bytes());
    type Field<'a> = (&'a [u8], &'a [u8]);
    let pseudo: [Field; 4] = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", host), (b":path", b"/")];
    let auth: Field = (b"x-aws-proxy-auth", token);
    let with = |changed: &[Field], more: &[Field]| {
        let kept = pseudo.iter().filter(|(name, _)| !changed.iter().any(|(other, _)| other == name));
        let all: Vec<Field> = kept.chain(changed).copied().chain([auth]).chain(more.iter().copied()).collect();
        frame(HEADERS, END_HEADERS | END_STREAM, &packed(&all))
    };
    let with_body = |more: &[Field], body: &[u8]| {
        let all: Vec<Field> = pseudo.iter().copied().chain([auth]).chain(more.iter().copied()).collect();
        [frame(HEADERS, END_HEADERS, &packed(&all)), frame(DATA, END_STREAM, body)].concat()
    };
    // The frames are right: this one reaches the app.
    assert_eq!(says(&rig, &with(&[], &[])).await, ("answer", 0));
    assert_eq!(app.requests.load(Ordering::SeqCst), 1);
    let mut wrong = String::new();
    for (what, frames, answered) in [
        ("CR LF in a value", with(&[], &[(b"a", b"b\r\nc: d")]), false),
        ("LF in a value", with(&[], &[(b"a", b"b\nc: d")]), false),
        ("NUL in a value", with(&[], &[(b"a", b"b\0")]), false),
        ("CR LF in a name", with(&[], &[(b"a\r\nb", b"c")]), false),
        ("a colon in a name", with(&[], &[(b"a: b", b"c")]), false),
        ("a blank in a name", with(&[], &[(b"a b", b"c")]), false),
        ("an upper-case name", with(&[], &[(b"A", b"b")]), false),
        ("an empty name", with(&[], &[(b"", b"b")]), false),
        ("a pseudo field after the others", with(&[], &[(b":path", b"/other")]), false),
        ("an unknown pseudo field", with(&[(b":other", b"x")], &[]), false),
        ("a pseudo field of answers", with(&[(b":status", b"200")], &[]), false),
        ("CR LF in the method", with(&[(b":method", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")], &[]), false),
        ("a blank in the method", with(&[(b":method", b"GET /other")], &[]), false),
        ("CR LF in the path", with(&[(b":path", b"/ HTTP/1.1\r\nhost: x\r\n\r\n")], &[]), false),
        ("a blank in the path", with(&[(b":path", b"/a b")], &[]), false),
        ("NUL in the path", with(&[(b":path", b"/\0")], &[]), false),
        ("an empty path", with(&[(b":path", b"")], &[]), false),
        ("CR LF in the authority", with(&[(b":authority", &[host, b"\r\nx: y"].concat())], &[]), false),
        ("transfer-encoding", with(&[], &[(b"transfer-encoding", b"chunked")]), false),
        ("connection", with(&[], &[(b"connection", b"x-aws-proxy-auth")]), false),
        ("keep-alive", with(&[], &[(b"keep-alive", b"1")]), false),
        ("upgrade", with(&[], &[(b"upgrade", b"websocket")]), false),
        ("TE other than trailers", with(&[], &[(b"te", b"gzip")]), false),
        ("a path that is none", with(&[(b":path", b"other")], &[]), true),
        ("an absolute path", with(&[(b":path", b"https://other/")], &[]), true),
        ("a scheme that is not ours", with(&[(b":scheme", b"file")], &[]), true),
        ("Content-Length twice", with_body(&[(b"content-length", b"3"), (b"content-length", b"3")], b"abc"), true),
        ("a list of Content-Length", with_body(&[(b"content-length", b"3, 3")], b"abc"), true),
        ("a signed Content-Length", with_body(&[(b"content-length", b"+3")], b"abc"), true),
        ("CONNECT", frame(HEADERS, END_HEADERS, &packed(&[(b":method", b"CONNECT"), (b":authority", host), auth])), true),
        ("another host", with(&[], &[(b"host", b"other")]), true),
        ("two hosts", with(&[], &[(b"host", host), (b"host", host)]), true),
        ("userinfo", with(&[(b":authority", &[b"user@", host].concat())], &[]), true),
        ("two authorities", with(&[(b":authority", &[host, b",other"].concat())], &[]), true),
        ("a path in the authority", with(&[(b":authority", &[host, b"/x"].concat())], &[]), true),
        ("an empty authority", with(&[(b":authority", b"")], &[]), true),
        ("no authority", with(&[(b":authority", b"")], &[(b"host", b"")]), true),
    ] {
        let before = app.requests.load(Ordering::SeqCst);
        let said = says(&rig, &frames).await;
        // Some are reset (h2's own rules), some are answered with a refusal; none reaches the app as a whole request.
        if said.0 == "close" || (said.0 == "answer" && !answered) || app.requests.load(Ordering::SeqCst) != before {
            wrong.push_str(&format!("{what}: {said:?}, {} requests\n", app.requests.load(Ordering::SeqCst) - before));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    // Of these the app may read the header, as it comes first; it never reads a whole body.
    for (length, body) in [("5", "abc"), ("1", "abc")] {
        let frames = with_body(&[(b"content-length", length.as_bytes())], body.as_bytes());
        assert_ne!(says(&rig, &frames).await.0, "close", "{length}");
    }
    for reason in ["ambiguous-framing", "method-not-allowed"] {
        assert!(rig.metric("edge_refusals_total", &[("reason", reason)]) >= 1.0, "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_fill_our_memory_with_headers_of_h2() {
    let rig = Rig::new().await;
    let status = [0x88];
    for (what, answer) in [
        // One byte for each field; the header does not even end.
        ("many fields", frame(HEADERS, 0, &[&status[..], &packed(&[(b"a", b"1")]).repeat(300)].concat())),
        ("fields of one byte", frame(HEADERS, 0, &[&[0x88, 0x40, 1, b'a', 1, b'1'][..], &[0xbe; 400]].concat())),
        ("fields in many frames", {
            let more = frame(CONTINUATION, 0, &packed(&[(b"a", b"1")]).repeat(100));
            [frame(HEADERS, 0, &status), more.clone(), more.clone(), more].concat()
        }),
        ("many bytes", {
            let more = frame(CONTINUATION, 0, &packed(&[(b"a", &[b'x'; 16_000])]));
            [frame(HEADERS, 0, &status), more.repeat(5)].concat()
        }),
    ] {
        let answer = Arc::new(answer);
        let address = scripted(move |mut tcp| {
            let answer = answer.clone();
            async move {
                let mut seen = vec![0; 24];
                if tcp.read_exact(&mut seen).await.is_err() || !seen.starts_with(b"PRI ") {
                    return;
                }
                let _ = tcp.write_all(&[frame(SETTINGS, 0, &[]), frame(SETTINGS, ACK, &[])].concat()).await;
                // Its request has come when anything but settings and windows has.
                loop {
                    let mut header = [0; 9];
                    if tcp.read_exact(&mut header).await.is_err() {
                        return;
                    }
                    let mut payload = vec![0; usize::from(header[1]) << 8 | usize::from(header[2])];
                    let _ = tcp.read_exact(&mut payload).await;
                    if header[3] == HEADERS {
                        break;
                    }
                }
                let _ = tcp.write_all(&answer).await;
                while tcp.read(&mut [0; 1000]).await.is_ok_and(|read| read > 0) {}
            }
        })
        .await;
        let vm = rig.microvm(address).await;
        let token = rig.token(&vm, PortScope::All);
        let fields = [("x-aws-proxy-auth", token.as_str()), ("x-aws-proxy-force-h2", "true")];
        let answer = rig.h2().await.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
        assert_eq!((answer.status, answer.reason()), (502, "guest-header-too-large"), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_its_app_is_dialled_is_noticed() {
    let engine = LoopbackEngine::new();
    let (silent, begun, given_up) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let odd = EagerEngine(engine.clone(), Dials::Silent { silent: silent.clone(), begun: begun.clone(), given_up: given_up.clone() });
    let rig = Rig::over(engine, Arc::new(odd), |limits| limits.dial_deadline = Duration::from_secs(600)).await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let auth = [("x-aws-proxy-auth", token.as_str())];
    let header = format!("GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host);
    let open = |kind: &str| rig.metric("edge_open_streams", &[("kind", kind)]);
    let leaves_h1 = async |times: usize| {
        let mut tls = rig.tls(&["http/1.1"]).await;
        tls.write_all(header.as_bytes()).await.unwrap();
        until("the dial to be begun", || begun.load(Ordering::SeqCst) == times).await;
        drop(tls);
        until("the dial to be given up", || given_up.load(Ordering::SeqCst) == times && open("h1") == 0.0).await;
    };
    // While the app is asked what it speaks.
    leaves_h1(1).await;
    let mut h2 = rig.h2().await;
    let asking = tokio::spawn({
        let request = h2_request("GET", &vm.host, "/", &auth, full(""));
        async move { h2.send(request).await }
    });
    until("the dial to be begun", || begun.load(Ordering::SeqCst) == 2).await;
    asking.abort();
    until("the dial to be given up", || given_up.load(Ordering::SeqCst) == 2 && open("h2") == 0.0).await;
    // While it is dialled for the request.
    silent.store(false, Ordering::SeqCst);
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &auth)).await.status, 200);
    rig.suspend(&vm).await;
    silent.store(true, Ordering::SeqCst);
    leaves_h1(3).await;
}
