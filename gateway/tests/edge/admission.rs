//! Who gets in (cases 1–8, 17–19, 21–22): every refusal before any guest is touched.

use std::time::{Duration, SystemTime};

use model::{EndpointId, MicrovmState, Port, PortRange, PortScope};

use crate::{
    app::App,
    rig::{Rig, SUFFIX, full, get, h2_request, request, until},
};

const MISSING: &str = "Request missing authentication";
const FAILED: &str = "Token authentication failed";

#[tokio::test(flavor = "multi_thread")]
async fn refusals_read_as_aws_writes_them_and_wake_nobody() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let other = rig.run(None).await;
    rig.suspend(&vm).await;

    let now = SystemTime::now();
    let good = rig.token(&vm, PortScope::All);
    let narrow = rig.token(&vm, PortScope::single(Port::new(9000).unwrap()));
    let foreign = rig.token(&other, PortScope::All);
    let shell = rig.mint(&vm, |claims| claims.shell = true);
    let expired = rig.mint(&vm, |claims| (claims.issued_at, claims.expires_at) = (now - Duration::from_secs(60), now - Duration::from_secs(1)));
    let future = rig.mint(&vm, |claims| (claims.issued_at, claims.expires_at) = (now + Duration::from_secs(300), now + Duration::from_secs(600)));
    let forged = {
        let mut forged = good.clone().into_bytes();
        let place = forged.len() - 30;
        forged[place] = if forged[place] == b'A' { b'B' } else { b'A' };
        String::from_utf8(forged).unwrap()
    };
    let unknown = format!("{}.{SUFFIX}", EndpointId::random());
    let host = vm.host.as_str();
    let auth = "x-aws-proxy-auth";
    let port = "x-aws-proxy-port";
    let too_long = "a".repeat(8001);

    // Host, fields, status, body, reason.
    type Row<'a> = (&'a str, Vec<(&'a str, &'a str)>, u16, &'a str, &'a str);
    let rows: Vec<Row> = vec![
        (host, vec![], 403, MISSING, "token-missing"),
        (&unknown, vec![], 403, MISSING, "token-missing"),
        ("example.com", vec![], 403, MISSING, "token-missing"),
        (host, vec![(auth, "")], 403, MISSING, "token-unreadable"),
        (host, vec![(auth, "a.b.c")], 403, MISSING, "token-unreadable"),
        (host, vec![(auth, "not a token")], 403, MISSING, "token-unreadable"),
        (host, vec![(auth, &too_long)], 403, MISSING, "token-unreadable"),
        (host, vec![(auth, &forged)], 403, FAILED, "token-refused"),
        (host, vec![(auth, &expired)], 403, FAILED, "token-expired"),
        (host, vec![(auth, &future)], 403, FAILED, "token-not-yet-valid"),
        (host, vec![(auth, &foreign)], 403, FAILED, "token-not-for-this-host"),
        (&unknown, vec![(auth, &good)], 403, FAILED, "token-not-for-this-host"),
        ("example.com", vec![(auth, &good)], 403, FAILED, "token-not-for-this-host"),
        (host, vec![(auth, &good), (auth, &good)], 403, MISSING, "token-ambiguous"),
        (host, vec![(auth, &good), (auth, "bad")], 403, MISSING, "token-ambiguous"),
        (host, vec![(auth, "bad"), (auth, &good)], 403, MISSING, "token-ambiguous"),
        // Case 17: a token anywhere else is not one, nor is one in a subprotocol without a real upgrade.
        (host, vec![("authorization", &good), ("cookie", &good)], 403, MISSING, "token-missing"),
        (host, vec![("x_aws_proxy_auth", &good)], 403, MISSING, "token-missing"),
        (host, vec![("sec-websocket-protocol", "lambda-microvms, lambda-microvms.authentication.x")], 403, MISSING, "token-missing"),
        (host, vec![(auth, &shell)], 502, "", "shell-token"),
        // Cases 5–7.
        (host, vec![(auth, &narrow)], 403, "Access to port denied", "port-denied"),
        (host, vec![(auth, &narrow), (port, "8999")], 403, "Access to port denied", "port-denied"),
        (host, vec![(auth, &good), (port, "0")], 400, "Malformed port", "port-malformed"),
        (host, vec![(auth, &good), (port, "65536")], 400, "Malformed port", "port-malformed"),
        (host, vec![(auth, &good), (port, "8080,9000")], 400, "Malformed port", "port-malformed"),
        (host, vec![(auth, &good), (port, "8080"), (port, "8080")], 400, "Malformed port", "port-malformed"),
        (host, vec![(auth, &good), (port, "8080@10.0.0.1")], 400, "Malformed port", "port-malformed"),
    ];
    let mut h1 = rig.h1().await;
    let mut h2 = rig.h2().await;
    for (host, fields, status, body, reason) in &rows {
        let one = h1.send(get(host, "/x", fields)).await;
        let two = h2.send(h2_request("GET", host, "/x", fields, full(""))).await;
        for answer in [one, two] {
            assert_eq!((answer.status, answer.text(), answer.reason()), (*status, *body, *reason), "{host} {fields:?}");
            assert_eq!(answer.header("content-type"), Some("text/plain"));
            assert_eq!(answer.header("cache-control"), Some("private, no-store"));
            assert!(answer.header("x-amzn-requestid").is_some());
            assert_eq!(answer.header("grpc-status"), None);
        }
    }
    // All of it on two connections: a refusal costs no handshake. Nothing was woken, nothing reached the app.
    assert_eq!(rig.metric("edge_connections", &[]), 2.0);
    assert_eq!(vm.state(), MicrovmState::Suspended);
    assert_eq!((rig.engine.counts().restores, rig.engine.counts().dials), (0, 0));
    assert_eq!(app.requests.load(std::sync::atomic::Ordering::SeqCst), 0);
    let refused = rows.iter().filter(|row| row.4 == "token-missing").count();
    until("all refusals to be counted", || rig.metric("edge_refusals_total", &[("reason", "token-missing")]) == 2.0 * refused as f64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_foreign_answers_are_byte_for_byte_the_same() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let other = rig.run(None).await;
    let foreign = rig.token(&other, PortScope::All);
    let unknown = format!("{}.{SUFFIX}", EndpointId::random());
    let mut h1 = rig.h1().await;
    let mut texts = Vec::new();
    for host in [vm.host.as_str(), &unknown, "x.example.com"] {
        let mut answer = h1.send(get(host, "/", &[("x-aws-proxy-auth", &foreign)])).await;
        answer.headers.remove("x-amzn-requestid");
        answer.headers.remove("date");
        texts.push(format!("{answer:?}"));
    }
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0], texts[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_effective_port_decides_within_the_scope() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let number = |number| Port::new(number).unwrap();
    for port in [3000, 3005] {
        rig.engine.listen(number(port), address);
    }
    let scope = PortScope::Ranges(vec![PortRange { first: number(3000), last: number(3005) }]);
    let (ranged, default, all) = (rig.token(&vm, scope), rig.token(&vm, PortScope::single(Port::DEFAULT)), rig.token(&vm, PortScope::All));
    let mut h1 = rig.h1().await;
    for (token, port, status, reason) in [
        (&ranged, Some("2999"), 403, "port-denied"),
        (&ranged, Some("3000"), 200, ""),
        (&ranged, Some("3005"), 200, ""),
        (&ranged, Some("3006"), 403, "port-denied"),
        (&ranged, None, 403, "port-denied"),
        (&ranged, Some("3001"), 502, "port-not-listening"),
        (&default, None, 200, ""),
        (&default, Some("8080"), 200, ""),
        (&default, Some("8081"), 403, "port-denied"),
        (&all, Some("9"), 502, "port-not-listening"),
    ] {
        let mut fields = vec![("x-aws-proxy-auth", token.as_str())];
        fields.extend(port.map(|port| ("X-AWS-Proxy-Port", port)));
        let answer = h1.send(get(&vm.host, "/", &fields)).await;
        assert_eq!((answer.status, answer.reason()), (status, reason), "{port:?}");
        if status == 502 {
            assert_eq!(answer.text(), "");
            h1 = rig.h1().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_9_expiry_is_checked_for_each_request_and_cuts_nothing() {
    let rig = Rig::new().await;
    let (app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    // Expiry is in whole seconds, so this token lives between one and two seconds.
    let token = rig.mint(&vm, |claims| claims.expires_at = SystemTime::now() + Duration::from_secs(2));
    let fields = [("x-aws-proxy-auth", token.as_str())];
    let mut h2 = rig.h2().await;
    let running = tokio::spawn({
        let mut h2 = crate::rig::H2(h2.0.clone());
        let request = h2_request("GET", &vm.host, "/slow", &fields, full(""));
        async move { h2.send(request).await }
    });
    until("the slow request to arrive", || app.requests.load(std::sync::atomic::Ordering::SeqCst) == 1).await;
    let deadline = tokio::time::Instant::now() + crate::rig::CEILING;
    loop {
        let answer = h2.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await;
        match answer.status {
            200 => assert!(tokio::time::Instant::now() < deadline, "the token never expired"),
            _ => {
                assert_eq!((answer.status, answer.text(), answer.reason()), (403, FAILED, "token-expired"));
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    app.go.notify_one();
    let answer = running.await.unwrap();
    assert_eq!((answer.status, answer.text()), (200, "at last"));
}

#[tokio::test(flavor = "multi_thread")]
async fn case_18_what_is_the_platforms_never_reaches_the_app() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let token = rig.token(&vm, PortScope::All);
    let fields = [
        ("x-aws-proxy-auth", token.as_str()),
        ("x-aws-proxy-port", "8080"),
        ("X-AWS-PROXY-Future", "1"),
        ("x_aws_proxy_auth", &token),
        ("sec-websocket-protocol", &format!("lambda-microvms, lambda-microvms.authentication.{token}")),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("authorization", "Bearer app"),
        ("x-amzn-requestid", "mine"),
    ];
    let (mut h1, mut h2) = (rig.h1().await, rig.h2().await);
    let forced: Vec<_> = fields.iter().copied().chain([("x-aws-proxy-force-h2", "true")]).collect();
    let answers = [
        h1.send(get(&vm.host, "/show", &fields)).await,
        h2.send(h2_request("GET", &vm.host, "/show", &fields, full(""))).await,
        h2.send(h2_request("GET", &vm.host, "/show", &forced, full(""))).await,
    ];
    for answer in answers {
        assert_eq!(answer.status, 200);
        let seen = answer.text().to_lowercase();
        for gone in ["aws-proxy", "aws_proxy", "lambda-microvms", "x-forwarded", "forwarded:", "via:", &token.to_lowercase()] {
            assert!(!seen.contains(gone), "{gone} in {seen}");
        }
        assert!(seen.contains("authorization: bearer app") && seen.contains("traceparent: 00-0af7"), "{seen}");
        if !seen.contains("http/2") {
            assert!(seen.contains(&format!("host: {}", vm.host)), "{seen}");
        }
        // Client and app read one id, and it is ours.
        let id = answer.header("x-amzn-requestid").unwrap();
        assert!(id != "mine" && seen.contains(&format!("x-amzn-requestid: {id}")), "{seen}");
        assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
    }
    assert!(!rig.metrics_text().contains(&token));
}

#[tokio::test(flavor = "multi_thread")]
async fn case_22_each_request_is_judged_by_its_own_authority() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let (a, b) = (rig.microvm(address).await, rig.run(None).await);
    let (for_a, for_b) = (rig.token(&a, PortScope::All), rig.token(&b, PortScope::All));
    let mut h2 = rig.h2().await;
    for (host, token, status) in [(&a, &for_a, 200), (&b, &for_a, 403), (&b, &for_b, 200), (&a, &for_b, 403), (&a, &for_a, 200)] {
        let answer = h2.send(h2_request("GET", &host.host, "/", &[("x-aws-proxy-auth", token)], full(""))).await;
        assert_eq!(answer.status, status);
    }
    let mut h1 = rig.h1().await;
    let auth = [("x-aws-proxy-auth", for_a.as_str())];
    for host in [a.host.to_uppercase(), format!("{}.", a.host), format!("{}:443", a.host), format!("{}.:8443", a.host)] {
        assert_eq!(h1.send(get(&host, "/", &auth)).await.status, 200, "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_token_fits_in_a_header() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let long = "x".repeat(8000);
    let cookie = "y".repeat(8000);
    let fields = [("x-aws-proxy-auth", long.as_str()), ("cookie", cookie.as_str())];
    // Refused for what it says, not for its size.
    assert_eq!(rig.h1().await.send(get(&vm.host, "/", &fields)).await.reason(), "token-unreadable");
    assert_eq!(rig.h2().await.send(h2_request("GET", &vm.host, "/", &fields, full(""))).await.reason(), "token-unreadable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_client_reads_its_own_status_beside_the_http_one() {
    let rig = Rig::new().await;
    let (_app, address) = App::start().await;
    let vm = rig.microvm(address).await;
    let narrow = rig.token(&vm, PortScope::single(Port::new(1).unwrap()));
    let mut h2 = rig.h2().await;
    for (auth, status, grpc) in [(None, 403, "7"), (Some(narrow.as_str()), 403, "7")] {
        let mut fields = vec![("content-type", "application/grpc"), ("te", "trailers")];
        fields.extend(auth.map(|auth| ("x-aws-proxy-auth", auth)));
        let answer = h2.send(h2_request("POST", &vm.host, "/pkg.Service/Call", &fields, full("12345"))).await;
        assert_eq!((answer.status, answer.header("grpc-status")), (status, Some(grpc)));
        assert!(answer.header("grpc-message").is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_head_request_has_no_body_and_keeps_its_connection() {
    let rig = Rig::new().await;
    let mut h1 = rig.h1().await;
    for _ in 0..3 {
        let answer = h1.send(request("HEAD", "x.example.com", "/", &[], full(""))).await;
        assert_eq!((answer.status, answer.text(), answer.header("content-length")), (403, "", Some("30")));
    }
    assert_eq!(rig.metric("edge_connections", &[]), 1.0);
}
