//! Clients and guests that do not keep to the rules (cases 20, 21, 24–26, 28, 31), byte by byte.

use std::{sync::atomic::Ordering, time::Duration};

use http_body_util::BodyExt as _;
use model::PortScope;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    app::{App, canned, read_header, scripted},
    rig::{Microvm, Rig, full, get, h2_request, within},
};

/// Everything the gateway says to these bytes until it closes or falls silent.
async fn raw(rig: &Rig, bytes: &[u8]) -> String {
    let mut tls = rig.tls(&["http/1.1"]).await;
    // Whoever refuses early may have closed already.
    let _ = tls.write_all(bytes).await;
    let mut answer = Vec::new();
    let mut piece = vec![0; 4096];
    while let Ok(Ok(read)) = tokio::time::timeout(Duration::from_secs(3), tls.read(&mut piece)).await {
        if read == 0 {
            break;
        }
        answer.extend_from_slice(&piece[..read]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn statuses(text: &str) -> Vec<&str> {
    text.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect()
}

async fn rig() -> (Rig, App, Microvm, String) {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    (rig, app, vm, token)
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_are_refused_with_a_reason_and_reach_nobody() {
    let (rig, app, vm, token) = rig().await;
    let host = &vm.host;
    let mut wrong = String::new();
    let good = format!("host: {host}\r\nx-aws-proxy-auth: {token}\r\nconnection: close\r\n");
    for (what, text, status, reason) in [
        ("a blank before the colon", format!("GET / HTTP/1.1\r\n{good}x : 1\r\n\r\n"), "400", "malformed-request"),
        ("a folded line", format!("GET / HTTP/1.1\r\n{good}x: 1\r\n 2\r\n\r\n"), "400", "malformed-request"),
        ("a NUL", format!("GET / HTTP/1.1\r\n{good}x: \0\r\n\r\n"), "400", "malformed-request"),
        ("a bare CR", format!("GET / HTTP/1.1\r\n{good}x: a\rb\r\n\r\n"), "400", "malformed-request"),
        ("two hosts", format!("GET / HTTP/1.1\r\n{good}host: {host}\r\n\r\n"), "400", "malformed-request"),
        ("no host", format!("GET / HTTP/1.1\r\nx-aws-proxy-auth: {token}\r\n\r\n"), "400", "malformed-request"),
        ("another host in the target", format!("GET http://other/ HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("userinfo", format!("GET / HTTP/1.1\r\nhost: u@{host}\r\nx-aws-proxy-auth: {token}\r\n\r\n"), "400", "malformed-request"),
        ("garbage", "\u{1}\u{2}\r\n\r\n".to_owned(), "400", "malformed-request"),
        ("a blank in the target", format!("GET /a b HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("two blanks before the target", format!("GET  / HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("a NUL in the target", format!("GET /\0 HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("a control character in the target", format!("GET /\x07 HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("a tab in the target", format!("GET /\t HTTP/1.1\r\n{good}\r\n"), "400", "malformed-request"),
        ("a bare LF after the request line", format!("GET / HTTP/1.1\n{good}\r\n"), "400", "malformed-request"),
        ("a bare LF after a field", format!("GET / HTTP/1.1\r\nx: 1\n{good}\r\n"), "400", "malformed-request"),
        ("a bare LF for the end", format!("GET / HTTP/1.1\r\n{good}\n"), "400", "malformed-request"),
        ("nothing but LF", format!("GET / HTTP/1.1\n{}\n", good.replace('\r', "")), "400", "malformed-request"),
        ("HTTP/0.9", "GET /\r\n\r\n".to_owned(), "400", "malformed-request"),
        ("HTTP/1.2", format!("GET / HTTP/1.2\r\n{good}\r\n"), "400", "malformed-request"),
        ("CONNECT", format!("CONNECT {host}:443 HTTP/1.1\r\n{good}\r\n"), "405", "method-not-allowed"),
        ("TRACE", format!("TRACE / HTTP/1.1\r\n{good}\r\n"), "405", "method-not-allowed"),
        ("TE and CL", format!("POST / HTTP/1.1\r\n{good}content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "400", "ambiguous-framing"),
        ("CL twice", format!("POST / HTTP/1.1\r\n{good}content-length: 3\r\ncontent-length: 3\r\n\r\nabc"), "400", "ambiguous-framing"),
        ("a list of CL", format!("POST / HTTP/1.1\r\n{good}content-length: 3, 3\r\n\r\nabc"), "400", "ambiguous-framing"),
        ("two different CL", format!("POST / HTTP/1.1\r\n{good}content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"), "400", "malformed-request"),
        ("a signed CL", format!("POST / HTTP/1.1\r\n{good}content-length: +3\r\n\r\nabc"), "400", "malformed-request"),
        ("another coding", format!("POST / HTTP/1.1\r\n{good}transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), "501", "unsupported-transfer-coding"),
        ("chunked twice", format!("POST / HTTP/1.1\r\n{good}transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "501", "unsupported-transfer-coding"),
        ("chunked in the middle", format!("POST / HTTP/1.1\r\n{good}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"), "400", "malformed-request"),
        ("Connection names Content-Length", format!("POST / HTTP/1.1\r\n{good}connection: content-length\r\ncontent-length: 3\r\n\r\nabc"), "400", "malformed-request"),
        ("Connection names Transfer-Encoding", format!("POST / HTTP/1.1\r\n{good}connection: Transfer-Encoding\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "400", "malformed-request"),
        ("chunked in HTTP/1.0", format!("POST / HTTP/1.0\r\n{good}transfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "400", "malformed-request"),
        ("many fields", format!("GET / HTTP/1.1\r\n{good}{}\r\n", "a: 1\r\n".repeat(150)), "431", "header-too-large"),
        ("very many fields", format!("GET / HTTP/1.1\r\n{good}{}\r\n", "a: 1\r\n".repeat(10_000)), "431", "header-too-large"),
        ("a large field", format!("GET / HTTP/1.1\r\n{good}a: {}\r\n\r\n", "x".repeat(30_000)), "431", "header-too-large"),
        ("a huge field", format!("GET / HTTP/1.1\r\n{good}a: {}\r\n\r\n", "x".repeat(2 << 20)), "431", "header-too-large"),
    ] {
        let answer = raw(&rig, text.as_bytes()).await;
        let lines = [format!("\r\nx-dormouse-reason: {reason}\r\n"), "\r\nx-amzn-requestid: ".into(), "\r\nconnection: close\r\n".into()];
        if statuses(&answer) != [status] || !lines.iter().all(|line| answer.to_lowercase().contains(line)) {
            wrong.push_str(&format!("{what}: wanted {status} {reason}, read\n{answer}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(app.requests.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_25_a_body_whose_chunks_cannot_be_told_apart_is_400_and_the_end() {
    let (rig, _app, vm, token) = rig().await;
    let mut wrong = String::new();
    for (what, body) in [
        ("a size that is none", "xyz\r\nabc\r\n0\r\n\r\n"),
        ("a size with a sign", "+3\r\nabc\r\n0\r\n\r\n"),
        ("a size in another base", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("a size that overflows", "10000000000000000\r\nabc\r\n0\r\n\r\n"),
        ("a bare LF after the size", "3\nabc\r\n0\r\n\r\n"),
        ("more than its size says", "3\r\nabcd\r\n0\r\n\r\n"),
        ("a blank before the size", " 3\r\nabc\r\n0\r\n\r\n"),
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("no size after a chunk", "3\r\nabc\r\n\r\n"),
        ("an extension without a size", ";a=b\r\nabc\r\n0\r\n\r\n"),
        ("a control character in an extension", "3; \0\x01;;=\r\nabc\r\n0\r\n\r\n"),
        ("a bare LF in an extension", "3;a\nabc\r\n\r\nabc\r\n0\r\n\r\n"),
    ] {
        let smuggled = format!("GET /smuggled HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host);
        let header = format!("POST /length HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\ntransfer-encoding: chunked\r\n\r\n", vm.host);
        let answer = raw(&rig, format!("{header}{body}{smuggled}").as_bytes()).await;
        let refused = statuses(&answer) == ["400"] && answer.contains("\r\nx-dormouse-reason: malformed-request\r\n");
        if !refused || !answer.to_lowercase().contains("\r\nconnection: close\r\n") {
            wrong.push_str(&format!("{what}: read\n{answer}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn case_25_what_pingora_forgives_in_chunks_reaches_the_app_in_one_reading() {
    let (rig, _app, vm, token) = rig().await;
    for (what, body, seen) in [
        ("an extension", "3;a=b\r\nabc\r\n0\r\n\r\n", "abc"),
        ("an extension that is junk", "3; \t;;=\r\nabc\r\n0\r\n\r\n", "abc"),
        ("trailers", "3\r\nabc\r\n0\r\nx-aws-proxy-auth: other\r\nhost: other\r\ncontent-length: 9\r\nx-trailer: 1\r\n\r\n", "abc"),
    ] {
        let header = format!("POST / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n", vm.host);
        let answer = raw(&rig, format!("{header}{body}").as_bytes()).await;
        // Either refused, or one request whose body has one reading; never a second request.
        let status = statuses(&answer);
        assert!(status == ["400"] || (status == ["200"] && answer.ends_with(&format!("\n\n{seen}"))), "{what}: {answer}");
        assert!(!answer.contains("x-trailer") && !answer.contains("other"), "{what}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_header_of_h2_is_refused_and_its_connection_goes_on() {
    let (rig, app, vm, token) = rig().await;
    let mut h2 = rig.h2().await;
    let large = "x".repeat(30_000);
    let fields = [("x-aws-proxy-auth", token.as_str()), ("a", &large)];
    let answer = h2.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
    assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
    // What is twice as large h2 does not keep, and tells.
    let larger = [fields[0], ("a", &"x".repeat(60_000))];
    for body in ["", "body"] {
        let answer = h2.send(h2_request("POST", &vm.host, "/", &larger, full(body))).await;
        assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
        assert!(answer.header("x-amzn-requestid").is_some());
    }
    let many: Vec<_> = [("x-aws-proxy-auth", token.as_str())].into_iter().chain([("a", "1"); 150]).collect();
    let answer = h2.send(h2_request("GET", &vm.host, "/", &many, full(""))).await;
    assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
    assert_eq!(app.requests.load(Ordering::SeqCst), 0);
    assert_eq!(h2.send(h2_request("GET", &vm.host, "/", &fields[..1], full(""))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_19_two_tokens_are_refused_however_they_are_written() {
    let (rig, app, vm, token) = rig().await;
    let auth = "x-aws-proxy-auth";
    let one = token.as_str();
    let list = |first: &str, second: &str| format!("{first}, {second}");
    for (what, fields) in [
        ("good and bad", vec![(auth, one.to_owned()), (auth, "bad".to_owned())]),
        ("bad and good", vec![(auth, "bad".to_owned()), (auth, one.to_owned())]),
        ("the same twice", vec![(auth, one.to_owned()), (auth, one.to_owned())]),
        ("in two spellings", vec![("X-AWS-Proxy-Auth", one.to_owned()), (auth, one.to_owned())]),
        ("nothing and good", vec![(auth, String::new()), (auth, one.to_owned())]),
        ("a list of good and bad", vec![(auth, list(one, "bad"))]),
        ("a list of bad and good", vec![(auth, list("bad", one))]),
        ("a list of the same", vec![(auth, list(one, one))]),
        ("a list with nothing", vec![(auth, format!("{one},"))]),
    ] {
        let lines: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let answer = raw(&rig, format!("GET / HTTP/1.1\r\nhost: {}\r\n{lines}connection: close\r\n\r\n", vm.host).as_bytes()).await;
        assert_eq!(statuses(&answer), ["403"], "{what}: {answer}");
        let fields: Vec<_> = fields.iter().map(|(_, value)| (auth, value.as_str())).collect();
        let answer = rig.h2().await.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
        assert_eq!(answer.status, 403, "{what} over h2");
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), 0);
    let spelled = raw(&rig, format!("GET / HTTP/1.1\r\nhost: {}\r\nX-AWS-PROXY-auth: {one}\r\nconnection: close\r\n\r\n", vm.host).as_bytes()).await;
    assert_eq!(statuses(&spelled), ["200"], "{spelled}");
}

#[tokio::test(flavor = "multi_thread")]
async fn case_20_what_looks_like_the_token_field_and_is_not() {
    let (rig, _app, vm, token) = rig().await;
    for (what, line, status) in [
        ("blanks around the value", format!("x-aws-proxy-auth: \t {token} \t "), "200"),
        ("no blank before the value", format!("x-aws-proxy-auth:{token}"), "200"),
        ("underscores", format!("X_aws_proxy_auth: {token}"), "403"),
        ("one underscore", format!("x-aws-proxy_auth: {token}"), "403"),
        ("a blank before the colon", format!("x-aws-proxy-auth : {token}"), "400"),
        ("a tab before the colon", format!("x-aws-proxy-auth\t: {token}"), "400"),
        ("a blank before the name", format!("a: b\r\n x-aws-proxy-auth: {token}"), "400"),
        ("a control character in the value", format!("x-aws-proxy-auth: {token}\x01"), "400"),
        ("a control character in the name", format!("x-aws-proxy-auth\x01: {token}"), "400"),
        ("DEL in the value", format!("x-aws-proxy-auth: {token}\x7f"), "400"),
        ("a blank in the value", format!("x-aws-proxy-auth: {} {}", &token[..20], &token[20..]), "403"),
        ("more than ASCII", format!("x-aws-proxy-auth: {token}\u{e4}"), "403"),
    ] {
        let answer = raw(&rig, format!("GET / HTTP/1.1\r\nhost: {}\r\n{line}\r\nconnection: close\r\n\r\n", vm.host).as_bytes()).await;
        assert_eq!(statuses(&answer), [status], "{what}: {answer}");
        assert!(!answer.contains(&token), "{what}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_22_one_host_in_one_spelling_or_another() {
    let (rig, app, vm, token) = rig().await;
    let auth = format!("x-aws-proxy-auth: {token}\r\nconnection: close\r\n\r\n");
    let upper = vm.host.to_uppercase();
    for host in [format!("{upper}."), format!("{}:443", vm.host), format!("{}.:8443", vm.host), format!("\t{} ", vm.host)] {
        let answer = raw(&rig, format!("GET / HTTP/1.1\r\nhost: {host}\r\n{auth}").as_bytes()).await;
        assert_eq!(statuses(&answer), ["200"], "{host}: {answer}");
    }
    let absolute = raw(&rig, format!("GET http://{0}/x HTTP/1.1\r\nhost: {0}\r\n{auth}", vm.host).as_bytes()).await;
    assert_eq!(statuses(&absolute), ["200"], "{absolute}");
    let before = app.requests.load(Ordering::SeqCst);
    for host in ["", &format!("{},other", vm.host), &format!("other,{}", vm.host), &format!("{}/x", vm.host), &format!("{} x", vm.host), &format!("{}:", vm.host), &format!("{}:0x50", vm.host), &format!("{}@other", vm.host)] {
        let answer = raw(&rig, format!("GET / HTTP/1.1\r\nhost: {host}\r\n{auth}").as_bytes()).await;
        assert!(["400", "403"].map(|status| vec![status]).contains(&statuses(&answer)), "{host}: {answer}");
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_21_fields_named_by_connection_do_not_change_who_gets_in() {
    let (rig, _app, vm, token) = rig().await;
    for (named, status) in [("x-aws-proxy-auth", "200"), ("x-aws-proxy-port", "200"), ("x-custom", "200"), ("host", "400"), ("x-forwarded-for", "400")] {
        let text = format!(
            "GET / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\nx-aws-proxy-port: 8080\r\nx-custom: secret\r\nx-forwarded-for: 1.1.1.1\r\nconnection: close, {named}\r\n\r\n",
            vm.host
        );
        let answer = raw(&rig, text.as_bytes()).await;
        assert_eq!(statuses(&answer)[0], status, "{named}: {answer}");
        if named == "x-custom" {
            assert!(!answer.contains("secret"), "{answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_26_a_refused_body_is_never_taken_for_a_request() {
    let (rig, app, vm, token) = rig().await;
    let smuggled = format!("GET /smuggled HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host);
    let second = format!("GET /second HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\nconnection: close\r\n\r\n", vm.host);
    let refused = |length: usize| format!("POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: {length}\r\n\r\n", vm.host);

    // A small body is read away: the request after it is judged on its own.
    let answer = raw(&rig, format!("{}{smuggled}{second}", refused(smuggled.len())).as_bytes()).await;
    assert_eq!(statuses(&answer), ["403", "200"], "{answer}");
    assert!(answer.contains("GET /second ") && !answer.contains("/smuggled"), "{answer}");

    // A large one ends the connection.
    let answer = raw(&rig, format!("{}{smuggled}", refused(10 << 20)).as_bytes()).await;
    assert_eq!(statuses(&answer), ["403"], "{answer}");
    assert!(answer.to_lowercase().contains("connection: close"), "{answer}");

    // A second request without a token is refused although the first one had one.
    let answer = raw(&rig, format!("{}{}", second.replace("connection: close\r\n", ""), refused(0)).as_bytes()).await;
    assert_eq!(statuses(&answer), ["200", "403"], "{answer}");
    assert_eq!(app.requests.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipelined_request_line_is_not_mended() {
    let (rig, app, vm, token) = rig().await;
    let first = format!("GET /first HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host);
    let mut sent = 0;
    for target in ["/a b", " /", "/\0", "/\x07", "/\t", "/a HTTP/1.1 "] {
        for cut in [false, true] {
            let second = first.replace("/first", target);
            let mut tls = rig.tls(&["http/1.1"]).await;
            let (at_once, later) = second.split_at(if cut { 8 } else { second.len() });
            tls.write_all(format!("{first}{at_once}").as_bytes()).await.unwrap();
            let mut answers = vec![0; 4096];
            let read = within("the first answer", tls.read(&mut answers)).await.unwrap();
            answers.truncate(read);
            tls.write_all(later.as_bytes()).await.unwrap();
            within("the end", tls.read_to_end(&mut answers)).await.unwrap();
            let answers = String::from_utf8(answers).unwrap();
            assert_eq!(statuses(&answers), ["200", "400"], "{target:?}, cut: {cut}: {answers}");
            assert!(answers.contains("x-dormouse-reason: malformed-request"), "{target:?}, cut: {cut}: {answers}");
            sent += 1;
        }
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), sent, "the second ones reached nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipelined_request_may_come_in_pieces() {
    let (rig, app, vm, token) = rig().await;
    let request = |path: &str| format!("GET /{path} HTTP/1.1\r\nhost: {}\r\nuser-agent: a b c d e\r\nx-aws-proxy-auth: {token}\r\n\r\n", vm.host);
    let (first, second) = (request("first"), request("second").replace("user-agent", "connection: close\r\nuser-agent"));
    // Cut in the request line, in a field, and before the last byte.
    for cut in [3, 8, 60, second.len() - 1] {
        let mut tls = rig.tls(&["http/1.1"]).await;
        tls.write_all(format!("{first}{}", &second[..cut]).as_bytes()).await.unwrap();
        let mut answers = vec![0; 4096];
        let read = within("the first answer", tls.read(&mut answers)).await.unwrap();
        answers.truncate(read);
        tls.write_all(&second.as_bytes()[cut..]).await.unwrap();
        within("the end", tls.read_to_end(&mut answers)).await.unwrap();
        let answers = String::from_utf8(answers).unwrap();
        assert_eq!(statuses(&answers), ["200", "200"], "cut at {cut}: {answers}");
    }
    assert_eq!(app.requests.load(Ordering::SeqCst), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_31_a_bad_guest_is_a_502_or_a_visible_cut() {
    let rig = Rig::with(|config| config.first_byte_deadline = Some(Duration::from_millis(300))).await;
    let ok = "HTTP/1.1 200 OK\r\n";
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(100);
    for (what, guest, status, reason) in [
        ("two lengths", canned(format!("{ok}content-length: 3\r\ncontent-length: 4\r\n\r\nabcd")).await, 502, "guest-answer-broken"),
        ("a bad name", canned(format!("{ok}b ad: 1\r\n\r\n")).await, 502, "guest-answer-broken"),
        ("a NUL", canned(format!("{ok}a: \0\r\n\r\n")).await, 502, "guest-answer-broken"),
        ("HTTP/0.9", canned("hello").await, 502, "guest-answer-broken"),
        ("nothing", canned("").await, 502, "guest-answer-broken"),
        ("many fields", canned(format!("{ok}{}content-length: 0\r\n\r\n", "a: 1\r\n".repeat(220))).await, 502, "guest-header-too-large"),
        ("very many fields", canned(format!("{ok}{}content-length: 0\r\n\r\n", "a: 1\r\n".repeat(1000))).await, 502, "guest-answer-broken"),
        ("an endless header", canned(format!("{ok}{}", "a: 1\r\n".repeat(500_000))).await, 502, "guest-answer-broken"),
        ("a large header", canned(format!("{ok}a: {}\r\ncontent-length: 0\r\n\r\n", "x".repeat(100_000))).await, 502, "guest-header-too-large"),
        ("endless interim answers", canned(format!("{interim}{ok}content-length: 0\r\n\r\n")).await, 502, "guest-answer-broken"),
        ("silence", scripted(|mut tcp| async move { while tcp.read(&mut [0; 100]).await.is_ok_and(|read| read > 0) {} }).await, 504, "guest-silent"),
    ] {
        let vm = rig.microvm(guest).await;
        let token = rig.token(&vm, PortScope::All);
        let answer = rig.h2().await.send(h2_request("POST", &vm.host, "/", &[("x-aws-proxy-auth", &token)], full("x"))).await;
        assert_eq!((answer.status, answer.reason(), answer.text()), (status, reason, ""), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_31_a_cut_answer_is_seen_as_cut() {
    let rig = Rig::new().await;
    let reset = |head: &'static str| {
        scripted(move |mut tcp| async move {
            read_header(&mut tcp).await;
            let _ = tcp.write_all(head.as_bytes()).await;
            tcp.set_zero_linger().unwrap();
        })
    };
    for (what, guest) in [
        ("too short", canned("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await),
        ("no last chunk", canned("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n").await),
        ("a reset where the close is the end", reset("HTTP/1.1 200 OK\r\n\r\nshort").await),
    ] {
        let vm = rig.microvm(guest).await;
        let token = rig.token(&vm, PortScope::All);
        let auth = [("x-aws-proxy-auth", token.as_str())];
        for version in [1, 2] {
            let response = if version == 1 {
                let mut h1 = rig.h1().await;
                within(what, h1.0.send_request(get(&vm.host, "/", &auth))).await
            } else {
                let mut h2 = rig.h2().await;
                within(what, h2.0.send_request(h2_request("GET", &vm.host, "/", &auth, full("")))).await
            };
            // The reset may overtake the answer's begin; a 502 says it as well.
            let Ok(response) = response else { continue };
            if response.status() == 502 {
                continue;
            }
            let body = within(what, http_body_util::BodyExt::collect(response.into_body())).await;
            assert!(body.is_err(), "{what}, HTTP/{version}: {:?}", body.map(|body| body.to_bytes()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_31_extra_bytes_of_a_guest_never_reach_the_next_client() {
    let rig = Rig::new().await;
    let extra = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison";
    let guest = scripted(move |mut tcp| async move {
        while !read_header(&mut tcp).await.is_empty() {
            if tcp.write_all(extra.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await;
    let vm = rig.microvm(guest).await;
    let token = rig.token(&vm, PortScope::All);
    let mut h1 = rig.h1().await;
    for _ in 0..20 {
        let answer = h1.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
        assert_eq!((answer.status, answer.text()), (200, "ok"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_speak_in_the_gateways_name() {
    let rig = Rig::new().await;
    let vm = rig.microvm(canned("HTTP/1.1 503 No\r\nx-dormouse-reason: terminated\r\nx-amzn-requestid: mine\r\ncontent-length: 0\r\n\r\n").await).await;
    let token = rig.token(&vm, PortScope::All);
    let answer = rig.h1().await.send(get(&vm.host, "/", &[("x-aws-proxy-auth", &token)])).await;
    assert_eq!((answer.status, answer.reason()), (503, ""));
    assert_ne!(answer.header("x-amzn-requestid"), Some("mine"));
}

/// An answer as it reached the client: its first line, its fields but for those that differ from answer to answer, its body.
fn taken_apart(text: &str) -> (String, Vec<String>, String) {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let mut lines = head.split("\r\n").map(ToOwned::to_owned);
    let first = lines.next().unwrap();
    let differs = |line: &String| ["date: ", "x-amzn-requestid: ", "x-mark:"].iter().any(|name| line.to_ascii_lowercase().starts_with(name));
    let mut fields: Vec<_> = lines.filter(|line| !differs(line)).collect();
    fields.sort_unstable();
    (first, fields, body.to_owned())
}

/// An answer in which all is as usual is passed on as it is, any other is taken apart and put together again: a field that is
/// folded over two lines makes it another.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_the_same_whichever_way_it_goes() {
    let rig = Rig::new().await;
    let mut h2 = rig.h2().await;
    for (method, answer) in [
        ("GET", "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Type: text/plain\r\ncontent-length: 2\r\nX-oDD: y\r\n{}\r\nok"),
        ("GET", "HTTP/1.1 200 OK\r\nset-cookie: a=1\r\nx: 1\r\nSet-Cookie: b=2\r\nContent-Length:2\r\n{}\r\nok"),
        ("GET", "HTTP/1.1 404 \r\ncontent-length: 0\r\nempty:\r\n{}\r\n"),
        ("GET", "HTTP/1.1 299 Fine by me\r\ncontent-length: 3\r\nDate: yesterday\r\nconnection: close\r\n{}\r\nabc"),
        ("GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nconnection: keep-alive\r\n{}\r\n2;x=1\r\nok\r\n0\r\nt: 1\r\n\r\n"),
        ("GET", "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{}\r\ndata: until the end\n\n"),
        ("GET", "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n{}\r\nok"),
        ("GET", "HTTP/1.1 204 No Content\r\nx: 1\r\n{}\r\n"),
        ("GET", "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\netag: \"1\"\r\n{}\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n{}\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{}\r\n"),
        ("GET", "HTTP/1.1 200 OK\r\nx-dormouse-reason: mine\r\nX-Amzn-RequestId: mine\r\ncontent-length: 2, 2\r\n{}\r\nok"),
        ("GET", "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n{}\r\nok"),
    ] {
        let mut ways = Vec::new();
        for mark in ["X-Mark: 1\r\n", "X-Mark: 1\r\n 2\r\n"] {
            let vm = rig.microvm(canned(answer.replace("{}", mark)).await).await;
            let token = rig.token(&vm, PortScope::All);
            let text = raw(&rig, format!("{method} / HTTP/1.1\r\nhost: {}\r\nx-aws-proxy-auth: {token}\r\nconnection: close\r\n\r\n", vm.host).as_bytes()).await;
            assert!(!text.contains("mine") && !text.contains("yesterday"), "{text}");
            let last = text.rfind("HTTP/1.1 ").or(text.rfind("HTTP/1.0 ")).unwrap_or_else(|| panic!("{answer}: {text:?}"));
            // Another microVM, whose connection cannot be one that its app has just closed.
            let vm = rig.microvm(canned(answer.replace("{}", mark)).await).await;
            let token = rig.token(&vm, PortScope::All);
            let auth = [("x-aws-proxy-auth", token.as_str())];
            let over_h2 = within("the answer", h2.0.send_request(h2_request(method, &vm.host, "/", &auth, full("")))).await.unwrap();
            let (head, body) = over_h2.into_parts();
            assert!(head.headers.contains_key("date") && head.headers["x-amzn-requestid"] != "mine", "{head:?}");
            let differs = |name: &str| ["date", "x-amzn-requestid", "x-mark"].contains(&name);
            let mut fields: Vec<_> = head.headers.iter().map(|(name, value)| (name.to_string(), value.clone())).filter(|(name, _)| !differs(name)).collect();
            fields.sort_unstable();
            let body = within("the body", body.collect()).await.map(|body| body.to_bytes());
            ways.push((text[..last].to_owned(), taken_apart(&text[last..]), head.status, fields, body.unwrap()));
        }
        assert_eq!(ways[0], ways[1], "{answer}");
        assert!(ways[0].1.1.contains(&"Connection: close".to_owned()), "{:?}", ways[0]);
    }
}
